"""Fields of config.json that no published checkpoint uses: sliding window, dropout, activations.

Each is compared with transformers (live), as in `test_qwen2vl.py`; a warning names each unknown
field.
"""

import json
import re
import warnings
from dataclasses import asdict, fields
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
    random_sequence,
    random_weights,
    reference_generation,
    small_config,
)

from config_fields import FIELD_TYPES, field_problem
from generate import GenerationConfig
from load_weights import load_config
from preprocess import ImageConfig
from qwen2vl import ACTIVATIONS, Config, KVCache, VisionConfig

FLOAT32 = 3e-5  # largest absolute difference from transformers in float32
FLOAT64 = 1e-9  # largest absolute difference from the NumPy model in float64
SAME = 1e-12  # between two computations of the same float64 numbers
GOLDEN = Path(__file__).parents[1] / "golden"
IMPLEMENTATIONS = ("eager", "sdpa", "flash")

pytestmark = pytest.mark.usefixtures("no_gradients")


@cache
def weights():
    """Return the weights of every test: the fields below change no shape."""
    return random_weights(small_config(layers=3), seed=5)


def ours(config, dtype=torch.float32, attn_implementation="sdpa"):
    """Return our model of a config."""
    return our_model(config, weights(), dtype, attn_implementation)


def reference(config, dtype=torch.float32):
    """Return the model of transformers of a config."""
    pytest.importorskip("transformers")
    return helpers.reference_model(config, weights(), dtype)


# ----------------------------------------------------------------------------------- sliding window

SLIDING = small_config(layers=3, use_sliding_window=True, sliding_window=7, max_window_layers=1)
SEQUENCES = [
    random_sequence(SLIDING, [23], seed=0),
    random_sequence(SLIDING, [5, ("image", 3, 4), 4], seed=1),
    random_sequence(SLIDING, [2, ("video", 2, 2, 2), 3, ("image", 2, 2), 11], seed=2),
]


@pytest.mark.sweep
@pytest.mark.parametrize("window", [1, 7, 22, 400])
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_sliding_window_equals_the_numpy_model(attn_implementation, window, flash):
    config = SLIDING | {"sliding_window": window}
    model = ours(config, torch.float64, attn_implementation)
    for sequence in SEQUENCES:
        expected = helpers.run_numpy_model(config, weights(), sequence)["logits"]
        assert gap(model(**make_batch([sequence], torch.float64))[0], expected) <= FLOAT64


@pytest.mark.sweep
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layers", [0, 2, 3])
def test_sliding_window_applies_from_layer_max_window_layers_on(layers, attn_implementation, flash):
    config = SLIDING | {"max_window_layers": layers}
    expected = helpers.run_numpy_model(config, weights(), SEQUENCES[0])["logits"]
    batch = make_batch(SEQUENCES[:1], torch.float64)
    logits = ours(config, torch.float64, attn_implementation)(**batch)[0]
    assert gap(logits, expected) <= FLOAT64
    full_attention = ours(SLIDING | {"use_sliding_window": False}, torch.float64)
    assert (gap(full_attention(**batch)[0], expected) <= FLOAT64) == (layers == 3)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_sliding_window_in_a_padded_batch_equals_the_reference(attn_implementation):
    batch = make_batch(SEQUENCES)
    real = batch["attention_mask"].bool()
    assert not real.all()
    expected = helpers.reference_logits(reference(SLIDING), SLIDING, batch)
    logits = ours(SLIDING, attn_implementation=attn_implementation)(**batch)
    assert gap(logits[real], expected[real]) <= FLOAT32


@pytest.mark.slow
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:1]], ids=["batch", "one"])
def test_cached_decoding_with_a_window_equals_the_reference(sequences):
    """The cache of the reference drops tokens outside the window, ours keeps and masks them."""
    batch = make_batch(sequences)
    ids, expected = reference_generation(reference(SLIDING), SLIDING, batch, steps=9)
    prefill = batch["input_ids"].shape[1]
    logits = cached_logits(ours(SLIDING), batch, ids, prefill)
    assert gap(logits[:, prefill - 1 : -1], expected) <= FLOAT32


