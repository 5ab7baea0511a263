"""The linear layer of the model: its CPU kernels, and its weights in 8 and 4 bits.

A matmul of a few rows is limited by reading its weights from memory, one of many rows by
arithmetic, so the best kernel differs, and so does the best dtype. What each choice gains is
measured in benchmarks/README.md.

Shapes: rows, all dimensions but the last of x together;
        in and out, the two widths of a weight [out, in].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from byte_matmul import ByteKernel, byte_kernel
from int4_layout import (
    block_ranges,
    pack_for_kernel,
    pack_words_for_kernel,
    pair_rows,
    unpack_from_kernel,
)
from packed_weights import Grouping, Packing, Unpacked, dequantize

MANY_ROWS = 16  # so many rows make up for the time that upcasting a weight takes
FEW_ROWS = 5  # so many, where oneDNN has no kernel for the dtype
# So many make up for dequantizing (measured in benchmarks/README.md): of 8 bits where bfloat16 has
# no instructions, of 4 bits everywhere.
MANY_INT8_ROWS = 32
MANY_INT4_ROWS = 128
# Activations that are split into digits at once, so that they stay in the cache, but of this many
# rows at least: fewer would read the weights too often.
BYTE_ACTIVATIONS = 2**18
LEAST_BYTE_ROWS = 64
# Outputs that are in the cache while a layer is quantized to 4 bits; whole blocks of the kernel.
INT4_QUANTIZED = 256


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weightᵀ + bias by oneDNN.

    In float32, where PyTorch itself uses MKL, up to twice as fast.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def has_fast_half_matmul(dtype: torch.dtype) -> bool:
    """Return whether this processor multiplies matrices of the dtype faster than float32."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN supports bfloat16 on every processor with AVX-512, but without the
    # instructions for it at a third.
    emulated = (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.cpu._is_avx512_bf16_supported()
    )
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


def has_onednn_kernel(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of the dtype, float16 or bfloat16, at any rate."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prefer_pytorch_gemv() -> None:
    """Make `F.linear` of a single bfloat16 row use PyTorch's own kernel, in the whole process.

    A program calls this once, before it starts threads. PyTorch has no other way to reach that
    kernel: every operator that multiplies a matrix by a vector asks this one process-wide switch.
    Without the call all results are as exact and decoding in bfloat16 is slower. `cpu_matmul`
    calls oneDNN by name where that is faster, whatever the switch, so only eager attention loses
    by it.

    Microseconds for one row, medians of interleaved runs, AMD EPYC with
    AVX512_BF16, 2 threads, torch 2.13:

        weight [out, in]        8960×1536  1536×8960  1536×1536  151936×1536
        PyTorch's own kernel          778       1123        124        11021
        oneDNN (F.linear, mm)        1365       1387        229        22771
        torch.mv, torch.addmv        1645       1471        308        33337
        oneDNN, packed weight*       1075       1048        198        17515
        conv2d of a 1×1 image        2671       2140        417       160650

    * a second copy of the weights
    """
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]  # a bool by its descriptor


def cpu_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias, without gradients, by the fastest kernel without global state.

    x [..., in], weight [out, in], bias [out], all on the CPU → [..., out] in x's dtype.
    """
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return onednn_linear(x, weight, bias)
    if rows == 1:  # limited by reading the weights: see `prefer_pytorch_gemv`
        return F.linear(x, weight, bias)
    enough = MANY_ROWS if has_onednn_kernel(x.dtype) else FEW_ROWS
    if rows >= enough and not has_fast_half_matmul(x.dtype):
        return upcast_linear(x, weight, bias)
    if not has_onednn_kernel(x.dtype):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def upcast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weightᵀ + bias by float32 matmuls.

    Only some of the weights are upcast at a time, so that they stay in the cache.
    """
    y = x.new_empty(*x.shape[:-1], len(weight))
    x = x.float()
    step = chunk_rows(weight.shape[1])
    for start in range(0, len(weight), step):
        outputs = slice(start, start + step)
        part_bias = None if bias is None else bias[outputs].float()
        y[..., outputs] = onednn_linear(x, weight[outputs].float(), part_bias)
    return y


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias as `F.linear`; on the CPU without gradients by the fastest kernel."""
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return cpu_matmul(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by `fast_linear`, or by a reordered copy of its weight."""

    reordered: Tensor | None = None  # opaque, of `reorder_weights`

    def forward(self, x: Tensor) -> Tensor:
        """Return x weightᵀ + bias: x [..., in] → [..., out]."""
        if self.reordered is not None and not torch.is_grad_enabled():
            # One row of 16 bits is read at least as fast by PyTorch's own kernel.
            if x.dtype == torch.float32 or x.numel() > x.shape[-1]:
                return onednn_linear(x, self.reordered, self.bias)
        return fast_linear(x, self.weight, self.bias)


