"""Ask the bundled model about drawings that its training never drew.

    python -m tests.tiny.foreign_drawings                     # the bundled checkpoint
    python -m tests.tiny.foreign_drawings runs/tiny/checkpoint --show-wrong 20
    python -m tests.tiny.foreign_drawings --sheet sheet.png   # draws the first images, asks nothing

Each image and its questions are a function of a seed (`foreign_scenes.py`, `foreign_codes.py`). An
answer counts if it is exactly right, that of `ground` if its box has an IoU of at least 0.5.
Decoding is greedy.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from generate import generate
from load_weights import load_model
from preprocess import Processor
from tests.tiny.foreign_codes import draw
from tests.tiny.foreign_scenes import (
    BACKGROUNDS,
    CODES,
    Question,
    Scene,
    make_questions,
    make_scene,
)
from tiny.score import CHECKPOINT, overlap

IMAGES = 240  # 20 of each drawing code on each of the four kinds of background
BATCH = 40
MAX_NEW_TOKENS = 60  # the longest right answer, a box, takes fewer
LEAST_IOU = 0.5
TILE, COLUMNS = 240, 6  # of the contact sheet


@dataclass(frozen=True)
class Result:
    """One question about one scene, and what the model responded."""

    seed: int
    scene: Scene
    question: Question
    response: str

    @property
    def right(self) -> bool:
        if self.question.skill == "ground":
            return overlap(self.response, self.question.answer) >= LEAST_IOU
        return self.response == self.question.answer


def ask(checkpoint: Path, images: int = IMAGES) -> list[Result]:
    """Return the responses of a checkpoint to the questions about the first `images` images."""
    model = load_model(checkpoint)
    processor = Processor.from_pretrained(checkpoint)
    asked = []
    for seed in range(images):
        scene = make_scene(seed)
        image = draw(scene)
        for question in make_questions(seed):
            content = [{"type": "image", "image": image}, {"type": "text", "text": question.text}]
            asked.append((seed, scene, question, [{"role": "user", "content": content}]))
    # Images of similar size make a batch with little padding.
    asked.sort(key=lambda item: (item[1].width * item[1].height, item[0]))
    results = []
    for start in range(0, len(asked), BATCH):
        group = asked[start : start + BATCH]
        batch = processor([conversation for *_, conversation in group])
        outputs = generate(model, batch, MAX_NEW_TOKENS)
        for (seed, scene, question, _), ids in zip(group, outputs, strict=True):
            text = processor.tokenizer.decode(ids, skip_special_tokens=False)
            results.append(Result(seed, scene, question, text.split("<|im_end|>")[0]))
    return sorted(results, key=lambda result: result.seed)


def tally(results: list[Result]) -> dict[str, tuple[int, int]]:
    """Return skill → how many answers are right, of how many questions."""
    counts: dict[str, tuple[int, int]] = {}
    for result in results:
        right, asked = counts.get(result.question.skill, (0, 0))
        counts[result.question.skill] = (right + result.right, asked + 1)
    return counts


def score(checkpoint: Path = CHECKPOINT) -> dict[str, tuple[int, int]]:
    """Return skill → how many answers of a checkpoint are right, of how many questions."""
    return tally(ask(checkpoint))


def table(results: list[Result]) -> str:
    """Return the shares by skill, of all, of each drawing code and of each kind of background."""
    columns = {"all": tally(results)}
    for name in (*CODES, *BACKGROUNDS):
        group = [result for result in results if name in (result.scene.code, result.scene.tone)]
        columns[name] = tally(group)
    skills = sorted(columns["all"])
    lines = [" | ".join(["| skill", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
    for skill in skills:
        cells = [share(*counts.get(skill, (0, 0))) for counts in columns.values()]
        lines.append(" | ".join([f"| {skill}", *cells]) + " |")
    cells = []
    for counts in columns.values():
        right = sum(count for count, _ in counts.values())
        cells.append(share(right, sum(count for _, count in counts.values())))
    lines.append(" | ".join(["| together", *cells]) + " |")
    return "\n".join(lines)


def share(right: int, asked: int) -> str:
    if not asked:
        return "none"
    return f"{100 * right / asked:.1f} % of {asked}"


def contact_sheet(seeds: range) -> Image.Image:
    """Draw the images of some seeds, each at its size or reduced, over their questions."""
    rows = -(-len(seeds) // COLUMNS)
    text_height = 150
    sheet = Image.new("RGB", (COLUMNS * TILE, rows * (TILE + text_height)), "thistle")
    canvas = ImageDraw.Draw(sheet)
    for i, seed in enumerate(seeds):
        scene = make_scene(seed)
        image = draw(scene)
        image.thumbnail((TILE - 8, TILE - 8))
        x, y = i % COLUMNS * TILE, i // COLUMNS * (TILE + text_height)
        sheet.paste(image, (x, y))
        lines = [f"{seed}: {scene.code}, {scene.background}, {scene.width}x{scene.height}"]
        lines += [f"{item.text} {item.answer}"[:44] for item in make_questions(seed)]
        canvas.multiline_text((x, y + TILE - 8), "\n".join(lines), fill="black")
    return sheet


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score a trained model on foreign drawings.")
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", default=CHECKPOINT)
    add("--images", type=int, default=IMAGES, help="ask about the first N images", metavar="N")
    add("--show-wrong", type=int, default=0, metavar="N", help="print N wrong responses")
    add("--sheet", type=Path, metavar="FILE", help="draw a contact sheet of 36 images instead")
    add("--first", type=int, default=0, metavar="N", help="the first image of the sheet")
    args = parser.parse_args(argv)
    if args.sheet:
        contact_sheet(range(args.first, args.first + 36)).save(args.sheet)
        return 0
    results = ask(args.checkpoint, args.images)
    for result in [result for result in results if not result.right][: args.show_wrong]:
        question = result.question
        print(
            f"image {result.seed}: {question.text} expected {question.answer} "
            f"got {result.response}",
            file=sys.stderr,
        )
    print(table(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
