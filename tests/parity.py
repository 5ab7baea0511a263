"""The parity ladder: this repository and transformers side by side on one checkpoint, rung by rung.

    python tests/parity.py --model Qwen/Qwen2-VL-2B-Instruct --image photo.jpg

Both read the same folder and the same pictures. From the prompt to the generated tokens, each rung compares what
the two computed there, and the first one that differs by more than rounding explains is marked: what is above it
is right, so the fault sits in that step. To hunt a fault in a port of your own, put your model in `run_ours`.

From the pixels on, both models get the reference's inputs, so that a fault there does not hide the model's. The
two run one after the other, and only one of them is in memory at a time. Exit code 0: all rungs hold, 1: one
breaks, 2: nothing could be compared.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from generate import Sampling, generate
from load_weights import find_device, find_folder, load_config, load_model
from preprocess import Batch, Processor
from qwen2vl import get_rope_index

# How far two correct runs may lie apart, as a share of what the numbers at that place are like (see `compare`).
# Measured on models of up to 16 layers: float32 7e-6, and planted faults 2e-4 and more; float16 0.01 and bfloat16
# 0.09, so that these show gross faults only. In a float64 run the reference itself rounds to float32 in places.
LIMITS = {"float64": 2e-5, "float32": 1e-4, "bfloat16": 0.2, "float16": 0.03}

REFERENCE_ATTENTION = {"plain": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}


@dataclass
class Rung:
    name: str
    shape: str
    holds: bool
    largest: float | None = None  # absolute difference; None where only equality counts
    share: float | None = (
        None  # the same relative to the numbers around it, which is what is judged
    )
    note: str = ""


def compare(name, ours, theirs, limit):
    """Two tensors: where they are furthest apart, and whether that is within the limit.

    A difference is measured against its element and the root mean square of its row (the last dimension), because
    activations of large models reach thousands in a few channels: no fixed bound fits both them and the logits.
    """
    if ours.shape != theirs.shape:
        note = f"shapes differ: ours {list(ours.shape)}, reference {list(theirs.shape)}"
        return Rung(name, str(list(ours.shape)), False, note=note)
    ours, theirs = ours.double(), theirs.double()
    difference = (ours - theirs).abs().nan_to_num(float("inf"))
    share = difference / (theirs.abs() + theirs.pow(2).mean(-1, keepdim=True).sqrt() + 1e-30)
    share = share.nan_to_num(float("inf"))
    place = np.unravel_index(int(share.argmax()), share.shape)
    at = ", ".join(str(int(i)) for i in place)
    note = f"furthest apart at [{at}]: ours {ours[place]:.6g}, reference {theirs[place]:.6g}"
    worst = share.max().item()
    return Rung(name, str(list(ours.shape)), worst <= limit, difference.max().item(), worst, note)


def equal(name, ours, theirs, unit):
    """Two sequences that must be the same: texts or lists of ids."""
    note = ""
    if ours != theirs:
        pairs = zip(ours, theirs, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        excerpts = [
            repr(x[first : first + (40 if isinstance(x, str) else 8)]) for x in (ours, theirs)
        ]
        note = f"from {unit[:-1]} {first} on: ours {excerpts[0]}, reference {excerpts[1]}"
    count = f"{len(theirs)} {unit if len(theirs) != 1 else unit[:-1]}"
    return Rung(name, count, ours == theirs, note=note)


# -------------------------------------------------------------------------------------------------- inputs


def conversation(arguments):
    """One user message: the pictures (none given: one that is drawn here), then the question."""
    pictures = [upright(path) for path in arguments.image] or [drawn_picture()]
    pictures = [] if arguments.text_only else pictures
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": arguments.prompt}]}]


def upright(path):
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image at {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from error


def drawn_picture():
    """210x170 pixels of colour gradients with a dark box in them: no symmetry that could hide a swap of axes."""
    y, x = np.mgrid[0:170, 0:210]
    picture = np.stack([x * 255 // 210, y * 255 // 170, (3 * x + y) % 256], axis=-1).astype(
        np.uint8
    )
    picture[40:90, 120:180] = (30, 10, 60)
    return Image.fromarray(picture)


def reference_inputs(folder, messages, our_text):
    """The reference's prompt text, ids [S], pixels and grids; and what of ours had to stand in.

    Its processor class for whole conversations needs torchvision, so its parts are used: tokenizer, template and
    the Pillow image processor. Then each picture's placeholder is repeated as that class does it.
    """
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer, borrowed = AutoTokenizer.from_pretrained(folder), []
    template = tokenizer.chat_template
    if template is None and (folder / "chat_template.json").is_file():
        template = json.loads((folder / "chat_template.json").read_text(encoding="utf-8"))[
            "chat_template"
        ]
    try:
        if template is None:
            raise ImportError("the folder has no chat template")
        import jinja2  # noqa: F401  (transformers renders with it, and does not depend on it)

        # The real pictures would be written into the text by a template that prints what it does not know.
        plain = [
            item | {"image": ""} if item["type"] == "image" else item
            for item in messages[0]["content"]
        ]
        plain = [{"role": "user", "content": plain}]
        text = tokenizer.apply_chat_template(
            plain, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except ImportError as error:
        borrowed.append(f"prompt text: ours on both sides ({error})")
        text = our_text
    pictures = [item["image"] for item in messages[0]["content"] if item["type"] == "image"]
    pixels = grids = None
    expanded = text
    if pictures:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        made = processor(images=pictures, return_tensors="pt")
        pixels, grids = made["pixel_values"], made["image_grid_thw"]
        pad = tokenizer.convert_ids_to_tokens(load_config(folder).image_token_id)
        start, *rest = text.split(pad)
        counts = (grids.prod(-1) // processor.merge_size**2).tolist()
        expanded = start + "".join(pad * n + part for n, part in zip(counts, rest, strict=True))
    return text, tokenizer(expanded)["input_ids"], pixels, grids, borrowed


# -------------------------------------------------------------------------------------------- the two runs


def listen(modules):
    """Hooks that keep what each module gives (and what the first decoder layer gets), on the CPU."""
    heard = {}

    def keep(name, module):
        def hook(_, args, output):
            if name == "decoder layer 0":
                heard["embeddings"] = args[0].detach().cpu()
            heard[name] = (output[0] if isinstance(output, tuple) else output).detach().cpu()

        return module.register_forward_hook(hook)

    return heard, [keep(name, module) for name, module in modules.items()]


def rungs_of(visual, decoder, lm_head):
    """Name -> module, in the order in which data meets them; both implementations use the same inner names."""
    return {
        "patch embedding": visual.patch_embed,
        **{f"vision block {i}": block for i, block in enumerate(visual.blocks)},
        "merger": visual.merger,
        **{f"decoder layer {i}": layer for i, layer in enumerate(decoder.layers)},
        "final norm": decoder.norm,
        "logits": lm_head,
    }


@torch.inference_mode()
def run_ours(folder, inputs, arguments):
    """-> {rung: tensor}, new tokens."""
    dtype = getattr(torch, arguments.dtype)
    model = load_model(folder, arguments.device, dtype, arguments.attention)
    device = model.lm_head.weight.device
    heard, hooks = listen(rungs_of(model.visual, model.model, model.lm_head))
    tensors = {name: x.to(device) for name, x in inputs.items()}
    model(**tensors)
    for hook in hooks:
        hook.remove()
    ids, grids = tensors["input_ids"], tensors.get("image_grid_thw")
    heard["positions"], heard["rope delta"] = (
        x.cpu() for x in get_rope_index(model.config, ids, grids)
    )
    arrays = {name: x.numpy() for name, x in inputs.items()}
    batch = Batch(attention_mask=np.ones_like(arrays["input_ids"]), **arrays)
    [tokens] = generate(model, batch, arguments.max_new_tokens, Sampling())
    return heard, tokens


@torch.inference_mode()
def run_reference(folder, inputs, arguments):
    """The same with transformers."""
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(
        folder,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=REFERENCE_ATTENTION[arguments.attention],
    )
    device = find_device(arguments.device)
    model = model.to(device).eval()
    heard, hooks = listen(rungs_of(model.model.visual, model.model.language_model, model.lm_head))
    tensors = {name: x.to(device) for name, x in inputs.items()}
    ids, grids = tensors["input_ids"], tensors.get("image_grid_thw")
    kinds = (ids == model.config.image_token_id).int()  # 0: text, 1: picture
    model(**tensors, mm_token_type_ids=kinds, use_cache=False)
    for hook in hooks:
        hook.remove()
    heard["positions"], heard["rope delta"] = (
        x.cpu() for x in model.model.get_rope_index(ids, kinds, grids)
    )
    model.generation_config.repetition_penalty = 1.0
    model.model.rope_deltas = None  # it keeps those of the last call
    made = model.generate(
        **tensors,
        mm_token_type_ids=kinds,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    return heard, made[0, ids.shape[1] :].tolist()


def climb(folder, arguments, say):
    """All rungs, in the order in which data meets them."""
    limit, messages = LIMITS[arguments.dtype], conversation(arguments)
    processor = Processor.from_pretrained(folder)
    text = processor.tokenizer.apply_chat_template(messages)
    batch = processor(messages)
    their_text, their_ids, pixels, grids, borrowed = reference_inputs(folder, messages, text)
    say(*(f"note: {line}" for line in borrowed))
    rungs = [equal("prompt text", text, their_text, "characters")]
    inputs = {"input_ids": torch.tensor([their_ids])}
    if pixels is not None:
        inputs |= {"pixel_values": pixels, "image_grid_thw": grids}
        rungs.append(
            equal("picture grids", batch.image_grid_thw.tolist(), grids.tolist(), "pictures")
        )
        # The same Pillow gives the same bits; only that, no rounding, makes the pixels equal.
        rungs.append(compare("pixels", torch.from_numpy(batch.pixel_values), pixels, 0.0))
    rungs.append(equal("prompt ids", batch.input_ids[0].tolist(), their_ids, "tokens"))

    theirs, their_tokens = run_reference(folder, inputs, arguments)
    ours, tokens = run_ours(folder, inputs, arguments)
    names = list(theirs)
    vision = names[: names.index("merger") + 1] if "merger" in names else []
    rest = [name for name in names if name not in (*vision, "positions", "rope delta")]
    for name in (*vision, "positions", "rope delta", *rest):
        exact = name in ("positions", "rope delta")
        rungs.append(compare(name, ours[name], theirs[name], 0.0 if exact else limit))
    last = equal("greedy tokens", tokens, their_tokens, "tokens")
    if not last.holds and arguments.dtype in ("bfloat16", "float16"):
        say(
            "note: greedy tokens differ, which a near tie is enough for in half precision; not counted"
        )
        last.holds = True
    return [*rungs, last]


# ---------------------------------------------------------------------------------------- the command line


def show(rungs, limit, say):
    """The table, and a sentence on where to look."""
    broken = [rung for rung in rungs if not rung.holds]
    width = max(len(rung.name) for rung in rungs)
    shape_width = max(len(rung.shape) for rung in rungs)
    say(f"{'rung':{width}}  {'shape':{shape_width}}  largest difference  relative")
    for rung in rungs:
        largest = "" if rung.largest is None else f"{rung.largest:.2e}"
        share = "" if rung.share is None else f"{rung.share:.2e}"
        if rung.largest in (None, 0.0):
            largest, share = "differs" if rung.note and rung.largest is None else "equal", ""
        mark = "" if rung.holds else "  broken"
        mark = "  BROKEN, first" if rung in broken[:1] else mark
        say(
            f"{rung.name:{width}}  {rung.shape:{shape_width}}  {largest:>18}  {share:>8}{mark}".rstrip()
        )
    if not broken:
        say(
            "",
            f"All {len(rungs)} rungs hold (limit {limit:g} relative; ids, positions and pixels equal).",
        )
        return
    first = broken[0]
    say(
        "",
        f"{first.name} is the first of {len(broken)} broken rungs out of {len(rungs)}; {first.note}.",
    )


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description="Compares this repository with transformers on one checkpoint, rung by rung.",
        epilog="Exit code 0: all rungs hold, 1: one breaks, 2: nothing could be compared.",
    )
    add = parser.add_argument
    add(
        "--model", required=True, metavar="FOLDER_OR_NAME", help="a checkpoint folder or a hub name"
    )
    add(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="repeat for several (default: one is drawn)",
    )
    add("--text-only", action="store_true", help="no image at all")
    add("--prompt", default="Describe this image.", help="(default: %(default)s)")
    add(
        "--dtype",
        choices=LIMITS,
        default="float32",
        help="of both models (default: float32, the sharpest)",
    )
    add("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    add(
        "--attention",
        choices=REFERENCE_ATTENTION,
        default="sdpa",
        help="of both models (default: sdpa)",
    )
    add(
        "--max-new-tokens",
        type=int,
        default=16,
        metavar="N",
        help="greedy tokens to compare (default: 16)",
    )
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {arguments.max_new_tokens}, expected 1 or more")
    if arguments.text_only and arguments.image:
        parser.error("--text-only and --image exclude each other")
    return arguments


def main(argv=None):
    arguments = parse_arguments(argv)

    def say(*lines):
        for line in lines:
            print(line, flush=True)

    try:
        try:
            import transformers
        except ImportError:
            raise ValueError(
                "the ladder needs transformers: pip install -r requirements-dev.txt"
            ) from None
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        # PyTorch lets convolutions round to TF32 on CUDA, and the reference embeds its patches with one.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        find_device(arguments.device)
        folder = find_folder(arguments.model)
        say(
            f"{arguments.model}: ours beside transformers {transformers.__version__}, {arguments.dtype} on "
            f"{arguments.device}, {arguments.attention} attention",
            "",
        )
        rungs = climb(folder, arguments, say)
    except (OSError, ValueError) as error:
        print(f"parity.py: {error}", file=sys.stderr)
        return 2
    show(rungs, LIMITS[arguments.dtype], say)
    return 0 if all(rung.holds for rung in rungs) else 1


if __name__ == "__main__":
    sys.exit(main())
