"""How PyTorch's 4-bit kernel for the CPU arranges its integers: into that layout, and out of it.

The kernel reads the outputs (rows) of a weight in blocks. A block of n rows has n / 2 bytes for
each input, one input after the other, and each byte holds the integers of two rows. Processors
differ in the rows of a block, 32 with AVX2 and 64 with AVX-512, and in which two rows share a byte.
Both are read off PyTorch's own operator, once. That operator takes four bytes for each integer,
which is most of the time that it takes; the functions here work on bytes.

Source: PyTorch 2.13, aten/src/ATen/native/cpu/int4mm_kernel.cpp, `weight_to_int4pack_kernel`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from packed_weights import copy_in_order

MULTIPLE = 16  # of rows that the kernel takes
CACHED_ROWS = 512  # that are in the cache between the steps of `pack_words_for_kernel`
PROBE = (256, 32)  # the shape of a weight that shows the layout: rows of several blocks


def pack_by_operator(numbers: Tensor) -> Tensor:
    """Return integers from 0 to 15 [n, in], n a multiple of 16, as uint8 [n, in / 2]."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)


@functools.cache
def block_rows() -> int:
    """Return the number of rows of a block; the last one of a weight may have fewer."""
    numbers = torch.zeros(PROBE, dtype=torch.uint8, device="cpu")
    numbers[:, 0] = 1
    is_first_input = pack_by_operator(numbers).flatten() != 0
    return 2 * int(is_first_input.int().argmin())  # the bytes before those of the second input


@functools.cache
def shares_halves(rows: int) -> bool:
    """Return whether row i of a block shares a byte with row i + rows / 2, or with a neighbor.

    Raises RuntimeError for any other arrangement.
    """
    index = torch.arange(rows, device="cpu")[:, None].expand(rows, PROBE[1])
    digits = pack_by_operator(index % 16).flatten()[: rows // 2].int()
    sixteens = pack_by_operator(index // 16).flatten()[: rows // 2].int()
    low = (digits & 15) + 16 * (sixteens & 15)
    high = (digits >> 4) + 16 * (sixteens >> 4)
    order = torch.stack((low, high))
    if order.flatten().tolist() == list(range(rows)):
        return True
    if order.T.flatten().tolist() == list(range(rows)):
        return False
    raise RuntimeError(
        "expected PyTorch's int4 kernel to put the halves of a block or neighboring rows into a "
        f"byte, got rows {low.tolist()} and {high.tolist()}"
    )


def block_ranges(rows: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Yield start and end of at most so many rows of equal blocks, and the rows of each block."""
    size = block_rows()
    whole = rows - rows % size
    step = max(most - most % size, size)
    for start in range(0, whole, step):
        yield start, min(start + step, whole), size
    if whole < rows:
        yield whole, rows, rows - whole


def pair_rows(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return views of the rows in the low and in the high bits: [n, …] → [n/size, size/2, …] each.

    x: all rows of blocks of that size.
    """
    if shares_halves(size):
        pairs = x.unflatten(0, (-1, 2, size // 2))
        return pairs[:, 0], pairs[:, 1]
    pairs = x.unflatten(0, (-1, size // 2, 2))
    return pairs[:, :, 0], pairs[:, :, 1]


def pad_rows(x: Tensor) -> Tensor:
    """Return x [n, m] with zeros for the rows up to a multiple that the kernel takes."""
    missing = -len(x) % MULTIPLE
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def pack_for_kernel(numbers: Tensor) -> Tensor:
    """Return integers from 0 to 15, uint8 [n, in], as uint8 [n or up to 15 more, in / 2]."""
    numbers = pad_rows(numbers)
    packed = numbers.new_empty(len(numbers), numbers.shape[1] // 2)
    for start, stop, size in block_ranges(len(numbers), len(numbers)):
        low, high = pair_rows(numbers[start:stop], size)
        by_input = packed[start:stop].view(-1, numbers.shape[1], size // 2)
        by_input.copy_((low | high << 4).transpose(1, 2))
    return packed


def pack_words_for_kernel(words: Tensor) -> Tensor:
    """Return GPTQ's int32 [in / 8, n], each of eight inputs, as `pack_for_kernel` does.

    The first input is in the lowest bits. No integer ever has a byte of its own.
    """
    pairs = 4 * len(words)  # of inputs: those that share a byte
    rows = words.shape[1] + -words.shape[1] % MULTIPLE
    packed = words.new_empty(rows, pairs, dtype=torch.uint8)
    for start, stop, size in block_ranges(rows, CACHED_ROWS):
        # A whole matrix, and not a slice of one, is transposed in blocks, twice as fast for 1536
        # outputs of 8960 inputs.
        by_row = copy_in_order(words[:, start:stop].contiguous().T).view(torch.uint8)
        low, high = pair_rows(pad_rows(by_row), size)
        by_input = packed[start:stop].view(-1, pairs, 2, size // 2)
        by_input[:, :, 0] = (low & 15 | high << 4).transpose(1, 2)
        by_input[:, :, 1] = (low >> 4 | high & 240).transpose(1, 2)
    return packed


def unpack_from_kernel(packed: Tensor) -> Tensor:
    """Return the integers, uint8 [n, in], that `pack_for_kernel` packed, padding included."""
    rows, inputs = packed.shape[0], 2 * packed.shape[1]
    numbers = packed.new_empty(rows, inputs)
    for start, stop, size in block_ranges(rows, rows):
        low, high = pair_rows(numbers[start:stop], size)
        by_input = packed[start:stop].view(-1, inputs, size // 2).transpose(1, 2)
        low.copy_(by_input & 15)
        high.copy_(by_input >> 4)
    return numbers
