"""The CPU's linear layers: every kernel gives the plain product, and fewer bits cost no more than they must."""

import subprocess
import sys
import types

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPES, make_batch, our_config, our_model, random_row, random_weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import generate
import linear
from generate import TINY
from linear import MANY_ROWS, Int4Linear, Int8Linear, Linear
from load_weights import load_model, save_model
from preprocess import Processor
from qwen2vl import Qwen2VL

CUDA = torch.device("cuda")
HALVES = [torch.bfloat16, torch.float16]
# Largest error, as a share of the largest output: rounding of the inputs' dtype, once more for the output.
LIMITS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def layer(inputs, outputs, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias).to(dtype)


def error(found, wanted):
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def wanted(plain, x):
    """The layer's output in float64."""
    bias = None if plain.bias is None else plain.bias.double()
    return F.linear(x.double(), plain.weight.double(), bias)


# --------------------------------------------------------------------------------------------- the right kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (3, 5), (1, MANY_ROWS), (7, 33)], ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_every_dtype_and_number_of_rows_gives_the_plain_product(dtype, shape, bias):
    plain = layer(48, 37, bias, dtype)
    x = torch.randn(*shape, 48).to(dtype)
    found = linear.cpu_matmul(
        x, plain.weight.detach(), None if plain.bias is None else plain.bias.detach()
    )
    assert found.dtype == dtype
    assert found.shape == (*shape, 37)
    assert error(found, wanted(plain, x)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_processor_without_half_products_widens_many_rows_and_no_fewer(dtype, monkeypatch):
    widened = []

    def watched(x, *more):
        if x.dtype == torch.float32:
            widened.append(len(x))
        return F.linear(x, *more)

    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: False)
    monkeypatch.setattr(linear, "onednn_linear", watched)
    plain = layer(48, 37, dtype=dtype)
    with torch.no_grad():
        for rows in (1, 2, MANY_ROWS - 1, MANY_ROWS, 100):
            x = torch.randn(rows, 48).to(dtype)
            found = linear.cpu_matmul(x, plain.weight, plain.bias)
            assert found.dtype == dtype
            assert error(found, wanted(plain, x)) < LIMITS[dtype]
    assert widened == [MANY_ROWS, 100]
    monkeypatch.setattr(linear, "has_fast_half_matmul", lambda dtype: True)
    linear.cpu_matmul(x, plain.weight, plain.bias)
    assert widened == [MANY_ROWS, 100]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_product_never_changes_the_onednn_switch(dtype, enabled, monkeypatch):
    during, multiply = [], F.linear

    def watched(*arguments):
        during.append(torch.backends.mkldnn.enabled)
        return multiply(*arguments)

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    monkeypatch.setattr(F, "linear", watched)
    for rows in (1, 2, MANY_ROWS):
        x, weight = torch.randn(rows, 48).to(dtype), torch.randn(37, 48).to(dtype)
        expected = multiply(x.double(), weight.double())
        assert error(linear.cpu_matmul(x, weight), expected) < LIMITS[dtype]
    assert set(during) <= {enabled}
    assert torch.backends.mkldnn.enabled == enabled


