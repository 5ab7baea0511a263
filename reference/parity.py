"""The parity ladder: this repository and transformers run the same input, compared step by step.

    python -m reference.parity --model Qwen/Qwen2-VL-2B-Instruct --image photo.jpg

Both read the same checkpoint and the same images. From the prompt to the generated tokens, each
rung compares what the two computed at that step. The first rung that differs by more than rounding
explains is marked: the rungs above it hold, so the fault is in that step. To find a fault in a port
of your own, put your model in `run_ours`.

From the pixels on, both models get the reference's inputs, so that a fault in the preprocessing
does not hide one in the model. The models run one after the other, and only one is in memory at a
time.

Exit code 0: all rungs hold, 1: one differs, 2: nothing could be compared.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from generate import GenerationConfig, generate
from load_weights import find_checkpoint, find_device, load_config, load_model
from media import load_image
from preprocess import Batch, Processor
from qwen2vl import get_rope_index

# The largest relative difference (see `compare`) between two correct runs. Measured on models of up
# to 16 layers: float32 7e-6, while injected faults gave 2e-4 and more; float16 0.01 and bfloat16
# 0.09, so these two show only gross faults. In a float64 run the reference itself rounds to float32
# in places.
LIMITS = {"float64": 2e-5, "float32": 1e-4, "bfloat16": 0.2, "float16": 0.03}

# The attention implementations, by their names in `load_model` and in transformers.
REFERENCE_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}


# ------------------------------------------------------------------------------------- comparisons
@dataclass
class Rung:
    """The result of one comparison."""

    name: str
    shape: str
    holds: bool
    max_difference: float | None = None  # absolute; None where only equality counts
    relative_difference: float | None = None  # what is compared with the limit
    note: str = ""  # where the two differ most


def compare(name: str, ours: Tensor, theirs: Tensor, limit: float) -> Rung:
    """Compare two tensors, at the element where they differ most.

    A difference is divided by its element plus the root mean square of its row (the last
    dimension), because
    activations of large models reach thousands in a few channels: no absolute limit fits both them
    and the logits. NaN counts as an infinite difference.
    """
    shape = str(list(ours.shape))
    if ours.shape != theirs.shape:
        note = f"shapes differ: ours {shape}, reference {list(theirs.shape)}"
        return Rung(name, shape, holds=False, note=note)
    ours = ours.double()
    theirs = theirs.double()
    difference = (ours - theirs).abs().nan_to_num(float("inf"))
    row_scale = theirs.pow(2).mean(-1, keepdim=True).sqrt()
    relative = difference / (theirs.abs() + row_scale + 1e-30)
    relative = relative.nan_to_num(float("inf"))
    worst = np.unravel_index(int(relative.argmax()), relative.shape)
    index = ", ".join(str(int(i)) for i in worst)
    return Rung(
        name,
        shape,
        holds=relative[worst].item() <= limit,
        max_difference=difference.max().item(),
        relative_difference=relative[worst].item(),
        note=f"largest at [{index}]: ours {ours[worst]:.6g}, reference {theirs[worst]:.6g}",
    )


def equal(name: str, ours: str | list, theirs: str | list, unit: str) -> Rung:
    """Compare two texts or lists that must be equal. unit: what they consist of, in the plural."""
    singular = unit.removesuffix("s")
    count = f"{len(theirs)} {singular if len(theirs) == 1 else unit}"
    if ours == theirs:
        return Rung(name, count, holds=True)
    start = first_difference(ours, theirs)
    length = 40 if isinstance(theirs, str) else 8
    our_part = repr(ours[start : start + length])
    their_part = repr(theirs[start : start + length])
    note = f"from {singular} {start} on: ours {our_part}, reference {their_part}"
    return Rung(name, count, holds=False, note=note)


def first_difference(ours: str | list, theirs: str | list) -> int:
    """Return the first index at which two sequences differ.

    This is the length of the shorter one if the longer one starts with it.
    """
    for i, (our_item, their_item) in enumerate(zip(ours, theirs, strict=False)):
        if our_item != their_item:
            return i
    return min(len(ours), len(theirs))


# ------------------------------------------------------------------------------------------ inputs
@contextlib.contextmanager
def reference_errors(action: str) -> Iterator[None]:
    """Turn whatever transformers and the libraries below it raise into one ValueError.

    A panic of the tokenizer's Rust code is a BaseException; what ends a program on purpose passes
    through.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"transformers cannot {action}: {type(error).__name__}: {reason:.200}"
        ) from error


