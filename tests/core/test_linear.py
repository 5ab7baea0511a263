"""`linear.py`: every kernel equals the plain matmul, and quantized layers are near it."""

import copy
import math
import pickle
import subprocess
import sys
import types
import weakref

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPES, make_batch, our_config, our_model, random_sequence, random_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import generate
import linear
from byte_matmul import FbgemmBytes, OneDnnBytes
from command_line import BUNDLED_CHECKPOINT
from linear import (
    FEW_ROWS,
    LEAST_BYTE_ROWS,
    MANY_INT4_ROWS,
    MANY_INT8_ROWS,
    MANY_ROWS,
    ByteInt8Linear,
    Int4Linear,
    Int8Linear,
    Linear,
)
from load_weights import load_model
from preprocess import Processor
from qwen2vl import Qwen2VL

CUDA = torch.device("cuda")
HALVES = [torch.bfloat16, torch.float16]
# Largest error, as a share of the largest output: rounding of the inputs, and of the output.
LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def make_linear(inputs, outputs, bias=True, dtype=torch.float32, seed=0):
    """Return PyTorch's own linear layer with random weights."""
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias).to(dtype)


def relative_error(output, expected):
    """Return the largest absolute difference as a share of the largest expected output."""
    difference = (output.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max()).item()


def expected_output(plain, x):
    """Return the layer's output in float64."""
    bias = None if plain.bias is None else plain.bias.double()
    return F.linear(x.double(), plain.weight.double(), bias)


# ----------------------------------------------------------------------------- the choice of kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (3, 5), (1, MANY_ROWS), (7, 33)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_cpu_matmul_equals_the_plain_matmul_for_every_dtype_and_number_of_rows(dtype, shape, bias):
    plain = make_linear(48, 37, bias, dtype)
    x = torch.randn(*shape, 48).to(dtype)
    output = linear.cpu_matmul(
        x, plain.weight.detach(), None if plain.bias is None else plain.bias.detach()
    )
    assert output.dtype == dtype
    assert output.shape == (*shape, 37)
    assert relative_error(output, expected_output(plain, x)) < LIMITS[dtype]


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cpu_matmul_upcasts_rows_where_half_precision_is_slow(dtype, has_kernel, monkeypatch):
    """Without a kernel of oneDNN fewer rows are worth it; each part of the weights is upcast."""
    upcast_rows = []

    def recorded(x, *weight_and_bias):
        if x.dtype == torch.float32:
            upcast_rows.append(len(x))
        return F.linear(x, *weight_and_bias)

    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: False)
    monkeypatch.setattr(linear, "has_onednn_kernel", lambda dtype: has_kernel)
    monkeypatch.setattr(linear, "onednn_linear", recorded)
    monkeypatch.setattr(linear, "chunk_rows", lambda inputs: 20)
    plain = make_linear(48, 37, dtype=dtype)
    with torch.no_grad():
        for rows in (1, 2, FEW_ROWS - 1, FEW_ROWS, MANY_ROWS - 1, MANY_ROWS, 100):
            x = torch.randn(rows, 48).to(dtype)
            output = linear.cpu_matmul(x, plain.weight, plain.bias)
            assert output.dtype == dtype
            assert relative_error(output, expected_output(plain, x)) < LIMITS[dtype]
    least = [MANY_ROWS, 100] if has_kernel else [FEW_ROWS, MANY_ROWS - 1, MANY_ROWS, 100]
    expected = [rows for rows in least for _ in range(2)]  # 37 outputs are two parts
    assert upcast_rows == expected
    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: True)
    monkeypatch.setattr(linear, "has_onednn_kernel", lambda dtype: False)
    linear.cpu_matmul(x, plain.weight, plain.bias)
    assert upcast_rows == expected


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_cpu_matmul_never_changes_the_onednn_switch(dtype, enabled, monkeypatch):
    values = []
    multiply = F.linear

    def recorded(*arguments):
        values.append(torch.backends.mkldnn.enabled)
        return multiply(*arguments)

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    monkeypatch.setattr(F, "linear", recorded)
    for rows in (1, 2, MANY_ROWS):
        x = torch.randn(rows, 48).to(dtype)
        weight = torch.randn(37, 48).to(dtype)
        expected = multiply(x.double(), weight.double())
        assert relative_error(linear.cpu_matmul(x, weight), expected) < LIMITS[dtype]
    assert set(values) <= {enabled}
    assert torch.backends.mkldnn.enabled == enabled


