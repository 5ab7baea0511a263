"""Logits → tokens → words: sampling, streaming and the command line.

    python generate.py --image examples/shapes.png --prompt "How many shapes are there?"

A prompt goes through the model once ("prefill"), which fills the key/value cache and gives the first token; then each
token goes through alone ("decode"), reading what the cache holds of all before it.

Shapes: B conversations of a batch, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from load_weights import check_supported, find_folder, load_model
from preprocess import Batch, Processor
from qwen2vl import KVCache, Qwen2VL, at_least_float32
from tokenizer import StreamDecoder

TINY = Path(__file__).parent / "tiny" / "checkpoint"


# --------------------------------------------------------------------------------------------------- sampling
@dataclass
class Sampling:
    """How the next token is chosen: the fields of generation_config.json, neutral by default."""

    do_sample: bool = False  # False: always the most probable token
    temperature: float = 1.0  # divides the logits: below 1 sharper, above 1 flatter
    top_k: int = 0  # keep only the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the most probable tokens that together reach this probability
    repetition_penalty: float = (
        1.0  # above 1: tokens of the prompt and the answer so far become less probable
    )
    seed: int | list[int] | None = (
        None  # of the first row, the next ones counting up; or of each; None: by chance
    )

    def __post_init__(self):
        for name, fine, expected in (
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not fine:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {expected}")

    @classmethod
    def of_model(cls, model: Qwen2VL) -> Sampling:
        """The settings that the checkpoint's generation_config.json recommends."""
        found = model.generation_config
        return cls(**{f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None})


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lowers the logits [B, V] of the tokens marked in seen, bool [B, V]: positive ones are divided by the
    penalty, negative ones multiplied. Source: CTRL, arXiv 1909.05858 §4.1."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits [B, V] → the probabilities [B, V] that tokens are drawn with: temperature, then top-k, then top-p.

    Source: the order of transformers 5.23.0, `GenerationMixin._get_logits_processor`; top-p arXiv 1904.09751.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        weakest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if sampling.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        # From the least probable token upwards, drop what the more probable ones can do without.
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        dropped[:, -1] = False  # the most probable one always stays
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    return logits.softmax(-1)


def choose(
    logits: Tensor, seen: Tensor | None, sampling: Sampling, generators: list[torch.Generator]
) -> Tensor:
    """The next token of each row, int64 [B], from logits [B, V]."""
    logits = at_least_float32(logits)
    if seen is not None:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if not sampling.do_sample or sampling.top_k == 1:
        return logits.argmax(-1)
    probabilities = next_token_probabilities(
        logits, sampling
    ).cpu()  # drawn there, so that a seed means the same
    draws = [
        torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(draws).to(logits.device)


# ------------------------------------------------------------------------------------------------- generation
def end_ids(model: Qwen2VL) -> set[int]:
    """The ids that end an answer: `eos_token_id` in generation_config.json, else in config.json."""
    ends = model.generation_config.get("eos_token_id", model.config.eos_token_id)
    return {ends} if isinstance(ends, int) else set(ends or ())


@torch.inference_mode()
def stream(
    model: Qwen2VL, batch: Batch, max_new_tokens: int = 128, sampling: Sampling | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[int]]:  # fmt: skip
    """Yields the next token id of each row, as a list of B ids, as soon as it is made.

    Ends when every row has ended or after max_new_tokens. A row ends with any of `end_ids`, which is yielded too;
    after it the row is filled with the pad id. sampling: by default what generation_config.json says.
    cache: of an earlier turn, with room for this one; batch then holds all tokens, but only the pictures of the new
    ones. By default one of its own.
    """
    sampling = sampling or Sampling.of_model(model)
    device = model.model.norm.weight.device
    ends, pad = (
        end_ids(model),
        model.generation_config.get("pad_token_id", model.config.pad_token_id),
    )
    pad = min(ends, default=0) if pad is None else pad

    inputs = {name: torch.as_tensor(array, device=device) for name, array in batch.arrays().items()}
    ids, mask = inputs["input_ids"], inputs.pop("attention_mask")  # [B, S]
    rows, length = ids.shape
    # Room for the whole answer at once; without padding no mask is needed, which opens the quickest attention.
    if cache is None:
        cache = KVCache(
            model.config, rows, length + max_new_tokens, device, model.model.norm.weight.dtype
        )
    inputs["input_ids"] = ids[:, cache.length :]
    mask = None if mask.all() else torch.cat((mask, mask.new_ones(rows, max_new_tokens)), dim=1)
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)
        seen.scatter_(1, ids, True)
    generators = [torch.Generator() for _ in range(rows)]
    for row, generator in enumerate(generators):
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(
                sampling.seed[row] if isinstance(sampling.seed, list) else sampling.seed + row
            )

    ended = [False] * rows
    for _ in range(max_new_tokens):
        seen_mask = None if mask is None else mask[:, : cache.length + inputs["input_ids"].shape[1]]
        logits = model(attention_mask=seen_mask, cache=cache, logits_to_keep=1, **inputs)[
            :, -1
        ]  # [B, V]
        token = choose(logits, seen, sampling, generators)
        step = [pad if done else id for id, done in zip(token.tolist(), ended, strict=True)]
        ended = [done or id in ends for id, done in zip(step, ended, strict=True)]
        yield step
        if all(ended):
            return
        inputs = {
            "input_ids": torch.tensor(step, device=device)[:, None]
        }  # no pictures: the cache has seen them
        if seen is not None:
            seen.scatter_(1, inputs["input_ids"], True)


