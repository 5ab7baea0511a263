"""Logits → tokens → words: sampling, streaming and the command line.

    python generate.py --image examples/shapes.png --prompt "How many shapes are there?"

A prompt goes through the model once ("prefill"), which fills the key/value cache and gives the first token; then each
token goes through alone ("decode"), reading what the cache holds of all before it.

Shapes: B conversations of a batch, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from load_weights import find_folder, load_model
from preprocess import Batch, Processor, load_image
from qwen2vl import KVCache, Qwen2VL, at_least_float32
from tokenizer import StreamDecoder

TINY = Path(__file__).parent / "tiny" / "checkpoint"


# --------------------------------------------------------------------------------------------------- sampling
@dataclass
class Sampling:
    """How the next token is chosen: the fields of generation_config.json, neutral by default."""

    do_sample: bool = False  # False: always the most probable token
    temperature: float = 1.0  # divides the logits: below 1 sharper, above 1 flatter
    top_k: int = 0  # keep only the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the most probable tokens that together reach this probability
    repetition_penalty: float = 1.0  # above 1: tokens of the prompt and the answer so far become less probable
    seed: int | None = None  # None: another answer each time

    def __post_init__(self):
        for name, fine, expected in (
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    @classmethod
    def of_model(cls, model: Qwen2VL) -> Sampling:
        """The settings that the checkpoint's generation_config.json recommends."""
        found = model.generation_config
        return cls(**{f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None})


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lowers the logits [B, V] of the tokens marked in seen, bool [B, V]: positive ones are divided by the
    penalty, negative ones multiplied. Source: CTRL, arXiv 1909.05858 §4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] → the probabilities [B, V] that tokens are drawn with: temperature, then top-k, then top-p.

    Source: the order of transformers 5.23.0, `GenerationMixin._get_logits_processor`; top-p arXiv 1904.09751.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        weakest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        # From the least probable token upwards, drop what the more probable ones can do without.
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False  # the most probable one always stays
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    return logits.softmax(-1)


def choose(logits: Tensor, seen: Tensor | None, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """The next token of each row, int64 [B], from logits [B, V]."""
    logits = at_least_float32(logits)
    if seen is not None:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if not sampling.do_sample or sampling.top_k == 1:
        return logits.argmax(-1)
    probabilities = next_token_probabilities(logits, sampling).cpu()  # drawn there, so that a seed means the same
    draws = [torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)]
    return torch.cat(draws).to(logits.device)


# ------------------------------------------------------------------------------------------------- generation
@torch.inference_mode()
def stream(
    model: Qwen2VL, batch: Batch, max_new_tokens: int = 128, sampling: Sampling | None = None
) -> Iterator[list[int]]:
    """Yields the next token id of each row, as a list of B ids, as soon as it is made.

    Ends when every row has ended or after max_new_tokens. A row ends with any id of the end list (`eos_token_id` in
    generation_config.json, else in config.json), which is yielded too; after it the row is filled with the pad id.
    sampling: by default what generation_config.json says. Row i draws with seed + i.
    """
    sampling = sampling or Sampling.of_model(model)
    device = model.lm_head.weight.device
    settings = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    settings |= {name: model.generation_config[name] for name in settings if name in model.generation_config}
    ends = settings["eos_token_id"]
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    pad = settings["pad_token_id"] if settings["pad_token_id"] is not None else min(ends, default=0)

    inputs = {f.name: getattr(batch, f.name) for f in fields(batch) if getattr(batch, f.name) is not None}
    inputs = {name: torch.as_tensor(array, device=device) for name, array in inputs.items()}
    ids, mask = inputs["input_ids"], inputs.pop("attention_mask")  # [B, S]
    rows, length = ids.shape
    # Room for the whole answer at once; without padding no mask is needed, which opens the quickest attention.
    cache = KVCache(model.config, rows, length + max_new_tokens, device, model.lm_head.weight.dtype)
    mask = None if mask.all() else torch.cat((mask, mask.new_ones(rows, max_new_tokens)), dim=1)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)
        seen.scatter_(1, ids, True)
    generators = [torch.Generator() for _ in range(rows)]
    for row, generator in enumerate(generators):
        generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed + row)

    ended = [False] * rows
    for _ in range(max_new_tokens):
        seen_mask = None if mask is None else mask[:, : cache.length + inputs["input_ids"].shape[1]]
        logits = model(attention_mask=seen_mask, cache=cache, logits_to_keep=1, **inputs)[:, -1]  # [B, V]
        token = choose(logits, seen, sampling, generators)
        step = [pad if done else id for id, done in zip(token.tolist(), ended, strict=True)]
        ended = [done or id in ends for id, done in zip(step, ended, strict=True)]
        yield step
        if all(ended):
            return
        inputs = {"input_ids": torch.tensor(step, device=device)[:, None]}  # no pictures: the cache has seen them
        if seen is not None:
            seen.scatter_(1, inputs["input_ids"], True)


def generate(
    model: Qwen2VL, batch: Batch, max_new_tokens: int = 128, sampling: Sampling | None = None
) -> list[list[int]]:
    """The new token ids of each row, all of one length, as `stream` yields them."""
    return [list(row) for row in zip(*stream(model, batch, max_new_tokens, sampling), strict=True)]


