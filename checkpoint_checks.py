"""The files of a checkpoint held against each other, and a search for damaged weights.

What one file alone shows is checked where it is read (`config_fields.py`, `json_files.py`). The
processor and the model are compared in `Processor.check_model`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_files import first_few
from config_fields import field_problem
from json_files import read_optional_json
from qwen2vl import Config
from stored_tensors import naming, open_shard


# --------------------------------------------------------------------------------- number of layers
def check_stored_layers(folder: Path, config: Config, paths: list[Path]) -> None:
    """Raise ValueError naming config.json if it has more layers than the weight files.

    The files are asked for the names of their tensors alone, and before the model is built: that
    takes time for each layer.
    """
    names: list[str] = []
    for path in paths:
        shard = open_shard(path)
        with naming(path):
            names += shard.keys()
    layers = count_layers(names, "layers")
    blocks = count_layers(names, "blocks")
    path = folder / "config.json"
    if 0 < layers < config.num_hidden_layers:
        raise ValueError(
            f"{path}: num_hidden_layers: expected at most {layers}, as many as the weights have, "
            f"got {config.num_hidden_layers}"
        )
    if 0 < blocks < config.vision_config.depth:
        raise ValueError(
            f"{path}: vision_config.depth: expected at most {blocks}, as many as the weights have, "
            f"got {config.vision_config.depth}"
        )


def count_layers(names: Iterable[str], kind: str) -> int:
    """Return the number after the largest n in the names that contain "kind.n."."""
    count = 0
    for name in names:
        match = re.search(rf"\b{kind}\.(\d{{1,9}})\.", name)
        if match:
            count = max(count, int(match[1]) + 1)
    return count


# ---------------------------------------------------------------------------------------- token ids
def check_eos_token_ids(settings: dict, vocab_size: int, path: Path) -> None:
    """Raise ValueError naming the file of the settings if no answer would end with eos_token_id.

    A pad_token_id that no token has, such as -1, means none (`generate.pad_token_id`).
    """
    for name in ("eos_token_id", "pad_token_id"):
        problem = field_problem("int | list[int]", without_nulls(settings.get(name)))
        if problem is not None:
            raise ValueError(f"{path}: {name}: {problem}")
    value = settings.get("eos_token_id")
    ids = without_nulls(value)
    if any(not 0 <= id < vocab_size for id in (ids if isinstance(ids, list) else [ids])):
        raise ValueError(
            f"{path}: eos_token_id: expected ids of the vocabulary, 0 to {vocab_size - 1}, "
            f"got {reprlib.repr(value)}"
        )


def without_nulls(value: Any) -> Any:
    """Return a value, or a list without its nulls; null is an empty list."""
    if value is None:
        return []
    return [entry for entry in value if entry is not None] if isinstance(value, list) else value


def read_generation_config(folder: Path, vocab_size: int) -> dict:
    """Return the content of generation_config.json, empty where there is no such file.

    Raises OSError or ValueError that names the file. The settings of sampling are checked where
    they are used, as options may replace them (`generate.GenerationConfig`).
    """
    path = folder / "generation_config.json"
    settings = read_optional_json(path)
    check_eos_token_ids(settings, vocab_size, path)
    return settings


# ------------------------------------------------------------------------------------------ weights
def check_weights_finite(folder: Path, weights: dict[str, Tensor]) -> None:
    """Raise ValueError with the first few tensors that hold NaN or infinity, or zeros alone.

    weights: by name, in the dtype in which they are used, so that also a float32 number counts
    that is infinite in float16. Matrices of zeros are what a download leaves that broke off;
    vectors of zeros (a bias) are common.
    """
    problems = []
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # One pass without a copy; NaN if one of the numbers is NaN.
        bounds = torch.stack(tensor.aminmax())
        if bounds.isnan().any():
            problems.append(f"{name} holds NaN")
        elif bounds.isinf().any():
            dtype = str(tensor.dtype).removeprefix("torch.")
            problems.append(f"{name} holds infinity in {dtype}")
        elif tensor.ndim > 1 and not bounds.any():
            problems.append(f"{name} holds nothing but zeros")
    if problems:
        raise ValueError(
            f"{len(problems)} of {len(weights)} tensors in {folder} are damaged: "
            f"{first_few(problems)}"
        )
