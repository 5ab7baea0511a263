"""A checkpoint → a `Qwen2VL` with its weights; and the way back.

The model is built without memory ("meta" device), the files are memory-mapped, and each mapped
tensor becomes the parameter itself: nothing is initialized at random first, and there is no second
copy of the weights. A tensor is copied only where its dtype or device is not that of the model.

Source: the published checkpoints, and the directories that transformers 4.45, 4.57 and 5.23 write.
"""

from __future__ import annotations

import importlib.util
import re
import reprlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

import linear
from adapters import Update, apply_adapters, check_base, find_adapters, merge_updates
from checkpoint_checks import check_stored_layers, check_weights_finite, read_generation_config
from checkpoint_files import (
    WEIGHTS,
    check_not_quantized,
    check_supported,
    find_format,
    find_packing,
    first_few,
    parameter_name,
    weight_files,
)
from checkpoint_files import find_checkpoint as find_checkpoint  # for users of this file
from dequantize_formats import join_parts
from errors import first_line, printable
from json_files import read_json
from output_files import write_file, write_json
from packed_weights import Grouping, Packing, gptq_config, pack_gptq
from qwen2vl import Config, Qwen2VL, VisionConfig
from stored_tensors import StoredTensor, naming, open_shard

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PACKED_HEAD = "lm_head.qweight"
MAX_WARNINGS = 5  # about unknown fields of one file


# -------------------------------------------------------------------------------------- config.json
# Fields of config.json that are no fields of our two classes: read under
# another name, or without effect here.
OTHER_FIELDS = {
    "text_config",
    "rope_parameters",
    "layer_types",
    "in_chans",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "initializer_range",
    "model_type",
    "spatial_patch_size",
    "transformers_version",
    "use_cache",
    "vision_token_id",
    "quantization_config",
    "quantization",
    "compression_config",
}


def load_config(folder: str | Path) -> Config:
    """Return the configuration that `read_config` reads, and warn of each unknown field."""
    config, unknown = read_config(folder)
    path = Path(folder) / "config.json"
    for name in unknown[:MAX_WARNINGS]:
        warnings.warn(f"{path} holds an unknown field: {printable(name)}", stacklevel=2)
    if len(unknown) > MAX_WARNINGS:
        warnings.warn(
            f"{path} holds {len(unknown) - MAX_WARNINGS} more unknown fields", stacklevel=2
        )
    return config


def read_config(folder: str | Path) -> tuple[Config, list[str]]:
    """Return the configuration in config.json, from any of its three layouts, and unknown fields.

    Flat (the hub): the decoder's fields are at the top level. Flat with a `text_config`
    (transformers 4.57): some fields appear twice, and `text_config` wins. Nested (5.x): the
    decoder's fields are in `text_config` alone, and RoPE in `rope_parameters`. A flag for tied
    embeddings counts in either place.
    Raises FileNotFoundError or ValueError that name the file and the field.
    """
    folder = Path(folder)
    path = folder / "config.json"
    check_supported(folder)
    raw_config = read_json(folder, path.name)
    try:
        text = section(raw_config, "text_config")
        vision = section(raw_config, "vision_config")
        values = decoder_values(raw_config, text)
        if vision.get("in_channels") is None:
            vision["in_channels"] = vision.get("in_chans")  # the hub's files have the older name
        values["vision_config"] = VisionConfig(**known_values(VisionConfig, vision))
        config = Config(**known_values(Config, values))
        check_layer_types(config, values.get("layer_types"))
        check_vision_rope(vision)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    unknown = [
        *unknown_fields(Config, raw_config, ""),
        *unknown_fields(Config, text, "text_config."),
        *unknown_fields(VisionConfig, vision, "vision_config."),
    ]
    return config, unknown


def section(raw_config: dict, name: str) -> dict:
    """Return a copy of an object within config.json, empty where it is absent or null."""
    found = raw_config.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected an object, got {reprlib.repr(found)}")
    return dict(found)


