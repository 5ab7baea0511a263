"""Draw the figures of tiny/README.md: questions with the model's answers, and the training losses.

python -m tiny.figures                    tiny/samples.png, from the bundled checkpoint
python -m tiny.figures --run runs/tiny    also tiny/loss.png, from the history of a training
"""

import argparse
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, without a screen

from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from apps.grounding import find_boxes
from load_weights import load_model
from preprocess import Processor
from tiny.scenes import QAPair, Sample, draw
from tiny.score import CHECKPOINT, Exam

FOLDER = Path(__file__).parent
SHOWN_TWICE = ("read", "compare", "video")  # the skills; the others are shown once
GAP = 4  # pixels between two images


@dataclass
class Answered:
    """A question and the model's response to it."""

    skill: str
    sample: Sample
    pair: QAPair
    response: str

    def image(self) -> Image.Image:
        """Return the images or frames side by side, with the box of the response."""
        frames = [draw(scene) for scene in self.sample.scenes]
        for box in find_boxes(self.response)[:1]:
            corners = box.in_pixels(*frames[0].size)
            ImageDraw.Draw(frames[0]).rectangle(corners, outline=(255, 0, 255), width=2)
        width = sum(frame.width + GAP for frame in frames) - GAP
        height = max(frame.height for frame in frames)
        strip = Image.new("RGB", (width, height), "white")
        left = 0
        for frame in frames:
            strip.paste(frame, (left, 0))
            left += frame.width + GAP
        return strip

    def is_right(self) -> bool:
        return self.skill == "ground" or self.response == self.pair.turns[-1][1]

    def text(self) -> str:
        """Return the conversation, wrapped."""
        lines = []
        for question, answer in self.pair.turns[:-1]:
            lines += [question, answer]
        question, answer = self.pair.turns[-1]
        lines.append(question)
        lines.append(f"→ {self.response}")
        if not self.is_right():
            lines[-1] += f"   (right: {answer})"
        return "\n".join(textwrap.fill(line, 62, subsequent_indent="   ") for line in lines)


def answer_samples(folder: Path) -> list[Answered]:
    """Ask the first evaluation question of the first skill, the second of the second, and so on."""
    model = load_model(folder)
    processor = Processor.from_pretrained(folder)
    exam = Exam()
    answered = []
    for number, skill in enumerate(exam.skills):
        questions = exam.questions(skill, 2 if skill in SHOWN_TWICE else 1, skip=number)
        responses = exam.ask(model, processor, questions)
        for (sample, pair), response in zip(questions, responses, strict=True):
            answered.append(Answered(skill, sample, pair, response))
    return answered


def samples(folder: Path, file: Path, columns: int = 3) -> None:
    """Draw a question of each skill with the model's response."""
    answered = answer_samples(folder)
    rows = math.ceil(len(answered) / columns)
    size = (4.6 * columns, 2.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
        axis.set_anchor("W")
    for axis, one in zip(axes.flat, answered, strict=False):
        axis.imshow(one.image())
        color = "black" if one.is_right() else "firebrick"
        axis.set_title(one.text(), fontsize=9, loc="left", color=color)
    figure.savefig(file, dpi=100)
    print(file)


def losses(history: dict[str, dict[str, float]], file: Path) -> None:
    """Draw the loss of each topic over the steps: the mean of 100 steps, at each save."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    colors = plt.cycler(color=plt.get_cmap("tab10").colors)
    axis.set_prop_cycle(plt.cycler(linestyle=["-", "--"]) * colors)
    steps = [int(step) for step in history]
    for topic in sorted({topic for means in history.values() for topic in means}):
        # A topic that was not trained leaves a gap.
        points = [means.get(topic, math.nan) for means in history.values()]
        axis.plot(steps, points, marker=".", markersize=3, label=topic)
    axis.set(yscale="log", xlabel="step", ylabel="loss on the answers' tokens")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=100)
    print(file)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw the figures of tiny/README.md.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--run", type=Path, help="the run directory of a training")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the directory of the figures")
    args = parser.parse_args(argv)
    samples(args.checkpoint, args.folder / "samples.png")
    if args.run:
        losses(json.loads((args.run / "history.json").read_text()), args.folder / "loss.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
