"""`generate.py --report page.html`: one self-contained page that shows, word by word, what the answer looked at.

After the answer the model runs once more over prompt and answer together, and each layer's attention is worked out in
a hook for the rows that chose a word: the query that chose word i stands one token before it. This equals what the
cached steps computed, for a token sees only itself and what came before; it needs no other way of attention, changes
nothing in the model, and holds no S×S matrix: only the rows of the answer, and of these only the columns of pictures.

Size of the page: about one byte for each layer, head, word and picture token (0.6 to 1.3 measured: 8 bits, deflated,
in base64), and the pictures as PNG or JPEG. Beyond MOST weights the heads of a layer are stored as their mean, and if
that is not enough, the layers too; a warning says so. `report.html` is the page without its data.

Shapes: L layers, H heads, G key/value heads, D width of a head, S tokens of the prompt, A of the answer, T of the
pictures.
"""

from __future__ import annotations

import base64
import io
import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from extras.explain import prompt_text, runs
from preprocess import Batch, Grid, ImageConfig, Processor
from qwen2vl import Qwen2VL, apply_rotary_pos_emb, at_least_float32, get_rope_index
from tokenizer import StreamDecoder

TEMPLATE = Path(__file__).with_suffix(".html")
RUNNERS = 5  # most probable tokens shown for each word
MOST = 16_000_000  # attention weights in one page


@torch.inference_mode()
def look(model: Qwen2VL, batch: Batch, ids: list[int], columns: list[int]) -> tuple[Tensor, Tensor]:
    """What each token of the answer looked at, and what else it might have been.

    ids: the answer, A tokens; columns: the T tokens of the prompt that are asked about.
    → attention weights float32 [L, H, A, T] and logits [A, V], both on the CPU.
    """
    device, length = model.model.norm.weight.device, batch.input_ids.shape[1]
    arrays = batch.arrays().items()
    inputs = {
        name: torch.as_tensor(x, device=device) for name, x in arrays if name != "attention_mask"
    }
    answer = torch.tensor([ids[:-1]], dtype=torch.long, device=device)
    inputs["input_ids"] = torch.cat((inputs["input_ids"], answer), dim=1)  # [1, S + A - 1]
    rows = torch.arange(length - 1, length - 1 + len(ids), device=device)
    maps = []

    def hook(attention: nn.Module, arguments: tuple) -> None:
        x, cos, sin = arguments[:3]
        heads = (-1, attention.head_dim)
        q = attention.q_proj(x[:, rows]).unflatten(-1, heads).transpose(1, 2)  # [1, H, A, D]
        k = attention.k_proj(x).unflatten(-1, heads).transpose(1, 2)  # [1, G, S + A - 1, D]
        q, k = (
            apply_rotary_pos_emb(q, cos[:, :, rows], sin[:, :, rows]),
            apply_rotary_pos_emb(k, cos, sin),
        )
        scores = (
            q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * attention.head_dim**-0.5
        )
        query, key = rows[:, None], torch.arange(x.shape[1], device=device)
        window = model.config.window(attention.layer)
        hidden = (key > query) | (query - key >= (window or len(key)))
        weights = at_least_float32(scores.masked_fill(hidden, float("-inf"))).softmax(-1)
        maps.append(weights[0, :, :, columns].float().cpu())

    hooks = [layer.self_attn.register_forward_pre_hook(hook) for layer in model.model.layers]
    try:
        logits = model(**inputs, logits_to_keep=len(ids))[0]
    finally:
        for one in hooks:
            one.remove()
    return torch.stack(maps), logits.float().cpu()


def fit(weights: Tensor) -> Tensor:
    """Attention [L, H, A, T], or its mean [L, 1, A, T] or [1, 1, A, T], so that it has at most MOST numbers."""
    for axis, name in ((1, "heads"), (0, "layers")):
        if weights.numel() > MOST:
            warnings.warn(
                f"the page holds the mean of all {name}, as their attention would be too large",
                stacklevel=3,
            )
            weights = weights.mean(axis, keepdim=True)
    return weights


def pack(weights: Tensor) -> str:
    """Attention [L, H, A, T] → base64 of deflated bytes: each row's maximum as float32 [L, H, A], then uint8 shares
    of that maximum [L, H, A, T]. A weight is off by at most 1/510 of the largest in its row."""
    if not weights.shape[-1]:
        return ""
    largest = weights.amax(-1)  # [L, H, A]
    shares = (weights / largest[..., None].clamp(min=1e-30) * 255).round().to(torch.uint8)
    return base64.b64encode(
        zlib.compress(largest.numpy().tobytes() + shares.numpy().tobytes(), 9)
    ).decode()


