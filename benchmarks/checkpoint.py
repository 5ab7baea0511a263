"""What is measured: random checkpoints of the model's shapes, the same inputs for both sides, and the work in them.

Random weights are as slow as trained ones, and need no download. The text they make means nothing, so it is the
logits of both sides that are compared.

Letters as in `qwen2vl.py`: B rows, S tokens of a row, K tokens that a step reads, C, E, H, G, D, V, N, T. A task is
what one call does: {"rows": the parts of each row, see `make_batch`, "new_tokens": how many are made}.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preprocess import Batch
    from qwen2vl import Config

ROOT = Path(__file__).resolve().parent.parent

# The decoder and the vision tower of Qwen2-VL-2B, as its config.json has them.
CONFIG_2B = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}  # fmt: skip
VISION_2B = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536}
# "thin": layers of the 2B model's widths, but few of them: cost grows with tokens as in the whole.
SHAPES = {
    "2b": (CONFIG_2B, VISION_2B),
    "thin": (CONFIG_2B | {"num_hidden_layers": 4}, VISION_2B | {"depth": 4}),
    "tiny": None,  # the bundled checkpoint
}


def model_config(shapes: str) -> Config:
    """The configuration of a random checkpoint: "2b" or "thin"."""
    from qwen2vl import Config, VisionConfig

    text, vision = SHAPES[shapes]
    return Config(**text, vision_config=VisionConfig(**vision))


def cache_folder() -> Path:
    """Where large files are kept between runs, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen2-vl-benchmarks"


def find_checkpoint(shapes: str) -> Path:
    """The checkpoint folder of these shapes, made on first use in the user's cache folder (2b: 4.4 GB)."""
    if SHAPES[shapes] is None:
        return ROOT / "tiny" / "checkpoint"
    folder = cache_folder() / f"random-{shapes}"
    if not folder.is_dir():
        print(f"making a random checkpoint once: {folder}", file=sys.stderr, flush=True)
        unfinished = folder.with_name(
            f"{folder.name}-{os.getpid()}"
        )  # a stop must not leave half a checkpoint
        make_checkpoint(model_config(shapes), unfinished)
        unfinished.rename(folder)
    return folder


def make_checkpoint(config: Config, folder: Path) -> None:
    """Random bfloat16 weights that keep activations of order one, with the published vocabulary, in hub layout."""
    import torch

    from load_weights import save_model
    from qwen2vl import Qwen2VL

    with torch.device("meta"):
        model = Qwen2VL(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:  # biases, and the weights of norms
                parameter.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    save_model(model, folder)
    sys.path.append(str(ROOT / "tests"))
    from real_vocabulary import build_tokenizer

    build_tokenizer(folder)
    shutil.copy(ROOT / "tiny" / "checkpoint" / "preprocessor_config.json", folder)


# ------------------------------------------------------------------------------------------------------- inputs
def tasks(shapes: str) -> dict[str, dict]:
    """The questions that are measured. A picture of 736 tokens among 32 of text; short texts side by side; a film;
    and as many words as the picture's prompt has tokens, which is what llama.cpp is asked."""
    if shapes == "tiny":
        # A trained model is asked what it knows: after random words what it says turns on the smallest rounding.
        from benchmarks.workers import PROMPT
        from tokenizer import Tokenizer

        tokenizer, (before, after) = (
            Tokenizer.from_pretrained(find_checkpoint("tiny")),
            PROMPT.split("{}"),
        )
        before, after = (
            ("ids", *tokenizer.encode(text)) for text in (before, "Describe the image." + after)
        )
        picture = ("image", 1, 4, 6)
        row = [before, picture, after]
        sizes = {"picture": picture, "video": ("video", 2, 4, 4), "row": row, "rows": 2, "new": 4}
    else:
        before, after = 10, 20
        # 16 frames are 8 slices, here of 336×224 pixels: as many tokens as the picture has, about.
        sizes = {
            "picture": ("image", 1, 23, 32),
            "video": ("video", 8, 8, 12),
            "row": [96],
            "rows": 8,
            "new": 32,
        }
    return {
        # The first new token comes with the prefill.
        "picture": {"rows": [[before, sizes["picture"], after]], "new_tokens": sizes["new"] + 1},
        "batch": {"rows": [sizes["row"]] * sizes["rows"], "new_tokens": sizes["new"] + 1},
        "video": {"rows": [[before, sizes["video"], after]], "new_tokens": 1},
        "llama": {"rows": [[32 + math.prod(sizes["picture"][1:])]], "new_tokens": sizes["new"] + 1},
    }


def make_batch(config: Config, rows: list[list], seed: int = 0) -> Batch:
    """Random inputs, the same for both sides. A part of a row is a number (that many tokens of text), tokens of text,
    ("ids", the first, the second, ...), or a picture or clip, ("image" or "video", slices in time, height, width in
    tokens), which also has a token before and after it.

    All rows must come out equally long: padding is a matter of its own.
    """
    import numpy as np

    from preprocess import Batch

    pick, vision = np.random.default_rng(seed), config.vision_config
    merge, columns = (
        vision.spatial_merge_size,
        vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
    )
    words = min(
        config.vision_start_token_id,
        config.image_token_id,
        config.bos_token_id or config.vocab_size,
    )
    ids, grids, pixels = [], {"image": [], "video": []}, {"image": [], "video": []}
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, int):
                ids[-1] += pick.integers(words, size=part).tolist()
                continue
            if part[0] == "ids":
                ids[-1] += part[1:]
                continue
            kind, t, h, w = part
            placeholder = config.image_token_id if kind == "image" else config.video_token_id
            ids[-1] += [
                config.vision_start_token_id,
                *[placeholder] * (t * h * w),
                config.vision_end_token_id,
            ]
            grids[kind].append((t, h * merge, w * merge))
            pixels[kind].append(
                pick.normal(size=(t * h * w * merge**2, columns)).astype(np.float32)
            )
    if len({len(row) for row in ids}) != 1:
        raise ValueError(
            f"the rows of a task must be equally long, these have {[len(row) for row in ids]} tokens"
        )
    batch = Batch(
        input_ids=np.array(ids), attention_mask=np.ones((len(ids), len(ids[0])), dtype=np.int64)
    )
    if grids["image"]:
        batch.pixel_values, batch.image_grid_thw = (
            np.concatenate(pixels["image"]),
            np.array(grids["image"]),
        )
    if grids["video"]:
        batch.pixel_values_videos, batch.video_grid_thw = (
            np.concatenate(pixels["video"]),
            np.array(grids["video"]),
        )
    return batch