def decoder_values(raw_config: dict, text: dict) -> dict:
    """Return the decoder's fields in the flat layout; those of `text_config` come first."""
    values = raw_config | text
    rope = {"mrope_section": [16, 24, 24]}  # where the file has none, as in the reference
    rope |= (
        section(text, "rope_scaling")
        or section(text, "rope_parameters")
        or section(raw_config, "rope_scaling")
        or section(raw_config, "rope_parameters")
    )
    theta = rope.pop("rope_theta", None)
    if theta is not None:
        values["rope_theta"] = theta
    values["rope_scaling"] = rope
    if values.get("num_key_value_heads", "absent") is None:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    tied = "tie_word_embeddings"
    values[tied] = raw_config.get(tied) or text.get(tied) or False
    return values


def known_values(cls: type, values: dict) -> dict:
    """Return the entries that are fields of the dataclass, nulls only where these are allowed."""
    known = {}
    for field in fields(cls):
        if field.name not in values:
            continue
        if values[field.name] is None and not field.type.endswith("None"):
            continue
        known[field.name] = values[field.name]
    return known


def unknown_fields(cls: type, values: dict, prefix: str) -> list[str]:
    """Return the sorted names of unknown entries.

    Those are neither fields of the dataclass nor known to have no effect.
    """
    names = values.keys() - OTHER_FIELDS - {field.name for field in fields(cls)}
    return [prefix + name for name in sorted(names)]


def check_layer_types(config: Config, layer_types: object) -> None:
    """Raise ValueError if the list contradicts use_sliding_window and max_window_layers."""
    if not layer_types:
        return
    windows = [config.window(layer) for layer in range(config.num_hidden_layers)]
    expected = [f"{'full' if window is None else 'sliding'}_attention" for window in windows]
    if layer_types != expected:
        raise ValueError(
            f"layer_types: expected {reprlib.repr(expected)} by use_sliding_window and "
            f"max_window_layers, got {reprlib.repr(layer_types)}"
        )


