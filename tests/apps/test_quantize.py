"""apps/quantize.py: the kept directory answers like `--quantize`, and others can read it."""

import json
import shutil

import pytest
import torch
from packed_checkpoints import Variant, read_gptq, write_packed
from safetensors.torch import load_file
from transformers import Qwen2VLForConditionalGeneration

import generate
import linear
import memory
from apps import quantize
from command_line import BUNDLED_CHECKPOINT
from load_weights import load_model
from memory import Free

QUESTION = ["--image", str(BUNDLED_CHECKPOINT.parent.parent / "examples/shapes.png")]
QUESTION += ["--prompt", "Describe the image.", "--device", "cpu"]


def run(out, *options, bits=4):
    return quantize.main(["--bits", str(bits), "--out", str(out), *options])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_keeps_a_directory_that_answers_like_the_option(bits, tmp_path, capsys):
    out = tmp_path / "quantized"
    assert run(out, bits=bits) == 0
    assert "5.6 MB of weights became" in capsys.readouterr().out
    assert generate.main(["--model", str(out), *QUESTION]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("A blue triangle at the top left, a red circle at the top right")
    assert f"the decoder int{bits}," in printed.err
    kept = load_model(out, "cpu", quantize=f"int{bits}")
    on_the_fly = load_model(BUNDLED_CHECKPOINT, "cpu", quantize=f"int{bits}")
    assert kept.generation_config == on_the_fly.generation_config
    parameters = dict(kept.named_parameters())
    for name, parameter in on_the_fly.named_parameters():
        assert torch.equal(parameters[name], parameter), name


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_directory_holds_what_an_independent_reader_of_gptq_expects(bits, tmp_path):
    assert run(tmp_path, bits=bits) == 0
    tensors = load_file(tmp_path / "model.safetensors")
    original = load_file(BUNDLED_CHECKPOINT / "model.safetensors")
    limit = 0.1 if bits == 4 else 0.01  # of the root mean square of the weights
    for name, weight in original.items():
        if ".layers." not in name or not name.endswith("proj.weight"):
            assert torch.equal(tensors[name], weight), name
            continue
        difference = read_gptq(tensors, name.removesuffix(".weight"), bits) - weight.float()
        assert difference.square().mean() < limit**2 * weight.float().square().mean(), name
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["quantization_config"] == {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32 if bits == 4 else -1,
        "sym": bits == 8,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "modules_to_not_convert": ["visual", "lm_head"],
    }


def test_quantize_copies_the_settings_and_nothing_else(tmp_path):
    source = shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "model.safetensors.index.json").write_text("{}")
    (source / "README.md").write_text("The original.")
    assert run(tmp_path / "out", "--model", str(source)) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {path.name for path in BUNDLED_CHECKPOINT.iterdir()} | {"chat_template.jinja"}
    assert names == expected
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_quantize_leaves_what_exists_alone(kind, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "directory":
        out.mkdir()
        (out / "config.json").write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    assert run(out) == 2
    error = capsys.readouterr().err
    assert error == (f"apps.quantize: {out} exists: expected a new or empty directory for --out\n")
    assert not (tmp_path / "nowhere").exists()
    if kind == "directory":
        assert [path.read_text() for path in out.iterdir()] == ["mine"]


def test_quantize_refuses_what_is_quantized_already(tmp_path, capsys):
    packed, _ = write_packed(tmp_path, Variant("awq"), "bfloat16")
    assert run(tmp_path / "out", "--model", str(packed)) == 2
    assert "is quantized already: expected a checkpoint of plain weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_refuses_what_cannot_fit_before_it_loads(bits, tmp_path, monkeypatch, capsys):
    """The quantized weights exist twice when they are written, as the file alone shows."""
    out = tmp_path / "out"
    assert run(out, bits=bits) == 0
    written = load_file(out / "model.safetensors")
    original = load_file(BUNDLED_CHECKPOINT / "model.safetensors")
    packed = sum(tensor.nbytes for name, tensor in written.items() if name not in original)
    capsys.readouterr()
    loads = []

    def load(*arguments):
        loads.append(arguments)
        return load_model(*arguments)

    monkeypatch.setattr(quantize, "load_model", load)
    monkeypatch.setattr(memory, "cpu_free", lambda: Free(int(1.6 * packed), 0, "on this machine"))
    shutil.rmtree(out)
    assert run(out, bits=bits) == 2
    assert "apps.quantize: memory does not suffice: about " in capsys.readouterr().err
    assert loads == []
    assert not out.exists()
    monkeypatch.setattr(memory, "cpu_free", lambda: Free(2 * packed, 0, "on this machine"))
    assert run(out, bits=bits) == 0
    shutil.rmtree(out)
    monkeypatch.setattr(memory, "cpu_free", lambda: Free(10**5, 0, "on this machine"))
    assert run(out, "--no-memory-check", bits=bits) == 0


def test_quantize_names_a_checkpoint_that_is_missing(tmp_path, capsys):
    assert run(tmp_path / "out", "--model", str(tmp_path / "none")) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_quantized_head_stays_plain(tmp_path):
    assert run(tmp_path) == 0
    assert type(load_model(tmp_path, "cpu").lm_head) is linear.Linear


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_opens_a_quantized_directory(bits, tmp_path):
    """With gptqmodel, which `pip install gptqmodel optimum` brings; the test is skipped without."""
    pytest.importorskip("gptqmodel")
    pytest.importorskip("optimum")
    out = tmp_path / "quantized"
    assert run(out, bits=bits) == 0
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(
        out, dtype=torch.bfloat16, device_map="cpu"
    )
    assert "gptqmodel" in type(theirs.model.language_model.layers[0].mlp.up_proj).__module__
    ours = load_model(out, "cpu", torch.bfloat16)
    input_ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = theirs(input_ids=input_ids).logits.float()
        logits = ours(input_ids).float()
    assert (logits - expected).abs().max() < 0.02 * expected.abs().max()
