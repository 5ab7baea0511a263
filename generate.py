"""Logits → tokens → text: sampling, the generation loop, and the command line for one question.

    python generate.py --image examples/shapes.png --prompt "How many shapes are there?"

A prompt goes through the model once (`prefill`), which fills the KV cache and gives the logits
of the first token; then each token goes through alone (`decode_step`), reading what the cache
holds of all tokens before it.

Shapes: B batch size, S tokens of the longest prompt, K all tokens so far, V vocabulary.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import itertools
import logging
import math
import reprlib
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import command_line
import cuda_graph
from config_fields import (
    Count,
    Positive,
    Probability,
    Share,
    Size,
    Texts,
    check_field,
    check_fields,
    is_integer,
    new_token_limit,
)
from debug_nan import NotFiniteError
from preprocess import Batch
from prompt_lookup import PromptLookup
from qwen2vl import Config, KVCache, Qwen2VL, at_least_float32
from tokenizer import StreamDecoder, Tokenizer

logger = logging.getLogger("qwen2vl")

Seed = int  # of 63 bits

MAX_LENGTH = 2**62  # of a sequence, where a scaled RoPE has a factor that is very large
INITIAL_CAPACITY = 1024  # new tokens that a cache has memory for at first; it grows as needed

# Fields that only sampling uses, in the order in which they change the probabilities.
SAMPLING_FIELDS = ("temperature", "top_k", "top_p", "min_p")


# ----------------------------------------------------------------------------------------- sampling
@dataclass
class GenerationConfig:
    """How the next token is chosen: the fields of generation_config.json, neutral by default.

    Raises ValueError for a value out of its range.
    """

    do_sample: bool = False  # False: always the most probable token
    temperature: Positive = 1.0  # divides the logits: below 1 sharper, above 1 flatter
    top_k: Count = 0  # keep only the k most probable tokens; 0 keeps all
    top_p: Share = 1.0  # keep the most probable tokens that together reach this probability
    repetition_penalty: Positive = 1.0  # above 1: tokens of prompt and answer become less probable
    # Of the first sequence, counting up for the next ones; a list: of each; None: random.
    seed: Seed | list[Seed] | None = None
    # Keep tokens of at least so much of the most probable one's probability; 0 keeps all.
    min_p: Probability = 0.0
    # An answer ends before any of these, see `StreamDecoder`.
    stop_strings: Texts = field(default_factory=list)
    # For one sequence: guess up to so many tokens from those before, see prompt_lookup.py.
    prompt_lookup_num_tokens: Size | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str):
            self.stop_strings = [self.stop_strings]
        elif isinstance(self.stop_strings, tuple):
            self.stop_strings = list(self.stop_strings)
        check_fields(self)
        seeds = self.seed if isinstance(self.seed, list) else [self.seed]
        for seed in seeds:
            if seed is not None and not 0 <= seed < 2**63:
                raise ValueError(f"seed is {seed}, expected 0 to 2**63 - 1")

    @classmethod
    def from_model(cls, model: Qwen2VL, **options: Any) -> GenerationConfig:
        """Return the settings of the model's generation_config.json, replaced by `options`.

        Only what is used is checked: without do_sample, SAMPLING_FIELDS of the file are ignored.
        Raises ValueError that names the field and the option that replaces it.
        """
        recommended = model.generation_config
        do_sample = options.get("do_sample", recommended.get("do_sample"))
        if do_sample is None:
            do_sample = False
        cls.check_recommended("do_sample", do_sample)
        used = ["repetition_penalty", "stop_strings"]
        if do_sample:
            used += SAMPLING_FIELDS
        values: dict[str, Any] = {"do_sample": do_sample}
        for name in used:
            value = recommended.get(name)
            if name in options or value is None:
                continue
            if name == "stop_strings" and isinstance(value, str):
                value = [value]
            cls.check_recommended(name, value)
            values[name] = value
        return cls(**(values | options))

    @classmethod
    def check_recommended(cls, name: str, value: object) -> None:
        """Raise ValueError for a value of generation_config.json; it names what replaces it."""
        options = {"do_sample": "temperature", "stop_strings": "stop"}
        option = options.get(name, name.replace("_", "-"))
        try:
            check_field(cls, name, value)
        except ValueError as error:
            raise ValueError(f"generation_config.json: {error}; --{option} replaces it") from error


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lower the logits [B, V] of the tokens marked in seen, bool [B, V].

    Positive ones are divided by the penalty, negative ones multiplied.
    Source: CTRL, arXiv 1909.05858 §4.1.
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def next_token_probabilities(logits: Tensor, config: GenerationConfig) -> Tensor:
    """Return the probabilities [B, V] that tokens are drawn with, from logits [B, V].

    Temperature comes first, then top-k, then top-p, then min-p.
    Source: the order of transformers 5.23.0, `GenerationMixin._get_logits_processor`;
    top-p arXiv 1904.09751, min-p arXiv 2407.01082.
    """
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        weakest = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if config.top_p < 1:
        ascending, order = logits.sort(dim=-1)
        # From the least probable token upwards, drop what the more probable ones can do without.
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - config.top_p
        dropped[:, -1] = False  # the most probable one always stays
        logits = logits.masked_fill(dropped.scatter(1, order, dropped), float("-inf"))
    if config.min_p > 0:
        probabilities = logits.softmax(-1)
        least = config.min_p * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, float("-inf"))
    return logits.softmax(-1)


def sample(
    logits: Tensor,
    seen: Tensor | None,
    config: GenerationConfig,
    generators: list[torch.Generator],
) -> Tensor:
    """Return the next token of each sequence, int64 [B], from logits [B, V]."""
    logits = at_least_float32(logits)
    if seen is not None:
        logits = apply_repetition_penalty(logits, seen, config.repetition_penalty)
    if not config.do_sample or config.top_k == 1:
        return logits.argmax(-1)
    probabilities = next_token_probabilities(logits, config)
    probabilities = probabilities.cpu()  # drawn there, so that a seed means the same on each device
    if not probabilities.isfinite().all():
        raise NotFiniteError(
            f"the probabilities are not finite: temperature {config.temperature} or "
            f"repetition_penalty {config.repetition_penalty} is too far from 1"
        )
    tokens = []
    for row, generator in zip(probabilities, generators, strict=True):
        tokens.append(torch.multinomial(row, 1, generator=generator))
    return torch.cat(tokens).to(logits.device)


class Sampler:
    """Choose the next token of each sequence.

    Owns the random generators and the tokens that count as repeated.
    """

    def __init__(self, config: GenerationConfig, ids: Tensor, mask: Tensor | None, vocab_size: int):
        """Seed a generator for each sequence, and mark the tokens of the prompts.

        ids: int64 [B, S]; mask [B, S]: 0 for padding, which does not count; None: no padding.
        """
        self.config = config
        self.seen: Tensor | None = None  # bool [B, V], only for a repetition penalty
        if config.repetition_penalty != 1:
            real = torch.ones_like(ids) if mask is None else mask
            rows, columns = real.nonzero(as_tuple=True)
            self.seen = torch.zeros(len(ids), vocab_size, dtype=torch.bool, device=ids.device)
            self.seen[rows, ids[rows, columns]] = True
        self.generators = [torch.Generator() for _ in range(len(ids))]
        for row, generator in enumerate(self.generators):
            if config.seed is None:
                generator.seed()
            elif isinstance(config.seed, list):
                generator.manual_seed(config.seed[row])
            else:
                generator.manual_seed(config.seed + row)

    def __call__(self, logits: Tensor) -> list[int]:
        """Return the next token of each of B sequences from logits [B, V]."""
        tokens = sample(logits, self.seen, self.config, self.generators)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens.tolist()


# ----------------------------------------------------------------------------- where an answer ends
def as_ids(name: str, value: object) -> list[int]:
    """Return the token ids of a field: an int, a list of ints or null; else raise ValueError."""
    values = value if isinstance(value, list) else [value]
    ids = []
    for id in values:
        if id is None:
            continue
        if not is_integer(id):
            raise ValueError(
                f"generation_config.json: {name}: expected token ids, got {reprlib.repr(value)}"
            )
        ids.append(id)
    return ids


def token_ids(model: Qwen2VL, name: str) -> list[int]:
    """Return the ids of eos_token_id or pad_token_id in generation_config.json or config.json."""
    value = model.generation_config.get(name)
    if value is None:
        value = getattr(model.config, name)
    return as_ids(name, value)


def eos_token_ids(model: Qwen2VL) -> set[int]:
    """Return the ids that end an answer, those of `eos_token_id`."""
    return set(token_ids(model, "eos_token_id"))


def pad_token_id(model: Qwen2VL) -> int:
    """Return the id that fills sequences that have ended: an end id where none is usable."""
    candidates = [*token_ids(model, "pad_token_id"), *sorted(eos_token_ids(model)), 0]
    return next(id for id in candidates if 0 <= id < model.config.vocab_size)


def new_token_limits(model: Qwen2VL, batch: Batch, max_new_tokens: int | None) -> list[int]:
    """Return `new_token_limit` of each sequence, without counting its padding."""
    lengths = batch.attention_mask.sum(1).tolist()
    return [new_token_limit(model.generation_config, n, max_new_tokens) for n in lengths]


def stop_decoders(
    stop_strings: list[str], tokenizer: Tokenizer | None, batch_size: int
) -> list[StreamDecoder]:
    """Return what finds the stop strings in each of B sequences; [] where there are none.

    Raises ValueError without the tokenizer.
    """
    if not stop_strings:
        return []
    if tokenizer is None:
        raise ValueError(
            f"stop_strings {stop_strings} need a tokenizer: expected processor.tokenizer, got None"
        )
    return [StreamDecoder(tokenizer, stop_strings=stop_strings) for _ in range(batch_size)]


class Progress:
    """Which of B sequences still run.

    A sequence ends with an eos id, with a stop string, or at its number of tokens.
    """

    def __init__(self, model: Qwen2VL, limits: list[int], decoders: list[StreamDecoder]):
        """decoders: those of `stop_decoders`."""
        self.eos_token_ids = eos_token_ids(model)
        self.pad_token_id = pad_token_id(model)
        self.limits = limits
        self.decoders = decoders
        self.count = 0  # of new tokens so far
        self.running = set(range(len(limits)))

    def advance(self, chosen: list[int]) -> list[int]:
        """Return the tokens of this step: those chosen, or the pad id after the end."""
        self.count += 1
        tokens = [self.pad_token_id] * len(chosen)
        for row in sorted(self.running):
            tokens[row] = chosen[row]
            if self.ends(row, chosen[row]):
                self.running.remove(row)
        return tokens

    def ends(self, row: int, token: int) -> bool:
        """Return whether this token is the last one of a sequence."""
        if token in self.eos_token_ids or self.count == self.limits[row]:
            return True
        if not self.decoders:
            return False
        self.decoders[row].push(token)
        return self.decoders[row].stopped


# --------------------------------------------------------------------------------------- generation
class Step(NamedTuple):
    """What one step of the generation gives."""

    tokens: list[int]  # the next token of each of B sequences; the pad id after the end
    logits: Tensor  # [B, V], in the model's dtype, that they were chosen from


def prefill(model: Qwen2VL, batch: Batch, cache: KVCache) -> Tensor:
    """Run the prompts, from token cache.length on, through the model.

    Return the logits [B, V] after them.
    """
    inputs = {}
    for name, array in batch.arrays().items():
        inputs[name] = torch.as_tensor(array, device=cache.keys.device)
    if inputs["attention_mask"].all():
        del inputs["attention_mask"]  # without padding none is needed: the fastest attention
    inputs["input_ids"] = inputs["input_ids"][:, cache.length :]
    return model(cache=cache, logits_to_keep=1, **inputs)[:, -1]


def decode_step(model: Qwen2VL, tokens: list[int], cache: KVCache, mask: Tensor | None) -> Tensor:
    """Run one token of each sequence, and return the logits [B, V] after it.

    mask [B, S]: 0 for the padding of the prompts; None: there is none. The images are in the cache.
    """
    ids = torch.tensor(tokens, device=cache.keys.device)[:, None]  # [B, 1]
    if mask is not None:
        mask = F.pad(mask, (0, cache.length + 1 - mask.shape[1]), value=1)  # [B, K]
    return model(ids, attention_mask=mask, cache=cache, logits_to_keep=1)[:, -1]


@torch.inference_mode()
def generate_steps(
    model: Qwen2VL,
    batch: Batch,
    max_new_tokens: int | None = None,
    config: GenerationConfig | None = None,
    cache: KVCache | None = None,
    decode: Callable[..., Tensor] = decode_step,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Step]:
    """Yield the next token of each sequence, and the logits it was chosen from, when it is made.

    Ends when every sequence has ended: with any of `eos_token_ids` or with the token that completes
    a stop string, which are yielded too, or at its number of tokens. After its end a sequence is
    filled with the pad id.
    max_new_tokens and config: by default those of generation_config.json.
    cache: of an earlier turn; batch then holds all tokens, but only the images of the new ones.
    decode: the decode step, such as a captured one (`cuda_graph.CapturedDecodeStep`).
    tokenizer: needed for `stop_strings`. The text is cut in decoding, by `Tokenizer.decode` or
    `StreamDecoder` with the same stop strings.
    Raises NotFiniteError instead of choosing among logits that are not numbers.
    """
    if config is None:
        config = GenerationConfig.from_model(model)
    limits = new_token_limits(model, batch, max_new_tokens)
    decoders = stop_decoders(config.stop_strings, tokenizer, len(limits))
    device = model.model.norm.weight.device
    ids = torch.as_tensor(batch.input_ids, device=device)
    attention_mask = torch.as_tensor(batch.attention_mask, device=device)
    mask = None if attention_mask.all() else attention_mask
    if cache is None:
        batch_size, length = ids.shape
        cache = new_cache(model, batch_size, length, max(limits))
    if config.prompt_lookup_num_tokens is not None and len(limits) == 1:
        prompt = ids[0].tolist()
        num_tokens = config.prompt_lookup_num_tokens
        decode = PromptLookup(model, prompt, num_tokens, eos_token_ids(model), decode)
    sampler = Sampler(config, ids, mask, model.config.vocab_size)
    progress = Progress(model, limits, decoders)

    start = int(cache.next_position.max())
    logits = prefill(model, batch, cache)
    prompt_end = int(cache.next_position.max())
    warn_beyond_training(model, start, prompt_end)
    for position in itertools.count(prompt_end):
        check_finite(logits, progress.running)
        tokens = progress.advance(sampler(logits))
        yield Step(tokens, logits)
        if not progress.running:
            return
        logits = decode(model, tokens, cache, mask)
        warn_beyond_training(model, position, position + 1)


def stream(
    model: Qwen2VL,
    batch: Batch,
    max_new_tokens: int | None = None,
    config: GenerationConfig | None = None,
    cache: KVCache | None = None,
    decode: Callable[..., Tensor] = decode_step,
    tokenizer: Tokenizer | None = None,
) -> Iterator[list[int]]:
    """Yield the next token id of each sequence as a list [B]: the tokens of `generate_steps`."""
    for step in generate_steps(model, batch, max_new_tokens, config, cache, decode, tokenizer):
        yield step.tokens


def generate(
    model: Qwen2VL,
    batch: Batch,
    max_new_tokens: int | None = None,
    config: GenerationConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[list[int]]:
    """Return the new token ids of each sequence, all of one length, as `stream` yields them."""
    steps = stream(model, batch, max_new_tokens, config, tokenizer=tokenizer)
    return [list(sequence) for sequence in zip(*steps, strict=True)]


def new_cache(model: Qwen2VL, batch_size: int, length: int, new_tokens: int) -> KVCache:
    """Return a cache for prompts of `length` tokens and their answers.

    At first it has memory for INITIAL_CAPACITY new tokens.
    """
    weight = model.model.norm.weight
    capacity = length + min(new_tokens, INITIAL_CAPACITY)
    return KVCache(
        model.config, batch_size, length + new_tokens, weight.device, weight.dtype, capacity
    )


def check_finite(logits: Tensor, rows: set[int]) -> None:
    """Raise NotFiniteError if the logits [B, V] of one of the rows hold NaN or infinity.

    Raises ValueError if they are all equal: then the first token of the vocabulary, "!", would win
    each time. Weights of zeros, which a download that broke off may leave, compute such logits.
    """
    least, greatest = logits.aminmax(dim=-1)  # NaN where one of the logits is NaN
    bounds = torch.stack((least, greatest), dim=-1).tolist()  # [B, 2]
    if all(math.isfinite(bound) for row in rows for bound in bounds[row]):
        if logits.shape[-1] > 1 and any(bounds[row][0] == bounds[row][1] for row in rows):
            raise ValueError(
                "the scores of all tokens are equal: the weights are damaged; --check-weights "
                "names them"
            )
        return
    dtype = str(logits.dtype).removeprefix("torch.")
    advice = "the weights or the inputs are damaged, --check-weights tests the weights"
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
    if config.rope_type == "default" or factor is None:
        return length
    return max(length, int(min(original * factor, MAX_LENGTH)))


def warn_beyond_training(model: Qwen2VL, before: int, after: int) -> None:
    """Warn when the number of positions passes the trained length between `before` and `after`."""
    trained = trained_length(model.config)
    if before <= trained < after:
        warnings.warn(
            f"the conversation has reached {after:,} positions, but the model is trained for "
            f"{trained:,} (max_position_embeddings): the answer may be wrong",
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------- command line
MOVED_OPTIONS = {  # options that have become programs of their own
    "--chat": "python -m apps.chat",
    "--batch": "python -m apps.batch QUESTIONS --out ANSWERS",
    "--dry-run": "python -m apps.estimate",
    "--draw": "python -m apps.grounding --out FILE",
    "--logprobs": "python -m apps.logprobs",
    "--explain": "python -m apps.trace",
    "--report": "python -m apps.attention_report --out HTML",
}


class MovedOption(argparse.Action):
    """End with one sentence that names the program which an option has become."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        option = self.option_strings[0]
        parser.error(f"{option} is now a program: {MOVED_OPTIONS[option]}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = command_line.build_parser(
        "Answer a question about images and videos with Qwen2-VL. "
        "The answer goes to stdout, all else to stderr."
    )
    command_line.add_cuda_graph_option(parser)
    command_line.add_prompt_lookup_option(parser)
    for option in MOVED_OPTIONS:
        parser.add_argument(option, nargs="?", action=MovedOption, help=argparse.SUPPRESS)
    arguments = command_line.parse_arguments(parser, argv)
    command_line.check_cuda_graph_option(parser, arguments)
    return arguments


