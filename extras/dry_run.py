"""`generate.py --dry-run`: what a run would look at and how much memory it would take, without its weights.

Pictures, clips and prompts go through the Processor as in a real run, and what is counted is its Batch. Weights and
cache are the run's own, made on the meta device, where tensors have shapes and no memory. Activations are estimated:
the most that is alive at once while the prompt goes through the model, in elements of the run's dtype (b bytes) or of
the float32 that half precision is widened to here and there (w bytes). The larger of two peaks counts:

    vision tower  in an MLP b·N(3E + 3I): the block's input, that after attention, its norm, and three tensors of the
                  inner width; or turning a key b·6NE + w·3NE, and w·NE more in half precision; or in attention
                  b·10NE; beside cos and sin w·2ND, and the embedded prompt b·BSC
    prefill       in an MLP b·BS(4C + 3I): as above, and the embedded prompt; or turning a query b·BS(7C + 2GD);
                  or in attention b·BS·5C, plain b·BS·7C; or the logits; beside cos and sin b·2BSD

The kernels of sdpa and flash hold no scores. Plain attention holds each of the H scores of a pair of patches or
tokens two or three times: (b + w) bytes, in half precision (b + 2w); equal slices of a clip are attended at once,
others in turn. Padding adds masks of BS² bytes, and sdpa a copy of them in its dtype. Not counted: what kernels
borrow, and what Python, PyTorch and CUDA take for themselves, some hundred MB. On small models in float32, bfloat16
and float64 the estimate was 0.89 to 1.15 times what was measured.

Letters as in `qwen2vl.py`; I is the inner width of either MLP.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import linear
from extras import batch_file, command_line
from load_weights import checkpoint_dtype, choose_attention, empty_model, find_device, load_config
from preprocess import Batch, Processor
from qwen2vl import Config, KVCache, get_rope_index

Sizes = dict[str, tuple[int, str]]  # of what: bytes, and a remark


def run(
    arguments: argparse.Namespace, folder: Path, processor: Processor, batch: Batch | None
) -> None:
    """Prints to stdout what a run with these options takes; `batch` is the conversation to be answered.

    It is None with --chat, where the first message is counted, and with --batch, where every conversation of the file
    is, and memory is that of the group that takes most. Raises OSError or ValueError as a real run would.
    """
    config = load_config(folder)
    processor.check_model(config)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else checkpoint_dtype(folder)
    device = find_device(arguments.device)
    way = choose_attention(arguments.attention, device, dtype)
    most: Sizes = {}

    def read(messages: list) -> Batch:
        return processor(messages, add_vision_id=arguments.add_vision_id)

    def say(batch: Batch) -> None:
        print(
            *media_lines(batch, processor),
            *prompt_lines(batch, config, arguments.max_new_tokens),
            sep="\n",
        )

    def need(batch: Batch) -> Sizes:
        return memory(config, batch, arguments.max_new_tokens, dtype, way, device)

    def askable() -> Iterator[batch_file.Question]:
        for question in batch_file.questions(arguments, processor):
            error = question.record.get("error")
            print(f"line {question.record['line']}" + (f": {error}" if error else ""))
            if not error:
                say(read([question.messages]))
                yield question

    if arguments.batch:
        batch_file.check(arguments)
        for group in batch_file.groups(askable(), arguments.batch_size):
            if total(found := need(read([question.messages for question in group]))) > total(most):
                most, numbers = found, sorted(question.record["line"] for question in group)
        if most:
            print(f"the group that takes most memory: line {', '.join(map(str, numbers))}")
    else:
        if arguments.chat and (messages := command_line.first_messages(arguments)):
            batch = read(messages) if messages[-1]["role"] == "user" else None
        if batch is not None:
            say(batch)
            most = need(batch)
    if not most:
        print("there is no conversation to count")
    print("\n".join(memory_lines({"weights": weights(config, dtype, arguments.quantize)} | most)))


def media_lines(batch: Batch, processor: Processor) -> list[str]:
    """A table of the pictures and clips, with a heading if there are any."""
    config = processor.image_config
    table = (
        [("pixels", "frames", "resized", "grid (t×h×w)", "patches", "tokens", "")]
        if batch.media
        else []
    )
    for media in batch.media:
        (gt, gh, gw), side, patches = media.grid, config.patch_size, math.prod(media.grid)
        row = (
            f"{media.size[0]}×{media.size[1]}",
            len(media.timestamps or [0]),
            f"{gw * side}×{gh * side}",
        )
        table.append(
            (
                *row,
                f"{gt}×{gh}×{gw}",
                f"{patches:,}",
                f"{patches // config.merge_size**2:,}",
                media.name,
            )
        )
    return ["{:>11}{:>8}{:>11}{:>14}{:>10}{:>8}  {}".format(*row).rstrip() for row in table]


def prompt_lines(batch: Batch, config: Config, max_new_tokens: int) -> list[str]:
    """The tokens of one conversation's prompt by kind, and the positions that prompt and answer reach."""
    ids = torch.as_tensor(batch.input_ids)
    image, video = (int((ids == id).sum()) for id in (config.image_token_id, config.video_token_id))
    grids = [
        None if grid is None else torch.as_tensor(grid)
        for grid in (batch.image_grid_thw, batch.video_grid_thw)
    ]
    last = int(get_rope_index(config, ids, *grids)[0].max())
    reached, limit = last + max_new_tokens, config.max_position_embeddings
    beyond = f" (the model is made for {limit:,})" if reached >= limit else ""
    kinds = f"{ids.numel() - image - video:,} text, {image:,} image, {video:,} video"
    return [
        f"{'prompt':11}{ids.numel():12,} tokens: {kinds}",
        f"{'positions':11}{last + 1:12,} in the prompt, {reached + 1:,} with {max_new_tokens:,} new tokens{beyond}",
    ]


