"""Every JSON file of a checkpoint: bytes, values, types, ranges and structure.

A mutant is the name of a file, a line feed and its content.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from random import Random
from typing import Any

from preprocess import ImageConfig
from qwen2vl import Config, VisionConfig
from tests.fuzz import checkpoint
from tests.fuzz.frame import Target
from tests.fuzz.mutations import mutate_bytes

# What stands in for a value: other types, the ends of ranges, and values beyond them.
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 0.0, -0.0, 0.5, 1.5, -2.5, 1e-30, 1e30]
VALUES += [2**31 - 1, 2**31, -(2**31), 2**32, 2**63, 2**64, 10**9, 10**30, 1e308, -1e308]
VALUES += [float("nan"), float("inf"), float("-inf"), "", "x", "1", "NaN", "\0", "\ud800", "𝔸" * 50]
VALUES += [[], {}, [[]], [None], [0], [1, 2], ["a"], {"a": 1}, {"": None}, [1e400], "<|im_end|>"]
VALUES += ["float16", "bfloat16", "float64", "auto", "linear", "yarn", "dynamic", "longrope"]
VALUES += ["BPE", "Unigram", "WordLevel", "NFC", "NFKC", "ByteLevel", "Sequence", "Split", "gelu"]
VALUES += ["(" * 20, "(a+)+$", "{{", "{{ messages }}", "{% for x in range(9) %}"]
NAMES = [field.name for kind in (Config, VisionConfig, ImageConfig) for field in fields(kind)]
NAMES += ["text_config", "rope_parameters", "size", "layer_types", "torch_dtype", "chat_template"]
NAMES += ["max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "factor"]
NAMES += ["repetition_penalty", "rope_type", "model_type", "architectures", "weight_map", "vocab"]
NAMES += ["added_tokens", "merges", "pad_token", "eos_token", "truncation", "padding", "normalizer"]
NAMES += ["post_processor", "additional_special_tokens", "byte_fallback", "ignore_merges"]


def seeds() -> list[bytes]:
    """Return every JSON file that a checkpoint may hold; the frequent ones several times."""
    base = checkpoint.base_directory()
    names = ["config.json", "generation_config.json", "preprocessor_config.json"]
    names += ["tokenizer.json", "tokenizer_config.json"]
    files = [f"{name}\n".encode() + (base / name).read_bytes() for name in names]
    config = json.loads((base / "config.json").read_text())
    nested = {"text_config": config, "model_type": "qwen2_vl", "tie_word_embeddings": True}
    for name in ("vision_config", "image_token_id", "video_token_id", "vision_start_token_id"):
        nested[name] = config.pop(name)
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    config["rope_parameters"] = rope
    del config["rope_scaling"]
    size = {"shortest_edge": 3136, "longest_edge": 12544}
    weight_map = checkpoint.write_shards(base)
    extra = {
        "config.json": nested,
        "processor_config.json": {"image_processor": {"patch_size": 14, "size": size}},
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": {"content": "<|x|>"}},
        "added_tokens.json": {"<|x|>": 545},
        "chat_template.json": {"chat_template": "{{ messages[0].content[0].type }} <|image_pad|>"},
        checkpoint.INDEX: {"metadata": {"total_size": 1}, "weight_map": weight_map},
    }
    files += [f"{name}\n{json.dumps(content)}".encode() for name, content in extra.items()]
    return files


def mutate(random: Random, files: list[bytes]) -> bytes:
    """Return a file that is damaged as bytes or, more often, as JSON."""
    name, _, content = random.choice(files).partition(b"\n")
    if random.random() < 0.3:
        return name + b"\n" + mutate_bytes(random, [content])
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 1, 2, 4))):
        mutate_value(random, value)
    return name + b"\n" + dump(value)


def dump(value: dict) -> bytes:
    """Return the JSON text of a value; brackets where it is nested too deeply for that."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b'{"a": ' + b"[" * 2000 + b"]" * 2000 + b"}"


def containers(value: Any) -> list[Any]:
    """Return the objects and lists in a JSON value that are not empty, with itself.

    Without recursion, as earlier mutations may have nested it deeply.
    """
    reached = [value]
    for container in reached:
        children = container.values() if isinstance(container, dict) else container
        reached += [child for child in children if isinstance(child, dict | list)]
    return [container for container in reached if container]


def mutate_value(random: Random, value: dict) -> None:
    """Damage one entry somewhere in a JSON value."""
    choices = containers(value)
    if not choices:
        value["x"] = random.choice(VALUES)
        return
    container = random.choice(choices[:40] if random.random() < 0.8 else choices)
    keys = list(container) if isinstance(container, dict) else range(len(container))
    mutation = random.choice((replace, replace, nudge, nudge, remove, add, exchange, nest))
    mutation(random, container, random.choice(keys))


def replace(random: Random, container: Any, key: Any) -> None:
    """Put any value in the place of one."""
    container[key] = random.choice(VALUES)


def nudge(random: Random, container: Any, key: Any) -> None:
    """Change a number a little, or a string; other values get any value."""
    value = container[key]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        container[key] = random.choice(VALUES)
    elif isinstance(value, str):
        container[key] = random.choice((value + "x", value[1:], value.upper(), value * 2))
    else:
        changes: list[Callable] = [lambda x: x + 1, lambda x: x - 1, lambda x: x * 2]
        changes += [lambda x: x // 2, lambda x: -x, float, str, lambda x: x * 1000]
        container[key] = random.choice(changes)(value)


def remove(_random: Random, container: Any, key: Any) -> None:
    """Remove an entry."""
    del container[key]


def add(random: Random, container: Any, key: Any) -> None:
    """Add an entry: one of a known name, or the same one once more."""
    if isinstance(container, list):
        container.insert(key, random.choice((container[key], random.choice(VALUES))))
    else:
        container[random.choice(NAMES)] = random.choice((container[key], random.choice(VALUES)))


def exchange(random: Random, container: Any, key: Any) -> None:
    """Exchange two entries."""
    other = random.choice(list(container) if isinstance(container, dict) else range(len(container)))
    value = container[key]
    container[key] = container[other]
    container[other] = value


def nest(random: Random, container: Any, key: Any) -> None:
    """Put a value into lists or objects, a few or very many."""
    for _ in range(random.choice((1, 2, 300))):
        container[key] = random.choice(([container[key]], {"a": container[key]}))


def run(data: bytes) -> None:
    """Answer a question with the checkpoint in which one file is replaced."""
    name, _, content = data.partition(b"\n")
    omitted = ("model.safetensors",) if name.decode() == checkpoint.INDEX else ()
    checkpoint.ask(checkpoint.damaged_directory({name.decode(): content}, omitted))


# A file or a directory is named; "generation_config.json" alone where an option replaces the value.
TARGET = Target(seeds, run, ".json", mutate, seconds=10.0, quick_count=300)