def part_size(part) -> int:
    """Tokens of a part of a row."""
    if isinstance(part, int):
        return part
    return len(part) - 1 if part[0] == "ids" else math.prod(part[1:]) + 2


# ----------------------------------------------------------------------------------------------------- the work
# What cannot be avoided: multiplications and additions of the products and of attention (a causal one only where it
# looks), and bytes of weights and cache that have to be read. Norms, rope and activations are not counted.
def task_size(task: dict) -> tuple[int, int, list[tuple]]:
    """B, S and the pictures and clips [(slices, height, width in tokens)] of a task."""
    parts = [part for row in task["rows"] for part in row if not isinstance(part, int)]
    media = [part[1:] for part in parts if part[0] != "ids"]
    return len(task["rows"]), sum(map(part_size, task["rows"][0])), media


def vision_work(config: Config, media: list[tuple], itemsize: float) -> tuple[float, float]:
    """FLOP and bytes of the vision tower."""
    vision, merged = config.vision_config, config.vision_config.spatial_merge_size**2
    E, inner = vision.embed_dim, int(vision.embed_dim * vision.mlp_ratio)
    T = sum(math.prod(grid) for grid in media)
    columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    block, merger = 4 * E**2 + 2 * E * inner, (merged * E) ** 2 + merged * E * vision.hidden_size
    attention = sum(4 * E * t * (h * w * merged) ** 2 for t, h, w in media)
    flop = (
        2 * T * merged * (columns * E + vision.depth * block)
        + 2 * T * merger
        + vision.depth * attention
    )
    return flop, itemsize * (columns * E + vision.depth * block + merger)


def decoder_work(
    config: Config, rows: int, new: int, cached: int, itemsize: float
) -> tuple[float, float]:
    """FLOP and bytes of the decoder for `new` tokens a row behind `cached` ones, with the scores of the last.

    itemsize: bytes of a weight, and, if they are two at least, of a cached number: the cache is never quantised.
    """
    C, shared = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * C**2 + 2 * C * shared + 3 * C * config.intermediate_size
    looks = new * cached + new * (new + 1) / 2
    weights = config.num_hidden_layers * layer + C * config.vocab_size
    flop = 2 * rows * (new * config.num_hidden_layers * layer + C * config.vocab_size)
    flop += config.num_hidden_layers * 4 * C * rows * looks
    return flop, itemsize * weights + max(
        itemsize, 2
    ) * config.num_hidden_layers * 2 * rows * cached * shared


def products(config: Config, task: dict) -> dict[str, list[tuple[int, int, int, int]]]:
    """(how often, N, in, out) of the large products of an answer to a picture, in vision tower and decoder."""
    vision, (_, S, media) = config.vision_config, task_size(task)
    E, C, merged = vision.embed_dim, config.hidden_size, vision.spatial_merge_size**2
    T, shared = sum(math.prod(grid) for grid in media), config.num_key_value_heads * config.head_dim
    N, inner, wide = T * merged, int(E * vision.mlp_ratio), config.intermediate_size
    blocks = [(1, N, E, 3 * E), (1, N, E, E), (1, N, E, inner), (1, N, inner, E)]
    layers = [(2, S, C, C), (2, S, C, shared), (1, S, wide, C), (2, S, C, wide)]
    return {
        "vision": [(vision.depth * count, *shape) for count, *shape in blocks]
        + [(1, T, merged * E, merged * E), (1, T, merged * E, C)],
        "decoder": [(config.num_hidden_layers * count, *shape) for count, *shape in layers],
    }


def held_bytes(config: Config, rows: int, tokens: int, itemsize: float) -> float:
    """Bytes of all weights and of a cache of so many tokens a row. Below two, itemsize is the decoder's weights'."""
    import torch

    from qwen2vl import KVCache, Qwen2VL

    with torch.device("meta"):
        cache, model = KVCache(config, rows, tokens), Qwen2VL(config)
    numbers = (
        sum(p.numel() for p in model.visual.parameters())
        + cache.keys.numel()
        + cache.values.numel()
    )
    decoder = sum(
        p.numel() for name, p in model.named_parameters() if not name.startswith("visual.")
    )
    return itemsize * decoder + max(itemsize, 2) * numbers
