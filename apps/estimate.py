"""Count the tokens of a question and estimate the memory of its answer, without its weights.

    python -m apps.estimate --image photo.jpg --model Qwen/Qwen2-VL-7B-Instruct
    python -m apps.estimate --questions questions.jsonl --batch-size 8

Images, videos and prompts go through the processor as in a real run, and what is counted is its
`Batch`. The model is built on the meta device, where tensors have shapes and no memory, and runs
its own prefill there. So the sizes of weights, KV cache and pixels are exact, and the activations
are the peak of what that prefill allocates (`LiveBytes`): there is no formula to keep up to date.

The activations are an estimate because no kernel runs. The fused kernels of sdpa and flash are
taken to hold no scores; flash is counted as sdpa. Not counted: workspaces of kernels; the float32
copy of one weight at a time on a CPU without fast half-precision kernels; what Python, PyTorch and
CUDA take themselves, some hundred MB. On small models on the CPU, in float64, float32 and bfloat16,
the estimate equals the peak of live tensors to 1 %. It is also what PyTorch's allocator recorded
where heads are as wide as in the published models; with toy heads of 16, workspaces of sdpa added
up to 31 %.
"""

from __future__ import annotations

import argparse
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import command_line
import linear
from apps import batch as batch_file
from generate import new_token_limit, new_token_limits, trained_length
from json_files import read_json
from load_weights import checkpoint_dtype, choose_attention, empty_model, find_device, load_config
from preprocess import Batch, Processor
from qwen2vl import Config, KVCache, Qwen2VL, get_rope_index

META = torch.device("meta")


# -------------------------------------------------------------------------------------- live memory
def tensors_in(values: object) -> list[Tensor]:
    """Return the tensors in nested arguments or results of an operator."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def allocate_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **kwargs
) -> Tensor:
    """Allocate what a fused kernel of `F.scaled_dot_product_attention` allocates: no scores.

    For the time of the call, that is a copy of a boolean mask in the dtype of q, and the logsumexp
    [B, H, S] of each query's scores. The result, of q's shape, lies in memory as [B, S, H, D].
    """
    temporary = [q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))]
    if attn_mask is not None:
        temporary.append(attn_mask.to(q.dtype))
    out = q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)
    del temporary
    return out


class FusedAttention(TorchFunctionMode):
    """Within it, sdpa allocates what its fused kernels do; the meta device would hold scores."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            return allocate_attention(*args, **kwargs)
        return function(*args, **kwargs)


class LiveBytes(TorchDispatchMode):
    """Within it, count the bytes of the tensors that are made and still alive, and their peak.

    For a model on the meta device. Arguments whose values decide what runs (token ids, masks,
    grids) can stay on the CPU: they are moved to the meta device where they meet a tensor there.
    """

    def __init__(self):
        super().__init__()
        self.sizes: dict[int, int] = {}  # of each living storage, in bytes
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(tensor.is_meta for tensor in tensors_in((args, kwargs))):
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to(META), (args, kwargs))
        output = operator(*args, **kwargs)
        self.count(tensors_in(output), tensors_in((args, kwargs)))
        return output

    def count(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """Count the storages of the outputs that are new: views and in-place results are not."""
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in known or key in self.sizes:
                continue
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self.release, key)
        self.peak = max(self.peak, self.live)

    def release(self, key: int) -> None:
        """Stop counting a storage."""
        self.live -= self.sizes.pop(key)


def shorten(config: Config) -> Config:
    """Return the config with as many layers as the peak of the prefill needs.

    Layers are alike, so two are enough: while the second one runs, its input and the embedded
    prompt are both alive. With a sliding window the layers differ, and all are kept.
    """
    if config.use_sliding_window:
        return config
    vision_config = replace(config.vision_config, depth=min(config.vision_config.depth, 2))
    layers = min(config.num_hidden_layers, 2)
    return replace(config, num_hidden_layers=layers, vision_config=vision_config)


