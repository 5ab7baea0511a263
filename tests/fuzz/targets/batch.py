"""Files of questions for apps.batch: bytes, values, types, layouts and structure of their lines.

Every line that is not blank gets one record, with an answer or with one sentence.
"""

import base64
import json
import logging
import tempfile
from functools import lru_cache
from pathlib import Path
from random import Random

import torch

from apps.batch import Answerer, answer_file
from command_line import BUNDLED_CHECKPOINT
from generate import GenerationConfig
from load_weights import load_model
from preprocess import Processor
from tests.fuzz.frame import Target
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.targets.images import draw, save

VALUES = [
    None,
    True,
    0,
    1,
    -1,
    1.5,
    1e308,
    float("nan"),
    10**30,
    10**400,
    2**63,
    "",
    "x",
    "\0",
    "\ud800",
]
VALUES += [[], {}, [[]], [None], {"": None}, "<image>", "<video>", "<|image_pad|>", "<|im_end|>"]
VALUES += ["gone.png", "file:///gone.png", "data:,", "data:image/png;base64,AAAA", ".", "/dev/null"]
VALUES += ["user", "assistant", "system", "tool", "image", "video", "image_url", "text"]
NAMES = ["messages", "conversations", "images", "videos", "image", "video", "id", "role", "content"]
NAMES += ["from", "value", "type", "text", "image_url", "url", "fps", "nframes", "min_pixels"]
NAMES += ["max_pixels", "resized_height", "video_start", "system", "tools", "query", "response"]


def seeds() -> list[bytes]:
    """Return a line of each layout that `conversations.py` reads."""
    url = "data:image/png;base64," + base64.b64encode(save(draw(28, 28), "PNG")).decode()
    text = {"type": "text", "text": "What?"}
    image = {"type": "image", "image": url}
    openai = {"type": "image_url", "image_url": {"url": url}}
    answer = {"role": "assistant", "content": "A."}
    lines = [
        [{"role": "user", "content": "How many?"}],
        {"id": 1, "messages": [{"role": "user", "content": [image, text]}, answer]},
        {"messages": [{"role": "user", "content": [openai, text]}], "id": "a"},
        {"messages": [{"role": "user", "content": "<image>What?"}], "images": [url]},
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}], "image": url},
        [{"role": "user", "content": "What?", "images": [url.split(",")[1]]}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [text]}],
        [{"role": "user", "content": [{"type": "video", "video": [url] * 2, "fps": 2.0}, text]}],
    ]
    encoded = [json.dumps(line).encode() for line in lines]
    return [*encoded, b"\n".join(encoded[:3]) + b"\n\n"]


def mutate(random: Random, inputs: list[bytes]) -> bytes:
    """Return damaged bytes, or lines with a damaged structure."""
    if random.random() < 0.4:
        return mutate_bytes(random, inputs)
    content = json.loads(random.choice(inputs[:-1]))
    for _ in range(random.choice((1, 1, 2, 4))):
        damage(random, content)
    line = json.dumps(content, ensure_ascii=random.random() < 0.9)
    return line.encode("utf-8", "surrogatepass") + b"\n" + inputs[0]


def damage(random: Random, content: list | dict) -> None:
    """Replace, remove, add or nest one value anywhere in a list or dict."""
    while True:
        keys = [*content] if isinstance(content, dict) else [*range(len(content))]
        if not keys:
            return
        key = random.choice(keys)
        if not isinstance(content[key], list | dict) or random.random() < 0.3:
            break
        content = content[key]
    action = random.randrange(5)
    if action == 0:
        del content[key]
    elif action == 1 and isinstance(content, dict):
        content[random.choice(NAMES)] = content.pop(key)
    elif action == 2 and isinstance(content, dict):
        content[random.choice(NAMES)] = random.choice(VALUES)
    elif action == 3:
        content[key] = random.choice(([content[key]] * 2, {random.choice(NAMES): content[key]}))
    else:
        content[key] = random.choice(VALUES)


@lru_cache
def answerer() -> Answerer:
    """Return what answers with three tokens at most."""
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
    return Answerer(model, processor, GenerationConfig(), max_new_tokens=3)


def run(data: bytes) -> None:
    """Answer the file, and check its records."""
    if b"http" in data.lower():  # nobody but this machine is asked
        return
    logging.getLogger("qwen2vl").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "questions.jsonl"
        out = Path(folder) / "answers.jsonl"
        path.write_bytes(data)
        answer_file(answerer(), str(path), str(out), {}, batch_size=4)
        records = [json.loads(line) for line in out.read_bytes().splitlines()]
    numbers = [n for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    assert [record["line"] for record in records] == numbers
    for record in records:
        if "error" not in record:
            assert 1 <= record["tokens_out"] <= 3
            continue
        error = record["error"]
        assert "\n" not in error, error
        foreign = error.startswith("the line cannot be used") and "RecursionError" not in error
        assert not foreign, error


TARGET = Target(seeds, run, mentions="questions.jsonl", mutate=mutate, quick_count=150)