THREADS = """
import sys, threading
import torch
import linear
from command_line import BUNDLED_CHECKPOINT
from generate import GenerationConfig, generate
from load_weights import load_model
from preprocess import Processor

dtype = getattr(torch, sys.argv[1])
if sys.argv[2] == "native":
    linear.prefer_pytorch_gemv()
sys.setswitchinterval(1e-6)  # threads switch as often as possible
model = load_model(BUNDLED_CHECKPOINT, "cpu", dtype)
processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
image = {"type": "image", "image": "examples/shapes.png"}
texts = ["How many shapes are there?", "Which color?", "What is this?", "Describe it."]
contents = [[image, {"type": "text", "text": text}] for text in texts]
batches = [processor([{"role": "user", "content": content}]) for content in contents]
expected = [generate(model, batch, 12, GenerationConfig()) for batch in batches]
enabled = torch.backends.mkldnn.enabled
wrong = []

def work(first):
    try:
        for turn in range(4):
            number = (first + turn) % len(batches)
            if generate(model, batches[number], 12, GenerationConfig()) != expected[number]:
                wrong.append(number)
    except BaseException as error:
        wrong.append(repr(error))

threads = [threading.Thread(target=work, args=(n,)) for n in range(int(sys.argv[3]))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert torch.backends.mkldnn.enabled == enabled
sys.exit(repr(wrong) if wrong else 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("kernel", ["default", "native"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_generate_in_threads_with_one_model_equals_one_thread(dtype, kernel, threads):
    """Run in a separate process, as an illegal instruction would end this one."""
    command = [sys.executable, "-c", THREADS, dtype, kernel, str(threads)]
    process = subprocess.run(
        command, capture_output=True, text=True, cwd=BUNDLED_CHECKPOINT.parent.parent
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_quantize_linears_refuses_int4_on_a_gpu():
    model = nn.Sequential(make_linear(32, 16)).to(torch.device("meta"))
    linear.quantize_linears(model, "int4")  # to be counted only
    with pytest.raises(ValueError, match="int4 weights are for the CPU, this model is on cuda"):
        linear.quantize_linears(
            types.SimpleNamespace(parameters=lambda: iter([types.SimpleNamespace(device=CUDA)])),
            "int4",
        )


def test_linear_has_gradients():
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    projection = model.model.layers[0].mlp.up_proj
    assert isinstance(projection, Linear)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert projection.weight.grad.abs().sum() > 0


@pytest.mark.sweep
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_pytorch_in_the_whole_model(shape, monkeypatch):
    model = our_model(SHAPES[shape], random_weights(SHAPES[shape]))
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {Linear}
    inputs = make_batch(
        [
            random_sequence(SHAPES[shape], [3, ("image", 2, 3), 5]),
            random_sequence(SHAPES[shape], [4]),
        ]
    )
    with torch.no_grad():
        output = model(**inputs)
        monkeypatch.setattr(Linear, "forward", nn.Linear.forward)
        assert helpers.gap(output, model(**inputs)) < 1e-5


# --------------------------------------------------------------------------------- quantized layers
@pytest.mark.slow
@given(
    st.integers(1, 600), st.sampled_from([1, 7, 32, 100]), st.sampled_from([1e-6, 0.02, 1.0, 300.0])
)
def test_int8_weights_are_within_half_a_step(outputs, inputs, size):
    plain = make_linear(inputs, outputs, seed=outputs)
    with torch.no_grad():
        plain.weight *= size
        plain.weight[0] = 0
    quantized = Int8Linear.from_linear(plain)
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight.shape == plain.weight.shape
    step = quantized.scale.float()[:, None]
    difference = (quantized.weight * step - plain.weight).abs()
    # Half a step. As bfloat16 may round the scale down by 1/512, the largest weight is up to
    # 127/512 of a step beyond.
    assert (difference <= 0.76 * step).all()
    assert (quantized.weight[0] == 0).all()
    assert (quantized.scale > 0).all()


@pytest.mark.slow
@given(st.integers(1, 600), st.sampled_from([32, 96]), st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
def test_int4_weights_are_within_half_a_step_or_clipped_a_little(outputs, inputs, size):
    plain = make_linear(inputs, outputs, bias=False, seed=outputs)
    with torch.no_grad():
        plain.weight *= size
        plain.weight[0] = size  # a row without a step
    quantized = Int4Linear.from_linear(plain)
    identity = torch.eye(inputs)
    output = quantized(identity).T  # the weights that the kernel uses
    step = quantized.scale[:, :outputs, 0].float().T.repeat_interleave(Int4Linear.GROUP, dim=1)
    assert output.shape == plain.weight.shape
    difference = (output - plain.weight).abs()
    # Added: the offset, 8 steps from 0 or more, is rounded to 8 bits, as is the output. Weights
    # that the smaller of two scales clips lie up to 5 % of 15 steps beyond.
    rounding = plain.weight.abs().max() / 128
    assert (difference <= 1.3 * step + rounding).all()
    assert (difference <= 0.5 * step + rounding).float().mean() > 0.85


def test_int4_takes_the_better_of_two_scales():
    rows = torch.randn(64, 128)
    groups = rows.T.unflatten(0, (-1, Int4Linear.GROUP))
    errors = []
    for share in (1, Int4Linear.SHRINK):
        scale, zero = Int4Linear.scale_of_range(groups.amin(1) * share, groups.amax(1) * share)
        errors.append(Int4Linear.squared_error(groups, scale, zero).T)
    assert (errors[0] < errors[1]).any()
    assert (errors[1] < errors[0]).any()
    plain = make_linear(128, 64, bias=False)
    plain.weight.data = rows
    difference = Int4Linear.from_linear(plain).dequantize(torch.float32) - rows
    found = difference.unflatten(1, (-1, Int4Linear.GROUP)).square().sum(2)
    # But for the offset, which the kernel rounds to bfloat16 and a saved file does not.
    assert (found < 1.05 * torch.minimum(*errors) + 1e-4).all()


def test_quantize_linears_releases_each_plain_weight(monkeypatch):
    model = nn.Sequential(make_linear(32, 16), make_linear(32, 16), make_linear(32, 16))
    weights = []
    quantize = Int8Linear.from_linear

    def recorded(layer):
        assert all(reference() is None for reference in weights), "an earlier layer is alive"
        weights.append(weakref.ref(layer.weight))
        return quantize(layer)

    monkeypatch.setattr(Int8Linear, "from_linear", recorded)
    linear.quantize_linears(model, "int8")
    assert len(weights) == 3


@pytest.mark.parametrize(("kind", "limit"), [(Int8Linear, 0.015), (Int4Linear, 0.12)])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, MANY_ROWS), (2, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_linear_is_near_the_plain_one(kind, limit, rows, dtype):
    plain = make_linear(64, 37, dtype=dtype)
    x = torch.randn(*rows, 64).to(dtype)
    with torch.no_grad():
        output = kind.from_linear(plain)(x)
    assert output.dtype == dtype
    assert output.shape == (*rows, 37)
    assert relative_error(output, expected_output(plain, x)) < limit


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [3, 40])
def test_quantized_linear_takes_inputs_that_are_not_contiguous(kind, rows):
    quantized = kind.from_linear(make_linear(64, 37, dtype=torch.bfloat16))
    x = torch.randn(rows, 5, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(quantized(x[:, -1:]), quantized(x[:, -1:].contiguous()))


@pytest.mark.parametrize(
    ("capability", "onednn", "native", "expected"),
    [
        ("AVX2", False, False, False),
        ("AVX512", True, False, False),
        ("AVX512", True, True, True),
        ("DEFAULT", True, False, True),  # an ARM processor with the instructions
    ],
)
def test_has_fast_half_matmul_needs_instructions_for_bfloat16(
    capability, onednn, native, expected, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert linear.has_fast_half_matmul(torch.bfloat16) == expected


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_quantized_linear_gives_the_same_for_few_rows_and_many(kind):
    quantized = kind.from_linear(make_linear(64, 37, dtype=torch.bfloat16))
    x = torch.randn(40, 64).bfloat16()
    with torch.no_grad():
        one_by_one = torch.cat([quantized(row[None]) for row in x])
        assert relative_error(one_by_one, quantized(x)) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("outputs", [16, 37, 64, 700])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("has_fast_bfloat16", [False, True])
def test_int4_many_rows_equal_the_kernel_within_rounding(
    has_fast_bfloat16, dtype, outputs, monkeypatch
):
    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: has_fast_bfloat16)
    monkeypatch.setattr(linear, "chunk_rows", lambda inputs: 256)  # three chunks of the largest
    quantized = Int4Linear.from_linear(make_linear(128, outputs, dtype=dtype))
    x = torch.randn(MANY_INT4_ROWS, 128).bfloat16().to(dtype)  # the kernel rounds the inputs
    with torch.no_grad():
        many = quantized(x)
        monkeypatch.setattr(linear, "MANY_INT4_ROWS", len(x) + 1)
        few = quantized(x)
    assert many.dtype == dtype
    assert many.shape == (len(x), outputs)
    assert relative_error(many, few) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize(
    ("is_fast", "expected"),
    [(False, [MANY_INT8_ROWS, 100]), (True, [MANY_ROWS, MANY_INT8_ROWS - 1, MANY_INT8_ROWS, 100])],
)
def test_int8_takes_the_plain_matmul_sooner_where_bfloat16_is_fast(is_fast, expected, monkeypatch):
    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: is_fast)
    quantized = Int8Linear.from_linear(make_linear(32, 16, dtype=torch.bfloat16))
    rows = []
    multiply = quantized.multiply_many
    monkeypatch.setattr(quantized, "multiply_many", lambda x: rows.append(len(x)) or multiply(x))
    with torch.no_grad():
        for count in (1, MANY_ROWS - 1, MANY_ROWS, MANY_INT8_ROWS - 1, MANY_INT8_ROWS, 100):
            assert quantized(torch.randn(count, 32).bfloat16()).shape == (count, 16)
    assert rows == expected


# ----------------------------------------------------------------------------- reordered weights
class SmallModel(nn.Module):
    """The names that `reorder_weights` distinguishes."""

    def __init__(self, dtype):
        super().__init__()
        self.visual = nn.Sequential(linear.Linear(64, 32, dtype=dtype))
        self.model = nn.Sequential(linear.Linear(64, 32, dtype=dtype))
        self.lm_head = linear.Linear(32, 50, bias=False, dtype=dtype)


def reorders(dtype):
    return dtype == torch.float32 or linear.has_fast_half_matmul(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 300])
def test_reordered_weights_multiply_as_the_plain_ones(dtype, rows):
    if not reorders(dtype):
        pytest.skip("needs a fast matmul of this dtype")
    model = SmallModel(dtype)
    names = model.state_dict().keys()
    x = torch.randn(1, rows, 64).to(dtype)
    layer = model.model[0]
    with torch.no_grad():
        plain = layer(x)
        linear.reorder_weights(model)
        output = layer(x)
    assert output.dtype == dtype
    assert output.shape == (1, rows, 32)
    assert relative_error(output, plain) < LIMITS[dtype]
    assert model.state_dict().keys() == names


def test_reordering_is_for_the_decoder_and_the_head():
    model = SmallModel(torch.float32)
    linear.reorder_weights(model)
    assert model.visual[0].reordered is None
    assert model.model[0].reordered is not None
    assert model.lm_head.reordered is not None


def test_reordered_weights_are_what_is_multiplied_but_for_gradients_and_one_row_of_16_bits():
    for dtype in filter(reorders, (torch.float32, torch.bfloat16)):
        model = SmallModel(dtype)
        linear.reorder_weights(model)
        layer = model.lm_head
        layer.weight.data.zero_()  # so that the copy alone has values
        with torch.no_grad():
            assert layer(torch.ones(2, 32, dtype=dtype)).any()
            assert layer(torch.ones(1, 32, dtype=dtype)).any() == (dtype == torch.float32)
        assert not layer(torch.ones(2, 32, dtype=dtype)).any()


def test_weights_are_not_reordered_without_a_fast_matmul(monkeypatch):
    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: False)
    model = SmallModel(torch.bfloat16)
    linear.reorder_weights(model)
    assert model.lm_head.reordered is None


# ----------------------------------------------------------------------------------- bytes by bytes
class PlainBytes(OneDnnBytes):
    """Multiplies as oneDNN's kernel is to, in float64, on every processor."""

    def pack(self, weight, scale):
        return weight.clone(), scale.double()

    def unpack(self, packed):
        return packed[0].clone()

    def multiply(self, digits, packed):
        weight, scale = packed
        return ((digits.double() - 128) @ weight.double().T * scale).float()


