"""Count the tokens of a question and estimate the memory of its answer, without its weights.

    python -m apps.estimate --image photo.jpg --model Qwen/Qwen2-VL-7B-Instruct
    python -m apps.estimate --questions questions.jsonl --batch-size 8

Images, videos and prompts go through the processor as in a real run, so tokens, pixels and KV cache
are exact. So are the weights, of a model on the meta device. The activations are formulas: what is
alive at once where the prefill holds most (`decoder_activations`, `vision_activations`). At the
shapes of the 2B, 7B and 72B models they were within 3 % of the peak of live tensors, with sdpa and
with eager attention. flash is counted as sdpa. Not counted: workspaces of kernels; the float32 copy
of one weight at a time on a CPU without fast half-precision kernels; what Python, PyTorch and CUDA
take themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import command_line
import linear
from apps import batch as batch_file
from checkpoint_files import find_packing, quantization_settings, weight_files
from generate import new_token_limit, trained_length
from json_files import read_json
from load_weights import (
    PACKED_HEAD,
    checkpoint_dtype,
    choose_attention,
    empty_model,
    find_device,
    list_tensors,
    load_config,
    pack_linears,
    read_generation_config,
)
from preprocess import Batch, Processor
from qwen2vl import Config, KVCache, Qwen2VL, get_rope_index


# -------------------------------------------------------------------------------------------- sizes
@dataclass
class Run:
    """What a run is made of besides its questions."""

    config: Config
    device: torch.device  # where the run would be
    dtype: torch.dtype
    attn_implementation: str = "sdpa"
    quantize: str | None = None
    max_new_tokens: int | None = None
    generation_config: dict = field(default_factory=dict)
    pack: Callable[[Qwen2VL], None] | None = None  # packs the layers that the checkpoint has packed


class Size(NamedTuple):
    """One line of the table."""

    bytes: int
    remark: str


def weights_size(run: Run) -> Size:
    """Return the size of the parameters. Raises ValueError where they cannot be quantized."""
    model = empty_model(run.config).to(run.dtype)
    count = sum(p.numel() for p in model.parameters())
    remark = f"{count / 1e6:,.1f} M parameters in {str(run.dtype).removeprefix('torch.')}"
    if run.pack is not None:
        run.pack(model)
    if run.device.type == "cpu":
        linear.use_kernels(model, run.dtype)
    if run.quantize is not None:
        linear.quantize_linears(model, run.quantize)
    methods = linear.quantization_methods(model)
    if methods:
        remark += f", the decoder's in {' and '.join(methods)}"
    return Size(sum(p.nbytes for p in model.parameters()), remark)


def cache_size(run: Run, batch: Batch) -> Size:
    """Return the size of the KV cache when the answers have all their tokens."""
    batch_size, length = batch.input_ids.shape
    lengths = batch.attention_mask.sum(1).tolist()
    length += max(new_token_limit(run.generation_config, n, run.max_new_tokens) for n in lengths)
    cache = KVCache(run.config, batch_size, length, torch.device("meta"), run.dtype)
    return Size(cache.keys.nbytes + cache.values.nbytes, f"{batch_size} × {length:,} tokens")


def pixels_size(run: Run, batch: Batch) -> Size:
    """Return the size of the patches of all images and videos, which are float32."""
    size = 0
    for patches in (batch.pixel_values, batch.pixel_values_videos):
        if patches is not None:
            size += patches.nbytes
    if run.device.type == "cpu":
        return Size(2 * size, "as read and as joined")
    return Size(size, "on the GPU")


def score_bytes(run: Run) -> int:
    """Return how many bytes each attention score takes, which eager attention alone holds."""
    if run.attn_implementation != "eager":
        return 0
    if run.dtype.itemsize >= 4:
        return 2 * run.dtype.itemsize  # before and after the softmax
    return run.dtype.itemsize + 2 * 4  # as computed, and both in float32


def decoder_activations(run: Run, batch: Batch) -> int:
    """Return how many bytes are alive at once in a layer of the decoder during the prefill."""
    config = run.config
    batch_size, length = batch.input_ids.shape
    tokens = batch_size * length
    # In the MLP: the embedded prompt, the input of the layer, the sum after attention and its norm;
    # cos and sin; three tensors of the inner width.
    inner = tokens * config.intermediate_size * run.dtype.itemsize
    mlp = tokens * (4 * config.hidden_size + 2 * config.head_dim) * run.dtype.itemsize + 3 * inner
    if run.quantize == "int8":
        # A matmul converts its weight to the dtype; the third inner tensor is made after that.
        copied_weight = config.intermediate_size * config.hidden_size * run.dtype.itemsize
        mlp += max(0, copied_weight - inner)
    # In attention: embedded prompt, input, norm, and queries, keys and values, repeated.
    attention = tokens * 7 * config.hidden_size * run.dtype.itemsize
    attention += batch_size * config.num_attention_heads * length**2 * score_bytes(run)
    mask = 0 if batch.attention_mask.all() else batch_size * length**2  # bool
    return max(mlp, attention) + mask


def vision_activations(run: Run, batch: Batch) -> int:
    """Return how many bytes are alive at once in a block of the vision encoder, 0 without media."""
    vision = run.config.vision_config
    size = run.dtype.itemsize
    most = 0
    for grids in (batch.image_grid_thw, batch.video_grid_thw):  # one after the other
        if grids is None:
            continue
        lengths = []  # of the sequences, in which patches attend to each other
        for t, h, w in grids.tolist():
            lengths += [h * w] * t
        patches = sum(lengths)
        # In the MLP: input, sum after attention, norm, and three tensors of the inner width.
        width = 3 * vision.embed_dim * (1 + vision.mlp_ratio)
        if size < 4:
            width += vision.embed_dim  # attention takes as much more: it rotates in float32
        cos_and_sin = patches * 2 * vision.embed_dim // vision.num_heads * max(size, 4)
        mlp = patches * width * size + cos_and_sin
        scores = vision.num_heads * max(lengths) ** 2 * score_bytes(run)
        if len(set(lengths)) == 1:  # then all sequences are one batch
            scores *= len(lengths)
        attention = patches * 10 * vision.embed_dim * size + scores
        most = max(most, mlp, attention)
    return most


def activations_size(run: Run, batch: Batch) -> Size:
    """Return the size of the activations of the prefill, which are larger than a decode step's."""
    embedded_prompt = batch.input_ids.size * run.config.hidden_size * run.dtype.itemsize
    vision = vision_activations(run, batch) + embedded_prompt
    decoder = decoder_activations(run, batch)
    head = 0
    if run.quantize == "int8" and run.device.type != "cpu":
        head = run.config.vocab_size * run.config.hidden_size * run.dtype.itemsize  # its copy
    largest = "vision encoder" if vision > max(decoder, head) else "decoder"
    remark = f"of the {largest} in the prefill, {run.attn_implementation} attention; an estimate"
    return Size(max(vision, decoder, head), remark)


