"""The run directory of a training: resumable state, progress, and the saved checkpoint."""

import copy
import sys
import time
from collections import deque

import torch
from torch import Tensor

from load_weights import load_model, save_model
from qwen2vl import Qwen2VL
from tiny.curriculum import TOPICS
from tiny.deepen import deepen
from tiny.folder import write_json
from tiny.score import score_checkpoint


class Run:
    """A training, resumed from args.run/state.pt where there is one.

    Without it, the training starts at args.first_step with the weights of args.weights, if given,
    and with empty moments of the optimizers.
    """

    def __init__(self, model: Qwen2VL, optimizers: list[torch.optim.Optimizer], args):
        self.model = model
        self.optimizers = optimizers
        self.args = args
        self.state_file = args.run / "state.pt"
        names = ("parts", "work", "lr", "muon", "depth", "seed")
        self.settings = {name: getattr(args, name) for name in names}
        self.step = args.first_step  # steps that are done
        self.earlier_minutes = 0.0  # before the newest start
        self.history: dict[int, dict[str, float]] = {}  # step → mean loss of each topic
        if self.state_file.exists():
            self.load()
        elif args.weights:
            stored = load_model(args.weights, dtype=torch.float32).state_dict()
            self.model.load_state_dict(deepen(stored, args.depth))
        self.first_step = self.step
        self.start = time.time()
        self.recent: deque[Tensor] = deque(maxlen=100)  # [3, topics] of the newest steps
        self.samples = 0

    def load(self) -> None:
        state = torch.load(self.state_file, map_location=self.args.device)
        if state["settings"] != self.settings:
            raise SystemExit(
                f"{self.state_file} is of a run with {state['settings']}; "
                "delete it to start from scratch"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.step = state["step"]
        self.earlier_minutes = state["minutes"]
        self.history = state["history"]

    def save(self) -> None:
        """Write the state and the checkpoint; a stop meanwhile keeps the previous state."""
        state = {
            "settings": self.settings,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "minutes": self.minutes(),
            "history": self.history,
        }
        unfinished = self.args.run / "new.pt"
        torch.save(state, unfinished)
        unfinished.replace(self.state_file)
        save_model(copy.deepcopy(self.model).to(torch.bfloat16), self.args.folder)

    def minutes(self) -> float:
        return self.earlier_minutes + (time.time() - self.start) / 60

    def finish_step(self, step: int, statistics: Tensor) -> None:
        """Count a step, show progress and save, each from time to time.

        statistics: float32 [3, topics], the sum of losses, the number of parts and of samples.
        """
        self.step = step
        self.recent.append(statistics)
        self.samples += int(statistics[2].sum())
        if step % 10 == 0:
            self.show_progress()
        if step % self.args.save_every == 0 or step == self.args.steps:
            self.history[step] = self.mean_losses()
            self.save()
            if self.args.validate:
                self.validate()

    def validate(self) -> None:
        """Print the score on a few questions, always the same, of the world without frames."""
        shares = score_checkpoint(self.args.folder, self.args.validate, style="frameless")
        line = "  ".join(f"{skill} {100 * share:.0f}" for skill, share in shares.items())
        print(f"\nstep {self.step}  {self.minutes():.0f} minutes  % right: {line}", file=sys.stderr)

    def mean_losses(self) -> dict[str, float]:
        """Return the mean loss of each topic that occurred in the recent steps."""
        losses, parts, _samples = sum(self.recent).tolist()
        means = {}
        for topic, loss, count in zip(TOPICS, losses, parts, strict=True):
            if count:
                means[topic] = round(loss / count, 4)
        return means

    def show_progress(self) -> None:
        """Print a line that the next one overwrites, except every 200 steps."""
        seconds = time.time() - self.start
        minutes_per_step = seconds / 60 / (self.step - self.first_step)
        minutes_left = (self.args.steps - self.step) * minutes_per_step
        line = f"\rstep {self.step}/{self.args.steps}  loss {self.mean_losses()}"
        line += f"  {self.samples / seconds:.0f} samples/s  {minutes_left:.0f} min left "
        end = "\n" if self.step % 200 == 0 else ""
        print(line, end=end, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Print the size and the time, and write history.json."""
        parameters = sum(weight.numel() for weight in self.model.parameters()) / 1e6
        line = f"\n{parameters:.2f} M parameters, {self.minutes():.0f} minutes"
        print(line, file=sys.stderr)
        write_json(self.args.run / "history.json", self.history)
