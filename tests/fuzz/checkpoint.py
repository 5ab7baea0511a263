"""A small checkpoint with random weights, of which targets damage a file, and a question to it."""

import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Collection
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import command_line
from generate import GenerationConfig, generate_steps, new_token_limits
from load_weights import save_model
from memory import MemoryShortageError
from qwen2vl import Config, Qwen2VL, VisionConfig

NAME = "fuzzed-checkpoint"  # of its directory: every refusal names it
INDEX = "model.safetensors.index.json"
NEW_TOKENS = 3


def small_config() -> Config:
    """Return the shapes of the smallest model that fits the bundled tokenizer."""
    vision_config = VisionConfig(depth=1, embed_dim=16, num_heads=2, hidden_size=16)
    bundled = json.loads((command_line.BUNDLED_CHECKPOINT / "config.json").read_text())
    ids = {name: value for name, value in bundled.items() if name.endswith("_token_id")}
    return Config(
        vocab_size=bundled["vocab_size"],
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
        tie_word_embeddings=True,
        vision_config=vision_config,
        **ids,
    )


@cache
def base_directory() -> Path:
    """Return a directory with the undamaged files, the same in each process."""
    directory = Path(tempfile.mkdtemp(prefix="fuzz-")) / "base"
    skipped = shutil.ignore_patterns("*.safetensors", "config.json")
    shutil.copytree(command_line.BUNDLED_CHECKPOINT, directory, ignore=skipped)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_model(Qwen2VL(small_config()), directory)
    Image.new("RGB", (56, 56), "red").save(directory.parent / "image.png")
    return directory


@cache
def base_weights() -> dict[str, torch.Tensor]:
    """Return the undamaged tensors."""
    return load_file(base_directory() / "model.safetensors")


def write_shards(directory: Path) -> dict[str, str]:
    """Write the weights in two files, and return the file of each tensor."""
    names = list(base_weights())
    files = {}
    for number in (1, 2):
        file = f"model-{number:05}-of-00002.safetensors"
        shard = {name: base_weights()[name] for name in names[number - 1 :: 2]}
        if not (directory / file).exists():
            save_file(shard, directory / file)
        files |= dict.fromkeys(shard, file)
    return files


def damaged_directory(files: dict[str, bytes], omitted: Collection[str] = ()) -> Path:
    """Return a directory with these files, and links to the undamaged ones of other names."""
    base = base_directory()
    directory = base.parent / NAME
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for path in base.iterdir():
        if path.name not in files and path.name not in omitted:
            os.symlink(path, directory / path.name)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def ask(directory: Path) -> list[torch.Tensor]:
    """Answer a short question about an image as the programs do; return the logits of each step.

    Raises AssertionError for an answer that is chosen from logits that are not finite.
    """
    arguments = options(directory)
    try:
        session = command_line.open_session(arguments)
    except MemoryShortageError as error:  # sizes that are valid, and too large for this machine
        raise ValueError(f"{directory}, config.json: {error}") from error
    config = GenerationConfig.from_model(session.model)
    new_token_limits(session.model, session.batch, None)  # checks what the checkpoint recommends
    decode = session.processor.tokenizer.decode
    logits = []
    try:
        for step in generate_steps(session.model, session.batch, NEW_TOKENS, config):
            assert step.logits.isfinite().all()
            assert isinstance(decode(step.tokens), str)
            logits.append(step.logits)
    except ValueError as error:  # what is wrong are the numbers of all files together
        raise ValueError(f"{directory}, config.json: {error}") from error
    return logits


def options(directory: Path) -> Namespace:
    """Return the options of a program."""
    image = directory.parent / "image.png"
    parser = command_line.build_parser("")
    argv = ["--model", str(directory), "--image", str(image), "--prompt", "How many circles?"]
    return command_line.parse_arguments(parser, [*argv, "--device", "cpu", "--quiet"])
