"""`rope_types.py`: each type against transformers, in the model and alone, and its checks."""

import copy
import json
import math
import warnings
from dataclasses import asdict
from functools import cache
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import (
    gap,
    make_batch,
    our_config,
    our_model,
    random_sequence,
    random_weights,
    small_config,
)

import rope_types
from load_weights import load_config

FLOAT32 = 3e-5  # largest absolute difference from the reference
FLOAT64 = 1e-9  # the same for a reference that does not round to float32
SAME = 1e-12  # between two computations of the same float64 numbers

TRAINED = 24  # tokens; some sequences below are shorter, some longer
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
    "yarn, one mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 0},
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
# As in the other tests: a number is so many text tokens, an image is (height, width) in tokens.
SHORT = [6, ("image", 2, 3), 5]
LONG = [9, ("image", 3, 4), 40, ("image", 1, 9), 12]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@cache
def weights():
    """Return one set for every test: no rope type changes a shape."""
    return random_weights(small_config(layers=3), seed=5)


def ours(config, dtype=torch.float32):
    return our_model(config, weights(), dtype)


def reference(config, dtype=torch.float32):
    pytest.importorskip("transformers")
    return helpers.reference_model(config, weights(), dtype)


def rope_config(name, **changes):
    """Return a config with the rope parameters of that name; a change to ... removes the field."""
    scaling = copy.deepcopy(ROPES[name]) | {"mrope_section": [2, 3, 3]} | changes
    scaling = {field: value for field, value in scaling.items() if value is not ...}
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


# -------------------------------------------------------------------------------- inside the model


@pytest.mark.sweep
@pytest.mark.parametrize("name", ROPES)
def test_model_with_scaled_rope_matches_reference(name):
    """Within the trained length and beyond, with images; and the type does change the logits."""
    config = rope_config(name)
    unscaled = ours(config | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}})
    for parts in (SHORT, LONG):
        batch = make_batch([random_sequence(config, parts)])
        logits = ours(config)(**batch)
        assert gap(logits, helpers.reference_logits(reference(config), config, batch)) <= FLOAT32
        if not (parts is SHORT and name == "dynamic"):
            assert gap(logits, unscaled(**batch)) > 1e-2


@pytest.mark.sweep
@pytest.mark.parametrize("name", ROPES)
def test_model_with_scaled_rope_in_float64_matches_unrounded_reference(name, unrounded):
    config = rope_config(name)
    model = ours(config, torch.float64)
    for parts in (SHORT, LONG):
        batch = make_batch([random_sequence(config, parts)], torch.float64)
        logits = model(**batch)
        # What the reference gets when it divides two integers.
        torch.set_default_dtype(torch.double)
        expected = helpers.reference_logits(reference(config, torch.float64), config, batch)
        torch.set_default_dtype(torch.float32)
        assert logits.dtype == expected.dtype == torch.float64
        assert gap(logits, expected) <= FLOAT64


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3", "longrope"])
def test_cached_decoding_beyond_trained_length_matches_reference(name):
    """From 21 positions to 33 with 24 trained, one token a step.

    Where the length chooses the frequencies, both rotate new tokens by the new ones and leave
    cached keys as they are, so that a run without cache differs.
    """
    config = rope_config(name)
    batch = make_batch([random_sequence(config, [10, ("image", 2, 3), 6])])
    ids, expected = helpers.reference_generation(reference(config), config, batch, steps=12)
    model = ours(config)
    prefill = batch["input_ids"].shape[1]
    logits = helpers.cached_logits(model, batch, ids, prefill)
    assert gap(logits[:, prefill - 1 : -1], expected) <= FLOAT32
    uncached = model(**batch | {"input_ids": ids})
    if name in ("dynamic", "longrope"):
        assert gap(logits[:, -1], uncached[:, -1]) > 1e-2
    else:
        assert gap(logits, uncached) <= FLOAT32


@pytest.mark.parametrize("name", ["dynamic", "longrope"])
def test_sequence_length_is_that_of_the_sequence_and_of_the_call(name):
    """Neither a longer sequence in the batch nor a longer call before changes the frequencies."""
    config = rope_config(name)
    model = ours(config, torch.float64)
    rows = [random_sequence(config, parts) for parts in (SHORT, LONG, [30])]
    together = model(**make_batch(rows, torch.float64))
    for row, logits in zip(rows, together, strict=True):
        alone = model(**make_batch([row], torch.float64))[0]
        assert gap(logits[-len(row["ids"]) :], alone) <= SAME


# ----------------------------------------------------------------------------------- the functions

