"""`generate.py`: the same tokens as the reference and as a plain re-computation, and a command line that behaves."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SHAPES,
    make_batch,
    our_model,
    random_row,
    random_weights,
    reference_model,
    token_types,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import generate as command
from extras import command_line, debug_nan
from generate import (
    Sampling,
    choose,
    generate,
    next_token_probabilities,
    penalise_repetition,
    stream,
)
from preprocess import Batch

ROOT = Path(__file__).parent.parent
PARTS = ([2, ("image", 2, 3), 4], [9], [1, ("image", 1, 2), 3, ("image", 2, 2), 1])


def batch_of(config, parts=PARTS):
    """Conversations of pictures and words as the Processor would give them."""
    arguments = make_batch([random_row(config, part, seed) for seed, part in enumerate(parts)])
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    return Batch(**{name: tensor.numpy() for name, tensor in arguments.items()})


def model_of(shape, **settings):
    model = our_model(SHAPES[shape], random_weights(SHAPES[shape], seed=5))
    model.generation_config = {"eos_token_id": [], "pad_token_id": 0} | settings
    return model


def without_cache(model, batch, row, tokens):
    """The logits [V] after one row's prompt and these tokens, computed from nothing: no cache, no padding."""
    real = batch.attention_mask[row].astype(bool)
    ids = [*batch.input_ids[row, real].tolist(), *tokens]
    inputs = {"input_ids": torch.tensor([ids])}
    pictures = [int((r == model.config.image_token_id).sum()) for r in batch.input_ids]
    if batch.image_grid_thw is not None and pictures[row]:
        sizes = batch.image_grid_thw.prod(1)  # patches of each picture
        merged = sizes.cumsum() // model.config.vision_config.spatial_merge_size**2
        mine = (merged > sum(pictures[:row])) & (merged <= sum(pictures[: row + 1]))
        owner = np.repeat(mine, sizes)
        inputs["image_grid_thw"] = torch.from_numpy(batch.image_grid_thw[mine])
        inputs["pixel_values"] = torch.from_numpy(batch.pixel_values[owner])
    with torch.no_grad():
        return model(**inputs)[0, -1]


# ------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("shape", ["plain", "tied", "one kv head", "deep"])
def test_64_greedy_tokens_equal_the_reference(shape):
    config, batch = SHAPES[shape], batch_of(SHAPES[shape])
    reference = reference_model(config, random_weights(config, seed=5), attention="sdpa")
    inputs = {name: torch.from_numpy(value) for name, value in batch.arrays().items()}
    with torch.no_grad():
        expected = reference.generate(
            **inputs,
            mm_token_type_ids=token_types(config, inputs["input_ids"]),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
        )[:, batch.input_ids.shape[1] :]
    assert generate(model_of(shape), batch, 64) == expected.tolist()


def test_each_row_of_a_batch_equals_its_run_alone():
    model, config = model_of("plain"), SHAPES["plain"]
    together = generate(model, batch_of(config), 24)
    for row in range(len(PARTS)):
        tokens = []
        for token in together[row]:
            assert int(without_cache(model, batch_of(config), row, tokens).argmax()) == token
            tokens.append(token)


def test_vision_runs_once_and_only_the_last_position_is_scored():
    model, batch = model_of("plain"), batch_of(SHAPES["plain"])
    seen = {"visual": [], "head": [], "layer": []}
    model.visual.register_forward_hook(lambda m, args, out: seen["visual"].append(len(out)))
    model.lm_head.register_forward_hook(lambda m, args, out: seen["head"].append(out.shape[1]))
    model.model.layers[0].register_forward_hook(
        lambda m, args, out: seen["layer"].append(out.shape[1])
    )
    generate(model, batch, 10)
    assert seen["visual"] == [6 + 2 + 4]
    assert seen["head"] == [1] * 10
    assert seen["layer"] == [batch.input_ids.shape[1]] + [1] * 9