def weights(config: Config, dtype: torch.dtype, quantize: str | None = None) -> tuple[int, str]:
    """Return the bytes of the parameters of a run in this dtype, and a remark with their number."""
    model = empty_model(config).to(dtype)
    count = sum(p.numel() for p in model.parameters())  # a tied head once
    if quantize:
        linear.quantize_linears(model, quantize)
    name = str(dtype).removeprefix("torch.") + (
        f", the decoder's in {quantize}" if quantize else ""
    )
    return sum(p.nbytes for p in model.parameters()), f"{count / 1e6:,.1f} M parameters in {name}"


def memory(
    config: Config,
    batch: Batch,
    max_new_tokens: int,
    dtype: torch.dtype,
    way: str,
    device: torch.device,
) -> Sizes:
    """What a run holds beside the weights when it holds most."""
    rows, length = batch.input_ids.shape
    cache = KVCache(
        config, rows, length + max_new_tokens, torch.device("meta"), dtype
    )  # as in `generate.stream`
    sizes = {
        "cache": (
            cache.keys.nbytes + cache.values.nbytes,
            f"{rows} × {length + max_new_tokens:,} tokens",
        )
    }
    prefill = prefill_peak(config, rows, length, not batch.attention_mask.all(), dtype, way)
    if not batch.media:
        return sizes | {"activations": (prefill, f"of the prefill, {way} attention; an estimate")}
    given = [
        (batch.pixel_values, batch.image_grid_thw),
        (batch.pixel_values_videos, batch.video_grid_thw),
    ]
    given = [(pixels, grid) for pixels, grid in given if grid is not None]
    pixels = sum(pixels.nbytes for pixels, _ in given)
    copies = (2, "as read and as joined") if device.type == "cpu" else (1, "on the GPU")
    embedded = rows * length * config.hidden_size * dtype.itemsize
    vision = embedded + max(vision_peak(config, grid, dtype, way) for _, grid in given)
    peaks = f"vision tower {vision / 1e6:,.1f}, prefill {prefill / 1e6:,.1f}, {way} attention; an estimate"
    return sizes | {
        "pixels": (copies[0] * pixels, copies[1]),
        "activations": (max(vision, prefill), peaks),
    }


def total(sizes: Sizes) -> int:
    return sum(size for size, _ in sizes.values())


def memory_lines(sizes: Sizes) -> list[str]:
    sizes = sizes | {"sum": (total(sizes), "and what Python and PyTorch take themselves")}
    return [f"{what:11}{size / 1e6:12,.1f} MB  {remark}" for what, (size, remark) in sizes.items()]


def score_bytes(dtype: torch.dtype, way: str) -> int:
    """What attention holds for one score: itself, its softmax, and itself widened where that makes a copy."""
    b, w = dtype.itemsize, max(dtype.itemsize, 4)
    return b + w + w * (b < w) if way == "plain" else 0


def vision_peak(config: Config, grid_thw: np.ndarray, dtype: torch.dtype, way: str) -> int:
    """Bytes alive at once in the vision tower, beside its weights and the pixels."""
    vision, b, w = config.vision_config, dtype.itemsize, max(dtype.itemsize, 4)
    E, H, inner = vision.embed_dim, vision.num_heads, int(vision.embed_dim * vision.mlp_ratio)
    slices = [int(height * width) for t, height, width in grid_thw for _ in range(t)]
    N, together = sum(slices), len(slices) if len(set(slices)) == 1 else 1
    columns = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    mlp = b * N * (3 * E + 3 * inner)
    turning = b * 6 * N * E + w * (3 + (b < w)) * N * E
    attention = b * 10 * N * E + score_bytes(dtype, way) * H * together * max(slices) ** 2
    embedding = b * N * (E + columns * (b != 4))  # the pixels are float32
    return max(max(mlp, turning, attention) + w * 2 * N * E // H, embedding)


def prefill_peak(
    config: Config, rows: int, length: int, padded: bool, dtype: torch.dtype, way: str
) -> int:
    """Bytes alive at once in the decoder while it reads the prompt, beside its weights, its cache and the pixels."""
    b, w, C, D = dtype.itemsize, max(dtype.itemsize, 4), config.hidden_size, config.head_dim
    tokens, mask = rows * length, rows * length**2 * padded
    mlp = b * tokens * (4 * C + 3 * config.intermediate_size)
    turning = b * tokens * (7 * C + 2 * config.num_key_value_heads * D)
    attention = b * (tokens * 5 * C + mask)
    if way == "plain":
        attention = (
            b * tokens * 7 * C
            + score_bytes(dtype, way) * rows * config.num_attention_heads * length**2
        )
    logits = b * tokens * 2 * C + (b + w) * rows * config.vocab_size
    return max(mlp, turning, attention, logits) + b * tokens * 2 * D + mask
