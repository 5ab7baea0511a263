"""LoRA adapters → what becomes of each parameter of the base model.

    base, folders = find_adapters("path/to/adapter", [])   # its base model, and itself
    updates = apply_adapters(folders, base, config, stored)  # parameter name → updates
    weight = merge_updates(stored[name].load(), updates[name], dtype)

An adapter is a directory that PEFT writes: `adapter_config.json`, and `adapter_model.safetensors`
with two small matrices for each layer it changes. Which layers these are is read from the names of
the tensors; the configuration gives the scales, and is checked against them. Merging costs nothing
at inference, and keeps the model the plain one: `load_weights.py` casts the sum to its dtype.

Sources: LoRA, arXiv 2106.09685; rank-stabilized scales, arXiv 2312.03732; DoRA, arXiv 2402.09353;
files and rules of matching, PEFT 0.21.2.

Shapes: out and in, the two widths of a weight [out, in]; r the rank; V vocabulary; C hidden_size.
"""

from __future__ import annotations

import logging
import math
import re
import reprlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint_files import (
    find_checkpoint,
    find_format,
    first_few,
    holds_model,
    parameter_name,
    quantization_method,
    quantization_settings,
)
from config_fields import Size, check_fields, is_integer, is_number, is_size
from json_files import read_json
from qwen2vl import Config
from stored_tensors import StoredTensor, naming, open_shard

logger = logging.getLogger("qwen2vl")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


# --------------------------------------------------------------------------- the base of an adapter
# Endings of hub names of quantized weights, which adapters are trained on and not merged into.
QUANTIZED_NAME = re.compile(r"(-unsloth)?-bnb-8bit$|-AWQ$|-GPTQ(-Int[48])?$", re.IGNORECASE)


def is_adapter(folder: Path) -> bool:
    """Return whether a directory holds an adapter rather than a full checkpoint.

    A directory with both counts as an adapter, as in transformers 5.23.0
    (`find_adapter_config_file`); one with an adapter_config.json left over from a merge, and no
    adapter's weights, does not.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return any(folder.glob("adapter_model.*")) or not holds_model(folder)


def find_adapters(
    name_or_folder: str | Path, adapters: Sequence[str | Path] = (), weights: bool = True
) -> tuple[Path, list[Path]]:
    """Return the directory of the base model, and those of the adapters in order of merging.

    name_or_folder: a base model, or an adapter, whose own base model is then found and logged; an
    adapter trained on top of another adapter is followed down to the model. adapters: further ones.
    Either is a directory or a hub name. weights: whether a download includes them.
    Raises FileNotFoundError or ValueError in one sentence.
    """
    folders = [find_checkpoint(name, weights) for name in adapters]
    for name, folder in zip(adapters, folders, strict=True):
        if not (folder / ADAPTER_CONFIG).is_file():
            raise FileNotFoundError(f"expected a LoRA adapter in {name}, got no {ADAPTER_CONFIG}")
    base = find_checkpoint(name_or_folder, weights)
    chain: list[Path] = []  # from name_or_folder down to the model
    while is_adapter(base):
        adapter = base
        chain.append(adapter)
        base = find_base(adapter, weights)
        logger.info("the base model of the adapter in %s is %s", adapter, base)
        if holds_model(base) and base.samefile(adapter):
            break  # saved into the directory of its base model
        if any(base.samefile(earlier) for earlier in chain):
            raise ValueError(f"{base}: base_model_name_or_path leads back to the adapter itself")
    return base, [*reversed(chain), *folders]


def find_base(folder: Path, weights: bool = True) -> Path:
    """Return the directory of the base model that adapter_config.json names.

    It is a directory, relative to the working directory or to the adapter, or a hub name.
    Raises FileNotFoundError or ValueError that names the file and the option to use instead.
    """
    where = f"{folder / ADAPTER_CONFIG}: base_model_name_or_path"
    remedy = f"name the base model with --model and the adapter with --adapter {folder}"
    raw_config = read_json(folder, ADAPTER_CONFIG)
    name = raw_config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"{where}: expected a directory or a hub name, got {reprlib.repr(name)}: {remedy}"
        )
    for candidate in (Path(name), folder / name):
        if (candidate / "config.json").is_file() or (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    quantized = QUANTIZED_NAME.search(name)
    if quantized:
        raise ValueError(
            f"{where}: {name} is quantized, and adapters are merged into full-precision weights: "
            f"{remedy}; the base model could be {name[: quantized.start()]}"
        )
    revision = raw_config.get("revision")
    if revision not in (None, "", "main"):
        warnings.warn(
            f"{folder / ADAPTER_CONFIG}: revision is {reprlib.repr(revision)}, but the main branch "
            f"of {name} is used: download that revision and name its directory with --model",
            stacklevel=3,
        )
    try:
        return find_checkpoint(name, weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{where}: {error} ({remedy})") from error


def check_base(folder: Path) -> None:
    """Raise ValueError if the base model's weights are quantized, and stay so when loaded."""
    settings = quantization_settings(read_json(folder, "config.json"))
    if settings and find_format(folder) is None:
        method = quantization_method(settings)
        raise ValueError(
            f"adapters are merged into full-precision weights, but those in {folder} are quantized "
            f"with {method}: name the full-precision base model with --model, and --quantize int8 "
            "or int4 to save memory"
        )