@pytest.mark.sweep
@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("sequences", [SEQUENCES, SEQUENCES[:1]], ids=["batch", "one"])
def test_kv_cache_with_a_window_equals_run_without_cache(sequences, attn_implementation, flash):
    batch = make_batch(sequences, torch.float64)
    model = ours(SLIDING, torch.float64, attn_implementation)
    ids = torch.cat([batch["input_ids"], torch.randint(5, 61, (len(sequences), 12))], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :-12] = batch.get("attention_mask", mask[:, :-12])
    expected = model(**batch | {"input_ids": ids, "attention_mask": mask})
    logits = cached_logits(model, batch, ids, ids.shape[1] - 12)
    assert gap(logits[mask.bool()], expected[mask.bool()]) <= SAME


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_sliding_window_counts_no_padding_between_the_turns_of_a_chat(attn_implementation, flash):
    """Run two chats of three turns of different lengths in one cache.

    Each must equal its run alone and without a cache.
    """
    model = ours(SLIDING, torch.float64, attn_implementation)
    turns = [
        [random_sequence(SLIDING, [n], 10 * n) for n in lengths]
        for lengths in ((4, 9), (8, 1), (2, 6))
    ]
    cache = KVCache(model.config, batch_size=2, max_length=64, dtype=torch.float64)
    mask = torch.zeros(2, 0, dtype=torch.long)
    outputs = [[], []]
    for turn in turns:
        batch = make_batch(turn)
        mask = torch.cat([mask, batch["attention_mask"]], dim=1)
        logits = model(batch["input_ids"], attention_mask=mask, cache=cache)
        for chat_logits, new, real in zip(
            outputs, logits, batch["attention_mask"].bool(), strict=True
        ):
            chat_logits.append(new[real])
    for chat_logits, chat in zip(outputs, zip(*turns, strict=True), strict=True):
        alone = model(torch.tensor([[i for turn in chat for i in turn["ids"]]]))[0]
        assert gap(torch.cat(chat_logits), alone) <= SAME


