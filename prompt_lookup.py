"""Prompt lookup: several tokens in one forward pass, where an answer repeats what came before it.

A decode step reads all weights to compute one token. One pass over a few tokens reads them once,
too, but the tokens have to be known before. An answer that transcribes, extracts or edits often
repeats the prompt or itself, so they can be guessed: where the last tokens have occurred before,
those that followed them there are likely to follow again. This is speculative decoding (arXiv
2211.17192) whose draft model is a search; arXiv 2304.04487 §3 copies from a reference text as here.

`PromptLookup` takes the place of `generate.decode_step`. It runs the token that was chosen together
with guesses of the tokens after it, returns the logits after the first, and keeps the others. The
generation loop stays as it is: it chooses each token from the logits after all tokens before it,
with the same generator in the same order. As long as it chooses what was guessed, the next logits
are there already. The first other token makes the rest worthless, and is run with new guesses.

So nothing is accepted that would not have been chosen. This is also what rejection sampling comes
to: for a guess x it accepts x with the probability p(x) and else draws from p without x, which is
a draw from p that happens to equal x or not. The tokens for a seed are those of plain decoding as
far as the logits are: in float32 these differ by rounding (in the tests by at most 1e-5), and no
token of the tests differs. In bfloat16, float16 and with quantized weights, a pass of several rows
rounds differently from one of a single row, as a batch does, so that an answer may continue
differently where two tokens are almost equally probable.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl import KVCache, Qwen2VL

DEFAULT_NUM_TOKENS = 8  # with the known token 9 rows, which each CPU kernel still runs as few rows

MIN_MATCH = 3  # tokens that have occurred before, for a guess; two occur too often by chance
LONG_MATCH = 6  # the same where guesses have failed
MAX_MATCH = 32  # no longer match is told from others
MAX_PLACES = 50  # the latest places of three tokens that are compared

# Credit: the tokens that guesses gained, less the price of their passes.
PASS_PRICE = 2.0  # what a pass with guesses takes longer than one without, in passes without
CREDIT_PER_PASS = 0.03  # so that guesses which fail cost about 3 % of the time
MAX_CREDIT = 4.0
MIN_CREDIT = -4.0  # below it only a match of MAX_MATCH counts, below 0 one of LONG_MATCH


class NgramLookup:
    """The tokens of a sequence so far, and where each three in a row have occurred in it."""

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self.places: dict[tuple[int, ...], list[int]] = {}  # three tokens → indices after them
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token at the end."""
        self.ids.append(token)
        if len(self.ids) >= MIN_MATCH:
            ngram = tuple(self.ids[-MIN_MATCH:])
            self.places.setdefault(ngram, []).append(len(self.ids))

    def match_length(self, place: int) -> int:
        """Return how many tokens before the index `place` equal the last tokens."""
        longest = min(place, MAX_MATCH)
        for length in range(longest):
            if self.ids[place - 1 - length] != self.ids[-1 - length]:
                return length
        return longest

    def find(self) -> tuple[int, int]:
        """Return the index after the longest match of the last tokens, the latest, and its length.

        (0, 0) where the last MIN_MATCH tokens have not occurred before.
        """
        ngram = tuple(self.ids[-MIN_MATCH:])
        places = self.places.get(ngram, [])[:-1]  # the last is the end of the sequence itself
        best = 0
        longest = 0
        for place in places[-MAX_PLACES:]:
            length = self.match_length(place)
            if length >= longest:
                best = place
                longest = length
        return best, longest


class PromptLookup:
    """A decode step for one sequence that runs guessed tokens with the known one.

    After each call the cache holds what it holds without guesses: the keys of tokens that are only
    guessed lie beyond its length.
    """

    def __init__(
        self,
        model: Qwen2VL,
        ids: list[int],
        num_tokens: int,
        eos_token_ids: set[int],
        decode: Callable[..., Tensor],
    ):
        """ids: the prompt; num_tokens: guesses of one pass, at most; decode: the step without any.

        Raises ValueError for RoPE that is scaled with the length, of which guesses are a part.
        """
        rope_type = model.config.rope_type
        if rope_type in ("dynamic", "longrope"):
            raise ValueError(f"no prompt lookup for rope of type {rope_type}")
        self.lookup = NgramLookup(ids)
        self.num_tokens = num_tokens
        # After the end nothing is run, and a placeholder cannot be run without its image.
        self.never_guessed = eos_token_ids | {
            model.config.image_token_id,
            model.config.video_token_id,
        }
        self.decode = decode
        self.credit = 0.0
        self.guesses: list[int] = []  # of the last pass
        self.logits: list[Tensor] = []  # [1, V] after each of its tokens
        self.accepted = 0  # of the guesses, so far

    def __call__(
        self, model: Qwen2VL, tokens: list[int], cache: KVCache, mask: Tensor | None
    ) -> Tensor:
        """Return the logits [1, V] after one more token; the parameters are `decode_step`'s."""
        [token] = tokens
        self.lookup.append(token)
        if self.accepted < len(self.guesses) and self.guesses[self.accepted] == token:
            self.accepted += 1
            cache.set_length(cache.length + 1)
            return self.logits[self.accepted]
        self.settle()
        self.guesses = self.guess(cache.max_length - cache.length - 1)
        if not self.guesses:
            return self.decode(model, tokens, cache, mask)
        self.logits = run_tokens(model, [token, *self.guesses], cache, mask)
        return self.logits[0]

    def settle(self) -> None:
        """Account for the last pass, whose guesses have all been accepted or one rejected."""
        if self.guesses:
            self.credit += self.accepted - PASS_PRICE
        self.credit = min(self.credit + CREDIT_PER_PASS, MAX_CREDIT)
        self.accepted = 0

    def needed_match(self) -> int:
        """Return how many tokens must have occurred before, for a guess: more after failures."""
        if self.credit >= 0:
            return MIN_MATCH
        if self.credit >= MIN_CREDIT:
            return LONG_MATCH
        return MAX_MATCH

    def guess(self, room: int) -> list[int]:
        """Return the tokens that may follow, at most `room` and at most as many as have matched."""
        place, length = self.lookup.find()
        if length < self.needed_match():
            return []
        ids = self.lookup.ids.copy()
        end = len(ids)
        for index in range(place, place + min(self.num_tokens, length, room)):
            token = ids[index]  # beyond the end a guess: a sequence that repeats a few tokens
            if token in self.never_guessed:
                break
            ids.append(token)
        return ids[end:]


def run_tokens(
    model: Qwen2VL, tokens: list[int], cache: KVCache, mask: Tensor | None
) -> list[Tensor]:
    """Run tokens of one sequence, and return the logits [1, V] after each.

    Only the first one stays in the cache; `KVCache.set_length` takes in the others.
    mask [1, S]: 0 for the padding of the prompt; None: there is none.
    """
    start = cache.length
    ids = torch.tensor([tokens], device=cache.keys.device)  # [1, n]
    if mask is not None:
        mask = F.pad(mask, (0, start + len(tokens) - mask.shape[1]), value=1)  # [1, K]
    logits = model(ids, attention_mask=mask, cache=cache)  # [1, n, V]
    cache.set_length(start + 1)
    return list(logits.unbind(1))
