"""Attention of long sequences on the CPU, by oneDNN's matmuls in float32.

PyTorch's fused attention multiplies by MKL, which leaves AVX-512 unused on AMD's processors. Where
those have it in full width, two plain matmuls of oneDNN and a softmax take 0.55 to 0.6 of its time,
and are more exact than it is in 16 bits, as nothing is rounded in between. Measured in
benchmarks/README.md.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from linear import onednn_linear

LONG = 1024  # queries, from which on it pays
BLOCK = 512  # queries at a time, whose scores stay in the cache
CPU_INFO = Path("/proc/cpuinfo")


def is_faster_in_blocks(q: Tensor, k: Tensor) -> bool:
    """Return whether `block_attention` is to take the place of PyTorch's fused one.

    q [B, H, S, D], k [B, G, K, D]; without a mask.
    """
    return (
        q.device.type == "cpu"
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and min(q.shape[2], k.shape[2]) >= LONG
        and not torch.is_grad_enabled()
        and mkl_is_slow()
    )


@cache
def mkl_is_slow() -> bool:
    """Return whether oneDNN multiplies in float32 at twice the rate of MKL on this processor.

    That is so on AMD's with AVX-512 in full width, from Zen 5 on. On Zen 4, where it has half the
    width, the rates differ by 15 %. Known on Linux alone.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    try:
        lines = CPU_INFO.read_text().split("\n\n")[0].splitlines()  # of the first core
    except OSError:
        return False
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    family = fields.get("cpu family", "")
    is_zen5 = fields.get("vendor_id") == "AuthenticAMD" and family.isdigit() and int(family) >= 26
    return is_zen5 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def block_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Compute softmax(q kᵀ / √D) v, some queries of a head at a time.

    q [B, H, S, D]; k, v [B, G, K, D], each head shared by H / G query heads → [B, H, S, D].
    causal: query i sees keys 0 to i; S = K. Source: as of `qwen2vl.eager_attention`.
    """
    out = torch.empty_like(q)
    heads = q.shape[1]
    shared = heads // k.shape[1]
    for sequence in range(len(q)):
        for head in range(heads):
            keys = k[sequence, head // shared]
            values = v[sequence, head // shared]
            attend_one_head(q[sequence, head], keys, values, causal, out[sequence, head])
    return out


def attend_one_head(q: Tensor, k: Tensor, v: Tensor, causal: bool, out: Tensor) -> None:
    """Write the attention of one head into out: q, out [S, D]; k, v [K, D]."""
    queries = q.float() * q.shape[-1] ** -0.5
    keys = k.float().contiguous()
    values = v.float().T.contiguous()  # [D, K]
    for start in range(0, len(q), BLOCK):
        end = min(start + BLOCK, len(q))
        seen = end if causal else len(k)
        scores = onednn_linear(queries[start:end], keys[:seen], None)  # [block, seen]
        if causal:
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
            scores[:, start:].masked_fill_(future, -math.inf)
        weights = torch.softmax(scores, -1, out=scores)
        out[start:end] = onednn_linear(weights, values[:, :seen].contiguous(), None)