def user_message(arguments: argparse.Namespace) -> list[dict]:
    """Return one user message: the images (by default one drawn here), then the question."""
    if arguments.text_only:
        images = []
    elif arguments.image:
        images = [load_image(path) for path in arguments.image]
    else:
        images = [default_image()]
    content = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": arguments.prompt})
    return [{"role": "user", "content": content}]


def default_image() -> Image.Image:
    """Return an image of 210 × 170 pixels without any symmetry that could hide a swap of axes.

    Three gradients with a dark box in them.
    """
    y, x = np.mgrid[0:170, 0:210]
    channels = [x * 255 // 210, y * 255 // 170, (3 * x + y) % 256]
    pixels = np.stack(channels, axis=-1).astype(np.uint8)
    pixels[40:90, 120:180] = (30, 10, 60)
    return Image.fromarray(pixels)


def read_chat_template(folder: Path, tokenizer: Any) -> str | None:
    """Return the checkpoint's chat template: the tokenizer's, or the one of chat_template.json."""
    path = folder / "chat_template.json"
    if tokenizer.chat_template is not None or not path.is_file():
        return tokenizer.chat_template
    return json.loads(path.read_text(encoding="utf-8"))["chat_template"]


def reference_prompt(folder: Path, messages: list[dict], tokenizer: Any) -> str | None:
    """Return the prompt as transformers renders it; None if the checkpoint has no template."""
    template = read_chat_template(folder, tokenizer)
    if template is None:
        return None
    # Without the pixels, which a template that prints unknown values would write into the text.
    content = []
    for item in messages[0]["content"]:
        content.append({"type": "image", "image": ""} if item["type"] == "image" else item)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )


def reference_pixels(folder: Path, images: list[Image.Image]) -> dict[str, Tensor]:
    """Return the reference's pixel_values and image_grid_thw, from its Pillow image processor."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    output = processor(images=images, return_tensors="pt")
    return {"pixel_values": output["pixel_values"], "image_grid_thw": output["image_grid_thw"]}


def expand_placeholders(folder: Path, text: str, tokenizer: Any, grids: Tensor) -> str:
    """Repeat each image's placeholder once for each of its tokens.

    Source: transformers 5.23.0, `Qwen2VLProcessor`.
    """
    config = load_config(folder)
    placeholder = tokenizer.convert_ids_to_tokens(config.image_token_id)
    counts = (grids.prod(-1) // config.vision_config.spatial_merge_size**2).tolist()
    start, *parts = text.split(placeholder)
    expanded = start
    for count, part in zip(counts, parts, strict=True):
        expanded += placeholder * count + part
    return expanded


def reference_inputs(
    folder: Path, messages: list[dict], our_text: str
) -> tuple[str, dict[str, Tensor], list[str]]:
    """Return the reference's prompt text, its model inputs, and notes on what it took from here.

    Its processor class for conversations needs torchvision, so its parts are used: tokenizer, chat
    template and the Pillow image processor. The inputs are input_ids [1, S] and, with images,
    pixel_values and image_grid_thw.
    """
    from transformers import AutoTokenizer

    images = [item["image"] for item in messages[0]["content"] if item["type"] == "image"]
    notes = []
    with reference_errors(f"prepare the input with {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = reference_prompt(folder, messages, tokenizer)
        if text is None:
            notes.append("prompt text: ours on both sides (the checkpoint has no chat template)")
            text = our_text
        inputs = {}
        expanded = text
        if images:
            inputs = reference_pixels(folder, images)
            expanded = expand_placeholders(folder, text, tokenizer, inputs["image_grid_thw"])
        inputs["input_ids"] = torch.tensor([tokenizer(expanded)["input_ids"]])
    return text, inputs, notes


# ------------------------------------------------------------------------------------ the two runs
def modules_by_rung(visual: Any, decoder: Any, lm_head: nn.Module) -> dict[str, nn.Module]:
    """Return {rung: module} in the order of the data flow.

    Inside the vision encoder and the decoder, both implementations use the checkpoint's names.
    """
    modules = {"patch embedding": visual.patch_embed}
    for i, block in enumerate(visual.blocks):
        modules[f"vision block {i}"] = block
    modules["merger"] = visual.merger
    for i, layer in enumerate(decoder.layers):
        modules[f"decoder layer {i}"] = layer
    modules["final norm"] = decoder.norm
    modules["logits"] = lm_head
    return modules


@contextlib.contextmanager
def recorded_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the output of each module, and as "embeddings" the input of the first decoder layer.

    The tensors are copied to the CPU.
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple, output: Any) -> None:
            if name == "decoder layer 0":
                outputs["embeddings"] = args[0].detach().cpu()
            tensor = output[0] if isinstance(output, tuple) else output
            outputs[name] = tensor.detach().cpu()

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def run_ours(
    folder: Path, inputs: dict[str, Tensor], arguments: argparse.Namespace
) -> tuple[dict[str, Tensor], list[int]]:
    """Run this repository's model: {rung: tensor} and the new tokens."""
    dtype = getattr(torch, arguments.dtype)
    attention = arguments.attn_implementation
    model = load_model(folder, arguments.device, dtype, attention)
    tensors = to_device(inputs, find_device(arguments.device))
    with recorded_outputs(modules_by_rung(model.visual, model.model, model.lm_head)) as outputs:
        model(**tensors)
    positions, rope_deltas = get_rope_index(
        model.config, tensors["input_ids"], tensors.get("image_grid_thw")
    )
    outputs["positions"] = positions.cpu()
    outputs["rope delta"] = rope_deltas.cpu()
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    batch = Batch(
        input_ids=arrays["input_ids"],
        attention_mask=np.ones_like(arrays["input_ids"]),
        pixel_values=arrays.get("pixel_values"),
        image_grid_thw=arrays.get("image_grid_thw"),
    )
    [tokens] = generate(model, batch, arguments.max_new_tokens, GenerationConfig())
    return outputs, tokens