def batch_sizes(run: Run, batch: Batch) -> dict[str, Size]:
    """Return what a run holds besides the weights when it holds most."""
    sizes = {"cache": cache_size(run, batch)}
    if batch.media:
        sizes["pixels"] = pixels_size(run, batch)
    sizes["activations"] = activations_size(run, batch)
    return sizes


# ------------------------------------------------------------------------------------------- output
def count_positions(config: Config, batch: Batch) -> int:
    """Return how many M-RoPE positions the prompt of one conversation takes."""
    grids = []
    for grid in (batch.image_grid_thw, batch.video_grid_thw):
        grids.append(None if grid is None else torch.as_tensor(grid))
    positions, _ = get_rope_index(config, torch.as_tensor(batch.input_ids), *grids)
    return int(positions.max()) + 1


def prompt_lines(run: Run, processor: Processor, batch: Batch) -> list[str]:
    """Return the media of one conversation, its tokens by kind, and its positions.

    Raises ValueError if generation_config.json leaves no tokens for an answer.
    """
    config = run.config
    tokens = batch.input_ids.size
    images = int((batch.input_ids == config.image_token_id).sum())
    videos = int((batch.input_ids == config.video_token_id).sum())
    text = tokens - images - videos
    new_tokens = new_token_limit(run.generation_config, tokens, run.max_new_tokens)
    positions = count_positions(config, batch)
    remark = f"{positions + new_tokens:,} with {new_tokens:,} new tokens"
    if positions + new_tokens > trained_length(config):
        remark += f" (the model is trained for {trained_length(config):,})"
    return [
        *[media.summary(processor.image_config) for media in batch.media],
        f"{'prompt':11}{tokens:12,} tokens: {text:,} text, {images:,} image, {videos:,} video",
        f"{'positions':11}{positions:12,} in the prompt, {remark}",
    ]


def total(sizes: dict[str, Size]) -> int:
    """Return the sum in bytes."""
    return sum(size.bytes for size in sizes.values())


def print_sizes(sizes: dict[str, Size]) -> None:
    """Print the table of sizes with their sum."""
    peak = Size(total(sizes), "and what Python and PyTorch take themselves")
    for name, size in (sizes | {"peak": peak}).items():
        print(f"{name:11}{size.bytes / 1e6:12,.1f} MB  {size.remark}")


