"""What `--prompt-lookup` gains: the cost of a pass of several tokens, and whole answers.

    .venv/bin/python -m benchmarks.prompt_lookup
    .venv/bin/python -m benchmarks.prompt_lookup --dtypes float32 --answers 2

Two layers of the 2B model's widths with random weights, and a head that is as much of the work as
in the whole model. Such a model repeats nothing, so the answers are scripted: each pass computes
all that it would compute, and then the logits of the next token of a text are raised. The tasks are
texts of this repository, tokenized with the published vocabulary:

* transcribe: the answer is the prompt once more.
* extract: it quotes passages of 24 tokens of the prompt, with eight other tokens between them.
* new text: it is what follows the prompt in its source, which repeats only what prose repeats.

A time is processor time of one thread, so that other work on the machine, which is neither waited
for nor counted, disturbs little; plain decoding and prompt lookup take turns. The prefill is left
out. Printed are medians of seconds, and ratios: above 1, prompt lookup takes less; and the mean
number of passes with it, which depends on the texts alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import linear
from benchmarks.checkpoint import CONFIG_2B, ROOT, VISION_2B, write_tokenizer
from generate import GenerationConfig, generate_steps
from preprocess import Batch
from prompt_lookup import DEFAULT_NUM_TOKENS
from qwen2vl import Config, KVCache, Qwen2VL, VisionConfig
from tokenizer import Tokenizer

LAYERS = 2
ROWS = (1, 2, 4, 6, 9)
DTYPES = ("float32", "bfloat16", "int8", "int4")
PROMPT = 320  # tokens
ANSWER = 96


class ScriptedModel(Qwen2VL):
    """A model that computes as any other, and then prefers the next token of a script."""

    script: list[int] = []  # noqa: RUF012  prompt and answer; empty: nothing is preferred
    passes = 0  # so far

    def forward(self, *arguments, cache: KVCache | None = None, **options) -> Tensor:
        """Return the logits [1, S, V] with those of the script raised."""
        logits = super().forward(*arguments, cache=cache, **options)
        self.passes += 1
        if not self.script:
            return logits
        first = cache.length - logits.shape[1] + 1  # index of the token that is predicted first
        for i, token in enumerate(self.script[first : cache.length + 1]):
            logits[0, i, token] += 1e4
        return logits


def build_model(dtype: str) -> ScriptedModel:
    """Return a model of random weights; dtype: of DTYPES, quantized ones in bfloat16."""
    share = LAYERS / CONFIG_2B["num_hidden_layers"]
    text = CONFIG_2B | {"num_hidden_layers": LAYERS}
    text["vocab_size"] = int(share * CONFIG_2B["vocab_size"])
    special = {"bos_token_id": None, "eos_token_id": [], "image_token_id": -1, "video_token_id": -2}
    config = Config(**text, **special, vision_config=VisionConfig(**VISION_2B | {"depth": 1}))
    torch.manual_seed(0)
    model = ScriptedModel(config).eval()
    if dtype == "float32":
        return model
    model = model.to(torch.bfloat16)
    model.tie_weights()
    if dtype != "bfloat16":
        linear.quantize_linears(model, dtype)
    return model


# ------------------------------------------------------------------------------- a pass of n tokens
def measure_passes(model: Qwen2VL, repetitions: int) -> dict[int, float]:
    """Return {tokens of a pass: seconds} behind a prompt of PROMPT tokens."""
    config = model.config
    cache = KVCache(config, 1, PROMPT + max(ROWS), dtype=model.model.norm.weight.dtype)
    ids = torch.randint(0, config.vocab_size, (1, PROMPT))
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    with torch.inference_mode():
        model(ids, cache=cache, logits_to_keep=1)
        for _ in range(repetitions):
            for rows in ROWS:
                start = time.process_time()
                model(ids[:, :rows], cache=cache)
                seconds[rows].append(time.process_time() - start)
                cache.set_length(PROMPT)
    return {rows: statistics.median(times) for rows, times in seconds.items()}


# ------------------------------------------------------------------------------------ whole answers
def read_tokens(name: str) -> list[int]:
    """Return a text of the repository in tokens of the published vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        tokenizer = Tokenizer.from_pretrained(folder)
    return tokenizer.encode((ROOT / name).read_text(encoding="utf-8"))


def dense_ids(ids: list[int]) -> list[int]:
    """Return the ids numbered in the order in which they first occur: the head here is smaller."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(id, len(numbers)) for id in ids]


def scripts(tokens: list[int], number: int) -> dict[str, tuple[list[int], list[int]]]:
    """Return {task: (prompt, answer)}, from another part of the text for each number."""
    start = number * (PROMPT + ANSWER)
    prompt = tokens[start : start + PROMPT]
    following = tokens[start + PROMPT : start + PROMPT + ANSWER]
    extract = []
    for i in range(ANSWER // 32):
        place = PROMPT - 60 - 70 * i
        extract += following[8 * i : 8 * i + 8] + prompt[place : place + 24]
    return {
        "transcribe": (prompt, prompt[:ANSWER]),
        "extract": (prompt, extract),
        "new text": (prompt, following),
    }


def decode_seconds(
    model: ScriptedModel, prompt: list[int], answer: list[int], num_tokens: int | None
) -> float:
    """Return the seconds from the first token of the answer to the last.

    Raises ValueError if the model answers anything but the script.
    """
    model.script = prompt + answer
    ids = np.array([prompt])
    batch = Batch(input_ids=ids, attention_mask=np.ones_like(ids))
    config = GenerationConfig(prompt_lookup_num_tokens=num_tokens)
    steps = generate_steps(model, batch, len(answer), config)
    tokens = next(steps).tokens
    start = time.process_time()
    for step in steps:
        tokens += step.tokens
    seconds = time.process_time() - start
    if tokens != answer:
        raise ValueError(f"expected the scripted answer {answer}, got {tokens}")
    return seconds


def measure_answers(model: ScriptedModel, tokens: list[int], answers: int) -> dict[str, list]:
    """Return {task: [(seconds of plain decoding, of prompt lookup, its passes)] of each answer}."""
    seconds: dict[str, list] = {}
    for number in range(answers):
        for task, (prompt, answer) in scripts(tokens, number).items():
            plain = decode_seconds(model, prompt, answer, None)
            before = model.passes
            lookup = decode_seconds(model, prompt, answer, DEFAULT_NUM_TOKENS)
            passes = model.passes - before - 1  # without the prefill
            seconds.setdefault(task, []).append((plain, lookup, passes))
    model.script = []
    return seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--answers", type=int, default=3, help="of each task (default: 3)")
    parser.add_argument("--repetitions", type=int, default=9, help="of each pass (default: 9)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    linear.prefer_pytorch_gemv()
    tokens = dense_ids(read_tokens("README.md"))
    for dtype in arguments.dtypes:
        model = build_model(dtype)
        passes = measure_passes(model, arguments.repetitions)
        print(f"{dtype}: a pass of one token {passes[1]:.4f} s; of more, times as long:", end="")
        print("".join(f" {n}: {seconds / passes[1]:.2f}" for n, seconds in passes.items() if n > 1))
        for task, results in measure_answers(model, tokens, arguments.answers).items():
            ratios = [plain / lookup for plain, lookup, _ in results]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            passes = statistics.mean(passes for _, _, passes in results)
            print(f"  {task}: {statistics.median(ratios):.2f}× ({spread}), ", end="")
            print(f"{passes:.1f} passes for {ANSWER - 1} tokens", flush=True)


if __name__ == "__main__":
    main()
