"""Print each token of an answer with its probability and the most probable alternatives.

    python -m apps.logprobs --image examples/shapes.png --prompt "Where is the red circle?"

The probabilities are the model's own, the softmax of its logits in at least float32: before the
repetition penalty, temperature, top-k and top-p change them for sampling. Logarithms are natural.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import math
from typing import NamedTuple

from torch import Tensor

import command_line
from generate import choose_generation_config, generate_steps
from qwen2vl import at_least_float32
from tokenizer import Tokenizer


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
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    others = [(other, logprob) for other, logprob in pairs if other != token]
    rank = 1 + int((logprobs > logprobs[token]).sum())
    return TokenScore(token, logprobs[token].item(), rank, others[:alternatives])


def format_score(tokenizer: Tokenizer, score: TokenScore) -> str:
    """Return one line: token, id, probability, rank if it was not the first, alternatives."""
    text = repr(tokenizer.decode(score.token, skip_special_tokens=False))
    rank = f"#{score.rank}" if score.rank > 1 else ""
    line = f"{text:<18.18}{score.token:>7}{math.exp(score.logprob):>9.2%} {rank:<5}"
    for token, logprob in score.alternatives:
        text = repr(tokenizer.decode(token, skip_special_tokens=False))
        line += f" {text:<15.15}{math.exp(logprob):>7.2%}"
    return line.rstrip()


def format_table(tokenizer: Tokenizer, scores: list[TokenScore]) -> str:
    """Return a header, a line for each token, and the sum of logprobs with the perplexity."""
    lines = [f"{'token':<18}{'id':>7}{'p':>9} rank  alternatives"]
    lines += [format_score(tokenizer, score) for score in scores]
    total = sum(score.logprob for score in scores)
    perplexity = math.exp(-total / len(scores))
    lines.append(f"{len(scores)} tokens, sum of logprobs {total:.4f}, perplexity {perplexity:.4f}")
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    """Answer the question; print the answer and the table of its tokens."""
    session = command_line.open_session(arguments)
    config = choose_generation_config(arguments, session.model)
    tokenizer = session.processor.tokenizer
    scores = []
    steps = generate_steps(
        session.model, session.batch, arguments.max_new_tokens, config, tokenizer=tokenizer
    )
    for step in steps:
        scores.append(score_token(step.tokens[0], step.logits[0], arguments.alternatives))
    ids = [score.token for score in scores]
    print(tokenizer.decode(ids, stop_strings=config.stop_strings), end="\n\n")
    print(format_table(tokenizer, scores))


def main(argv: list[str] | None = None) -> int:
    parser = command_line.build_parser(
        "Print each token of an answer with its probability.", "python -m apps.logprobs"
    )
    parser.add_argument(
        "--alternatives", type=int, choices=range(21), default=3, metavar="K", help="(default: 3)"
    )
    arguments = command_line.parse_arguments(parser, argv)
    return command_line.run_main("apps.logprobs", run, arguments)


if __name__ == "__main__":
    command_line.run_program("apps.logprobs", main)