def recording_cache(monkeypatch):
    """The caches that a generation makes."""
    made = []

    class Recording(command.KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            self.allocated = [self.capacity]

        def reserve(self, length):
            super().reserve(length)
            if self.capacity != self.allocated[-1]:
                self.allocated.append(self.capacity)

    monkeypatch.setattr(command, "KVCache", Recording)
    return made


def test_cache_is_allocated_once(monkeypatch):
    made = recording_cache(monkeypatch)
    batch = batch_of(SHAPES["plain"])
    generate(model_of("plain"), batch, 12)
    [cache] = made
    assert cache.allocated == [batch.input_ids.shape[1] + 12]
    assert cache.length == cache.capacity - 1  # the last token is never put through the model


def test_a_huge_max_new_tokens_allocates_what_is_used(monkeypatch):
    made = recording_cache(monkeypatch)
    batch, length = batch_of(SHAPES["plain"]), batch_of(SHAPES["plain"]).input_ids.shape[1]
    expected = generate(model_of("plain"), batch, 12)
    tokens = stream(model_of("plain"), batch, 10**12)
    assert [next(tokens) for _ in range(12)] == [list(step) for step in zip(*expected, strict=True)]
    assert made[1].allocated == [length + command.ROOM]
    assert made[1].max_length == length + 10**12


def test_a_cache_that_grows_changes_no_token(monkeypatch):
    batch = batch_of(SHAPES["plain"])
    expected = generate(model_of("plain"), batch, 40)
    made = recording_cache(monkeypatch)
    monkeypatch.setattr(command, "ROOM", 1)
    assert generate(model_of("plain"), batch, 40) == expected
    length = batch.input_ids.shape[1]
    assert made[0].allocated == [length + 1, 2 * (length + 1), length + 40]


# ---------------------------------------------------------------------------------------------------- ending


def test_any_id_of_the_end_list_ends_a_row_and_pad_fills_it():
    config = SHAPES["plain"]
    free = generate(model_of("plain"), batch_of(config), 20)
    ends = [free[0][3], free[1][6]]
    rows = generate(model_of("plain", eos_token_id=ends, pad_token_id=7), batch_of(config), 20)
    for row, unbounded in zip(rows, free, strict=True):
        stop = next((i for i, token in enumerate(unbounded) if token in ends), 19) + 1
        assert row[:stop] == unbounded[:stop]
        assert set(row[stop:]) <= {7}
    assert rows[0][4:], "the first row ends early and is filled up"


def test_generation_stops_when_all_rows_have_ended():
    config = SHAPES["plain"]
    free = generate(model_of("plain"), batch_of(config, PARTS[:1]), 20)[0]
    end = free[4]
    first = free.index(end)
    model = model_of("plain", eos_token_id=end)
    assert generate(model, batch_of(config, PARTS[:1]), 20) == [free[: first + 1]]


def test_end_and_pad_come_from_config_json_where_there_is_no_generation_config():
    config = SHAPES["plain"]
    free = generate(model_of("plain"), batch_of(config, PARTS[:1]), 20)[0]
    model = model_of("plain")
    model.generation_config = {}
    model.config.eos_token_id = free[2]
    assert generate(model, batch_of(config, PARTS[:1]), 20) == [free[: free.index(free[2]) + 1]]


def test_stream_yields_each_token_before_the_next_is_computed():
    model = model_of("plain")
    runs = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    tokens = stream(model, batch_of(SHAPES["plain"]), 5)
    assert runs == []
    for count in range(1, 6):
        assert len(next(tokens)) == len(PARTS)
        assert len(runs) == count


# -------------------------------------------------------------------------------------------------- sampling


def filtered(logits, sampling):
    """Temperature, top-k and top-p once more, in plain float64 Python: {token: probability}."""
    scaled = [float(x) / sampling.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {i: np.exp(scaled[i] - scaled[order[0]]) for i in order}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for i in order:  # until what is kept reaches top_p
        if mass >= sampling.top_p and kept:
            break
        kept[i] = weights[i] / total
        mass += kept[i]
    total = sum(kept.values())
    return {i: p / total for i, p in kept.items()}


settings_of_sampling = st.builds(
    Sampling,
    do_sample=st.just(True),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1),
)


@given(sampling=settings_of_sampling, seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_probabilities_equal_a_plain_recomputation(sampling, seed):
    logits = 3 * torch.randn(
        1, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    got = next_token_probabilities(logits, sampling)[0]
    expected = filtered(logits[0].tolist(), sampling)
    assert got.nonzero()[:, 0].tolist() == sorted(expected)
    for token, probability in expected.items():
        assert abs(float(got[token]) - probability) < 1e-12


@given(sampling=settings_of_sampling, penalty=st.floats(0.5, 2), seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_probabilities_equal_the_reference(sampling, penalty, seed):
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    draw = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 30, generator=draw, dtype=torch.float64)
    ids = torch.randint(30, (2, 12), generator=draw)
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, ids, True)
    steps = [
        RepetitionPenaltyLogitsProcessor(penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)]
    expected = logits.clone()
    for step in steps:
        expected = step(ids, expected)
    got = next_token_probabilities(penalise_repetition(logits, seen, penalty), sampling)
    assert torch.equal(got > 0, expected > float("-inf"))
    assert (got - expected.softmax(-1)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(True, 0.8, 12, 0.9, 1.3, seed=7),
        Sampling(True, 1.2, 0, 1.0, 1.0, seed=40),
        Sampling(False, repetition_penalty=1.8),
    ],
)
def test_sampled_tokens_equal_a_plain_recomputation(sampling):
    """Row i draws with seed + i, from logits that a run without cache or padding gives."""
    model, batch = model_of("plain"), batch_of(SHAPES["plain"])
    rows = generate(model, batch, 16, sampling)
    for number, row in enumerate(rows):
        draw = torch.Generator().manual_seed((sampling.seed or 0) + number)
        for position, token in enumerate(row):
            logits = without_cache(model, batch, number, row[:position]).double()
            real = batch.attention_mask[number].astype(bool)
            for seen in {
                *batch.input_ids[number, real].tolist(),
                *row[:position],
            }:  # special tokens included, padding not
                logits[seen] *= (
                    sampling.repetition_penalty
                    if logits[seen] < 0
                    else 1 / sampling.repetition_penalty
                )
            if not sampling.do_sample:
                assert int(logits.argmax()) == token
                continue
            chances = filtered(logits.tolist(), sampling)
            probabilities = torch.tensor([chances.get(i, 0.0) for i in range(len(logits))])
            assert int(torch.multinomial(probabilities, 1, generator=draw)) == token


def test_a_seed_repeats_and_another_differs():
    model, batch = model_of("plain"), batch_of(SHAPES["plain"])
    runs = [generate(model, batch, 12, Sampling(True, 2.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_each_row_may_have_a_seed_of_its_own():
    """Then what a row says does not depend on which rows stand beside it."""
    model, batch = model_of("plain"), batch_of(SHAPES["plain"], ([5], [5], [5]))
    batch.input_ids[:] = batch.input_ids[0]
    settings = {"do_sample": True, "temperature": 2.0}
    by_seed = {
        seed: generate(model, batch, 8, Sampling(**settings, seed=seed))[0] for seed in (7, 3, 9)
    }
    assert generate(model, batch, 8, Sampling(**settings, seed=[9, 3, 7])) == [
        by_seed[9],
        by_seed[3],
        by_seed[7],
    ]
    assert len(set(map(tuple, by_seed.values()))) == 3


def test_defaults_come_from_generation_config():
    model = model_of(
        "plain", do_sample=True, temperature=0.5, top_k=3, top_p=0.7, repetition_penalty=1.1
    )
    assert Sampling.of_model(model) == Sampling(True, 0.5, 3, 0.7, 1.1)
    # What the published models recommend keeps one candidate: their "sampling" is greedy.
    instruct = {
        "do_sample": True,
        "top_k": 1,
        "top_p": 0.001,
        "temperature": 0.01,
        "repetition_penalty": 1.0,
    }
    batch = batch_of(SHAPES["plain"])
    assert generate(model_of("plain", **instruct), batch, 12) == generate(
        model_of("plain"), batch, 12
    )


def test_half_precision_logits_are_chosen_in_float32():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampling = Sampling(True, 0.7, seed=1)
    wide = choose(logits.float(), None, sampling, [torch.Generator().manual_seed(1)])
    assert torch.equal(choose(logits, None, sampling, [torch.Generator().manual_seed(1)]), wide)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0), ("top_k", -1), ("top_p", 0), ("top_p", 1.1), ("repetition_penalty", 0)],
)
def test_impossible_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}, expected"):
        Sampling(**{field: value})


