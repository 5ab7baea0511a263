"""The inputs of the benchmarks: random checkpoints of the model's shapes, tasks, and their work.

Random weights are as slow as trained ones and need no download. The text they generate means
nothing, so the logits of both sides are compared.

Letters as in `qwen2vl.py`: B sequences, S tokens of a sequence, K tokens that a step reads, C, E,
H, G, D, V, N, T. A task is what one call does: {"rows": the parts of each sequence, see
`make_batch`, "new_tokens": how many are generated}.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from benchmarks.protocol import PROMPT
from load_weights import save_model
from preprocess import Batch
from qwen2vl import Config, KVCache, Qwen2VL, VisionConfig
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent

# The decoder and the vision encoder of Qwen2-VL-2B, as in its config.json.
CONFIG_2B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
VISION_2B = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "hidden_size": 1536}
# "thin": a few layers of the 2B model's widths. Cost grows with tokens as in the whole model.
SHAPES = {
    "2b": (CONFIG_2B, VISION_2B),
    "thin": (CONFIG_2B | {"num_hidden_layers": 4}, VISION_2B | {"depth": 4}),
    "tiny": None,  # the bundled checkpoint
}


def model_config(shapes: str) -> Config:
    """Return the configuration of a random checkpoint: "2b" or "thin"."""
    text, vision = SHAPES[shapes]
    return Config(**text, vision_config=VisionConfig(**vision))


def cache_folder() -> Path:
    """Return the directory in the user's cache that keeps large files between runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qwen2-vl-benchmarks"


def find_checkpoint(shapes: str) -> Path:
    """Return the checkpoint directory of these shapes; it is made on first use (2b: 4.4 GB)."""
    if SHAPES[shapes] is None:
        return ROOT / "tiny" / "checkpoint"
    folder = cache_folder() / f"random-{shapes}"
    if not folder.is_dir():
        print(f"making a random checkpoint once: {folder}", file=sys.stderr, flush=True)
        # A stop must not leave half a checkpoint.
        unfinished = folder.with_name(f"{folder.name}-{os.getpid()}")
        make_checkpoint(model_config(shapes), unfinished)
        unfinished.rename(folder)
    return folder


def make_checkpoint(config: Config, folder: Path) -> None:
    """Write random weights, a tokenizer and image settings."""
    write_random_weights(config, folder)
    write_tokenizer(folder)
    shutil.copy(ROOT / "tiny" / "checkpoint" / "preprocessor_config.json", folder)