def generate(
    model: Qwen2VL, batch: Batch, max_new_tokens: int = 128, sampling: Sampling | None = None
) -> list[list[int]]:
    """The new token ids of each row, all of one length, as `stream` yields them."""
    return [list(row) for row in zip(*stream(model, batch, max_new_tokens, sampling), strict=True)]


# ----------------------------------------------------------------------------------------------- command line
def run(arguments: argparse.Namespace) -> None:
    """Loads, asks and prints. Raises OSError or ValueError with one sentence for whatever the user can mend."""
    from extras import command_line

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    single = not (arguments.chat or arguments.batch)
    folder = find_folder(arguments.model or TINY, weights=not arguments.dry_run)
    check_supported(folder)  # first: what is wrong is the checkpoint, not a file that it lacks
    processor = Processor.from_pretrained(folder, arguments.min_pixels, arguments.max_pixels)
    messages, start = command_line.first_messages(arguments), time.perf_counter()
    batch = processor(messages, add_vision_id=arguments.add_vision_id) if single else None
    preparing = (
        time.perf_counter() - start
    )  # before the model: a wrong path should not wait for its loading
    if arguments.dry_run:
        from extras import dry_run

        return dry_run.run(arguments, folder, processor, batch)
    for media in batch.media if single else ():
        say(media.summary(processor.image_config))
    dtype, start = arguments.dtype and getattr(torch, arguments.dtype), time.perf_counter()
    model = load_model(folder, arguments.device, dtype, arguments.attention, arguments.quantize)
    say(command_line.loaded(arguments, model, time.perf_counter() - start))
    if arguments.cuda_graph:
        from extras import cuda_graph

        cuda_graph.use(model)
    sampling = command_line.choose_sampling(arguments, model, say)
    if not single:
        from extras import batch_file, chat

        if arguments.chat:
            return chat.run(arguments, model, processor, sampling, messages)
        return batch_file.run(arguments, model, processor, sampling)
    return answer(arguments, model, processor, batch, sampling, say, preparing)


def answer(
    arguments: argparse.Namespace, model: Qwen2VL, processor: Processor, batch: Batch, sampling: Sampling,
    say: Callable[[str], None], preparing: float,
) -> None:  # fmt: skip
    """Streams the answer to one conversation to stdout; `preparing` is the time in seconds that batch took."""
    from extras import command_line

    words, times = StreamDecoder(processor.tokenizer), [time.perf_counter() - preparing]
    with command_line.watching(
        arguments, model, processor, batch, preparing
    ) as watch:  # what some options want
        for (token,) in stream(model, batch, arguments.max_new_tokens, sampling):
            times.append(time.perf_counter())
            print(words.push(token), end="", flush=True)
            watch(token)
        print(words.finish(), flush=True)
        say(command_line.spent(model, batch, times))


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0, or 2 after one sentence on stderr about what was wrong."""
    from extras import command_line

    arguments = command_line.parse_arguments(argv)
    try:
        run(arguments)
    except (OSError, ValueError) as error:
        print(f"generate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    import generate  # under its name, so that the extras that import it find this very module

    warnings.formatwarning = lambda message, *_: (
        f"generate.py: {message}\n"
    )  # one line, without the code
    sys.exit(generate.main())