REORDERED_FOR = 8  # rows: with the order that is best for one, many rows take longer


def reorder_weights(model: nn.Module) -> None:
    """Keep a copy of the decoder's and the head's plain weights in the order of oneDNN's matmul.

    A few rows, as of a batch that is decoded, are multiplied in two thirds of the time then, at the
    price of as much memory again; a vision encoder never has few. Where the CPU has no fast matmul
    of the dtype, and on other devices, nothing is done. Weights must not change any more.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu":
        return
    for name in layers_to_reorder(model, parameter.dtype):
        layer = cast(Linear, model.get_submodule(name))
        weight = layer.weight.detach()
        layer.reordered = torch.ops.mkldnn._reorder_linear_weight(weight, REORDERED_FOR)


def layers_to_reorder(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Return the names of the layers that `reorder_weights` copies on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return []
    if dtype != torch.float32 and not (dtype.itemsize == 2 and has_fast_half_matmul(dtype)):
        return []
    return [name for name in names_of(Linear, model) if not name.startswith("visual.")]


def row_chunks(rows: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Yield start and end of consecutive rows: on the CPU as many as a cache holds.

    On a GPU launches cost more. A meta tensor has no values to work on.
    """
    size = {"cuda": 4096, "meta": rows}.get(device.type, 64)
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the CPU multiplies many rows of a dtype by dequantized weights.

    Never float16, which products with integers overflow before they are scaled.
    """
    if dtype == torch.bfloat16 and has_fast_half_matmul(dtype):
        return dtype
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(inputs: int) -> int:
    """Return how many outputs of so many inputs are converted at once for a matmul."""
    return max(256, 2**21 // inputs)


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a tensor, integers included, as a parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


# ------------------------------------------------------------------------------------ 8 and 4 bits
class QuantizedLinear(nn.Module):
    """What the layers with quantized weights have in common."""

    bias: nn.Parameter | None
    in_features: int
    out_features: int

    def method(self) -> str:
        """Return a name such as "int8"."""
        raise NotImplementedError

    def grouping(self) -> Grouping:
        """Return what config.json specifies about the integers."""
        raise NotImplementedError

    def unpack_chunks(self) -> Iterator[Unpacked]:
        """Yield the integers of some outputs at a time."""
        raise NotImplementedError

    def groups(self) -> Tensor:
        """Return the group of each input, int64 [in]."""
        raise NotImplementedError

    def unpack(self) -> Unpacked:
        """Return all integers."""
        chunks = list(self.unpack_chunks())
        return Unpacked(
            torch.cat([chunk.numbers for chunk in chunks]),
            torch.cat([chunk.zeros for chunk in chunks]),
            torch.cat([chunk.scales for chunk in chunks]),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [out, in]."""
        device = next(self.parameters()).device
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=device)
        if weight.is_meta:
            return weight  # for an estimate, as a chunk takes little
        groups = self.groups()
        start = 0
        for chunk in self.unpack_chunks():
            stop = start + len(chunk.numbers)
            weight[start:stop] = dequantize(chunk, groups, dtype)
            start = stop
        return weight


class OneScaleInt8(QuantizedLinear):
    """What the layers of 8 bits with one scale for each output have in common."""

    scale: nn.Parameter

    def method(self) -> str:
        return "int8"

    def grouping(self) -> Grouping:
        return Grouping(8, -1, symmetric=True, act_order=False)

    def groups(self) -> Tensor:
        return torch.zeros(self.in_features, dtype=torch.int64, device=self.scale.device)


