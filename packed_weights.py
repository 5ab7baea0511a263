"""Quantized weights as checkpoints pack them: which tensors a layer has, and what they mean.

A linear layer has a weight W [out, in]. Quantized, it consists of integers q in groups of inputs
that share a zero point z and a scale s for each output:

    W[o, i] = (q[o, i] - z[o, g]) · s[o, g],    with g the group of input i

Integers of 4 or 8 bits share an int32, the first of them in its lowest bits:

                  AWQ                            GPTQ
    qweight       int32 [in, out / 8]            int32 [in · bits / 32, out]
    qzeros        int32 [groups, out / 8]        int32 [groups, out · bits / 32]
    scales        [groups, out]                  [groups, out]
    g_idx                                        int32 [in]: the group of each input

AWQ (4 bits) packs along the outputs, the eight of an int32 in the order 0, 2, 4, 6, 1, 3, 5, 7.
GPTQ packs qweight along the inputs and qzeros along the outputs. With "act-order" (`desc_act`)
its groups are not neighbors: `g_idx` alone knows them. Its first format, "gptq", stores z - 1 and
the second, "gptq_v2", z.

Sources: arXiv 2306.00978 (AWQ) and 2210.17323 (GPTQ); AutoAWQ 0.2.9, `WQLinear_GEMM`; gptqmodel
7.7.0, `TorchLinear` and `convert_gptq_v1_to_v2_format_module`.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each 4 bits of an int32 are for
# One in each place of 4 or 8 bits of an int32.
ONES = {4: 0x11111111, 8: 0x01010101}


class Unpacked(NamedTuple):
    """The integers of a layer, or of some of its outputs."""

    numbers: Tensor  # uint8 [out, in]
    zeros: Tensor  # uint8 [out, groups]
    scales: Tensor  # floating point [out, groups]


class Grouping(NamedTuple):
    """What GPTQ's config.json specifies about the integers of a layer."""

    bits: int
    group_size: int  # -1: all inputs of a layer
    symmetric: bool  # every zero point is in the middle
    act_order: bool  # the inputs of a group are not neighbors


# ----------------------------------------------------------------------------- integers in an int32
def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """Return the integers of 4 or 8 bits in int32 [n, m] as uint8 [n, m · 32 / bits].

    The lowest bits come first, which on a little-endian processor is the order of the bytes.
    """
    as_bytes = copy_in_order(packed).view(torch.uint8)
    if bits == 8:
        return as_bytes
    return torch.stack((as_bytes & 15, as_bytes >> 4), dim=2).flatten(1)


def pack_int32(numbers: Tensor, bits: int) -> Tensor:
    """Return uint8 [n, m · 32 / bits] as int32 [n, m], the inverse of `unpack_int32`."""
    if bits == 4:
        numbers = numbers[:, ::2] | numbers[:, 1::2] << 4
    return copy_in_order(numbers).view(torch.int32)


def copy_in_order(x: Tensor) -> Tensor:
    """Return a copy in memory order; `contiguous` leaves the strides of a dimension of one."""
    return x.clone(memory_format=torch.contiguous_format)


def add_to_packed(packed: Tensor, bits: int, number: int) -> Tensor:
    """Return int32 with 1 or -1 added in each place, carries included.

    The carries matter: a zero point of 0, minus one, borrows from its neighbor. gptqmodel adds and
    subtracts whole int32 in the same way.
    """
    return packed + number * ONES[bits]  # wraps around, as int32 do in PyTorch