@torch.inference_mode()
def run_reference(
    folder: Path, inputs: dict[str, Tensor], arguments: argparse.Namespace
) -> tuple[dict[str, Tensor], list[int]]:
    """Run the model of transformers: {rung: tensor} and the new tokens."""
    from transformers import Qwen2VLForConditionalGeneration

    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(
        folder,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=REFERENCE_ATTENTION[arguments.attn_implementation],
    )
    device = find_device(arguments.device)
    model = model.to(device).eval()
    tensors = to_device(inputs, device)
    input_ids = tensors["input_ids"]
    token_types = (input_ids == model.config.image_token_id).int()  # 0: text, 1: image
    modules = modules_by_rung(model.model.visual, model.model.language_model, model.lm_head)
    with recorded_outputs(modules) as outputs:
        model(**tensors, mm_token_type_ids=token_types, use_cache=False)
    positions, rope_deltas = model.model.get_rope_index(
        input_ids, token_types, tensors.get("image_grid_thw")
    )
    outputs["positions"] = positions.cpu()
    outputs["rope delta"] = rope_deltas.cpu()
    model.generation_config.repetition_penalty = 1.0
    model.model.rope_deltas = None  # the model keeps those of the last call
    sequences = model.generate(
        **tensors,
        mm_token_type_ids=token_types,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
        temperature=None,
        top_k=None,
        top_p=None,
    )
    return outputs, sequences[0, input_ids.shape[1] :].tolist()


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors on the device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# -------------------------------------------------------------------------------------- the ladder
def climb(folder: Path, arguments: argparse.Namespace, say: Callable[[str], None]) -> list[Rung]:
    """Return all rungs, in the order of the data flow. say: prints a line."""
    messages = user_message(arguments)
    processor = Processor.from_pretrained(folder)
    text = processor.tokenizer.apply_chat_template(messages)
    batch = processor(messages)
    their_text, inputs, notes = reference_inputs(folder, messages, text)
    for note in notes:
        say(f"note: {note}")
    rungs = [equal("prompt text", text, their_text, "characters")]
    rungs += input_rungs(batch, inputs)
    with reference_errors(f"run {folder}"):
        theirs, their_tokens = run_reference(folder, inputs, arguments)
    ours, our_tokens = run_ours(folder, inputs, arguments)
    rungs += activation_rungs(ours, theirs, LIMITS[arguments.dtype])
    tokens = equal("greedy tokens", our_tokens, their_tokens, "tokens")
    if not tokens.holds and arguments.dtype in ("bfloat16", "float16"):
        say("note: greedy tokens differ; in half precision a near tie is enough, so not counted")
        tokens.holds = True
    return [*rungs, tokens]


def input_rungs(batch: Batch, inputs: dict[str, Tensor]) -> list[Rung]:
    """Compare our batch with the reference's inputs."""
    rungs = []
    if batch.pixel_values is not None and batch.image_grid_thw is not None:
        our_grids = batch.image_grid_thw.tolist()
        their_grids = inputs["image_grid_thw"].tolist()
        rungs.append(equal("image grids", our_grids, their_grids, "images"))
        # The same Pillow gives the same bits, so no rounding is allowed for.
        our_pixels = torch.from_numpy(batch.pixel_values)
        rungs.append(compare("pixels", our_pixels, inputs["pixel_values"], 0.0))
    our_ids = batch.input_ids[0].tolist()
    rungs.append(equal("prompt ids", our_ids, inputs["input_ids"][0].tolist(), "tokens"))
    return rungs


