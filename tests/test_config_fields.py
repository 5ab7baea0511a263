"""The fields of config.json that no published checkpoint uses: rope types, sliding window, dropout, activations.

Each is held to transformers (live), like the rest of the model in `test_qwen2vl.py`, and every field that is not
known is named.
"""

import copy
import json
import warnings
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import gap, make_batch, our_config, our_model, random_row, random_weights, small_config

from load_weights import load_config
from qwen2vl import ACTIVATIONS, KVCache

FLOAT32, FLOAT64 = 3e-5, 1e-9  # largest absolute difference from the reference, from the oracle
SAME = 1e-12  # between two ways of computing the same float64 numbers
GOLDEN = Path(__file__).parent / "golden"
WAYS = ("plain", "sdpa", "flash")


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


def generated(config, batch, steps):
    """What the reference makes, greedily, with its cache: all ids, and the logits of each step."""
    made = reference(config).generate(
        **batch,
        mm_token_type_ids=helpers.token_types(config, batch["input_ids"]),
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=helpers.PAD,
        suppress_tokens=[helpers.IMAGE, helpers.VIDEO],  # a placeholder without a picture
    )
    return made.sequences, torch.stack(made.logits, dim=1)


def cached(model, batch, ids, prefill):
    """The logits of ids [B, S]: the first `prefill` at once, with the batch's pictures, the rest one by one."""
    mask = torch.ones_like(ids)
    if "attention_mask" in batch:
        mask[:, : batch["attention_mask"].shape[1]] = batch["attention_mask"]
    kv = KVCache(
        model.config, rows=len(ids), max_length=ids.shape[1], dtype=model.lm_head.weight.dtype
    )
    first = batch | {"input_ids": ids[:, :prefill], "attention_mask": mask[:, :prefill]}
    steps = [model(**first, cache=kv)]
    for i in range(prefill, ids.shape[1]):
        steps.append(model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=kv))
    return torch.cat(steps, dim=1)


# -------------------------------------------------------------------------------------------------- rope types

TRAINED = 24  # tokens; some rows below are shorter, some longer
LISTS = {
    "short_factor": [1, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2],
    "long_factor": [1, 1.5, 2, 2.5, 3, 4, 6, 8],
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
ROPES = {
    "linear": {"type": "linear", "factor": 2.5},
    "dynamic": {"type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn, attention_factor": YARN | {"attention_factor": 1.3},
    "yarn, mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.6},
    "yarn, betas": YARN | {"beta_fast": 12.0, "beta_slow": 0.5, "truncate": False},
    "yarn, all beyond": YARN | {"original_max_position_embeddings": 5},
    "yarn, no factor": YARN | {"factor": None, "original_max_position_embeddings": 10},
    "yarn, no original length": {"type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **LLAMA3},
    "longrope": {
        "type": "longrope",
        **LISTS,
        "original_max_position_embeddings": TRAINED,
        "factor": 4.0,
    },
    "longrope, no factor": {
        "type": "longrope",
        **LISTS,
        "original_max_position_embeddings": TRAINED // 2,
    },
    "longrope, attention_factor": {"rope_type": "longrope", **LISTS, "attention_factor": 0.8},
}
# As in the other tests: a number is so many words, a picture is (height, width) in tokens.
SHORT, LONG = [6, ("image", 2, 3), 5], [9, ("image", 3, 4), 40, ("image", 1, 9), 12]


def rope_config(name):
    scaling = copy.deepcopy(ROPES[name]) | {"mrope_section": [2, 3, 3]}
    return small_config(
        layers=3, rope_theta=1e4, max_position_embeddings=TRAINED, rope_scaling=scaling
    )


@pytest.fixture
def unrounded(monkeypatch):
    """transformers' code, in which every rounding to float32 means float64 instead."""
    for name in ("models.qwen2_vl.modeling_qwen2_vl", "modeling_rope_utils"):
        code = pytest.importorskip(f"transformers.{name}")
        double = vars(torch) | dict.fromkeys(("float", "float32"), torch.double)
        monkeypatch.setattr(code, "torch", SimpleNamespace(**double))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ROPES)
def test_every_rope_type_is_the_reference_s(name):
    """Within the trained length and beyond, with pictures; and it does change the default's numbers."""
    config = rope_config(name)
    plain = ours(config | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}})
    for parts in (SHORT, LONG):
        batch = make_batch([random_row(config, parts)])
        logits = ours(config)(**batch)
        assert gap(logits, helpers.reference_logits(reference(config), config, batch)) <= FLOAT32
        if not (parts is SHORT and name == "dynamic"):
            assert gap(logits, plain(**batch)) > 1e-2


