"""`reference/parity.py`: all rungs hold for a correct model; a fault is marked at its own rung."""

import json
import re
import sys

import helpers
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import preprocess
import qwen2vl
from load_weights import save_model
from reference import parity
from tiny.folder import CHAT_TEMPLATE

pytest.importorskip("transformers", reason="the ladder compares with it")

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def small_checkpoint_config(first_special_id):
    """Return a config whose token ids are those of SPECIAL_TOKENS behind the alphabet."""
    ids = {token: first_special_id + i for i, token in enumerate(SPECIAL_TOKENS)}
    config = helpers.small_config(
        vocab=first_special_id + len(SPECIAL_TOKENS), layers=3, depth=3, tied=True
    )
    return config | {
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A complete checkpoint: random weights, a byte-level tokenizer, image processor settings."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL_TOKENS)
    backend.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
        },
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "preprocessor_config.json": {"min_pixels": 3136, "max_pixels": 60 * 28 * 28},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    config = small_checkpoint_config(first_special_id=len(alphabet))
    save_model(helpers.our_model(config, helpers.random_weights(config, seed=2)), folder)
    return folder


def ladder(capsys, *arguments):
    """Run the program; return its exit code, {rung: its line} and all that it printed."""
    code = parity.main([str(argument) for argument in arguments])
    out = capsys.readouterr().out
    lines = out.split("rung ", 1)[1].splitlines()[1:]
    lines = lines[: lines.index("")]
    return code, {line.split("  ")[0]: line for line in lines}, out


@pytest.mark.sweep
@pytest.mark.parametrize(
    "option", [(), ("--attn-implementation", "eager"), ("--attention", "plain")]
)
def test_main_with_correct_model_holds_on_every_rung(option, folder, capsys):
    code, rungs, out = ladder(capsys, "--model", folder, *option)
    assert code == 0, out
    assert "All 18 rungs hold" in out
    assert "note" not in out  # the checkpoint's own template was rendered
    assert list(rungs) == [
        "prompt text",
        "image grids",
        "pixels",
        "prompt ids",
        "patch embedding",
        "vision block 0",
        "vision block 1",
        "vision block 2",
        "merger",
        "positions",
        "rope delta",
        "embeddings",
        "decoder layer 0",
        "decoder layer 1",
        "decoder layer 2",
        "final norm",
        "logits",
        "greedy tokens",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_main_in_other_dtype_holds(folder, capsys, dtype):
    code, _, out = ladder(capsys, "--model", folder, "--dtype", dtype)
    assert code == 0, out


@pytest.mark.slow
def test_main_in_half_precision_only_notes_different_tokens(folder, capsys, monkeypatch):
    FAULTS["greedy tokens"](monkeypatch)
    code, rungs, out = ladder(capsys, "--model", folder, "--dtype", "float16")
    assert code == 0, out
    assert "differs" in rungs["greedy tokens"]
    assert "note: greedy tokens differ" in out


@pytest.mark.slow
def test_main_accepts_own_images_and_prompt(folder, capsys, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 61, 4), dtype=np.uint8)).save(
        path
    )
    code, rungs, out = ladder(
        capsys, "--model", folder, "--image", path, "--image", path, "--prompt", "两"
    )
    assert code == 0, out
    assert "2 images" in rungs["image grids"]
    code, rungs, out = ladder(capsys, "--model", folder, "--text-only", "--prompt", "Hello")
    assert code == 0, out
    assert "merger" not in rungs


def test_main_without_chat_template_notes_that_ours_is_used(folder, capsys, tmp_path):
    for file in folder.iterdir():
        if file.name != "chat_template.json":
            (tmp_path / file.name).symlink_to(file)
    code, _, out = ladder(capsys, "--model", tmp_path)
    assert code == 0, out
    assert "note: prompt text: ours on both sides" in out


# --------------------------------------------------------------------------------- injected faults


def in_model(change):
    """Return a fault that changes our model after it was loaded."""

    def inject(monkeypatch):
        load = parity.load_model

        def load_and_change(*arguments):
            model = load(*arguments)
            with torch.no_grad():
                change(model)
            return model

        monkeypatch.setattr(parity, "load_model", load_and_change)

    return inject


def in_function(owner, name, replacement):
    """Return a fault that replaces a function.

    replacement: takes the correct function and returns the faulty one.
    """

    def inject(monkeypatch):
        monkeypatch.setattr(owner, name, replacement(getattr(owner, name)))

    return inject


def in_parameter(name, index, amount):
    """Return a fault that adds an amount to a part of one parameter."""
    return in_model(lambda model: model.get_parameter(name)[index].add_(amount))


def misspelled_prompt(correct):
    def apply_chat_template(*arguments, **options):
        return correct(*arguments, **options).replace("helpful", "helpfull")

    return apply_chat_template


def lost_token(correct):
    return lambda tokenizer, text: correct(tokenizer, text)[:-1]


def smaller_image(correct):
    return lambda height, width, *limits: correct(height - 30, width, *limits)


def pixels_off_by_one_bit(correct):
    def call(processor, *arguments, **options):
        batch = correct(processor, *arguments, **options)
        batch.pixel_values = batch.pixel_values + np.float32(1e-6)
        return batch

    return call


def wrong_vision_rope(correct):
    return lambda width, theta, like: correct(width, theta * 1.1, like)


def shifted_positions(correct):
    def rope_index(*arguments):
        positions, deltas = correct(*arguments)
        return positions + 1, deltas

    return rope_index