# ------------------------------------------------------------------------------------- generation_config.json


@pytest.mark.parametrize(
    "unused",
    [{"temperature": 0}, {"temperature": 0.0}, {"temperature": "warm"}, {"top_p": 0}, {"top_p": 7},
     {"top_k": None}, {"top_k": -1}, {"top_k": 2.5}, {"repetition_penalty": None},
     {"repetition_penalty": 1}, {"do_sample": None, "temperature": float("nan")}],
    ids=str,
)  # fmt: skip
def test_unused_values_of_generation_config_are_not_checked(unused):
    assert Sampling.of_model(model_of("plain", **unused)) == Sampling()


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.5}, Sampling(True, 0.5)),
        ({"top_p": 0, "top_k": -3}, {"top_p": 0.9, "top_k": 4}, Sampling(True, 1.0, 4, 0.9)),
        ({"temperature": 0.0}, {"do_sample": False, "temperature": 1.0}, Sampling()),
        (
            {"repetition_penalty": 0},
            {"repetition_penalty": 1.5},
            Sampling(True, repetition_penalty=1.5),
        ),
        ({"top_k": None, "top_p": None, "temperature": None}, {}, Sampling(True)),
    ],
)
def test_options_replace_values_before_those_are_checked(settings, options, expected):
    model = model_of("plain", do_sample=True, **settings)
    assert Sampling.of_model(model, **options) == replace_do_sample(expected, options)


