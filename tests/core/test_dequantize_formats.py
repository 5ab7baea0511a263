"""Checkpoints of bitsandbytes and FP8 load as the plain weights that their formats mean.

They are packed here by loops over blocks in NumPy, which follow the description of the formats and
share nothing with `dequantize_formats.py`. bitsandbytes, compressed-tensors and transformers
themselves are compared where they are installed.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
import torch
from helpers import make_batch, random_sequence
from packed_checkpoints import bundled, write_checkpoint, write_pair
from safetensors.torch import load_file, save_file

import generate
import load_weights
import memory
from apps import estimate, quantize
from linear import Int4Linear, quantization_methods
from load_weights import load_model, save_model

PROJECTION = "model.layers.0.mlp.down_proj"  # [128, 384]
LAYERS = (PROJECTION, "model.layers.1.self_attn.q_proj", "visual.blocks.0.mlp.fc1")
NF4 = "weight.quant_state.bitsandbytes__nf4"


# ------------------------------------------------------------------------------------------ packers
@dataclass(frozen=True)
class FourBits:
    """How a test packs a weight in the format of bitsandbytes."""

    blocksize: int = 64
    nested_blocksize: int | None = None
    dtype: str = "bfloat16"
    kind: str = "nf4"
    storage: torch.dtype = torch.uint8

    def config(self):
        """Return the quantization_config that transformers writes."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.nested_blocksize is not None,
            "bnb_4bit_compute_dtype": self.dtype,
            "llm_int8_skip_modules": ["lm_head"],
        }

    def pack(self, weight):
        """Return the tensors of a layer by their endings, and the weights that they mean."""
        values = weight.float().numpy().flatten()
        table = four_bit_table(self.kind)
        absmax = [np.abs(block).max() for block in blocks(values, self.blocksize)]
        state = {
            "quant_type": self.kind,
            "blocksize": self.blocksize,
            "dtype": self.dtype,
            "shape": list(weight.shape),
        }
        tensors = {"weight.quant_map": torch.tensor(table)}
        if self.nested_blocksize is None:
            tensors["weight.absmax"] = torch.tensor(np.array(absmax))
        else:
            nested, absmax = pack_nested(np.array(absmax), self.nested_blocksize, state)
            tensors |= nested
        numbers = []
        meant = []
        for block, scale in zip(blocks(values, self.blocksize), absmax, strict=True):
            nearest = np.abs(block[:, None] / scale - table).argmin(1)
            numbers += nearest.tolist()
            meant += [table[number] * scale for number in nearest]
        if len(numbers) % 2:
            numbers.append(0)
        packed = [16 * high + low for high, low in zip(numbers[::2], numbers[1::2], strict=True)]
        packed = torch.tensor(packed, dtype=torch.uint8).view(self.storage)
        tensors["weight"] = packed[:, None].clone()
        text = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{self.kind}"] = torch.tensor(list(text)).byte()
        meant = torch.tensor(np.array(meant)).view(weight.shape)
        return tensors, meant.to(getattr(torch, self.dtype))