# ------------------------------------------------------------------------------ adapter_config.json
# Fields of variants whose result is no sum of matrices, or that change other things of the model.
UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
)
# Values of init_lora_weights that begin training from changed base weights.
CHANGED_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass
class AdapterConfig:
    """The fields of adapter_config.json that shape the result. An absent one has PEFT's default.

    Raises ValueError for a value of the wrong type or out of range.
    Source: PEFT 0.21.2, `LoraConfig`.
    """

    r: Size = 8  # the rank
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict = field(default_factory=dict)  # regular expression of a module → its r
    alpha_pattern: dict = field(default_factory=dict)
    target_modules: list | str | None = None
    exclude_modules: list | str | None = None
    layers_to_transform: list | int | None = None
    layers_pattern: list | str | None = None
    modules_to_save: list | None = None  # stored as a whole
    trainable_token_indices: list | dict | None = None  # rows of the embeddings that are stored
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        for pattern, rank in self.rank_pattern.items():
            check_pattern("rank_pattern", pattern)
            if not is_size(rank):
                raise ValueError(f"rank_pattern: expected positive integers, got {rank!r}")
        for pattern, alpha in self.alpha_pattern.items():
            check_pattern("alpha_pattern", pattern)
            if not is_number(alpha):
                raise ValueError(f"alpha_pattern: expected finite numbers, got {alpha!r}")
        if isinstance(self.target_modules, str):
            check_pattern("target_modules", self.target_modules)
        if isinstance(self.exclude_modules, str):
            check_pattern("exclude_modules", self.exclude_modules)
        for name in self.modules_to_save or []:
            check_pattern("modules_to_save", name)

    def rank(self, module: str) -> int:
        """Return the rank of a module by its name in training."""
        return int(matching_entry(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Return the factor of B A: alpha / r, or alpha / √r where rank-stabilized."""
        alpha = matching_entry(self.alpha_pattern, module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_saved(self, module: str) -> bool:
        """Return whether the module is one of `modules_to_save`."""
        return any(module.endswith(name) for name in self.modules_to_save or [])

    def token_ids(self, module: str) -> list:
        """Return the ids of the rows that are stored of a table: one list for all, or by name."""
        if not isinstance(self.trainable_token_indices, dict):
            return as_list(self.trainable_token_indices)
        for name, token_ids in self.trainable_token_indices.items():
            if matches_any([name], module):
                return as_list(token_ids)
        return []

    def is_targeted(self, module: str) -> bool:
        """Return whether the rules of the configuration choose this module for LoRA.

        Source: PEFT 0.21.2, `check_target_module_exists`.
        """
        if matches_any(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save or []):
            return False
        if not matches_any(self.target_modules, module):
            return False
        if isinstance(self.target_modules, str) or self.layers_to_transform in (None, []):
            return True
        return self.layer_index(module) in as_list(self.layers_to_transform)

    def layer_index(self, module: str) -> int | None:
        """Return the number of the module's layer: the first one in its name."""
        patterns = as_list(self.layers_pattern) or [r"[^.]*"]
        for pattern in patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module)
            if match:
                return int(match.group(1))
        return None


def as_list(value: list | str | int | None) -> list:
    """Return a list as it is, null as an empty one, and anything else as a list of it."""
    if value is None or value == "":
        return []
    return value if isinstance(value, list) else [value]


def matches_any(rule: list | str | None, module: str) -> bool:
    """Return whether a module's name matches a regular expression, or ends with one of the names.

    Source: PEFT 0.21.2, `check_target_module_exists`.
    """
    if isinstance(rule, str):
        return re.fullmatch(rule, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in rule or [])


def matching_entry(patterns: dict, module: str, default: float) -> float:
    """Return the value of the first pattern that matches a whole name or its end after a dot.

    Source: PEFT 0.21.2, `get_pattern_key`.
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def check_pattern(name: str, pattern: object) -> None:
    """Raise ValueError naming the field if a value is no regular expression."""
    try:
        if not isinstance(pattern, str):
            raise ValueError("not a string")
        re.compile(pattern)
    except (ValueError, re.error, RecursionError) as error:
        got = reprlib.repr(pattern)
        raise ValueError(f"{name}: expected regular expressions, got {got} ({error})") from error


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return the configuration of an adapter.

    Raises FileNotFoundError, or ValueError that names the file and the field, also for other kinds
    of adapters and for the variants of LoRA that cannot be merged.
    """
    path = folder / ADAPTER_CONFIG
    raw_config = read_json(folder, ADAPTER_CONFIG)
    kind = raw_config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(
            f"{path}: peft_type: expected 'LORA', got {reprlib.repr(kind)}: other adapters cannot "
            "be loaded; merge it with PEFT's merge_and_unload and use the merged model"
        )
    check_family(raw_config, path)
    for name in UNSUPPORTED:
        if raw_config.get(name):
            raise ValueError(
                f"{path}: {name}: expected null, got {reprlib.repr(raw_config[name])}: this "
                "variant of LoRA cannot be merged into the weights here"
            )
    start = raw_config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        raise ValueError(
            f"{path}: init_lora_weights: expected weights that start at the base model's, got "
            f"{start!r}, whose training begins by changing them: convert the adapter with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    known = {entry.name for entry in fields(AdapterConfig)}
    values = {name: raw_config[name] for name in known if raw_config.get(name) is not None}
    try:
        return AdapterConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_family(raw_config: dict, path: Path) -> None:
    """Raise ValueError if the adapter was trained on a model of another family.

    Its tensors may fit all the same: the decoders of Qwen2-VL-7B and Qwen2.5-VL-7B have equal
    shapes.
    """
    mapping = raw_config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if not isinstance(library, str) or not library.startswith("transformers.models."):
        return
    if not library.startswith("transformers.models.qwen2_vl."):
        raise ValueError(
            f"{path}: auto_mapping's parent_library: expected an adapter for Qwen2-VL, got "
            f"{library!r}"
        )


# ------------------------------------------------------------------------------------------ merging
class LoraUpdate(NamedTuple):
    """A low-rank change of a weight [out, in]: W + scale · B A.

    transposed: the weight is an embedding table [V, C], which LoRA treats as its transpose [C, V].
    magnitude [out]: DoRA, which scales each row of the sum to that length.
    """

    a: Tensor  # [r, in]; of a convolution [r, *in]
    b: Tensor  # [out, r]; of a convolution [out, r, 1, 1, 1]
    scale: float
    magnitude: Tensor | None = None
    transposed: bool = False

    def apply(self, weight: Tensor) -> Tensor:
        """Return the merged weight, in the dtype and on the device of `weight`.

        Source: arXiv 2106.09685 §4.1 and 2402.09353 §4; PEFT 0.21.2, `get_delta_weight` and
        `DoraLinearVariant`.
        """
        a = self.a.to(weight).flatten(1)
        b = self.b.to(weight).flatten(1)
        matrix = weight.T if self.transposed else weight.flatten(1)  # [out, in]
        merged = matrix + self.scale * (b @ a)
        if self.magnitude is not None:
            magnitude = self.magnitude.to(weight).flatten()
            merged = merged * (magnitude / torch.linalg.norm(merged, dim=1))[:, None]
        return merged.T.contiguous() if self.transposed else merged.view(weight.shape)


class BiasUpdate(NamedTuple):
    """The change of a bias [out] by the bias of B: b + scale · b_B.

    Source: PEFT 0.21.2, `lora_bias` of `LoraConfig`.
    """

    bias: Tensor
    scale: float

    def apply(self, weight: Tensor) -> Tensor:
        """Return the merged bias, in the dtype and on the device of `weight`."""
        return weight + self.scale * self.bias.to(weight)


class RowUpdate(NamedTuple):
    """New rows [n, C] of an embedding table or head [V, C], in place of those of `token_ids`.

    Source: PEFT 0.21.2, `TrainableTokensLayer`.
    """

    token_ids: list[int]
    rows: Tensor

    def apply(self, weight: Tensor) -> Tensor:
        """Return the table with the new rows, in the dtype and on the device of `weight`."""
        index = torch.tensor(self.token_ids, device=weight.device)
        return weight.index_copy(0, index, self.rows.to(weight))


Update = LoraUpdate | BiasUpdate | RowUpdate


def merge_updates(weight: Tensor, updates: list[Update], dtype: torch.dtype) -> Tensor:
    """Return a weight with all updates, computed in at least float32 and cast to the dtype once.

    PEFT casts the weight first and the sum of each adapter again: the same for one adapter and a
    weight that is stored in the dtype, else up to a rounding of the dtype.
    """
    merged = weight.to(torch.promote_types(dtype, torch.float32))
    for update in updates:
        merged = update.apply(merged)
    return merged.to(dtype)


# ---------------------------------------------------------------------- adapter_model.safetensors
# module.lora_A.weight, module.lora_A.default.weight, module.lora_magnitude_vector, ...
LORA_TENSOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector|token_adapter\.trainable_tokens_delta)(?:\.(?P<ending>.+))?"
)


