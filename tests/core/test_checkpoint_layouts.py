"""Checkpoints in the wild: each layout loads as in the reference, or is refused in one sentence.

Every directory starts from the bundled checkpoint's files, in the hub's layout, and is changed as
saves, merges and converters change them. The right values come from transformers, live.
"""

import errno
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
import torch
from helpers import make_batch, random_sequence, token_types
from huggingface_hub import errors
from safetensors.torch import load_file, save_file

import generate as command
import load_weights
from apps import estimate
from command_line import BUNDLED_CHECKPOINT
from load_weights import (
    check_supported,
    checkpoint_dtype,
    find_checkpoint,
    load_config,
    load_model,
    parameter_name,
    save_model,
    weight_files,
)

IMAGE = BUNDLED_CHECKPOINT.parent.parent / "examples" / "small.png"
TEXT_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "use_sliding_window", "sliding_window", "max_window_layers",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def original():
    """config.json and the tensors of the bundled checkpoint."""
    return json.loads((BUNDLED_CHECKPOINT / "config.json").read_text()), load_file(
        BUNDLED_CHECKPOINT / "model.safetensors"
    )


@pytest.fixture
def published(original):
    """Copies of them, free to be changed, in float32, so that logits can be compared closely."""
    config, weights = original
    config = json.loads(json.dumps(config)) | {"torch_dtype": "float32"}
    return config, {name: tensor.float() for name, tensor in weights.items()}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a checkpoint, with the bundled tokenizer and image settings."""

    def write(config, weights, name="model.safetensors"):
        skipped = shutil.ignore_patterns("*.safetensors", "config.json")
        folder = shutil.copytree(
            BUNDLED_CHECKPOINT, tmp_path / "checkpoint", ignore=skipped, dirs_exist_ok=True
        )
        (folder / "config.json").write_text(json.dumps(config))
        if weights:
            contiguous = {key: tensor.clone() for key, tensor in weights.items()}
            save_file(contiguous, folder / name, metadata={"format": "pt"})
        return folder

    return write


def reference(folder):
    from transformers import Qwen2VLForConditionalGeneration

    return Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()


def assert_same(ours, theirs):
    """Every parameter is equal, dtype too; so are a float32 model's logits, within rounding."""
    expected = {parameter_name(name): p for name, p in theirs.named_parameters()}
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter, expected[name]), name
    if ours.lm_head.weight.dtype != torch.float32:
        return
    config = json.loads((BUNDLED_CHECKPOINT / "config.json").read_text())
    batch = make_batch([random_sequence(config, [3, 5], seed=1)])
    with torch.no_grad():
        kinds = token_types(config, batch["input_ids"])
        expected = theirs(**batch, mm_token_type_ids=kinds).logits
        assert (ours(**batch) - expected).abs().max() <= 3e-5