# ------------------------------------------------------------------------------------------ the run
@dataclass
class Run:
    """What is the same for all questions. Both models are on the meta device."""

    model: Qwen2VL
    short_model: Qwen2VL  # see `shorten`
    device: torch.device  # where the run would be
    dtype: torch.dtype
    attn_implementation: str
    quantize: str | None = None
    max_new_tokens: int | None = None

    @classmethod
    def from_config(
        cls,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        attn_implementation: str = "sdpa",
        quantize: str | None = None,
        max_new_tokens: int | None = None,
    ) -> Run:
        """Build both models. Raises ValueError where they cannot be quantized."""
        # flash-attn has no kernels on the meta device; it allocates about what sdpa does.
        meta_attention = "sdpa" if attn_implementation == "flash" else attn_implementation
        model = empty_model(config).to(dtype)
        short_model = empty_model(shorten(config), meta_attention).to(dtype)
        if quantize is not None:
            linear.quantize_linears(model, quantize)
            linear.quantize_linears(short_model, quantize)
        return cls(model, short_model, device, dtype, attn_implementation, quantize, max_new_tokens)


def open_run(arguments: argparse.Namespace, directory: Path, processor: Processor) -> Run:
    """Return the run that the options describe. Raises OSError or ValueError as a real one does."""
    config = load_config(directory)
    processor.check_model(config)
    if arguments.dtype is None:
        dtype = checkpoint_dtype(directory)
    else:
        dtype = getattr(torch, arguments.dtype)
    device = find_device(arguments.device)
    attn_implementation = choose_attention(arguments.attention, device, dtype)
    run = Run.from_config(
        config, device, dtype, attn_implementation, arguments.quantize, arguments.max_new_tokens
    )
    if (directory / "generation_config.json").is_file():
        run.model.generation_config = read_json(directory, "generation_config.json")
    return run


# -------------------------------------------------------------------------------------------- sizes
class Size(NamedTuple):
    """One line of the table."""

    bytes: int
    remark: str


def total(sizes: dict[str, Size]) -> int:
    """Return the sum in bytes."""
    return sum(size.bytes for size in sizes.values())


def weights_size(run: Run) -> Size:
    """Return the size of the parameters."""
    count = sum(p.numel() for p in empty_model(run.model.config).parameters())  # a tied head once
    remark = f"{count / 1e6:,.1f} M parameters in {str(run.dtype).removeprefix('torch.')}"
    if run.quantize is not None:
        remark += f", the decoder's in {run.quantize}"
    return Size(sum(p.nbytes for p in run.model.parameters()), remark)


def cache_size(run: Run, batch: Batch) -> Size:
    """Return the size of the KV cache when the answers have all their tokens."""
    batch_size, length = batch.input_ids.shape
    length += max(new_token_limits(run.model, batch, run.max_new_tokens))
    cache = KVCache(run.model.config, batch_size, length, META, run.dtype)
    return Size(cache.keys.nbytes + cache.values.nbytes, f"{batch_size} × {length:,} tokens")


def pixels_size(run: Run, batch: Batch) -> Size:
    """Return the size of the patches of all images and videos."""
    size = 0
    for patches in (batch.pixel_values, batch.pixel_values_videos):
        if patches is not None:
            size += patches.nbytes
    if run.device.type == "cpu":
        return Size(2 * size, "as read and as joined")
    return Size(size, "on the GPU")