@pytest.mark.parametrize(
    ("window", "masked"), [(7, [False, True, True]), (23, [False] * 3), (400, [False] * 3)]
)
def test_sdpa_gets_a_mask_only_where_the_window_excludes_tokens(window, masked, monkeypatch):
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, attn_mask=None, **sdpa_kwargs):
        calls.append(attn_mask is not None)
        return original(q, k, v, attn_mask=attn_mask, **sdpa_kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    ours(SLIDING | {"sliding_window": window})(**make_batch(SEQUENCES[:1]))
    assert calls == masked


def test_config_without_a_sliding_window_has_none_in_any_layer():
    config = our_config(SLIDING | {"sliding_window": None})
    assert [config.window(i) for i in range(3)] == [None] * 3
    with pytest.raises(ValueError, match="sliding_window: expected at least 1, got 0"):
        our_config(SLIDING | {"sliding_window": 0})


# ------------------------------------------------------------------- attention dropout, activations


@pytest.mark.parametrize("attn_implementation", IMPLEMENTATIONS)
def test_attention_dropout_applies_to_the_decoder_in_training_only(
    attn_implementation, flash, monkeypatch
):
    rates = []

    def record_rate(owner, name):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            rates.append(args[1] if name == "dropout" else kwargs.get("dropout_p", 0.0))
            if owner is flash:  # the substitute refuses dropout
                kwargs["dropout_p"] = 0.0
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    if attn_implementation == "eager":
        record_rate(torch.nn.functional, "dropout")
    elif attn_implementation == "sdpa":
        record_rate(torch.nn.functional, "scaled_dot_product_attention")
    else:
        record_rate(flash, "flash_attn_varlen_func")
    config = SLIDING | {"attention_dropout": 0.5}
    model = ours(config, attn_implementation=attn_implementation)
    batch = make_batch(SEQUENCES[1:2])
    logits = model(**batch)
    assert set(rates) == {0.0}
    assert gap(logits, ours(SLIDING, attn_implementation=attn_implementation)(**batch)) == 0
    rates.clear()
    training_logits = model.train()(**batch)
    assert rates == [0.0, 0.0, 0.5, 0.5, 0.5]
    if attn_implementation != "flash":
        assert gap(training_logits, logits) > 0.1


def test_activations_equal_those_of_the_reference():
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    for name, function in ACTIVATIONS.items():
        assert gap(function(x), activations.ACT2FN[name](x)) <= FLOAT64, name
    for name in sorted(activations.ACT2CLS.keys() - ACTIVATIONS.keys()):
        with pytest.raises(ValueError, match=f"hidden_act: expected one of silu, .*, got '{name}'"):
            our_config(small_config(hidden_act=name))


@pytest.mark.parametrize(("text", "vision"), [("gelu_pytorch_tanh", "relu"), ("relu", "gelu")])
def test_vision_encoder_and_decoder_use_the_activation_of_their_config(text, vision):
    config = small_config(layers=3, hidden_act=text)
    config["vision_config"]["hidden_act"] = vision
    batch = make_batch(SEQUENCES[1:2])
    expected = helpers.reference_logits(reference(config), config, batch)
    assert gap(ours(config)(**batch), expected) <= FLOAT32


# --------------------------------------------------------------------------------- types and ranges

NOT_NUMBERS = (None, True, "1", [], {}, float("nan"), float("inf"), 2**31, 10**400)


@pytest.mark.parametrize("config_class", [Config, VisionConfig, ImageConfig, GenerationConfig])
def test_every_field_of_a_configuration_is_checked(config_class):
    """By its own annotation: a field of another annotation would accept anything."""
    names = {field.name: str(field.type).removesuffix(" | None") for field in fields(config_class)}
    unchecked = {name for name, annotation in names.items() if annotation not in FIELD_TYPES}
    assert unchecked <= {"vision_config", "seed"}  # which are checked by themselves
    for name in names.keys() - unchecked:
        with pytest.raises(ValueError, match=f"{name}: expected .*, got <object"):
            config_class(**{name: object()})


@pytest.mark.parametrize(
    ("annotation", "valid", "invalid"),
    [
        ("Size", (1, 2**31 - 1), (0, -1, 1.0)),
        ("Count", (0, 5), (-1, 0.0)),
        ("Pixels", (1, 2**31, 2**53), (0, -1, 1.5, 2**53 + 1)),
        ("Positive", (1, 1e-30, 1e300), (0, -0.0, -1)),
        ("Share", (1, 1.0, 1e-9), (0, 1.0001, 2)),
        ("float", (0, -1.5), ()),
        ("int | list[int] | None", (None, 3, [3, 4], []), ([1, "2"], [[1]], 1.5)),
        ("Channels", (0.5, [0, -1, 2.5], (1, 1, 1)), ([1, 1], [1, 1, None], [1, 1, [1]])),
        ("PositiveChannels", (0.5, [1, 1, 2.5]), (0, [1, 1, 0], [1, 1, "1"])),
    ],
)
def test_field_problem_names_what_is_expected(annotation, valid, invalid):
    for value in valid:
        assert field_problem(annotation, value) is None
    for value in invalid:
        assert re.match("expected .*, got ", field_problem(annotation, value))
    if annotation not in ("Pixels", "int | list[int] | None"):
        for value in NOT_NUMBERS:
            assert field_problem(annotation, value).startswith("expected ")


# ----------------------------------------------------------------------------------- unknown fields


@pytest.fixture
def write(tmp_path):
    """Return a function that writes config.json and returns its directory."""

    def write(values):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"} | values))
        return tmp_path

    return write


def test_load_config_warns_about_each_unknown_field(write):
    config = small_config() | {"mlp_bias": True, "text_config": {"qk_norm": None}}
    config["vision_config"]["window_size"] = 112
    directory = write(config)
    with pytest.warns(UserWarning, match="unknown field") as caught:
        load_config(directory)
    assert [str(warning.message) for warning in caught] == [
        f"{directory / 'config.json'} holds an unknown field: {name}"
        for name in ("mlp_bias", "text_config.qk_norm", "vision_config.window_size")
    ]
    assert {warning.filename for warning in caught} == {__file__}


# All fields of the published config.json of the 7B model.
PUBLISHED = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "vision_token_id": 151654,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2_vl",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 152064,
}


def test_load_config_accepts_all_published_and_saved_fields(write):
    golden = json.loads((GOLDEN / "configs.json").read_text())
    files = [PUBLISHED, *(config for versions in golden.values() for config in versions.values())]
    assert len(files) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in files:
            load_config(write(config))


def test_load_config_reads_what_the_reference_saves(tmp_path):
    reference(SLIDING).config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {"layer_types", "rope_parameters"} <= saved["text_config"].keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = load_config(tmp_path)
    expected = our_config(SLIDING)
    assert [read.window(i) for i in range(3)] == [expected.window(i) for i in range(3)]
    batch = make_batch(SEQUENCES[:1])
    assert gap(ours(asdict(read))(**batch), ours(SLIDING)(**batch)) == 0


def test_load_config_refuses_layer_types_that_contradict_the_window(write):
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


def test_load_config_refuses_another_rope_theta_of_the_vision_encoder(write):
    config = small_config()
    rope = {"rope_type": "axial", "rope_theta": 10000.0}
    config["vision_config"]["rope_parameters"] = rope
    load_config(write(config))
    rope["rope_theta"] = 500.0
    message = "vision_config's rope_theta: expected 10000, got 500.0"
    with pytest.raises(ValueError, match=message):
        load_config(write(config))
