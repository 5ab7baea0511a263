"""Compare the speed of `apps.finetune` with transformers 5.23.0 and PEFT 0.21.2.

    python -m benchmarks.finetune                    a fourteenth of the 2B model
    python -m benchmarks.finetune --shapes tiny      the bundled checkpoint, to try the benchmark

Both sides take the same steps of a training: LoRA of rank 8 on the decoder's attention and MLP, one
conversation with an image in each step, AdamW. They start from the same random weights and the same
random A and B, each in a new process, one process at a time, in turns. Ours is the step of
`apps/training.py`. PEFT's is the loop that its documentation has: the loss that transformers
computes for `labels`, the gradient clipped, its cosine schedule. The image is preprocessed before.

Steps are only compared if they are right: the gradients of the first one, and the loss of each,
which also holds what the optimizer did before. By default the model has 2 layers of the 2B model's
widths, and vision encoder and vocabulary in proportion, so that each part has its share of the
work. The exit code is 0, or 1 if the sides differ or a line has no quiet measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apps.training import MAX_GRAD_NORM, Recipe, Trainer, answer_loss
from apps.training_data import IGNORED, Example
from benchmarks.checkpoint import (
    CONFIG_2B,
    VISION_2B,
    find_checkpoint,
    make_batch,
    write_random_weights,
)
from benchmarks.options import add_common_options, check_common_options
from benchmarks.processes import Record, Say, run_quietly, say_on_stderr
from benchmarks.protocol import make_clock, report
from load_weights import load_config, load_model
from lora import DECODER_TARGETS, adapter_tensors, add_lora
from qwen2vl import Config, VisionConfig

LAYERS = 2
RANK = 8
ALPHA = 16
LEARNING_RATE = 1e-4
IMAGE = ("image", 1, 14, 16)  # 224 tokens
TINY_IMAGE = ("image", 1, 4, 6)
TEXT = (20, 54)  # tokens before and after the image
ANSWER = 32  # of these the last ones, which count for the loss
# The kinds of steps. Where gradient checkpointing is switched on, transformers also lets the input
# embeddings and the patch embeddings require gradients, so that the backward pass goes through the
# frozen vision encoder. Checkpointing that is not reentrant needs neither, and "checkpointing"
# measures PEFT without that, "checkpointing, default" with it. Ours is the same in both.
TASKS = {
    "plain": {"checkpointing": False, "input_gradients": False},
    "checkpointing": {"checkpointing": True, "input_gradients": False},
    "checkpointing, default": {"checkpointing": True, "input_gradients": True},
}
# The norm of the difference of two gradients of a matrix, divided by that of PEFT's; and the
# difference of two losses, divided by PEFT's.
GRADIENT_LIMITS = {"float32": 1e-3, "bfloat16": 0.1}
LOSS_LIMITS = {"float32": 1e-4, "bfloat16": 1e-2}


def training_config() -> Config:
    """Return a model of few layers, and a vision encoder and a vocabulary in proportion."""
    share = LAYERS / CONFIG_2B["num_hidden_layers"]
    vocab_size = round(share * CONFIG_2B["vocab_size"])
    special = {
        "bos_token_id": None,
        "eos_token_id": None,
        "vision_start_token_id": vocab_size - 4,
        "vision_end_token_id": vocab_size - 3,
        "image_token_id": vocab_size - 2,
        "video_token_id": vocab_size - 1,
    }
    text = CONFIG_2B | {"num_hidden_layers": LAYERS, "vocab_size": vocab_size}
    vision = VISION_2B | {"depth": round(share * VISION_2B["depth"])}
    return Config(**text, **special, vision_config=VisionConfig(**vision))


# ------------------------------------------------------------------------------------ the two sides
class Side(NamedTuple):
    """A model with LoRA that is ready to be trained."""

    gradients: Callable[[], tuple[Tensor, dict[str, Tensor]]]  # and the loss; takes no step
    step: Callable[[], float]  # takes one, and returns the loss before it


class ReadyBatch:
    """An `Encoder` whose one batch has been encoded."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = tensors

    def batch(self, examples: list[Example], device: torch.device) -> dict[str, Tensor]:
        return self.tensors


