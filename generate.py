"""Logits → tokens → words: sampling, streaming and the command line.

    python generate.py --image examples/shapes.png --prompt "How many shapes are there?"

A prompt goes through the model once ("prefill"), which fills the key/value cache and gives the first token; then each
token goes through alone ("decode"), reading what the cache holds of all before it.

Shapes: B conversations of a batch, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import linear
from load_weights import check_supported, find_folder, load_model, read_json
from preprocess import Batch, Processor
from qwen2vl import Config, KVCache, Qwen2VL, at_least_float32
from tokenizer import StreamDecoder

TINY = Path(__file__).parent / "tiny" / "checkpoint"
DEFAULT_NEW_TOKENS = 128  # where neither the caller nor generation_config.json gives a number
ROOM = 1024  # new tokens that a cache has memory for at first; it grows as needed


# --------------------------------------------------------------------------------------------------- sampling
def is_number(value: object) -> bool:
    """Return whether value is a finite int or float; a bool is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, int) or math.isfinite(value)


def sampling_problem(name: str, value: object) -> str | None:
    """Return what is wrong with the value of a sampling field, or None."""
    if name in ("temperature", "repetition_penalty"):
        valid, expected = is_number(value) and value > 0, "a number above 0"
    elif name == "top_k":
        valid, expected = (
            is_number(value) and isinstance(value, int) and value >= 0,
            "0 (off) or more",
        )
    else:
        valid, expected = is_number(value) and 0 < value <= 1, "above 0 and at most 1"
    return None if valid else f"{name} is {value!r}, expected {expected}"