def shifted_delta(correct):
    def rope_index(*arguments):
        positions, deltas = correct(*arguments)
        return positions, deltas + 1

    return rope_index


def wrong_last_token(correct):
    return lambda *arguments: [[*correct(*arguments)[0][:-1], 3]]


def wrong_epsilon(model):
    model.model.layers[1].post_attention_layernorm.eps = 1e-3


def wrong_gelu(model):
    model.visual.merger.mlp[1] = torch.nn.GELU(approximate="tanh")


def scaled_head(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.001)


EVERYWHERE = slice(None)
FAULTS = {
    "prompt text": in_function(preprocess.Tokenizer, "apply_chat_template", misspelled_prompt),
    "prompt ids": in_function(preprocess.Tokenizer, "encode", lost_token),
    "image grids": in_function(preprocess, "smart_resize", smaller_image),
    "pixels": in_function(parity.Processor, "__call__", pixels_off_by_one_bit),
    "patch embedding": in_parameter("visual.patch_embed.proj.weight", (3, 0, 0, 5, 5), 0.01),
    "vision block 0": in_function(qwen2vl, "compute_inv_freq", wrong_vision_rope),
    "vision block 1": in_parameter("visual.blocks.1.attn.qkv.bias", EVERYWHERE, 0.01),
    "merger": in_model(wrong_gelu),
    "positions": in_function(parity, "get_rope_index", shifted_positions),
    "rope delta": in_function(parity, "get_rope_index", shifted_delta),
    "embeddings": in_parameter("model.embed_tokens.weight", EVERYWHERE, 1e-3),
    "decoder layer 0": in_parameter("model.layers.0.self_attn.k_proj.weight", 2, 0.01),
    "decoder layer 1": in_model(wrong_epsilon),
    "decoder layer 2": in_parameter("model.layers.2.mlp.down_proj.weight", EVERYWHERE, 1e-3),
    "final norm": in_parameter("model.norm.weight", 1, 1e-3),
    "logits": in_model(scaled_head),
    "greedy tokens": in_function(parity, "generate", wrong_last_token),
}


@pytest.mark.slow
@pytest.mark.parametrize("rung", FAULTS)
def test_main_marks_injected_fault_at_its_rung(rung, folder, capsys, monkeypatch):
    FAULTS[rung](monkeypatch)
    code, rungs, out = ladder(capsys, "--model", folder, "--max-new-tokens", 4)
    assert code == 1, out
    assert [name for name, line in rungs.items() if "BROKEN, first" in line] == [rung], out
    assert f"\n{rung} is the first" in out


# ------------------------------------------------------------------------- what cannot be compared


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
def test_main_reports_what_cannot_be_compared_in_one_sentence(arguments, sentence, folder, capsys):
    assert parity.main([argument.format(folder=folder) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("reference.parity: ")
    assert error.count("\n") == 1
    assert re.search(sentence, error)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "x", "--dtype", "int3"],
        ["--model", "x", "--max-new-tokens", "0"],
        ["--model", "x", "--text-only", "--image", "y.png"],
        ["--model", "x", "--attn-implementation", "paged"],
    ],
)
def test_main_with_invalid_arguments_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parity.main(arguments)
    assert stop.value.code == 2


def test_main_without_transformers_names_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert parity.main(["--model", str(folder)]) == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err


class Panic(BaseException):
    """What a panic of Rust code is in Python: no Exception."""


@pytest.mark.parametrize("failure", [Panic("index out of\nbounds"), RuntimeError("no kernel")])
@pytest.mark.parametrize("place", ["reference_prompt", "run_reference"])
def test_main_reports_failure_of_reference_in_one_sentence(
    failure, place, folder, capsys, monkeypatch
):
    def fail(*arguments):
        raise failure

    monkeypatch.setattr(parity, place, fail)
    assert parity.main(["--model", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"transformers cannot .*{folder}: {type(failure).__name__}: ", error)


def test_main_lets_keyboard_interrupt_through(folder, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(parity, "run_reference", interrupt)
    with pytest.raises(KeyboardInterrupt):
        parity.main(["--model", str(folder)])


# ------------------------------------------------------------------------------------- comparisons


def test_compare_measures_difference_against_element_and_row():
    theirs = torch.tensor([[3.0, 4.0], [0.0, 1000.0]])
    ours = theirs + torch.tensor([[0.0, 0.5], [0.0, 0.0]])
    rung = parity.compare("x", ours, theirs, limit=0.07)
    assert rung.max_difference == 0.5
    assert rung.relative_difference == pytest.approx(0.5 / (4 + 12.5**0.5))
    assert rung.holds
    assert not parity.compare("x", ours, theirs, limit=0.06).holds
    assert "largest at [0, 1]: ours 4.5, reference 4" in rung.note


@pytest.mark.parametrize(
    "ours", [torch.tensor([[1.0, float("nan")]]), torch.ones(2, 2), torch.tensor([[1.0, 2.0]])]
)
def test_compare_with_nan_or_other_shape_does_not_hold(ours):
    assert not parity.compare("x", ours, torch.ones(1, 2), limit=0.1).holds


def test_equal_names_the_first_difference():
    rung = parity.equal("prompt ids", [1, 2, 3], [1, 2, 4, 5], "tokens")
    assert not rung.holds
    assert rung.shape == "4 tokens"
    assert rung.note == "from token 2 on: ours [3], reference [4, 5]"
    assert parity.equal("prompt text", "a", "a", "characters").shape == "1 character"
