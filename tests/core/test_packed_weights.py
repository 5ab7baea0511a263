"""AWQ and GPTQ checkpoints mean the weights that a plain reading of their formats gives."""

import json
import re
import weakref

import numpy as np
import pytest
import torch
from helpers import make_batch, random_sequence
from hypothesis import given
from hypothesis import strategies as st
from packed_checkpoints import (
    Variant,
    bundled,
    pack_bundled,
    pack_layer,
    pack_weights,
    pack_words,
    read_gptq,
    unpack_words,
    write_checkpoint,
    write_packed,
)
from safetensors.torch import load_file, save_file
from torch import nn

import generate
import linear
import packed_weights
from apps import estimate
from linear import GroupedInt8Linear, Int4Linear, Int8Linear, PackedLinear
from load_weights import load_model, save_model

VARIANTS = {
    "AWQ": Variant("awq"),
    "AWQ, groups of 64": Variant("awq", group_size=64),
    "AWQ, groups of 16": Variant("awq", group_size=16),
    "GPTQ": Variant(),
    "GPTQ, symmetric": Variant(symmetric=True, group_size=64),
    "GPTQ v2": Variant(version="gptq_v2"),
    "GPTQ, act-order": Variant(act_order=True),
    "GPTQ, act-order, v2": Variant(act_order=True, version="gptq_v2", group_size=128),
    "GPTQ, one group": Variant(group_size=-1),
    "GPTQ, uneven groups": Variant(group_size=48),
    "GPTQ with biases of zeros": Variant(zero_biases=True),
    "GPTQ without g_idx": Variant(with_g_idx=False),
    "GPTQ, quantized head": Variant(head=True),
    "GPTQ, scales in bfloat16": Variant(scale_dtype=torch.bfloat16),
    "GPTQ, scales in float32": Variant(scale_dtype=torch.float32),
    "GPTQ 8 bits": Variant(bits=8),
    "GPTQ 8 bits, symmetric": Variant(bits=8, group_size=64, symmetric=True),
    "GPTQ 8 bits, one symmetric group": Variant(bits=8, group_size=-1, symmetric=True),
    "GPTQ 8 bits, one group": Variant(bits=8, group_size=-1, version="gptq_v2"),
    "GPTQ 8 bits, act-order": Variant(bits=8, act_order=True, symmetric=True),
}
PROJECTION = "model.layers.0.mlp.down_proj"


def logits(model, seed=1):
    """Return the logits of one random sequence with an image."""
    config, _ = bundled()
    batch = make_batch([random_sequence(config, [3, ("image", 2, 2), 5], seed)])
    with torch.inference_mode():
        return model(**batch).float()


def layer_of(tensors, packing, inputs, outputs):
    """Return a `PackedLinear` with these tensors."""
    layer = PackedLinear(nn.Linear(inputs, outputs, bias=False, device="meta"), packing)
    layer.load_state_dict(tensors, assign=True)
    return layer


def refusal(folder, capsys, program=generate):
    """Return the one sentence of a program, without its name; the exit code is 2."""
    arguments = ["--model", str(folder), "--prompt", "x", "--device", "cpu", "--quiet"]
    assert program.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 600
    return printed.err.partition(": ")[2]