# ---------------------------------------------------------------------------------------- questions
def usable_questions(
    arguments: argparse.Namespace, processor: Processor, run: Run
) -> Iterator[batch_file.Question]:
    """Print the tokens of each question of a file, and yield those that can be answered."""
    options = command_line.video_options(arguments)
    for question in batch_file.read_questions(
        arguments.questions, processor, options, arguments.add_vision_id
    ):
        line = f"line {question.record['line']}"
        if "error" in question.record:
            print(f"{line}: {question.record['error']}")
            continue
        batch = processor([question.messages], add_vision_id=arguments.add_vision_id)
        print(line, *prompt_lines(run, processor, batch), sep="\n")
        yield question


def largest_group(arguments: argparse.Namespace, processor: Processor, run: Run) -> dict[str, Size]:
    """Print the questions of a file, and return the sizes of the group that takes most memory."""
    largest: dict[str, Size] = {}
    line_numbers = "none"
    questions = usable_questions(arguments, processor, run)
    for group in batch_file.groups(questions, arguments.batch_size):
        messages = [question.messages for question in group]
        sizes = batch_sizes(run, processor(messages, add_vision_id=arguments.add_vision_id))
        if total(sizes) > total(largest):
            largest = sizes
            numbers = sorted(question.record["line"] for question in group)
            line_numbers = ", ".join(str(number) for number in numbers)
    print(f"lines answered together that take most memory: {line_numbers}")
    return largest


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
    command_line.add_batch_size_option(parser)
    arguments = command_line.parse_arguments(parser, argv, needs_question=False)
    has_question = bool(arguments.media) or arguments.prompt is not None
    if arguments.questions is None and not has_question:
        parser.error("expected --image, --video, --prompt or --questions, got none of them")
    if arguments.questions is not None and (has_question or arguments.system is not None):
        parser.error("--questions excludes --image, --video, --prompt and --system")
    return arguments


def packed_tensor_names(directory: Path, config: Config) -> set[str]:
    """Return the names of the tensors of packed layers.

    They are those of the weights where these have been downloaded, else what config.json specifies.
    """
    model = empty_model(config)
    with suppress(FileNotFoundError):
        parameters = {name for name, _ in model.named_parameters()}
        return set(list_tensors(weight_files(directory), parameters))
    settings = quantization_settings(read_json(directory, "config.json"))
    kept = settings.get("modules_to_not_convert") or []
    names = set()
    for name, module in model.named_modules():
        is_packed = name.startswith("model.layers.")
        if name == "lm_head":
            is_packed = bool(settings.get("lm_head"))
        if isinstance(module, nn.Linear) and is_packed and not any(part in name for part in kept):
            names |= {f"{name}.qweight", f"{name}.g_idx"}
    return names


def layer_packer(directory: Path, config: Config) -> Callable[[Qwen2VL], None] | None:
    """Return what packs those layers of a model that the checkpoint has packed, None without any.

    A head among them is not tied, as in `load_weights.resolve_head`.
    """
    packing = find_packing(directory)
    if packing is None:
        return None
    names = packed_tensor_names(directory, config)
    if PACKED_HEAD in names:
        config.tie_word_embeddings = False
    return lambda model: pack_linears(model, packing, names)


def open_run(arguments: argparse.Namespace, directory: Path, processor: Processor) -> Run:
    """Return the run that the options describe. Raises OSError or ValueError as a real one does."""
    config = load_config(directory)
    processor.check_model(config)
    if arguments.dtype is None:
        dtype = checkpoint_dtype(directory)
    else:
        dtype = getattr(torch, arguments.dtype)
    device = find_device(arguments.device)
    attention = choose_attention(arguments.attention, device, dtype)
    run = Run(config, device, dtype, attention, arguments.quantize, arguments.max_new_tokens)
    run.pack = layer_packer(directory, config)
    run.generation_config = read_generation_config(directory, config.vocab_size)
    return run


def estimate(arguments: argparse.Namespace) -> None:
    """Print what a run with these options takes. Raises OSError or ValueError with one sentence."""
    directory, processor = command_line.load_processor(arguments, weights=False)
    run = open_run(arguments, directory, processor)
    weights = {"weights": weights_size(run)}
    if arguments.questions is None:
        messages = command_line.build_messages(arguments)
        batch = processor(messages, add_vision_id=arguments.add_vision_id)
        print(*prompt_lines(run, processor, batch), sep="\n")
        print_sizes(weights | batch_sizes(run, batch))
    else:
        print_sizes(weights | largest_group(arguments, processor, run))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.estimate", estimate, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.estimate", main)