class Int8Linear(OneScaleInt8):
    """A linear layer whose weights are integers from -128 to 127, with a scale for each output.

    The activations keep their dtype, but for a few rows on the CPU: those are rounded to bfloat16,
    which the kernel that reads bytes requires. Source: arXiv 2208.07339 §2, for the weights alone.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: nn.Parameter | None = None):
        """weight: int8 [out, in]; scale: bfloat16 [out]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = frozen(weight)
        self.scale = frozen(scale)
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int8Linear:
        """Return a layer with the weights of a plain one rounded to steps of the largest / 127."""
        weight = linear.weight.detach()
        numbers = torch.empty_like(weight, dtype=torch.int8)
        scales = weight.new_empty(len(weight), dtype=torch.bfloat16)
        for start, stop in row_chunks(len(weight), weight.device):
            numbers[start:stop], scales[start:stop] = cls.quantize(weight[start:stop].float())
        return cls(numbers, scales, linear.bias)

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int8 values and the bfloat16 scales of float32 rows [n, in]."""
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()  # a row of zeros stays one
        numbers = (rows / scale[:, None].float()).round()
        numbers = numbers.clamp(-127, 127)  # the rounded scale may be a little small
        return numbers.to(torch.int8), scale

    def unpack_chunks(self) -> Iterator[Unpacked]:
        for start, stop in row_chunks(self.out_features, self.weight.device):
            numbers = self.weight[start:stop].view(torch.uint8) ^ 128  # the zero point is 128
            scales = self.scale[start:stop, None]
            yield Unpacked(numbers, torch.full_like(scales, 128, dtype=torch.uint8), scales)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        if x.device.type != "cpu":
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        else:
            y = self.multiply_on_cpu(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def multiply_on_cpu(self, x: Tensor) -> Tensor:
        """Return x [n, in] times the weights: [n, out], in x's dtype."""
        many = MANY_ROWS if has_fast_half_matmul(torch.bfloat16) else MANY_INT8_ROWS
        if len(x) >= many:
            return self.multiply_many(x)
        rows = x.bfloat16().contiguous()
        return torch._weight_int8pack_mm(rows, self.weight, self.scale).to(x.dtype)

    def multiply_many(self, x: Tensor) -> Tensor:
        """Return x [n, in] times the weights on the CPU: [n, out], in x's dtype.

        Only some of the weights are converted at a time, so that they stay in the cache.
        """
        y = x.new_empty(len(x), self.out_features)
        x = x.to(matmul_dtype(x.dtype))
        step = chunk_rows(self.in_features)
        for start in range(0, self.out_features, step):
            outputs = slice(start, start + step)
            products = cpu_matmul(x, self.weight[outputs].to(x.dtype))
            y[:, outputs] = products.mul_(self.scale[outputs].to(x.dtype))
        return y