def meta_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the arguments of the model for `LiveBytes`: only pixels are on the meta device."""
    inputs = {}
    for name, array in batch.arrays().items():
        inputs[name] = torch.as_tensor(array)
    for name in ("pixel_values", "pixel_values_videos"):
        if name in inputs:
            inputs[name] = inputs[name].to(META)
    if inputs["attention_mask"].all():
        inputs["attention_mask"] = None  # as in `generate.prefill`
    return inputs


@torch.no_grad()  # inference_mode would hide what composite operators allocate
def prefill_peak(run: Run, batch: Batch) -> int:
    """Return how many bytes the prefill allocates at its peak, without weights, cache, pixels."""
    batch_size, length = batch.input_ids.shape
    inputs = meta_inputs(batch)
    cache = KVCache(run.short_model.config, batch_size, length, META, run.dtype)
    with FusedAttention(), LiveBytes() as memory:
        x = run.short_model.hidden_states(cache=cache, **inputs)[:, -1:]
        # On the CPU the int8 kernel for a few sequences makes no copy of the head's weight.
        few_rows = run.device.type == "cpu" and batch_size < linear.MANY_ROWS
        if run.quantize is None or not few_rows:
            run.short_model.lm_head(x)
    return memory.peak


@torch.no_grad()
def vision_peak(run: Run, batch: Batch) -> int:
    """Return how many bytes the vision encoder alone allocates at its peak."""
    inputs = meta_inputs(batch)
    visual = run.short_model.visual
    with FusedAttention(), LiveBytes() as memory:
        if "pixel_values" in inputs:
            visual(inputs["pixel_values"], inputs["image_grid_thw"])
        if "pixel_values_videos" in inputs:
            visual(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    return memory.peak


def activations_size(run: Run, batch: Batch) -> Size:
    """Return the size of the activations of the prefill, which are larger than a decode step's."""
    remark = f"of the prefill, {run.attn_implementation} attention; an estimate"
    vision = vision_peak(run, batch)
    if vision:
        remark = f"vision encoder alone {vision / 1e6:,.1f}, {remark}"
    return Size(prefill_peak(run, batch), remark)


def batch_sizes(run: Run, batch: Batch) -> dict[str, Size]:
    """Return what the run holds besides the weights when it holds most."""
    sizes = {"cache": cache_size(run, batch)}
    pixels = pixels_size(run, batch)
    if pixels.bytes:
        sizes["pixels"] = pixels
    sizes["activations"] = activations_size(run, batch)
    return sizes


# ------------------------------------------------------------------------------------------- output
MEDIA_ROW = "{:>11}{:>8}{:>11}{:>14}{:>10}{:>8}  {}"


def media_lines(batch: Batch, processor: Processor) -> list[str]:
    """Return a table of the images and videos, with a heading if there are any."""
    if not batch.media:
        return []
    config = processor.image_config
    heading = MEDIA_ROW.format(
        "pixels", "frames", "resized", "grid (t×h×w)", "patches", "tokens", ""
    )
    lines = [heading.rstrip()]
    for media in batch.media:
        width, height = media.size
        t, h, w = media.grid
        patches = math.prod(media.grid)
        frames = len(media.timestamps) if media.timestamps else 1
        line = MEDIA_ROW.format(
            f"{width}×{height}",
            frames,
            f"{w * config.patch_size}×{h * config.patch_size}",
            f"{t}×{h}×{w}",
            f"{patches:,}",
            f"{patches // config.merge_size**2:,}",
            media.name,
        )
        lines.append(line)
    return lines


def count_positions(config: Config, batch: Batch) -> int:
    """Return how many M-RoPE positions the prompt of one conversation takes."""
    grids = []
    for grid in (batch.image_grid_thw, batch.video_grid_thw):
        grids.append(None if grid is None else torch.as_tensor(grid))
    positions, _ = get_rope_index(config, torch.as_tensor(batch.input_ids), *grids)
    return int(positions.max()) + 1


def prompt_lines(run: Run, batch: Batch) -> list[str]:
    """Return the tokens of one conversation's prompt by kind, and the positions with its answer.

    Raises ValueError if generation_config.json leaves no room for an answer.
    """
    config = run.model.config
    tokens = batch.input_ids.size
    images = int((batch.input_ids == config.image_token_id).sum())
    videos = int((batch.input_ids == config.video_token_id).sum())
    text = tokens - images - videos
    new_tokens = new_token_limit(run.model.generation_config, tokens, run.max_new_tokens)
    positions = count_positions(config, batch)
    remark = f"{positions + new_tokens:,} with {new_tokens:,} new tokens"
    if positions + new_tokens > trained_length(config):
        remark += f" (the model is trained for {trained_length(config):,})"
    return [
        f"{'prompt':11}{tokens:12,} tokens: {text:,} text, {images:,} image, {videos:,} video",
        f"{'positions':11}{positions:12,} in the prompt, {remark}",
    ]


