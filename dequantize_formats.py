"""Quantized weights that become plain ones while they are loaded: bitsandbytes (4 bits) and FP8.

Such a checkpoint stores the weight W [out, in] of a linear layer in few bits, and beside it the
tensors that give its values. Here each group becomes one `StoredTensor`, whose `load` returns W.
So the files are small, but the memory is that of plain weights.

bitsandbytes, in blocks of weights that are neighbors in the flattened W:

    weight                      two weights q to a byte, the first of them in the high bits
    weight.quant_map            floating point [16]: the value of each q (NF4, FP4)
    weight.absmax               floating point [blocks]: the scale of each block
    weight.quant_state.bitsandbytes__nf4 (or __fp4)
                                uint8 [n]: JSON, with the shape, the dtype and the block size of W

    W = quant_map[q] · absmax

With double quantization, absmax is uint8 [blocks], and its blocks have scales in turn:

    weight.nested_quant_map     floating point [256]: the value of each byte
    weight.nested_absmax        floating point [nested blocks]

    W = quant_map[q] · (nested_quant_map[absmax] · nested_absmax + nested_offset)

FP8, as transformers (quant_method "fp8") and compressed-tensors ("float-quantized") write it:

    weight                      float8_e4m3fn [out, in]
    weight_scale                floating point: one number, one of each output [out] or [out, 1],
    or weight_scale_inv         or one of each block of outputs and inputs (mostly 128 × 128)

    W = weight · scale (the name "inv" notwithstanding)

FP8 can also have scales of activations. They are left out, as activations keep their dtype here.

Sources: arXiv 2305.14314 (QLoRA); bitsandbytes 0.50.2, `QuantState.from_dict` and
`dequantize_4bit`; arXiv 2209.05433 (FP8); compressed-tensors 0.20.0,
`FloatQuantizationCompressor`; transformers 5.23.0, `Fp8Dequantize`.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from config_fields import Size, check_fields, is_size
from errors import first_line
from stored_tensors import StoredTensor

BITSANDBYTES = "bitsandbytes (4 bits)"
FP8 = "FP8"
STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
SCALES = ("weight_scale", "weight_scale_inv")
# Of each format, the names of the tensors beside `weight`.
PARTS = {
    BITSANDBYTES: (
        *STATES,
        "weight.quant_map",
        "weight.absmax",
        "weight.nested_quant_map",
        "weight.nested_absmax",
    ),
    FP8: (*SCALES, "input_scale", "activation_scale"),
}
# Dtypes in a safetensors file.
FP8_DTYPE = "F8_E4M3"
FOUR_BITS_DTYPE = "U4"  # two to a byte; safetensors itself has no such dtype
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
MAX_STATE_BYTES = 10_000  # bitsandbytes writes less than 200
CHUNK = 2**17  # half of the weights of 4 bits that are dequantized at a time: they stay in a cache


# ------------------------------------------------------------------------------------- config.json
@dataclass(frozen=True)
class Format:
    """How a checkpoint has quantized the layers that are dequantized while they are loaded."""

    name: str  # BITSANDBYTES or FP8
    block: tuple[int, int] | None = None  # outputs and inputs that share a scale of FP8

    @property
    def stored_dtype(self) -> str:
        """Return the dtype of a quantized weight in the files."""
        return FP8_DTYPE if self.name == FP8 else FOUR_BITS_DTYPE


def parse_format(settings: dict) -> Format | None:
    """Return the format that a `quantization_config` describes, None if it is neither of the two.

    Raises ValueError for a block or weights that are not known.
    """
    method = settings.get("quant_method")
    if method in (None, "bitsandbytes") and settings.get("load_in_4bit"):
        return Format(BITSANDBYTES)
    if method == "fp8":
        block = settings.get("weight_block_size", [128, 128])  # by default, as in transformers
        return Format(FP8, parse_block("weight_block_size", block))
    if method == "compressed-tensors" and settings.get("format") == "float-quantized":
        return Format(FP8, compressed_block(settings.get("config_groups")))
    return None


def parse_block(name: str, block: object) -> tuple[int, int] | None:
    """Return the two widths of a block, None for null. Raises ValueError naming the field."""
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(map(is_size, block)):
        raise ValueError(f"{name}: expected two positive integers, got {reprlib.repr(block)}")
    return block[0], block[1]


def compressed_block(groups: object) -> tuple[int, int] | None:
    """Return the block that all groups of layers of compressed-tensors have.

    Raises ValueError for weights other than FP8, and for different blocks.
    """
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"config_groups: expected groups of layers, got {reprlib.repr(groups)}")
    blocks = set()
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise ValueError(f"config_groups: expected weights, got {reprlib.repr(group)}")
        if weights.get("type") != "float" or weights.get("num_bits") != 8:
            raise ValueError(
                "config_groups: expected weights of type 'float' and 8 bits, got "
                f"{reprlib.repr(weights.get('type'))} and {reprlib.repr(weights.get('num_bits'))}"
            )
        blocks.add(parse_block("block_structure", weights.get("block_structure")))
    if len(blocks) > 1:
        raise ValueError("config_groups: expected the same block_structure for all layers")
    return blocks.pop()


# ----------------------------------------------------------------------------------------- tensors
def join_parts(stored: dict[str, StoredTensor], format: Format) -> dict[str, StoredTensor]:
    """Return the tensors, each quantized weight joined with its parts. Only headers are read.

    The files decide which weights are quantized, as the lists in config.json are often incomplete.
    Raises ValueError naming a tensor that is missing or does not fit those beside it.
    """
    joined: dict[str, StoredTensor] = {}
    parts_of: dict[str, dict[str, StoredTensor]] = {}  # by the name of the weight
    for name, tensor in stored.items():
        part = find_part(name, format)
        if part is not None:
            parts_of.setdefault(name.removesuffix(part) + "weight", {})[part] = tensor
            continue
        joined[name] = tensor
        if format.name == FP8 and tensor.dtype() == FP8_DTYPE:
            parts_of.setdefault(name, {})  # also without a scale, which is then missing
    for name, parts in parts_of.items():
        if name not in joined:
            raise misfit(next(iter(parts.values())), f"{name} beside it", "none")
        if format.name == FP8:
            joined[name] = join_fp8(joined[name], parts, format.block)
        else:
            joined[name] = join_four_bits(joined[name], parts)
    return joined


def find_part(name: str, format: Format) -> str | None:
    """Return which part of a quantized layer a tensor of that name is, None for any other."""
    for part in PARTS[format.name]:
        if name.endswith(f".{part}"):
            return part
    return None


def misfit(tensor: StoredTensor, expected: str, actual: object) -> ValueError:
    """Return the error that names a tensor, its file, what was expected and what was found."""
    return ValueError(f"{tensor.key} in {tensor.path}: expected {expected}, got {actual}")


def check_part(part: StoredTensor, dtypes: Iterable[str], size: int) -> None:
    """Raise ValueError unless a part has one of the dtypes, and that many numbers."""
    if part.dtype() not in dtypes:
        raise misfit(part, f"the dtype {' or '.join(dtypes)}", part.dtype())
    if math.prod(part.shape()) != size:
        raise misfit(part, f"{size} numbers", f"the shape {part.shape()}")


# ------------------------------------------------------------------------------------ bitsandbytes
@dataclass(frozen=True)
class QuantState:
    """What the JSON beside a weight specifies. Raises ValueError for a value that cannot be."""

    shape: list[int]  # of the weight
    dtype: str  # that its values are rounded to
    blocksize: Size
    nested_blocksize: Size | None  # null without double quantization
    nested_offset: float | None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.nested_blocksize and self.nested_offset is None:
            raise ValueError("nested_offset: expected a number beside nested_blocksize, got none")
        shape = self.shape
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(is_size, shape)):
            raise ValueError(f"shape: expected two positive integers, got {reprlib.repr(shape)}")
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(
                "dtype: expected 'float32', 'float16' or 'bfloat16', got "
                f"{reprlib.repr(self.dtype)}"
            )


def read_quant_state(tensor: StoredTensor) -> QuantState:
    """Return the content of a `quant_state` tensor. Raises ValueError naming it and its file."""
    size = math.prod(tensor.shape())
    check_part(tensor, ["U8"], min(size, MAX_STATE_BYTES))
    try:
        content = json.loads(bytes(tensor.load().flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise misfit(tensor, "JSON", first_line(error)) from error
    if not isinstance(content, dict):
        raise misfit(tensor, "a JSON object", reprlib.repr(content))
    values: dict[str, Any] = {field.name: content.get(field.name) for field in fields(QuantState)}
    try:
        return QuantState(**values)
    except ValueError as error:
        raise ValueError(f"{tensor.key} in {tensor.path}: {error}") from error


def join_four_bits(weight: StoredTensor, parts: dict[str, StoredTensor]) -> FourBitTensor:
    """Return a weight of bitsandbytes with its parts. Raises ValueError for one that is wrong."""
    states = [parts[name] for name in STATES if name in parts]
    if len(states) != 1:
        raise misfit(weight, "one weight.quant_state beside it", len(states))
    state = read_quant_state(states[0])
    size = math.prod(state.shape)
    blocks = math.ceil(size / state.blocksize)
    sizes = {"weight.quant_map": 16, "weight.absmax": blocks}
    dtypes = {"weight.absmax": ["U8"]} if state.nested_blocksize else {}
    if state.nested_blocksize:
        nested_blocks = math.ceil(blocks / state.nested_blocksize)
        sizes |= {"weight.nested_quant_map": 256, "weight.nested_absmax": nested_blocks}
    names = parts.keys() - set(STATES)
    if names != sizes.keys():
        raise misfit(weight, f"{', '.join(sorted(sizes))} beside it", ", ".join(sorted(names)))
    for name, part_size in sizes.items():
        check_part(parts[name], dtypes.get(name, FLOATS), part_size)
    # `bnb_4bit_quant_storage` may have put several bytes into one number.
    bytes_of_number = FLOATS.get(weight.dtype(), 1)
    check_part(weight, ["U8", *FLOATS], math.ceil(size / 2 / bytes_of_number))
    return FourBitTensor(weight.path, weight.shard, weight.key, parts, state)


@dataclass(frozen=True)
class FourBitTensor(StoredTensor):
    """A weight [out, in] that bitsandbytes has quantized to 4 bits."""

    parts: dict[str, StoredTensor]
    state: QuantState

    def shape(self) -> list[int]:
        return self.state.shape

    def dtype(self) -> str:
        return FOUR_BITS_DTYPE

    def is_floating_point(self) -> bool:
        return True  # when it is loaded

    def load(self) -> Tensor:
        """Return W, rounded to the dtype that it had before it was quantized.

        So does bitsandbytes before it casts W to the dtype of the activations.
        """
        state = self.state
        absmax = self.parts["weight.absmax"].load()
        if state.nested_blocksize:
            values = self.parts["weight.nested_quant_map"].load().float()[absmax.int()]
            nested_absmax = self.parts["weight.nested_absmax"].load()
            absmax = scale_blocks(values, nested_absmax, state.nested_blocksize)
            absmax += cast(float, state.nested_offset)
        packed = super().load().view(torch.uint8).flatten()
        quant_map = self.parts["weight.quant_map"].load().float()
        size = math.prod(state.shape)
        weight = torch.empty(size, dtype=getattr(torch, state.dtype))
        step = 2 * state.blocksize * math.ceil(CHUNK / state.blocksize)
        for start in range(0, size, step):  # in whole blocks and bytes
            stop = min(start + step, size)
            values = four_bit_values(packed[start // 2 : math.ceil(stop / 2)], quant_map)
            scales = absmax[start // state.blocksize : math.ceil(stop / state.blocksize)]
            weight[start:stop] = scale_blocks(values[: stop - start], scales, state.blocksize)
        return weight.view(state.shape)


def four_bit_values(packed: Tensor, quant_map: Tensor) -> Tensor:
    """Return the two values of each byte: uint8 [n], float32 [16] → float32 [2 n]."""
    every_byte = torch.arange(256)
    pairs = torch.stack((quant_map[every_byte >> 4], quant_map[every_byte & 15]), dim=1)
    # Looked up as one number of 64 bits, a pair takes a third of the time.
    return pairs.view(torch.int64).flatten().index_select(0, packed.int()).view(torch.float32)


def scale_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Return float32 values [n], each `size` of them times one of the scales [blocks]."""
    size = min(size, len(values))
    blocks = F.pad(values, (0, -len(values) % size)).view(-1, size)  # the last may be short
    return (blocks * scales.float().view(-1, 1)).flatten()[: len(values)]