class Adapter:
    """The tensors of one adapter, sorted by what they do.

    lora: module → its tensors by part, such as "lora_A" or "lora_B.bias"
    rows: parameter → its new rows
    replaced: parameter → the tensor in its place (`modules_to_save`, biases, resized embeddings)
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = read_adapter_config(folder)
        self.lora: dict[str, dict[str, StoredTensor]] = {}
        self.rows: dict[str, tuple[str, StoredTensor]] = {}
        self.replaced: dict[str, StoredTensor] = {}
        for tensor in list_adapter_tensors(folder):
            self.add(tensor)

    def add(self, tensor: StoredTensor) -> None:
        """Sort one tensor by its name. Raises ValueError for the second one of a name."""
        module, part = split_name(tensor.key)
        if part == "token_adapter.trainable_tokens_delta":
            entries: dict = self.rows
            key = parameter_name(f"{module}.weight")
            entry: object = (module, tensor)
        elif part.startswith("lora_"):
            entries = self.lora.setdefault(module, {})
            key = part
            entry = tensor
        else:
            entries = self.replaced
            key = parameter_name(f"{module}.{part}")
            entry = tensor
        if key in entries:
            raise ValueError(
                f"{tensor.path}: expected one adapter, got two tensors for {module}.{part}, one of "
                f"them {tensor.key}"
            )
        entries[key] = entry

    def is_shared_table(self, name: str) -> bool:
        """Return whether a stored embedding or head is the base model's own, after a resize."""
        return name in self.replaced and not self.config.is_saved(name.removesuffix(".weight"))

    def is_independent(self, name: str) -> bool:
        """Return whether a tied embedding or head has a change that the other one does not follow.

        New rows of the embeddings, and a table that is stored because it was resized, change both.
        """
        has_lora = any(parameter_name(f"{module}.weight") == name for module in self.lora)
        is_saved = name in self.replaced and not self.is_shared_table(name)
        has_rows = name == HEAD and HEAD in self.rows
        return has_lora or is_saved or has_rows

    def drop(self, name: str) -> None:
        """Leave out all changes of one parameter."""
        self.replaced.pop(name, None)
        self.rows.pop(name, None)
        for module in list(self.lora):
            if parameter_name(f"{module}.weight") == name:
                del self.lora[module]