# ----------------------------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Answers a question about pictures with Qwen2-VL. The answer goes to stdout, all else to stderr."
    )
    add = parser.add_argument
    add("--image", action="append", default=[], metavar="FILE", help="a picture; repeat for several")
    add("--prompt", help='the question (default with pictures: "Describe this image.")')
    add("--system", help="the system message, in place of the default one")
    add("--model", metavar="FOLDER_OR_NAME", help="a checkpoint folder or hub name (default: the bundled tiny one)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    add("--dtype", choices=("bfloat16", "float16", "float32", "float64"), help="(default: the checkpoint's)")
    add("--attention", choices=("auto", "plain", "sdpa", "flash"), default="auto", help="(default: auto)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="(default: 128)")
    group = parser.add_argument_group("sampling", "what is not given comes from the model's generation_config.json")
    group.add_argument("--temperature", type=float, metavar="T", help="0: always the most probable token")
    group.add_argument("--top-k", type=int, metavar="K", help="draw among the K most probable tokens; 0: all")
    group.add_argument("--top-p", type=float, metavar="P", help="draw among the most probable that sum to P; 1: all")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: avoid what was said; 1: off")
    group.add_argument("--seed", type=int, help="make sampled answers repeatable")
    add("--min-pixels", type=int, metavar="N", help="enlarge smaller pictures to at least this area")
    add("--max-pixels", type=int, metavar="N", help="shrink larger pictures to at most this area")
    add("--add-vision-id", action="store_true", help='number the pictures for the model ("Picture 1: ")')
    add("--quiet", action="store_true", help="print nothing but the answer and errors")
    arguments = parser.parse_args(argv)
    if arguments.prompt is None and not arguments.image:
        parser.error("give --image, --prompt, or both")
    for name in ("max_new_tokens", "min_pixels", "max_pixels"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
    return arguments


def choose_sampling(arguments: argparse.Namespace, model: Qwen2VL, say: Callable[[str], None]) -> Sampling:
    """The model's recommended settings with what the command line replaces of them."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if given.get("temperature") == 0:
        given = given | {"temperature": 1.0, "do_sample": False}
    elif given.keys() & {"temperature", "top_k", "top_p"}:
        given["do_sample"] = True
    sampling = replace(Sampling.of_model(model), **given)
    if sampling.do_sample:
        values = {name: value for name in names if (value := getattr(sampling, name)) is not None}
        say("sampling: " + ", ".join(f"{name} {value}" for name, value in values.items()))
        if sampling.top_k == 1 and given.keys() & {"temperature", "top_p", "seed"}:
            say("note: top_k is 1 in the model's generation_config.json, which leaves one choice; add --top-k 0")
    return sampling


def peak_memory(device: torch.device) -> str:
    """The most memory this process has held: on the GPU where it runs there, else in RAM."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB on {device}"
    try:
        import resource
    except ImportError:  # on Windows
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"


def answer(arguments: argparse.Namespace) -> None:
    """Loads, asks and prints. Raises OSError or ValueError with one sentence for whatever the user can mend."""

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    images = [load_image(path) for path in arguments.image]  # first: a wrong path should not wait for the model
    if arguments.model is None:
        say(
            "Using the bundled tiny model, which knows nothing but drawn shapes. "
            "For photographs and real questions: --model Qwen/Qwen2-VL-2B-Instruct"
        )
    folder = find_folder(arguments.model or TINY)
    processor = Processor.from_pretrained(folder, arguments.min_pixels, arguments.max_pixels)
    start = time.perf_counter()
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    model = load_model(folder, arguments.device, dtype, arguments.attention)
    weight, count = model.lm_head.weight, sum(p.numel() for p in model.parameters()) / 1e6
    say(
        f"loaded {arguments.model or 'it'}: {count:,.1f} M parameters, {str(weight.dtype).removeprefix('torch.')}, "
        f"{model.model.attention} attention, on {weight.device}, in {time.perf_counter() - start:.2f} s"
    )
    sampling = choose_sampling(arguments, model, say)

    prompt = "Describe this image." if arguments.prompt is None else arguments.prompt
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": prompt}]
    messages = [{"role": "user", "content": content}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": arguments.system})
    start = time.perf_counter()
    batch = processor(messages, add_vision_id=arguments.add_vision_id)
    side = processor.image_config.patch_size
    for path, image, (t, h, w) in zip(arguments.image, images, batch.image_grid_thw if images else (), strict=True):
        say(
            f"{path}: {image.width}×{image.height} pixels → {w * side}×{h * side} → {w}×{h} patches "
            f"→ {t * h * w // processor.image_config.merge_size**2} tokens"
        )

    words = StreamDecoder(processor.tokenizer)
    times = []
    for (token,) in stream(model, batch, arguments.max_new_tokens, sampling):
        times.append(time.perf_counter())
        print(words.push(token), end="", flush=True)
    print(words.finish(), flush=True)
    line = f"{batch.input_ids.shape[1]} tokens in, {len(times)} out; first token after {times[0] - start:.2f} s"
    if len(times) > 1:
        line += f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s"
    say(f"{line}; peak memory {peak_memory(weight.device)}")


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one sentence on stderr about what was wrong."""
    arguments = parse_arguments(argv)
    try:
        answer(arguments)
    except (OSError, ValueError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
