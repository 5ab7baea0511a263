"""Count the tokens of a question and estimate the memory of its answer, without its weights.

    python -m apps.estimate --image photo.jpg --model Qwen/Qwen2-VL-7B-Instruct
    python -m apps.estimate --questions questions.jsonl --batch-size 8

Images, videos and prompts go through the processor as in a real run, and `memory.py` counts what
they need. On the CPU the sum is the peak of the process's resident memory, `VmHWM` on Linux.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
from collections.abc import Iterator

import torch

import command_line
from apps import batch as batch_file
from config_fields import new_token_limit
from generate import trained_length
from memory import (
    Run,
    Size,
    Weights,
    batch_sizes,
    count_weights,
    free_memory,
    process_size,
    weights_size,
)
from preprocess import Batch, Processor
from qwen2vl import Config, get_rope_index


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


def print_sizes(run: Run, process: Size, sizes: dict[str, Size]) -> None:
    """Print the table: the weights, the sizes of an answer, and the peak of all.

    process: what it takes without them; left out on a GPU, where the table is of its memory.
    """
    weights = count_weights(run)
    sizes = {"weights": weights_size(run, weights)} | sizes
    if run.device.type == "cpu":
        sizes["process"] = process
    sizes["peak"] = peak_size(weights, sizes)
    free = free_memory(run.device)
    if free is not None:
        sizes["free"] = Size(free.bytes, free.place)
    for name, size in sizes.items():
        print(f"{name:11}{size.bytes / 1e6:12,.1f} MB  {size.remark}")


def peak_size(weights: Weights, sizes: dict[str, Size]) -> Size:
    """Return the peak: that of loading the weights, or of the prefill."""
    process = sizes["process"].bytes if "process" in sizes else 0
    prefill = total(sizes) - weights.total + weights.private + weights.mapped
    loading = process + weights.loading + weights.file_bytes
    if loading > prefill:
        return Size(loading, f"while loading; {weights.file_bytes / 1e6:,.1f} MB of it mapped")
    return Size(prefill, f"{weights.mapped / 1e6:,.1f} MB of it mapped from the weight files")


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
    command_line.add_reorder_option(parser)
    arguments = command_line.parse_arguments(parser, argv, needs_question=False)
    has_question = bool(arguments.media) or arguments.prompt is not None
    if arguments.questions is None and not has_question:
        parser.error("expected --image, --video, --prompt or --questions, got none of them")
    if arguments.questions is not None and (has_question or arguments.system is not None):
        parser.error("--questions excludes --image, --video, --prompt and --system")
    return arguments


def estimate(arguments: argparse.Namespace) -> None:
    """Print what a run with these options takes. Raises OSError or ValueError with one sentence."""
    directory, processor = command_line.load_processor(arguments, weights=False)
    process = process_size()
    run = command_line.open_run(arguments, directory)
    if arguments.questions is None:
        messages = command_line.build_messages(arguments)
        batch = processor(messages, add_vision_id=arguments.add_vision_id)
        print(*prompt_lines(run, processor, batch), sep="\n")
        print_sizes(run, process, batch_sizes(run, batch))
    else:
        run.reorder = arguments.reorder and arguments.batch_size > 1
        print_sizes(run, process, largest_group(arguments, processor, run))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.estimate", estimate, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.estimate", main)
