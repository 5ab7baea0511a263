"""How sure the model was: the probability of each token of an answer, and what it might have said instead.

    watch = Watch()
    for step in generate_steps(model, batch):
        watch.chosen(step.tokens[0], step.logits[0])
    print(*watch.table(tokenizer), sep="\n")

The probabilities are the model's own, the softmax of its raw logits in float32 (float64 for a float64 model): before
the repetition penalty, temperature, top-k and top-p change them for the draw. Logarithms are natural.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import NamedTuple

from torch import Tensor

from qwen2vl import at_least_float32
from tokenizer import BYTE_OF, Tokenizer

WIDTH = 110  # of the table, in columns of the terminal


class Step(NamedTuple):
    """One token of the answer."""

    token: int
    logprob: float
    rank: int  # 1: no token was more probable
    runners_up: list[
        tuple[int, float]
    ]  # the most probable others, (id, log-probability), in descending order


class Watch:
    """Keeps the log-probabilities of one conversation's tokens, in `steps`."""

    def __init__(self, runners_up: int = 4):
        if runners_up < 0:
            raise ValueError(f"runners_up is {runners_up}, expected 0 or more")
        self.steps: list[Step] = []
        self._runners_up = runners_up

    def chosen(self, token: int, logits: Tensor) -> None:
        """Record the token that was chosen from logits [V]. Raises ValueError for those of several sequences."""
        if logits.ndim != 1:
            raise ValueError(
                f"expected the logits [V] of one conversation, got {list(logits.shape)}"
            )
        logprobs = at_least_float32(logits).log_softmax(-1)
        best = logprobs.topk(min(self._runners_up + 1, len(logprobs)))
        others = [
            pair
            for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            if pair[0] != token
        ]
        rank = 1 + int((logprobs > logprobs[token]).sum())
        self.steps.append(Step(token, logprobs[token].item(), rank, others[: self._runners_up]))

    def table(self, tokenizer: Tokenizer) -> list[str]:
        """The steps as lines of text, at most 110 columns wide with up to four runners-up; [] without any step.

        One line for each token, below a head: its text (`token_text`), id, probability in percent, rank if it was
        not the first, and the runners-up with their probabilities. The last line has the sum of the
        log-probabilities and the perplexity, exp(-sum / tokens), of the answer with its end token.
        """
        if not self.steps:
            return []
        rows = [("token", "id", "%", "rank")]
        for token, logprob, rank, _ in self.steps:
            text = shorten(token_text(tokenizer, token), 24)
            rows.append((text, str(token), percent(logprob), f"#{rank}" if rank > 1 else ""))
        widths = [max(columns(row[i]) for row in rows) for i in range(4)]
        # What is left is for the runners-up: each one two spaces, its text and seven columns for its number.
        room = max(6, (WIDTH - len(join(rows[0], widths))) // max(1, self._runners_up) - 9)
        lines = [
            join(rows[0], widths) + ("  the most probable others, in %" if self._runners_up else "")
        ]
        for row, step in zip(rows[1:], self.steps, strict=True):
            line = join(row, widths)
            for id, logprob in step.runners_up:
                line += (
                    "  "
                    + fill(shorten(token_text(tokenizer, id), room), room)
                    + f"{percent(logprob):>7}"
                )
            lines.append(line.rstrip())
        total = sum(step.logprob for step in self.steps)
        perplexity = math.exp(-total / len(self.steps))
        count = f"{len(self.steps)} token{'s' if len(self.steps) > 1 else ''}"
        return [
            *lines,
            f"{count}, sum of log-probabilities {total:.4f}, perplexity {perplexity:.4f}",
        ]


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """A token so that every character of it can be seen: `' red'`, `'\\n'`, `'é'<0xC3>`, `<|im_end|>`, `<no token>`.

    In quotes as in Python; outside of them bytes that are no whole UTF-8 character, and the names of control tokens.
    """
    token = tokenizer.backend.id_to_token(id)
    if token is None:
        return "<no token>"  # the published lm_head has more rows than the vocabulary has tokens
    if id in tokenizer.special_ids:
        return token
    spelt = all(character in BYTE_OF for character in token)
    data = bytes(BYTE_OF[character] for character in token) if spelt else token.encode()
    text = data.decode(errors="surrogateescape")  # a byte that does not fit becomes U+DC00 + byte
    runs = re.findall("[\udc80-\udcff]|[^\udc80-\udcff]+", text)
    return "".join(
        f"<0x{ord(run) - 0xDC00:02X}>" if "\udc80" <= run <= "\udcff" else repr(run) for run in runs
    )


def percent(logprob: float) -> str:
    value = 100 * math.exp(logprob)
    return "<0.01" if value < 0.005 else f"{value:.2f}"


def columns(text: str) -> int:
    """The width of a text in columns of a terminal: two for a Chinese character, none for a combining one."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return (
        len(text)
        + wide
        - sum(unicodedata.category(character) in ("Mn", "Me") for character in text)
    )


def shorten(text: str, width: int) -> str:
    if columns(text) <= width:
        return text
    while columns(text) > width - 1:
        text = text[:-1]
    return text + "…"


def fill(text: str, width: int) -> str:
    return text + " " * (width - columns(text))


def join(row: tuple[str, ...], widths: list[int]) -> str:
    """Token and rank to the left of their columns, numbers to the right."""
    token, id, probability, rank = row
    a, b, c, d = widths
    return f"{fill(token, a)}  {id:>{b}}  {probability:>{c}}  {rank:<{d}}"
