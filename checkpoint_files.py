"""A checkpoint by directory or hub name → its weight files, or why it cannot be loaded.

Quantized uploads, GGUF files, pickles and other models are named in one sentence, before
their tensors are listed.
"""

from __future__ import annotations

import re
import reprlib
import warnings
from contextlib import suppress
from pathlib import Path

import hub
from dequantize_formats import Format, parse_format
from errors import naming, printable
from json_files import has_file, read_json
from packed_weights import Packing, parse_packing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = r"[^/\\\x00-\x1f]+\.safetensors"  # in the directory of the index, and printable


def find_checkpoint(name_or_folder: str | Path, weights: bool = True) -> Path:
    """Return the directory of a checkpoint: the one named, or the snapshot of a hub name.

    A snapshot is downloaded where needed; weights: with its weights. A `~` at the start is the home
    directory. Raises FileNotFoundError if it is neither a directory nor a hub name, OSError if the
    download fails.
    """
    name = str(name_or_folder)
    path = Path(name_or_folder)
    with suppress(RuntimeError):  # a user that does not exist: then there is no such directory
        path = path.expanduser()
    if path.is_dir() and name:
        return path
    if path.name.lower().endswith(".gguf"):
        raise FileNotFoundError(gguf_refusal(name))
    if path.exists() and name:
        raise FileNotFoundError(
            f"{name} is a file; expected a checkpoint directory, such as the one that holds it, "
            "or a hub name"
        )
    if name.count("/") != 1 or name[0] in "./~":
        raise FileNotFoundError(
            f"no folder {name}, nor a hub name such as Qwen/Qwen2-VL-2B-Instruct"
        )
    return hub.snapshot(name, weights)


def holds_model(folder: Path) -> bool:
    """Return whether a directory holds the weights of a whole model, under a name that is read."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a directory: `model.safetensors`, else those of the index.

    Warns of an index beside a `model.safetensors`, which is ignored as in the reference.
    Raises FileNotFoundError for files that are missing, ValueError for an index that is damaged.
    """
    folder = Path(folder)
    if has_file(folder / WEIGHTS):
        if has_file(folder / INDEX):
            warnings.warn(
                f"{folder} holds both {WEIGHTS} and {INDEX}: {WEIGHTS} is used", stacklevel=2
            )
        return [folder / WEIGHTS]
    if not has_file(folder / INDEX):
        raise FileNotFoundError(explain_no_weights(folder))
    names = shard_names(folder)
    missing = [name for name in names if not has_file(folder / name)]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {first_few(missing)}, named by {INDEX}")
    return [folder / name for name in names]


def shard_names(folder: Path) -> list[str]:
    """Return the sorted file names in the index, each of them in the index's own directory."""
    path = folder / INDEX
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{path}: weight_map: expected an object that names the file of each tensor, "
            f"got {reprlib.repr(weight_map)}"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(SHARD_NAME, name):
            raise ValueError(
                f"{path}: weight_map: expected names of safetensors files in the same directory, "
                f"got {reprlib.repr(name)}"
            )
    return sorted(set(weight_map.values()))