def choose_generation_config(arguments: argparse.Namespace, model: Qwen2VL) -> GenerationConfig:
    """Return the model's recommended settings with what the command line replaces of them."""
    options = command_line.sampling_options(arguments)
    config = GenerationConfig.from_model(model, **options)
    if not config.do_sample:
        return config
    values = [f"temperature {config.temperature}", f"top_k {config.top_k}"]
    values += [f"top_p {config.top_p}", f"min_p {config.min_p}"]
    values.append(f"repetition_penalty {config.repetition_penalty}")
    if config.seed is not None:
        values.append(f"seed {config.seed}")
    logger.info("sampling: %s", ", ".join(values))
    if config.top_k == 1 and options.keys() & {"temperature", "top_p", "min_p", "seed"}:
        logger.info(
            "note: top_k is 1 in the model's generation_config.json, which leaves one choice; "
            "add --top-k 0"
        )
    return config


def choose_decode_step(arguments: argparse.Namespace, model: Qwen2VL) -> Callable[..., Tensor]:
    """Return `decode_step`, or with --cuda-graph its captured form."""
    if arguments.cuda_graph:
        return cuda_graph.CapturedDecodeStep(model, decode_step)
    return decode_step


def answer_question(arguments: argparse.Namespace) -> None:
    """Stream the answer to one question to stdout.

    Raises OSError or ValueError with one sentence.
    """
    GenerationConfig(**command_line.sampling_options(arguments))  # checked before anything is read
    session = command_line.open_session(arguments)
    model = session.model
    config = choose_generation_config(arguments, model)
    decode = choose_decode_step(arguments, model)
    tokenizer = session.processor.tokenizer
    decoder = StreamDecoder(tokenizer, stop_strings=config.stop_strings)
    times = [time.perf_counter() - session.seconds]
    steps = stream(
        model, session.batch, arguments.max_new_tokens, config, decode=decode, tokenizer=tokenizer
    )
    for (token,) in steps:
        times.append(time.perf_counter())
        command_line.put(decoder.push(token))
    command_line.put(decoder.finish(), end="\n")
    logger.info(command_line.describe_answer(model, session.batch.input_ids.shape[1], times))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("generate.py", answer_question, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("generate.py", main)
