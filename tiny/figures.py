"""Draws what tiny/README.md shows: the losses of the training and a dozen questions with the model's answers.

python -m tiny.figures                    tiny/samples.png, from the bundled checkpoint
python -m tiny.figures --run runs/tiny    also tiny/loss.png, from the history that the training left there
"""

import argparse
import json
import math
import textwrap
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files: there need be no screen

from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from extras.boxes import find_boxes
from load_weights import load_model
from tiny.scenes import SKILLS, Lesson, draw
from tiny.score import CHECKPOINT, ask, processor_for, questions

FOLDER = Path(__file__).parent
AGAIN = ("read", "compare", "video")  # the skills that are shown twice; the others once


def picture(lesson: Lesson, said: str) -> Image.Image:
    """All that there is to be seen, side by side, with the box that was said."""
    frames = [draw(scene) for scene in lesson.scenes]
    for box in find_boxes(said)[:1]:
        ImageDraw.Draw(frames[0]).rectangle(
            box.in_pixels(*frames[0].size), outline=(255, 0, 255), width=2
        )
    width, height = (
        sum(frame.width + 4 for frame in frames) - 4,
        max(frame.height for frame in frames),
    )
    strip, left = Image.new("RGB", (width, height), "white"), 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width + 4
    return strip


def samples(folder: Path, file: Path, columns: int = 3) -> None:
    """Of the first skill the first evaluation question, of the second the second, ...: nothing is picked out."""
    model, processor = load_model(folder), processor_for(folder)
    shown = []
    for number, skill in enumerate(skill for skills in SKILLS.values() for skill in skills):
        items = questions(skill, 2 if skill in AGAIN else 1, skip=number)
        for (lesson, exchange), said in zip(items, ask(model, processor, items), strict=True):
            *before, (question, answer) = exchange.turns
            lines = [line for turn in before for line in turn] + [question]
            shown.append((picture(lesson, said), skill, lines, said, answer))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 2.4 * rows), layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
        axis.set_anchor("W")
    for axis, (image, skill, lines, said, answer) in zip(axes.flat, shown, strict=False):
        axis.imshow(image)
        right = skill == "ground" or said == answer
        lines = [*lines, f"→ {said}" if right else f"→ {said}   (right: {answer})"]
        text = "\n".join(textwrap.fill(line, 62, subsequent_indent="   ") for line in lines)
        axis.set_title(text, fontsize=9, loc="left", color="black" if right else "firebrick")
    figure.savefig(file, dpi=100)
    print(file)


def losses(history: dict[str, dict[str, float]], file: Path) -> None:
    """The loss of each topic over the steps: the mean of 100 steps, at each save."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    axis.set_prop_cycle(
        plt.cycler(linestyle=["-", "--"]) * plt.cycler(color=plt.get_cmap("tab10").colors)
    )
    for topic in sorted({topic for means in history.values() for topic in means}):
        points = [
            (int(step), means.get(topic, math.nan)) for step, means in history.items()
        ]  # a gap where it rested
        axis.plot(*zip(*points, strict=True), marker=".", markersize=3, label=topic)
    axis.set(yscale="log", xlabel="step", ylabel="loss on the answers' tokens")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(file, dpi=100)
    print(file)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Draw the figures of tiny/README.md.")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--run", type=Path, help="the run folder of a training")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the figures go")
    args = parser.parse_args(argv)
    samples(args.checkpoint, args.folder / "samples.png")
    if args.run:
        losses(json.loads((args.run / "history.json").read_text()), args.folder / "loss.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