def check_vision_rope(vision: dict) -> None:
    """Raise ValueError if the vision encoder's RoPE has a base that is not implemented."""
    theta = section(vision, "rope_parameters").get("rope_theta", 10000)
    if theta != 10000:
        raise ValueError(f"vision_config's rope_theta: expected 10000, got {theta!r}")


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that a checkpoint is loaded in.

    It is that of config.json, else that of the first floating-point tensor.
    Tensors of other dtypes in the files are cast to it, as in the reference. float8 never counts:
    without scales it is a way of storing, not of computing.
    """
    raw_config = read_json(folder, "config.json")
    text = raw_config.get("text_config")
    for part in (raw_config, text if isinstance(text, dict) else {}):
        name = part.get("dtype") or part.get("torch_dtype")
        if name and name != "auto":
            return parse_dtype(name, Path(folder) / "config.json")
    return first_dtype(weight_files(folder)[0])


def parse_dtype(name: object, path: Path) -> torch.dtype:
    """Return the dtype of a name such as "bfloat16" or "torch.bfloat16"."""
    names = ("float64", "float32", "float16", "bfloat16")
    short_name = str(name).removeprefix("torch.")
    if short_name not in names:
        raise ValueError(
            f"{path}: dtype: expected one of {', '.join(names)}, got {reprlib.repr(name)}"
        )
    return getattr(torch, short_name)


def first_dtype(path: Path) -> torch.dtype:
    """Return the dtype of the first floating-point tensor of 16 or more bits, else float32."""
    stored_dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    shard = open_shard(path)
    with naming(path):
        for key in shard.keys():
            dtype = stored_dtypes.get(shard.get_slice(key).get_dtype())
            if dtype is not None:
                return dtype
    return torch.float32


# ------------------------------------------------------------------------------------------ tensors
def common_prefix(names: list[str], expected: set[str]) -> str:
    """Return the prefix of all names ("module.", "_orig_mod.") without which most are expected."""
    shared = [""]
    for dot in re.finditer(r"\.", names[0] if names else ""):
        prefix = names[0][: dot.end()]
        if all(name.startswith(prefix) for name in names):
            shared.append(prefix)

    def count_known(prefix: str) -> int:
        return sum(parameter_name(name.removeprefix(prefix)) in expected for name in names)

    return max(shared, key=count_known)  # the shortest of those that are equally good


def list_tensors(paths: list[Path], expected: set[str]) -> dict[str, StoredTensor]:
    """Return every tensor of the files under the name of its parameter.

    Stored `inv_freq` buffers are left out. Weights that are dequantized while they are loaded are
    joined with their parts (`dequantize_formats.py`).
    Warns of a prefix that is removed from all names.
    Raises ValueError for two tensors with one name, or parts that do not fit.
    """
    tensors = []
    for path in paths:
        shard = open_shard(path)
        with naming(path):
            keys = [key for key in shard.keys() if not key.endswith(".inv_freq")]
        tensors += [StoredTensor(path, shard, key) for key in keys]
    prefix = common_prefix([tensor.key for tensor in tensors], expected)
    if prefix:
        warnings.warn(
            f"all tensors in {paths[0].parent} are named {prefix}…: the prefix is removed",
            stacklevel=3,
        )
    stored: dict[str, StoredTensor] = {}
    for tensor in tensors:
        name = parameter_name(tensor.key.removeprefix(prefix))
        if name in stored:
            first = stored[name]
            raise ValueError(
                f"two tensors for the parameter {name}: {first.key} in {first.path} and "
                f"{tensor.key} in {tensor.path}"
            )
        stored[name] = tensor
    format = find_format(paths[0].parent)
    return stored if format is None else join_parts(stored, format)


def described(folder: Path) -> str:
    """Return "Qwen2-VL", with the architecture in config.json if that is another.

    A reward model has another, for example.
    """
    architectures = read_json(folder, "config.json").get("architectures")
    if not architectures or architectures == ["Qwen2VLForConditionalGeneration"]:
        return "Qwen2-VL"
    if isinstance(architectures, list):
        return f"Qwen2-VL (architectures is {first_few([str(name) for name in architectures])})"
    return f"Qwen2-VL (architectures is {reprlib.repr(architectures)})"


def check_tensors(
    folder: Path, expected: dict[str, nn.Parameter], stored: dict[str, StoredTensor]
) -> None:
    """Raise ValueError with the first few tensors that do not fit.

    Those are missing, unknown, misshapen, or integers where the model has floating point, or the
    reverse.
    """
    missing = [f"{name} {list(p.shape)}" for name, p in expected.items() if name not in stored]
    unknown = []
    misshapen = []
    integers = []
    not_int32 = []
    for name, tensor in stored.items():
        shape = tensor.shape()
        if name not in expected:
            unknown.append(f"{tensor.key} {shape}")
        elif shape != list(expected[name].shape):
            expected_shape = list(expected[name].shape)
            misshapen.append(f"{tensor.key} (expected {expected_shape}, got {shape})")
        elif not expected[name].is_floating_point():
            if tensor.dtype() != "I32":
                not_int32.append(tensor.key)
        elif not tensor.is_floating_point():
            integers.append(tensor.key)
    lists = {
        "missing": missing,
        f"not part of {described(folder)}": unknown,
        "of another shape": misshapen,
        "of a dtype that is not floating point": integers,
        "of a dtype that is not int32": not_int32,
    }
    problems = [f"{len(keys)} {what}: {first_few(keys)}" for what, keys in lists.items() if keys]
    if problems:
        raise ValueError(
            f"the tensors in {folder} do not fit its config.json: {'; '.join(problems)}"
        )


def pack_linears(model: nn.Module, packing: Packing, names: Collection[str]) -> None:
    """Replace the linear layers that are packed in files with tensors of these names.

    The files decide, as `modules_to_not_convert` is often incomplete.
    Raises ValueError for a layer that cannot be packed.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or f"{name}.qweight" not in names:
            continue
        layer_packing = packing
        if f"{name}.g_idx" not in names and not packing.act_order:
            layer_packing = replace(packing, has_g_idx=False)  # some packers leave it out
        try:
            model.set_submodule(name, linear.PackedLinear(module, layer_packing))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def drop_zero_biases(model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Leave out biases of packed layers without bias: packers of GPTQ write zeros for each layer.

    Raises ValueError for other values.
    """
    for name in linear.names_of(linear.PackedLinear, model):
        bias = stored.get(f"{name}.bias")
        if bias is None or model.get_submodule(name).bias is not None:
            continue
        if bias.load().any():
            raise ValueError(f"{bias.key} in {bias.path}: expected zeros, as {name} has no bias")
        del stored[f"{name}.bias"]


def check_groups(model: nn.Module, stored: dict[str, StoredTensor]) -> None:
    """Raise ValueError if `g_idx` holds a group that a layer does not have."""
    for name, tensor in stored.items():
        if not name.endswith(".g_idx"):
            continue
        groups = model.get_parameter(name.replace(".g_idx", ".scales")).shape[0]
        low, high = (int(value) for value in tensor.load().aminmax())
        if low < 0 or high >= groups:
            raise ValueError(
                f"{tensor.key} in {tensor.path}: expected groups from 0 to {groups - 1}, "
                f"got {low} to {high}"
            )


def resolve_head(config: Config, stored: dict[str, StoredTensor], dtype: torch.dtype) -> None:
    """Find the one tensor for tied head and embeddings, or untie two that differ.

    A tensor under either name serves both. If both are stored and equal in the model's dtype, the
    head is left out of `stored`. If they differ, both are kept, `config.tie_word_embeddings`
    becomes false, and a warning says so. A quantized head is one of its own, too.
    Source: transformers 5.23.0, `PreTrainedModel.tie_weights`.
    """
    if PACKED_HEAD in stored:
        config.tie_word_embeddings = False
    if not config.tie_word_embeddings or HEAD not in stored:
        return
    if EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
        return
    if torch.equal(stored[HEAD].load().to(dtype), stored[EMBEDDING].load().to(dtype)):
        del stored[HEAD]
        return
    warnings.warn(
        f"{HEAD} in {stored[HEAD].path} differs from the embeddings although config.json sets "
        "tie_word_embeddings: both are kept",
        stacklevel=3,
    )
    config.tie_word_embeddings = False


# ---------------------------------------------------------------------------------------- the model
class SkipInitialization(TorchFunctionMode):
    """Within it, parameters are not drawn at random: they are about to be loaded.

    It holds for one thread alone. (Drawing them on the meta device would also import PyTorch's
    compiler, which takes longer than loading a small model.)
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return function(*args, **kwargs)


def empty_model(config: Config, attn_implementation: str = "sdpa") -> Qwen2VL:
    """Return a model whose parameters have shapes and no memory.

    Raises ValueError for sizes beyond any memory.
    """
    try:
        with torch.device("meta"), SkipInitialization():
            return Qwen2VL(config, attn_implementation)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(
            f"config.json: a model of these sizes cannot be built: {first_line(error)}"
        ) from error


def load_model(
    name_or_folder: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "auto",
    quantize: str | None = None,
    adapters: Sequence[str | Path] = (),
    check_weights: bool = False,
    few_tokens: bool = False,
) -> Qwen2VL:
    """Return the checkpoint as a model in eval mode.

    name_or_folder: a directory or hub name; that of a LoRA adapter loads its base model with it.
    device: by default CUDA where there is one, else the CPU. dtype: of all parameters,
    by default `checkpoint_dtype`.
    attn_implementation: "eager", "sdpa", "flash", or "auto": flash-attn where it is
    installed and can run, else sdpa.
    quantize: "int8" or "int4" keeps the decoder's weight matrices in that many bits; those that
    the checkpoint has quantized stay as they are.
    adapters: directories or hub names of LoRA adapters, which are merged into the weights in order.
    check_weights: read all of them, and name those that are damaged (`check_weights_finite`).
    few_tokens: no more than one answer is asked for, so do nothing that pays off later.
    Raises OSError or ValueError: one sentence that names the file, tensor
    or field that cannot be loaded.
    """
    folder, adapter_folders = find_adapters(name_or_folder, adapters)
    if adapter_folders:
        check_base(folder)
    config = load_config(folder)
    device = find_device(device)
    paths = weight_files(folder)
    dtype = dtype or checkpoint_dtype(folder)
    attn_implementation = choose_attention(attn_implementation, device, dtype)
    check_stored_layers(folder, config, paths)  # before the time that a model of them takes
    model = empty_model(config, attn_implementation)
    names = {name for name, _ in model.named_parameters()}
    stored = list_tensors(paths, names | {HEAD})
    packing = find_packing(folder)
    if packing is None:
        check_not_quantized(folder, list(stored))
    file_config = replace(config)
    resolve_head(config, stored, dtype)
    updates = apply_adapters(adapter_folders, folder, config, stored)
    if config != file_config:
        model = empty_model(config, attn_implementation)  # with a head of its own, or more tokens
    if packing is not None:
        pack_linears(model, packing, stored)
        drop_zero_biases(model, stored)
    parameters = dict(model.named_parameters())  # lists a tied head once, as the embedding
    check_tensors(folder, parameters, stored)
    check_groups(model, stored)
    state = {
        name: load_parameter(name, tensor, updates.get(name, []), device, dtype)
        for name, tensor in stored.items()
    }
    if check_weights:
        check_weights_finite(folder, state)
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    model.load_state_dict(state, assign=True)
    model.tie_weights()  # assigning has made two parameters of the one tensor
    model.generation_config = read_generation_config(folder, config.vocab_size)
    if device.type == "cpu":
        state.clear()  # so that each layer's packed tensors are released as it is converted
        linear.use_kernels(model, dtype)
    if quantize is not None:
        state.clear()  # so that each layer's weights are released as it is quantized
        linear.quantize_linears(model, quantize)
    if device.type == "cpu":
        linear.use_byte_kernel(model, dtype, few_tokens)
    return model.eval()


def load_parameter(
    name: str,
    tensor: StoredTensor,
    updates: list[Update],
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return a stored tensor as a parameter; without updates by adapters in place where possible.

    Packed integers and their scales keep their dtype. Only one matrix at a time is merged, so that
    no second copy of the model exists.
    """
    if name.endswith((".qweight", ".qzeros", ".scales", ".g_idx")):
        return tensor.load().to(device)
    if not updates:
        return tensor.load().to(device, dtype)
    return merge_updates(tensor.load().to(device), updates, dtype)


def find_device(name: str | torch.device | None) -> torch.device:
    """Return the device of that name; by default CUDA where there is one, else the CPU.

    Raises ValueError if the device cannot be used.
    """
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either, by device and build
        raise ValueError(f"the device {name} cannot be used: {first_line(error)}") from error
    return device


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention implementation: the wanted one, or what "auto" means on this device.

    Raises ValueError if flash-attn is asked for where it cannot run.
    """
    obstacle = None
    if importlib.util.find_spec("flash_attn") is None:
        obstacle = "the package flash-attn is not installed"
    elif device.type != "cuda":
        obstacle = f"it needs a CUDA device, this is {device}"
    elif dtype not in (torch.float16, torch.bfloat16):
        obstacle = f"it needs float16 or bfloat16, this is {dtype}"
    if wanted == "flash" and obstacle:
        raise ValueError(f"attention 'flash' cannot be used: {obstacle}")
    if wanted != "auto":
        return wanted
    return "sdpa" if obstacle else "flash"


# --------------------------------------------------------------------------------------- new tokens
def resize_token_embeddings(model: Qwen2VL, new_size: int) -> None:
    """Give embeddings and head `new_size` rows, for the tokens that a fine-tune adds.

    Rows that stay keep their bits. New ones are drawn from a normal distribution around the mean of
    the old ones, so that new tokens are about as probable as an average one. `config.vocab_size`
    follows, and tied matrices stay tied. The published models have more rows than tokens: with
    151936 rows and 151657 tokens, there is room for 279 more.
    Raises ValueError for a size below the special tokens, or for a quantized model.
    Source: transformers 5.23.0, `resize_token_embeddings` with its default `mean_resizing`.
    """
    config = model.config
    largest = max(config.image_token_id, config.video_token_id, config.vision_end_token_id)
    if new_size <= largest:
        raise ValueError(
            f"new_size: expected more than the largest special token, {largest}, got {new_size}"
        )
    if not isinstance(model.lm_head, nn.Linear):
        raise ValueError("a quantized model cannot be resized: resize it before it is quantized")
    embedding = resize_rows(model.model.embed_tokens.weight, new_size)
    head = embedding
    if not config.tie_word_embeddings:
        head = resize_rows(model.lm_head.weight, new_size)
    config.vocab_size = new_size
    model.model.embed_tokens.weight = embedding
    model.model.embed_tokens.num_embeddings = new_size
    model.lm_head.weight = head
    model.lm_head.out_features = new_size


def resize_rows(weight: torch.Tensor, new_size: int) -> nn.Parameter:
    """Return the parameter [V, C] with `new_size` rows: fewer, or more that are drawn at random.

    New rows are N(mean, 1e-9 · covariance) of the old ones, in float32; the mean alone where the
    covariance is singular, as it is with fewer tokens than C.
    Source: transformers 5.23.0, `_init_added_embeddings_weights_with_mean`; "Initializing New Word
    Embeddings for Pretrained Language Models", John Hewitt, 2021.
    """
    old = weight.detach()
    count = new_size - len(old)
    if count <= 0:
        return nn.Parameter(old[:new_size].clone(), weight.requires_grad)
    rows = old.float()
    mean = rows.mean(0)  # [C]
    centered = rows - mean
    covariance = centered.T @ centered / len(old)  # [C, C]
    factor, failure = torch.linalg.cholesky_ex(1e-9 * covariance)
    new_rows = mean.expand(count, -1)
    if not failure:
        new_rows = new_rows + torch.randn_like(new_rows) @ factor.T
    return nn.Parameter(torch.cat((old, new_rows.to(old.dtype))), weight.requires_grad)


# ------------------------------------------------------------------------------------- the way back
def save_model(model: Qwen2VL, folder: str | Path) -> None:
    """Write config.json (flat), generation_config.json if the model has one, and model.safetensors.

    The dtype is the model's own; quantized layers are written in the layout of GPTQ. With the
    tokenizer's files and preprocessor_config.json beside them, the directory loads here and in
    transformers. Each file replaces an earlier one only when it is complete, so that a model can be
    saved into the directory whose weights it has mapped.
    Raises ValueError for quantized layers that GPTQ's layout has no place for, OSError naming a
    file that cannot be written.
    """
    quantization = saved_quantization(model)
    state = {name: tensor.detach().contiguous() for name, tensor in saved_tensors(model)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # transformers asks for the format
    write_file(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": str(model.model.norm.weight.dtype).removeprefix("torch."),
        **asdict(model.config),
    }
    if quantization is not None:
        config["quantization_config"] = quantization
    write_json(folder / "config.json", config)
    if model.generation_config:
        write_json(folder / "generation_config.json", model.generation_config)


def quantized_layers(model: nn.Module) -> dict[str, linear.QuantizedLinear]:
    """Return the layers with quantized weights by their names, without the head."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, linear.QuantizedLinear) and name != "lm_head":
            layers[name] = module
    return layers


def saved_quantization(model: nn.Module) -> dict | None:
    """Return the `quantization_config` of the saved model, None if its weights are plain.

    Raises ValueError for layers quantized in different ways, which no reader expects.
    """
    groupings = [layer.grouping() for layer in quantized_layers(model).values()]
    if not groupings:
        return None
    kinds = {(grouping.bits, grouping.group_size) for grouping in groupings}
    if len(kinds) > 1:
        names = [f"{bits} bits in groups of {size}" for bits, size in sorted(kinds)]
        raise ValueError(
            "expected quantized layers of the same bits and groups, as a directory holds only one "
            f"kind, got {' and '.join(names)}"
        )
    [(bits, group_size)] = kinds
    symmetric = all(grouping.symmetric for grouping in groupings)
    act_order = any(grouping.act_order for grouping in groupings)
    return gptq_config(Grouping(bits, group_size, symmetric, act_order))


def saved_tensors(model: Qwen2VL) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint by name: quantized layers as GPTQ packs them.

    A quantized head becomes plain weights again, as transformers reads no other; where it is tied,
    the embeddings serve it.
    """
    layers = quantized_layers(model)
    skipped = set(layers)
    if isinstance(model.lm_head, linear.QuantizedLinear):
        skipped.add("lm_head")
        if not model.config.tie_word_embeddings:
            yield HEAD, model.lm_head.dequantize(model.model.norm.weight.dtype)
    for name, layer in layers.items():
        for ending, tensor in pack_layer(name, layer).items():
            yield f"{name}.{ending}", tensor
    for name, parameter in model.named_parameters():  # lists a tied head only once
        module, _, ending = name.rpartition(".")
        if module not in skipped or ending == "bias":
            yield name, parameter


def pack_layer(name: str, layer: linear.QuantizedLinear) -> dict[str, torch.Tensor]:
    """Return a layer's tensors as GPTQ packs them. Raises ValueError naming one that it cannot."""
    try:
        return pack_gptq(layer.unpack(), layer.groups(), layer.grouping().bits)
    except ValueError as error:
        raise ValueError(f"{name} cannot be saved: {error}") from error
