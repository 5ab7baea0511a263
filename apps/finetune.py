"""Teach a checkpoint from your own conversations: LoRA on top of its frozen weights.

    python -m apps.finetune --data conversations.jsonl --out adapter

A line of the data is a conversation with its answers, in any layout that `conversations.py` reads.
How a step is taken is in `training.py`, which of its tokens count in `training_data.py`.

`--out` becomes an adapter directory in the format of PEFT. It also holds the state of the training,
from which the same command continues after a stop, with the result of a run without one.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import hashlib
import logging
import math
import random
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import command_line
import memory
from apps.training import Recipe, Trainer
from apps.training_data import Encoder, Example, read_examples
from apps.training_memory import training_needs
from errors import first_line
from lora import DECODER_TARGETS, VISION_TARGETS, adapter_tensors, add_lora
from output_files import check_directory, locked, write_file, write_json
from qwen2vl import Qwen2VL

logger = logging.getLogger("qwen2vl")

STATE = "training_state.pt"
WEIGHTS = "adapter_model.safetensors"
# Options that change what is learned by rounding at most: these may differ when a run continues.
# The data counts by its content.
FREE_OPTIONS = {"data", "out", "eval", "quiet", "device", "attention", "log_every", "save_every"}
FREE_OPTIONS |= {"gradient_checkpointing", "quantize", "memory_check", "check_weights", "debug_nan"}


# -------------------------------------------------------------------------------------------- files
def save_adapter(model: Qwen2VL, folder: Path, settings: dict[str, Any]) -> None:
    """Write the adapter as PEFT 0.21.2 does. settings: what adapter_config.json gets besides."""
    tensors = {name: tensor.contiguous() for name, tensor in adapter_tensors(model).items()}
    write_file(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True}
    write_json(folder / "adapter_config.json", fixed | settings)


def save_state(trainer: Trainer, folder: Path, options: dict[str, Any]) -> None:
    """Write what the training needs to continue."""
    state = {
        "options": options,
        "done": trainer.done,
        "weights": [weight.detach() for weight in trainer.weights],
        "optimizer": trainer.optimizer.state_dict(),
    }
    write_file(folder / STATE, lambda path: torch.save(state, path))


def load_state(trainer: Trainer, folder: Path, options: dict[str, Any]) -> None:
    """Continue where `save_state` was called, if it was. Raises ValueError for other options."""
    path = folder / STATE
    if not path.is_file():
        if (folder / WEIGHTS).exists():
            raise ValueError(f"{folder} holds an adapter without {STATE}: expected another --out")
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["options"]
    except Exception as error:  # whatever unpickling raises for a damaged file
        raise ValueError(f"{path} cannot be read: {first_line(error)}") from error
    for name, value in options.items():
        if before.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} {before.get(name)}, this is {value}: expected the "
                "same, or another --out"
            )
    with torch.no_grad():
        for weight, stored in zip(trainer.weights, state["weights"], strict=True):
            weight.copy_(stored)
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.done = state["done"]
    logger.info("%s: continuing after step %d of %d", folder, trainer.done, trainer.steps)


# ------------------------------------------------------------------------------------------ program
def split_off(examples: list[Example], fraction: float, seed: int) -> list[Example]:
    """Remove that share of the examples at random, and return it; one is left at least."""
    count = min(round(fraction * len(examples)), len(examples) - 1)
    chosen = random.Random(f"{seed} evaluation").sample(range(len(examples)), count)
    return [examples.pop(i) for i in sorted(chosen, reverse=True)]


def run(arguments: argparse.Namespace) -> None:
    """Train an adapter. Raises OSError or ValueError with one sentence."""
    recipe = Recipe(**{each.name: getattr(arguments, each.name) for each in fields(Recipe)})
    folder = Path(arguments.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out is the file {folder}, expected a directory")
    check_directory(folder)
    with locked(folder):
        run_locked(arguments, recipe, folder)


def run_locked(arguments: argparse.Namespace, recipe: Recipe, folder: Path) -> None:
    """Train into a directory that no other run writes meanwhile."""
    directory, processor = command_line.load_processor(arguments)
    encoder = Encoder(processor, arguments.add_vision_id, command_line.video_options(arguments))
    examples = read_examples(arguments.data, encoder, arguments.max_length)
    evaluation = split_off(examples, arguments.eval_fraction, recipe.seed)
    if arguments.eval is not None:
        evaluation += read_examples(arguments.eval, encoder, arguments.max_length)

    memory_run = command_line.checked_run(arguments, directory)
    if memory_run is not None:
        needs = training_needs(memory_run, arguments, encoder, examples)
        memory.check_needs(memory_run, None, needs)
    model = command_line.load_checkpoint(arguments, directory, processor, memory_run)
    if model.model.norm.weight.dtype == torch.float16:
        raise ValueError("float16 would lose small gradients: expected --dtype bfloat16 or float32")
    if arguments.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    torch.manual_seed(recipe.seed)  # of the initial weights
    add_lora(model, arguments.targets, arguments.rank, arguments.alpha, arguments.dropout)
    trainer = Trainer(model, encoder, examples, recipe)
    options = {name: value for name, value in vars(arguments).items() if name not in FREE_OPTIONS}
    options["data (its sha256)"] = hashlib.sha256(Path(arguments.data).read_bytes()).hexdigest()
    folder.mkdir(exist_ok=True)
    load_state(trainer, folder, options)
    trained = sum(weight.numel() for weight in trainer.weights)
    logger.info(
        f"{len(examples)} conversations and {len(evaluation)} for evaluation, {trainer.steps} "
        f"steps, {trained / 1e6:.2f} M trained parameters"
    )
    train(trainer, evaluation, arguments, options)


def train(
    trainer: Trainer,
    evaluation: list[Example],
    arguments: argparse.Namespace,
    options: dict[str, Any],
) -> None:
    """Take all steps that remain; save and evaluate after each epoch, and in between."""
    folder = Path(arguments.out)
    settings = {
        "base_model_name_or_path": arguments.model or str(command_line.BUNDLED_CHECKPOINT),
        "r": arguments.rank,
        "lora_alpha": arguments.alpha,
        "lora_dropout": arguments.dropout,
        "target_modules": arguments.targets,
    }
    if evaluation and trainer.done == 0:
        logger.info("evaluation loss %.4f before the first step", trainer.evaluate(evaluation))
    losses = []
    while trainer.done < trainer.steps:
        start = time.perf_counter()
        step = trainer.train_step()
        seconds = time.perf_counter() - start
        losses.append(step.loss)
        at_end = trainer.done == trainer.steps
        if at_end or trainer.done % arguments.log_every == 0:
            loss = sum(losses) / len(losses)
            losses.clear()
            logger.info(
                f"step {trainer.done} of {trainer.steps}: loss {loss:.4f}, "
                f"learning rate {step.learning_rate:.1e}, {step.tokens / seconds:.0f} tokens/s"
            )
        ends_epoch = trainer.done % trainer.steps_per_epoch == 0
        if not ends_epoch and trainer.done % arguments.save_every != 0:
            continue
        save_adapter(trainer.model, folder, settings)
        save_state(trainer, folder, options)
        if evaluation:
            loss = trainer.evaluate(evaluation)
            logger.info(f"evaluation loss {loss:.4f} after step {trainer.done}")
    logger.info(f"{folder} holds the adapter of {trainer.steps} steps")


def count(text: str) -> int:
    """Parse an option that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return value


