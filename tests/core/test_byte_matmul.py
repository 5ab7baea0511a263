"""`byte_matmul.py`: digits make up the numbers, and a kernel that is used is exact."""

import os
import subprocess
import sys

import pytest
import torch

import byte_matmul
from byte_matmul import FbgemmBytes, OneDnnBytes
from command_line import BUNDLED_CHECKPOINT

KERNELS = [OneDnnBytes, FbgemmBytes]


def signed(kernel, digits):
    """Return digits as the kernel reads them, in float64."""
    if isinstance(kernel, OneDnnBytes):
        assert digits.dtype == torch.uint8
        return digits.double() - 128
    return digits.double().round()


@pytest.mark.parametrize("kind", KERNELS)
def test_digits_are_within_half_a_step_of_the_numbers(kind):
    kernel = kind()
    numbers = (torch.rand(7, 900) * 2 - 1) * kernel.largest
    numbers[0, 0], numbers[1, 1] = kernel.largest, -kernel.largest
    numbers[2] = 0
    high, low = kernel.split(numbers.clone())
    some_high, some_low = kernel.split(numbers.clone(), torch.tensor([5, 0]))
    assert torch.equal(some_high, high)
    assert torch.equal(some_low, low[[5, 0]])
    high, low = signed(kernel, high), signed(kernel, low)
    assert max(high.abs().max(), low.abs().max()) <= kernel.base / 2
    # Half a step, and the rounding of float32 numbers up to 65,535.
    assert (high * kernel.base + low - numbers.double()).abs().max() < 0.51
    assert not high[2].any()
    assert not low[2].any()


@pytest.mark.parametrize("rows", [1, 2, 3, 70])
@pytest.mark.parametrize("kind", KERNELS)
def test_products_are_exact(kind, rows):
    kernel = kind()
    if not kernel.is_usable():
        pytest.skip("needs other instructions")
    weight = torch.randint(-128, 128, (37, 333), dtype=torch.int8)
    scale = torch.rand(37).bfloat16() + 0.1
    sign = torch.randint(2, (rows, 333)) * 2.0 - 1  # the largest digits of either sign
    high, _low = kernel.split(sign * kernel.largest)
    packed = kernel.pack(weight, scale)
    assert torch.equal(kernel.unpack(packed), weight)
    products = kernel.multiply(high, packed)
    expected = signed(kernel, high) @ weight.double().T * scale.double()
    assert products.dtype == torch.float32
    torch.testing.assert_close(products.double(), expected, rtol=2e-7, atol=1e-3)


def test_a_kernel_that_saturates_is_not_used(monkeypatch):
    def saturate(self, digits, packed):
        return torch.zeros(len(digits), 64)

    for kind in KERNELS:
        monkeypatch.setattr(kind, "multiply", saturate)
    assert byte_matmul.byte_kernel.__wrapped__() is None


CHOICE = """
import torch
from byte_matmul import byte_kernel
kernel = byte_kernel()
if kernel is not None:
    weight = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    high, _low = kernel.split(torch.full((3, 64), float(kernel.largest)))
    products = kernel.multiply(high, kernel.pack(weight, torch.ones(64)))
    largest = kernel.largest // kernel.base
    assert torch.equal(products, largest * weight.float().sum(1).expand(3, -1))
print(type(kernel).__name__)
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "DEFAULT"])
def test_the_chosen_kernel_is_exact_and_says_nothing(instructions):
    """In a separate process, as oneDNN chooses its kernels once."""
    process = subprocess.run(
        [sys.executable, "-c", CHOICE],
        capture_output=True,
        text=True,
        cwd=BUNDLED_CHECKPOINT.parent.parent,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions},
    )
    assert process.returncode == 0
    assert process.stderr == ""
    if OneDnnBytes().is_usable():
        expected = "OneDnnBytes" if instructions == "DEFAULT" else "NoneType"
    else:
        expected = "FbgemmBytes" if FbgemmBytes().is_usable() else "NoneType"
    assert process.stdout.split() == [expected]
