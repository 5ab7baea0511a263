"""Matmuls of bytes on the CPU, for a decoder in int8: activations as bytes, too.

An activation becomes two digits of a byte each, and one matmul of both rows of digits reads the
weights once. So it takes little longer than a single row of bytes would, and the result is about as
exact as with bfloat16 activations. What each kernel gains is measured in benchmarks/README.md.

Shapes: n, rows of digits; in and out, the two widths of a weight [out, in].
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

Packed = Any  # a weight in a kernel's own layout


class OneDnnBytes:
    """oneDNN's matmul of bytes, for processors with AVX512_VNNI.

    Without these instructions it adds two products in 16 bits, which saturates.
    """

    base = 256  # an activation is high · base + low, in steps
    largest = 127 * 256 + 127
    packs_slowly = False
    outlier = 10  # times the mean size of its row: beside one so large, low digits are needed
    least_weights = 2**20  # a smaller layer gains less than it takes to split its activations

    def is_usable(self) -> bool:
        return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()

    def operator(self) -> Any:
        return torch.ops.onednn.qlinear_pointwise

    def pack(self, weight: Tensor, scale: Tensor) -> Packed:
        """Return int8 [out, in] in the kernel's own layout, an opaque tensor, and its scale [out].

        The last is the zero points of the outputs, which the operator asks for, too.
        """
        no_zeros = torch.zeros_like(scale, dtype=torch.int32)
        return torch.ops.onednn.qlinear_prepack(weight, None), scale.float(), no_zeros

    def unpack(self, packed: Packed) -> Tensor:
        """Return the weight, int8 [out, in]."""
        return packed[0].to_dense().T.contiguous()

    def split(self, numbers: Tensor, low_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the high digits of numbers up to `largest`, and the low ones of low_rows or all.

        With signed digits the kernel is slow on AMD's processors, so 128 is added.
        numbers: float32 [n, in]; low_rows: int64 [m]. Both returned: uint8 [n or m, in].
        """
        whole = (numbers + (128 * 257 + 0.5)).to(torch.int32)  # positive, so this rounds
        low = (whole if low_rows is None else whole[low_rows]).to(torch.uint8)
        whole >>= 8
        return whole.to(torch.uint8), low

    def multiply(self, digits: Tensor, packed: Packed) -> Tensor:
        """Return the digits [n, in] times the weight times its scale: float32 [n, out]."""
        weight, scale, no_zeros = packed
        rows = len(digits)
        if rows == 2:  # a large weight is read faster for four rows
            digits = torch.cat((digits, digits))
        products = self.operator()(
            digits, 1.0, 128, weight, scale, no_zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return products[:rows]


class FbgemmBytes:
    """FBGEMM's matmul of bytes, for processors with AVX2 and without AVX512_VNNI.

    It adds two products in 16 bits. With digits from -64 to 64, to which it adds 64, they never
    saturate: 2 · 128 · 128 is the largest sum, and negative.
    """

    base = 128
    largest = 64 * 128
    packs_slowly = True  # takes as long as is gained in some hundred tokens
    piece = 2**24  # weights that are packed at a time: larger ones take twice as long for each
    outlier = 0  # a digit of so few values is never enough alone
    least_weights = 2**22

    def is_usable(self) -> bool:
        """Return whether PyTorch packs weights for FBGEMM: with AVX512_VNNI it would for oneDNN.

        The quantized tensors that FBGEMM takes are to be removed from PyTorch some day.
        """
        return (
            torch.backends.quantized.engine in ("x86", "fbgemm")
            and not torch.cpu._is_vnni_supported()
            and hasattr(torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32")
            and hasattr(torch, "_make_per_channel_quantized_tensor")
        )

    def operator(self) -> Any:
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32

    def pack(self, weight: Tensor, scale: Tensor) -> Packed:
        """Return int8 [out, in] and scale [out] in the kernel's own layout: opaque objects."""
        outputs = math.ceil(self.piece / weight.shape[1])
        packed = []
        for part, scales in zip(weight.split(outputs), scale.split(outputs), strict=True):
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            numbers = torch._make_per_channel_quantized_tensor(part, scales.double(), zeros, 0)
            packed.append(torch.ops.quantized.linear_prepack(numbers, None))
        return packed

    def unpack(self, packed: Packed) -> Tensor:
        """Return the weight, int8 [out, in]."""
        parts = [torch.ops.quantized.linear_unpack(part)[0].int_repr() for part in packed]
        return torch.cat(parts)

    def split(self, numbers: Tensor, low_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the high digits of numbers up to `largest`, and the low ones of low_rows or all.

        The kernel rounds them itself. numbers: float32 [n, in], overwritten; low_rows: int64 [m].
        Both returned: float32 [n or m, in].
        """
        high = (numbers / self.base).round_()
        low = numbers.sub_(high, alpha=self.base)
        return high, low if low_rows is None else low[low_rows]

    def multiply(self, digits: Tensor, packed: Packed) -> Tensor:
        """Return the digits [n, in] times the weight times its scale: float32 [n, out]."""
        products = [self.operator()(digits, 1.0, 64, part) for part in packed]
        return products[0] if len(products) == 1 else torch.cat(products, 1)


ByteKernel = OneDnnBytes | FbgemmBytes


@cache
def byte_kernel() -> ByteKernel | None:
    """Return the kernel that multiplies bytes exactly on this processor, if there is one."""
    for kernel in (OneDnnBytes(), FbgemmBytes()):
        if kernel.is_usable() and is_exact(kernel):
            return kernel
    return None


def is_exact(kernel: ByteKernel) -> bool:
    """Return whether the largest products have the right sums.

    They are computed, as oneDNN may be held to fewer instructions than the processor has.
    """
    weight = torch.full((64, 64), 127, dtype=torch.int8)
    weight[1::2] = -128
    ones = torch.ones(64)
    largest = torch.tensor([[1.0], [-1.0]]) * kernel.largest
    high, _low = kernel.split(largest.expand(-1, 64).clone())
    with warnings.catch_warnings():  # that quantized tensors are deprecated, once a process
        warnings.simplefilter("ignore", UserWarning)
        products = kernel.multiply(high, kernel.pack(weight, ones))
    values = (largest / kernel.base).round()  # of the high digits
    return torch.equal(products, values * weight.float().sum(1))
