"""Attention through the package flash-attn, for CUDA and half precision: the third way beside "plain" and "sdpa".

flash-attn takes all sequences end to end in one row, without their padding, and is told where each begins: picture
slices and the rows of a batch need no mask at all. What `qwen2vl.py` says with masks and slices is said here in its
terms. Source: arXiv 2307.08691; flash-attn 2, `flash_attn_varlen_func`.

Shapes: B rows, S new tokens, K all tokens so far, H query heads, G key/value heads, D width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_slices(slices: list[int], device: torch.device) -> dict:
    """Slices of these lengths, one after the other, that do not see each other."""
    cu_seqlens = F.pad(torch.tensor(slices).cumsum(0), (1, 0)).to(device, torch.int32)
    return {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": max(slices), "max_seqlen_k": max(slices)}  # fmt: skip


def pack_rows(
    x: Tensor,
    cached: int,
    attention_mask: Tensor | None,
    window: int | None = None,
    dropout: float = 0.0,
) -> dict:
    """The rows of x [B, S, C], whose tokens see themselves and those before them, at most `window`, but no padding.

    attention_mask [B, K] covers the `cached` tokens and the new ones; None: nothing is padded.
    """
    # "causal" aligns the last query with the last key; a window of -1 tokens before each one means all of them.
    packed = {
        "causal": True,
        "window_size": (-1 if window is None else window - 1, 0),
        "dropout_p": dropout,
    }
    ones = torch.ones(len(x), cached + x.shape[1], device=x.device, dtype=torch.int)
    real = ones if attention_mask is None else attention_mask
    for name, part in (("q", real[:, cached:]), ("k", real)):
        lengths = part.sum(1).int()
        packed[f"cu_seqlens_{name}"] = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        packed[f"max_seqlen_{name}"] = int(lengths.max())
        if attention_mask is not None:
            packed[f"real_{name}"] = part.flatten().nonzero()[
                :, 0
            ]  # where in a row of [B·S] no padding is
    return packed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real_q: Tensor | None = None,
    real_k: Tensor | None = None,
    **packed,
) -> Tensor:
    """softmax(q kᵀ / √D) v: q [B, H, S, D]; k, v [B, G, K, D] → [B, H, S, D]. Padding gives zeros."""
    from flash_attn import flash_attn_varlen_func

    rows, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B·S, H, D], [B·K, G, D]
    if real_q is None:
        out = flash_attn_varlen_func(rows, k, v, **packed)
    else:
        out = torch.zeros_like(rows)
        out[real_q] = flash_attn_varlen_func(rows[real_q], k[real_k], v[real_k], **packed)
    return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)