def labelled_batch(config: Config, rows: list[list], device: str) -> dict[str, Tensor]:
    """Return random inputs of a model, and `labels` [1, S] for the last ANSWER tokens."""
    arrays = make_batch(config, rows).arrays()
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    labels = torch.full_like(tensors["input_ids"], IGNORED)
    labels[:, -ANSWER:] = tensors["input_ids"][:, -ANSWER:]
    return tensors | {"labels": labels}


def draw_adapter(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return random A and B. With a B of zeros, as LoRA begins, the gradient of A would be zero."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name in sorted(shapes):
        drawn[name] = 0.02 * torch.randn(shapes[name].shape, generator=generator)
    return drawn


def prepare_ours(job: dict, tensors: dict[str, Tensor]) -> Side:
    """Return a training by `apps.training`."""
    model = load_model(job["checkpoint"], job["device"], getattr(torch, job["dtype"]))
    if job["checkpointing"]:
        model.enable_gradient_checkpointing()
    add_lora(model, DECODER_TARGETS, RANK, ALPHA)
    adapter = adapter_tensors(model)
    for name, tensor in draw_adapter(adapter).items():
        adapter[name].copy_(tensor)
    example = Example([], tensors["labels"].numel(), ANSWER)
    recipe = Recipe(epochs=job["steps"], accumulate=1, lr=LEARNING_RATE, warmup=0.0)
    trainer = Trainer(model, ReadyBatch(tensors), [example], recipe)

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        loss = answer_loss(model.train(), tensors) / ANSWER
        loss.backward()
        named = zip(adapter, [weight.grad for weight in trainer.weights], strict=True)
        trainer.optimizer.zero_grad()
        return loss, dict(named)

    return Side(gradients, lambda: trainer.train_step().loss)


def prepare_peer(job: dict, tensors: dict[str, Tensor]) -> Side:
    """Return the same training by transformers and PEFT."""
    import peft
    from transformers import Qwen2VLForConditionalGeneration, get_cosine_schedule_with_warmup

    base = Qwen2VLForConditionalGeneration.from_pretrained(
        job["checkpoint"], dtype=getattr(torch, job["dtype"])
    )
    settings = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(DECODER_TARGETS), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base.to(job["device"]), settings).train()
    if job["checkpointing"]:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        if not job["input_gradients"]:
            base.disable_input_require_grads()
    drawn = draw_adapter(peft.get_peft_model_state_dict(model))
    peft.set_peft_model_state_dict(model, drawn)
    named = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            named[name.replace(".default.", ".")] = parameter
    optimizer = torch.optim.AdamW(named.values(), LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, job["steps"])
    is_image = (tensors["input_ids"] == base.config.image_token_id).int()

    def compute_gradient() -> Tensor:
        loss = model(**tensors, mm_token_type_ids=is_image, use_cache=False).loss
        loss.backward()
        return loss

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        loss = compute_gradient()
        found = {name: parameter.grad for name, parameter in named.items()}
        optimizer.zero_grad()
        return loss, found

    def step() -> float:
        loss = compute_gradient().item()
        torch.nn.utils.clip_grad_norm_(named.values(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return loss

    return Side(gradients, step)


PREPARE = {"ours": prepare_ours, "peft": prepare_peer}


def gradients_path(job: dict) -> Path:
    """Return the file that holds the gradients of a side."""
    return Path(job["gradients"]) / f"{job['side']}-{job['dtype']}-{job['task']}.safetensors"


def train(job: dict) -> None:
    """Compute the gradients once, which also warms up; then take the steps and report them.

    It runs in a process of its own (`benchmarks.workers`).
    """
    torch.set_num_threads(job["threads"])
    clock = make_clock(job["device"])
    tensors = labelled_batch(load_config(job["checkpoint"]), job["rows"], job["device"])
    side = PREPARE[job["side"]](job, tensors)
    loss, gradients = side.gradients()
    save_file({name: gradient.cpu() for name, gradient in gradients.items()}, gradients_path(job))
    losses = [loss.item()]
    times = [clock()]
    for _ in range(job["steps"]):
        losses.append(side.step())
        times.append(clock())
    report(
        task=job["task"],
        start=times[0],
        end=times[-1],
        seconds=[after - before for before, after in itertools.pairwise(times)],
        tokens=tensors["labels"].numel(),
        losses=losses,
    )


# ------------------------------------------------------------------------------------------ measure
def make_jobs(options: argparse.Namespace, folder: Path, gradients: str) -> list[tuple[dict, dict]]:
    """Return the jobs of both sides for each dtype and kind of step."""
    image = TINY_IMAGE if options.shapes == "tiny" else IMAGE
    common = {
        "kind": "finetune",
        "checkpoint": str(folder),
        "device": options.device,
        "rows": [[TEXT[0], image, TEXT[1]]],
        "steps": options.steps,
        "gradients": gradients,
    }
    jobs = []
    for dtype, task in itertools.product(options.dtypes, options.tasks):
        job = common | {"dtype": dtype, "task": task} | TASKS[task]
        jobs.append((job | {"side": "ours"}, job | {"side": "peft"}))
    return jobs


def measure(options: argparse.Namespace, folder: Path, say: Say) -> list[dict]:
    """Run all processes, repetition by repetition; return a line for each dtype and kind of step.

    Every second repetition runs them in reverse.
    """
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as gradients:
        pairs = make_jobs(options, folder, gradients)
        jobs = list(itertools.chain(*pairs))
        for repetition in range(options.repetitions):
            in_turn = jobs if repetition % 2 == 0 else jobs[::-1]
            for job in in_turn:
                records += run_quietly(job, options, say)
        return [summarize(ours, peer, records) for ours, peer in pairs]


def summarize(ours: dict, peer: dict, records: list[Record]) -> dict[str, Any]:
    """Return tokens per second of two jobs, their ratio and spread, and whether both are right.

    The spread is the range over the processes of the less steady side, divided by its median.
    """
    rates = {}
    spreads = []
    losses = []
    for job in (ours, peer):
        own = [r for r in records if all(r[key] == job[key] for key in ("side", "dtype", "task"))]
        losses.append(own[0]["losses"])
        quiet = [r["tokens"] / statistics.median(r["seconds"]) for r in own if r["quiet"]]
        if quiet:
            rates[job["side"]] = statistics.median(quiet)
            spreads.append((max(quiet) - min(quiet)) / rates[job["side"]])
    dtype = ours["dtype"]
    gradient = largest_difference(load_file(gradients_path(ours)), load_file(gradients_path(peer)))
    loss = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    is_measured = len(rates) == 2
    return {
        "dtype": dtype,
        "task": ours["task"],
        "rates": rates,
        "ratio": rates["ours"] / rates["peft"] if is_measured else None,
        "spread": max(spreads) if is_measured else None,
        "gradient": gradient,
        "loss": loss,
        "holds": gradient <= GRADIENT_LIMITS[dtype] and loss <= LOSS_LIMITS[dtype],
    }


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of two gradients of a matrix, divided by that of PEFT's.

    Infinite where one is NaN, or where the sides do not have the same matrices.
    """
    if ours.keys() != theirs.keys():
        return float("inf")
    differences = []
    for name, right in theirs.items():
        difference = (ours[name].double() - right.double()).norm() / right.double().norm()
        differences.append(difference.nan_to_num(float("inf")).item())
    return max(differences)


def table(lines: list[dict]) -> str:
    """Return a Markdown table of the ratios; above 1 ours is faster."""
    rows = [
        "| dtype | step | vs PEFT | spread | gradients differ by | losses |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        ratio = "not measured"
        spread = "—"
        if line["ratio"] is not None:
            ratio = f"{line['ratio']:.2f}×"
            spread = f"{line['spread']:.0%}"
        differences = f"{line['gradient']:.1e} | {line['loss']:.1e}"
        rows.append(f"| {line['dtype']} | {line['task']} | {ratio} | {spread} | {differences} |")
    return "\n".join(rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_common_options(parser, shapes="thin")
    add = parser.add_argument
    add("--steps", type=int, default=5, metavar="N", help="of each process (default: 5)")
    add("--dtypes", nargs="+", choices=LOSS_LIMITS, default=list(LOSS_LIMITS))
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    options = parser.parse_args(argv)
    check_common_options(parser, options)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, expected 1 or more")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        if options.checkpoint is not None:
            folder = options.checkpoint
        elif options.shapes == "thin":
            folder = Path(temporary)
            write_random_weights(training_config(), folder)
        else:
            folder = find_checkpoint(options.shapes)
        lines = measure(options, folder, say_on_stderr)
    for line in lines:
        print(json.dumps(line))
    print(table(lines))
    return 0 if all(line["holds"] and line["ratio"] is not None for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
