"""Conversations with answers → tensors, with the tokens marked that count for the loss.

The loss counts what the model would have had to generate: in each assistant message the tokens
after `<|im_start|>assistant\\n`, up to and including `<|im_end|>`. The line feed after that belongs
to the template: generation has ended before it. (TRL draws the line there, too; Qwen-VL's own
script also counts the line feed.)

Shapes: B conversations of a batch, S tokens of the longest one.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import command_line
from conversations import read_conversation
from errors import first_line
from preprocess import Processor
from tokenizer import IM_END

logger = logging.getLogger("qwen2vl")

IGNORED = -100  # the label of a token that does not count


class Example(NamedTuple):
    """A conversation that has been checked; its images and videos are read when it is its turn."""

    messages: list[dict]
    tokens: int
    answer_tokens: int  # how many of them count for the loss


@dataclass(frozen=True)
class Encoder:
    """Conversations → tensors, with the tokens marked that count for the loss."""

    processor: Processor
    add_vision_id: bool = False
    video_options: dict = field(default_factory=dict)

    def read_media(self, messages: list[dict]) -> list[dict]:
        """Return messages with each image and video read."""
        return command_line.read_media(self.processor, messages, self.video_options)

    def encode(self, messages: list[dict], add_generation_prompt: bool = False) -> np.ndarray:
        """Return the token ids [S] of messages whose media have been read."""
        return self.processor([messages], add_generation_prompt, self.add_vision_id).input_ids[0]

    def labels(self, messages: list[dict]) -> np.ndarray:
        """Return the labels [S] of messages whose media have been read: ids, or IGNORED.

        An answer begins where the prompt of the messages before it ends. Raises ValueError for a
        conversation without an answer, and where an answer does not continue its prompt.
        """
        ids = self.encode(messages)
        labels = np.full_like(ids, IGNORED)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if number == 0:
                raise ValueError("message 0 is an answer, expected a question before it")
            prompt = self.encode(messages[:number], add_generation_prompt=True)
            turn = self.encode(messages[: number + 1])
            start = len(prompt)
            ends = np.flatnonzero(turn == self.processor.tokenizer.token_id(IM_END))
            end = ends[-1] + 1
            if end <= start or not np.array_equal(ids[:end], [*prompt, *turn[start:end]]):
                raise ValueError(
                    f"message {number}: expected an answer whose tokens continue the prompt, got "
                    "one that begins with a line feed, or a chat template that rewrites earlier "
                    "messages"
                )
            labels[start:end] = ids[start:end]
        if (labels == IGNORED).all():
            raise ValueError("expected at least one assistant message, got none")
        return labels

    def check(self, line: object) -> Example:
        """Return a parsed line of the data as an example. Raises ValueError or OSError."""
        if not isinstance(line, list | dict):
            raise ValueError(f"expected a conversation, got {type(line).__name__}")
        messages = read_conversation(line)
        labels = self.labels(self.read_media(messages))
        return Example(messages, len(labels), int((labels != IGNORED).sum()))

    def batch(self, examples: Sequence[Example], device: torch.device) -> dict[str, Tensor]:
        """Return the arguments of `Qwen2VL.hidden_states`, and `labels` [B, S]."""
        conversations = [self.read_media(example.messages) for example in examples]
        batch = self.processor(conversations, False, self.add_vision_id)
        labels = np.full_like(batch.input_ids, IGNORED)  # the padding is on the left
        for i, messages in enumerate(conversations):
            own = self.labels(messages)
            labels[i, labels.shape[1] - len(own) :] = own
        arrays = batch.arrays() | {"labels": labels}
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def read_examples(path: str, encoder: Encoder, max_length: int | None) -> list[Example]:
    """Return the conversations of a file that have at most `max_length` tokens, all checked.

    Each image and video is read once for this, so that nothing stops the training later. None is
    ever cut: that would leave images without their tokens. Raises ValueError naming file and line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}, expected one conversation on each line")
    examples = []
    too_long = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                example = encoder.check(json.loads(line.rstrip().decode("utf-8-sig")))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} of {path} is not JSON, expected one conversation on each line: "
                    f"{error.msg} at column {error.colno}"
                ) from error
            except (OSError, ValueError, RecursionError) as error:
                raise ValueError(f"line {number} of {path}: {first_line(error)}") from error
            if max_length is not None and example.tokens > max_length:
                too_long += 1
            else:
                examples.append(example)
    if too_long:
        logger.warning("%s: left out %d of more than %d tokens", path, too_long, max_length)
    if not examples:
        raise ValueError(f"{path} has no conversation to learn from, expected at least one")
    return examples