def answer(folder, capsys, *options):
    """What the command line prints; its exit code is 0."""
    arguments = ["--model", str(folder), "--image", str(IMAGE), "--device", "cpu", "--quiet"]
    assert command.main([*arguments, "--max-new-tokens", "4", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def refusal(folder, capsys, program=command):
    """Return the one sentence of a program, without its name; the exit code is 2."""
    arguments = ["--model", str(folder), "--prompt", "x", "--device", "cpu", "--quiet"]
    assert program.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert len(printed.err) < 600
    return printed.err.partition(": ")[2]


# ------------------------------------------------------------------------------------------ layouts


def flat(config, weights):
    return config, weights


def flat_and_nested(config, weights):
    """transformers 4.57 after resize_token_embeddings.

    Stale fields at the top, the tie flag inside alone.
    """
    text = {name: config[name] for name in TEXT_FIELDS} | {"tie_word_embeddings": True}
    stale = {"vocab_size": 151936, "rms_norm_eps": 0.5, "rope_theta": 5.0, "num_key_value_heads": 1}
    stale |= {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
    outside = {name: value for name, value in config.items() if name != "tie_word_embeddings"}
    return outside | stale | {"text_config": text}, weights


def nested(config, weights):
    """transformers 5."""
    text = {name: config.pop(name) for name in TEXT_FIELDS}
    rope = text.pop("rope_scaling")
    text["rope_parameters"] = {
        "rope_theta": text.pop("rope_theta"),
        "rope_type": "default",
        "mrope_section": rope["mrope_section"],
    }
    return config | {"text_config": text}, {reference_name(n): t for n, t in weights.items()}


def reference_name(name):
    if name.startswith("visual."):
        return "model." + name
    return re.sub(r"^model\.", "model.language_model.", name)


def bare(config, weights):
    return config, {reference_name(n).removeprefix("model."): t for n, t in weights.items()}


def one_model_too_many(config, weights):
    return config, {"model." + name: tensor for name, tensor in weights.items()}


def head_alone(config, weights):
    weights[HEAD] = weights.pop(EMBEDDING)
    return config, weights


def both_equal(config, weights):
    return config, weights | {HEAD: weights[EMBEDDING].clone()}


def both_equal_in_the_dtype(config, weights):
    head = weights[EMBEDDING] * (1 + 1e-6)
    return config | {"torch_dtype": "bfloat16"}, weights | {HEAD: head}


def stored_frequencies(config, weights):
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 1)}
    frequencies["model.rotary_emb.inv_freq"] = torch.ones(16)
    frequencies["visual.rotary_pos_emb.inv_freq"] = torch.ones(8)
    return config, weights | frequencies


def no_sharing_by_null(config, weights):
    for name in weights:
        if "k_proj" in name or "v_proj" in name:
            weights[name] = torch.cat((weights[name], weights[name]))
    return config | {"num_key_value_heads": None}, weights


def mixed_dtypes(config, weights):
    """Norms and merger in float32, one layer in float8, the rest in bfloat16."""
    for name in weights:
        if "norm" not in name and "merger" not in name:
            weights[name] = weights[name].bfloat16()
        if "layers.1.mlp" in name:
            weights[name] = weights[name].to(torch.float8_e4m3fn)
    return config | {"torch_dtype": "bfloat16"}, weights


def mixed_dtypes_unnamed(config, weights):
    config, weights = mixed_dtypes(config, weights)
    del config["torch_dtype"]
    return config, weights


def half_unnamed(config, weights):
    del config["torch_dtype"]
    return config, {name: tensor.half() for name, tensor in weights.items()}


def both_dtype_names(config, weights):
    return config | {"torch_dtype": "bfloat16", "dtype": "float16"}, weights


def other_dtype_than_the_files(config, weights):
    return config, {name: tensor.bfloat16() for name, tensor in weights.items()}


LAYOUTS = [
    flat, flat_and_nested, nested, bare, one_model_too_many, head_alone, both_equal,
    both_equal_in_the_dtype, stored_frequencies, no_sharing_by_null, mixed_dtypes,
    mixed_dtypes_unnamed, half_unnamed, both_dtype_names, other_dtype_than_the_files,
]  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_model_reads_each_layout_as_the_reference_does(layout, published, write, capsys):
    folder = write(*layout(*published))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_model(folder, "cpu")
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    theirs = reference(folder)
    capsys.readouterr()
    assert_same(ours, theirs)
    assert answer(folder, capsys).strip()


def test_load_model_prefers_its_dtype_to_the_files(published, write):
    folder = write(*mixed_dtypes(*published))
    assert {p.dtype for p in load_model(folder, "cpu", torch.float64).parameters()} == {
        torch.float64
    }


def test_checkpoint_dtype_falls_back_to_text_config(published, write):
    config, weights = half_unnamed(*published)
    folder = write(config | {"text_config": {"dtype": "bfloat16"}}, weights)
    assert checkpoint_dtype(folder) == torch.bfloat16
    assert {p.dtype for p in load_model(folder, "cpu").parameters()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_load_model_keeps_a_head_that_differs(tied, published, write, tmp_path):
    config, weights = published
    weights[HEAD] = weights[EMBEDDING] + 0.01
    folder = write(config | {"tie_word_embeddings": tied}, weights)
    if tied:
        with pytest.warns(UserWarning, match="lm_head.weight .* differs from the embeddings"):
            ours = load_model(folder, "cpu")
    else:
        ours = load_model(folder, "cpu")
    assert not ours.config.tie_word_embeddings
    assert_same(ours, reference(folder))
    save_model(ours, tmp_path / "again")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_model(tmp_path / "again", "cpu"), reference(tmp_path / "again"))


@pytest.mark.sweep
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "a.b.model."])
@pytest.mark.parametrize("layout", [flat, nested])
def test_load_model_removes_a_prefix_that_all_names_share(prefix, layout, published, write):
    folder = write(*layout(*published))
    # Copied: old versions of safetensors write into the file that the parameters are mapped from.
    expected = [parameter.clone() for parameter in load_model(folder, "cpu").parameters()]
    weights = load_file(folder / "model.safetensors")
    save_file({prefix + name: t for name, t in weights.items()}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="the prefix is removed"):
        ours = load_model(folder, "cpu")
    for (name, found), wanted in zip(ours.named_parameters(), expected, strict=True):
        assert torch.equal(found, wanted), name