def replace_do_sample(sampling, options):
    return dataclasses.replace(sampling, do_sample=options.get("do_sample", True))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("temperature", 0.0), ("temperature", "0.7"), ("temperature", True),
     ("temperature", float("inf")), ("top_p", 0), ("top_p", 1.5), ("top_p", [0.9]), ("top_k", -1),
     ("top_k", 2.5), ("repetition_penalty", 0), ("repetition_penalty", {})],
)  # fmt: skip
def test_a_used_value_that_is_invalid_names_file_field_and_option(name, value):
    model = model_of("plain", do_sample=True, **{name: value})
    with pytest.raises(ValueError, match=r"generation_config\.json") as caught:
        Sampling.of_model(model)
    assert f"{name} is {value!r}" in str(caught.value)
    assert f"--{name.replace('_', '-')}" in str(caught.value)


def test_the_number_of_new_tokens_comes_from_generation_config():
    batch, length = batch_of(SHAPES["plain"], PARTS[:1]), 14
    assert batch.input_ids.shape[1] == length
    for fields, option, expected in (
        ({"max_new_tokens": 5}, None, 5),
        ({"max_new_tokens": 5}, 3, 3),
        ({"max_new_tokens": 5, "max_length": 999}, None, 5),
        ({"max_length": length + 4}, None, 4),
        ({"max_length": 1}, 3, 3),
        ({"max_new_tokens": "5"}, 3, 3),
        ({"max_new_tokens": None, "max_length": None}, None, command.DEFAULT_NEW_TOKENS),
    ):
        [tokens] = generate(model_of("plain", **fields), batch, option)
        assert len(tokens) == expected


def test_max_length_counts_the_prompt_of_each_sequence_as_when_alone():
    """As the reference has it for one sequence; padding does not count."""
    config, parts = SHAPES["plain"], ([2, ("image", 2, 3), 4], [9])
    model = model_of("plain", max_length=18, pad_token_id=7)
    long, short = generate(model, batch_of(config, parts))
    free = generate(model_of("plain", max_length=None), batch_of(config, parts), 9)
    lengths = batch_of(config, parts).attention_mask.sum(1)
    for row, tokens in enumerate((long, short)):
        assert tokens[: 18 - lengths[row]] == free[row][: 18 - lengths[row]]
        assert set(tokens[18 - lengths[row] :]) <= {7}


@pytest.mark.parametrize(
    "settings",
    [{"max_length": 14}, {"max_length": 0}, {"max_new_tokens": 0}, {"max_new_tokens": -1},
     {"max_new_tokens": "128"}, {"max_new_tokens": 1.5}, {"max_length": True}, {"max_length": []}],
    ids=str,
)  # fmt: skip
def test_an_unusable_number_of_new_tokens_is_named(settings):
    [name] = settings
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} is .*--max-new-tokens"):
        generate(model_of("plain", **settings), batch_of(SHAPES["plain"], PARTS[:1]))


def test_end_and_pad_ids_may_be_null_numbers_or_lists():
    config = SHAPES["plain"]
    free = generate(model_of("plain"), batch_of(config), 20)
    model = model_of("plain", eos_token_id=None, pad_token_id=None)
    model.config.eos_token_id = free[0][3]  # null is as if it were not there
    assert command.end_ids(model) == {free[0][3]}
    assert command.pad_id(model) == free[0][3]
    rows = generate(model, batch_of(config), 20)
    stop = free[0].index(free[0][3]) + 1
    assert rows[0] == free[0][:stop] + [free[0][3]] * (len(rows[0]) - stop)
    assert command.pad_id(model_of("plain", pad_token_id=[9, 8])) == 9
    assert command.pad_id(model_of("plain", pad_token_id=-1, eos_token_id=6)) == 6
    assert command.end_ids(model_of("plain", eos_token_id=[3, None, 5])) == {3, 5}


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["<|im_end|>", ["<|im_end|>"], 1.5, True, {}, [[5]]])
def test_ids_of_another_type_are_named(name, value):
    with pytest.raises(
        ValueError, match=rf"generation_config\.json: {name} is .*expected token ids"
    ):
        generate(model_of("plain", **{name: value}), batch_of(SHAPES["plain"]), 4)


# --------------------------------------------------------------------------------------- said, and not silent


def test_padding_is_no_repetition():
    """A sequence beside a longer one answers as alone, though the pad token would be its most probable one."""
    config, sampling = SHAPES["plain"], Sampling(repetition_penalty=5.0)
    parts = ([9], [2, ("image", 2, 3), 4])
    model = model_of("plain")
    [alone] = generate(model, batch_of(config, parts[:1]), 12, sampling)
    batch = batch_of(config, parts)
    batch.input_ids[batch.attention_mask == 0] = alone[0]  # so that counting the padding shows
    assert generate(model, batch, 12, sampling)[0] == alone


