"""What trace and attention report share: a prompt in spans of text and media, with positions."""

import math
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from preprocess import Batch, Media, Processor
from qwen2vl import Config, get_rope_index


class Span(NamedTuple):
    """Tokens start … end - 1 of a prompt: text, or all tokens of one image or video."""

    name: str  # "text", "image 1", "video 1", ...
    start: int
    end: int
    media: Media | None = None


def split_prompt(batch: Batch, config: Config) -> list[Span]:
    """Return the spans of the prompt of a batch with one conversation, in order.

    Raises ValueError for several conversations, and if batch.media does not fit the placeholders.
    """
    if len(batch.input_ids) != 1:
        raise ValueError(f"expected one conversation, got a batch of {len(batch.input_ids)}")
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    counts = {"image": 0, "video": 0}
    remaining = list(batch.media)
    spans = []
    end = 0
    for kind, run in groupby(kinds.get(id, "text") for id in batch.input_ids[0].tolist()):
        start = end
        end += len(list(run))
        if kind == "text":
            spans.append(Span("text", start, end))
            continue
        if not remaining:
            raise ValueError(f"the placeholders from token {start} on belong to no image or video")
        media = remaining.pop(0)
        expected = math.prod(media.grid) // config.vision_config.spatial_merge_size**2
        if end - start != expected:
            raise ValueError(
                f"expected {expected} placeholders for {media.name}, "
                f"got {end - start} in the prompt"
            )
        counts[kind] += 1
        spans.append(Span(f"{kind} {counts[kind]}", start, end, media))
    if remaining:
        raise ValueError(f"{len(remaining)} images or videos have no placeholders in the prompt")
    return spans


def prompt_text(processor: Processor, batch: Batch, spans: list[Span]) -> str:
    """Return the prompt of the model, an image's placeholders as one ⟨image 1: 30 tokens⟩."""
    ids = batch.input_ids[0].tolist()
    pieces = []
    for span in spans:
        if span.media is None:
            text = processor.tokenizer.decode(ids[span.start : span.end], skip_special_tokens=False)
        else:
            text = f"⟨{span.name}: {span.end - span.start} tokens⟩"
        pieces.append(text)
    return "".join(pieces)


def get_positions(config: Config, batch: Batch, ids: list[int]) -> tuple[Tensor, int]:
    """Return the M-RoPE positions [3, S] of the ids of one conversation and its rope delta."""
    grids = [batch.image_grid_thw, batch.video_grid_thw]
    grids = [None if grid is None else torch.as_tensor(grid) for grid in grids]
    positions, rope_deltas = get_rope_index(config, torch.tensor([ids]), *grids)
    return positions[:, 0], int(rope_deltas)
