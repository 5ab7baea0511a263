"""`int4_layout.py`: what it packs is what PyTorch's own operator packs, on every processor."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import int4_layout
from command_line import BUNDLED_CHECKPOINT
from packed_weights import pack_int32

SHAPES = [(16, 32), (48, 64), (64, 96), (272, 128), (256, 2048), (32, 32), (96, 32), (1104, 64)]


def forget_the_layout():
    int4_layout.block_rows.cache_clear()
    int4_layout.shares_halves.cache_clear()


@pytest.fixture
def layout(monkeypatch):
    """Return a function that replaces PyTorch's operator; what was read off it is forgotten."""

    def replace(operator):
        monkeypatch.setattr(int4_layout, "pack_by_operator", operator)
        forget_the_layout()

    yield replace
    forget_the_layout()


def pack_plainly(numbers, size, halves):
    """Pack as a kernel with blocks of that size does, one byte after the other.

    The last block, if it is smaller, has neighbors in a byte, whatever the others have.
    """
    packed = []
    for start in range(0, len(numbers), size):
        block = numbers[start : start + size].tolist()
        half = len(block) // 2
        pairs = [(2 * i, 2 * i + 1) for i in range(half)]
        if halves and len(block) == size:
            pairs = [(i, half + i) for i in range(half)]
        for column in range(numbers.shape[1]):
            packed += [block[low][column] + 16 * block[high][column] for low, high in pairs]
    return torch.tensor(packed, dtype=torch.uint8).view(len(numbers), -1)


def random_numbers(shape):
    return torch.randint(0, 16, shape, dtype=torch.uint8)


def words_of_inputs(numbers):
    """Return int32 [in / 8, n] as GPTQ has them."""
    return pack_int32(numbers, 4).T.contiguous()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pack_for_kernel_equals_the_operator(shape):
    numbers = random_numbers(shape)
    expected = int4_layout.pack_by_operator(numbers)
    assert torch.equal(int4_layout.pack_for_kernel(numbers), expected)
    assert torch.equal(int4_layout.pack_for_kernel(numbers.T.contiguous().T), expected)
    assert torch.equal(int4_layout.pack_words_for_kernel(words_of_inputs(numbers)), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpack_from_kernel_is_the_inverse_of_the_operator(shape):
    numbers = random_numbers(shape)
    packed = int4_layout.pack_by_operator(numbers)
    assert torch.equal(int4_layout.unpack_from_kernel(packed), numbers)


@pytest.mark.parametrize("rows", [1, 17, 37, 90, 530])
def test_pack_for_kernel_pads_rows_with_zeros(rows):
    numbers = random_numbers((rows, 64))
    padded = F.pad(numbers, (0, 0, 0, -rows % 16))
    expected = int4_layout.pack_by_operator(padded)
    assert torch.equal(int4_layout.pack_for_kernel(numbers), expected)
    assert torch.equal(int4_layout.pack_words_for_kernel(words_of_inputs(numbers)), expected)


@pytest.mark.parametrize(("size", "halves"), [(32, True), (64, True), (16, False), (32, False)])
def test_layouts_of_other_processors_are_read_off_the_operator(size, halves, layout):
    layout(lambda numbers: pack_plainly(numbers, size, halves))
    assert int4_layout.block_rows() == size
    assert int4_layout.shares_halves(size) == halves
    numbers = random_numbers((208, 64))
    expected = pack_plainly(numbers, size, halves)
    assert torch.equal(int4_layout.pack_for_kernel(numbers), expected)
    assert torch.equal(int4_layout.pack_words_for_kernel(words_of_inputs(numbers)), expected)
    assert torch.equal(int4_layout.unpack_from_kernel(expected), numbers)


def test_a_layout_that_is_not_known_is_refused(layout):
    layout(lambda numbers: pack_plainly(numbers.flip(0), 32, True))
    with pytest.raises(RuntimeError, match="halves of a block or neighboring rows into a byte"):
        int4_layout.pack_for_kernel(random_numbers((32, 32)))


def test_block_ranges_cover_all_rows_in_equal_blocks(layout):
    layout(lambda numbers: pack_plainly(numbers, 32, True))
    ranges = list(int4_layout.block_ranges(112, 70))
    assert ranges == [(0, 64, 32), (64, 96, 32), (96, 112, 16)]
    assert list(int4_layout.block_ranges(64, 1)) == [(0, 32, 32), (32, 64, 32)]


WITHOUT_VECTORS = """
import torch
import int4_layout
assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
numbers = torch.randint(0, 16, (208, 64), dtype=torch.uint8)
packed = int4_layout.pack_by_operator(numbers)
assert torch.equal(int4_layout.pack_for_kernel(numbers), packed)
assert torch.equal(int4_layout.unpack_from_kernel(packed), numbers)
"""


@pytest.mark.slow
def test_packing_equals_the_operator_of_a_processor_without_vector_instructions(monkeypatch):
    """In a separate process, as the kernels are chosen once."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_VECTORS],
        capture_output=True,
        text=True,
        cwd=BUNDLED_CHECKPOINT.parent.parent,
    )
    assert (process.returncode, process.stderr) == (0, "")