@pytest.fixture(params=[PlainBytes, OneDnnBytes, FbgemmBytes])
def kernel(request, monkeypatch):
    """Each kernel that this processor has, in the place of the one that is chosen for it."""
    kernel = request.param()
    if not kernel.is_usable() and request.param is not PlainBytes:
        pytest.skip("needs other instructions")
    monkeypatch.setattr(linear, "byte_kernel", lambda: kernel)
    monkeypatch.setattr(request.param, "least_weights", 0)
    return kernel


def exact_output(layer, x):
    """Return the output of the layer's integers and scales in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), layer.dequantize(torch.float64), bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outliers", [0, 1, 3])
@pytest.mark.parametrize("rows", [1, 2, MANY_ROWS - 1, MANY_ROWS, 2 * LEAST_BYTE_ROWS + 3])
def test_byte_int8_equals_the_integers_within_rounding(rows, outliers, bias, kernel, monkeypatch):
    monkeypatch.setattr(linear, "BYTE_ACTIVATIONS", 0)
    plain = Int8Linear.from_linear(make_linear(192, 37, bias, torch.bfloat16))
    layer = ByteInt8Linear(plain, kernel)
    x = torch.randn(rows, 192)
    x[:, :outliers] = 80  # one digit for each activation would have an error of 2 to 5 %
    x = x.bfloat16()
    with torch.no_grad():
        output = layer(x[None])
    assert output.dtype == torch.bfloat16
    assert output.shape == (1, rows, 37)
    high_alone = rows >= MANY_ROWS and outliers == 0 and kernel.outlier
    limit = 0.02 if high_alone else LIMITS[torch.bfloat16]
    assert relative_error(output[0], exact_output(layer, x)) < limit


def test_byte_int8_gives_low_digits_to_few_rows_and_to_those_with_outliers(monkeypatch, kernel):
    plain = Int8Linear.from_linear(make_linear(192, 16, dtype=torch.bfloat16))
    layer = ByteInt8Linear(plain, kernel)
    counts = []
    multiply = kernel.multiply

    def count(digits, packed):
        counts.append(len(digits))
        return multiply(digits, packed)

    monkeypatch.setattr(kernel, "multiply", count)
    monkeypatch.setattr(linear, "BYTE_ACTIVATIONS", 100 * 192)
    x = torch.randn(100 + MANY_ROWS - 1, 192).bfloat16()
    x[:3, 5] = 80
    with torch.no_grad():
        layer(x)
    low = 3 if kernel.outlier else 100
    assert counts == [100 + low, 2 * (MANY_ROWS - 1)]


@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_byte_int8_of_a_row_of_zeros_is_the_bias(rows, kernel):
    plain = Int8Linear.from_linear(make_linear(192, 16, bias=True, dtype=torch.bfloat16))
    layer = ByteInt8Linear(plain, kernel)
    with torch.no_grad():
        output = layer(torch.zeros(rows, 192, dtype=torch.bfloat16))
    assert torch.equal(output, layer.bias.expand(rows, -1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [1, MANY_ROWS])
def test_byte_int8_of_a_row_that_is_not_finite_is_not(rows, value, kernel):
    layer = ByteInt8Linear(Int8Linear.from_linear(make_linear(192, 16)), kernel)
    x = torch.randn(rows, 192).bfloat16()
    x[-1, 7] = value
    with torch.no_grad():
        finite = layer(x).isfinite()
    assert finite[:-1].all()
    assert not finite[-1].any()


def test_byte_int8_keeps_the_integers_and_scales(kernel):
    plain = Int8Linear.from_linear(make_linear(192, 70, dtype=torch.bfloat16))
    plain.weight[0, 0] = -128  # which files may have
    layer = ByteInt8Linear(plain, kernel)
    assert linear.packed_weights(nn.Sequential(layer, plain)) == 192 * 70
    assert layer.grouping() == plain.grouping()
    assert torch.equal(layer.groups(), plain.groups())
    for found, expected in zip(layer.unpack(), plain.unpack(), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(layer.dequantize(torch.bfloat16), plain.dequantize(torch.bfloat16))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_byte_int8_can_be_copied_and_pickled(duplicate, kernel):
    plain = Int8Linear.from_linear(make_linear(64, 48, bias=True, dtype=torch.bfloat16))
    layer = ByteInt8Linear(plain, kernel)
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        expected = layer(x)
        other = duplicate(layer)
        layer.bias.zero_()
        assert torch.equal(other(x), expected)


def test_use_byte_kernel_replaces_large_layers_and_keeps_one_copy(monkeypatch, kernel):
    monkeypatch.setattr(type(kernel), "least_weights", 64 * 64)
    layers = [make_linear(64, outputs, dtype=torch.bfloat16) for outputs in (63, 64, 65)]
    model = nn.Sequential(*[Int8Linear.from_linear(layer) for layer in layers])
    weights = [weakref.ref(layer.weight) for layer in model]
    linear.use_byte_kernel(model, torch.float32)
    assert [type(layer) for layer in model] == [Int8Linear] * 3
    linear.use_byte_kernel(model, torch.bfloat16)
    assert [type(layer) for layer in model] == [Int8Linear, ByteInt8Linear, ByteInt8Linear]
    assert [reference() is None for reference in weights] == [False, True, True]


def test_what_packs_slowly_is_not_packed_for_few_tokens(kernel):
    model = nn.Sequential(Int8Linear.from_linear(make_linear(64, 64, dtype=torch.bfloat16)))
    linear.use_byte_kernel(model, torch.bfloat16, few_tokens=True)
    assert type(model[0]) is (Int8Linear if kernel.packs_slowly else ByteInt8Linear)


@pytest.mark.parametrize("piece", [64, 64 * 31, 64 * 48])
def test_a_weight_in_pieces_is_the_same(piece, monkeypatch):
    kernel = FbgemmBytes()
    if not kernel.is_usable():
        pytest.skip("needs other instructions")
    plain = Int8Linear.from_linear(make_linear(64, 48, dtype=torch.bfloat16))
    x = torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        expected = ByteInt8Linear(plain, kernel)(x)
        monkeypatch.setattr(FbgemmBytes, "piece", piece)
        layer = ByteInt8Linear(plain, kernel)
        assert len(layer.packed) == math.ceil(48 / (piece // 64))
        assert torch.equal(layer(x), expected)
    assert torch.equal(layer.plain().weight, plain.weight)


def test_packing_takes_a_copy_of_the_largest_layer(monkeypatch, kernel):
    monkeypatch.setattr(type(kernel), "least_weights", 64 * 64)
    layers = [make_linear(64, outputs, dtype=torch.bfloat16) for outputs in (63, 65, 64)]
    model = nn.Sequential(*[Int8Linear.from_linear(layer) for layer in layers])
    assert linear.packing_bytes(model, torch.bfloat16) == 64 * 65
    assert linear.packing_bytes(model[:1], torch.bfloat16) == 0
    assert linear.packing_bytes(model, torch.float32) == 0


def test_use_byte_kernel_leaves_layers_where_bytes_are_not_multiplied(monkeypatch):
    monkeypatch.setattr(linear, "byte_kernel", lambda: None)
    model = nn.Sequential(Int8Linear.from_linear(make_linear(2048, 2048, dtype=torch.bfloat16)))
    linear.use_byte_kernel(model, torch.bfloat16)
    assert type(model[0]) is Int8Linear


def test_int4_takes_the_plain_matmul_from_many_rows_on(monkeypatch):
    quantized = Int4Linear.from_linear(make_linear(32, 16, dtype=torch.bfloat16))
    rows = []
    multiply = quantized.multiply_many
    monkeypatch.setattr(quantized, "multiply_many", lambda x: rows.append(len(x)) or multiply(x))
    with torch.no_grad():
        for shape in ((MANY_INT4_ROWS - 1,), (2, MANY_INT4_ROWS // 2), (1, MANY_INT4_ROWS)):
            assert quantized(torch.randn(*shape, 32).bfloat16()).shape == (*shape, 16)
    assert rows == [MANY_INT4_ROWS, MANY_INT4_ROWS]


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_many_rows_dequantize_only_some_outputs_at_a_time(kind, monkeypatch):
    quantized = kind.from_linear(make_linear(64, 700, bias=False, dtype=torch.bfloat16))
    x = torch.randn(MANY_INT4_ROWS, 64).bfloat16()
    outputs = []
    multiply = linear.cpu_matmul

    def recorded(x, weight):
        outputs.append(len(weight))
        return multiply(x, weight)

    with torch.no_grad():
        expected = quantized(x)
        monkeypatch.setattr(linear, "chunk_rows", lambda inputs: 256)
        monkeypatch.setattr(linear, "cpu_matmul", recorded)
        assert relative_error(quantized(x), expected) < LIMITS[torch.bfloat16]
    assert max(outputs) == 256
    assert sum(outputs) >= 700


@pytest.mark.parametrize("rows", [1, MANY_INT8_ROWS])
def test_int8_products_do_not_overflow_float16(rows):
    plain = make_linear(1024, 16, bias=False)
    plain.weight.data.fill_(0.01)
    x = torch.full((rows, 1024), 10.0, dtype=torch.float16)
    with torch.no_grad():
        output = Int8Linear.from_linear(plain)(x)
    assert relative_error(output, torch.full_like(output, 102.4)) < 0.01


def test_int4_names_a_width_without_whole_groups():
    with pytest.raises(ValueError, match=r"whole groups of 32 inputs.*48"):
        Int4Linear.from_linear(make_linear(48, 32))


# ------------------------------------------------------------------------------------- whole models
@pytest.fixture(scope="module")
def shapes_batch():
    processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
    content = [
        {"type": "image", "image": "examples/shapes.png"},
        {"type": "text", "text": "Describe the image."},
    ]
    return processor([{"role": "user", "content": content}])


def check_same_answer(quantize, first_cosine, least_cosine, shapes_batch):
    """Check that the quantized bundled model answers as in float32, with logits near those."""
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    quantized = load_model(BUNDLED_CHECKPOINT, "cpu", quantize=quantize)
    [answer] = generate.generate(model, shapes_batch)
    assert generate.generate(quantized, shapes_batch) == [answer]
    inputs = {name: torch.as_tensor(array) for name, array in shapes_batch.arrays().items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        expected = model(**inputs)
        logits = quantized(**inputs)
    assert logits.dtype == torch.bfloat16
    # The positions that predict the answer: nothing was trained for those of the prompt.
    predicting = slice(-len(answer) - 1, -1)
    cosines = torch.cosine_similarity(
        expected[0, predicting].double(), logits[0, predicting].double(), dim=-1
    )
    assert cosines[0] > first_cosine
    assert cosines.min() > least_cosine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "first_cosine", "least_cosine"), [("int8", 0.999, 0.999), ("int4", 0.99, 0.97)]
)
def test_quantized_bundled_model_gives_the_same_answer(
    quantize, first_cosine, least_cosine, shapes_batch
):
    check_same_answer(quantize, first_cosine, least_cosine, shapes_batch)


@pytest.mark.slow
@pytest.mark.parametrize("outlier", [0, OneDnnBytes.outlier, 1e9])
def test_bytes_by_bytes_bundled_model_gives_the_same_answer(
    outlier, shapes_batch, monkeypatch, kernel
):
    if outlier and not kernel.outlier:
        pytest.skip("its high digits are never used alone")
    monkeypatch.setattr(type(kernel), "outlier", outlier)
    check_same_answer("int8", 0.999, 0.999, shapes_batch)


def test_load_model_multiplies_bytes_where_it_can(kernel):
    model = load_model(BUNDLED_CHECKPOINT, "cpu", quantize="int8")
    assert type(model.lm_head) is ByteInt8Linear
    assert linear.quantization_methods(model) == ["int8"]
    plain = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32, quantize="int8")
    assert type(plain.lm_head) is Int8Linear
    hasty = load_model(BUNDLED_CHECKPOINT, "cpu", quantize="int8", few_tokens=True)
    assert type(hasty.lm_head) is (Int8Linear if kernel.packs_slowly else ByteInt8Linear)


@pytest.mark.parametrize(("quantize", "kind"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_load_model_quantizes_decoder_and_head_but_not_the_vision_encoder(quantize, kind):
    model = load_model(BUNDLED_CHECKPOINT, "cpu", quantize=quantize)
    kinds = {
        name: type(module) for name, module in model.named_modules() if hasattr(module, "bias")
    }
    assert kinds["lm_head"] == kinds["model.layers.0.self_attn.q_proj"] == kind
    assert kinds["visual.blocks.0.mlp.fc1"] == kinds["visual.merger.mlp.2"] == Linear
    assert all(type(module) is not nn.Linear for module in model.modules())


def test_load_model_refuses_an_unknown_quantization():
    with pytest.raises(ValueError, match="quantize is 'int3', expected 'int8', 'int4' or None"):
        load_model(BUNDLED_CHECKPOINT, "cpu", quantize="int3")


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantize_option_answers_and_prints_the_size(quantize, capsys):
    options = ["--image", "examples/shapes.png", "--prompt", "Describe the image."]
    options += ["--quantize", quantize, "--device", "cpu"]
    assert generate.main(options) == 0
    output = capsys.readouterr()
    assert output.out.startswith("A blue triangle at the top left")
    assert f"MB, bfloat16, the decoder {quantize}, sdpa attention, on cpu" in output.err
    model = load_model(BUNDLED_CHECKPOINT, "cpu", quantize=quantize)
    size = sum(p.nbytes for p in model.parameters())
    assert f": {size / 1e6:,.1f} MB, " in output.err


def test_quantize_linears_needs_no_memory_on_the_meta_device():
    with torch.device("meta"):
        model = Qwen2VL(our_config(SHAPES["default"]))
    linear.quantize_linears(model, "int8")
    assert model.lm_head.weight.dtype == torch.int8
    assert model.lm_head.weight.is_meta
    assert type(model.visual.blocks[0].mlp.fc1) is Linear
