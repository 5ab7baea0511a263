"""The parity ladder: silent on a right model, and its mark stands at the rung where a fault was planted."""

import json
import re
import sys

import helpers
import numpy as np
import parity
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import preprocess
import qwen2vl
from load_weights import save_model

pytest.importorskip("transformers", reason="the ladder's other side")

CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]
CONTROL += ["<|video_pad|>"]

# What the published template does with one user message, in a line or two.
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{% for item in messages[0]['content'] %}{% if item['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ item['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n<|im_start|>assistant{{ '\n' }}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole checkpoint: random weights, a tokenizer of single bytes, the settings of the image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(CONTROL)
    backend.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
        },
        "chat_template.json": {"chat_template": TEMPLATE},
        "preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 60 * 28 * 28},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    ids = {f"{name}_token_id": len(alphabet) + i for i, name in enumerate(
        ["pad", "im_start", "eos", "vision_start", "vision_end", "image", "video"]
    )}  # fmt: skip
    del ids["im_start_token_id"]
    config = (
        helpers.small_config(vocab=len(alphabet) + len(CONTROL), layers=3, depth=3, tied=True) | ids
    )
    save_model(helpers.our_model(config, helpers.random_weights(config, seed=2)), folder)
    return folder


def ladder(capsys, *arguments):
    """-> exit code, {rung: its line}, everything that was printed."""
    code = parity.main([str(argument) for argument in arguments])
    out = capsys.readouterr().out
    lines = out.split("rung ", 1)[1].splitlines()[1:]
    lines = lines[: lines.index("")]
    return code, {line.split("  ")[0]: line for line in lines}, out


def test_a_right_model_passes_every_rung(folder, capsys):
    code, rungs, out = ladder(capsys, "--model", folder, "--attention", "plain")
    assert code == 0, out
    assert "All 18 rungs hold" in out
    assert "note" not in out  # the folder's own template was rendered
    assert list(rungs) == [
        "prompt text", "picture grids", "pixels", "prompt ids",
        "patch embedding", "vision block 0", "vision block 1", "vision block 2", "merger",
        "positions", "rope delta", "embeddings",
        "decoder layer 0", "decoder layer 1", "decoder layer 2", "final norm", "logits", "greedy tokens",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_pass_as_well(folder, capsys, dtype):
    code, _, out = ladder(capsys, "--model", folder, "--dtype", dtype)
    assert code == 0, out


def test_tokens_that_differ_in_half_precision_are_only_noted(folder, capsys, monkeypatch):
    FAULTS["greedy tokens"](monkeypatch)
    code, rungs, out = ladder(capsys, "--model", folder, "--dtype", "float16")
    assert code == 0, out
    assert "differs" in rungs["greedy tokens"]
    assert "note: greedy tokens differ" in out


def test_pictures_and_words_of_ones_own(folder, capsys, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 61, 4), dtype=np.uint8)).save(
        path
    )
    code, rungs, out = ladder(
        capsys, "--model", folder, "--image", path, "--image", path, "--prompt", "两"
    )
    assert code == 0, out
    assert "2 pictures" in rungs["picture grids"]
    code, rungs, out = ladder(capsys, "--model", folder, "--text-only", "--prompt", "Hello")
    assert code == 0, out
    assert "merger" not in rungs


def test_a_folder_without_a_template_borrows_ours_and_says_so(folder, capsys, tmp_path):
    for file in folder.iterdir():
        if file.name != "chat_template.json":
            (tmp_path / file.name).symlink_to(file)
    code, _, out = ladder(capsys, "--model", tmp_path)
    assert code == 0, out
    assert "note: prompt text: ours on both sides" in out


# ---------------------------------------------------------------------------------------- planted faults


def in_the_model(change):
    """A fault that is planted in our model after it was loaded."""

    def plant(monkeypatch):
        load = parity.load_model

        def load_and_change(*arguments):
            model = load(*arguments)
            with torch.no_grad():
                change(model)
            return model

        monkeypatch.setattr(parity, "load_model", load_and_change)

    return plant