def test_steps_beyond_the_trained_length_are_said_once(recwarn):
    batch, model = batch_of(SHAPES["plain"], PARTS[1:2]), model_of("plain")
    model.config.max_position_embeddings = 12
    tokens = stream(model, batch, 30)
    for _ in range(4):
        next(tokens)
    assert not recwarn.list
    next(tokens)
    assert "reached 13 positions" in str(recwarn.pop().message)
    list(tokens)
    assert not recwarn.list
    model.config.max_position_embeddings = 5
    with pytest.warns(UserWarning, match=r"reached 9 positions.*trained for 5 \(max_position_emb"):
        generate(model, batch, 2)


def test_a_scaled_rope_is_trained_for_more():
    model = model_of("plain")
    model.config.rope_scaling = model.config.rope_scaling | {"factor": 4.0}
    assert command.trained_length(model.config) == 2048
    model.config.rope_scaling["original_max_position_embeddings"] = 64
    assert command.trained_length(model.config) == 512


# ------------------------------------------------------------------------------------- scores that are no numbers


def broken_model(name, value=float("nan")):
    model = model_of("plain")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(True, seed=1), Sampling(True, top_k=1)])
@pytest.mark.parametrize("parts", [PARTS[:1], PARTS])
def test_scores_that_are_not_finite_are_one_sentence(sampling, value, parts):
    model = broken_model("model.norm.weight", value)
    with pytest.raises(command.NotFiniteError, match=r"not finite in float32.*--debug-nan"):
        generate(model, batch_of(SHAPES["plain"], parts), 4, sampling)


@pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"repetition_penalty": 1e-300}])
def test_settings_that_overflow_the_scores_are_named(extreme):
    with pytest.raises(
        command.NotFiniteError, match="the probabilities are not finite: temperature"
    ):
        generate(model_of("plain"), batch_of(SHAPES["plain"]), 4, Sampling(True, seed=1, **extreme))


def test_half_precision_is_advised_to_take_a_wider_dtype():
    logits = torch.tensor([[1.0, float("inf")]])
    with pytest.raises(command.NotFiniteError, match="in float16: try --dtype bfloat16 or float32"):
        command.check_finite(logits.half(), {0})
    with pytest.raises(command.NotFiniteError, match="in bfloat16: try --dtype float32"):
        command.check_finite(logits.bfloat16(), {0})
    command.check_finite(logits, set())  # a sequence that has ended does not count


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("visual.blocks.0.mlp.fc1.bias", "visual.blocks.0.mlp.fc1"),
        ("visual.patch_embed.proj.weight", "visual.patch_embed"),
        ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.v_proj"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_debug_nan_names_the_first_layer(parameter, layer):
    model = broken_model(parameter)
    with (
        pytest.raises(
            command.NotFiniteError, match=rf"the output of {layer} is the first with NaN"
        ),
        debug_nan.watch(model),
    ):
        generate(model, batch_of(SHAPES["plain"]), 2)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_command_line_names_the_layer(monkeypatch, capsys):
    def load_broken(*arguments):
        model = load_model(*arguments)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        return model

    load_model = command.load_model
    monkeypatch.setattr(command, "load_model", load_broken)
    assert command.main(["--image", str(PICTURE), "--quiet"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "not finite" in said.err
    assert command.main(["--image", str(PICTURE), "--quiet", "--debug-nan"]) == 2
    assert "the output of model.layers.1.mlp.up_proj is the first" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ command line

PICTURE = next(iter(sorted((ROOT / "examples").glob("*.png"))), None)


def run(*arguments, **more):
    """The command in a process of its own, as a user runs it, from another folder."""
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "PYTHONUTF8": "1"}
    line = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, **more)