def list_adapter_tensors(folder: Path) -> list[StoredTensor]:
    """Return the tensors in an adapter's file. Raises FileNotFoundError or ValueError."""
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        others = sorted(other.name for other in folder.glob("adapter_model.*"))
        holding = f" and holds {first_few(others)}" if others else ""
        raise FileNotFoundError(
            f"{folder} lacks {ADAPTER_WEIGHTS}{holding}: only safetensors files are read, as those "
            "of pickle can run code; load the adapter with PEFT and save it with save_pretrained"
        )
    shard = open_shard(path)
    with naming(path):
        tensors = [StoredTensor(path, shard, key) for key in shard.keys()]
    if not tensors:
        raise ValueError(f"{path}: expected tensors of an adapter, got none")
    return tensors


def split_name(key: str) -> tuple[str, str]:
    """Return the module that a tensor of an adapter belongs to, by its name in training, and what
    it is to it: "lora_A", "lora_B.bias", "weight", ...

    PEFT puts `base_model.model.` in front, wrappers of modules in between, and in some versions and
    saves the name of the adapter ("default") behind.
    """
    name = re.sub(r"^(?:module\.|_orig_mod\.)*(?:base_model\.model\.)?", "", key)
    name = re.sub(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)", "", name)
    match = LORA_TENSOR.fullmatch(name)
    if match is None:
        module, _, part = name.rpartition(".")
        return module, part
    ending = match["ending"] or ""
    is_bias = ending.split(".")[-1] == "bias"
    return match["module"], f"{match['part']}.bias" if is_bias else match["part"]


