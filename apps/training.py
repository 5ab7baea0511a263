"""One step of a training by answers: the loss, its gradient, and the optimizer.

A step is a function of the weights before it, the seed and its number, so a training that is
stopped and continued equals one without a stop.

Shapes: B conversations of a part of a step, S tokens of the longest one, V vocabulary.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.training_data import IGNORED, Encoder, Example
from qwen2vl import Qwen2VL, at_least_float32

MAX_GRAD_NORM = 1.0  # a longer gradient is shortened to this length


def answer_loss(model: Qwen2VL, batch: dict[str, Tensor]) -> Tensor:
    """Return the sum of the cross entropies of all tokens that count.

    Only their positions are scored: logits for all, [B, S, V] in float32 with their gradient, would
    be the largest tensors of the whole step.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]  # of the token after each
    counts = targets != IGNORED  # [B, S - 1]
    hidden = model.hidden_states(**inputs)[:, :-1]  # [B, S - 1, C]
    return loss_of_tokens(model, hidden[counts], targets[counts])


def loss_of_tokens(model: Qwen2VL, hidden: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of the cross entropies of targets [N], given hidden [N, C] before each."""
    logits = model.lm_head(hidden)  # [N, V]
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum")


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained."""

    epochs: int = 1
    batch_size: int = 1  # conversations that are computed together
    accumulate: int = 8  # batches of a step
    lr: float = 1e-4  # the highest learning rate
    warmup: float = 0.03  # share of the steps before it is reached
    seed: int = 0


class Step(NamedTuple):
    """What one step was."""

    loss: float  # the mean over its tokens, before the step
    learning_rate: float
    tokens: int  # prompts and images included


class Trainer:
    """A model with its LoRA layers, the optimizer, and how many steps have been taken."""

    def __init__(self, model: Qwen2VL, encoder: Encoder, examples: list[Example], recipe: Recipe):
        self.model = model
        self.encoder = encoder
        self.examples = examples
        self.recipe = recipe
        self.done = 0  # steps
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, weight_decay=0.0)
        self.per_step = recipe.batch_size * recipe.accumulate
        self.steps_per_epoch = math.ceil(len(examples) / self.per_step)
        self.steps = recipe.epochs * self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """Return a warmup and half a cosine, which would reach 0 one step after the last."""
        warmup = math.ceil(self.recipe.warmup * self.steps)
        if step < warmup:
            return self.recipe.lr * (step + 1) / warmup
        progress = (step - warmup) / (self.steps - warmup)
        return self.recipe.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def step_examples(self, step: int) -> list[Example]:
        """Return the examples of a step: each epoch takes all of them once, in a random order."""
        epoch, index = divmod(step, self.steps_per_epoch)
        order = random.Random(f"{self.recipe.seed} {epoch}").sample(
            range(len(self.examples)), len(self.examples)
        )
        chosen = order[index * self.per_step : (index + 1) * self.per_step]
        return [self.examples[i] for i in chosen]

    def parts(self, examples: list[Example]) -> Iterator[list[Example]]:
        """Yield examples in parts that are computed together."""
        for i in range(0, len(examples), self.recipe.batch_size):
            yield examples[i : i + self.recipe.batch_size]

    def train_step(self) -> Step:
        """Take a step. Its gradient is that of the mean over all of its tokens, however they are
        divided into parts: a mean of the parts' means would weight short answers more.
        """
        torch.manual_seed(self.recipe.seed + self.done)  # of the dropout
        self.model.train()
        examples = self.step_examples(self.done)
        answer_tokens = sum(example.answer_tokens for example in examples)
        total = 0.0
        for part in self.parts(examples):
            batch = self.encoder.batch(part, self.weights[0].device)
            loss = answer_loss(self.model, batch) / answer_tokens
            loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise ValueError(f"the loss of step {self.done + 1} is {total}: try a lower --lr")
        nn.utils.clip_grad_norm_(self.weights, MAX_GRAD_NORM)
        rate = self.learning_rate(self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return Step(total, rate, sum(example.tokens for example in examples))

    @torch.no_grad()
    def evaluate(self, examples: list[Example]) -> float:
        """Return the mean loss over all tokens of the examples that count."""
        self.model.eval()
        total = 0.0
        for part in self.parts(examples):
            total += answer_loss(
                self.model, self.encoder.batch(part, self.weights[0].device)
            ).item()
        return total / sum(example.answer_tokens for example in examples)