# --------------------------------------------------------------------------------------------- FP8
def join_fp8(
    weight: StoredTensor, parts: dict[str, StoredTensor], block: tuple[int, int] | None
) -> Fp8Tensor:
    """Return a weight of FP8 with its scale. Raises ValueError for one that is wrong."""
    scales = [parts[name] for name in SCALES if name in parts]
    if len(scales) != 1:
        raise misfit(weight, "one weight_scale or weight_scale_inv beside it", len(scales))
    [scale] = scales
    shape = weight.shape()
    if weight.dtype() != FP8_DTYPE or len(shape) != 2:
        raise misfit(weight, f"{FP8_DTYPE} [out, in]", f"{weight.dtype()} {shape}")
    outputs, inputs = shape
    scale_shape = scale.shape()
    if math.prod(scale_shape) == 1:
        block = (outputs, inputs)
    elif scale_shape in ([outputs], [outputs, 1]):
        block = (1, inputs)
    elif block is None:
        raise misfit(scale, f"the shape [1] or [{outputs}, 1]", scale_shape)
    rows = min(block[0], outputs)
    columns = min(block[1], inputs)
    grid = [math.ceil(outputs / rows), math.ceil(inputs / columns)]
    if math.prod(scale_shape) > 1 and scale_shape not in (grid, grid[:1]):
        raise misfit(scale, f"the shape {grid} for blocks of {rows} × {columns}", scale_shape)
    check_part(scale, FLOATS, math.prod(grid))
    return Fp8Tensor(weight.path, weight.shard, weight.key, scale, rows, columns)


@dataclass(frozen=True)
class Fp8Tensor(StoredTensor):
    """A weight [out, in] in FP8, with a scale for each block of rows × columns."""

    scale: StoredTensor
    rows: int
    columns: int

    def load(self) -> Tensor:
        """Return W in float32, which holds the products with scales of 16 bits exactly."""
        weight = super().load().float()
        outputs, inputs = weight.shape
        scale = self.scale.load().float().view(math.ceil(outputs / self.rows), -1)
        scale = scale.repeat_interleave(self.rows, dim=0)[:outputs]  # [out, columns of blocks]
        for i, start in enumerate(range(0, inputs, self.columns)):
            weight[:, start : start + self.columns] *= scale[:, i : i + 1]
        return weight
