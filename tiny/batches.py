"""Training batches of the bundled model: samples of one topic → tensors, with the answers marked.

Shapes: B conversations of a part of a batch, S tokens of the longest conversation.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from preprocess import Batch, Processor
from tiny.curriculum import CURRICULUM, TOPICS, Curriculum
from tiny.scenes import TRAIN_SEEDS, QAPair, Sample, make_sample, to_conversation
from tiny.sizes import sizes

SEEDS_PER_PART = 64


class Batches:
    """The training data; a part of a batch is a function of its step and its number in the step.

    A part has one topic and its images have one size, so that attention runs as one matmul. It has
    as many samples as add up to `work` patches. The gradient of a step is the mean over `parts`
    parts of different topics. Resuming a training needs no other state.
    """

    def __init__(
        self,
        folder: Path,
        parts: int,
        work: int,
        curriculum: Curriculum = CURRICULUM,
        to_messages: Callable[[Sample, list[QAPair]], list[dict]] = to_conversation,
    ):
        self.parts = parts
        self.work = work
        self.curriculum = curriculum
        self.to_messages = to_messages
        self.processor = Processor.from_pretrained(folder)
        tokenizer = self.processor.tokenizer
        self.answer_header = tokenizer.encode("<|im_start|>assistant\n")
        self.answer_end = tokenizer.token_id("<|im_end|>")

    def get(self, step: int, part: int) -> tuple[str, dict[str, Tensor]]:
        """Return a part's topic and the model's inputs, with `answers`, a bool mask [B, S]."""
        number = step * self.parts + part
        plan = self.curriculum.part(step, number)
        topic = TOPICS[plan.topic]
        rng = random.Random(TRAIN_SEEDS + number)
        cells = rng.choice(sizes(topic.samples, plan.stage, plan.style))
        questions = rng.randint(1, topic.most_questions)
        work = topic.question_work * questions + topic.image_work * 4 * cells[0] * cells[1]
        count = max(1, min(SEEDS_PER_PART, round(self.work / work)))

        seeds = range(
            TRAIN_SEEDS + SEEDS_PER_PART * number, TRAIN_SEEDS + SEEDS_PER_PART * (number + 1)
        )
        if plan.topic != "kinds":
            seeds = seeds[:count]
        samples = [
            make_sample(topic.samples, seed, cells, plan.stage, plan.most_shapes, plan.style)
            for seed in seeds
        ]
        if plan.topic == "kinds":
            samples.sort(key=asks_by_kind, reverse=True)
        conversations = []
        for sample in samples[:count]:
            qa_pairs = choose_questions(sample, plan.topic, questions)
            conversations.append(self.to_messages(sample, qa_pairs))
        batch = self.processor(
            conversations,
            add_generation_prompt=False,
            add_vision_id=topic.samples == "album",
        )
        return plan.topic, self.tensors(batch)

    def tensors(self, batch: Batch) -> dict[str, Tensor]:
        """Return the model's inputs, padded on the right.

        Prompts are padded on the left. Padded on the right no token attends to the padding, so that
        attention needs no mask.
        """
        padding = (batch.attention_mask == 0).sum(1)
        rows = [np.roll(ids, -n) for ids, n in zip(batch.input_ids, padding, strict=True)]
        input_ids = torch.tensor(np.stack(rows))  # [B, S]
        answers = torch.tensor([self.mark_answers(ids) for ids in input_ids.tolist()])  # [B, S]
        tensors = {"input_ids": input_ids, "answers": answers}
        for name, array in batch.arrays().items():
            if name not in ("input_ids", "attention_mask"):
                tensors[name] = torch.tensor(array)
        return tensors

    def mark_answers(self, ids: list[int]) -> list[bool]:
        """Return for each token whether it is part of an answer or the end of one."""
        marks = []
        in_answer = False
        for i, token in enumerate(ids):
            marks.append(in_answer)
            last_tokens = ids[max(0, i + 1 - len(self.answer_header)) : i + 1]
            if last_tokens == self.answer_header:
                in_answer = True
            elif token == self.answer_end:
                in_answer = False
        return marks


def asks_by_kind(sample: Sample) -> bool:
    """Return whether the chat names a shape by its kind, in an image with several kinds.

    One chat in six does.
    """
    [chat] = [pair for pair in sample.qa_pairs if pair.skill == "chat"]
    first_question, _ = chat.turns[0]
    kinds = {shape.kind for shape in sample.scenes[0].shapes}
    return len(kinds) > 1 and any(f"the {kind}" in first_question for kind in kinds)


def choose_questions(sample: Sample, topic: str, most: int) -> list[QAPair]:
    """Return at most `most` pairs of the topic's skills; all of the sample's where it has none.

    A description is always among them and comes last, because the questions after it could be
    answered from its text without the image. Only the topic "told" puts it first.
    """
    skills = TOPICS[topic].skills
    chosen = [pair for pair in sample.qa_pairs if pair.skill in skills] or list(sample.qa_pairs)
    chosen.sort(key=lambda pair: pair.skill != "describe")
    chosen = chosen[:most]
    if topic != "told":
        chosen.reverse()
    return chosen