@pytest.mark.parametrize("name", ROPES)
def test_float64_stays_float64_in_every_rope_type(name, unrounded):
    config = rope_config(name)
    model = ours(config, torch.float64)
    for parts in (SHORT, LONG):
        batch = make_batch([random_row(config, parts)], torch.float64)
        logits = model(**batch)
        torch.set_default_dtype(
            torch.double
        )  # what the reference gets when it divides two integers
        expected = helpers.reference_logits(reference(config, torch.float64), config, batch)
        torch.set_default_dtype(torch.float32)
        assert logits.dtype == expected.dtype == torch.float64
        assert gap(logits, expected) <= FLOAT64


@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_cached_decoding_across_the_trained_length_is_the_reference_s(name):
    """From 21 positions to 33 with 24 trained, a step at a time. Where the length chooses the frequencies, both turn
    new tokens by the new ones and leave cached keys as they are, so that a run without cache differs."""
    config = rope_config(name)
    batch = make_batch([random_row(config, [10, ("image", 2, 3), 6])])
    ids, expected = generated(config, batch, steps=12)
    model, prefill = ours(config), batch["input_ids"].shape[1]
    logits = cached(model, batch, ids, prefill)
    assert gap(logits[:, prefill - 1 : -1], expected) <= FLOAT32
    whole = model(**batch | {"input_ids": ids})
    if name in ("dynamic", "longrope"):
        assert gap(logits[:, -1], whole[:, -1]) > 1e-2
    else:
        assert gap(logits, whole) <= FLOAT32


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_the_length_is_that_of_the_row_and_of_the_call(name):
    """Neither a longer row in the batch nor a longer call before changes the frequencies."""
    config = rope_config(name)
    model, rows = (
        ours(config, torch.float64),
        [random_row(config, parts) for parts in (SHORT, LONG, [30])],
    )
    together = model(**make_batch(rows, torch.float64))
    for row, logits in zip(rows, together, strict=True):
        assert gap(logits[-len(row["ids"]) :], model(**make_batch([row], torch.float64))[0]) <= SAME


def test_both_spellings_mean_the_same(tmp_path):
    """rope_scaling and rope_parameters, "type" and "rope_type", at the top and inside text_config."""
    config = rope_config("yarn")
    scaling, expected = config.pop("rope_scaling"), rope_config("yarn")
    renamed = {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
    batch = make_batch([random_row(config, LONG)])
    logits = ours(expected)(**batch)
    for rope in (
        {"rope_scaling": scaling},
        {"rope_scaling": renamed | {"type": "default"}},  # the newer name counts
        {"rope_parameters": renamed | {"rope_theta": 1e4}, "rope_theta": None},
        {"text_config": {"rope_parameters": renamed | {"rope_theta": 1e4}}, "rope_theta": None},
    ):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "qwen2_vl"} | config | rope)
        )
        read = asdict(load_config(tmp_path))
        assert read["rope_theta"] == 1e4
        assert gap(ours(read)(**batch), logits) == 0