# --------------------------------------------------------------------------------- adapter and base
def apply_adapters(
    folders: list[Path], base: Path, config: Config, stored: dict[str, StoredTensor]
) -> dict[str, list[Update]]:
    """Return the updates of each parameter by the adapters, in their order.

    config and stored describe the base model and are changed: tensors that an adapter replaces take
    their places in `stored`, the vocabulary gets the size of a replaced embedding table, and head
    and embeddings are untied where only one of them changes.
    Each adapter is merged into the model that those before it give, as if trained on it.
    Raises FileNotFoundError or ValueError that names the adapter and what does not fit.
    """
    updates: dict[str, list[Update]] = {}
    for folder in folders:
        adapter = Adapter(folder)
        if config.tie_word_embeddings:
            untie(adapter, config, stored, updates)
        problems = replace_tensors(adapter, config, stored, updates)
        for module in adapter.lora:
            problems += add_lora(adapter, module, stored, updates)
        for name in adapter.rows:
            problems += add_rows(adapter, name, stored, updates)
        if problems:
            raise ValueError(mismatch(adapter, base, problems))
        check_targets(adapter, stored)
    return updates


def mismatch(adapter: Adapter, base: Path, problems: list[str]) -> str:
    """Return the sentence for an adapter that does not fit the base model."""
    trained_on = read_json(adapter.folder, ADAPTER_CONFIG).get("base_model_name_or_path")
    origin = f" (it was trained on {trained_on!s:.120})" if trained_on else ""
    return (
        f"the adapter {adapter.folder / ADAPTER_WEIGHTS} does not fit the base model in "
        f"{base}{origin}: {first_few(problems)}"
    )


