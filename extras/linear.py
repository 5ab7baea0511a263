"""Linear layers for the CPU: which of PyTorch's kernels multiplies, and weights of eight or four bits.

`load_weights.py` puts these in the place of `nn.Linear`; the parameters keep their names, and `qwen2vl.py` shows the
plain layer. A product with a few rows waits for its weights to come from memory, one with many rows for arithmetic,
so the right kernel differs, and so does the right dtype. What each choice brings is measured in benchmarks/README.md.

Shapes: rows, all dimensions but the last of x together; in and out, the two widths of a weight [out, in].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MANY = 16  # so many rows make up for the time that widening a weight takes


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weightᵀ + bias by oneDNN. In float32, where PyTorch itself uses MKL, up to twice as fast."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def has_half_products(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of the dtype, float16 or bfloat16, at more than float32's rate."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    # oneDNN supports bfloat16 on every processor with AVX-512, but without the instructions for it at a third.
    emulated = (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not torch.cpu._is_avx512_bf16_supported()
    )
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated


def has_onednn_kernel(dtype: torch.dtype) -> bool:
    """Return whether oneDNN multiplies matrices of the dtype, float16 or bfloat16, at whatever rate."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prefer_pytorch_gemv() -> None:
    """Make `F.linear` of a single bfloat16 row use PyTorch's own kernel, in the whole process.

    A program calls this once, before it starts threads. PyTorch has no other way to reach that kernel: every
    operator that multiplies a matrix by a vector asks this one process-wide switch. Without the call all results
    are as exact and decoding in bfloat16 is slower. `product` calls oneDNN by name where that is faster, whatever
    the switch, so only the patch embedding and eager attention lose by it.

    Microseconds for one row, medians of interleaved runs, AMD EPYC with AVX512_BF16, 2 threads, torch 2.13:

        weight [out, in]        8960×1536  1536×8960  1536×1536  151936×1536
        PyTorch's own kernel          778       1123        124        11021
        oneDNN (F.linear, mm)        1365       1387        229        22771
        torch.mv, torch.addmv        1645       1471        308        33337
        oneDNN, packed weight        1075       1048        198        17515  (a second copy of the weights)
        conv2d of a 1×1 image        2671       2140        417       160650
    """
    torch.backends.mkldnn.enabled = False


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weightᵀ + bias without gradients, by the fastest kernel that changes no global state.

    x [..., in], weight [out, in], bias [out], all on the CPU → [..., out] in x's dtype.
    """
    rows = x.numel() // x.shape[-1]
    if x.dtype == torch.float64 or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    if x.dtype == torch.float32:
        return onednn_linear(x, weight, bias)
    if rows == 1:  # limited by reading the weights: see `prefer_pytorch_gemv`
        return F.linear(x, weight, bias)
    if rows >= MANY and not has_half_products(x.dtype):
        float_bias = None if bias is None else bias.float()
        return onednn_linear(x.float(), weight.float(), float_bias).to(x.dtype)
    if not has_onednn_kernel(x.dtype):
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


class CPULinear(nn.Linear):
    """`nn.Linear`, with gradients as PyTorch computes them, and without by the fastest kernel."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> CPULinear:
        """Return a layer that shares the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight = linear.weight
        layer.bias = linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x weightᵀ + bias: x [..., in] → [..., out]."""
        if torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias)
        return product(x, self.weight, self.bias)


def in_parts(
    quantise: Callable[[Tensor], tuple[Tensor, ...]], weight: Tensor
) -> list[nn.Parameter]:
    """What `quantise` makes of the rows of weight [out, in] in float32, as many at a time as a cache holds."""
    parts = zip(*(quantise(rows.float()) for rows in weight.detach().split(256)), strict=True)
    return [nn.Parameter(torch.cat(tensors), requires_grad=False) for tensors in parts]


class Int8Linear(nn.Module):
    """A linear layer whose weights are whole numbers from -127 to 127, with a scale for each output.

    The activations keep their dtype, but for a few rows on the CPU: those are rounded to bfloat16, which the kernel
    that reads bytes asks for. Source: arXiv 2208.07339 §2, for the weights alone.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.scale = in_parts(
            self.quantise, linear.weight
        )  # int8 [out, in], bfloat16 [out]
        self.bias = linear.bias

    @staticmethod
    def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = (rows.abs().amax(1) / 127).clamp(min=1e-12).bfloat16()  # a row of zeros stays one
        numbers = (
            (rows / scale[:, None].float()).round().clamp(-127, 127)
        )  # the rounded scale may be a little small
        return numbers.to(torch.int8), scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        if x.device.type == "cpu" and x.numel() < MANY * x.shape[-1]:
            rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
            y = (
                torch._weight_int8pack_mm(rows, self.weight, self.scale)
                .to(x.dtype)
                .view(*x.shape[:-1], -1)
            )
        else:
            multiply = product if x.device.type == "cpu" else F.linear
            y = multiply(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias


class Int4Linear(nn.Module):
    """A linear layer whose weights are whole numbers from 0 to 15, on the CPU alone.

    GROUP neighbours of a row share a scale and an offset: weight = (number - 8) · scale + offset. One kernel serves
    any number of rows, in bfloat16; for long prompts it is slower than plain weights. Raises ValueError for a width
    without whole groups.
    """

    GROUP = 32

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, inputs = linear.weight.shape
        if inputs % self.GROUP:
            raise ValueError(
                f"int4 needs layers of whole groups of {self.GROUP} inputs, found one of {inputs}"
            )
        self.weight, scale = in_parts(
            self.quantise, linear.weight
        )  # the kernel's own order, [out, in / 2] bytes
        self.scale = nn.Parameter(
            scale.transpose(0, 1).contiguous(), requires_grad=False
        )  # [in / GROUP, out, 2]
        self.bias = linear.bias

    @classmethod
    def quantise(cls, rows: Tensor) -> tuple[Tensor, Tensor]:
        groups = F.pad(rows, (0, 0, 0, -len(rows) % 16)).unflatten(
            1, (-1, cls.GROUP)
        )  # the kernel takes sixteens
        low, high = groups.amin(2), groups.amax(2)  # [out, in / GROUP]
        scale = ((high - low) / 15).clamp(min=1e-12).bfloat16()
        offset = (low + 8 * scale.float()).bfloat16()
        numbers = (
            ((groups - offset[..., None].float()) / scale[..., None].float() + 8)
            .round()
            .clamp(0, 15)
        )
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.flatten(1).int(), 1)
        return packed, torch.stack((scale, offset), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).bfloat16().contiguous()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.GROUP, self.scale)
        y = y[:, : self.out_features].to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def swap(model: nn.Module, quantize: str | None) -> None:
    """Puts these layers in the place of a Qwen2VL's plain ones: "int8" or "int4" in the decoder and its head.

    The vision transformer works on many rows at once, which fewer bits would not make quicker, so it keeps its
    weights; so does the embedding table, which is only looked up. Raises ValueError for what cannot be had.
    """
    kinds = {None: None, "int8": Int8Linear, "int4": Int4Linear}
    if quantize not in kinds:
        raise ValueError(f"quantize is {quantize!r}, expected 'int8', 'int4' or None")
    device = next(model.parameters()).device.type
    if quantize == "int4" and device not in ("cpu", "meta"):
        raise ValueError(
            f"int4 weights are for the CPU, this model is on {device}; int8 works there, too"
        )
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear:
            continue
        if quantize and not name.startswith("visual."):
            model.set_submodule(name, kinds[quantize](module))
        elif device == "cpu" and torch.backends.mkldnn.is_available():
            model.set_submodule(name, CPULinear.from_linear(module))