# ------------------------------------------------------------------------------------------ layouts
@dataclass(frozen=True)
class Packing:
    """How a checkpoint packs its linear layers."""

    method: str  # "AWQ" or "GPTQ"
    bits: int  # 4 or 8
    group_size: int  # inputs of a group; -1: all inputs of a layer
    stores_zero_minus_one: bool = False
    has_g_idx: bool = False
    act_order: bool = False  # groups are not neighbors
    symmetric: bool = False  # every zero point is in the middle

    @property
    def name(self) -> str:
        return f"{self.method} ({self.bits} bits)"

    def count_groups(self, inputs: int) -> int:
        """Return the number of groups of so many inputs, the last of which may be smaller."""
        return 1 if self.group_size == -1 else math.ceil(inputs / self.group_size)

    def shapes(self, inputs: int, outputs: int) -> dict[str, list[int]]:
        """Return the shape of each tensor of a layer.

        Raises ValueError for widths that do not fill whole int32.
        """
        check_widths(inputs, outputs, self.bits)
        places = 32 // self.bits
        groups = self.count_groups(inputs)
        shapes = {"qzeros": [groups, outputs // places], "scales": [groups, outputs]}
        if self.method == "AWQ":
            return {"qweight": [inputs, outputs // places], **shapes}
        shapes = {"qweight": [inputs // places, outputs], **shapes}
        if self.has_g_idx:
            shapes["g_idx"] = [inputs]
        return shapes

    def group_of_inputs(self, inputs: int, tensors: dict[str, Tensor]) -> Tensor:
        """Return the group of each input, int64 [in]."""
        if "g_idx" in tensors:
            return tensors["g_idx"].long()
        size = inputs if self.group_size == -1 else self.group_size
        return torch.arange(inputs, device=tensors["scales"].device) // size

    def unpack(self, tensors: dict[str, Tensor], start: int, stop: int) -> Unpacked:
        """Return the integers of the outputs from start to stop, multiples of 8 or the end."""
        scales = tensors["scales"][:, start:stop].T
        zeros = self.unpack_zeros(tensors, start, stop)
        if self.method == "AWQ":
            places = 32 // self.bits
            words = tensors["qweight"][:, start // places : stop // places]
            return Unpacked(awq_outputs(unpack_int32(words, self.bits)), zeros, scales)
        words = tensors["qweight"][:, start:stop].T
        return Unpacked(unpack_int32(words, self.bits), zeros, scales)

    def unpack_zeros(self, tensors: dict[str, Tensor], start: int, stop: int) -> Tensor:
        """Return the zero points of the outputs from start to stop, uint8 [n, groups]."""
        places = 32 // self.bits
        qzeros = tensors["qzeros"][:, start // places : stop // places]
        if self.stores_zero_minus_one:
            qzeros = add_to_packed(qzeros, self.bits, 1)
        zeros = unpack_int32(qzeros, self.bits)
        return awq_outputs(zeros) if self.method == "AWQ" else zeros.T


def check_widths(inputs: int, outputs: int, bits: int) -> None:
    """Raise ValueError for a layer whose integers do not fill whole int32."""
    places = 32 // bits
    if inputs % places or outputs % places:
        raise ValueError(
            f"integers of {bits} bits need widths in multiples of {places}, got {inputs} inputs "
            f"and {outputs} outputs"
        )


def awq_outputs(columns: Tensor) -> Tensor:
    """Return AWQ's unpacked integers [n, out] as [out, n], with the outputs in their order."""
    places = torch.tensor(AWQ_ORDER, device=columns.device).argsort()
    return columns.unflatten(1, (-1, 8))[:, :, places].flatten(1).T.contiguous()


def dequantize(unpacked: Unpacked, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weights [out, in]; groups: that of each input. They are rounded once, to dtype."""
    numbers, zeros, scales = unpacked
    exact = torch.promote_types(dtype, torch.float32)
    steps = numbers.to(exact) - zeros[:, groups].to(exact)
    return (steps * scales[:, groups].to(exact)).to(dtype)


def pack_gptq(unpacked: Unpacked, groups: Tensor, bits: int) -> dict[str, Tensor]:
    """Return a layer's tensors in GPTQ's first format, which every reader of GPTQ knows.

    groups: that of each input [in]. Raises ValueError for widths that do not fill whole int32.
    """
    numbers, zeros, scales = unpacked
    check_widths(numbers.shape[1], numbers.shape[0], bits)
    qzeros = pack_int32(zeros.T, bits)
    return {
        "qweight": pack_int32(numbers, bits).T.contiguous(),
        "qzeros": add_to_packed(qzeros, bits, -1),
        "scales": scales.T.contiguous(),
        "g_idx": groups.int(),
    }


# ----------------------------------------------------------------------------------- config.json
def parse_packing(settings: dict) -> Packing:
    """Return the layout that the `quantization_config` of an AWQ or GPTQ checkpoint describes.

    Raises ValueError for a variant whose layout is another one.
    """
    bits = settings.get("bits", settings.get("w_bit"))
    group_size = settings.get("group_size", settings.get("q_group_size"))
    if not isinstance(group_size, int) or (group_size < 1 and group_size != -1):
        raise ValueError(
            f"group_size: expected a positive integer or -1, got {reprlib.repr(group_size)}"
        )
    if settings.get("quant_method") == "awq":
        return awq_packing(settings, bits, group_size)
    return gptq_packing(settings, bits, group_size)


def awq_packing(settings: dict, bits: object, group_size: int) -> Packing:
    """Return the layout of an AWQ checkpoint. Raises ValueError for another version than gemm."""
    if bits != 4:
        raise ValueError(f"bits: expected 4 for AWQ, got {reprlib.repr(bits)}")
    version = settings.get("version") or settings.get("format") or "gemm"
    if str(version).lower() != "gemm":
        raise ValueError(f"version: expected 'gemm', got {reprlib.repr(version)}")
    return Packing("AWQ", 4, group_size)


def gptq_packing(settings: dict, bits: object, group_size: int) -> Packing:
    """Return the layout of a GPTQ checkpoint. Raises ValueError for one that is not known."""
    if not isinstance(bits, int) or bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8 for GPTQ, got {reprlib.repr(bits)}")
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"checkpoint_format: expected 'gptq' or 'gptq_v2', got {reprlib.repr(layout)}"
        )
    overrides = settings.get("dynamic") or {}
    if any(not str(pattern).startswith("-:") for pattern in overrides):
        raise ValueError(
            "dynamic: expected the same bits and groups for all layers, got "
            f"{reprlib.repr(overrides)}"
        )
    return Packing(
        "GPTQ",
        bits,
        group_size,
        stores_zero_minus_one=layout == "gptq",
        has_g_idx=True,
        act_order=bool(settings.get("desc_act")),
        symmetric=settings.get("sym") is not False,
    )


def gptq_config(grouping: Grouping) -> dict:
    """Return the `quantization_config` of what `pack_gptq` makes of the decoder's layers."""
    return {
        "quant_method": "gptq",
        "bits": grouping.bits,
        "group_size": grouping.group_size,
        "sym": grouping.symmetric,
        "desc_act": grouping.act_order,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "modules_to_not_convert": ["visual", "lm_head"],
    }
