"""The fields of config.json that no published checkpoint uses: sliding window, dropout, activations.

Each is held to transformers (live), like the rest of the model in `test_qwen2vl.py`, and every field that is not
known is named.
"""

import json
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path

import helpers
import pytest
import torch
from helpers import (
    cached_logits,
    gap,
    make_batch,
    our_config,
    our_model,
    random_row,
    random_weights,
    reference_generation,
    small_config,
)

from load_weights import load_config
from qwen2vl import ACTIVATIONS, KVCache

FLOAT32, FLOAT64 = 3e-5, 1e-9  # largest absolute difference from the reference, from the oracle
SAME = 1e-12  # between two ways of computing the same float64 numbers
GOLDEN = Path(__file__).parent / "golden"
WAYS = ("eager", "sdpa", "flash")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@cache
def weights():
    """One set serves every test: the fields below change no shape."""
    return random_weights(small_config(layers=3), seed=5)


def ours(config, dtype=torch.float32, attention="sdpa"):
    return our_model(config, weights(), dtype, attention)


def reference(config, dtype=torch.float32):
    pytest.importorskip("transformers")
    return helpers.reference_model(config, weights(), dtype)


# ---------------------------------------------------------------------------------------------- sliding window

SLIDING = small_config(layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=1)
ROWS = [
    random_row(SLIDING, parts, seed)
    for seed, parts in enumerate(
        ([23], [5, ("image", 3, 4), 4], [2, ("video", 2, 2, 2), 3, ("image", 2, 2), 11])
    )
]


@pytest.mark.parametrize("attention", WAYS)
def test_the_window_is_the_formula_s(attention, flash):
    for window in (1, 7, 22, 400):
        config = SLIDING | {"sliding_window": window}
        model = ours(config, torch.float64, attention)
        for row in ROWS:
            expected = helpers.oracle_run(config, weights(), row)["logits"]
            assert gap(model(**make_batch([row], torch.float64))[0], expected) <= FLOAT64


@pytest.mark.parametrize("attention", WAYS)
@pytest.mark.parametrize("layers", [0, 2, 3])
def test_only_the_layers_from_max_window_layers_on_have_it(layers, attention, flash):
    config = SLIDING | {"max_window_layers": layers}
    expected = helpers.oracle_run(config, weights(), ROWS[0])["logits"]
    assert (
        gap(
            ours(config, torch.float64, attention)(**make_batch(ROWS[:1], torch.float64))[0],
            expected,
        )
        <= FLOAT64
    )
    full = ours(SLIDING | {"use_sliding_window": False}, torch.float64)(
        **make_batch(ROWS[:1], torch.float64)
    )[0]
    assert (gap(full, expected) <= FLOAT64) == (layers == 3)


def test_the_window_in_a_padded_batch_is_the_reference_s():
    batch = make_batch(ROWS)
    real = batch["attention_mask"].bool()
    assert not real.all()
    expected = helpers.reference_logits(reference(SLIDING), SLIDING, batch)
    for attention in ("eager", "sdpa"):
        assert gap(ours(SLIDING, attention=attention)(**batch)[real], expected[real]) <= FLOAT32


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_cached_decoding_with_a_window_is_the_reference_s(rows):
    """Its cache drops what is out of sight, ours keeps and masks it."""
    batch = make_batch(rows)
    ids, expected = reference_generation(reference(SLIDING), SLIDING, batch, steps=9)
    prefill = batch["input_ids"].shape[1]
    assert (
        gap(cached_logits(ours(SLIDING), batch, ids, prefill)[:, prefill - 1 : -1], expected)
        <= FLOAT32
    )


@pytest.mark.parametrize("attention", WAYS)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_cached_decoding_with_a_window_is_the_run_without_cache(rows, attention, flash):
    batch, model = make_batch(rows, torch.float64), ours(SLIDING, torch.float64, attention)
    ids = torch.cat([batch["input_ids"], torch.randint(5, 61, (len(rows), 12))], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :-12] = batch.get("attention_mask", mask[:, :-12])
    whole = model(**batch | {"input_ids": ids, "attention_mask": mask})
    assert (
        gap(cached_logits(model, batch, ids, ids.shape[1] - 12)[mask.bool()], whole[mask.bool()])
        <= SAME
    )


@pytest.mark.parametrize("attention", WAYS)
def test_the_window_counts_no_padding_between_the_turns_of_a_chat(attention, flash):
    """Two rows, three turns of different lengths in one cache: each row as if it were alone and without cache."""
    model, kv = ours(SLIDING, torch.float64, attention), None
    turns = [
        [random_row(SLIDING, [n], 10 * n) for n in lengths] for lengths in ((4, 9), (8, 1), (2, 6))
    ]
    kv = KVCache(model.config, batch_size=2, max_length=64, dtype=torch.float64)
    mask, out = torch.zeros(2, 0, dtype=torch.long), [[], []]
    for turn in turns:
        batch = make_batch(turn)
        mask = torch.cat([mask, batch["attention_mask"]], dim=1)
        logits = model(batch["input_ids"], attention_mask=mask, cache=kv)
        for row, new, real in zip(out, logits, batch["attention_mask"].bool(), strict=True):
            row.append(new[real])
    for row, parts in zip(out, zip(*turns, strict=True), strict=True):
        alone = model(torch.tensor([[i for part in parts for i in part["ids"]]]))[0]
        assert gap(torch.cat(row), alone) <= SAME