def explain_no_weights(folder: Path) -> str:
    """Return the sentence for a directory without safetensors weights of an expected name."""
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".gguf") for name in names):
        return gguf_refusal(folder)
    others = [name for name in names if re.search(r"\.(bin|pth|pt|ckpt|h5|msgpack|npz)$", name)]
    if others:
        return (
            f"{folder} lacks {WEIGHTS} and holds {first_few(others)}: only safetensors files are "
            "read, as those of pickle can run code; convert the checkpoint with transformers' "
            "save_pretrained"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return f"{folder} lacks {WEIGHTS} or {INDEX}, which would name {first_few(others)}"
    return f"{folder} lacks {WEIGHTS}"


def parameter_name(name: str) -> str:
    """Return a tensor's name in `Qwen2VL`, which is that of the hub, from that in any layout.

    transformers 5.x nests both halves under `model.`, a save of its bare model has them at the top,
    and a save of a model within a model has one `model.` too many.
    """
    name = re.sub(
        r"^(?:model\.|language_model\.)*(?=(?:model|visual|language_model|lm_head)\.)", "", name
    )
    return re.sub(r"^language_model\.", "model.", name)


def first_few(names: list[str], limit: int = 3) -> str:
    """Return the first names, and how many more there are."""
    shown = ", ".join(printable(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


# ---------------------------------------------------------------- checkpoints that cannot be loaded
# Methods by their `quant_method` in config.json; others are named as they are there.
METHODS = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "mlx": "MLX",
}
# Endings of tensor names that only quantized weights and adapters have; the first one present
# decides.
QUANTIZED_ENDINGS = {
    ".qweight": "AWQ or GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".input_scale": "FP8",
    ".codebooks": "AQLM",
    ".W_q": "HQQ",
    ".weight_scales": "EETQ",
    ".weight._data": "quanto",
    ".weight._scale": "quanto",
    ":qdata": "torchao",
    ".weight_qdata": "torchao",
    ".scales": "MLX",
}
FULL_PRECISION = {  # by hidden_size
    1536: "Qwen/Qwen2-VL-2B-Instruct",
    3584: "Qwen/Qwen2-VL-7B-Instruct",
    8192: "Qwen/Qwen2-VL-72B-Instruct",
}


def check_supported(folder: str | Path) -> None:
    """Raise an error for a directory that holds no Qwen2-VL checkpoint that can be loaded.

    The error is a ValueError or FileNotFoundError; its sentence names what the directory holds
    instead (an adapter, GGUF files, weights quantized in an unknown way, another model) and what to
    use. Reads
    config.json and the names of files, not the weights. A directory with nothing of that passes:
    the readers of its files say what is missing.
    """
    folder = Path(folder)
    if not has_file(folder / "config.json"):
        if has_file(folder / "adapter_config.json"):
            raise ValueError(adapter_refusal(folder))
        if any(folder.glob("*.gguf")):
            raise ValueError(gguf_refusal(folder))
        return
    raw_config = read_json(folder, "config.json")
    model_type = raw_config.get("model_type")
    if model_type != "qwen2_vl":
        raise ValueError(
            f"{folder / 'config.json'}: model_type: expected 'qwen2_vl', "
            f"got {reprlib.repr(model_type)}: only Qwen2-VL checkpoints can be loaded"
        )
    find_packing(folder)
    if any(folder.glob("adapter_model.*")) and not holds_model(folder):
        raise ValueError(adapter_refusal(folder))


def find_packing(folder: Path) -> Packing | None:
    """Return how the linear layers of a checkpoint stay packed, or None for plain weights.

    Those that are dequantized while they are loaded count as plain (`find_format`).
    Raises ValueError for a quantization that cannot be loaded.
    """
    folder = Path(folder)
    raw_config = read_json(folder, "config.json")
    settings = quantization_settings(raw_config)
    if not settings or find_format(folder) is not None:
        return None
    if isinstance(settings, dict) and settings.get("quant_method") in ("awq", "gptq"):
        with naming(settings_name(folder)):
            return parse_packing(settings)
    raise ValueError(quantized_refusal(folder, quantization_method(settings), raw_config))


def find_format(folder: Path) -> Format | None:
    """Return how the layers are quantized that are dequantized while they are loaded, or None.

    Raises ValueError for settings that contradict the format.
    """
    settings = quantization_settings(read_json(folder, "config.json"))
    if not isinstance(settings, dict):
        return None
    with naming(settings_name(folder)):
        return parse_format(settings)


def settings_name(folder: Path) -> str:
    """Return how an error names the field of config.json about quantization."""
    return f"{folder / 'config.json'}: quantization_config"


def quantization_settings(raw_config: dict) -> object:
    """Return what config.json holds about quantization, None without."""
    for part in (raw_config, raw_config.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(part, dict) and part.get(key):
                return part[key]
    return None


def quantization_method(settings: object) -> str:
    """Return the name of the quantization method of config.json, with its bits."""
    if not isinstance(settings, dict):
        return reprlib.repr(settings)
    method = settings.get("quant_method")
    bits = settings.get("bits", settings.get("w_bit"))
    if method is None and "group_size" in settings:
        method = "mlx"
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method = method or "bitsandbytes"
        bits = 4 if settings.get("load_in_4bit") else 8
    name = METHODS.get(str(method).lower(), str(method or "an unnamed method"))
    if method == "compressed-tensors" and isinstance(settings.get("format"), str):
        name += f" {settings['format']}"
    return f"{name} ({bits} bits)" if isinstance(bits, int) else name


def quantized_refusal(
    folder: Path, method: str, raw_config: dict, reason: str = "which cannot be loaded"
) -> str:
    """Return the sentence for quantized weights; it names the full-precision checkpoint."""
    text_config = raw_config.get("text_config")
    width = raw_config.get("hidden_size")
    if isinstance(text_config, dict):
        width = text_config.get("hidden_size", width)
    names = [name for hidden_size, name in FULL_PRECISION.items() if hidden_size == width]
    example = (names or ["Qwen/Qwen2-VL-2B-Instruct"])[0]
    return (
        f"the weights in {folder} are quantized with {method}, {reason}: use the full-precision "
        f"checkpoint, such as {example}, with --quantize int8 or int4 to save memory"
    )


def gguf_refusal(source: str | Path) -> str:
    """Return the sentence for weights in the GGUF format."""
    return (
        f"{source} holds weights in the GGUF format of llama.cpp, which cannot be loaded: use the "
        "safetensors checkpoint, such as Qwen/Qwen2-VL-2B-Instruct, with --quantize int8 or int4 "
        "to save memory"
    )


def adapter_refusal(folder: Path) -> str:
    """Return the sentence for a LoRA adapter where a full checkpoint is needed."""
    return (
        f"{folder} holds a LoRA adapter, expected the weights of a whole model: name its base "
        f"model with --model and the adapter with --adapter {folder}"
    )


def check_not_quantized(folder: Path, names: list[str]) -> None:
    """Raise ValueError if the tensor names are those of quantized weights or of an adapter.

    Serves checkpoints whose config.json omits it.
    """
    if any(".lora_A." in name or ".lora_B." in name for name in names):
        raise ValueError(adapter_refusal(folder))
    method = method_of_names(names)
    if method is not None:
        reason = "which its config.json does not describe"
        raw_config = read_json(folder, "config.json")
        raise ValueError(quantized_refusal(folder, method, raw_config, reason))


def method_of_names(names: list[str]) -> str | None:
    """Return the method of quantization that tensors of these names belong to, None for plain."""
    if any(".quant_state." in name for name in names):
        return "bitsandbytes"
    for ending, method in QUANTIZED_ENDINGS.items():
        if any(name.endswith(ending) for name in names):
            return method
    return None