def test_load_model_prefers_the_model_file_to_an_index(published, write):
    folder = write(*published)
    stale = {"metadata": {}, "weight_map": {HEAD: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    with pytest.warns(UserWarning, match=r"both model.safetensors and model.safetensors.index"):
        ours = load_model(folder, "cpu")
    assert_same(ours, reference(folder))


def test_load_model_follows_symlinked_shards(published, write, tmp_path):
    """The hub's cache: a snapshot holds links to blobs elsewhere."""
    folder = write(*published)
    (folder / "model.safetensors").rename(tmp_path / "0123abcd")
    (folder / "model-00001-of-00001.safetensors").symlink_to("../0123abcd")
    index = {"weight_map": dict.fromkeys(published[1], "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_model(folder, "cpu").lm_head.weight.shape == published[1][EMBEDDING].shape


def test_find_checkpoint_expands_the_home_directory(published, write, monkeypatch):
    folder = write(*published)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_checkpoint("~/checkpoint") == folder
    with pytest.raises(FileNotFoundError, match="nor a hub name"):
        find_checkpoint("~no-such-user-here/x")


# ---------------------------------------------------------------------------- what cannot be loaded

QUANTIZED = [
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        r"bitsandbytes \(8 bits\)",
    ),
    ({"quantization_config": {"load_in_8bit": True}}, r"bitsandbytes \(8 bits\)"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    (
        {"compression_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "compressed-tensors pack-quantized",
    ),
    ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "FBGEMM FP8"),
    ({"quantization_config": {"quant_method": "quanto", "weights": "int8"}}, "quanto"),
    ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ({"quantization_config": {"quant_method": "eetq"}}, "EETQ"),
    ({"quantization_config": {"quant_method": "aqlm"}}, "AQLM"),
    ({"quantization_config": {"quant_method": "new-method"}}, "new-method"),
    ({"quantization": {"group_size": 64, "bits": 4}}, r"MLX \(4 bits\)"),
    ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "HQQ"),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("change", "method"), QUANTIZED)
def test_main_refuses_a_quantized_config_by_method(change, method, published, write, capsys):
    folder = write(published[0] | change, published[1])
    sentence = refusal(folder, capsys)
    assert re.search(f"quantized with {method}", sentence)
    assert "Qwen/Qwen2-VL-2B-Instruct" in sentence
    assert refusal(folder, capsys, estimate) == sentence


def test_check_supported_names_the_full_precision_checkpoint(published, write):
    hqq = {"quant_method": "hqq", "bits": 4, "group_size": 64}
    for hidden_size, size in ((1536, "2B"), (3584, "7B"), (8192, "72B")):
        config = published[0] | {"hidden_size": hidden_size, "quantization_config": hqq}
        with pytest.raises(ValueError, match=f"Qwen/Qwen2-VL-{size}-Instruct"):
            check_supported(write(config, {}))


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("tensors", "method"),
    [
        (("qweight", "qzeros", "scales", "g_idx"), "AWQ or GPTQ"),
        (("weight", "SCB", "weight_format"), "bitsandbytes"),
        (("weight", "weight.absmax", "weight.quant_map"), "bitsandbytes"),
        (("weight", "weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        (("weight", "weight_scale"), "FP8 or compressed-tensors"),
        (("weight", "weight_scale_inv"), "FP8"),
        (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
        (("weight", "scales", "biases"), "MLX"),
        (("weight._data", "weight._scale"), "quanto"),
        (("W_q", "meta"), "HQQ"),
        (("codes", "codebooks", "scales"), "AQLM"),
    ],
)
def test_main_refuses_quantized_tensors_that_the_config_does_not_name(
    tensors, method, published, write, capsys
):
    config, weights = published
    for name in [name for name in weights if name.endswith("proj.weight") and "layers" in name]:
        del weights[name]
        for ending in tensors:
            weights[name.removesuffix("weight") + ending] = torch.zeros(2, 2, dtype=torch.int32)
    assert f"quantized with {method}, which" in refusal(write(config, weights), capsys)


def test_load_config_refuses_an_adapter_and_names_the_options(published, write):
    folder = write(*published)
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a LoRA adapter, .* with --adapter"):
        load_config(folder)


def test_main_refuses_adapter_tensors_without_an_adapter_config(published, write, capsys):
    config, weights = published
    weights["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.zeros(2, 128)
    assert "a LoRA adapter, expected the weights of a whole model" in refusal(
        write(config, weights), capsys
    )


def test_main_refuses_gguf_as_file_and_directory(tmp_path, capsys):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for source in (tmp_path, tmp_path / "model.Q4_K_M.gguf"):
        for program in (command, estimate):
            assert "GGUF format of llama.cpp" in refusal(source, capsys, program)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "lacks model.safetensors\n"),
        ({"pytorch_model.bin": b"PK"}, "holds pytorch_model.bin: only safetensors"),
        ({"pytorch_model-00001-of-00002.bin": b"PK"}, "only safetensors"),
        (
            {"model-00001-of-00002.safetensors": b""},
            r"lacks .*index.json, which would name model-0",
        ),
        ({"consolidated.safetensors": b""}, "which would name consolidated.safetensors"),
        ({"q4.gguf": b"GGUF"}, "GGUF"),
        ({"model.safetensors": b""}, "model.safetensors is not a whole safetensors file"),
        (
            {"model.safetensors": b"<!DOCTYPE html><html>not found</html>"},
            "not a whole safetensors",
        ),
        (
            {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
            "Git LFS pointer.*git lfs pull",
        ),
        ({"model.safetensors": b"\xff" * 4000}, "not a whole safetensors"),
        ({"model.safetensors": b"\x02\0\0\0\0\0\0\0{}"}, "58 missing|[0-9]+ missing"),
    ],
)
def test_main_refuses_missing_or_foreign_weights_in_one_sentence(
    files, sentence, published, write, capsys
):
    folder = write(published[0], {})
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert re.search(sentence, refusal(folder, capsys))


def test_main_refuses_cut_off_weights_in_one_sentence(published, write, capsys):
    path = write(*published) / "model.safetensors"
    content = path.read_bytes()
    for length in (4, 9, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert "not a whole safetensors file" in refusal(path.parent, capsys)


def test_main_refuses_weights_that_are_no_regular_file(published, write, capsys):
    folder = write(published[0], {})
    os.mkfifo(folder / "model.safetensors")
    found = refusal(folder, capsys)
    assert f"{folder / 'model.safetensors'}: expected a regular file, got a pipe" in found


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ("{}", "weight_map: expected an object"),
        ('{"weight_map": null}', "weight_map: expected an object"),
        ('{"weight_map": ["a"]}', "weight_map: expected an object"),
        ('{"weight_map": {"a": 7}}', "expected names of safetensors files in the same directory"),
        ('{"weight_map": {"a": null}}', "expected names of safetensors files"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "files in the same directory"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "files in the same directory"),
        ('{"weight_map": {"a": "sub/x.safetensors"}}', "files in the same directory"),
        ('{"weight_map": {"a": "sub\\\\x.safetensors"}}', "files in the same directory"),
        ('{"weight_map": {"a": "model.bin"}}', "expected names of safetensors files"),
        ('{"weight_map": {"a": ["x"]}}', "expected names of safetensors files"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors"),
        ("{", "not a JSON file"),
        ("", "not a JSON file"),
        ("[]", "JSON object"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_main_refuses_a_damaged_index_in_one_sentence(index, sentence, published, write, capsys):
    folder = write(published[0], {})
    save_file(published[1], folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    found = refusal(folder, capsys)
    assert sentence in found
    assert "model.safetensors.index.json" in found


def test_main_names_a_tensor_in_two_shards(published, write, capsys):
    config, weights = published
    folder = write(config, weights, "model-1.safetensors")
    save_file({"model.norm.weight": torch.zeros(128)}, folder / "model-2.safetensors")
    files = {"model.norm.weight": "model-2.safetensors", EMBEDDING: "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    found = refusal(folder, capsys)
    assert re.search(r"two tensors for .* model.norm.weight.*model-1.*model-2", found)


def test_main_names_an_integer_tensor(published, write, capsys):
    config, weights = published
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int32)
    found = refusal(write(config, weights), capsys)
    assert "1 of a dtype that is not floating point: model.norm.weight" in found


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "qwen2_5_vl"}, "got 'qwen2_5_vl'"),
        ({"model_type": "qwen2"}, "got 'qwen2'"),
        ({"model_type": "llava"}, "got 'llava'"),
        ({"model_type": "qwen2_audio"}, "got 'qwen2_audio'"),
        ({"model_type": "colqwen2", "vlm_config": {"model_type": "qwen2_vl"}}, "got 'colqwen2'"),
        ({"model_type": None}, "got None"),
        ({"model_type": ["qwen2_vl"]}, r"got \['qwen2_vl'\]"),
    ],
)
def test_main_names_the_type_of_another_model(change, sentence, published, write, capsys):
    folder = write(published[0] | change, published[1])
    assert re.search(f"model_type: expected 'qwen2_vl', {sentence}", refusal(folder, capsys))
    refusal(folder, capsys, estimate)


def test_main_names_the_head_of_a_reward_model(published, write, capsys):
    config, weights = published
    weights["score.weight"] = torch.zeros(1, 128)
    config["architectures"] = ["Qwen2VLForSequenceClassification"]
    found = refusal(write(config, weights), capsys)
    assert "Qwen2VLForSequenceClassification" in found
    assert "score.weight [1, 128]" in found


def test_main_imports_no_code_named_by_the_config(published, write, capsys):
    config, weights = published
    folder = write(config | {"auto_map": {"AutoModel": "evil.Model"}}, weights)
    (folder / "evil.py").write_text("raise SystemExit('imported')")
    assert answer(folder, capsys).strip()


# -------------------------------------------------------------------------------------- config.json

WRONG_VALUES = [
    ("hidden_size", "128", "hidden_size: expected a positive integer, got '128'"),
    ("hidden_size", 128.0, "hidden_size: expected a positive integer"),
    ("hidden_size", True, "hidden_size: expected a positive integer, got True"),
    ("hidden_size", 10**30, "hidden_size: expected a positive integer"),
    ("hidden_size", [128], "hidden_size: expected a positive integer"),
    ("vocab_size", -1, "vocab_size: expected a positive integer, got -1"),
    ("vocab_size", 0, "vocab_size: expected a positive integer, got 0"),
    ("num_attention_heads", 0, "num_attention_heads: expected a positive integer"),
    ("num_hidden_layers", 10**6, "num_hidden_layers: expected at most"),
    ("num_key_value_heads", "2", "num_key_value_heads: expected a positive integer"),
    ("max_window_layers", "2", "max_window_layers: expected an integer"),
    ("sliding_window", 1.5, "sliding_window: expected an integer"),
    ("hidden_act", 3, "hidden_act: expected a string"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps: expected a positive number, got nan"),
    ("rms_norm_eps", "1e-6", "rms_norm_eps: expected a positive number"),
    ("rope_theta", float("inf"), "rope_theta: expected a positive number, got inf"),
    ("rope_theta", -1.0, "rope_theta: expected a positive number"),
    ("attention_dropout", 1.5, "attention_dropout: expected at least 0 and below 1"),
    ("use_sliding_window", "yes", "use_sliding_window: expected true or false"),
    ("tie_word_embeddings", "false", "tie_word_embeddings: expected true or false"),
    ("image_token_id", "<|image_pad|>", "image_token_id: expected an integer"),
    ("eos_token_id", ["1"], "eos_token_id: expected an integer or a list of integers"),
    ("rope_scaling", "mrope", "rope_scaling: expected an object, got 'mrope'"),
    ("rope_scaling", {"mrope_section": "16"}, "mrope_section: expected a list of integers"),
    ("rope_scaling", {"mrope_section": [1, "2"]}, "mrope_section: expected a list of integers"),
    ("rope_scaling", {"mrope_section": [-1, 17]}, "mrope_section: expected sizes that sum to"),
    ("rope_scaling", {"type": ["x"], "mrope_section": [4, 6, 6]}, "rope_type: expected a string"),
    ("text_config", [], "text_config: expected an object"),
    ("vision_config", "none", "vision_config: expected an object"),
    ("vision_config", {"depth": "4"}, "vision_config.depth: expected a positive integer"),
    ("vision_config", {"depth": 10**6}, "vision_config.depth: expected at most"),
    ("vision_config", {"patch_size": 0}, "vision_config.patch_size: expected a positive integer"),
    ("vision_config", {"mlp_ratio": float("nan")}, "vision_config.mlp_ratio: expected a positive"),
    ("vision_config", {"mlp_ratio": 1e300}, "vision_config.mlp_ratio: expected a smaller"),
    (
        "vision_config",
        {"hidden_act": None, "num_heads": 7},
        "vision_config.embed_dim: expected a m",
    ),
    (
        "vision_config",
        {"hidden_size": 128, "rope_parameters": 3},
        "rope_parameters: expected an object",
    ),
    ("torch_dtype", "float8_e4m3fn", "dtype: expected one of float64, float32"),
    ("torch_dtype", 16, "dtype: expected one of float64, float32"),
    ("torch_dtype", {"": "bfloat16"}, "dtype: expected one of float64, float32"),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("field", "value", "sentence"), WRONG_VALUES)
def test_main_names_file_and_field_of_a_wrong_value(
    field, value, sentence, published, write, capsys
):
    folder = write(published[0] | {field: value}, published[1])
    for program in (command, estimate):
        found = refusal(folder, capsys, program)
        assert f"{folder / 'config.json'}: " in found
        assert sentence in found


def test_main_refuses_sizes_beyond_any_memory_in_one_sentence(published, write, capsys):
    size = 2**31 - 128
    config = published[0] | {"hidden_size": size, "intermediate_size": size, "vocab_size": size}
    config["vision_config"] |= {"hidden_size": size}
    config["rope_scaling"] = {"type": "mrope", "mrope_section": [size // 8, 0, 0]}
    assert "config.json: a model of these sizes" in refusal(write(config, published[1]), capsys)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{\0}\0",
        b'\xef\xbb\xbf{"model_type": "qwen2_vl"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"hidden_size": ' + b"9" * 5000 + b"}",
        b"\x89PNG\r\n\x1a\n",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_main_refuses_a_malformed_config_file_in_one_sentence(content, published, write, capsys):
    folder = write(*published)
    (folder / "config.json").write_bytes(content)
    assert str(folder / "config.json") in refusal(folder, capsys)


@pytest.mark.slow
def test_main_counts_the_layers_of_the_weights_before_it_builds_any(
    published, write, capsys, monkeypatch
):
    monkeypatch.setattr(load_weights, "empty_model", None)  # which would take time for each layer
    config = published[0]
    folder = write(config | {"num_hidden_layers": 999}, published[1])
    sentence = "config.json: num_hidden_layers: expected at most 4, as many as the weights have"
    assert f"{sentence}, got 999" in refusal(folder, capsys)
    vision = config["vision_config"] | {"depth": 5}
    folder = write(config | {"vision_config": vision}, published[1])
    assert "vision_config.depth: expected at most 4, as many" in refusal(folder, capsys)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("file", "changes", "sentence"),
    [
        ("generation_config.json", {"eos_token_id": [531, 545]}, "expected ids of the vocabulary"),
        (
            "generation_config.json",
            {"eos_token_id": -1},
            "expected ids of the vocabulary, 0 to 544",
        ),
        ("generation_config.json", {"eos_token_id": "531"}, "eos_token_id: expected an integer"),
        ("generation_config.json", {"pad_token_id": {}}, "pad_token_id: expected an integer"),
        ("generation_config.json", {"do_sample": 1}, "do_sample: expected true or false, got 1"),
        ("preprocessor_config.json", {"merge_size": 1}, "merge_size is 1 in the processor, but 2"),
        ("preprocessor_config.json", {"patch_size": 7}, "patch_size is 7 in the processor, but 14"),
        ("preprocessor_config.json", {"temporal_patch_size": 10**9}, "temporal_patch_size is 1000"),
        ("preprocessor_config.json", {"patch_size": 10**6}, "patch_size: expected at most"),
        (
            "preprocessor_config.json",
            {"min_pixels": 10**8, "max_pixels": 10**9},
            "min_pixels 100000000 makes 127551 tokens of each image, expected at most max_position",
        ),
        ("config.json", {"image_token_id": 7}, "the id of <|image_pad|> is 543 in the processor"),
        ("config.json", {"vocab_size": 544}, "another shape"),
        (
            "tokenizer_config.json",
            {"eos_token": "<|end|>"},
            "expected more than 545, the largest id",
        ),
    ],
)
def test_main_refuses_files_that_contradict_each_other_before_it_reads_images(
    file, changes, sentence, published, write, capsys
):
    folder = write(*published)
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(settings | changes))
    found = refusal(folder, capsys)
    assert sentence in found
    assert ".json" in found


def test_main_refuses_json_that_is_too_large_or_too_deep(published, write, capsys):
    folder = write(*published)
    path = folder / "generation_config.json"
    path.write_text('{"a": ' + "[" * 65 + "]" * 65 + "}")
    assert f"{path} is not a usable JSON file: it is nested too deeply" in refusal(folder, capsys)
    path.write_text('{"a": ' + "[" * 60 + "]" * 60 + "}")
    assert answer(folder, capsys)
    with open(path, "ab") as file:
        file.truncate(2**25 + 1)  # sparse: takes no space
    assert f"{path}: expected a file of at most 33,554,432 bytes, got 33,554,433" in refusal(
        folder, capsys
    )


def test_main_names_a_json_file_that_is_a_git_lfs_pointer(published, write, capsys):
    path = write(*published) / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert f"{path} is a Git LFS pointer: run `git lfs pull`" in refusal(path.parent, capsys)


def test_main_warns_of_few_unknown_fields_and_their_number(published, write):
    folder = write(published[0] | {f"new\n{number}": 1 for number in range(1000)}, published[1])
    with pytest.warns(UserWarning, match="unknown field") as caught:
        load_config(folder)
    assert len(caught) == load_weights.MAX_WARNINGS + 1
    assert "holds 995 more unknown fields" in str(caught[-1].message)
    assert not any("\n" in str(warning.message) for warning in caught)


# ------------------------------------------------------------------------------- weights not finite


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        (float("nan"), (), "model.layers.1.mlp.up_proj.weight holds NaN"),
        (-float("inf"), (), "model.layers.1.mlp.up_proj.weight holds infinity in float32"),
        (1e5, ("--dtype", "float16"), "weight holds infinity in float16"),
        (0.0, (), "weight holds nothing but zeros"),
    ],
)
def test_check_weights_names_damaged_tensors(values, options, sentence, published, write, capsys):
    config, weights = published
    weight = weights["model.layers.1.mlp.up_proj.weight"]
    folder = write(config, weights)
    assert answer(folder, capsys, "--check-weights")
    if values == 0:
        weight.zero_()
    weight[5, 3] = values
    folder = write(config, weights)
    arguments = ["--model", str(folder), "--prompt", "x", "--device", "cpu", "--quiet"]
    assert command.main([*arguments, *options, "--check-weights"]) == 2
    error = capsys.readouterr().err
    assert f"1 of {len(weights)} tensors in {folder} are damaged: " in error
    assert sentence in error


JSON_FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip


@pytest.mark.sweep
@pytest.mark.parametrize("name", JSON_FILES)
def test_main_refuses_what_is_no_regular_file(name, published, write, capsys):
    path = write(*published) / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert f"{path}: expected a regular file, got a pipe" in refusal(path.parent, capsys)
    path.unlink()
    path.mkdir()
    assert f"{path}: expected a regular file, got a directory" in refusal(path.parent, capsys)
    path.rmdir()
    path.symlink_to("/dev/zero")
    assert f"{path}: expected a regular file, got a device" in refusal(path.parent, capsys)
    path.unlink()
    path.symlink_to("../blobs/gone")
    found = refusal(path.parent, capsys)
    assert f"{path} is a link to ../blobs/gone, which does not exist" in found


def test_load_config_reads_null_as_the_default(published, write):
    config, _ = published
    nulls = dict.fromkeys(("hidden_act", "rms_norm_eps", "max_window_layers", "use_sliding_window"))
    read = load_config(write(config | nulls | {"sliding_window": None, "text_config": None}, {}))
    assert (read.hidden_act, read.rms_norm_eps, read.max_window_layers) == ("silu", 1e-5, 80)
    assert (read.use_sliding_window, read.sliding_window) == (False, None)


# ------------------------------------------------------------------------------------------ the hub


def response(status):
    return httpx2.Response(status, request=httpx2.Request("GET", "https://huggingface.co/a/b"))


def from_cause(error, cause):
    error.__cause__ = cause
    return error


class Panic(BaseException):
    """What an extension in Rust raises is no Exception."""


FAILURES = [
    (errors.GatedRepoError("gated\nvisit", response=response(403)), "access to it is restricted"),
    (errors.RepositoryNotFoundError("404\nx", response=response(404)), "check its spelling"),
    (errors.RepositoryNotFoundError("401\nx", response=response(401)), "hf auth login"),
    (errors.RevisionNotFoundError("404\nx", response=response(404)), "no main branch"),
    (errors.HfHubHTTPError("401\nx", response=response(401)), "set HF_TOKEN"),
    (errors.HfHubHTTPError("403\nx", response=response(403)), "set HF_TOKEN"),
    (errors.HfHubHTTPError("429\nx", response=response(429)), r"error \(429\): try again later"),
    (errors.HfHubHTTPError("500\nx", response=response(500)), r"error \(500\): try again later"),
    (errors.HFValidationError("bad\nname"), "not a valid hub name"),
    (errors.LocalEntryNotFoundError("none\nhere"), "HF_HOME has no download of it"),
    (errors.OfflineModeIsEnabled("off\nline"), "HF_HUB_OFFLINE is set"),
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full while downloading"),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
    (RuntimeError("Data processing error: No space left on device (os error 28)"), "disk is full"),
    (from_cause(RuntimeError("x"), OSError(errno.ENOSPC, "full")), "the disk is full"),
    (PermissionError(errno.EACCES, "Permission denied"), "not writable: set HF_HOME"),
    (OSError(errno.EROFS, "Read-only file system"), "not writable: set HF_HOME"),
    (httpx2.ConnectError("refused\nx"), "check the network and run again"),
    (httpx2.ReadTimeout("timed out"), "check the network and run again"),
    (httpx2.RemoteProtocolError("peer closed connection\nx"), "it continues where it stopped"),
    (httpx2.ProxyError(""), "check the network and run again"),
    (ConnectionResetError(errno.ECONNRESET, "reset"), "check the network and run again"),
    (TimeoutError("x"), "check the network and run again"),
    (RuntimeError("CAS service error : Reqwest Error"), "check the network and run again"),
    (Panic("called `Option::unwrap()` on a `None` value"), "check the network and run again"),
]
if hasattr(errors, "IncompleteSnapshotError"):  # not in the oldest huggingface_hub
    incomplete = errors.IncompleteSnapshotError("part\nhere", "/x")
    FAILURES.append((incomplete, "is incomplete, and the hub cannot be"))


@pytest.mark.parametrize(("error", "sentence"), FAILURES, ids=lambda x: type(x).__name__)
def test_main_reports_a_failed_download_in_one_sentence(error, sentence, monkeypatch, capsys):
    def fail(name, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    found = refusal("Someone/Qwen2-VL", capsys)
    assert re.search(sentence, found)
    assert "Someone/Qwen2-VL" in found


def test_find_checkpoint_lets_keyboard_interrupt_through(monkeypatch):
    def interrupt(name, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_checkpoint("Someone/Qwen2-VL")


def test_find_checkpoint_accepts_an_adapter_repository(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Base"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    assert find_checkpoint("Someone/lora") == tmp_path


# ------------------------------------------------------------------------------------------- saving


def test_save_model_can_write_into_its_own_directory(published, write):
    """Its parameters are the mapped file, which must not change under them."""
    folder = write(*published)
    model = load_model(folder, "cpu")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight + 1)
    save_model(model, folder)
    for name, parameter in load_model(folder, "cpu").named_parameters():
        assert torch.equal(parameter, before[name] + (name == "model.norm.weight")), name
    assert torch.equal(model.model.embed_tokens.weight, before[EMBEDDING])
    assert not list(folder.glob(".*"))


def test_save_model_leaves_the_earlier_file_when_the_disk_is_full(published, write, monkeypatch):
    from safetensors import SafetensorError

    folder = write(*published)
    content = (folder / "model.safetensors").read_bytes()
    model = load_model(folder, "cpu")

    def fill(state, path, metadata):
        Path(path).write_bytes(content[:100])
        raise SafetensorError("I/O error: No space left on device (os error 28)\nmore")

    monkeypatch.setattr(load_weights, "save_file", fill)
    with pytest.raises(OSError, match=r"cannot write .*model.safetensors: .*No space") as caught:
        save_model(model, folder)
    assert "\n" not in str(caught.value)
    assert (folder / "model.safetensors").read_bytes() == content
    assert not list(folder.glob(".*"))


def test_weight_files_accepts_a_string_path(published, write):
    folder = write(*published)
    assert weight_files(str(folder)) == [folder / "model.safetensors"]