def unpatchify(patches: np.ndarray, grid: Grid, config: ImageConfig) -> np.ndarray:
    """What `patchify` and `normalize` made, float32 [N, 3*tp*p*p] → the frames uint8 [gt*tp, H, W, 3] again."""
    (gt, gh, gw), tp, p, m = grid, config.temporal_patch_size, config.patch_size, config.merge_size
    x = patches.reshape(gt, gh // m, gw // m, m, m, 3, tp, p, p).transpose(
        0, 6, 1, 3, 7, 2, 4, 8, 5
    )
    x = x.reshape(gt * tp, gh * p, gw * p, 3)
    if config.do_normalize:
        x = x * np.float32(config.image_std) + np.float32(config.image_mean)
    if config.do_rescale:
        x = x / np.float32(config.rescale_factor)
    return x.round().clip(0, 255).astype(np.uint8)


def data_address(pixels: np.ndarray) -> str:
    """uint8 [H, W, 3] → a data: address, as PNG, or as JPEG where that is smaller (photographs)."""
    found = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90})):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind, **options)
        found.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(found)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def payload(model: Qwen2VL, processor: Processor, batch: Batch, ids: list[int]) -> dict:
    """All that the page shows, ready for JSON."""
    config, image_config, tokenizer = model.config, processor.image_config, processor.tokenizer
    parts, prompt = runs(batch, config), batch.input_ids[0].tolist()
    merge, tp = image_config.merge_size, image_config.temporal_patch_size
    columns = [i for run in parts if run.media for i in range(run.start, run.end)]
    weights, logits = look(model, batch, ids, columns)

    arrays = (np.array([prompt + ids]), batch.image_grid_thw, batch.video_grid_thw)
    positions = get_rope_index(
        config, *(None if x is None else torch.as_tensor(x) for x in arrays)
    )[0][:, 0]  # [3, S + A]

    def place(what: str, start: int, end: int) -> dict:
        """A row of the position table: tokens start … end - 1 and their first and last positions."""
        return {
            "what": what,
            "first": start,
            "count": end - start,
            "at": positions[:, [start, end - 1]].tolist(),
        }

    pictures, table = [], []
    for run in parts:
        if run.media is None:
            table += [
                place(tokenizer.decode([prompt[i]], False), i, i + 1)
                for i in range(run.start, run.end)
            ]
            continue
        (t, h, w), media = run.media.grid, run.media
        frames = unpatchify(media.patches, media.grid, image_config)
        rows, cols = h // merge, w // merge
        for n in range(t):
            name, token = run.name, run.start + n * rows * cols
            if media.timestamps is not None:
                seconds = media.timestamps[n * tp : (n + 1) * tp]
                name += f", {seconds[0]:.2f} s" + (
                    f" to {seconds[-1]:.2f} s" if len(seconds) > 1 else ""
                )
            table += [
                place(f"{name}, row {y + 1}", token + y * cols, token + (y + 1) * cols)
                for y in range(rows)
            ]
            pictures.append({
                "name": name, "file": media.name, "size": media.size, "rows": rows, "cols": cols, "merge": merge,
                "token": token, "first": columns.index(token), "src": data_address(frames[n * tp]),
            })  # fmt: skip

    words, decoder = [], StreamDecoder(tokenizer, skip_special_tokens=False)
    texts = [decoder.push(id) for id in ids]
    texts[-1] += decoder.finish()
    for n, (id, text, chances) in enumerate(zip(ids, texts, logits.softmax(-1), strict=True)):
        best = chances.topk(min(RUNNERS, len(chances)))
        runners = [
            [tokenizer.decode([i], False), p]
            for p, i in zip(*map(Tensor.tolist, best), strict=True)
        ]
        words.append({"text": text, "id": id, "chance": chances[id].item(), "runners": runners})
        table.append(place(text, len(prompt) + n, len(prompt) + n + 1))
    means, weights = weights.shape[:2], fit(weights)
    layers, heads = weights.shape[:2]
    return {
        "prompt": prompt_text(processor, batch, parts), "length": len(prompt), "words": words, "pictures": pictures,
        "positions": table, "layers": layers, "heads": heads, "means": means, "tokens": len(columns),
        "attention": pack(weights),
    }  # fmt: skip


def write(
    path: str | Path, model: Qwen2VL, processor: Processor, batch: Batch, ids: list[int]
) -> None:
    """Write the page for one conversation and its answer, the token ids `ids`.

    Raises ValueError for a batch of several conversations and for an answer without tokens, OSError where the file
    cannot be written.
    """
    if not ids:
        raise ValueError("a page needs an answer of at least one token, this one has none")
    # Inside a script element "</script>" would end it wherever it stood, a model's answer included.
    data = json.dumps(payload(model, processor, batch, ids), ensure_ascii=False).replace(
        "<", "\\u003c"
    )
    Path(path).write_text(
        TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data), encoding="utf-8"
    )