def test_words_go_to_stdout_and_all_else_to_stderr(tmp_path):
    done = run("--image", PICTURE, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.strip().startswith("A ")
    assert done.stdout.count("\n") == 1
    for part in (
        "--model Qwen/Qwen2-VL-2B-Instruct",
        "M parameters",
        f"{PICTURE}: ",
        "tokens/s",
        "peak memory",
    ):
        assert part in done.stderr
    quiet = run("--image", PICTURE, "--quiet", cwd=tmp_path)
    assert (quiet.stdout, quiet.stderr) == (done.stdout, "")


def test_every_attention_and_wide_dtype_gives_the_same_answer(capsys):
    answers = set()
    for options in (
        ["--attention", "plain"],
        ["--dtype", "float32"],
        ["--dtype", "float64", "--device", "cpu"],
    ):
        assert command.main(["--image", str(PICTURE), "--quiet", *options]) == 0
        answers.add(capsys.readouterr().out)
    assert len(answers) == 1


def prompt_of(monkeypatch, *arguments):
    """What the command line hands to the model: the prompt's text, and the batch."""
    seen = []

    def stand_in(model, batch, max_new_tokens, sampling):
        seen.append((batch, max_new_tokens, sampling))
        yield command.Step([0], torch.zeros(1, 545))

    monkeypatch.setattr(command, "generate_steps", stand_in)
    assert command.main([*map(str, arguments)]) == 0
    [(batch, max_new_tokens, sampling)] = seen
    tokenizer = command.Processor.from_pretrained(command.TINY).tokenizer
    return (
        tokenizer.decode(batch.input_ids[0], skip_special_tokens=False),
        batch,
        max_new_tokens,
        sampling,
    )


def test_options_reach_the_model(monkeypatch):
    text, batch, count, sampling = prompt_of(
        monkeypatch, "--image", PICTURE, "--image", PICTURE, "--prompt", "What is left?", "--system", "Be brief.",
        "--add-vision-id", "--max-new-tokens", 5, "--temperature", 0.7, "--top-k", 9, "--top-p", 0.8,
        "--repetition-penalty", 1.2, "--seed", 3,
    )  # fmt: skip
    assert sampling == Sampling(True, 0.7, 9, 0.8, 1.2, 3)
    assert count == 5
    pads = text.count("<|image_pad|>") // 2
    picture = "<|vision_start|>" + "<|image_pad|>" * pads + "<|vision_end|>"
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        f"Picture 1: {picture}Picture 2: {picture}What is left?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(batch.image_grid_thw) == 2


def test_films_and_pictures_stand_in_the_order_of_the_options(monkeypatch):
    film = ROOT / "examples" / "crossing.mp4"
    text, batch, *_ = prompt_of(
        monkeypatch,
        "--video",
        film,
        "--image",
        PICTURE,
        "--video",
        film,
        "--nframes",
        6,
        "--add-vision-id",
    )
    assert re.findall(r"(Picture|Video) (\d): ", text) == [
        ("Video", "1"),
        ("Picture", "1"),
        ("Video", "2"),
    ]
    assert text.endswith("Describe this image.<|im_end|>\n<|im_start|>assistant\n")
    assert [len(media.timestamps or "") for media in batch.media] == [6, 0, 6]
    assert batch.video_grid_thw[:, 0].tolist() == [3, 3]


def test_frames_a_second_of_a_film_and_its_default_question(monkeypatch):
    film = ROOT / "examples" / "crossing.mp4"  # 24 frames, 6 a second
    text, batch, *_ = prompt_of(monkeypatch, "--video", film, "--fps", 4)
    assert len(batch.media[0].timestamps) == 16
    assert text.endswith("<|vision_end|>Describe this video.<|im_end|>\n<|im_start|>assistant\n")
    _, usual, *_ = prompt_of(monkeypatch, "--video", film)
    assert len(usual.media[0].timestamps) == 8


def test_pixel_bounds_reach_the_pictures(monkeypatch):
    _, small, *_ = prompt_of(
        monkeypatch, "--image", PICTURE, "--min-pixels", 56 * 56, "--max-pixels", 84 * 84
    )
    _, large, *_ = prompt_of(
        monkeypatch, "--image", PICTURE, "--min-pixels", 280 * 280, "--max-pixels", 300 * 300
    )
    assert small.image_grid_thw.prod() * 14 * 14 <= 84 * 84
    assert large.image_grid_thw.prod() * 14 * 14 >= 280 * 280


def test_text_alone_and_default_prompt(monkeypatch):
    text, batch, *_ = prompt_of(monkeypatch, "--prompt", "hello")
    assert text.endswith("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")
    assert batch.pixel_values is None
    text, *_ = prompt_of(monkeypatch, "--image", PICTURE)
    assert "<|vision_end|>Describe this image.<|im_end|>" in text


def test_temperature_0_is_greedy_and_a_silent_top_k_of_1_is_said(monkeypatch, capsys):
    *_, sampling = prompt_of(monkeypatch, "--prompt", "x", "--temperature", 0)
    assert not sampling.do_sample
    model = model_of("plain", do_sample=True, top_k=1, top_p=0.001, temperature=0.01)
    said = []
    arguments = command_line.parse_arguments(["--prompt", "x", "--temperature", "0.9"])
    assert command_line.choose_sampling(arguments, model, said.append) == Sampling(
        True, 0.9, 1, 0.001
    )
    assert any("add --top-k 0" in line for line in said)


def break_checkpoint(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image", "missing.png"], "there is no image at missing.png"),
        (["--image", "no_picture.png"], "cannot read no_picture.png as an image"),
        (["--image", "cut.png"], "cannot read cut.png as an image"),
        (
            ["--prompt", "x", "--model", "empty"],
            "there is no tokenizer.json in empty; is that a checkpoint folder?",
        ),
        (["--prompt", "x", "--model", "missing/folder/x"], "no folder missing/folder/x"),
        (
            ["--prompt", "x", "--model", "Nobody/Nothing"],
            "no folder Nobody/Nothing, and the hub cannot be reached",
        ),
        (["--prompt", "x", "--device", "cuda:7"], "the device cuda:7 cannot be used"),
        (["--prompt", "x", "--attention", "flash"], "attention 'flash' cannot be used"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0, expected above 0 and at most 1"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan, expected"),
        (["--prompt", "x", "--temperature", "inf"], "temperature is inf, expected"),
        (["--prompt", "x", "--top-k", "-1"], "top_k is -1, expected"),
        (["--prompt", "x", "--repetition-penalty", "nan"], "repetition_penalty is nan, expected"),
        (["--prompt", "x", "--seed", "-1"], "seed is -1, expected 0 to 2**63 - 1"),
        (["--prompt", "x", "--seed", str(2**70)], f"seed is {2**70}, expected 0 to"),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence_and_code_2(
    arguments, sentence, tmp_path, monkeypatch, capsys
):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("no_picture.png").write_text("words")
    Image.new("RGB", (90, 90), "red").save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:60])
    assert command.main([*arguments, "--quiet"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"generate.py: {sentence}")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --image, --video, --prompt, --chat or --batch"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0, expected 1 or more"),
        (["--prompt", "x", "--fps", "nan"], "--fps is nan, expected a number above 0"),
        (["--prompt", "x", "--fps", "0"], "--fps is 0.0, expected a number above 0"),
        (["--prompt", "x", "--fps", "-1"], "--fps is -1.0, expected a number above 0"),
        (["--prompt", "x", "--batch-size", "-1"], "--batch-size is -1, expected 1 or more"),
        (
            ["--prompt", "x", "--min-pixels", "9", "--max-pixels", "8"],
            "--min-pixels is 9, expected at most --max-pixels, 8",
        ),
        (["--prompt", "x", "--cuda-graph", "--debug-nan"], "--cuda-graph and --debug-nan do not"),
        (["--prompt", "x", "--nframes", "0"], "--nframes is 0, expected 1 or more"),
        (["--prompt", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--prompt", "x", "--draw", "x.png"], "--draw needs exactly one --image, found 0"),
        (
            ["--image", "x", "--image", "y", "--draw", "x.png"],
            "--draw needs exactly one --image, found 2",
        ),
        (["--batch", "x.jsonl"], "--batch and --out go together"),
        (["--prompt", "x", "--out", "x.jsonl"], "--batch and --out go together"),
        (["--chat", "--logprobs"], "--chat and --logprobs do not go together"),
        (
            ["--chat", "--batch", "x.jsonl", "--out", "y.jsonl"],
            "--chat and --batch do not go together",
        ),
        (
            ["--batch", "x.jsonl", "--out", "y.jsonl", "--logprobs"],
            "--batch and --logprobs do not go together",
        ),
        (
            ["--batch", "x.jsonl", "--out", "y.jsonl", "--image", "x.png", "--draw", "y.png"],
            "--batch and --draw do not go together",
        ),
        (
            ["--batch", "x.jsonl", "--out", "y.jsonl", "--report", "x.html"],
            "--batch and --report do not go together",
        ),
    ],
)
def test_bad_options_are_argparse_errors(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err.replace("argument --dtype: ", "")


def test_no_traceback_in_a_real_process(tmp_path):
    done = run("--image", "missing.png", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines() == ["generate.py: there is no image at missing.png"]


def with_answer(monkeypatch, text):
    """Makes the model say this."""
    ids = command.Processor.from_pretrained(command.TINY).tokenizer.encode(text)
    steps = [command.Step([id], torch.zeros(1, 545)) for id in ids]
    monkeypatch.setattr(command, "generate_steps", lambda *_: iter(steps))


BOXES = "<|object_ref_start|>the star<|object_ref_end|><|box_start|>(0,500),(100,1000)<|box_end|>"


def test_boxes_are_said_in_pixels_of_the_original_and_painted(monkeypatch, capsys, tmp_path):
    with_answer(monkeypatch, BOXES)
    picture = tmp_path / "white.png"
    Image.new("RGB", (300, 200), "white").save(picture)
    out = tmp_path / "drawn.png"
    assert command.main(["--image", str(picture), "--draw", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == "the star(0,500),(100,1000)\n"
    assert "the star: (0, 100) to (30, 200) (pixels)" in said.err
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (200, 300, 3)
    assert (drawn[150, 20:35] < 255).any()  # the right edge of the box
    assert (drawn[:50] == 255).all()


def test_boxes_of_several_pictures_stay_on_the_grid(monkeypatch, capsys):
    with_answer(monkeypatch, BOXES)
    assert command.main(["--image", str(PICTURE), "--image", str(PICTURE)]) == 0
    assert "the star: (0, 500) to (100, 1000) (thousandths)" in capsys.readouterr().err


def test_an_answer_without_a_box_is_not_painted(monkeypatch, tmp_path):
    with_answer(monkeypatch, "Four.")
    with pytest.warns(UserWarning, match=r"the answer has no box, so .*x\.png is not written"):
        assert (
            command.main(["--image", str(PICTURE), "--draw", str(tmp_path / "x.png"), "--quiet"])
            == 0
        )
    assert not (tmp_path / "x.png").exists()


def test_a_path_that_cannot_be_painted_to_is_said_before_the_model_is_loaded(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(command, "load_model", None)
    assert command.main(["--image", str(PICTURE), "--draw", str(tmp_path / "x.nothing")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert (
        command.main(["--image", str(PICTURE), "--report", str(tmp_path / "nowhere" / "x.html")])
        == 2
    )
    assert "there is no folder" in capsys.readouterr().err


def test_log_probabilities_go_to_stderr(capsys):
    assert command.main(["--image", str(PICTURE), "--logprobs", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    assert "<|im_end|>" in said.err
    assert "perplexity" in said.err.splitlines()[-1]


def test_the_trace_goes_to_stderr_and_the_page_to_its_file(capsys, tmp_path):
    page = tmp_path / "page.html"
    assert (
        command.main(["--image", str(PICTURE), "--explain", "--report", str(page), "--quiet"]) == 0
    )
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    assert "pixel_values" in said.err
    assert "cache" in said.err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


# -------------------------------------------------------------------------------- memory, disks, pipes, encodings


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("Unable to allocate 9.9 TiB for an array"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
        RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"),
    ],
    ids=str,
)
def test_out_of_memory_says_what_to_lower(error, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(command, "generate_steps", fail)
    assert command.main(["--image", str(PICTURE), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("generate.py: out of memory")
    assert said.count("\n") == 1
    for option in ("--max-pixels", "--nframes", "--max-new-tokens", "--batch-size", "--quantize"):
        assert option in said


def test_torch_out_of_memory_on_the_cpu_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert command_line.is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, 2**62)
    assert command_line.is_out_of_memory(caught.value)
    assert not command_line.is_out_of_memory(RuntimeError("shapes do not match"))


def test_an_error_of_the_program_itself_keeps_its_traceback(monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(command, "generate_steps", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command.main(["--image", str(PICTURE), "--quiet"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence(tmp_path):
    with open("/dev/full", "w") as full:
        line = [sys.executable, str(ROOT / "generate.py"), "--prompt", "x", "--quiet"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "generate.py: cannot write the answer to stdout: No space left on device"
    ]
    done = run("--image", PICTURE, "--quiet", "--report", "/dev/full", cwd=tmp_path)
    assert done.returncode == 2
    [sentence] = done.stderr.splitlines()
    assert "/dev/full" in sentence


def test_a_closed_pipe_ends_quietly():
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, str(ROOT / "generate.py"), "--prompt", "x", "--quiet"]
    done = subprocess.run(line, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_outputs_of_any_encoding_lose_no_answer(encoding):
    script = (
        "import generate, torch; from extras import command_line\n"
        "processor = generate.Processor.from_pretrained(generate.TINY)\n"
        "ids = processor.tokenizer.encode('\\xe9 \\u4f60\\u597d \\U0001f642')\n"
        "generate.generate_steps = lambda *_: iter([generate.Step([i], torch.zeros(1, 9)) for i in ids])\n"
        "command_line.prepare_streams()\n"
        "raise SystemExit(generate.main(['--prompt', 'x', '--quiet']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, cwd=ROOT, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == "é 你好 🙂\n".encode(encoding, errors="backslashreplace")


def test_a_prompt_in_utf_8_arrives_in_any_locale():
    assert command_line.recover_utf8("\udcc3\udca9?", "ascii") == "é?"
    assert command_line.recover_utf8("é", "latin-1") == "é"
    assert command_line.recover_utf8("\udcff", "ascii") == "\udcff"  # no UTF-8: refused later
