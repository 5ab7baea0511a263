"""Print each token of an answer with its probability and the most probable alternatives.

    python -m apps.logprobs --image examples/shapes.png --prompt "Where is the red circle?"

The probabilities are the model's own, the softmax of its logits in float32 (float64 for a
float64 model): before the repetition penalty, temperature, top-k and top-p change them for
sampling. Logarithms are natural.
"""

import argparse
import math
import re
from typing import NamedTuple

from torch import Tensor

import command_line
from generate import choose_generation_config, generate_steps
from qwen2vl import at_least_float32
from tokenizer import BYTE_OF, Tokenizer


class TokenScore(NamedTuple):
    """One token of the answer."""

    token: int
    logprob: float
    rank: int  # 1: no token was more probable
    alternatives: list[tuple[int, float]]  # the most probable other tokens and their logprobs


def score_token(token: int, logits: Tensor, alternatives: int = 3) -> TokenScore:
    """Return the score of a token that was chosen from logits [V]."""
    logprobs = at_least_float32(logits).log_softmax(-1)
    top = logprobs.topk(min(alternatives + 1, len(logprobs)))
    others = []
    for other, logprob in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        if other != token and len(others) < alternatives:
            others.append((other, logprob))
    rank = 1 + int((logprobs > logprobs[token]).sum())
    return TokenScore(token, logprobs[token].item(), rank, others)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token with every character visible.

    For example `' red'`, `'\n'`, `'é'<0xC3>`, `<|im_end|>`, `<no token>`.
    Text is quoted as in Python; outside the quotes are bytes of an incomplete
    UTF-8 character and special tokens.
    """
    name = tokenizer.backend.id_to_token(token)
    if name is None:
        return "<no token>"  # the published lm_head has more rows than the vocabulary has tokens
    if token in tokenizer.special_ids:
        return name
    if any(character not in BYTE_OF for character in name):
        return repr(name)
    data = bytes(BYTE_OF[character] for character in name)
    text = data.decode(errors="surrogateescape")  # an invalid byte becomes U+DC00 + byte
    pieces = []
    for piece in re.findall("[\udc80-\udcff]|[^\udc80-\udcff]+", text):
        is_byte = "\udc80" <= piece[0] <= "\udcff"
        pieces.append(f"<0x{ord(piece) - 0xDC00:02X}>" if is_byte else repr(piece))
    return "".join(pieces)


def format_score(tokenizer: Tokenizer, score: TokenScore) -> str:
    """Return one line: token, id, probability, rank if it was not the first, alternatives."""
    rank = f"#{score.rank}" if score.rank > 1 else ""
    text = token_text(tokenizer, score.token)
    line = f"{text:<18.18}{score.token:>7}{math.exp(score.logprob):>9.2%} {rank:<5}"
    for token, logprob in score.alternatives:
        line += f" {token_text(tokenizer, token):<15.15}{math.exp(logprob):>7.2%}"
    return line.rstrip()


def format_table(tokenizer: Tokenizer, scores: list[TokenScore]) -> list[str]:
    """Return a header, one line per token, and the sum of logprobs with the perplexity.

    Expects at least one token.
    """
    total = sum(score.logprob for score in scores)
    perplexity = math.exp(-total / len(scores))
    header = f"{'token':<18}{'id':>7}{'p':>9} rank  alternatives"
    summary = f"{len(scores)} tokens, sum of logprobs {total:.4f}, perplexity {perplexity:.4f}"
    return [header, *(format_score(tokenizer, score) for score in scores), summary]


def run(arguments: argparse.Namespace) -> None:
    """Answer the question; print the answer and the table of its tokens."""
    session = command_line.open_session(arguments)
    config = choose_generation_config(arguments, session.model)
    tokenizer = session.processor.tokenizer
    scores = []
    for step in generate_steps(session.model, session.batch, arguments.max_new_tokens, config):
        scores.append(score_token(step.tokens[0], step.logits[0], arguments.alternatives))
    print(tokenizer.decode(score.token for score in scores), end="\n\n")
    print("\n".join(format_table(tokenizer, scores)))


def main(argv: list[str] | None = None) -> int:
    parser = command_line.build_parser(
        "Print each token of an answer with its probability.", "python -m apps.logprobs"
    )
    parser.add_argument("--alternatives", type=int, default=3, metavar="K", help="(default: 3)")
    arguments = command_line.parse_arguments(parser, argv)
    if arguments.alternatives < 0:
        parser.error(f"--alternatives is {arguments.alternatives}, expected 0 or more")
    return command_line.run_main("apps.logprobs", run, arguments)


if __name__ == "__main__":
    command_line.run_program("apps.logprobs", main)
