"""Train the bundled model from scratch: `python -m tiny.train`.

The steps: make a byte-level BPE tokenizer from the sentences of the training data (folder.py),
write the files that a published Qwen2-VL has, train on images and videos that are drawn on the fly
(scenes.py, curriculum.py, batches.py), save the weights in bfloat16 (run.py), and score them
(score.py). Model, preprocessing and generation are those of the repository. This file adds initial
weights, a loss, an optimizer and the loop.

The run directory keeps the state of the training: the same command resumes it after a stop. The
checkpoint directory always holds the newest weights, so `python -m tiny.score DIRECTORY` works
during the training.

Shapes: B conversations of a part of a batch, S tokens of the longest conversation, V vocabulary.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from load_weights import load_config
from qwen2vl import Config, Qwen2VL
from tiny.batches import Batches
from tiny.curriculum import CURRICULUM, TOPICS, Curriculum, learning_rate
from tiny.folder import make_config, make_tokenizer
from tiny.muon import Muon, sum_over_processes
from tiny.run import Run
from tiny.scenes import QAPair, Sample, to_conversation
from tiny.score import CHECKPOINT, table

WEIGHT_DECAY = 0.05
NOT_BY_MUON = ("embed_tokens.weight", "merger.mlp.0.weight")


@torch.no_grad()
def initialize(model: Qwen2VL) -> None:
    """Set random weights that keep the variance of their input; residual branches start small."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
        if name.endswith(("o_proj", "down_proj", "attn.proj", "fc2")):
            module.weight *= 0.3
    nn.init.normal_(model.model.embed_tokens.weight, std=model.config.hidden_size**-0.5)


@dataclass(frozen=True)
class Recipe:
    """What an ablation may replace: the data, the model and its initial weights."""

    curriculum: Curriculum = CURRICULUM
    to_messages: Callable[[Sample, list[QAPair]], list[dict]] = to_conversation
    build_model: Callable[..., Qwen2VL] = Qwen2VL
    initialize: Callable[[Qwen2VL], None] = initialize


def make_optimizers(model: Qwen2VL, rank: int, args) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights, or with --muon, Muon for most matrices and AdamW for the rest.

    The embeddings are rows that are looked up one by one, not a matrix. That of the merger, 640 by
    640, would take Muon as long as all others together.
    """
    by_muon = []
    matrices = []
    vectors = []
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            vectors.append(weight)
        elif args.muon and weight.ndim == 2 and not name.endswith(NOT_BY_MUON):
            by_muon.append(weight)
        else:
            matrices.append(weight)
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    if not args.muon:
        return [adamw]
    return [adamw, Muon(by_muon, WEIGHT_DECAY, rank, args.processes)]


def part_loss(model: Qwen2VL, batch: dict[str, Tensor], bf16: bool) -> Tensor:
    """Return the mean cross entropy of the answers' tokens."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "answers"}
    answers = batch["answers"][:, 1:]  # [B, S - 1]
    targets = batch["input_ids"][:, 1:]  # [B, S - 1]
    with torch.autocast(targets.device.type, torch.bfloat16, enabled=bf16):
        logits = model(**inputs)[:, :-1]  # [B, S - 1, V]: of the token after each
    return F.cross_entropy(logits[answers].float(), targets[answers])


def compute_gradients(model: Qwen2VL, batches: Batches, step: int, rank: int, args) -> Tensor:
    """Add this process's share of a step to the gradients.

    Return float32 [3, topics]: for each topic the sum of losses, the number of parts, of samples.
    """
    statistics = torch.zeros(3, len(TOPICS), device=args.device)
    for part in range(rank, args.parts, args.processes):
        topic, batch = batches.get(step, part)
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        loss = part_loss(model, batch, args.bf16)
        (loss / args.parts).backward()
        entry = torch.tensor([loss.item(), 1, len(batch["input_ids"])], device=args.device)
        statistics[:, list(TOPICS).index(topic)] += entry
    return statistics


def make_model(args, config: Config, recipe: Recipe) -> Qwen2VL:
    # On a CPU the bf16 gradient of PyTorch's fused attention is slower than that of plain matmuls.
    attention = "eager" if args.bf16 and args.device == "cpu" else "sdpa"
    model = recipe.build_model(config, attn_implementation=attention).train()
    recipe.initialize(model)
    return model.to(args.device)


def join_processes(rank: int, args) -> None:
    """Connect this process with the others; they find each other through a file."""
    dist.init_process_group(
        "gloo",
        init_method=(args.run / "meeting").absolute().as_uri(),
        timeout=timedelta(hours=12),  # a process may be suspended to free the machine
        rank=rank,
        world_size=args.processes,
    )


def train(rank: int, args, config: Config, recipe: Recipe) -> None:
    """Run one of args.processes processes that share the parts of every batch.

    Small matmuls gain little from threads, which synchronize at every one of them; processes
    synchronize once a step. All hold the same weights. Rank 0 also saves them and shows progress.
    """
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    model = make_model(args, config, recipe)
    weights = list(model.parameters())
    optimizers = make_optimizers(model, rank, args)
    run = Run(model, optimizers, args)
    if args.processes > 1:
        join_processes(rank, args)

    batches = Batches(args.folder, args.parts, args.work, recipe.curriculum, recipe.to_messages)
    for step in range(run.step, args.steps):
        rate = learning_rate(step, args.steps, args.lr)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
        statistics = compute_gradients(model, batches, step, rank, args)
        if args.processes > 1:
            sum_over_processes([statistics, *(weight.grad for weight in weights)])
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if rank == 0:
            run.finish_step(step + 1, statistics)
    if rank == 0:
        run.finish()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled model and score it.")
    add = parser.add_argument
    add("--folder", type=Path, default=CHECKPOINT, help="the directory of the checkpoint")
    add("--run", type=Path, default=Path("runs/tiny"), help="the directory of the resumable state")
    add("--steps", type=int, default=88_500, help="the last step; more may be added later")
    add("--weights", type=Path, help="start with the weights of this checkpoint directory")
    add("--depth", type=int, help="layers of the decoder, and blocks of the encoder")
    add("--first-step", type=int, default=0, help="the step of the curriculum to start with")
    add("--parts", type=int, default=6, help="parts of a step, each of one topic")
    add("--work", type=int, default=800, help="size of a part, in patches")
    add("--lr", type=float, default=7e-4)
    add("--muon", action="store_true", help="Muon for most matrices; --lr means the same")
    add("--seed", type=int, default=0, help="of the initial weights")
    cores = os.cpu_count() or 1
    add("--processes", type=int, default=min(6, cores), help="one per core")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=["cpu", "cuda"], default=device)
    add("--bf16", action="store_true", help="matmuls in bfloat16: fast where the hardware has them")
    add("--save-every", type=int, default=500)
    add("--validate", type=int, default=0, help="questions of each skill to ask at each save")
    add("--items", type=int, default=1000, help="questions of each skill for the score")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, recipe: Recipe | None = None) -> int:
    args = parse_arguments(argv)
    recipe = recipe or Recipe()
    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "meeting").unlink(missing_ok=True)
    if args.depth is None:
        args.depth = load_config(args.weights).num_hidden_layers if args.weights else 4
    make_tokenizer(args.folder)
    config = make_config(args.folder, args.depth)
    if args.processes > 1:
        torch.multiprocessing.spawn(train, (args, config, recipe), args.processes)
    else:
        train(0, args, config, recipe)
    if args.items:
        print(table(args.folder, args.items))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