HEAD_DIM = 128
THETA = 1e6
LENGTHS = (1, 32768, 32769, 100_000)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "longrope",
            "short_factor": [1.0 + i / 64 for i in range(64)],
            "long_factor": [1.0 + i for i in range(64)],
            "original_max_position_embeddings": 32768,
            "factor": 4.0,
        },
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_scale_inv_freq_at_the_published_size_matches_reference(parameters):
    """The 2B model's head dimension, theta and trained length; no model around it."""
    code = pytest.importorskip("transformers.modeling_rope_utils")
    rope_type = parameters["rope_type"]
    config = SimpleNamespace(
        rope_parameters={"rope_theta": THETA, **parameters},
        max_position_embeddings=32768,
        hidden_size=1536,
        num_attention_heads=12,
        head_dim=HEAD_DIM,
        standardize_rope_params=lambda: None,
    )
    inv_freq = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    for seq_len in LENGTHS:
        scaled, scaling = rope_types.scale_inv_freq(
            rope_type,
            parameters,
            inv_freq,
            seq_len,
            head_dim=HEAD_DIM,
            theta=THETA,
            max_position_embeddings=32768,
        )
        expected, expected_scaling = code.ROPE_INIT_FUNCTIONS[rope_type](
            config, torch.device("cpu"), seq_len=seq_len
        )
        assert scaled.dtype == torch.float64
        assert scaled.shape == expected.shape
        assert gap(scaled / expected, torch.ones(HEAD_DIM // 2)) <= 1e-5  # it computes in float32
        assert scaling == pytest.approx(expected_scaling, rel=1e-12)


def test_linear_divides_by_factor():
    scaled, scaling = rope_types.linear(torch.tensor([1.0, 0.5, 0.25, 0.125]), 2.0)
    assert scaled.tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert scaling == 1.0


def test_dynamic_divides_the_slowest_frequency_by_the_growth():
    """Four times the trained length at factor 2: g = 2 · 4 - 1 = 7; frequency i gets 7^(-i / 3)."""
    inv_freq = torch.ones(4, dtype=torch.float64)
    scaled, _ = rope_types.dynamic(inv_freq, 8, 2.0, trained_length=100, seq_len=400)
    assert scaled.tolist() == pytest.approx([1, 7 ** (-1 / 3), 7 ** (-2 / 3), 1 / 7], rel=1e-12)
    scaled, _ = rope_types.dynamic(inv_freq, 8, 2.0, trained_length=100, seq_len=100)
    assert scaled.tolist() == [1, 1, 1, 1]


def test_dynamic_scales_each_sequence_by_its_own_length():
    lengths = torch.tensor([50, 400])[:, None, None]
    scaled, _ = rope_types.dynamic(torch.ones(4), 8, 2.0, trained_length=100, seq_len=lengths)
    assert scaled.shape == (2, 1, 4)
    assert scaled[:, 0, -1].tolist() == pytest.approx([1, 1 / 7])


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    inv_freq = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    scaled, scaling = rope_types.yarn(inv_freq, HEAD_DIM, THETA, 4.0, trained_length=32768)
    rotations = 32768 * inv_freq / (2 * math.pi)
    ratio = scaled / inv_freq
    assert (ratio[rotations > 40] == 1).all()
    assert (ratio[rotations < 0.8] == 0.25).all()
    between = ratio[(rotations < 25) & (rotations > 1.2)]
    assert ((between < 1) & (between > 0.25)).all()
    assert scaling == pytest.approx(0.1 * math.log(4) + 1)


def test_llama3_weighs_by_the_number_of_rotations():
    """Within 20π tokens the frequencies make 40, 25, 10 and 5 rotations; bounds are 10 and 40."""
    inv_freq = torch.tensor([4.0, 2.5, 1.0, 0.5], dtype=torch.float64)
    scaled, scaling = rope_types.llama3(inv_freq, 2.0, 10.0, 40.0, 2 * math.pi * 10)
    assert scaled.tolist() == pytest.approx([4.0, 2.5 * 0.75, 0.5, 0.25], rel=1e-12)
    assert scaling == 1.0


def test_longrope_chooses_the_factors_by_length():
    inv_freq = torch.ones(2)
    lengths = torch.tensor([16, 17])[:, None, None]
    scaled, scaling = rope_types.longrope(inv_freq, [1, 2], [4, 8], 4.0, 16, lengths)
    assert scaled[:, 0].tolist() == [[1, 0.5], [0.25, 0.125]]
    assert scaling == pytest.approx(math.sqrt(1.5))  # ln 4 / ln 16 = 1/2
    assert rope_types.longrope(inv_freq, [1, 2], [4, 8], 1.0, 16, 16)[1] == 1.0


# --------------------------------------------------------------------- reading and checking fields


def test_load_config_reads_every_spelling_of_rope_fields(tmp_path):
    """rope_scaling or rope_parameters, "type" or "rope_type", at the top or in text_config."""
    config = rope_config("yarn")
    scaling = config.pop("rope_scaling")
    expected = rope_config("yarn")
    renamed = {"rope_type" if name == "type" else name: value for name, value in scaling.items()}
    batch = make_batch([random_sequence(config, LONG)])
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


def test_load_config_without_section_uses_reference_default(tmp_path):
    config = small_config(heads=2, kv_heads=1, width=128, sections=(16, 24, 24))
    for rope in ({"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2}}):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "qwen2_vl"} | config | rope)
        )
        assert load_config(tmp_path).rope_scaling["mrope_section"] == [16, 24, 24]


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["dynamic", "yarn, mscale", "longrope", "llama3", "linear"])
def test_load_config_reads_what_reference_saves_without_warning(name, tmp_path):
    config = rope_config(name)
    reference(config).config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved["text_config"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = load_config(tmp_path)
    batch = make_batch([random_sequence(config, LONG)])
    assert gap(ours(asdict(read))(**batch), ours(config)(**batch)) == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("linear", {"factor": ...}, "type 'linear': expected a field factor, got none"),
        ("dynamic", {"factor": None}, "type 'dynamic': expected a field factor, got null"),
        ("yarn", {"factor": ...}, "type 'yarn': expected a field factor"),
        ("llama3", {"low_freq_factor": ...}, "type 'llama3': expected a field low_freq_factor"),
        ("llama3", {"high_freq_factor": ...}, "type 'llama3': expected a field high_freq_factor"),
        ("llama3", {"low_freq_factor": 4.0}, "expected low_freq_factor below high_freq_factor"),
        ("longrope", {"short_factor": ...}, "type 'longrope': expected a field short_factor"),
        ("longrope", {"long_factor": ...}, "type 'longrope': expected a field long_factor"),
        (
            "longrope",
            {"long_factor": [1, 2]},
            r"long_factor to be a list of 8 numbers, got \[1, 2\]",
        ),
        ("longrope", {"long_factor": 2.0}, "long_factor to be a list of 8 numbers, got 2.0"),
        ("longrope", {"long_factor": [0] * 8}, "expected positive numbers in long_factor"),
        ("longrope", {"long_factor": ["1"] * 8}, "expected positive numbers in long_factor"),
        ("longrope", {"original_max_position_embeddings": 1}, "of 2 or more, got 1"),
        ("linear", {"factor": "2"}, "expected a positive factor, got '2'"),
        ("linear", {"factor": True}, "expected a positive factor, got True"),
        ("linear", {"factor": math.inf}, "expected a positive factor, got inf"),
        (
            "linear",
            {"factor": 2**64},
            "factor as an integer of at most 32 bits or a float, got 1844",
        ),
        (
            "linear",
            {"factor": 10**400},
            "factor as an integer of at most 32 bits or a float, got 1",
        ),
        ("linear", {"factor": -(10**400)}, "expected a positive factor, got -1"),
        ("longrope", {"long_factor": [2**64] * 8}, "expected positive numbers in long_factor"),
        ("yarn", {"attention_factor": 2**64}, "attention_factor as an integer of at most 32 bits"),
        ("linear", {"factor": math.nan}, "expected a positive factor, got nan"),
        (
            "yarn",
            {"original_max_position_embeddings": -1},
            "expected a positive original_max_position_embeddings, got -1",
        ),
        ("yarn", {"mscale": "a", "mscale_all_dim": 1.0}, "expected mscale of at least 0, got 'a'"),
        ("yarn", {"truncate": "no"}, "expected truncate to be true or false, got 'no'"),
        ("yarn", {"partial_rotary_factor": 0.5}, "expected partial_rotary_factor 1, got 0.5"),
        (
            "yarn",
            {"type": "proportional"},
            "expected a rope type of default, mrope, linear, .*, got 'proportional'",
        ),
        ("yarn", {"type": ["yarn"]}, r"expected a string, got \['yarn'\]"),
        ("yarn", {"type": None}, "expected a string, got None"),
    ],
)
def test_config_with_invalid_rope_field_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        our_config(rope_config(name, **changes))
    assert "\n" not in str(caught.value)


def test_config_with_dynamic_rope_and_two_dimensions_a_head_is_refused():
    scaling = {"type": "dynamic", "factor": 2.0, "mrope_section": [1]}
    config = small_config(heads=4, width=2, sections=(1,), rope_scaling=scaling)
    with pytest.raises(ValueError, match="expected a head dimension of 4 or more, got 2"):
        our_config(config)


def test_config_accepts_null_for_optional_rope_fields():
    changes = dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale"))
    config = rope_config("yarn", **changes)
    batch = make_batch([random_sequence(config, LONG)])
    assert gap(ours(config)(**batch), ours(rope_config("yarn"))(**batch)) == 0


@pytest.mark.parametrize(
    ("name", "field"), [("yarn", "gamma"), ("linear", "beta_fast"), ("linear", "long_factor")]
)
def test_config_with_unread_rope_field_warns(name, field):
    with pytest.warns(UserWarning, match=f"type '{name}' does not read: {field}"):
        our_config(rope_config(name, **{field: None}))
