"""Score the bundled model by skill: `python -m tiny.score`, also during a training.

Each question is asked in a conversation of its own, about an image or a video whose seed training
never uses. Decoding is greedy and the weights are the checkpoint's in bfloat16, so the score is
reproducible. An answer counts if it is exactly right. For `ground` the mean IoU counts: the area
that two boxes share, over the area that they cover together. Of two questions in a row (`chat`) the
second counts, after the model's own answer to the first.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from apps.grounding import find_boxes
from generate import generate
from load_weights import load_model
from preprocess import Processor
from qwen2vl import Qwen2VL
from tiny.scenes import SKILLS, STYLES, QAPair, Sample, make_sample, to_conversation

CHECKPOINT = Path(__file__).parent / "checkpoint"
OPEN_CHECKPOINT = CHECKPOINT.with_name("open")  # trained further on open drawings

Question = tuple[Sample, QAPair]


@dataclass(frozen=True)
class Exam:
    """The questions of a score, and how they are presented; ablations use other ones."""

    skills: tuple[str, ...] = tuple(skill for skills in SKILLS.values() for skill in skills)
    make_sample: Callable[[str, int], Sample] = make_sample
    to_messages: Callable[[Sample, list[QAPair]], list[dict]] = to_conversation

    def questions(self, skill: str, count: int, skip: int = 0) -> list[Question]:
        """Return `count` questions of a skill after `skip` others, one of each sample."""
        [topic] = [topic for topic, skills in SKILLS.items() if skill in skills]
        selected = []
        seed = 0
        while len(selected) < skip + count:
            sample = self.make_sample(topic, seed)
            pairs = [pair for pair in sample.qa_pairs if pair.skill == skill]
            if pairs:
                selected.append((sample, pairs[0]))
            seed += 1
        return selected[skip:]

    def ask(self, model: Qwen2VL, processor: Processor, questions: list[Question]) -> list[str]:
        """Return the model's responses to the last question of each pair, as one batch."""
        vision_id = questions[0][0].topic == "album"
        conversations = [self.to_messages(sample, [pair]) for sample, pair in questions]
        responses = [""] * len(questions)
        for turn in range(max(len(pair.turns) for _, pair in questions)):
            active = [i for i, (_, pair) in enumerate(questions) if turn < len(pair.turns)]
            prompts = [conversations[i][: 2 * turn + 1] for i in active]
            batch = processor(prompts, add_vision_id=vision_id)
            outputs = generate(model, batch, 100)
            for i, ids in zip(active, outputs, strict=True):
                text = processor.tokenizer.decode(ids, skip_special_tokens=False)
                responses[i] = text.split("<|im_end|>")[0]
                conversations[i][2 * turn + 1]["content"] = responses[i]
        return responses


def overlap(response: str, answer: str) -> float:
    """Return the IoU of the first boxes in two texts; 0 if one has none."""
    response_boxes = find_boxes(response)
    answer_boxes = find_boxes(answer)
    if not response_boxes or not answer_boxes:
        return 0.0
    _, left_a, top_a, right_a, bottom_a = response_boxes[0]
    _, left_b, top_b, right_b, bottom_b = answer_boxes[0]
    width = max(0, min(right_a, right_b) - max(left_a, left_b))
    height = max(0, min(bottom_a, bottom_b) - max(top_a, top_b))
    shared = width * height
    area_a = (right_a - left_a) * (bottom_a - top_a)
    area_b = (right_b - left_b) * (bottom_b - top_b)
    return shared / max(1, area_a + area_b - shared)


def score(
    model: Qwen2VL,
    processor: Processor,
    count: int,
    batch_size: int = 50,
    *,
    skip: int = 0,
    show_wrong: int = 0,
    exam: Exam | None = None,
) -> dict[str, float]:
    """Return skill → share of the points, over `count` questions of each skill after `skip` others.

    show_wrong: print so many wrong responses of each skill to stderr.
    """
    exam = exam or Exam()
    results = {}
    for skill in exam.skills:
        questions = exam.questions(skill, count, skip)
        responses = []
        for i in range(0, count, batch_size):
            responses += exam.ask(model, processor, questions[i : i + batch_size])
        points = 0.0
        wrong = []
        for (_, pair), response in zip(questions, responses, strict=True):
            question, answer = pair.turns[-1]
            points += overlap(response, answer) if skill == "ground" else response == answer
            if response != answer:
                wrong.append(f"{skill}: {question} expected {answer} got {response}")
        for line in wrong[:show_wrong]:
            print(line, file=sys.stderr)
        results[skill] = points / count
    return results


def score_checkpoint(
    folder: Path, count: int, style: str = "framed", quantize: str | None = None, **options: int
) -> dict[str, float]:
    """Return the score of a checkpoint on images of a style, with the options of `score`."""
    model = load_model(folder, quantize=quantize)
    exam = Exam(make_sample=partial(make_sample, style=style))
    return score(model, Processor.from_pretrained(folder), count, exam=exam, **options)


def table(folder: Path, count: int, **options) -> str:
    """Return the score of a checkpoint, with the options of `score_checkpoint`, as a Markdown
    table.
    """
    lines = [f"| skill | of {count} |", "|---|---|"]
    for skill, share in score_checkpoint(folder, count, **options).items():
        lines.append(f"| {skill} | {100 * share:.1f} % |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score a trained model by skill.")
    add = parser.add_argument
    add("folder", type=Path, nargs="?", default=CHECKPOINT)
    add("--items", type=int, default=1000, help="questions of each skill")
    add("--skip", type=int, default=0, metavar="N", help="take other questions: not the first N")
    add("--style", choices=STYLES, default="framed", help="how the images are drawn")
    add(
        "--show-wrong",
        type=int,
        default=0,
        metavar="N",
        help="print N wrong responses of each skill",
    )
    add("--quantize", choices=("int8", "int4"), help="quantize the decoder's weights")
    args = parser.parse_args(argv)
    print(
        table(
            args.folder,
            args.items,
            style=args.style,
            quantize=args.quantize,
            skip=args.skip,
            show_wrong=args.show_wrong,
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