@dataclass
class Sampling:
    """How the next token is chosen: the fields of generation_config.json, neutral by default.

    Raises ValueError for a value out of its range.
    """

    do_sample: bool = False  # False: always the most probable token
    temperature: float = 1.0  # divides the logits: below 1 sharper, above 1 flatter
    top_k: int = 0  # keep only the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # keep the most probable tokens that together reach this probability
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less probable
    seed: int | list[int] | None = (
        None  # of the first sequence, counting up; or of each; None: random
    )

    def __post_init__(self):
        for name in ("temperature", "top_k", "top_p", "repetition_penalty"):
            problem = sampling_problem(name, getattr(self, name))
            if problem:
                raise ValueError(problem)
        for seed in self.seed if isinstance(self.seed, list) else [self.seed]:
            if seed is not None and not 0 <= seed < 2**63:
                raise ValueError(f"seed is {seed}, expected 0 to 2**63 - 1")

    @classmethod
    def of_model(cls, model: Qwen2VL, **options) -> Sampling:
        """Return the settings of the checkpoint's generation_config.json, where `options` do not replace them.

        Only what is used is checked: without do_sample, temperature, top_k and top_p of the file are ignored.
        Raises ValueError that names the field and the option that replaces it.
        """
        recommended = model.generation_config
        do_sample = options.get("do_sample", recommended.get("do_sample"))
        if do_sample is not None and not isinstance(do_sample, bool):
            raise ValueError(
                f"generation_config.json: do_sample is {do_sample!r}, expected true or false; "
                "--temperature replaces it"
            )
        used = ["repetition_penalty"]
        if do_sample:
            used += ["temperature", "top_k", "top_p"]
        values = {"do_sample": bool(do_sample)}
        for name in used:
            if name in options or recommended.get(name) is None:
                continue
            problem = sampling_problem(name, recommended[name])
            if problem:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"generation_config.json: {problem}; {option} replaces it")
            values[name] = recommended[name]
        return cls(**(values | options))


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lower the logits [B, V] of the tokens marked in seen, bool [B, V]: positive ones are divided by the
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
    # Drawn on the CPU, so that a seed means the same on every device.
    probabilities = next_token_probabilities(logits, sampling).cpu()
    if not probabilities.isfinite().all():
        raise NotFiniteError(
            f"the probabilities are not finite: temperature {sampling.temperature} or "
            f"repetition_penalty {sampling.repetition_penalty} is too far from 1"
        )
    draws = [
        torch.multinomial(p, 1, generator=g) for p, g in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(draws).to(logits.device)


class Sampler:
    """Chooses the next token of each sequence; owns the random generators and the tokens that count as repeated."""

    def __init__(self, sampling: Sampling, ids: Tensor, mask: Tensor | None, vocab_size: int):
        """ids int64 [B, S] of the prompts; mask [B, S], 0 for padding, which does not count; None: no padding."""
        self.sampling = sampling
        self.seen: Tensor | None = None  # bool [B, V], only for a repetition penalty
        if sampling.repetition_penalty != 1:
            real = torch.ones_like(ids) if mask is None else mask
            rows, columns = real.nonzero(as_tuple=True)
            self.seen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)
            self.seen[rows, ids[rows, columns]] = True
        self.generators = [torch.Generator() for _ in range(len(ids))]
        for row, generator in enumerate(self.generators):
            if sampling.seed is None:
                generator.seed()
            elif isinstance(sampling.seed, list):
                generator.manual_seed(sampling.seed[row])
            else:
                generator.manual_seed(sampling.seed + row)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next tokens, int64 [B], from logits [B, V]."""
        tokens = choose(logits, self.seen, self.sampling, self.generators)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens


# ------------------------------------------------------------------------------------------------- generation
def as_ids(name: str, value: object) -> list[int]:
    """Return the token ids of a field that holds an int, a list of ints or null. Raises ValueError."""
    values = value if isinstance(value, list) else [value]
    ids = [id for id in values if id is not None]
    for id in ids:
        if isinstance(id, bool) or not isinstance(id, int):
            raise ValueError(f"generation_config.json: {name} is {value!r}, expected token ids")
    return ids


def token_ids(model: Qwen2VL, name: str) -> list[int]:
    """Return the ids of eos_token_id or pad_token_id: of generation_config.json, else of config.json."""
    value = model.generation_config.get(name)
    return as_ids(name, getattr(model.config, name) if value is None else value)


def end_ids(model: Qwen2VL) -> set[int]:
    """Return the ids that end an answer: `eos_token_id` in generation_config.json, else in config.json."""
    return set(token_ids(model, "eos_token_id"))


def pad_id(model: Qwen2VL) -> int:
    """Return the id that fills sequences that have ended; an end id where no usable one is given."""
    candidates = [*token_ids(model, "pad_token_id"), *sorted(end_ids(model)), 0]
    return next(id for id in candidates if 0 <= id < model.config.vocab_size)


def new_token_limit(settings: dict, prompt_length: int, max_new_tokens: int | None) -> int:
    """Return how many tokens an answer may have.

    settings: the content of generation_config.json. As in the reference (transformers 5.23.0,
    `GenerationMixin._prepare_generated_length`), the caller's number comes first, then max_new_tokens, then
    max_length, which counts the prompt. Raises ValueError for an unusable number.
    """
    if max_new_tokens is not None:
        return max_new_tokens
    for name in ("max_new_tokens", "max_length"):
        value = settings.get(name)
        if value is None:
            continue
        if not is_number(value) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"generation_config.json: {name} is {value!r}, expected 1 or more; "
                "--max-new-tokens replaces it"
            )
        if name == "max_new_tokens":
            return value
        if value <= prompt_length:
            raise ValueError(
                f"generation_config.json: max_length is {value}, but the prompt alone has "
                f"{prompt_length} tokens; --max-new-tokens replaces it"
            )
        return value - prompt_length
    return DEFAULT_NEW_TOKENS


def new_token_limits(model: Qwen2VL, batch: Batch, max_new_tokens: int | None) -> list[int]:
    """Return `new_token_limit` of each sequence, without counting its padding."""
    lengths = batch.attention_mask.sum(1).tolist()
    return [new_token_limit(model.generation_config, n, max_new_tokens) for n in lengths]


class NotFiniteError(ValueError):
    """The model computed NaN or infinite logits."""


class Step(NamedTuple):
    """What one step of the generation gives."""

    tokens: list[int]  # the next token of each of B sequences; the pad id after the end
    logits: Tensor  # [B, V], in the model's dtype, that they were chosen from


def prefill(model: Qwen2VL, batch: Batch, cache: KVCache) -> Tensor:
    """Run the prompts, from token cache.length on, through the model, and return the logits [B, V] after them."""
    device = model.model.norm.weight.device
    inputs = {name: torch.as_tensor(array, device=device) for name, array in batch.arrays().items()}
    if inputs["attention_mask"].all():
        inputs["attention_mask"] = None  # without padding no mask is needed: the fastest attention
    inputs["input_ids"] = inputs["input_ids"][:, cache.length :]
    return model(cache=cache, logits_to_keep=1, **inputs)[:, -1]


def decode_step(model: Qwen2VL, tokens: list[int], cache: KVCache, mask: Tensor | None) -> Tensor:
    """Run one token of each sequence, and return the logits [B, V] after it.

    mask [B, K] over all tokens, these included; None: none is padding. The images are in the cache.
    """
    ids = torch.tensor(tokens, device=cache.keys.device)[:, None]  # [B, 1]
    return model(input_ids=ids, attention_mask=mask, cache=cache, logits_to_keep=1)[:, -1]


@torch.inference_mode()
def generate_steps(
    model: Qwen2VL,
    batch: Batch,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    cache: KVCache | None = None,
) -> Iterator[Step]:
    """Yield the next token of each sequence, with the logits it was chosen from, as soon as it is made.

    Ends when every sequence has ended: with any of `end_ids`, which is yielded too, or at its number of tokens.
    After its end a sequence is filled with the pad id. max_new_tokens and sampling: by default those of
    generation_config.json. cache: of an earlier turn; batch then holds all tokens, but only the images of the
    new ones. Raises NotFiniteError instead of choosing among logits that are no numbers.
    """
    sampling = Sampling.of_model(model) if sampling is None else sampling
    ends, pad = end_ids(model), pad_id(model)
    limits = new_token_limits(model, batch, max_new_tokens)
    weight = model.model.norm.weight
    ids = torch.as_tensor(batch.input_ids, device=weight.device)
    mask = torch.as_tensor(batch.attention_mask, device=weight.device)
    if cache is None:
        cache = new_cache(model, *ids.shape, max(limits))
    sampler = Sampler(sampling, ids, mask, model.config.vocab_size)
    mask = None if mask.all() else mask

    start = int(cache.next_position.max())
    logits = prefill(model, batch, cache)
    position = int(cache.next_position.max())
    warn_beyond_training(model, start, position)
    running = set(range(len(limits)))
    for count in range(1, max(limits) + 1):
        check_finite(logits, running)
        chosen = sampler(logits).tolist()
        tokens = [id if row in running else pad for row, id in enumerate(chosen)]
        running = {row for row in running if tokens[row] not in ends and count < limits[row]}
        yield Step(tokens, logits)
        if not running:
            return
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), dim=1)
        logits = decode_step(model, tokens, cache, mask)
        warn_beyond_training(model, position + count - 1, position + count)


def new_cache(model: Qwen2VL, rows: int, length: int, new_tokens: int) -> KVCache:
    """Return a cache for prompts of `length` tokens and their answers, with memory for ROOM new tokens at first."""
    weight = model.model.norm.weight
    capacity = length + min(new_tokens, ROOM)
    return KVCache(model.config, rows, length + new_tokens, weight.device, weight.dtype, capacity)


def check_finite(logits: Tensor, rows: set[int]) -> None:
    """Raise NotFiniteError if the logits [B, V] of one of the rows hold NaN or infinity."""
    finite = logits.isfinite().all(-1).tolist()
    if all(finite[row] for row in rows):
        return
    dtype = str(logits.dtype).removeprefix("torch.")
    advice = "the weights or the inputs are damaged"
    if logits.dtype in (torch.float16, torch.bfloat16):
        advice = "try --dtype float32"
    if logits.dtype == torch.float16:
        advice = "try --dtype bfloat16 or float32"
    raise NotFiniteError(
        f"the scores of the next token are not finite in {dtype}: {advice}; "
        "--debug-nan names the first layer where it appears"
    )


def trained_length(config: Config) -> int:
    """Return the number of positions that the model is made for, with what a scaled RoPE adds."""
    length = config.max_position_embeddings
    factor = config.rope_scaling.get("factor")
    original = config.rope_scaling.get("original_max_position_embeddings") or length
    if not is_number(factor) or not is_number(original):
        return length
    return max(length, int(original * factor))


def warn_beyond_training(model: Qwen2VL, before: int, after: int) -> None:
    """Warn when the number of positions in use passes the trained length between `before` and `after`."""
    trained = trained_length(model.config)
    if before <= trained < after:
        warnings.warn(
            f"the conversation has reached {after:,} positions, but the model is trained for "
            f"{trained:,} (max_position_embeddings): the answer may be wrong",
            stacklevel=3,
        )


def stream(
    model: Qwen2VL,
    batch: Batch,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
    cache: KVCache | None = None,
) -> Iterator[list[int]]:
    """Yield the next token id of each sequence, as a list of B ids: the tokens of `generate_steps`."""
    for step in generate_steps(model, batch, max_new_tokens, sampling, cache):
        yield step.tokens


def generate(
    model: Qwen2VL,
    batch: Batch,
    max_new_tokens: int | None = None,
    sampling: Sampling | None = None,
) -> list[list[int]]:
    """Return the new token ids of each sequence, all of one length, as `stream` yields them."""
    return [list(row) for row in zip(*stream(model, batch, max_new_tokens, sampling), strict=True)]


# ----------------------------------------------------------------------------------------------- command line
def run(arguments: argparse.Namespace) -> None:
    """Load, ask and print. Raises OSError or ValueError with one sentence for whatever the user can fix."""
    from extras import command_line

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    single = not (arguments.chat or arguments.batch)
    messages = command_line.first_messages(arguments)  # with its checks, before anything is read
    folder = find_folder(arguments.model or TINY, weights=not arguments.dry_run)
    check_supported(folder)  # first: what is wrong is the checkpoint, not a file that it lacks
    processor = command_line.load_processor(arguments, folder)
    start = time.perf_counter()
    batch = processor(messages, add_vision_id=arguments.add_vision_id) if single else None
    preparing = time.perf_counter() - start  # before the model: a wrong path does not wait for it
    if arguments.dry_run:
        return estimate(arguments, folder, processor, batch)
    for media in batch.media if single else ():
        say(media.summary(processor.image_config))
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    start = time.perf_counter()
    model = load_model(folder, arguments.device, dtype, arguments.attention, arguments.quantize)
    processor.check_model(model.config)
    say(command_line.loaded(arguments, model, time.perf_counter() - start))
    if arguments.cuda_graph:
        from extras import cuda_graph

        cuda_graph.use(model)
    sampling = command_line.choose_sampling(arguments, model, say)
    with ExitStack() as stack:
        if arguments.debug_nan:
            from extras import debug_nan

            stack.enter_context(debug_nan.watch(model))
        if arguments.chat:
            from extras import chat

            return chat.run(arguments, model, processor, sampling, messages)
        if arguments.batch:
            from extras import batch_file

            return batch_file.run(arguments, model, processor, sampling)
        return answer(arguments, model, processor, batch, sampling, say, preparing)


def estimate(
    arguments: argparse.Namespace, folder: Path, processor: Processor, batch: Batch | None
) -> None:
    """Print what `--dry-run` counts."""
    from extras import dry_run

    settings = {}
    if (folder / "generation_config.json").is_file():
        settings = read_json(folder, "generation_config.json")
    length = 0 if batch is None else batch.input_ids.shape[1]
    arguments.max_new_tokens = new_token_limit(settings, length, arguments.max_new_tokens)
    dry_run.run(arguments, folder, processor, batch)


def answer(
    arguments: argparse.Namespace,
    model: Qwen2VL,
    processor: Processor,
    batch: Batch,
    sampling: Sampling,
    say: Callable[[str], None],
    preparing: float,
) -> None:
    """Stream the answer to one conversation to stdout; `preparing` is the time in seconds that batch took."""
    from extras import command_line

    words, times = StreamDecoder(processor.tokenizer), [time.perf_counter() - preparing]
    with command_line.watching(arguments, model, processor, batch, preparing) as watch:
        for step in generate_steps(model, batch, arguments.max_new_tokens, sampling):
            times.append(time.perf_counter())
            command_line.put(words.push(step.tokens[0]))
            watch(step)
        command_line.put(words.finish(), end="\n")
        say(command_line.spent(model, batch, times))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 after one sentence on stderr about what was wrong.

    130 after Ctrl-C, 141 where nobody reads stdout any more.
    """
    from extras import command_line

    arguments = command_line.parse_arguments(argv)
    try:
        run(arguments)
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except Exception as error:
        sentence = command_line.error_sentence(error)
        if sentence is None:
            raise
        print(f"generate.py: {sentence}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    import generate  # under its name, so that the extras that import it find this very module
    from extras import command_line

    warnings.formatwarning = lambda message, *_: f"generate.py: {message}\n"  # without the code
    linear.prefer_pytorch_gemv()
    command_line.prepare_streams()
    sys.exit(command_line.close_output(generate.main()))