def write_random_weights(config: Config, folder: Path) -> None:
    """Write random bfloat16 weights that keep activations of order one."""
    with torch.device("meta"):
        model = Qwen2VL(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(mean=0.0, std=0.2)
            else:  # the weight of a norm
                parameter.normal_(mean=1.0, std=0.2)
    save_model(model, folder)


def write_tokenizer(folder: Path) -> None:
    """Write the published tokenizer with `tests/real_vocabulary.py`, which is in no package."""
    path = ROOT / "tests" / "real_vocabulary.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    real_vocabulary = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(real_vocabulary)
    real_vocabulary.build_tokenizer(folder)


# ------------------------------------------------------------------------------------------- inputs


def tasks(shapes: str) -> dict[str, dict]:
    """Return the tasks: an image, a batch of short texts, a video, and text for llama.cpp.

    The image has 736 tokens among 32 of text, and llama.cpp gets as many tokens of text.
    """
    if shapes == "tiny":
        return tiny_tasks()
    image = ("image", 1, 23, 32)
    video = ("video", 8, 8, 12)  # 16 frames of 336×224 pixels: 8 slices, about as many tokens
    return {
        # The first new token is that of the prefill.
        "image": {"rows": [[10, image, 20]], "new_tokens": 33},
        "batch": {"rows": [[96]] * 8, "new_tokens": 33},
        "video": {"rows": [[10, video, 20]], "new_tokens": 1},
        "llama": {"rows": [[32 + 23 * 32]], "new_tokens": 33},
    }


def tiny_tasks() -> dict[str, dict]:
    """Return small tasks with the question that the bundled model was trained to answer.

    After random tokens the answer of a trained model depends on the smallest rounding.
    """
    tokenizer = Tokenizer.from_pretrained(find_checkpoint("tiny"))
    before, after = PROMPT.split("{}")
    before = ("ids", *tokenizer.encode(before))
    after = ("ids", *tokenizer.encode("Describe the image." + after))
    image = ("image", 1, 4, 6)
    video = ("video", 2, 4, 4)
    return {
        "image": {"rows": [[before, image, after]], "new_tokens": 5},
        "batch": {"rows": [[before, image, after]] * 2, "new_tokens": 5},
        "video": {"rows": [[before, video, after]], "new_tokens": 1},
        "llama": {"rows": [[32 + 4 * 6]], "new_tokens": 5},
    }


class BatchBuilder:
    """Random inputs, drawn part by part."""

    def __init__(self, config: Config, seed: int):
        self.config = config
        self.rng = np.random.default_rng(seed)
        self.grids = {"image": [], "video": []}
        self.pixels = {"image": [], "video": []}
        vision = config.vision_config
        self.merge = vision.spatial_merge_size
        self.columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        # Ordinary tokens have ids below those of all special tokens.
        self.ordinary_ids = min(
            config.vision_start_token_id,
            config.image_token_id,
            config.bos_token_id or config.vocab_size,
        )

    def ids(self, part: int | tuple) -> list[int]:
        """Return the token ids of a part; the patches of an image or a video are kept."""
        if isinstance(part, int):
            return self.rng.integers(self.ordinary_ids, size=part).tolist()
        if part[0] == "ids":
            return list(part[1:])
        kind, t, h, w = part
        self.grids[kind].append((t, h * self.merge, w * self.merge))
        patches = self.rng.normal(size=(t * h * w * self.merge**2, self.columns))
        self.pixels[kind].append(patches.astype(np.float32))
        config = self.config
        pad = config.image_token_id if kind == "image" else config.video_token_id
        return [config.vision_start_token_id, *[pad] * (t * h * w), config.vision_end_token_id]


def make_batch(config: Config, rows: list[list], seed: int = 0) -> Batch:
    """Return random inputs, the same for all sides.

    A part of a sequence is a number (of random text tokens), ("ids", first, second, ...), or an
    image or a video: ("image" or "video", temporal slices, height, width in tokens), which also has
    a token before and after it. Raises ValueError if the sequences differ in length: padding is not
    measured.
    """
    builder = BatchBuilder(config, seed)
    sequences = []
    for parts in rows:
        sequences.append([token for part in parts for token in builder.ids(part)])
    lengths = [len(ids) for ids in sequences]
    if len(set(lengths)) != 1:
        raise ValueError(f"expected sequences of equal length, got {lengths} tokens")
    input_ids = np.array(sequences)
    batch = Batch(input_ids=input_ids, attention_mask=np.ones_like(input_ids, dtype=np.int64))
    if builder.grids["image"]:
        batch.pixel_values = np.concatenate(builder.pixels["image"])
        batch.image_grid_thw = np.array(builder.grids["image"])
    if builder.grids["video"]:
        batch.pixel_values_videos = np.concatenate(builder.pixels["video"])
        batch.video_grid_thw = np.array(builder.grids["video"])
    return batch


def part_size(part: int | tuple) -> int:
    """Return the number of tokens of a part of a sequence."""
    if isinstance(part, int):
        return part
    if part[0] == "ids":
        return len(part) - 1
    return math.prod(part[1:]) + 2


# --------------------------------------------------------------------------------------------- work
# What no implementation can avoid: multiplications and additions of the matmuls and of attention (a
# causal one only where it attends), and bytes of weights and cache that have to be read. Norms,
# RoPE and activations are not counted.


def task_size(task: dict) -> tuple[int, int, list[tuple]]:
    """Return B, S and the images and videos [(slices, height, width in tokens)] of a task."""
    media = []
    for parts in task["rows"]:
        for part in parts:
            if not isinstance(part, int) and part[0] != "ids":
                media.append(part[1:])
    return len(task["rows"]), sum(part_size(part) for part in task["rows"][0]), media


def vision_work(config: Config, media: list[tuple], itemsize: float) -> tuple[float, float]:
    """Return FLOP and bytes of the vision encoder."""
    vision = config.vision_config
    merged = vision.spatial_merge_size**2
    E = vision.embed_dim
    inner = int(E * vision.mlp_ratio)
    T = sum(math.prod(grid) for grid in media)
    N = T * merged
    patch_embed = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * E
    blocks = vision.depth * (4 * E**2 + 2 * E * inner)
    merger = (merged * E) ** 2 + merged * E * vision.hidden_size
    attention = vision.depth * sum(4 * E * t * (h * w * merged) ** 2 for t, h, w in media)
    flop = 2 * N * (patch_embed + blocks) + 2 * T * merger + attention
    return flop, itemsize * (patch_embed + blocks + merger)


def decoder_work(
    config: Config, rows: int, new: int, cached: int, itemsize: float
) -> tuple[float, float]:
    """Return FLOP and bytes of the decoder for `new` tokens per sequence behind `cached` ones.

    Logits are computed for the last token only. itemsize: bytes of a weight, and, if at least two,
    of a cached number: the cache is never quantized.
    """
    C = config.hidden_size
    L = config.num_hidden_layers
    kv_width = config.num_key_value_heads * config.head_dim
    layer = 2 * C**2 + 2 * C * kv_width + 3 * C * config.intermediate_size
    lm_head = C * config.vocab_size
    attended = new * cached + new * (new + 1) / 2  # query-key pairs of a sequence
    flop = 2 * rows * (new * L * layer + lm_head) + L * 4 * C * rows * attended
    cache = L * 2 * rows * cached * kv_width
    return flop, itemsize * (L * layer + lm_head) + max(itemsize, 2) * cache


def products(config: Config, task: dict) -> dict[str, list[tuple[int, int, int, int]]]:
    """Return (count, N, in, out) of the large matmuls, of vision encoder and decoder."""
    _, S, media = task_size(task)
    vision = config.vision_config
    E = vision.embed_dim
    E_inner = int(E * vision.mlp_ratio)
    merged_width = E * vision.spatial_merge_size**2
    T = sum(math.prod(grid) for grid in media)
    N = T * vision.spatial_merge_size**2
    C = config.hidden_size
    C_inner = config.intermediate_size
    kv_width = config.num_key_value_heads * config.head_dim
    return {
        "vision": [
            (vision.depth, N, E, 3 * E),
            (vision.depth, N, E, E),
            (vision.depth, N, E, E_inner),
            (vision.depth, N, E_inner, E),
            (1, T, merged_width, merged_width),
            (1, T, merged_width, C),
        ],
        "decoder": [
            (2 * config.num_hidden_layers, S, C, C),
            (2 * config.num_hidden_layers, S, C, kv_width),
            (config.num_hidden_layers, S, C_inner, C),
            (2 * config.num_hidden_layers, S, C, C_inner),
        ],
    }


def held_bytes(config: Config, rows: int, tokens: int, itemsize: float) -> float:
    """Return the bytes of all weights and of a cache of so many tokens per sequence.

    An itemsize below two is that of the decoder's weights alone.
    """
    with torch.device("meta"):
        cache = KVCache(config, rows, tokens)
        model = Qwen2VL(config)
    encoder = sum(weight.numel() for weight in model.visual.parameters())
    decoder = sum(weight.numel() for weight in model.parameters()) - encoder
    not_quantized = encoder + cache.keys.numel() + cache.values.numel()
    return itemsize * decoder + max(itemsize, 2) * not_quantized