def blocks(values, size):
    """Return consecutive values, so many to a block; the last block may be short."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def four_bit_table(kind):
    """Return 16 values, float32: those of NF4 by quantiles (arXiv 2305.14314), or those of FP4."""
    if kind == "fp4":
        half = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
        return np.array(half + [-value for value in half], dtype=np.float32)
    quantile = NormalDist().inv_cdf
    highest = 0.9677083
    positive = [quantile(p) for p in np.linspace(highest, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(highest, 0.5, 8)[:-1]]
    table = np.array(sorted([*positive, 0.0, *negative]))
    return (table / table.max()).astype(np.float32)


def pack_nested(absmax, size, state):
    """Return the tensors of 8-bit scales, and the scales that they mean; complete the state."""
    table = np.linspace(-1, 1, 256).astype(np.float32) ** 3
    offset = float(np.float32(absmax.mean()))
    state |= {"nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset}
    numbers, scales, meant = [], [], []
    for block in blocks(absmax - np.float32(offset), size):
        scale = np.abs(block).max() + np.float32(1e-6)
        nearest = np.abs(block[:, None] / scale - table).argmin(1)
        numbers += nearest.tolist()
        scales.append(scale)
        meant += [table[number] * scale + np.float32(offset) for number in nearest]
    tensors = {
        "weight.absmax": torch.tensor(numbers, dtype=torch.uint8),
        "weight.nested_quant_map": torch.tensor(table),
        "weight.nested_absmax": torch.tensor(np.array(scales, dtype=np.float32)),
    }
    return tensors, meant


@dataclass(frozen=True)
class Fp8:
    """How a test packs a weight in FP8: a scale for each block of outputs and inputs."""

    block: tuple | None = (128, 128)  # a width of None: all of a layer
    method: str = "fp8"
    flat_scale: bool = False
    scale_dtype: torch.dtype = torch.float32

    def config(self):
        """Return the quantization_config that the packers of the method write."""
        widths = list(self.block)
        blocks = None if None in widths else widths
        if self.method == "fp8":
            return {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": blocks,
                "modules_to_not_convert": ["lm_head"],
            }
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "block_structure": blocks}
        return {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head", "re:visual.*"],
        }

    def pack(self, weight):
        """Return the tensors of a layer by their endings, and the weights that they mean."""
        outputs, inputs = weight.shape
        rows = self.block[0] or outputs
        columns = self.block[1] or inputs
        numbers = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        meant = torch.empty(weight.shape)
        scales = []
        for top in range(0, outputs, rows):
            scales.append([])
            for left in range(0, inputs, columns):
                area = (slice(top, top + rows), slice(left, left + columns))
                scale = (weight[area].abs().max() / 448).to(self.scale_dtype)
                numbers[area] = (weight[area] / scale.float()).to(torch.float8_e4m3fn)
                meant[area] = numbers[area].float() * scale.float()
                scales[-1].append(scale)
        scale = torch.stack([torch.stack(line) for line in scales])
        if self.flat_scale:
            scale = scale.flatten()
        if self.method == "fp8":
            return {"weight": numbers, "weight_scale_inv": scale}, meant
        return {
            "weight": numbers,
            "weight_scale": scale,
            "input_scale": torch.tensor([0.25]),
        }, meant


VARIANTS = {
    "nf4": FourBits(),
    "nf4, double quantization": FourBits(nested_blocksize=256),
    "nf4, float16": FourBits(dtype="float16", blocksize=128),
    "nf4, float32": FourBits(dtype="float32", nested_blocksize=64),
    "nf4, short last blocks": FourBits(blocksize=1000, nested_blocksize=30),
    "nf4, one huge block": FourBits(blocksize=2**31 - 1),
    "nf4, stored as bfloat16": FourBits(storage=torch.bfloat16),
    "fp4": FourBits(kind="fp4"),
    "FP8, blocks": Fp8(),
    "FP8, uneven blocks": Fp8((48, 100)),
    "FP8, one huge block": Fp8((2**31 - 1, 2**31 - 1)),
    "FP8, one scale": Fp8((None, None), flat_scale=True),
    "compressed-tensors, one scale": Fp8((None, None), "compressed-tensors", flat_scale=True),
    "compressed-tensors, outputs": Fp8((1, None), "compressed-tensors"),
    "compressed-tensors, flat outputs": Fp8((1, None), "compressed-tensors", flat_scale=True),
    "compressed-tensors, bfloat16": Fp8((1, None), "compressed-tensors", False, torch.bfloat16),
    "compressed-tensors, blocks": Fp8((64, 32), "compressed-tensors"),
}


@cache
def pack_bundled(variant):
    """Return the tensors of a quantized checkpoint, and those of one that means the same."""
    _, weights = bundled()
    packed = dict(weights)
    meant = dict(weights)
    for layer in LAYERS:
        tensors, meant[f"{layer}.weight"] = variant.pack(packed.pop(f"{layer}.weight"))
        packed |= {f"{layer}.{ending}": tensor for ending, tensor in tensors.items()}
    return packed, meant


def write_packed(folder, variant, dtype="float32"):
    """Write a quantized checkpoint and one that means the same; return both directories."""
    return write_pair(folder, *pack_bundled(variant), variant.config(), dtype)


def logits(model):
    """Return the logits of one random sequence with an image."""
    config, _ = bundled()
    batch = make_batch([random_sequence(config, [3, ("image", 2, 2), 5], seed=1)])
    with torch.inference_mode():
        return model(**batch)


def assert_same(model, expected):
    """Check that two models have the same parameters and logits, to the bit."""
    for name, parameter in expected.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert torch.equal(logits(model), logits(expected))


def refusal(folder, capsys, program=generate):
    """Return the one sentence of a program, without its name; the exit code is 2."""
    assert program.main(["--model", str(folder), "--prompt", "x", "--device", "cpu"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 600
    return printed.err.partition(": ")[2]


# ------------------------------------------------------------------------------------- whole models
@pytest.mark.sweep
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_load_model_equals_the_checkpoint_of_the_dequantized_weights(name, dtype, tmp_path):
    packed, meant = write_packed(tmp_path, VARIANTS[name])
    model = load_model(packed, "cpu", dtype)
    assert quantization_methods(model) == []
    assert_same(model, load_model(meant, "cpu", dtype))


@pytest.mark.parametrize("name", ["nf4, double quantization", "FP8, blocks"])
def test_load_model_reads_quantized_weights_in_the_nested_layout(name, tmp_path):
    packed, meant = pack_bundled(VARIANTS[name])
    nested = {}
    for key, tensor in packed.items():
        if key.startswith("visual."):
            nested[f"model.{key}"] = tensor
        else:
            nested[re.sub(r"^model\.", "model.language_model.", key)] = tensor
    config, _ = bundled()
    expected = load_model(write_checkpoint(tmp_path / "meant", config, meant), "cpu")
    config["quantization_config"] = VARIANTS[name].config()
    assert_same(load_model(write_checkpoint(tmp_path / "x", config, nested), "cpu"), expected)


def test_load_model_reads_a_quantized_head_and_embeddings(tmp_path):
    """The head of tied embeddings is a tensor of its own where the two are quantized apart."""
    config, weights = bundled()
    config["tie_word_embeddings"] = True
    packed = dict(weights)
    meant = dict(weights)
    tensors, meant["lm_head.weight"] = Fp8().pack(packed.pop("lm_head.weight"))
    packed |= {f"lm_head.{ending}": tensor for ending, tensor in tensors.items()}
    settings = {"quantization_config": Fp8().config()}
    folder = write_checkpoint(tmp_path / "packed", config | settings, packed)
    with pytest.warns(UserWarning, match="differs from the embeddings"):
        model = load_model(folder, "cpu")
    config["tie_word_embeddings"] = False
    assert_same(model, load_model(write_checkpoint(tmp_path / "meant", config, meant), "cpu"))


def test_load_model_takes_plain_weights_under_the_settings_of_a_format(tmp_path):
    """As a fine-tune leaves them that is merged and saved in full precision."""
    config, weights = bundled()
    expected = load_model(write_checkpoint(tmp_path / "plain", config, weights), "cpu")
    for variant in (FourBits(), Fp8()):
        config["quantization_config"] = variant.config()
        folder = write_checkpoint(tmp_path / "left over", config, weights)
        assert_same(load_model(folder, "cpu"), expected)


@pytest.mark.parametrize("name", ["nf4", "FP8, blocks"])
def test_quantize_works_on_dequantized_weights(name, tmp_path):
    packed, meant = write_packed(tmp_path, VARIANTS[name], "bfloat16")
    model = load_model(packed, "cpu", quantize="int4")
    assert type(model.get_submodule(PROJECTION)) is Int4Linear
    assert torch.equal(logits(model), logits(load_model(meant, "cpu", quantize="int4")))


def test_save_model_writes_plain_weights(tmp_path):
    packed, meant = write_packed(tmp_path, FourBits(), "bfloat16")
    save_model(load_model(packed, "cpu"), tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert_same(load_model(tmp_path / "saved", "cpu"), load_model(meant, "cpu"))


def test_apps_quantize_takes_what_is_dequantized(tmp_path, capsys):
    packed, meant = write_packed(tmp_path, Fp8(), "bfloat16")
    for source in (packed, meant):
        out = str(tmp_path / f"{source.name} in 8 bits")
        assert quantize.main(["--model", str(source), "--bits", "8", "--out", out]) == 0
    models = [load_model(tmp_path / f"{name} in 8 bits", "cpu") for name in ("packed", "meant")]
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_adapters_are_merged_into_dequantized_weights(tmp_path):
    """As an adapter of QLoRA was trained: on these weights, not on those before quantization."""
    packed, meant = write_packed(tmp_path, FourBits(nested_blocksize=256))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [PROJECTION]}
    settings["base_model_name_or_path"] = str(packed)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    prefix = f"base_model.model.{PROJECTION}"
    a, b = torch.randn(2, 384), torch.randn(128, 2)
    tensors = {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
    save_file(tensors, adapter / "adapter_model.safetensors")
    weight = load_model(adapter, "cpu").get_submodule(PROJECTION).weight
    expected = load_model(meant, "cpu").get_submodule(PROJECTION).weight + 2 * b @ a
    assert torch.allclose(weight, expected, atol=1e-5)


# ---------------------------------------------------------------------------------- other libraries
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_load_model_equals_bitsandbytes(kind, nested, tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    config, weights = bundled()
    packed = dict(weights)
    meant = dict(weights)
    for layer in LAYERS:
        weight = packed.pop(f"{layer}.weight").bfloat16()
        numbers, state = functional.quantize_4bit(
            weight, quant_type=kind, compress_statistics=nested
        )
        meant[f"{layer}.weight"] = functional.dequantize_4bit(numbers, state)
        packed[f"{layer}.weight"] = numbers
        for ending, tensor in state.as_dict(packed=True).items():
            packed[f"{layer}.weight.{ending}"] = tensor
    expected = load_model(write_checkpoint(tmp_path / "meant", config, meant), "cpu")
    config["quantization_config"] = FourBits(kind=kind).config()
    assert_same(load_model(write_checkpoint(tmp_path / "packed", config, packed), "cpu"), expected)


def test_load_model_equals_transformers_of_fp8(tmp_path):
    reference = pytest.importorskip("transformers.integrations.finegrained_fp8")
    variant = Fp8((64, 32))  # widths in whole blocks, which transformers requires
    packed, _ = write_packed(tmp_path, variant)
    tensors = load_file(packed / "model.safetensors")
    model = load_model(packed, "cpu")
    for layer in LAYERS:
        parts = {ending: tensors[f"{layer}.{ending}"] for ending in ("weight", "weight_scale_inv")}
        [expected] = reference.Fp8Dequantize(None).convert(parts).values()
        assert expected.dtype == torch.float32
        assert torch.equal(model.get_submodule(layer).weight, expected)


@pytest.mark.parametrize("block", [(None, None), (1, None), (48, 96)])
def test_load_model_equals_compressed_tensors(block, tmp_path):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor

    strategy = {(None, None): "tensor", (1, None): "channel"}.get(block, "block")
    options = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        options["block_structure"] = list(block)
    arguments = library.quantization.QuantizationArgs(**options)
    scheme = library.quantization.QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    variant = Fp8(block, "compressed-tensors", flat_scale=strategy == "tensor")
    packed, _ = write_packed(tmp_path, variant)
    tensors = load_file(packed / "model.safetensors")
    model = load_model(packed, "cpu")
    for layer in LAYERS:
        parts = {ending: tensors[f"{layer}.{ending}"] for ending in ("weight", "weight_scale")}
        expected = compressor.decompress(parts, scheme)["weight"]
        assert torch.equal(model.get_submodule(layer).weight, expected)


# -------------------------------------------------------------------------------- what is not right
WRONG_SETTINGS = [
    ({"quant_method": "fp8", "weight_block_size": 128}, "expected two positive integers, got 128"),
    (
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        r"weight_block_size: expected two positive integers, got \[128, 0\]",
    ),
    (
        {"quant_method": "fp8", "weight_block_size": None},
        r"weight_scale_inv in .*: expected the shape \[1\] or \[128, 1\], got \[1, 3\]",
    ),
    (
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        r"expected the shape \[2, 6\] for blocks of 64 × 64, got \[1, 3\]",
    ),
    (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "config_groups: expected groups of layers, got None",
    ),
]
GROUPS = [
    ({"group_0": 5}, "config_groups: expected weights, got 5"),
    (
        {"group_0": {"weights": {"type": "int", "num_bits": 8}}},
        "expected weights of type 'float' and 8 bits, got 'int' and 8",
    ),
    (
        {"group_0": {"weights": {"type": "float", "num_bits": 4}}},
        "expected weights of type 'float' and 8 bits, got 'float' and 4",
    ),
    (
        {
            "group_0": {"weights": {"type": "float", "num_bits": 8}},
            "group_1": {"weights": {"type": "float", "num_bits": 8, "block_structure": [8, 8]}},
        },
        "config_groups: expected the same block_structure for all layers",
    ),
]
for groups, sentence in GROUPS:
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    WRONG_SETTINGS.append((settings | {"config_groups": groups}, sentence))


@pytest.mark.sweep
@pytest.mark.parametrize(("settings", "sentence"), WRONG_SETTINGS)
def test_main_refuses_settings_in_one_sentence(settings, sentence, tmp_path, capsys):
    config, _ = bundled()
    config["quantization_config"] = settings
    folder = write_checkpoint(tmp_path / "packed", config, pack_bundled(Fp8())[0])
    actual = refusal(folder, capsys)
    assert re.search(sentence, actual)
    assert refusal(folder, capsys, estimate) == actual


def without(*endings):
    def change(tensors):
        for ending in endings:
            del tensors[f"{PROJECTION}.{ending}"]

    return change


def with_value(ending, value):
    def change(tensors):
        name = f"{PROJECTION}.{ending}"
        tensors[name] = value(tensors.get(name))

    return change


def with_state(**values):
    """Return a damage that changes fields of the quant_state; None leaves a field out."""

    def change(tensors):
        name = f"{PROJECTION}.{NF4}"
        state = json.loads(bytes(tensors[name].tolist())) | values
        state = {key: value for key, value in state.items() if value is not None}
        tensors[name] = torch.tensor(list(json.dumps(state).encode())).byte()

    return change


def text(content):
    return lambda _: torch.tensor(list(content)).byte()


DAMAGE = [
    (without(NF4), "down_proj.weight in .*: expected one weight.quant_state beside it, got 0"),
    (
        with_value("weight.quant_state.bitsandbytes__fp4", text(b"{}")),
        "down_proj.weight in .*model.safetensors: expected one weight.quant_state beside it, got 2",
    ),
    (without("weight"), r"expected model.layers.0.mlp.down_proj.weight beside it, got none"),
    (
        without("weight.absmax"),
        "expected weight.absmax, weight.nested_absmax, weight.nested_quant_map, weight.quant_map "
        "beside it, got weight.nested_absmax, weight.nested_quant_map, weight.quant_map",
    ),
    (without("weight.nested_absmax", "weight.nested_quant_map"), "beside it, got weight.absmax"),
    (with_state(nested_blocksize=None), "expected weight.absmax, weight.quant_map beside it"),
    (with_state(nested_offset=None), "nested_offset: expected a number beside nested_blocksize"),
    (with_state(nested_offset="x"), "nested_offset: expected a finite number, got 'x'"),
    (with_state(nested_offset=float("nan")), "nested_offset: expected a finite number, got nan"),
    (with_state(shape=[384, 128]), r"expected \[128, 384\], got \[384, 128\]"),
    (with_state(shape=[128, 385]), "absmax in .*model.safetensors: expected 770 numbers, got the"),
    (with_state(shape=[128, 383, 1]), "shape: expected two positive integers, got "),
    (with_state(shape=None), "shape: expected two positive integers, got None"),
    (with_state(dtype="int8"), "dtype: expected 'float32', 'float16' or 'bfloat16', got 'int8'"),
    (with_state(blocksize=0), "bitsandbytes__nf4 in .*: blocksize: expected a positive integer, "),
    (with_state(blocksize=128), r"absmax in .*: expected 384 numbers, got the shape \[768\]"),
    (with_state(blocksize=10**400), "blocksize: expected a positive integer, got 1000"),
    (with_state(nested_blocksize=128), r"nested_absmax in .*: expected 6 numbers, got the shape"),
    (with_value(NF4, text(b"{")), "bitsandbytes__nf4 in .*: expected JSON, got Expecting property"),
    (with_value(NF4, text(b"\xff")), "bitsandbytes__nf4 in .*: expected JSON, got "),
    (with_value(NF4, text(b"[" * 9000)), "bitsandbytes__nf4 in .*: expected JSON, got "),
    (with_value(NF4, text(b"[1]")), r"bitsandbytes__nf4 in .*: expected a JSON object, got \[1\]"),
    (with_value(NF4, text(b" " * 20000)), r"expected 10000 numbers, got the shape \[20000\]"),
    (with_value(NF4, torch.Tensor.int), "bitsandbytes__nf4 in .*: expected the dtype U8, got I32"),
    (with_value("weight", lambda x: x[1:]), r"expected 24576 numbers, got the shape \[24575, 1\]"),
    (
        with_value("weight", torch.Tensor.int),
        "expected the dtype U8 or F32 or F16 or BF16",
    ),
    (
        with_value("weight.absmax", torch.Tensor.float),
        "absmax in .*: expected the dtype U8",
    ),
    (with_value("weight.quant_map", lambda x: x[:15]), "quant_map in .*: expected 16 numbers, got"),
    (
        with_value("weight.quant_map", torch.Tensor.int),
        "quant_map in .*: expected the dtype F32",
    ),
    (with_value("weight.SCB", lambda _: torch.ones(128)), "quantized with bitsandbytes, which its"),
]
FP8_DAMAGE = [
    (without("weight_scale_inv"), "expected one weight_scale or weight_scale_inv beside it, got 0"),
    (with_value("weight_scale", lambda _: torch.ones(1)), "or weight_scale_inv beside it, got 2"),
    (without("weight"), "weight_scale_inv in .*: expected model.layers.0.mlp.down_proj.weight bes"),
    (
        with_value("weight", torch.Tensor.bfloat16),
        r"expected F8_E4M3 \[out, in\], got BF16",
    ),
    (with_value("weight", lambda x: x.view(-1)), r"expected F8_E4M3 \[out, in\], got F8_E4M3 \[49"),
    (with_value("weight", lambda x: x[1:]), r"\(expected \[128, 384\], got \[127, 384\]\)"),
    (with_value("weight_scale_inv", lambda x: x[:, 1:]), r"expected the shape \[1, 3\] for blocks"),
    (
        with_value("weight_scale_inv", torch.Tensor.int),
        "expected the dtype F32 or F16 or BF16",
    ),
    (
        with_value("weight_zero_point", lambda _: torch.ones(1)),
        "1 not part of Qwen2-VL: .*zero_",
    ),
]
DAMAGED = [(FourBits(nested_blocksize=256), *case) for case in DAMAGE]
DAMAGED += [(Fp8(), *case) for case in FP8_DAMAGE]


@pytest.mark.sweep
@pytest.mark.parametrize(("variant", "damage", "sentence"), DAMAGED)
def test_main_names_the_tensor_that_is_wrong(variant, damage, sentence, tmp_path, capsys):
    folder, _ = write_packed(tmp_path, variant)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, folder / "model.safetensors")
    assert re.search(sentence, refusal(folder, capsys))


# ------------------------------------------------------------------------------------------- memory
@pytest.mark.sweep
@pytest.mark.parametrize("name", ["nf4, double quantization", "FP8, blocks"])
def test_estimate_counts_plain_weights_and_names_the_format(name, tmp_path, capsys):
    packed, _ = write_packed(tmp_path, VARIANTS[name], "bfloat16")
    count = sum(parameter.numel() for parameter in load_model(packed, "cpu").parameters())
    options = ["--model", str(packed), "--prompt", "x", "--device", "cpu"]
    assert estimate.main(options) == 0
    line = f"{2 * count / 1e6:,.1f} MB  {count / 1e6:,.1f} M parameters in bfloat16, "
    line += "dequantized from "
    line += "bitsandbytes (4 bits)" if name.startswith("nf4") else "FP8"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nf4", "FP8, blocks"])
def test_dequantized_weights_count_as_copies_of_small_files(name, tmp_path):
    packed, _ = write_packed(tmp_path, VARIANTS[name])
    config = load_weights.load_config(packed)
    run = memory.Run(config, torch.device("cpu"), torch.float32)
    run.stored_dtypes = memory.read_stored_dtypes(packed, config)
    weights = memory.count_weights(run)
    model = load_model(packed, "cpu")
    assert weights.total == sum(parameter.nbytes for parameter in model.parameters())
    assert weights.private == sum(model.get_submodule(layer).weight.nbytes for layer in LAYERS)
    tensors = load_file(packed / "model.safetensors").items()
    # The parts beside a quantized weight are small, and not counted.
    counted = [tensor.nbytes for name, tensor in tensors if name.endswith((".weight", ".bias"))]
    assert weights.file_bytes == sum(counted)


@pytest.mark.parametrize("name", ["nf4", "FP8, blocks", "compressed-tensors, outputs"])
def test_dtypes_without_files_are_those_that_config_json_plans(name, tmp_path):
    """As for a hub name, whose weights are not downloaded for an estimate."""
    config, _ = bundled()
    config["quantization_config"] = VARIANTS[name].config()
    folder = write_checkpoint(tmp_path / "packed", config, {})
    (folder / "model.safetensors").unlink()
    dtypes = memory.read_stored_dtypes(folder, load_weights.load_config(folder))
    assert set(dtypes.values()) == {torch.quint4x2 if name == "nf4" else torch.int8}
    assert f"{PROJECTION}.weight" in dtypes
    plain = ("lm_head.weight", "model.embed_tokens.weight", "visual.patch_embed.proj.weight")
    assert not dtypes.keys() & {*plain, "model.norm.weight", f"{LAYERS[1]}.bias"}
    assert ("visual.blocks.0.mlp.fc1.weight" in dtypes) == (name != "compressed-tensors, outputs")


def test_status_line_says_that_weights_are_dequantized(tmp_path, capsys):
    packed, _ = write_packed(tmp_path, FourBits(), "bfloat16")
    options = ["--model", str(packed), "--prompt", "x", "--device", "cpu", "--max-new-tokens", "1"]
    assert generate.main(options) == 0
    assert "dequantized from bitsandbytes (4 bits)" in capsys.readouterr().err