def size_lines(sizes: dict[str, Size]) -> list[str]:
    """Return the table of sizes with their sum."""
    sum_size = Size(total(sizes), "and what Python and PyTorch take themselves")
    lines = []
    for name, size in (sizes | {"sum": sum_size}).items():
        lines.append(f"{name:11}{size.bytes / 1e6:12,.1f} MB  {size.remark}")
    return lines


# ---------------------------------------------------------------------------------------- questions
def estimate_question(arguments: argparse.Namespace, processor: Processor, run: Run) -> None:
    """Print the tokens of the question of the options, and the memory of its answer."""
    messages = command_line.build_messages(arguments)
    batch = processor(messages, add_vision_id=arguments.add_vision_id)
    lines = media_lines(batch, processor) + prompt_lines(run, batch)
    lines += size_lines({"weights": weights_size(run)} | batch_sizes(run, batch))
    print("\n".join(lines))


def question_groups(
    arguments: argparse.Namespace,
    processor: Processor,
    is_usable: Callable[[batch_file.Question], bool],
) -> Iterator[list[batch_file.Question]]:
    """Yield the groups of questions that `apps.batch` would answer together.

    No other function here calls that program. is_usable is called once with each question, in the
    order of the file.
    """
    options = command_line.video_options(arguments)
    questions = batch_file.questions(
        arguments.questions, processor, options, arguments.add_vision_id
    )
    yield from batch_file.groups(filter(is_usable, questions), arguments.batch_size)


def estimate_questions(arguments: argparse.Namespace, processor: Processor, run: Run) -> None:
    """Print the tokens of each question of a file, and the memory of the group that takes most."""
    if not Path(arguments.questions).is_file():
        raise FileNotFoundError(f"there is no file {arguments.questions}")

    def read(questions: list[batch_file.Question]) -> Batch:
        messages = [question.messages for question in questions]
        return processor(messages, add_vision_id=arguments.add_vision_id)

    def is_usable(question: batch_file.Question) -> bool:
        """Print one question, and return whether it can be answered."""
        line = f"line {question.record['line']}"
        if "error" in question.record:
            print(f"{line}: {question.record['error']}")
            return False
        batch = read([question])
        try:
            lines = media_lines(batch, processor) + prompt_lines(run, batch)
        except ValueError as error:
            print(f"{line}: {error}")
            return False
        print("\n".join([line, *lines]))
        return True

    largest: dict[str, Size] = {}
    line_numbers: list[int] = []
    for group in question_groups(arguments, processor, is_usable):
        sizes = batch_sizes(run, read(group))
        if total(sizes) > total(largest):
            largest = sizes
            line_numbers = sorted(question.record["line"] for question in group)
    if largest:
        numbers = ", ".join(str(number) for number in line_numbers)
        print(f"the group that takes most memory: line {numbers}")
    else:
        print("there is no question to count")
    print("\n".join(size_lines({"weights": weights_size(run)} | largest)))


# ------------------------------------------------------------------------------------- command line
def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = command_line.build_parser(
        "Count the tokens of a question and estimate the memory of its answer, without loading the "
        "weights. The options are those of generate.py; the ones of sampling change nothing.",
        "python -m apps.estimate",
    )
    parser.add_argument(
        "--questions", metavar="JSONL", help="a file of questions for apps.batch, instead of one"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="with --questions: how many are answered together (default: 8)",
    )
    arguments = command_line.parse_arguments(parser, argv, needs_question=False)
    has_question = bool(arguments.media) or arguments.prompt is not None
    if arguments.questions is None and not has_question:
        parser.error("expected --image, --video, --prompt or --questions, got none of them")
    if arguments.questions is not None and (has_question or arguments.system is not None):
        parser.error("--questions excludes --image, --video, --prompt and --system")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size is {arguments.batch_size}, expected 1 or more")
    return arguments


def estimate(arguments: argparse.Namespace) -> None:
    """Print what a run with these options takes. Raises OSError or ValueError with one sentence."""
    directory, processor = command_line.load_processor(arguments, weights=False)
    run = open_run(arguments, directory, processor)
    if arguments.questions is None:
        estimate_question(arguments, processor, run)
    else:
        estimate_questions(arguments, processor, run)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.estimate", estimate, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.estimate", main)