class ByteInt8Linear(OneScaleInt8):
    """An `Int8Linear` whose activations are rounded to digits of a byte, in steps of their row.

    Two digits are about as exact as bfloat16 activations. Of many rows, oneDNN multiplies those
    without outliers by their high digits alone, which takes half as long: beside an outlier, one
    digit leaves little of the other activations. For processors with a `byte_kernel`.
    Source: arXiv 2208.07339 §2, for scales of rows.
    """

    def __init__(self, layer: Int8Linear, kernel: ByteKernel):
        """Take the place of a layer; its weight is not kept."""
        super().__init__()
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        self.kernel = kernel
        self.packed: Any = kernel.pack(layer.weight, layer.scale)
        self.scale = layer.scale
        self.bias = layer.bias

    def plain(self) -> Int8Linear:
        """Return a layer as the one that this took the place of: the weight is the same."""
        return Int8Linear(self.kernel.unpack(self.packed), self.scale, self.bias)

    def __reduce__(self) -> tuple:
        """For copies and pickles, which the kernels' own layouts do not support."""
        return ByteInt8Linear, (self.plain(), self.kernel)

    def unpack_chunks(self) -> Iterator[Unpacked]:
        yield from self.plain().unpack_chunks()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        rows = x.reshape(-1, self.in_features)
        y = x.new_empty(len(rows), self.out_features)
        count = max(LEAST_BYTE_ROWS, BYTE_ACTIVATIONS // self.in_features)
        for some, products in zip(rows.split(count), y.split(count), strict=True):
            self.multiply(some, products)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def multiply(self, x: Tensor, y: Tensor) -> None:
        """Write x [n, in] times the weights into y [n, out]."""
        kernel = self.kernel
        x = x.float()
        sizes = x.abs()
        largest = sizes.amax(1, keepdim=True).clamp_(min=1e-30)  # a row may be all zeros
        step = largest / kernel.largest
        low_rows = None  # all
        if len(x) >= MANY_ROWS and kernel.outlier > 0:
            smallest_outlier = sizes.mean(1, keepdim=True).mul_(kernel.outlier)
            low_rows = (largest > smallest_outlier).flatten().nonzero()[:, 0]
        products = kernel.multiply(torch.cat(kernel.split(x / step, low_rows)), self.packed)
        sums, of_low = products[: len(x)], products[len(x) :]
        if low_rows is None:
            sums.add_(of_low, alpha=1 / kernel.base)
        else:
            sums.index_add_(0, low_rows, of_low, alpha=1 / kernel.base)
        torch.mul(sums, step * kernel.base, out=y)


class GroupedInt8Linear(QuantizedLinear):
    """A linear layer with a scale for each output and group of inputs, on the CPU alone.

    The kernel of `Int8Linear` knows one scale for an output, so it runs once for each group, and
    the results are summed in float32. For one row that takes 1.3 ms where `PackedLinear` takes 103
    (8960 × 1536 in groups of 128, one thread of an AMD EPYC).
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: nn.Parameter | None = None,
        input_order: Tensor | None = None,
    ):
        """weight: int8 [groups, out, size]; scale: bfloat16 [groups, out].

        input_order: int64 [in], inputs sorted by group, where groups are not neighbors.
        """
        super().__init__()
        groups, self.out_features, self.group_size = weight.shape
        self.in_features = groups * self.group_size
        self.weight = frozen(weight)
        self.scale = frozen(scale)
        self.bias = bias
        self.input_order = None if input_order is None else frozen(input_order)

    def method(self) -> str:
        return "int8"

    def grouping(self) -> Grouping:
        return Grouping(8, self.group_size, True, self.input_order is not None)

    def unpack_chunks(self) -> Iterator[Unpacked]:
        for start, stop in row_chunks(self.out_features, self.weight.device):
            rows = self.weight[:, start:stop].transpose(0, 1).flatten(1)
            if self.input_order is not None:
                rows = rows[:, self.input_order.argsort()]
            scales = self.scale[:, start:stop].T
            zeros = torch.full_like(scales, 128, dtype=torch.uint8)
            yield Unpacked(rows.view(torch.uint8) ^ 128, zeros, scales)

    def groups(self) -> Tensor:
        groups = torch.arange(self.in_features) // self.group_size
        return groups if self.input_order is None else groups[self.input_order.argsort()]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        if self.input_order is not None:
            x = x[..., self.input_order]
        if x.is_meta or x.numel() >= MANY_ROWS * x.shape[-1]:
            weight = self.weight.to(x.dtype) * self.scale[..., None].to(x.dtype)
            return fast_linear(x, weight.transpose(0, 1).flatten(1), self.bias)
        rows = x.reshape(-1, self.in_features).bfloat16()
        y = torch.zeros(len(rows), self.out_features)
        for i, columns in enumerate(rows.split(self.group_size, dim=1)):
            y += torch._weight_int8pack_mm(columns.contiguous(), self.weight[i], self.scale[i])
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class Int4Linear(QuantizedLinear):
    """A linear layer whose weights are integers from 0 to 15, on the CPU alone.

    A group of inputs shares a scale and an offset: weight = (number - 8) · scale + offset, where
    the offset is (8 - zero) · scale, rounded to bfloat16. Without act-order the inputs of a group
    are neighbors. Few rows are multiplied by a kernel that reads the integers, in bfloat16; for
    many the weights are dequantized, some outputs at a time, as a plain matmul is faster then.
    """

    GROUP = 32  # of those that are quantized here
    GROUPS = (32, 64, 128, 256)  # that the kernel has
    SHRINK = 0.95  # of the range of a group, for the second of two scales

    def __init__(
        self,
        weight: Tensor,
        zero: Tensor,
        scale: Tensor,
        bias: nn.Parameter | None = None,
        input_order: Tensor | None = None,
    ):
        """weight: of `pack_for_kernel`, uint8 [≥ out, in / 2]; zero and scale: [out, groups].

        input_order: int64 [in], inputs sorted by group, where groups are not neighbors.
        """
        super().__init__()
        self.in_features = 2 * weight.shape[1]
        self.out_features, groups = scale.shape
        self.group_size = self.in_features // groups
        scale = scale.T.bfloat16()
        offset = ((8 - zero.T.float()) * scale.float()).bfloat16()
        pairs = torch.stack((scale, offset), dim=2)  # [groups, out, 2]
        if len(weight) > self.out_features:
            pairs = F.pad(pairs, (0, 0, 0, len(weight) - self.out_features))
        self.weight = frozen(weight)
        self.scale = frozen(pairs)
        self.bias = bias
        self.input_order = None if input_order is None else frozen(input_order)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Int4Linear:
        """Return a layer with the weights of a plain one rounded in groups of GROUP.

        Raises ValueError for a width without whole groups.
        """
        weight = linear.weight.detach()
        if weight.shape[1] % cls.GROUP:
            raise ValueError(
                f"int4 needs layers of whole groups of {cls.GROUP} inputs, found one of "
                f"{weight.shape[1]}"
            )
        step = len(weight) if weight.is_meta else INT4_QUANTIZED
        quantized = (cls.quantize(chunk.float()) for chunk in weight.split(step))
        return cls.from_chunks(quantized, linear.bias)

    @classmethod
    def from_chunks(
        cls,
        chunks: Iterable[Unpacked],
        bias: nn.Parameter | None,
        input_order: Tensor | None = None,
    ) -> Int4Linear:
        """Return a layer with these integers; only one of the chunks need exist at a time."""
        packed = []
        zeros = []
        scales = []
        for chunk in chunks:
            numbers = chunk.numbers
            if input_order is not None:
                numbers = numbers[:, input_order]
            packed.append(pack_for_kernel(numbers))
            zeros.append(chunk.zeros)
            scales.append(chunk.scales)
        return cls(torch.cat(packed), torch.cat(zeros), torch.cat(scales), bias, input_order)

    @classmethod
    def quantize(cls, rows: Tensor) -> Unpacked:
        """Return float32 rows [n, in] as integers, with the better of two scales for each group.

        One covers a group from its smallest to its largest weight. The other is a little smaller:
        it clips those, and rounds all others less.
        """
        # Neighboring rows are neighbors in memory, so that a scale for each serves whole vectors.
        groups = rows.T.contiguous().unflatten(0, (-1, cls.GROUP))  # [groups, GROUP, n]
        low = groups.amin(1)
        high = groups.amax(1)
        whole, whole_zero = cls.scale_of_range(low, high)
        small, small_zero = cls.scale_of_range(low * cls.SHRINK, high * cls.SHRINK)
        whole_error = cls.squared_error(groups, whole, whole_zero)
        is_better = cls.squared_error(groups, small, small_zero) < whole_error  # [groups, n]
        scale = torch.where(is_better, small, whole)
        zero = torch.where(is_better, small_zero, whole_zero)
        numbers = cls.steps(groups, scale, zero).round_().clamp_(0, 15).to(torch.uint8)
        return Unpacked(numbers.flatten(0, 1).T, zero.to(torch.uint8).T, scale.T)

    @staticmethod
    def scale_of_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale, bfloat16, and the zero point, float32, for weights from low to high.

        The zero point is at least 1, as the format that GPTQ saves has no place for 0.
        """
        high = high.clamp(min=0)
        low = torch.minimum(low, -high / 14)
        scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        return scale, (-low / scale.float()).round().clamp(1, 15)

    @staticmethod
    def steps(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return float32 weights [groups, GROUP, n] in steps of the scale [groups, n] from 0 up."""
        step = scale.float()
        offset = ((8 - zero) * step).bfloat16().float()  # what the kernel will add
        return torch.addcmul((8 - offset / step)[:, None], groups, (1 / step)[:, None])

    @classmethod
    def squared_error(cls, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Return the sum of the squared errors of each group of weights, [groups, n]."""
        exact = cls.steps(groups, scale, zero)
        errors = exact.round().clamp_(0, 15).sub_(exact)
        return errors.square_().sum(1) * scale.float().square()

    def method(self) -> str:
        return "int4"

    def grouping(self) -> Grouping:
        is_symmetric = not self.scale[..., 1].any()
        return Grouping(4, self.group_size, is_symmetric, self.input_order is not None)

    def unpack_chunks(self) -> Iterator[Unpacked]:
        scales, offsets = self.scale.float().permute(2, 1, 0)  # [out, groups]
        zeros = (8 - offsets / scales).round().to(torch.uint8)
        for start, stop in row_chunks(len(self.weight), self.weight.device):
            numbers = unpack_from_kernel(self.weight[start:stop])
            if self.input_order is not None:
                numbers = numbers[:, self.input_order.argsort()]
            stop = min(stop, self.out_features)  # the rest is padding
            rows = slice(start, stop)
            yield Unpacked(numbers[: stop - start], zeros[rows], scales[rows].bfloat16())

    def groups(self) -> Tensor:
        groups = torch.arange(self.in_features) // self.group_size
        return groups if self.input_order is None else groups[self.input_order.argsort()]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1])
        if self.input_order is not None:
            rows = rows[:, self.input_order]
        if len(rows) < MANY_INT4_ROWS:
            rows = rows.bfloat16().contiguous()
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows, self.weight, self.group_size, self.scale
            )
            y = y.to(x.dtype)
        else:
            y = self.multiply_many(rows)
        y = y[:, : self.out_features].reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def multiply_many(self, x: Tensor) -> Tensor:
        """Return x [n, in] times the weights, padding included: [n, ≥ out], in x's dtype.

        Only some of the weights are dequantized at a time, so that they stay in the cache.
        """
        y = x.new_empty(len(x), len(self.weight))
        x = x.to(matmul_dtype(x.dtype))
        for start, stop, size in block_ranges(len(self.weight), chunk_rows(self.in_features)):
            weight = self.dequantize_halves(start, stop, size, x.dtype)
            products = cpu_matmul(x, weight.flatten(1).T).T.unflatten(0, (2, -1, size // 2))
            outputs = pair_rows(y[:, start:stop].T, size)
            for output, product in zip(outputs, products, strict=True):
                output.copy_(product)
        return y

    def dequantize_halves(self, start: int, stop: int, size: int, dtype: torch.dtype) -> Tensor:
        """Return the weights of the outputs from start to stop, in blocks of that size.

        [in, 2, (stop - start) / 2]: first the outputs in the low bits, then those in the high bits,
        as the kernel's layout has the outputs of an input as neighbors.
        """
        packed = self.weight[start:stop].view(-1, self.in_features, size // 2)
        packed = packed.transpose(0, 1).flatten(1)  # [in, n / 2]
        scales = pair_rows(self.scale[:, start:stop].transpose(0, 1), size)
        weight = torch.empty(self.in_features, 2, packed.shape[1], dtype=dtype)
        for i, numbers in enumerate((packed & 15, packed >> 4)):
            pairs = scales[i].flatten(0, 1).permute(2, 1, 0).to(dtype).contiguous()
            scale, offset = pairs.unsqueeze(2)  # [groups, 1, n / 2]
            steps = (numbers.view(torch.int8) - 8).to(dtype)
            grouped = weight[:, i].unflatten(0, (-1, self.group_size))
            torch.addcmul(offset, steps.view(grouped.shape), scale, out=grouped)
        return weight


def quantize_linears(model: nn.Module, bits: str) -> None:
    """Replace the linear layers of a Qwen2VL's decoder and head by "int8" or "int4" ones.

    The vision encoder works on many rows at once, which fewer bits would not make faster, so
    it keeps its weights; so does the embedding table, which is only looked up. Layers that are
    quantized already stay as they are.
    Raises ValueError where that is not possible.
    """
    if bits not in ("int8", "int4"):
        raise ValueError(f"quantize is {bits!r}, expected 'int8', 'int4' or None")
    device = next(model.parameters()).device.type
    if bits == "int4" and device not in ("cpu", "meta"):
        raise ValueError(
            f"int4 weights are for the CPU, this model is on {device}; int8 works there, too"
        )
    for name in names_of(nn.Linear, model):
        if name.startswith("visual."):
            continue
        module = cast(nn.Linear, model.get_submodule(name))
        if bits == "int8":
            model.set_submodule(name, Int8Linear.from_linear(module))
        else:
            model.set_submodule(name, Int4Linear.from_linear(module))


def names_of(kind: type, model: nn.Module) -> list[str]:
    """Return the names of the layers of a kind.

    A list of the layers themselves would keep all of them alive while they are replaced.
    """
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


# ----------------------------------------------------------------- weights as a checkpoint has them
class PackedLinear(QuantizedLinear):
    """A linear layer with the tensors of an AWQ or GPTQ checkpoint, dequantized in each call.

    It serves every layout, dtype and device; `use_kernels` replaces it where a kernel can read
    the integers. In float32 and float64 its weights are exact.
    """

    def __init__(self, linear: nn.Linear, packing: Packing):
        """Take the place of a layer; the tensors are on the meta device until they are loaded."""
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.packing = packing
        self.bias = linear.bias
        self.shapes = packing.shapes(self.in_features, self.out_features)
        for name, shape in self.shapes.items():
            dtype = torch.float16 if name == "scales" else torch.int32
            setattr(self, name, frozen(torch.empty(shape, dtype=dtype, device="meta")))

    def tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors by their names."""
        return {name: getattr(self, name) for name in self.shapes}

    def groups(self) -> Tensor:
        """Return the group of each input, int64 [in]."""
        return self.packing.group_of_inputs(self.in_features, self.tensors())

    def group_size(self) -> int:
        """Return the number of inputs of a group."""
        size = self.packing.group_size
        return self.in_features if size == -1 else size

    def method(self) -> str:
        return self.packing.name

    def grouping(self) -> Grouping:
        packing = self.packing
        return Grouping(packing.bits, packing.group_size, packing.symmetric, packing.act_order)

    def unpack_chunks(self) -> Iterator[Unpacked]:
        tensors = self.tensors()
        for start, stop in row_chunks(self.out_features, tensors["scales"].device):
            yield self.packing.unpack(tensors, start, stop)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        return fast_linear(x, self.dequantize(x.dtype), self.bias)


def use_kernels(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace each `PackedLinear` that a kernel of the CPU can read, one after the other.

    Those round activations to bfloat16, so they are for the dtypes of 16 bits.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return
    for name in names_of(PackedLinear, model):
        module = cast(PackedLinear, model.get_submodule(name))
        layer = int4_layer(module) if module.packing.bits == 4 else int8_layer(module)
        if layer is not None:
            model.set_submodule(name, layer)


def use_byte_kernel(model: nn.Module, dtype: torch.dtype, few_tokens: bool = False) -> None:
    """Replace each large `Int8Linear` where the CPU multiplies bytes, one after the other.

    For the dtypes of 16 bits, as activations are rounded to digits. few_tokens: not where packing
    takes longer than is gained in as many tokens as one answer has.
    """
    sizes = layers_for_bytes(model, dtype)
    kernel = byte_kernel() if sizes else None
    if kernel is None or (few_tokens and kernel.packs_slowly):
        return
    for name in sizes:
        module = cast(Int8Linear, model.get_submodule(name))
        model.set_submodule(name, ByteInt8Linear(module, kernel))


def layers_for_bytes(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Return the names of the layers that `use_byte_kernel` replaces, and their weights' bytes.

    A model without layers of 8 bits does not wait until a kernel is tried.
    """
    names = names_of(Int8Linear, model)
    if not names or dtype not in (torch.bfloat16, torch.float16):
        return {}
    kernel = byte_kernel()
    if kernel is None:
        return {}
    sizes = {name: cast(Tensor, model.get_submodule(name).weight).nbytes for name in names}
    return {name: size for name, size in sizes.items() if size >= kernel.least_weights}


def packing_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return what `use_byte_kernel` needs at most beside the weights: a copy of the largest."""
    return max(layers_for_bytes(model, dtype).values(), default=0)


def input_order(layer: PackedLinear) -> Tensor | None:
    """Return the inputs sorted by group, int64 [in], or None where groups are neighbors."""
    return layer.groups().argsort(stable=True) if layer.packing.act_order else None


def has_equal_groups(layer: PackedLinear, size: int) -> bool:
    """Return whether each group has so many inputs."""
    if layer.in_features % size:
        return False
    groups = layer.groups()
    if groups.is_meta:
        return True
    return torch.equal(groups.sort().values, torch.arange(layer.in_features) // size)


def int4_layer(layer: PackedLinear) -> Int4Linear | None:
    """Return a layer of 4 bits for the kernel, or None where its groups are not the kernel's."""
    size = layer.group_size()
    if size not in Int4Linear.GROUPS or not has_equal_groups(layer, size):
        return None
    if layer.packing.method == "GPTQ" and not layer.packing.act_order:
        return int4_layer_of_words(layer)
    return Int4Linear.from_chunks(layer.unpack_chunks(), layer.bias, input_order(layer))


def int4_layer_of_words(layer: PackedLinear) -> Int4Linear:
    """Return a layer of 4 bits for the kernel from GPTQ's tensors, groups being neighbors.

    Byte by byte: GPTQ has two neighboring inputs in a byte, the kernel two outputs.
    """
    tensors = layer.tensors()
    packed = pack_words_for_kernel(tensors["qweight"])
    zeros = layer.packing.unpack_zeros(tensors, 0, layer.out_features)
    return Int4Linear(packed, zeros, tensors["scales"].T, layer.bias)


def int8_layer(layer: PackedLinear) -> Int8Linear | GroupedInt8Linear | None:
    """Return a layer of 8 bits for the kernel, or None where it needs more than scales."""
    size = layer.group_size()
    if not has_equal_groups(layer, size):
        return None
    tensors = layer.tensors()
    zeros = layer.packing.unpack_zeros(tensors, 0, layer.out_features)
    symmetric = layer.packing.symmetric if zeros.is_meta else bool((zeros == 128).all())
    if not symmetric:
        return None  # a zero point other than that of int8
    # At once: PyTorch transposes a whole matrix in blocks, which it does not do for slices of one.
    numbers = layer.packing.unpack(tensors, 0, layer.out_features).numbers
    order = input_order(layer)
    if order is not None:
        numbers = numbers[:, order]
    weight = numbers.bitwise_xor_(128).view(torch.int8)
    scales = tensors["scales"].bfloat16()
    if size == layer.in_features:
        return Int8Linear(weight, scales[0], layer.bias)
    weight = weight.unflatten(1, (-1, size)).transpose(0, 1).contiguous()
    return GroupedInt8Linear(weight, scales, layer.bias, order)


def packed_weights(module: nn.Module) -> int:
    """Return how many weights are in a kernel's own layout, a byte each.

    They are in no parameter.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, ByteInt8Linear)]
    return sum(layer.in_features * layer.out_features for layer in layers)


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of all weights, those in a kernel's own layout included."""
    return sum(parameter.nbytes for parameter in module.parameters()) + packed_weights(module)


def quantization_methods(model: nn.Module) -> list[str]:
    """Return the names of how a model's layers are quantized, sorted; none for plain weights."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    return sorted({layer.method() for layer in layers})