def test_without_a_section_the_reference_s_default(tmp_path):
    config = small_config(heads=2, kv_heads=1, width=128, sections=(16, 24, 24))
    for rope in ({"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2}}):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "qwen2_vl"} | config | rope)
        )
        assert load_config(tmp_path).rope_scaling["mrope_section"] == [16, 24, 24]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("linear", {"factor": ...}, "type 'linear' lacks the field factor"),
        ("dynamic", {"factor": None}, "type 'dynamic' lacks the field factor"),
        ("yarn", {"factor": ...}, "type 'yarn' lacks the field factor"),
        ("llama3", {"low_freq_factor": ...}, "type 'llama3' lacks the field low_freq_factor"),
        ("llama3", {"high_freq_factor": ...}, "type 'llama3' lacks the field high_freq_factor"),
        ("llama3", {"low_freq_factor": 4.0}, "low_freq_factor must be below its high_freq_factor"),
        ("longrope", {"short_factor": ...}, "type 'longrope' lacks the field short_factor"),
        ("longrope", {"long_factor": ...}, "type 'longrope' lacks the field long_factor"),
        (
            "longrope",
            {"long_factor": [1, 2]},
            r"long_factor must be a list of 8 numbers, is \[1, 2\]",
        ),
        ("longrope", {"long_factor": [0] * 8}, "long_factor must be positive"),
        ("linear", {"factor": "2"}, "factor must be positive, is '2'"),
        (
            "yarn",
            {"original_max_position_embeddings": -1},
            "original_max_position_embeddings must be positive",
        ),
        (
            "yarn",
            {"type": "proportional"},
            "rope type is 'proportional', supported are default, mrope, linear",
        ),
    ],
)
def test_rope_fields_that_are_missing_or_make_no_sense_are_named(name, change, message):
    config = rope_config(name)
    scaling = config["rope_scaling"] | change
    config["rope_scaling"] = {field: value for field, value in scaling.items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        our_config(config)


def test_an_unknown_rope_field_is_named():
    config = rope_config("yarn")
    config["rope_scaling"]["gamma"] = 1
    with pytest.warns(UserWarning, match="rope_scaling holds an unknown field: gamma"):
        our_config(config)


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
    for attention in ("plain", "sdpa"):
        assert gap(ours(SLIDING, attention=attention)(**batch)[real], expected[real]) <= FLOAT32


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_cached_decoding_with_a_window_is_the_reference_s(rows):
    """Its cache drops what is out of sight, ours keeps and masks it."""
    batch = make_batch(rows)
    ids, expected = generated(SLIDING, batch, steps=9)
    prefill = batch["input_ids"].shape[1]
    assert gap(cached(ours(SLIDING), batch, ids, prefill)[:, prefill - 1 : -1], expected) <= FLOAT32


@pytest.mark.parametrize("attention", WAYS)
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_cached_decoding_with_a_window_is_the_run_without_cache(rows, attention, flash):
    batch, model = make_batch(rows, torch.float64), ours(SLIDING, torch.float64, attention)
    ids = torch.cat([batch["input_ids"], torch.randint(5, 61, (len(rows), 12))], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :-12] = batch.get("attention_mask", mask[:, :-12])
    whole = model(**batch | {"input_ids": ids, "attention_mask": mask})
    assert (
        gap(cached(model, batch, ids, ids.shape[1] - 12)[mask.bool()], whole[mask.bool()]) <= SAME
    )


@pytest.mark.parametrize("attention", WAYS)
def test_the_window_counts_no_padding_between_the_turns_of_a_chat(attention, flash):
    """Two rows, three turns of different lengths in one cache: each row as if it were alone and without cache."""
    model, kv = ours(SLIDING, torch.float64, attention), None
    turns = [
        [random_row(SLIDING, [n], 10 * n) for n in lengths] for lengths in ((4, 9), (8, 1), (2, 6))
    ]
    kv = KVCache(model.config, rows=2, max_length=64, dtype=torch.float64)
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

    if attention == "plain":
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


@pytest.mark.parametrize(
    "config", [SLIDING, *(rope_config(name) for name in ("dynamic", "yarn, mscale", "longrope"))]
)
def test_what_the_reference_saves_comes_back(config, tmp_path):
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
