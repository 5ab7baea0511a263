"""A checkpoint, by folder or by hub name, becomes a `Qwen2VL` with its weights; and the way back.

The model is built without memory ("meta" device), the files are memory-mapped, and each mapped tensor becomes the
parameter itself: nothing is initialised at random first, and no second copy of the weights ever exists. A tensor is
copied only where the caller asks for another dtype or device.

Source: the published checkpoints, and the folders that transformers 4.45, 4.57 and 5.23 write.
"""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from extras import linear
from qwen2vl import Config, Qwen2VL, VisionConfig
from tokenizer import read_json


def find_folder(name_or_folder: str | Path, weights: bool = True) -> Path:
    """A folder as it is; a hub name ("Qwen/Qwen2-VL-2B-Instruct") as the folder of its downloaded snapshot.

    weights: whether they are downloaded with it.
    Raises FileNotFoundError if the name is neither a folder nor a hub name that can be had.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(
            f"{name_or_folder} is a file; expected a checkpoint folder or a hub name"
        )
    if str(name_or_folder).count("/") != 1 or str(name_or_folder)[0] in "./~":
        raise FileNotFoundError(
            f"no folder {name_or_folder}, nor a hub name such as Qwen/Qwen2-VL-2B-Instruct"
        )
    from extras import hub

    return hub.snapshot(str(name_or_folder), weights)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: `model.safetensors`, or the shards that its index names."""
    names, index = ["model.safetensors"], "model.safetensors.index.json"
    if (folder / index).is_file():
        names = sorted(set(read_json(folder, index)["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}")
    return [folder / name for name in names]


# What config.json may hold beside the fields of our two classes: read under another name, or without effect here.
OTHER_FIELDS = {
    "text_config", "rope_parameters", "layer_types", "in_chans", "architectures", "auto_map", "dtype", "torch_dtype",
    "_name_or_path", "initializer_range", "model_type", "spatial_patch_size", "transformers_version", "use_cache",
    "vision_token_id",
}  # fmt: skip


def load_config(folder: str | Path) -> Config:
    """config.json → Config, from any of its three layouts.

    Flat (the hub): the decoder's fields stand at the top level. Flat with a `text_config` beside them (transformers
    4.57): some of them stand twice, and the flag for tied embeddings only inside. Nested (5.x): the decoder's
    fields only in `text_config`, rope in `rope_parameters`, the flag at the top level.
    Warns of each field that is not known. Raises FileNotFoundError or ValueError that name the file.
    """
    path = Path(folder) / "config.json"
    top = read_json(folder, path.name)
    if top.get("model_type") != "qwen2_vl":
        raise ValueError(f"{path}: model_type is {top.get('model_type')!r}, expected 'qwen2_vl'")
    text, vision = top.get("text_config") or {}, dict(top.get("vision_config") or {})
    merged = dict(text)
    merged.update((name, value) for name, value in top.items() if value is not None)
    rope = {"mrope_section": [16, 24, 24]}  # where the file has none, as in the reference
    rope |= merged.get("rope_scaling") or merged.get("rope_parameters") or {}
    merged["rope_theta"] = rope.pop("rope_theta", merged.get("rope_theta", Config.rope_theta))
    merged["rope_scaling"] = rope
    merged["tie_word_embeddings"] = any(part.get("tie_word_embeddings") for part in (top, text))
    vision.setdefault(
        "in_channels", vision.get("in_chans", VisionConfig.in_channels)
    )  # the hub has the older name
    parts = (
        (Config, top, ""),
        (Config, text, "text_config."),
        (VisionConfig, vision, "vision_config."),
    )
    for cls, part, at in parts:
        for name in sorted(part.keys() - OTHER_FIELDS - {f.name for f in fields(cls)}):
            warnings.warn(f"{path} holds an unknown field: {at}{name}", stacklevel=2)
    try:
        merged["vision_config"] = VisionConfig(**pick(VisionConfig, vision))
        config = Config(**pick(Config, merged))
        kinds = [
            "full" if config.window(i) is None else "sliding"
            for i in range(config.num_hidden_layers)
        ]
        if (types := merged.get("layer_types")) and types != [
            f"{kind}_attention" for kind in kinds
        ]:
            raise ValueError(
                f"layer_types is {types}, use_sliding_window and max_window_layers make it {kinds}"
            )
        if (theta := (vision.get("rope_parameters") or {}).get("rope_theta", 10000)) != 10000:
            raise ValueError(f"vision_config's rope_theta is {theta}, supported is 10000")
        return config
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def pick(cls: type, values: dict) -> dict:
    """The entries of `values` that are fields of the dataclass."""
    return {f.name: values[f.name] for f in fields(cls) if f.name in values}


def parameter_name(name: str) -> str:
    """A tensor's name in any layout → its name in the hub's layout, which is its name in `Qwen2VL`.

    transformers 5.x nests both halves under `model.`, and a save of its bare model has them at the top.
    """
    name = re.sub(r"^model\.(?=visual\.|language_model\.)", "", name)
    return re.sub(r"^language_model\.", "model.", name)


def load_model(
    name_or_folder: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None,
    attention: str = "auto", quantize: str | None = None,
) -> Qwen2VL:  # fmt: skip
    """The checkpoint as a model in eval mode.

    device: by default CUDA where there is one, else the CPU. dtype: by default that of the files.
    attention: "plain", "sdpa", "flash", or "auto": flash-attn where it is installed and can run, else sdpa.
    quantize: "int8" or "int4" keeps the decoder's weight matrices in so many bits.
    Raises FileNotFoundError, or ValueError that names every missing, extra or misshapen tensor.
    """
    folder = find_folder(name_or_folder)
    config, device = load_config(folder), find_device(device)
    shards = [open_shard(path) for path in weight_files(folder)]
    stored = {parameter_name(key): (shard, key) for shard in shards for key in shard.keys()}
    table = "model.embed_tokens.weight"
    if (
        config.tie_word_embeddings and "lm_head.weight" in stored
    ):  # one tensor serves both, under either name
        stored.setdefault(table, stored.pop("lm_head.weight"))

    with torch.device("meta"):
        model = Qwen2VL(config)
    parameters = dict(model.named_parameters())  # lists a tied head once, as the embedding
    check_tensors(folder, {name: list(p.shape) for name, p in parameters.items()}, stored)
    state = {name: shard.get_tensor(key).to(device, dtype) for name, (shard, key) in stored.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state[table]
    model.load_state_dict(state, assign=True)
    model.tie_weights()  # assigning has made two parameters of the one tensor
    model.visual.attention = model.model.attention = choose_attention(
        attention, device, state[table].dtype
    )
    if (folder / "generation_config.json").is_file():
        model.generation_config = read_json(folder, "generation_config.json")
    linear.swap(model, quantize)
    return model.eval()


def find_device(name: str | torch.device | None) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU. ValueError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch raises either, by device and build
        raise ValueError(
            f"the device {name} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    return device


def open_shard(path: Path) -> safe_open:
    """Maps a safetensors file into memory. Raises ValueError that names it if it is none."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def check_tensors(folder: Path, expected: dict[str, list[int]], stored: dict[str, tuple]) -> None:
    """Raises ValueError with one line for each tensor that is missing, not known, or of another shape."""
    problems = [
        f"missing: {name} {shape}" for name, shape in expected.items() if name not in stored
    ]
    for name, (shard, key) in stored.items():
        shape = shard.get_slice(key).get_shape()
        if name not in expected:
            problems.append(f"not part of this model: {key} {shape}")
        elif shape != expected[name]:
            problems.append(f"wrong shape: {key} is {shape}, config.json says {expected[name]}")
    if problems:
        raise ValueError(
            f"the tensors in {folder} do not fit its config.json:\n  " + "\n  ".join(problems)
        )


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolves "auto"; raises ValueError if flash-attn is asked for where it cannot run."""
    obstacle = None
    if importlib.util.find_spec("flash_attn") is None:
        obstacle = "the package flash-attn is not installed"
    elif device.type != "cuda":
        obstacle = f"it needs a CUDA device, this is {device}"
    elif dtype not in (torch.float16, torch.bfloat16):
        obstacle = f"it needs float16 or bfloat16, this is {dtype}"
    if wanted == "flash" and obstacle:
        raise ValueError(f"attention 'flash' cannot be used: {obstacle}")
    return wanted if wanted != "auto" else "sdpa" if obstacle else "flash"


def save_model(model: Qwen2VL, folder: str | Path) -> None:
    """Writes config.json (flat), generation_config.json if the model has one, and model.safetensors.

    The dtype is the model's own. With the tokenizer's files and preprocessor_config.json beside them, the folder
    loads here and in transformers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: p.detach().contiguous() for name, p in model.named_parameters()
    }  # a tied head only once
    save_file(
        state, folder / "model.safetensors", metadata={"format": "pt"}
    )  # transformers asks for the format
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
        **asdict(model.config),
    }
    files = {"config.json": config}
    if model.generation_config:
        files["generation_config.json"] = model.generation_config
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
