"""`generate.py`: the tokens of the reference, of runs without a cache and of plain Python."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    SHAPES,
    make_batch,
    our_model,
    random_sequence,
    random_weights,
    reference_model,
    token_types,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import config_fields
import debug_nan
import generate as command
from command_line import BUNDLED_CHECKPOINT
from generate import (
    GenerationConfig,
    apply_repetition_penalty,
    generate,
    next_token_probabilities,
    sample,
    stream,
)
from preprocess import Batch
from tokenizer import StreamDecoder

ROOT = Path(__file__).parents[2]
PARTS = ([2, ("image", 2, 3), 4], [9], [1, ("image", 1, 2), 3, ("image", 2, 2), 1])


def batch_of(config, parts=PARTS):
    """Return the `Batch` of a `Processor` for random sequences of images and text."""
    sequences = [random_sequence(config, part, seed) for seed, part in enumerate(parts)]
    arguments = make_batch(sequences)
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    return Batch(**{name: tensor.numpy() for name, tensor in arguments.items()})


def model_of(shape, **settings):
    """Return a model whose generation_config.json has these settings and no end token."""
    model = our_model(SHAPES[shape], random_weights(SHAPES[shape], seed=5))
    model.generation_config = {"eos_token_id": [], "pad_token_id": 0} | settings
    return model


def logits_without_cache(model, batch, index, tokens):
    """Return the logits [V] after one prompt and these tokens, without cache and padding."""
    real = batch.attention_mask[index].astype(bool)
    ids = [*batch.input_ids[index, real].tolist(), *tokens]
    inputs = {"input_ids": torch.tensor([ids])}
    image_tokens = (batch.input_ids == model.config.image_token_id).sum(axis=1)
    if batch.image_grid_thw is not None and image_tokens[index]:
        patches = batch.image_grid_thw.prod(1)  # of each image
        last_token = patches.cumsum() // model.config.vision_config.spatial_merge_size**2
        start = image_tokens[:index].sum()
        end = image_tokens[: index + 1].sum()
        is_own_image = (last_token > start) & (last_token <= end)
        inputs["image_grid_thw"] = torch.from_numpy(batch.image_grid_thw[is_own_image])
        is_own_patch = np.repeat(is_own_image, patches)
        inputs["pixel_values"] = torch.from_numpy(batch.pixel_values[is_own_patch])
    with torch.no_grad():
        return model(**inputs)[0, -1]


# ------------------------------------------------------------------------------------------- greedy


@pytest.mark.sweep
@pytest.mark.parametrize("shape", ["default", "tied", "one kv head", "deep"])
def test_generate_equals_64_greedy_tokens_of_the_reference(shape):
    config = SHAPES[shape]
    batch = batch_of(config)
    reference = reference_model(config, random_weights(config, seed=5), attn_implementation="sdpa")
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


@pytest.mark.slow
def test_generate_of_a_batch_equals_each_sequence_alone():
    model = model_of("default")
    batch = batch_of(SHAPES["default"])
    for index, sequence in enumerate(generate(model, batch, 24)):
        for position, token in enumerate(sequence):
            logits = logits_without_cache(model, batch, index, sequence[:position])
            assert int(logits.argmax()) == token


def test_generate_runs_the_vision_encoder_once_and_lm_head_on_the_last_position():
    model = model_of("default")
    batch = batch_of(SHAPES["default"])
    lengths = {"visual": [], "lm_head": [], "layer": []}
    model.visual.register_forward_hook(lambda m, args, out: lengths["visual"].append(len(out)))
    model.lm_head.register_forward_hook(
        lambda m, args, out: lengths["lm_head"].append(out.shape[1])
    )
    model.model.layers[0].register_forward_hook(
        lambda m, args, out: lengths["layer"].append(out.shape[1])
    )
    generate(model, batch, 10)
    assert lengths["visual"] == [6 + 2 + 4]
    assert lengths["lm_head"] == [1] * 10
    assert lengths["layer"] == [batch.input_ids.shape[1]] + [1] * 9


def record_caches(monkeypatch):
    """Return a list that collects the caches of each generation."""
    caches = []

    class RecordedCache(command.KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)
            self.allocated = [self.capacity]

        def reserve(self, length):
            super().reserve(length)
            if self.capacity != self.allocated[-1]:
                self.allocated.append(self.capacity)

    monkeypatch.setattr(command, "KVCache", RecordedCache)
    return caches


def test_generate_allocates_its_cache_once(monkeypatch):
    caches = record_caches(monkeypatch)
    batch = batch_of(SHAPES["default"])
    generate(model_of("default"), batch, 12)
    [cache] = caches
    assert cache.allocated == [batch.input_ids.shape[1] + 12]
    assert cache.length == cache.capacity - 1  # the last token is never an input


def test_stream_with_a_huge_max_new_tokens_allocates_what_it_uses(monkeypatch):
    caches = record_caches(monkeypatch)
    batch = batch_of(SHAPES["default"])
    length = batch.input_ids.shape[1]
    expected = generate(model_of("default"), batch, 12)
    tokens = stream(model_of("default"), batch, 10**12)
    assert [next(tokens) for _ in range(12)] == [list(step) for step in zip(*expected, strict=True)]
    assert caches[1].allocated == [length + command.INITIAL_CAPACITY]
    assert caches[1].max_length == length + 10**12


@pytest.mark.slow
def test_generate_is_unchanged_when_the_cache_grows(monkeypatch):
    batch = batch_of(SHAPES["default"])
    expected = generate(model_of("default"), batch, 40)
    caches = record_caches(monkeypatch)
    monkeypatch.setattr(command, "INITIAL_CAPACITY", 1)
    assert generate(model_of("default"), batch, 40) == expected
    length = batch.input_ids.shape[1]
    assert caches[0].allocated == [length + 1, 2 * (length + 1), length + 40]


# ---------------------------------------------------------------------------------- end of sequence


def test_generate_ends_a_sequence_at_any_eos_token_and_pads_it():
    config = SHAPES["default"]
    unbounded = generate(model_of("default"), batch_of(config), 20)
    eos = [unbounded[0][3], unbounded[1][6]]
    model = model_of("default", eos_token_id=eos, pad_token_id=7)
    bounded = generate(model, batch_of(config), 20)
    for tokens, all_tokens in zip(bounded, unbounded, strict=True):
        stop = next((i for i, token in enumerate(all_tokens) if token in eos), 19) + 1
        assert tokens[:stop] == all_tokens[:stop]
        assert set(tokens[stop:]) <= {7}
    assert bounded[0][4:], "the first sequence ends early and is padded"


def test_generate_stops_when_all_sequences_have_ended():
    batch = batch_of(SHAPES["default"], PARTS[:1])
    [unbounded] = generate(model_of("default"), batch, 20)
    eos = unbounded[4]
    model = model_of("default", eos_token_id=eos)
    assert generate(model, batch, 20) == [unbounded[: unbounded.index(eos) + 1]]


def test_generate_without_generation_config_takes_eos_from_config_json():
    batch = batch_of(SHAPES["default"], PARTS[:1])
    [unbounded] = generate(model_of("default"), batch, 20)
    eos = unbounded[2]
    model = model_of("default")
    model.generation_config = {}
    model.config.eos_token_id = eos
    assert generate(model, batch, 20) == [unbounded[: unbounded.index(eos) + 1]]


def test_stream_yields_each_token_before_the_next_is_computed():
    model = model_of("default")
    runs = []
    model.model.register_forward_hook(lambda *_: runs.append(1))
    tokens = stream(model, batch_of(SHAPES["default"]), 5)
    assert runs == []
    for count in range(1, 6):
        assert len(next(tokens)) == len(PARTS)
        assert len(runs) == count


# ------------------------------------------------------------------------------------- stop strings


@pytest.fixture(scope="module")
def reference_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)


def count_until_stopped(tokenizer, ids, stop_strings):
    """Return after how many ids a decoder stops; all of them where it does not."""
    decoder = StreamDecoder(tokenizer, stop_strings=stop_strings)
    for count, id in enumerate(ids, start=1):
        decoder.push(id)
        if decoder.stopped:
            return count
    return len(ids)


def reference_count(tokenizer, ids, stop_strings):
    """Return the same by `StopStringCriteria`."""
    from transformers import StopStringCriteria

    criteria = StopStringCriteria(tokenizer, stop_strings)
    for count in range(1, len(ids) + 1):
        if criteria(torch.tensor([ids[:count]]), None).item():
            return count
    return len(ids)


answer_texts = st.text("abAB éß日😀.,\n", min_size=1, max_size=30)


@pytest.mark.slow
@given(text=answer_texts, data=st.data())
@settings(max_examples=60)
def test_decoder_stops_at_the_token_where_the_reference_stops(
    text, data, processor, reference_tokenizer
):
    """The tokens of é, 日 and 😀 are bytes; <|box_end|> is special and counts as text."""
    tokenizer = processor.tokenizer
    text = data.draw(st.sampled_from([text, f"{text}<|box_end|>{text}"]))
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    start = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(start + 1, min(len(whole), start + 8)))
    stop_strings = [whole[start:end], data.draw(answer_texts)[:4]]
    expected = reference_count(reference_tokenizer, ids, stop_strings)
    assert count_until_stopped(tokenizer, ids, stop_strings) == expected


@pytest.mark.sweep
@pytest.mark.parametrize("stop_strings", [["circle at"], ["top r", "blue"], ["iangle"], ["zebra"]])
def test_generate_with_stop_strings_equals_the_reference(
    stop_strings, tiny, processor, reference_tokenizer
):
    """The token that completes a stop string is the last one; the reference keeps its text."""
    from transformers import Qwen2VLForConditionalGeneration

    image = {"type": "image", "image": str(ROOT / "examples" / "shapes.png")}
    batch = processor(
        [{"role": "user", "content": [image, {"type": "text", "text": "Describe this image."}]}]
    )
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(
        BUNDLED_CHECKPOINT, dtype=torch.float32
    )
    inputs = {name: torch.from_numpy(value) for name, value in batch.arrays().items()}
    types = (inputs["input_ids"] == tiny.config.image_token_id).int()
    expected = theirs.generate(
        **inputs,
        mm_token_type_ids=types,
        max_new_tokens=24,
        stop_strings=stop_strings,
        tokenizer=reference_tokenizer,
        eos_token_id=None,
        pad_token_id=0,
    )[0, batch.input_ids.shape[1] :].tolist()
    config = GenerationConfig(stop_strings=stop_strings)
    [tokens] = generate(tiny, batch, 24, config, processor.tokenizer)
    assert tokens == expected
    whole = processor.tokenizer.decode(expected)
    cut = min([whole.find(stop) for stop in stop_strings if stop in whole], default=len(whole))
    assert (cut < len(whole)) == (len(tokens) < 24) == (stop_strings != ["zebra"])
    assert processor.tokenizer.decode(tokens, stop_strings=stop_strings) == whole[:cut]


@pytest.mark.slow
def test_generate_stops_each_sequence_of_a_batch_by_itself(tiny, processor):
    conversations = []
    for name in ("shapes", "wide", "small"):
        image = {"type": "image", "image": str(ROOT / "examples" / f"{name}.png")}
        text = {"type": "text", "text": "Describe this image."}
        conversations.append([{"role": "user", "content": [image, text]}])
    config = GenerationConfig(stop_strings=[" red", "square"])
    together = generate(tiny, processor(conversations), 24, config, processor.tokenizer)
    lengths = []
    for tokens, conversation in zip(together, conversations, strict=True):
        [alone] = generate(tiny, processor(conversation), 24, config, processor.tokenizer)
        assert tokens[: len(alone)] == alone
        assert set(tokens[len(alone) :]) <= {0}  # the pad id
        lengths.append(len(alone))
    assert len(set(lengths)) > 1


def test_generate_names_what_stop_strings_need(tiny, processor):
    batch = processor([{"role": "user", "content": "hello"}])
    with pytest.raises(ValueError, match=r"stop_strings \['x'\] need a tokenizer: expected"):
        generate(tiny, batch, 4, GenerationConfig(stop_strings=["x"]))


# ----------------------------------------------------------------------------------------- sampling


def filter_in_python(logits, sampling):
    """Return {token: probability} after all of SAMPLING_FIELDS, in plain float64 Python."""
    scaled = [float(x) / sampling.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = {i: np.exp(scaled[i] - scaled[order[0]]) for i in order}
    total = sum(weights.values())
    kept = {}
    mass = 0.0
    for i in order:  # until their sum reaches top_p
        if mass >= sampling.top_p and kept:
            break
        kept[i] = weights[i] / total
        mass += kept[i]
    kept = {i: p for i, p in kept.items() if p >= sampling.min_p * kept[order[0]]}
    total = sum(kept.values())
    return {i: p / total for i, p in kept.items()}


sampling_configs = st.builds(
    GenerationConfig,
    do_sample=st.just(True),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.05, 1),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
)


@pytest.mark.slow
@given(sampling=sampling_configs, seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_next_token_probabilities_equal_plain_python(sampling, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(1, 30, generator=generator, dtype=torch.float64)
    probabilities = next_token_probabilities(logits, sampling)[0]
    expected = filter_in_python(logits[0].tolist(), sampling)
    assert probabilities.nonzero()[:, 0].tolist() == sorted(expected)
    for token, probability in expected.items():
        assert abs(float(probabilities[token]) - probability) < 1e-12


@pytest.mark.slow
@given(sampling=sampling_configs, penalty=st.floats(0.5, 2), seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_next_token_probabilities_equal_the_reference(sampling, penalty, seed):
    from transformers import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 30, generator=generator, dtype=torch.float64)
    ids = torch.randint(30, (2, 12), generator=generator)
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    expected = TemperatureLogitsWarper(sampling.temperature)(ids, expected)
    if sampling.top_k:
        expected = TopKLogitsWarper(sampling.top_k)(ids, expected)
    expected = TopPLogitsWarper(sampling.top_p)(ids, expected)
    expected = MinPLogitsWarper(sampling.min_p)(ids, expected)
    penalized = apply_repetition_penalty(logits, seen, penalty)
    probabilities = next_token_probabilities(penalized, sampling)
    assert torch.equal(probabilities > 0, expected > float("-inf"))
    assert (probabilities - expected.softmax(-1)).abs().max() < 1e-12


@pytest.mark.sweep
@pytest.mark.parametrize(
    "sampling",
    [
        GenerationConfig(True, 0.8, 12, 0.9, 1.3, seed=7),
        GenerationConfig(True, 1.4, seed=22, min_p=0.2),
        GenerationConfig(True, 1.2, 0, 1.0, 1.0, seed=40),
        GenerationConfig(False, repetition_penalty=1.8),
    ],
)
def test_generate_samples_the_tokens_of_plain_python(sampling):
    """Sequence i draws with seed + i, from the logits of a run without cache or padding."""
    model = model_of("default")
    batch = batch_of(SHAPES["default"])
    for index, sequence in enumerate(generate(model, batch, 16, sampling)):
        generator = torch.Generator().manual_seed((sampling.seed or 0) + index)
        real = batch.attention_mask[index].astype(bool)
        prompt = batch.input_ids[index, real].tolist()
        for position, token in enumerate(sequence):
            logits = logits_without_cache(model, batch, index, sequence[:position]).double()
            for seen in {*prompt, *sequence[:position]}:  # with special tokens, without padding
                if logits[seen] < 0:
                    logits[seen] *= sampling.repetition_penalty
                else:
                    logits[seen] /= sampling.repetition_penalty
            if not sampling.do_sample:
                assert int(logits.argmax()) == token
                continue
            by_token = filter_in_python(logits.tolist(), sampling)
            probabilities = torch.zeros(len(logits))  # torch 2.6 draws other tokens in float64
            for i, probability in by_token.items():
                probabilities[i] = float(probability)
            assert int(torch.multinomial(probabilities, 1, generator=generator)) == token
            if token in (model.config.image_token_id, model.config.video_token_id):
                break  # the next plain run would expect an image for it


def test_generate_repeats_with_a_seed_and_differs_with_another():
    model = model_of("default")
    batch = batch_of(SHAPES["default"])
    runs = [
        generate(model, batch, 12, GenerationConfig(True, 2.0, seed=seed)) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_generate_accepts_a_seed_for_each_sequence():
    """Its answer then does not depend on the other sequences of the batch."""
    model = model_of("default")
    batch = batch_of(SHAPES["default"], ([5], [5], [5]))
    batch.input_ids[:] = batch.input_ids[0]
    settings = {"do_sample": True, "temperature": 2.0}
    by_seed = {
        seed: generate(model, batch, 8, GenerationConfig(**settings, seed=seed))[0]
        for seed in (7, 3, 9)
    }
    tokens = generate(model, batch, 8, GenerationConfig(**settings, seed=[9, 3, 7]))
    assert tokens == [by_seed[9], by_seed[3], by_seed[7]]
    assert len(set(map(tuple, by_seed.values()))) == 3


def test_from_model_takes_the_values_of_generation_config():
    model = model_of(
        "default",
        do_sample=True,
        temperature=0.5,
        top_k=3,
        top_p=0.7,
        repetition_penalty=1.1,
        min_p=0.2,
        stop_strings="END",
    )
    expected = GenerationConfig(True, 0.5, 3, 0.7, 1.1, min_p=0.2, stop_strings=["END"])
    assert GenerationConfig.from_model(model) == expected
    # The recommended settings of the published models leave one candidate: their "sampling" is
    # greedy.
    instruct = {
        "do_sample": True,
        "top_k": 1,
        "top_p": 0.001,
        "temperature": 0.01,
        "repetition_penalty": 1.0,
    }
    batch = batch_of(SHAPES["default"])
    expected = generate(model_of("default"), batch, 12)
    assert generate(model_of("default", **instruct), batch, 12) == expected


def test_sample_upcasts_half_precision_to_float32():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    sampling = GenerationConfig(True, 0.7, seed=1)
    expected = sample(logits.float(), None, sampling, [torch.Generator().manual_seed(1)])
    tokens = sample(logits, None, sampling, [torch.Generator().manual_seed(1)])
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
    ],
)
def test_generation_config_refuses_impossible_values(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected .*, got {value}"):
        GenerationConfig(**{field: value})


# --------------------------------------------------------------------------- generation_config.json


@pytest.mark.parametrize(
    "unused",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": "warm"},
        {"top_p": 0},
        {"top_p": 7},
        {"top_k": None},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 7},
        {"stop_strings": None},
        {"stop_strings": []},
        {"repetition_penalty": None},
        {"repetition_penalty": 1},
        {"do_sample": None, "temperature": float("nan")},
    ],
    ids=str,
)
def test_from_model_ignores_values_that_are_not_used(unused):
    assert GenerationConfig.from_model(model_of("default", **unused)) == GenerationConfig()


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.5}, GenerationConfig(True, 0.5)),
        (
            {"top_p": 0, "top_k": -3},
            {"top_p": 0.9, "top_k": 4},
            GenerationConfig(True, 1.0, 4, 0.9),
        ),
        ({"temperature": 0.0}, {"do_sample": False, "temperature": 1.0}, GenerationConfig()),
        (
            {"repetition_penalty": 0},
            {"repetition_penalty": 1.5},
            GenerationConfig(True, repetition_penalty=1.5),
        ),
        ({"top_k": None, "top_p": None, "temperature": None}, {}, GenerationConfig(True)),
    ],
)
def test_from_model_checks_values_after_options_replace_them(settings, options, expected):
    model = model_of("default", do_sample=True, **settings)
    expected = dataclasses.replace(expected, do_sample=options.get("do_sample", True))
    assert GenerationConfig.from_model(model, **options) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 0.0),
        ("temperature", "0.7"),
        ("temperature", True),
        ("temperature", float("inf")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", [0.9]),
        ("top_k", -1),
        ("top_k", 2.5),
        ("min_p", "0.1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", {}),
    ],
)
def test_from_model_names_file_field_and_option_of_an_invalid_value(name, value):
    model = model_of("default", do_sample=True, **{name: value})
    with pytest.raises(ValueError, match=r"generation_config\.json") as caught:
        GenerationConfig.from_model(model)
    sentence = f"{name}: expected .*, got {re.escape(repr(value))}"
    assert re.search(sentence, str(caught.value))
    assert f"--{name.replace('_', '-')}" in str(caught.value)


@pytest.mark.parametrize("value", ["", ["a", ""], [3], {"a": 1}, True], ids=str)
def test_stop_strings_that_are_no_texts_are_refused(value):
    with pytest.raises(ValueError, match=r"^stop_strings: expected a list of non-empty strings"):
        GenerationConfig(stop_strings=value)
    model = model_of("default", stop_strings=value)
    message = r"generation_config\.json: stop_strings: expected .*; --stop replaces it"
    with pytest.raises(ValueError, match=message):
        GenerationConfig.from_model(model)
    assert GenerationConfig(stop_strings=("a", "b")).stop_strings == ["a", "b"]
    replaced = GenerationConfig.from_model(model, stop_strings=["x"])
    assert replaced == GenerationConfig(stop_strings=["x"])


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("fields", "option", "expected"),
    [
        ({"max_new_tokens": 5}, None, 5),
        ({"max_new_tokens": 5}, 3, 3),
        ({"max_new_tokens": 5, "max_length": 999}, None, 5),
        ({"max_length": 14 + 4}, None, 4),
        ({"max_length": 1}, 3, 3),
        ({"max_new_tokens": "5"}, 3, 3),
        ({"max_new_tokens": None, "max_length": None}, None, config_fields.DEFAULT_NEW_TOKENS),
    ],
)
def test_generate_takes_the_number_of_new_tokens_from_generation_config(fields, option, expected):
    batch = batch_of(SHAPES["default"], PARTS[:1])
    assert batch.input_ids.shape[1] == 14
    [tokens] = generate(model_of("default", **fields), batch, option)
    assert len(tokens) == expected


def test_max_length_counts_the_prompt_of_each_sequence_without_padding():
    """As in the reference for one sequence."""
    batch = batch_of(SHAPES["default"], ([2, ("image", 2, 3), 4], [9]))
    unbounded = generate(model_of("default", max_length=None), batch, 9)
    bounded = generate(model_of("default", max_length=18, pad_token_id=7), batch)
    lengths = batch.attention_mask.sum(1)
    for tokens, all_tokens, length in zip(bounded, unbounded, lengths, strict=True):
        assert tokens[: 18 - length] == all_tokens[: 18 - length]
        assert set(tokens[18 - length :]) <= {7}


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 14},
        {"max_length": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": "128"},
        {"max_new_tokens": 1.5},
        {"max_length": True},
        {"max_length": []},
    ],
    ids=str,
)
def test_generate_refuses_an_invalid_number_of_new_tokens(settings):
    [name] = settings
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name}.*--max-new-tokens"):
        generate(model_of("default", **settings), batch_of(SHAPES["default"], PARTS[:1]))


def test_eos_and_pad_token_ids_accept_null_integers_and_lists():
    batch = batch_of(SHAPES["default"])
    unbounded = generate(model_of("default"), batch, 20)[0]
    eos = unbounded[3]
    model = model_of("default", eos_token_id=None, pad_token_id=None)
    model.config.eos_token_id = eos  # null in generation_config.json is like an absent field
    assert command.eos_token_ids(model) == {eos}
    assert command.pad_token_id(model) == eos
    tokens = generate(model, batch, 20)[0]
    stop = unbounded.index(eos) + 1
    assert tokens == unbounded[:stop] + [eos] * (len(tokens) - stop)
    assert command.pad_token_id(model_of("default", pad_token_id=[9, 8])) == 9
    assert command.pad_token_id(model_of("default", pad_token_id=-1, eos_token_id=6)) == 6
    assert command.eos_token_ids(model_of("default", eos_token_id=[3, None, 5])) == {3, 5}


@pytest.mark.parametrize("name", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["<|im_end|>", ["<|im_end|>"], 1.5, True, {}, [[5]]])
def test_generate_refuses_token_ids_of_another_type(name, value):
    message = rf"generation_config\.json: {name}: expected token ids, got"
    with pytest.raises(ValueError, match=message):
        generate(model_of("default", **{name: value}), batch_of(SHAPES["default"]), 4)


# ----------------------------------------------------------------------------- padding and warnings


def test_repetition_penalty_does_not_count_padding():
    """A padded sequence answers as alone, even if the pad token is its most probable token."""
    config = SHAPES["default"]
    sampling = GenerationConfig(repetition_penalty=5.0)
    parts = ([9], [2, ("image", 2, 3), 4])
    model = model_of("default")
    [alone] = generate(model, batch_of(config, parts[:1]), 12, sampling)
    batch = batch_of(config, parts)
    batch.input_ids[batch.attention_mask == 0] = alone[0]  # so that counting padding shows
    assert generate(model, batch, 12, sampling)[0] == alone


def test_stream_warns_once_beyond_the_trained_length(recwarn):
    batch = batch_of(SHAPES["default"], PARTS[1:2])
    model = model_of("default")
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


def test_trained_length_includes_the_factor_of_a_scaled_rope():
    model = model_of("default")
    scaled = {"rope_type": "linear", "factor": 4.0}
    model.config.rope_scaling = model.config.rope_scaling | scaled
    assert command.trained_length(model.config) == 2048
    model.config.rope_scaling["original_max_position_embeddings"] = 64
    assert command.trained_length(model.config) == 512
    model.config.rope_scaling["factor"] = 1e308
    assert command.trained_length(model.config) == command.MAX_LENGTH
    model.config.rope_scaling["rope_type"] = "mrope"  # which has no factor
    assert command.trained_length(model.config) == 512


# --------------------------------------------------------------------------- logits with NaN or inf


def model_with_fault(name, value=float("nan")):
    """Return a model with one value of a parameter replaced."""
    model = model_of("default")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


@pytest.mark.sweep
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "sampling",
    [GenerationConfig(), GenerationConfig(True, seed=1), GenerationConfig(True, top_k=1)],
)
@pytest.mark.parametrize("parts", [PARTS[:1], PARTS])
def test_generate_refuses_logits_that_are_not_finite(sampling, value, parts):
    model = model_with_fault("model.norm.weight", value)
    with pytest.raises(command.NotFiniteError, match=r"not finite in float32.*--debug-nan"):
        generate(model, batch_of(SHAPES["default"], parts), 4, sampling)


@pytest.mark.parametrize("extreme", [{"temperature": 1e-300}, {"repetition_penalty": 1e-300}])
def test_generate_names_settings_that_overflow(extreme):
    sampling = GenerationConfig(True, seed=1, **extreme)
    message = "the probabilities are not finite: temperature"
    with pytest.raises(command.NotFiniteError, match=message):
        generate(model_of("default"), batch_of(SHAPES["default"]), 4, sampling)


def test_check_finite_suggests_a_wider_dtype():
    logits = torch.tensor([[1.0, float("inf")]])
    with pytest.raises(command.NotFiniteError, match="in float16: try --dtype bfloat16 or float32"):
        command.check_finite(logits.half(), {0})
    with pytest.raises(command.NotFiniteError, match="in bfloat16: try --dtype float32"):
        command.check_finite(logits.bfloat16(), {0})
    command.check_finite(logits, set())  # a sequence that has ended does not count


def test_generate_refuses_an_answer_from_equal_logits():
    """The first token, "!", would be chosen each time."""
    model = model_with_fault("model.norm.weight", 0.0)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    with pytest.raises(ValueError, match=r"scores of all tokens are equal.*--check-weights"):
        generate(model, batch_of(SHAPES["default"], PARTS), 4)


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
    model = model_with_fault(parameter)
    message = rf"the output of {layer} is the first with NaN"
    handles = debug_nan.watch_modules(model)
    with pytest.raises(command.NotFiniteError, match=message):
        generate(model, batch_of(SHAPES["default"]), 2)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in model.modules())