THREADS = """
import sys, threading
import torch
import linear
from generate import TINY, Sampling, generate
from load_weights import load_model
from preprocess import Processor

dtype, native = getattr(torch, sys.argv[1]), sys.argv[2] == "native"
if native:
    linear.prefer_pytorch_gemv()
sys.setswitchinterval(1e-6)  # threads change places at every chance
model, processor = load_model(TINY, "cpu", dtype), Processor.from_pretrained(TINY)
image = {"type": "image", "image": "examples/shapes.png"}
texts = ["How many shapes are there?", "Which colour?", "What is this?", "Describe it."]
contents = [[image, {"type": "text", "text": text}] for text in texts]
batches = [processor([{"role": "user", "content": content}]) for content in contents]
expected = [generate(model, batch, 12, Sampling()) for batch in batches]
enabled, wrong = torch.backends.mkldnn.enabled, []

def work(first):
    try:
        for turn in range(4):
            number = (first + turn) % len(batches)
            if generate(model, batches[number], 12, Sampling()) != expected[number]:
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


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("kernel", ["default", "native"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_threads_with_one_model_answer_as_one_thread_does(dtype, kernel, threads):
    """In a process of its own, as an illegal instruction would end this one."""
    line = [sys.executable, "-c", THREADS, dtype, kernel, str(threads)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=TINY.parent.parent)
    assert (done.returncode, done.stderr) == (0, "")


def test_int4_is_refused_where_it_has_no_kernel():
    model = nn.Sequential(layer(32, 16)).to(torch.device("meta"))
    linear.quantize_linears(model, "int4")  # to be counted only
    with pytest.raises(ValueError, match="int4 weights are for the CPU, this model is on cuda"):
        linear.quantize_linears(
            types.SimpleNamespace(parameters=lambda: iter([types.SimpleNamespace(device=CUDA)])),
            "int4",
        )


def test_gradients_are_pytorchs_own():
    model = load_model(TINY, "cpu", torch.float32)
    chosen = model.model.layers[0].mlp.up_proj
    assert isinstance(chosen, Linear)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert chosen.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_computes_what_pytorchs_own_layer_does(shape, monkeypatch):
    model = our_model(SHAPES[shape], random_weights(SHAPES[shape]))
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {Linear}
    inputs = make_batch(
        [random_row(SHAPES[shape], [3, ("image", 2, 3), 5]), random_row(SHAPES[shape], [4])]
    )
    with torch.no_grad():
        found = model(**inputs)
        monkeypatch.setattr(linear, "cpu_matmul", nn.functional.linear)
        assert helpers.gap(found, model(**inputs)) < 1e-5


# ------------------------------------------------------------------------------------------------- fewer bits
@given(
    st.integers(1, 600), st.sampled_from([1, 7, 32, 100]), st.sampled_from([1e-6, 0.02, 1.0, 300.0])
)
def test_eight_bits_are_half_a_step_from_the_weights(outputs, inputs, size):
    plain = layer(inputs, outputs, seed=outputs)
    with torch.no_grad():
        plain.weight *= size
        plain.weight[0] = 0
    quantised = Int8Linear(plain)
    assert quantised.weight.dtype == torch.int8
    assert quantised.weight.shape == plain.weight.shape
    step = quantised.scale.float()[:, None]
    off = (quantised.weight * step - plain.weight).abs()
    # Half a step; and as bfloat16 may round the scale down by 1/512, the largest weight lies 127/512 of one beyond.
    assert (off <= 0.76 * step).all()
    assert (quantised.weight[0] == 0).all()
    assert (quantised.scale > 0).all()


@given(st.integers(1, 600), st.sampled_from([32, 96]), st.sampled_from([1e-6, 0.02, 1.0, 300.0]))
def test_four_bits_are_about_half_a_step_from_the_weights(outputs, inputs, size):
    plain = layer(inputs, outputs, bias=False, seed=outputs)
    with torch.no_grad():
        plain.weight *= size
        plain.weight[0] = size  # a row without a step
    quantised = Int4Linear(plain)
    identity = torch.eye(inputs)
    found = quantised(identity).T  # the weights as the kernel sees them
    step = quantised.scale[:, :outputs, 0].float().T.repeat_interleave(Int4Linear.GROUP, dim=1)
    assert found.shape == plain.weight.shape
    # Beside half a step: the offset, up to 8 steps from 0 and more, is rounded to 8 bits, and so is the output.
    assert ((found - plain.weight).abs() <= 0.5 * step + plain.weight.abs().max() / 128).all()


@pytest.mark.parametrize(("kind", "limit"), [(Int8Linear, 0.015), (Int4Linear, 0.12)])
@pytest.mark.parametrize("rows", [(1, 1), (2, 3), (1, MANY_ROWS), (2, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_fewer_bits_is_near_the_plain_one(kind, limit, rows, dtype):
    plain = layer(64, 37, dtype=dtype)
    x = torch.randn(*rows, 64).to(dtype)
    with torch.no_grad():
        found = kind(plain)(x)
    assert found.dtype == dtype
    assert found.shape == (*rows, 37)
    assert error(found, wanted(plain, x)) < limit


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_last_places_of_a_batch_are_taken_as_they_lie(kind, rows):
    quantised, x = kind(layer(64, 37, dtype=torch.bfloat16)), torch.randn(rows, 5, 64).bfloat16()
    with torch.no_grad():
        assert torch.equal(quantised(x[:, -1:]), quantised(x[:, -1:].contiguous()))


@pytest.mark.parametrize(
    ("capability", "onednn", "native", "wanted"),
    [("AVX2", False, False, False), ("AVX512", True, False, False), ("AVX512", True, True, True),
     ("DEFAULT", True, False, True)],  # the last one is an ARM processor with the instructions
)  # fmt: skip
def test_bfloat16_is_taken_for_quick_only_with_instructions_for_it(
    capability, onednn, native, wanted, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    assert linear.has_fast_half_matmul(torch.bfloat16) == wanted


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_few_rows_and_many_agree(kind):
    quantised, x = kind(layer(64, 37, dtype=torch.bfloat16)), torch.randn(40, 64).bfloat16()
    with torch.no_grad():
        one_by_one = torch.cat([quantised(row[None]) for row in x])
        assert error(one_by_one, quantised(x)) < LIMITS[torch.bfloat16]


def test_int4_says_which_layer_it_cannot_cut_into_groups():
    with pytest.raises(ValueError, match="whole groups of 32 inputs, found one of 48"):
        Int4Linear(layer(48, 32))


# ------------------------------------------------------------------------------------------------- whole models
@pytest.fixture(scope="module")
def shapes_batch():
    processor = Processor.from_pretrained(TINY)
    content = [
        {"type": "image", "image": "examples/shapes.png"},
        {"type": "text", "text": "Describe the image."},
    ]
    return processor([{"role": "user", "content": content}])


@pytest.mark.parametrize(
    ("quantize", "first", "all_words"), [("int8", 0.999, 0.999), ("int4", 0.99, 0.97)]
)
def test_the_bundled_model_says_the_same_in_fewer_bits(quantize, first, all_words, shapes_batch):
    model, small = (
        load_model(TINY, "cpu", torch.float32),
        load_model(TINY, "cpu", quantize=quantize),
    )
    [reply] = generate.generate(model, shapes_batch)
    assert generate.generate(small, shapes_batch) == [reply]
    inputs = {name: torch.as_tensor(array) for name, array in shapes_batch.arrays().items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([reply])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits, found = model(**inputs), small(**inputs)
    assert found.dtype == torch.bfloat16
    words = slice(
        -len(reply) - 1, -1
    )  # the places that predict the answer: what others predict, nobody trained
    cosines = torch.cosine_similarity(logits[0, words].double(), found[0, words].double(), dim=-1)
    assert cosines[0] > first
    assert cosines.min() > all_words


@pytest.mark.parametrize(("quantize", "kind"), [("int8", Int8Linear), ("int4", Int4Linear)])
def test_decoder_and_head_are_quantised_and_the_vision_tower_is_not(quantize, kind):
    model = load_model(TINY, "cpu", quantize=quantize)
    kinds = {
        name: type(module) for name, module in model.named_modules() if hasattr(module, "bias")
    }
    assert kinds["lm_head"] == kinds["model.layers.0.self_attn.q_proj"] == kind
    assert kinds["visual.blocks.0.mlp.fc1"] == kinds["visual.merger.mlp.2"] == Linear
    assert all(type(module) is not nn.Linear for module in model.modules())


def test_an_unknown_way_to_quantise_is_refused():
    with pytest.raises(ValueError, match="quantize is 'int3', expected 'int8', 'int4' or None"):
        load_model(TINY, "cpu", quantize="int3")


def test_a_quantised_model_cannot_be_taken_for_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="a quantized model cannot be saved"):
        save_model(load_model(TINY, "cpu", quantize="int8"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_command_line_quantises_and_says_how_much_is_held(quantize, capsys):
    options = [
        "--image",
        "examples/shapes.png",
        "--prompt",
        "Describe the image.",
        "--quantize",
        quantize,
    ]
    assert generate.main([*options, "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("A blue triangle at the top left")
    assert f"MB, bfloat16, the decoder {quantize}, sdpa attention, on cpu" in printed.err
    held = sum(p.nbytes for p in load_model(TINY, "cpu", quantize=quantize).parameters())
    assert f": {held / 1e6:,.1f} MB, " in printed.err
    assert generate.main([*options, "--dry-run", "--device", "cpu"]) == 0
    assert (
        f"{held / 1e6:,.1f} MB  2.8 M parameters in bfloat16, the decoder's in {quantize}"
        in capsys.readouterr().out
    )


def test_swapping_needs_no_memory_on_the_meta_device():
    with torch.device("meta"):
        model = Qwen2VL(our_config(SHAPES["plain"]))
    linear.quantize_linears(model, "int8")
    assert model.lm_head.weight.dtype == torch.int8
    assert model.lm_head.weight.is_meta
    assert type(model.visual.blocks[0].mlp.fc1) is Linear