def positive(text: str) -> float:
    """Parse an option that is a number above 0."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def share(text: str) -> float:
    """Parse an option that is a number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 0 and below 1, got {text}")
    return value


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = argparse.ArgumentParser(
        "python -m apps.finetune", description="Train a LoRA adapter of Qwen2-VL on conversations."
    )
    add = parser.add_argument
    add("--data", required=True, metavar="FILE.jsonl", help="a conversation on each line")
    add("--out", required=True, metavar="DIR", help="the adapter, and the state of the training")
    add("--eval", metavar="FILE.jsonl", help="conversations whose loss is measured")
    add("--eval-fraction", type=share, default=0.0, metavar="P", help="share of --data for that")
    add("--max-length", type=count, metavar="N", help="leave out conversations of more tokens")
    targets_note = f"(default: {', '.join(DECODER_TARGETS)})"
    add("--targets", metavar="NAME,...", help=f"linear layers with LoRA {targets_note}")
    add("--vision", action="store_true", help=f"also {', '.join(VISION_TARGETS)}")
    add("--rank", type=count, default=16, metavar="R", help="of the update (default: 16)")
    add("--alpha", type=positive, default=32, help="scale of the update, times R (default: 32)")
    add("--dropout", type=share, default=0.0, metavar="P", help="on its input (default: 0)")
    add(
        "--epochs",
        type=count,
        default=1,
        metavar="N",
        help="how often each line is used (default: 1)",
    )
    add("--batch-size", type=count, default=1, metavar="N", help="of each pass (default: 1)")
    add("--accumulate", type=count, default=8, metavar="N", help="passes of a step (default: 8)")
    add("--lr", type=positive, default=1e-4, help="the highest learning rate (default: 1e-4)")
    add("--warmup", type=share, default=0.03, metavar="P", help="share of steps (default: 0.03)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of first weights, order and dropout (default: 0)",
    )
    add("--log-every", type=count, default=10, metavar="N", help="steps (default: 10)")
    save_help = "steps after which to save and evaluate, as after each epoch (default: 100)"
    add("--save-every", type=count, default=100, metavar="N", help=save_help)
    checkpointing_help = "compute each block twice, in less memory"
    add("--gradient-checkpointing", action="store_true", help=checkpointing_help)
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    command_line.add_media_options(parser)
    command_line.add_model_options(parser)
    arguments = parser.parse_args(argv, argparse.Namespace(max_new_tokens=None))
    problem = command_line.number_problem(arguments)
    if arguments.quantize is not None:
        problem = "--quantize cannot be used: gradients need the weights themselves"
    if problem is not None:
        parser.error(problem)
    targets = arguments.targets.split(",") if arguments.targets else [*DECODER_TARGETS]
    arguments.targets = [*targets, *VISION_TARGETS] if arguments.vision else targets
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.finetune", run, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.finetune", main, decodes=False)
