"""Asks the bundled model what it has learned: `python -m tiny.score`, or with a folder that is being trained.

Each question is asked in a conversation of its own, about a picture or clip with a seed that training never uses.
Decoding is greedy, the weights are those of the folder in bf16, so the same comes out every time. An answer counts
when it is right to the letter; for `ground` the mean IoU counts, the area that the two boxes share over the area that
they cover together. Of two questions in a row the second counts, after what the model itself said to the first.
"""

import argparse
import sys
from pathlib import Path

from extras.boxes import find_boxes
from generate import generate
from load_weights import load_model
from preprocess import Processor
from qwen2vl import Qwen2VL
from tiny.scenes import SKILLS, Exchange, Lesson, lesson, messages

CHECKPOINT = Path(__file__).parent / "checkpoint"


def processor_for(folder: Path) -> Processor:
    """Return the processor of a checkpoint directory."""
    return Processor.from_pretrained(folder)


def questions(skill: str, count: int, skip: int = 0) -> list[tuple[Lesson, Exchange]]:
    """The first `count` evaluation lessons after `skip` others in which the skill is asked for, with one exchange."""
    [topic], found, seed = [topic for topic, skills in SKILLS.items() if skill in skills], [], 0
    while len(found) < skip + count:
        one = lesson(topic, seed)
        found += [(one, exchange) for exchange in one.exchanges if exchange.skill == skill][:1]
        seed += 1
    return found[skip:]


def overlap(said: str, answer: str) -> float:
    """The IoU of the first boxes in two answers; 0 where there is none to read."""
    boxes = [find_boxes(text)[:1] for text in (said, answer)]
    if not all(boxes):
        return 0.0
    [(_, a, b, c, d)], [(_, e, f, g, h)] = boxes
    shared = max(0, min(c, g) - max(a, e)) * max(0, min(d, h) - max(b, f))
    return shared / max(1, (c - a) * (d - b) + (g - e) * (h - f) - shared)


def ask(model: Qwen2VL, processor: Processor, items: list[tuple[Lesson, Exchange]]) -> list[str]:
    """What the model says to the last question of each exchange."""
    talks, said = [messages(one, [exchange]) for one, exchange in items], [""] * len(items)
    vision_id = items[0][0].topic == "album"
    for turn in (0, 1):
        rows = [i for i, (_, exchange) in enumerate(items) if turn < len(exchange.turns)]
        if not rows:
            break
        batch = processor([talks[i][: 2 * turn + 1] for i in rows], add_vision_id=vision_id)
        for i, reply in zip(rows, generate(model, batch, 100), strict=True):
            said[i] = processor.tokenizer.decode(reply, skip_special_tokens=False).split(
                "<|im_end|>"
            )[0]
            talks[i][2 * turn + 1]["content"] = said[i]
    return said


def score(
    folder: Path,
    count: int,
    size: int = 50,
    *,
    skip: int = 0,
    show_wrong: int = 0,
    quantize: str | None = None,
) -> dict[str, float]:
    """The share of the points of each skill, over `count` questions after `skip`; `size` conversations at a time."""
    model, processor, results = load_model(folder, quantize=quantize), processor_for(folder), {}
    for skill in [skill for skills in SKILLS.values() for skill in skills]:
        items, points, wrong = questions(skill, count, skip), 0.0, show_wrong
        for i in range(0, count, size):
            for (_, exchange), said in zip(
                items[i : i + size], ask(model, processor, items[i : i + size]), strict=True
            ):
                question, answer = exchange.turns[-1]
                points += overlap(said, answer) if skill == "ground" else said == answer
                if said != answer and wrong > 0:
                    wrong -= 1
                    print(f"{skill}: {question} {answer} but it said: {said}", file=sys.stderr)
        results[skill] = points / count
    return results


def table(folder: Path, count: int, **options) -> str:
    """The score, with its options, as Markdown."""
    rows = [
        f"| {skill} | {100 * share:.1f} % |"
        for skill, share in score(folder, count, **options).items()
    ]
    return "\n".join([f"| skill | of {count} |", "|---|---|", *rows])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Score a trained model by skill.")
    parser.add_argument("folder", type=Path, nargs="?", default=CHECKPOINT)
    parser.add_argument("--items", type=int, default=1000, help="questions of each skill")
    parser.add_argument(
        "--skip", type=int, default=0, metavar="N", help="take other questions: not the first N"
    )
    parser.add_argument(
        "--show-wrong", type=int, default=0, metavar="N", help="print N wrong answers of each skill"
    )
    parser.add_argument(
        "--quantize", choices=("int8", "int4"), help="the decoder's weights in so many bits"
    )
    args = parser.parse_args(argv)
    options = {"skip": args.skip, "show_wrong": args.show_wrong, "quantize": args.quantize}
    print(table(args.folder, args.items, **options))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