def untie(
    adapter: Adapter,
    config: Config,
    stored: dict[str, StoredTensor],
    updates: dict[str, list[Update]],
) -> None:
    """Give the head weights of its own where the adapter changes only one of two tied matrices.

    PEFT's own merge adds a LoRA of either matrix to both, as they are one tensor. The model in
    training, whose forward pass this follows, adds it to one.
    Source: PEFT 0.21.2, `lora.Linear.forward` and `ModulesToSaveWrapper`.
    """
    embedding_changes = adapter.is_independent(EMBEDDING)
    if adapter.config.ensure_weight_tying and embedding_changes:
        adapter.drop(HEAD)  # a copy of the changes of the embeddings
        return
    if adapter.is_shared_table(HEAD):
        adapter.replaced.setdefault(EMBEDDING, adapter.replaced[HEAD])
        del adapter.replaced[HEAD]
    head_changes = adapter.is_independent(HEAD)
    if not head_changes and not embedding_changes:
        return
    config.tie_word_embeddings = False
    if adapter.is_shared_table(EMBEDDING):
        stored[HEAD] = adapter.replaced[EMBEDDING]
        return
    stored[HEAD] = stored[EMBEDDING]
    if EMBEDDING in updates:
        updates[HEAD] = list(updates[EMBEDDING])


def replace_tensors(
    adapter: Adapter,
    config: Config,
    stored: dict[str, StoredTensor],
    updates: dict[str, list[Update]],
) -> list[str]:
    """Put the tensors that an adapter stores as a whole into `stored`; return what does not fit.

    Embeddings and head may have another number of rows, which becomes the size of the vocabulary.
    """
    problems = []
    for name, tensor in adapter.replaced.items():
        if name not in stored:
            problems.append(f"{tensor.key} is no parameter of the base model")
            continue
        expected = stored[name].shape()
        shape = tensor.shape()
        is_table = name in (EMBEDDING, HEAD)
        if shape != expected and not (is_table and shape[1:] == expected[1:]):
            problems.append(f"{tensor.key} is {shape}, expected {expected}")
            continue
        stored[name] = tensor
        updates.pop(name, None)
        if name == EMBEDDING:
            config.vocab_size = shape[0]
    return problems


def add_lora(
    adapter: Adapter,
    module: str,
    stored: dict[str, StoredTensor],
    updates: dict[str, list[Update]],
) -> list[str]:
    """Add the update of one module's weight, and of its bias if any; return what does not fit."""
    parts = adapter.lora[module]
    config = adapter.config
    name = parameter_name(f"{module}.weight")
    if name not in stored:
        return [f"{next(iter(parts.values())).key} has no such module in the base model"]
    transposed = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    kind = "lora_embedding" if transposed else "lora"
    problems = shape_problems(adapter, module, kind, stored[name].shape())
    if problems:
        return problems
    broken = [tensor.key for tensor in parts.values() if not tensor.load().isfinite().all()]
    if broken:
        return [f"{broken[0]} holds NaN or infinite values"]
    scale = config.scale(module)
    magnitude = parts["lora_magnitude_vector"].load() if config.use_dora else None
    update = LoraUpdate(
        parts[f"{kind}_A"].load(), parts[f"{kind}_B"].load(), scale, magnitude, transposed
    )
    updates.setdefault(name, []).append(update)
    if "lora_B.bias" not in parts:
        return []
    tensor = parts["lora_B.bias"]
    bias = parameter_name(f"{module}.bias")
    if bias not in stored:
        return [f"{tensor.key} belongs to a layer without a bias"]
    if tensor.shape() != stored[bias].shape():
        return [f"{tensor.key} is {tensor.shape()}, expected {stored[bias].shape()}"]
    updates.setdefault(bias, []).append(BiasUpdate(tensor.load(), scale))
    return []