def activation_rungs(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float
) -> list[Rung]:
    """Compare the recorded tensors: vision encoder, positions (which must be equal), decoder."""
    vision = [name for name in theirs if name == "merger" or name.startswith(("patch", "vision"))]
    positions = ["positions", "rope delta"]
    decoder = [name for name in theirs if name not in vision and name not in positions]
    rungs = [compare(name, ours[name], theirs[name], limit) for name in vision]
    rungs += [compare(name, ours[name], theirs[name], 0.0) for name in positions]
    rungs += [compare(name, ours[name], theirs[name], limit) for name in decoder]
    return rungs


# -------------------------------------------------------------------------------- the command line
def show(rungs: list[Rung], limit: float, say: Callable[[str], None]) -> None:
    """Print the table, and a sentence on the first rung that differs."""
    broken = [rung for rung in rungs if not rung.holds]
    name_width = max(len(rung.name) for rung in rungs)
    shape_width = max(len(rung.shape) for rung in rungs)
    say(f"{'rung':{name_width}}  {'shape':{shape_width}}  largest difference  relative")
    for rung in rungs:
        absolute, relative = difference_columns(rung)
        line = (
            f"{rung.name:{name_width}}  {rung.shape:{shape_width}}  {absolute:>18}  {relative:>8}"
        )
        if not rung.holds:
            line += "  BROKEN, first" if rung is broken[0] else "  broken"
        say(line.rstrip())
    say("")
    if broken:
        count = f"{len(broken)} broken rungs out of {len(rungs)}"
        say(f"{broken[0].name} is the first of {count}; {broken[0].note}.")
        return
    say(f"All {len(rungs)} rungs hold (limit {limit:g} relative; ids, positions, pixels equal).")


def difference_columns(rung: Rung) -> tuple[str, str]:
    """Return the two columns of differences, absolute and relative, as text."""
    if rung.max_difference is None:
        return ("differs" if rung.note else "equal"), ""
    if rung.max_difference == 0:
        return "equal", ""
    return f"{rung.max_difference:.2e}", f"{rung.relative_difference:.2e}"


def attention_name(text: str) -> str:
    """Return the name of an attention implementation; "plain" is the former name of "eager"."""
    return "eager" if text == "plain" else text


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line. Exits with code 2 for arguments that do not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.parity",
        description="Compare this repository with transformers on one checkpoint, step by step.",
        epilog="Exit code 0: all rungs hold, 1: one differs, 2: nothing could be compared.",
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR_OR_NAME", help="checkpoint directory or hub name"
    )
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="image of the question; repeat for several (default: one is drawn)",
    )
    parser.add_argument("--text-only", action="store_true", help="ask without an image")
    parser.add_argument(
        "--prompt", default="Describe this image.", help="question (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=LIMITS,
        default="float32",
        help="dtype of both models (default: float32, which shows the smallest faults)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: cpu)")
    parser.add_argument(
        "--attn-implementation",
        "--attention",
        type=attention_name,
        choices=REFERENCE_ATTENTION,
        default="sdpa",
        help="attention implementation of both models (default: sdpa)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=16,
        metavar="N",
        help="greedy tokens to compare (default: 16)",
    )
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 1:
        parser.error(f"--max-new-tokens: expected 1 or more, got {arguments.max_new_tokens}")
    if arguments.text_only and arguments.image:
        parser.error("--text-only and --image exclude each other")
    return arguments


def import_transformers() -> ModuleType:
    """Return the module, silenced. Raises ValueError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "the ladder needs transformers: pip install -r requirements-dev.txt"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def print_line(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    arguments = parse_arguments(argv)
    try:
        transformers = import_transformers()
        find_device(arguments.device)
        folder = find_checkpoint(arguments.model)
        # PyTorch lets convolutions round to TF32 on CUDA, and the reference embeds its patches with
        # one.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        print_line(
            f"{arguments.model}: ours compared with transformers {transformers.__version__}, "
            f"{arguments.dtype} on {arguments.device}, {arguments.attn_implementation} attention"
        )
        print_line("")
        rungs = climb(folder, arguments, print_line)
    except (OSError, ValueError) as error:
        print(f"reference.parity: {error}", file=sys.stderr)
        return 2
    show(rungs, LIMITS[arguments.dtype], print_line)
    return 0 if all(rung.holds for rung in rungs) else 1


if __name__ == "__main__":
    sys.exit(main())