# --------------------------------------------------------------------------------- single integers
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 1000))
def test_int32_hold_the_integers_that_loops_put_there(bits, rows, words, seed):
    numbers = np.random.default_rng(seed).integers(0, 2**bits, (rows, words * 32 // bits))
    packed = torch.tensor(pack_words(numbers, bits))
    assert packed_weights.unpack_int32(packed, bits).tolist() == numbers.tolist()
    again = packed_weights.pack_int32(torch.tensor(numbers, dtype=torch.uint8), bits)
    assert torch.equal(again, packed)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_keeps_zero_points_of_zero(bits):
    """Minus one, they borrow from the next place, as in files of gptqmodel."""
    zeros = torch.zeros(32, 2, dtype=torch.uint8)
    zeros[::3] = 5
    numbers = torch.randint(0, 2**bits, (32, 64), dtype=torch.uint8)
    unpacked = packed_weights.Unpacked(numbers, zeros, torch.ones(32, 2))
    groups = torch.arange(64) // 32
    tensors = packed_weights.pack_gptq(unpacked, groups, bits)
    packing = packed_weights.Packing("GPTQ", bits, 32, True, has_g_idx=True)
    again = layer_of(tensors, packing, 64, 32).unpack()
    assert torch.equal(again.zeros, zeros)
    assert torch.equal(again.numbers, numbers)


# ------------------------------------------------------------------------------------- whole models
@pytest.mark.sweep
@pytest.mark.parametrize("name", VARIANTS)
def test_load_model_equals_the_checkpoint_of_the_dequantized_weights(name, tmp_path):
    variant = VARIANTS[name]
    packed, meant = write_packed(tmp_path, variant)
    expected = load_model(meant, "cpu")
    model = load_model(packed, "cpu")
    method = f"{variant.method.upper()} ({variant.bits} bits)"
    assert linear.quantization_methods(model) == [method]
    count = 0
    for module_name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            weight = expected.get_submodule(module_name).weight
            assert torch.equal(module.dequantize(torch.float32), weight), module_name
            count += 1
    assert count == 7 * model.config.num_hidden_layers + variant.head
    assert (logits(model) - logits(expected)).abs().max() < 3e-5


def test_packed_layers_are_exact_in_float64(tmp_path):
    packed, meant = write_packed(tmp_path, Variant("awq"))
    double = load_model(packed, "cpu", torch.float64)
    expected = load_model(meant, "cpu", torch.float64)
    assert torch.equal(logits(double), logits(expected))


KERNELS = {
    "AWQ": Int4Linear,
    "AWQ, groups of 64": Int4Linear,
    "AWQ, groups of 16": PackedLinear,
    "GPTQ, act-order": Int4Linear,
    "GPTQ, act-order, v2": Int4Linear,
    "GPTQ, uneven groups": PackedLinear,
    "GPTQ, quantized head": Int4Linear,
    "GPTQ, scales in float32": Int4Linear,
    "GPTQ 8 bits": PackedLinear,
    "GPTQ 8 bits, symmetric": GroupedInt8Linear,
    "GPTQ 8 bits, act-order": GroupedInt8Linear,
    "GPTQ 8 bits, one symmetric group": Int8Linear,
    "GPTQ 8 bits, one group": PackedLinear,
}


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_as_near_to_float32_as_plain_bfloat16(name, dtype, tmp_path):
    packed, meant = write_packed(tmp_path, VARIANTS[name], "bfloat16")
    model = load_model(packed, "cpu", dtype)
    assert type(model.get_submodule(PROJECTION)) is KERNELS[name]
    assert model.get_submodule(PROJECTION).bias is None
    assert model.lm_head.weight is not None if not VARIANTS[name].head else True
    exact = logits(load_model(meant, "cpu", torch.float32))
    plain_error = (logits(load_model(meant, "cpu")) - exact).square().mean().sqrt()
    error = (logits(model) - exact).square().mean().sqrt()
    assert error < 2 * plain_error


@pytest.mark.sweep
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("rows", [1, 40])
def test_each_layer_equals_its_dequantized_weights_within_rounding(name, rows, tmp_path):
    packed, meant = write_packed(tmp_path, VARIANTS[name], "bfloat16")
    model = load_model(packed, "cpu")
    expected = load_model(meant, "cpu", torch.float64)
    for projection in (PROJECTION, "model.layers.1.self_attn.q_proj"):
        x = torch.randn(2, rows, model.get_submodule(projection).in_features).bfloat16()
        with torch.inference_mode():
            difference = model.get_submodule(projection)(x).double()
            exact = expected.get_submodule(projection)(x.double())
            difference -= exact
        assert difference.abs().max() < 1e-2 * exact.abs().max()


def test_load_model_reads_packed_tensors_in_the_nested_layout(tmp_path):
    config, weights = bundled()
    packed, meant = pack_weights(weights, Variant("awq"))
    nested = {}
    for name, tensor in packed.items():
        if name.startswith("visual."):
            nested[f"model.{name}"] = tensor
        else:
            nested[re.sub(r"^model\.", "model.language_model.", name)] = tensor
    rope = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    rope["mrope_section"] = config.pop("rope_scaling")["mrope_section"]
    vision = config.pop("vision_config")
    config = {
        "model_type": "qwen2_vl",
        "vision_config": vision,
        "text_config": config | {"rope_parameters": rope},
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    settings = Variant("awq").config() | {"modules_to_not_convert": ["model.visual"]}
    expected = load_model(write_checkpoint(tmp_path / "meant", config, meant), "cpu")
    config["text_config"]["quantization_config"] = settings
    folder = write_checkpoint(tmp_path / "packed", config, nested)
    assert (logits(load_model(folder, "cpu")) - logits(expected)).abs().max() < 3e-5


def test_load_model_reads_a_quantized_head_of_tied_embeddings(tmp_path):
    config, weights = bundled()
    packed, meant = pack_weights(weights, Variant(head=True))
    config["tie_word_embeddings"] = True
    settings = {"quantization_config": Variant(head=True).config()}
    model = load_model(write_checkpoint(tmp_path / "packed", config | settings, packed), "cpu")
    config["tie_word_embeddings"] = False
    expected = load_model(write_checkpoint(tmp_path / "meant", config, meant), "cpu")
    assert (logits(model) - logits(expected)).abs().max() < 3e-5


def test_load_model_leaves_plain_layers_plain(tmp_path):
    """Packers often write an incomplete list of the layers that they left out."""
    config, weights = bundled()
    packed, meant = pack_weights(weights, Variant("awq"))
    for ending in ("qweight", "qzeros", "scales"):
        del packed[f"{PROJECTION}.{ending}"]
    packed[f"{PROJECTION}.weight"] = meant[f"{PROJECTION}.weight"] = weights[f"{PROJECTION}.weight"]
    expected = load_model(write_checkpoint(tmp_path / "meant", config, meant), "cpu")
    config["quantization_config"] = Variant("awq").config()
    model = load_model(write_checkpoint(tmp_path / "packed", config, packed), "cpu")
    assert type(model.get_submodule(PROJECTION)) is linear.Linear
    assert (logits(model) - logits(expected)).abs().max() < 3e-5


def test_quantize_takes_the_layers_that_are_still_plain(tmp_path):
    packed, _ = write_packed(tmp_path, Variant("awq"), "bfloat16")
    model = load_model(packed, "cpu", quantize="int8")
    assert type(model.lm_head) is Int8Linear
    assert type(model.get_submodule(PROJECTION)) is Int4Linear
    assert linear.quantization_methods(model) == ["int4", "int8"]


# -------------------------------------------------------------------------------- what is not right
WRONG_SETTINGS = [
    (Variant("awq"), {"bits": 8}, "bits: expected 4 for AWQ, got 8"),
    (Variant("awq"), {"version": "gemv"}, "version: expected 'gemm', got 'gemv'"),
    (Variant("awq"), {"version": "marlin"}, "version: expected 'gemm', got 'marlin'"),
    (Variant("awq"), {"group_size": 0}, "group_size: expected a positive integer or -1, got 0"),
    (Variant("awq"), {"group_size": "x"}, "group_size: expected a positive integer or -1, got 'x'"),
    (Variant(), {"bits": 3}, "bits: expected 4 or 8 for GPTQ, got 3"),
    (Variant(), {"bits": None}, "bits: expected 4 or 8 for GPTQ, got None"),
    (Variant(), {"checkpoint_format": "marlin"}, "expected 'gptq' or 'gptq_v2', got 'marlin'"),
    (Variant(), {"is_marlin_format": True}, "expected 'gptq' or 'gptq_v2', got 'marlin'"),
    (Variant(), {"dynamic": {"+:.*mlp.*": {"bits": 8}}}, "the same bits and groups for all layers"),
    (Variant(), {"bits": 8}, r"gate_proj.qweight \(expected \[32, 384\], got \[16, 384\]\)"),
    (Variant(), {"group_size": 64}, r"down_proj.qzeros \(expected \[6, 16\], got \[12, 16\]\)"),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("variant", "change", "sentence"), WRONG_SETTINGS)
def test_main_refuses_another_layout_in_one_sentence(variant, change, sentence, tmp_path, capsys):
    config, _ = bundled()
    config["quantization_config"] = variant.config() | change
    folder = write_checkpoint(tmp_path / "packed", config, pack_bundled(variant)[0])
    assert re.search(sentence, refusal(folder, capsys))


def test_estimate_refuses_another_layout_as_a_run_does(tmp_path, capsys):
    config, _ = bundled()
    config["quantization_config"] = Variant("awq").config() | {"version": "gemv"}
    folder = write_checkpoint(tmp_path / "packed", config, {})
    assert refusal(folder, capsys, estimate) == refusal(folder, capsys)


def without(ending):
    def change(tensors):
        del tensors[f"{PROJECTION}.{ending}"]

    return change


def with_value(ending, value):
    def change(tensors):
        name = f"{PROJECTION}.{ending}"
        tensors[name] = value(tensors[name]) if name in tensors else value(None)

    return change


def one_group_too_many(g_idx):
    g_idx = g_idx.clone()
    g_idx[5] = 12
    return g_idx


DAMAGE = [
    (without("qzeros"), r"1 missing: model.layers.0.mlp.down_proj.qzeros \[12, 16\]"),
    (without("scales"), r"1 missing: model.layers.0.mlp.down_proj.scales \[12, 128\]"),
    (without("g_idx"), r"1 missing: model.layers.0.mlp.down_proj.g_idx \[384\]"),
    (with_value("qweight", lambda x: x[1:]), r"qweight \(expected \[48, 128\], got \[47, 128\]\)"),
    (with_value("qweight", torch.Tensor.float), "1 of a dtype that is not int32: .*qweight"),
    (with_value("g_idx", torch.Tensor.long), "1 of a dtype that is not int32: .*g_idx"),
    (with_value("scales", torch.Tensor.int), "1 of a dtype that is not floating point: .*scales"),
    (
        with_value("g_idx", one_group_too_many),
        r"down_proj.g_idx in .*model.safetensors: expected groups from 0 to 11, got 0 to 12",
    ),
    (
        with_value("g_idx", lambda x: x - 1),
        r"down_proj.g_idx in .*model.safetensors: expected groups from 0 to 11, got -1 to 10",
    ),
    (
        with_value("bias", lambda _: torch.full((128,), 0.1)),
        r"down_proj.bias in .*model.safetensors: expected zeros, as .*down_proj has no bias",
    ),
    (with_value("codebook", lambda _: torch.zeros(2)), "1 not part of Qwen2-VL: .*codebook"),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("damage", "sentence"), DAMAGE)
def test_main_names_the_packed_tensor_that_is_wrong(damage, sentence, tmp_path, capsys):
    folder, _ = write_packed(tmp_path, Variant(act_order=True))
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
    assert re.search(sentence, refusal(folder, capsys))


def test_main_refuses_widths_that_do_not_fill_int32(tmp_path, capsys):
    config, weights = bundled()
    config["vocab_size"] = 545
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:545].clone()
    config["quantization_config"] = Variant().config()
    tensors, _ = pack_weights(weights, Variant())
    tensors["lm_head.qweight"] = tensors.pop("lm_head.weight").int()
    folder = write_checkpoint(tmp_path / "packed", config, tensors)
    assert refusal(folder, capsys).startswith("lm_head: integers of 4 bits need widths in multip")


# -------------------------------------------------------------------------------------- saving them
SAVED = [
    "AWQ",
    "AWQ, groups of 16",
    "GPTQ, act-order",
    "GPTQ 8 bits, act-order",
    "GPTQ 8 bits, one symmetric group",
]


@pytest.mark.sweep
@pytest.mark.parametrize("name", SAVED)
def test_save_model_writes_loaded_integers_as_gptq(name, tmp_path):
    packed, _ = write_packed(tmp_path, VARIANTS[name], "bfloat16")
    model = load_model(packed, "cpu")
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu")
    assert type(again.get_submodule(PROJECTION)) is KERNELS[name]
    assert torch.equal(logits(model), logits(again))


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_save_model_writes_what_an_independent_reader_expects(bits, tmp_path):
    config, weights = bundled()
    plain = write_checkpoint(tmp_path / "plain", config | {"torch_dtype": "bfloat16"}, weights)
    model = load_model(plain, "cpu", quantize=f"int{bits}")
    save_model(model, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]
    assert settings["bits"] == bits
    assert settings["group_size"] == (32 if bits == 4 else -1)
    assert settings["sym"] == (bits == 8)
    tensors = load_file(tmp_path / "saved/model.safetensors")
    for name, module in model.model.named_modules():
        if isinstance(module, linear.QuantizedLinear):
            weight = read_gptq(tensors, f"model.{name}", bits)
            assert torch.equal(weight, module.dequantize(torch.float32)), name
    head = model.lm_head.dequantize(torch.bfloat16)
    assert torch.equal(tensors["lm_head.weight"], head)


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_save_model_and_quantize_give_what_quantize_alone_gives(quantize, tmp_path):
    config, weights = bundled()
    config |= {"torch_dtype": "bfloat16", "tie_word_embeddings": True}
    del weights["lm_head.weight"]
    plain = write_checkpoint(tmp_path / "plain", config, weights)
    model = load_model(plain, "cpu", quantize=quantize)
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu", quantize=quantize)
    assert again.config.tie_word_embeddings
    assert torch.equal(logits(model), logits(again))


def test_save_model_refuses_layers_of_different_bits(tmp_path):
    packed, _ = write_packed(tmp_path, Variant("awq"), "bfloat16")
    model = load_model(packed, "cpu")
    layer = model.model.layers[0].mlp
    weight = torch.zeros(384, 128, dtype=torch.int8)
    layer.up_proj = Int8Linear(weight, torch.ones(384, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="got 4 bits in groups of 32 and 8 bits in groups of -1"):
        save_model(model, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_save_model_names_a_layer_that_does_not_fill_int32(tmp_path):
    packed, _ = write_packed(tmp_path, Variant(bits=8, group_size=-1, symmetric=True), "bfloat16")
    model = load_model(packed, "cpu")
    weight = torch.zeros(383, 128, dtype=torch.int8)
    model.model.layers[0].mlp.up_proj = Int8Linear(weight, torch.ones(383, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj cannot be saved: .* of 4"):
        save_model(model, tmp_path / "saved")


# ------------------------------------------------------------------------------------------ memory
@pytest.mark.sweep
@pytest.mark.parametrize("name", KERNELS)
def test_estimate_counts_the_bytes_that_are_held(name, tmp_path, capsys):
    packed, _ = write_packed(tmp_path, VARIANTS[name], "bfloat16")
    held = sum(parameter.nbytes for parameter in load_model(packed, "cpu").parameters())
    options = ["--model", str(packed), "--prompt", "x", "--device", "cpu"]
    assert estimate.main(options) == 0
    assert f"{held / 1e6:,.1f} MB" in capsys.readouterr().out
    (packed / "model.safetensors").unlink()  # as for a hub name, whose weights are not downloaded
    assert estimate.main(options) == 0
    assert f"{held / 1e6:,.1f} MB" in capsys.readouterr().out


def test_status_line_names_the_bits_and_the_bytes(tmp_path, capsys):
    packed, _ = write_packed(tmp_path, Variant("awq"), "bfloat16")
    held = sum(parameter.nbytes for parameter in load_model(packed, "cpu").parameters())
    options = ["--model", str(packed), "--prompt", "x", "--device", "cpu", "--max-new-tokens", "1"]
    assert generate.main(options) == 0
    assert f"{held / 1e6:,.1f} MB, bfloat16, the decoder int4," in capsys.readouterr().err


def test_loading_releases_the_packed_tensors_of_each_layer(tmp_path, monkeypatch):
    """So that there are never two copies of all weights."""
    packed, _ = write_packed(tmp_path, Variant("awq"), "bfloat16")
    layers = []
    convert = linear.int4_layer

    def recorded(layer):
        assert all(reference() is None for reference in layers), "an earlier layer is alive"
        layers.extend(weakref.ref(tensor) for tensor in layer.tensors().values())
        return convert(layer)

    monkeypatch.setattr(linear, "int4_layer", recorded)
    model = load_model(packed, "cpu")
    assert len(layers) == 3 * 7 * model.config.num_hidden_layers


def test_layers_agree_with_the_pack_of_one_layer():
    """The tests' own packer: the weights that it means are near the ones that it got."""
    weight = torch.randn(64, 128)
    for variant in (Variant("awq"), Variant(act_order=True), Variant(bits=8)):
        tensors, meant = pack_layer(weight, variant)
        assert (meant - weight).abs().max() < (0.4 if variant.bits == 4 else 0.03)
        if variant.method == "gptq":
            module = {f"x.{ending}": tensor for ending, tensor in tensors.items()}
            assert torch.equal(read_gptq(module, "x", variant.bits), meant)
            assert unpack_words(tensors["qzeros"].numpy(), variant.bits).min() >= 0