@pytest.mark.parametrize(
    ("window", "masked"), [(7, [False, True, True]), (23, [False] * 3), (400, [False] * 3)]
)
def test_layers_without_a_window_stay_without_a_mask(window, masked, monkeypatch):
    """And so do those with a window that leaves nothing out."""
    seen, original = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None, **more):
        seen.append(attn_mask is not None)
        return original(q, k, v, attn_mask=attn_mask, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    ours(SLIDING | {"sliding_window": window})(**make_batch(ROWS[:1]))
    assert seen == masked


def test_no_window_where_none_is_given():
    config = our_config(SLIDING | {"sliding_window": None})
    assert [config.window(i) for i in range(3)] == [None] * 3
    with pytest.raises(ValueError, match="sliding_window: expected at least 1, got 0"):
        our_config(SLIDING | {"sliding_window": 0})


# ----------------------------------------------------------------------------- attention dropout, activations


@pytest.mark.parametrize("attention", WAYS)
def test_attention_dropout_is_for_training_only(attention, flash, monkeypatch):
    """In training half of the decoder's looks are dropped, and none of the vision tower's; else none at all."""
    seen = []

    def watch(owner, name, argument):
        original = getattr(owner, name)

        def watched(*args, **named):
            seen.append(args[1] if name == "dropout" else named.get(argument, 0.0))
            return (
                original(*args, **named)
                if owner is not flash
                else original(*args, **named | {argument: 0.0})
            )

        monkeypatch.setattr(owner, name, watched)

    if attention == "eager":
        watch(torch.nn.functional, "dropout", "p")
    elif attention == "sdpa":
        watch(torch.nn.functional, "scaled_dot_product_attention", "dropout_p")
    else:
        watch(flash, "flash_attn_varlen_func", "dropout_p")
    model, batch = (
        ours(SLIDING | {"attention_dropout": 0.5}, attention=attention),
        make_batch(ROWS[1:2]),
    )
    logits = model(**batch)
    assert set(seen) == {0.0}
    assert gap(logits, ours(SLIDING, attention=attention)(**batch)) == 0
    seen.clear()
    trained = model.train()(**batch)
    assert seen == [0.0, 0.0, 0.5, 0.5, 0.5]
    if attention != "flash":  # whose stand-in drops nothing
        assert gap(trained, logits) > 0.1


def test_activations_are_those_of_the_reference_by_name():
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        assert gap(function(x), activations.ACT2FN[name](x)) <= FLOAT64, name
    for name in sorted(activations.ACT2CLS.keys() - ACTIVATIONS.keys()):
        with pytest.raises(ValueError, match=f"hidden_act: expected one of silu, .*, got '{name}'"):
            our_config(small_config(hidden_act=name))


@pytest.mark.parametrize(("text", "vision"), [("gelu_pytorch_tanh", "relu"), ("relu", "gelu")])
def test_both_towers_use_the_activation_that_the_config_names(text, vision):
    config = small_config(layers=3, hidden_act=text)
    config["vision_config"]["hidden_act"] = vision
    batch = make_batch(ROWS[1:2])
    assert (
        gap(ours(config)(**batch), helpers.reference_logits(reference(config), config, batch))
        <= FLOAT32
    )


# ----------------------------------------------------------------------------------------------- unknown fields


@pytest.fixture
def write(tmp_path):
    """Makes a folder with this config.json."""

    def write(values):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"} | values))
        return tmp_path

    return write


def test_unknown_fields_are_named(write):
    config = small_config() | {"mlp_bias": True, "text_config": {"qk_norm": None}}
    config["vision_config"]["window_size"] = 112
    folder = write(config)
    with pytest.warns(UserWarning, match="unknown field") as caught:
        load_config(folder)
    assert [str(warning.message) for warning in caught] == [
        f"{folder / 'config.json'} holds an unknown field: {name}"
        for name in ("mlp_bias", "text_config.qk_norm", "vision_config.window_size")
    ]
    assert {warning.filename for warning in caught} == {__file__}


# The published files in full, field by field; the sizes of the 7B.
PUBLISHED = {
    "architectures": ["Qwen2VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu",
    "hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "max_window_layers": 28, "model_type": "qwen2_vl", "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
}  # fmt: skip


def test_published_and_saved_files_hold_nothing_unknown(write):
    golden = json.loads((GOLDEN / "configs.json").read_text())
    files = [PUBLISHED, *(config for versions in golden.values() for config in versions.values())]
    assert len(files) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in files:
            load_config(write(config))


def test_what_the_reference_saves_comes_back(tmp_path):
    config = SLIDING
    reference(config).config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {"layer_types", "rope_parameters"} <= saved["text_config"].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read, expected = load_config(tmp_path), our_config(config)
    assert [read.window(i) for i in range(3)] == [expected.window(i) for i in range(3)]
    batch = make_batch(ROWS[:1])
    assert gap(ours(asdict(read))(**batch), ours(config)(**batch)) == 0


def test_layer_types_must_agree(write):
    types = ["full_attention", "sliding_attention", "sliding_attention"]
    assert load_config(write(SLIDING | {"layer_types": types})).window(1) == 7
    for config in (
        SLIDING | {"layer_types": types[::-1]},
        small_config(layers=3, layer_types=types),
    ):
        with pytest.raises(
            ValueError,
            match=r"config.json: layer_types: expected .*sliding_window and max_window_layers",
        ):
            load_config(write(config))


def test_another_theta_of_the_vision_tower_is_refused(write):
    config = small_config()
    for theta in (10000.0, 500.0):
        config["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
        if theta == 10000:
            load_config(write(config))
        else:
            with pytest.raises(
                ValueError, match=r"vision_config's rope_theta: expected 10000, got 500.0"
            ):
                load_config(write(config))