def shape_problems(adapter: Adapter, module: str, kind: str, shape: list[int]) -> list[str]:
    """Return what does not fit of the LoRA of a weight of that shape: parts, shapes or the rank."""
    parts = adapter.lora[module]
    for part in (f"{kind}_A", f"{kind}_B"):
        if part not in parts:
            return [f"{module} lacks {part}"]
    expected_parts = {f"{kind}_A", f"{kind}_B", "lora_B.bias", "lora_magnitude_vector"}
    unknown = [tensor.key for part, tensor in parts.items() if part not in expected_parts]
    if unknown:
        return [f"{unknown[0]} is no part of a LoRA of this layer"]
    if adapter.config.use_dora != ("lora_magnitude_vector" in parts):
        stored_part = "lacks" if adapter.config.use_dora else "has"
        return [
            f"{module} {stored_part} lora_magnitude_vector, and use_dora in {ADAPTER_CONFIG} is "
            f"{str(adapter.config.use_dora).lower()}"
        ]
    rank = adapter.config.rank(module)
    if kind == "lora_embedding":
        shape = shape[::-1]
    shape_a = [rank, *shape[1:]]
    shape_b = [shape[0], rank] + [1] * (len(shape) - 2)
    for part, expected in {f"{kind}_A": shape_a, f"{kind}_B": shape_b}.items():
        tensor = parts[part]
        if tensor.shape() != expected:
            return [f"{tensor.key} is {tensor.shape()}, expected {expected} for its r, {rank}"]
    if adapter.config.use_dora:
        magnitude = parts["lora_magnitude_vector"]
        if math.prod(magnitude.shape()) != shape[0]:
            return [f"{magnitude.key} is {magnitude.shape()}, expected {[shape[0]]}"]
    return []


def add_rows(
    adapter: Adapter,
    name: str,
    stored: dict[str, StoredTensor],
    updates: dict[str, list[Update]],
) -> list[str]:
    """Add the update of an embedding table by new rows; return what does not fit."""
    module, tensor = adapter.rows[name]
    if name not in stored:
        return [f"{tensor.key} has no such module in the base model"]
    token_ids = adapter.config.token_ids(module)
    rows, width = stored[name].shape()
    if not all(is_integer(index) and 0 <= index < rows for index in token_ids):
        return [
            f"trainable_token_indices in {ADAPTER_CONFIG}: expected token ids from 0 to "
            f"{rows - 1} for {tensor.key}, got {reprlib.repr(token_ids)}"
        ]
    if tensor.shape() != [len(token_ids), width]:
        return [
            f"{tensor.key} is {tensor.shape()}, expected {[len(token_ids), width]} for the "
            f"trainable_token_indices in {ADAPTER_CONFIG}"
        ]
    updates.setdefault(name, []).append(RowUpdate(token_ids, tensor.load()))
    return []


def check_targets(adapter: Adapter, stored: dict[str, StoredTensor]) -> None:
    """Warn where the stored tensors are not those of the layers that the configuration chooses.

    The tensors decide: PEFT drops those that it does not expect, and leaves layers without tensors
    as they are.
    """
    config = adapter.config
    if not config.target_modules or config.target_modules == "all-linear":
        return
    where = f"{adapter.folder / ADAPTER_CONFIG}: target_modules"
    unexpected = [module for module in adapter.lora if not config.is_targeted(module)]
    if unexpected:
        warnings.warn(
            f"{where} does not match {first_few(unexpected)}, whose tensors are stored: they are "
            "used",
            stacklevel=4,
        )
    is_nested = any("language_model" in name or "model.visual" in name for name in adapter.lora)
    modules = [module_name(name, is_nested) for name in stored if name.endswith(".weight")]
    missing = [
        module for module in modules if config.is_targeted(module) and module not in adapter.lora
    ]
    if missing and not unexpected:
        warnings.warn(
            f"{where} matches {first_few(missing)}, without tensors in {ADAPTER_WEIGHTS}: the base "
            "model's weights are kept there",
            stacklevel=4,
        )


def module_name(name: str, is_nested: bool) -> str:
    """Return the module of a parameter in transformers 4.45 to 4.51, or nested as since 4.52."""
    module = name.removesuffix(".weight")
    if not is_nested:
        return module
    if module.startswith("visual."):
        return f"model.{module}"
    return re.sub(r"^model\.", "model.language_model.", module)