def in_the_code(module, name, change):
    """A fault that is planted by wrapping a function."""
    return lambda monkeypatch: monkeypatch.setattr(module, name, change(getattr(module, name)))


def add(parameter, amount):
    parameter.add_(amount)


def wrong_epsilon(model):
    model.model.layers[1].post_attention_layernorm.eps = 1e-3


def wrong_gelu(model):
    model.visual.merger.mlp[1] = torch.nn.GELU(approximate="tanh")


FAULTS = {
    "prompt text": in_the_code(
        preprocess.Tokenizer, "apply_chat_template",
        lambda right: lambda self, *a, **k: right(self, *a, **k).replace("helpful", "helpfull"),
    ),
    "prompt ids": in_the_code(
        preprocess.Tokenizer, "encode", lambda right: lambda self, text: right(self, text)[:-1]
    ),
    "picture grids": in_the_code(
        preprocess, "smart_resize", lambda right: lambda h, w, *a: right(h - 30, w, *a)
    ),
    "pixels": in_the_code(preprocess, "normalize", lambda right: lambda *a: right(*a) + np.float32(1e-6)),
    "patch embedding": in_the_model(lambda m: add(m.visual.patch_embed.proj.weight[3, 0, 0, 5, 5], 0.01)),
    "vision block 0": in_the_code(
        qwen2vl, "inverse_frequencies", lambda right: lambda width, theta, like: right(width, theta * 1.1, like)
    ),
    "vision block 1": in_the_model(lambda m: add(m.visual.blocks[1].attn.qkv.bias, 0.01)),
    "merger": in_the_model(wrong_gelu),
    "positions": in_the_code(
        parity, "get_rope_index", lambda right: lambda *a: (right(*a)[0] + 1, right(*a)[1])
    ),
    "rope delta": in_the_code(
        parity, "get_rope_index", lambda right: lambda *a: (right(*a)[0], right(*a)[1] + 1)
    ),
    "embeddings": in_the_model(lambda m: add(m.model.embed_tokens.weight, 1e-3)),
    "decoder layer 0": in_the_model(lambda m: add(m.model.layers[0].self_attn.k_proj.weight[2], 0.01)),
    "decoder layer 1": in_the_model(wrong_epsilon),
    "decoder layer 2": in_the_model(lambda m: add(m.model.layers[2].mlp.down_proj.weight, 1e-3)),
    "final norm": in_the_model(lambda m: add(m.model.norm.weight[1], 1e-3)),
    "logits": in_the_model(
        lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight.detach() * 1.001))
    ),
    "greedy tokens": in_the_code(parity, "generate", lambda right: lambda *a: [[*right(*a)[0][:-1], 3]]),
}  # fmt: skip


@pytest.mark.parametrize("rung", FAULTS)
def test_a_planted_fault_is_marked_at_its_rung(rung, folder, capsys, monkeypatch):
    FAULTS[rung](monkeypatch)
    code, rungs, out = ladder(capsys, "--model", folder, "--max-new-tokens", 4)
    assert code == 1, out
    assert [name for name, line in rungs.items() if "BROKEN, first" in line] == [rung], out
    assert f"\n{rung} is the first" in out


# ----------------------------------------------------------------------------- what cannot be compared


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "no/such/folder"], "no folder no/such/folder"),
        (["--model", "{folder}", "--image", "nowhere.png"], "there is no image at nowhere.png"),
        (
            ["--model", "{folder}", "--image", "{folder}/config.json"],
            "cannot read .*config.json as an image",
        ),
        (["--model", "{folder}", "--device", "cuda:77"], "the device cuda:77 cannot be used"),
        (["--model", "{folder}/.."], "is no checkpoint|config.json|tokenizer"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(arguments, sentence, folder, capsys):
    assert parity.main([argument.format(folder=folder) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("parity.py: ")
    assert error.count("\n") == 1
    assert re.search(sentence, error)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--model", "x", "--dtype", "int3"], ["--model", "x", "--max-new-tokens", "0"]],
)
def test_arguments_that_make_no_sense_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parity.main(arguments)
    assert stop.value.code == 2


def test_without_transformers_one_sentence_says_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert parity.main(["--model", str(folder)]) == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err
