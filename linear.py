"""The linear layer of the model: its CPU kernels, and its weights in int8 and int4.

A matmul of a few rows is limited by reading its weights from memory, one of many rows by
arithmetic, so the best kernel differs, and so does the best dtype. What each choice gains is
measured in benchmarks/README.md.

Shapes: rows, all dimensions but the last of x together;
        in and out, the two widths of a weight [out, in].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY_ROWS = 16  # so many rows make up for the time that upcasting a weight takes


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
    if rows >= MANY_ROWS and not has_fast_half_matmul(x.dtype):
        float_bias = None if bias is None else bias.float()
        return onednn_linear(x.float(), weight.float(), float_bias).to(x.dtype)
    if not has_onednn_kernel(x.dtype):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias as `F.linear`; on the CPU without gradients by the fastest kernel."""
    if x.device.type == "cpu" and not torch.is_grad_enabled():
        return cpu_matmul(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by `fast_linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x weightᵀ + bias: x [..., in] → [..., out]."""
        return fast_linear(x, self.weight, self.bias)


def quantize_in_chunks(
    quantize: Callable[[Tensor], tuple[Tensor, Tensor]], weight: Tensor
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return what `quantize` makes of the rows of weight [out, in], upcast to float32.

    It gets as many rows at a time as a cache holds.
    """
    numbers = []
    scales = []
    chunk = len(weight) if weight.is_meta else 256  # each chunk costs time, also without values
    for rows in weight.detach().split(chunk):
        chunk_numbers, chunk_scales = quantize(rows.float())
        numbers.append(chunk_numbers)
        scales.append(chunk_scales)
    return (
        nn.Parameter(torch.cat(numbers), requires_grad=False),
        nn.Parameter(torch.cat(scales), requires_grad=False),
    )


class Int8Linear(nn.Module):
    """A linear layer whose weights are integers from -127 to 127, with a scale for each output.

    The activations keep their dtype, but for a few rows on the CPU: those are rounded to bfloat16,
    which the kernel that reads bytes requires. Source: arXiv 2208.07339 §2, for the weights alone.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        # int8 [out, in], bfloat16 [out]
        self.weight, self.scale = quantize_in_chunks(self.quantize, linear.weight)
        self.bias = linear.bias

    @staticmethod
    def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the int8 values and the bfloat16 scales of float32 rows [n, in]."""
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()  # a row of zeros stays one
        numbers = (rows / scale[:, None].float()).round()
        numbers = numbers.clamp(-127, 127)  # the rounded scale may be a little small
        return numbers.to(torch.int8), scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        on_cpu = x.device.type == "cpu"
        if on_cpu and x.numel() < MANY_ROWS * x.shape[-1]:
            rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
        else:
            matmul = cpu_matmul if on_cpu else F.linear
            y = matmul(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """A linear layer whose weights are integers from 0 to 15, on the CPU alone.

    GROUP neighbors of a row share a scale and an offset: weight = (number - 8) · scale + offset.
    One kernel serves any number of rows, in bfloat16; for long prompts it is slower than plain
    weights. Raises ValueError for a width without whole groups.
    """

    GROUP = 32

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, inputs = linear.weight.shape
        if inputs % self.GROUP:
            raise ValueError(
                f"int4 needs layers of whole groups of {self.GROUP} inputs, found one of {inputs}"
            )
        # The kernel's own order: uint8 [out, in / 2], and bfloat16 [in / GROUP, out, 2].
        self.weight, scale = quantize_in_chunks(self.quantize, linear.weight)
        self.scale = nn.Parameter(scale.transpose(0, 1).contiguous(), requires_grad=False)
        self.bias = linear.bias

    @classmethod
    def quantize(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 rows [n, in] packed, and scales and offsets [n, in / GROUP, 2]."""
        rows = F.pad(rows, (0, 0, 0, -len(rows) % 16))  # the kernel takes multiples of sixteen
        groups = rows.unflatten(1, (-1, cls.GROUP))
        low = groups.amin(2)  # [n, in / GROUP]
        high = groups.amax(2)
        scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        offset = (low + 8 * scale.float()).bfloat16()
        numbers = (groups - offset[..., None].float()) / scale[..., None].float() + 8
        numbers = numbers.round().clamp(0, 15)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.flatten(1).int(), 1)
        return packed, torch.stack((scale, offset), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.GROUP, self.scale)
        y = y[:, : self.out_features].to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


QUANTIZED = {"int8": Int8Linear, "int4": Int4Linear}


def quantize_linears(model: nn.Module, bits: str) -> None:
    """Replace the linear layers of a Qwen2VL's decoder and head by "int8" or "int4" ones.

    The vision encoder works on many rows at once, which fewer bits would not make faster, so
    it keeps its weights; so does the embedding table, which is only looked up.
    Raises ValueError where that is not possible.
    """
    if bits not in QUANTIZED:
        raise ValueError(f"quantize is {bits!r}, expected 'int8', 'int4' or None")
    device = next(model.parameters()).device.type
    if bits == "int4" and device not in ("cpu", "meta"):
        raise ValueError(
            f"int4 weights are for the CPU, this model is on {device}; int8 works there, too"
        )
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.startswith("visual."):
            model.set_submodule(name, QUANTIZED[bits](module))
