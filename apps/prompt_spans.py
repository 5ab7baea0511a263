"""What trace and attention report share: a prompt in spans of text and media."""

import math
from collections import Counter
from typing import NamedTuple

from preprocess import Batch, Media, Processor
from qwen2vl import Config


class Span(NamedTuple):
    """Tokens start … end - 1 of a prompt: text, or all tokens of one image or video."""

    name: str  # "text", "image 1", "video 1", ...
    start: int
    end: int
    media: Media | None = None


def split_prompt(batch: Batch, config: Config) -> list[Span]:
    """Return the spans of the prompt, in order. Raises ValueError for several conversations."""
    if len(batch.input_ids) != 1:
        raise ValueError(f"expected one conversation, got a batch of {len(batch.input_ids)}")
    ids = batch.input_ids[0].tolist()
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    counts: Counter[str] = Counter()
    spans = []
    end = 0
    for media in batch.media:
        start = next(i for i in range(end, len(ids)) if ids[i] in kinds)
        if start > end:
            spans.append(Span("text", end, start))
        kind = kinds[ids[start]]
        counts[kind] += 1
        end = start + math.prod(media.grid) // config.vision_config.spatial_merge_size**2
        spans.append(Span(f"{kind} {counts[kind]}", start, end, media))
    spans.append(Span("text", end, len(ids)))
    return spans


def prompt_text(processor: Processor, batch: Batch, spans: list[Span]) -> str:
    """Return the prompt of the model, an image's placeholders as one ⟨image 1: 30 tokens⟩."""
    pieces = []
    for span in spans:
        text = f"⟨{span.name}: {span.end - span.start} tokens⟩"
        if span.media is None:
            ids = batch.input_ids[0, span.start : span.end]
            text = processor.tokenizer.decode(ids, skip_special_tokens=False)
        pieces.append(text)
    return "".join(pieces)
