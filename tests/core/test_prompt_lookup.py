"""`prompt_lookup.py`: the tokens of plain decoding, in fewer passes."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from helpers import (
    IMAGE,
    SHAPES,
    gap,
    make_batch,
    our_model,
    random_sequence,
    random_weights,
    reference_model,
    small_config,
    token_types,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as command
import prompt_lookup
from apps import batch as batch_app
from apps.chat import Chat
from command_line import BUNDLED_CHECKPOINT
from cuda_graph import CapturedDecodeStep
from debug_nan import NotFiniteError
from generate import GenerationConfig, decode_step, generate, generate_steps, new_cache, prefill
from linear import quantize_linears
from load_weights import load_model
from preprocess import Batch
from prompt_lookup import MIN_MATCH, NgramLookup, PromptLookup
from qwen2vl import AttentionContext, eager_attention, sdpa_attention

ROOT = Path(__file__).parents[2]
IMAGES = ("shapes", "wide", "tall", "small", "square")
PARTS = [2, ("image", 2, 3), 4]
GREEDY = GenerationConfig()
SAMPLINGS = {
    "greedy": GREEDY,
    "penalty": GenerationConfig(repetition_penalty=1.04),
    "sampled": GenerationConfig(True, temperature=0.2, seed=3),
    "all": GenerationConfig(True, 0.4, 8, 0.9, 1.03, seed=1, min_p=0.05),
}


def with_lookup(config, num_tokens=8):
    """Return the settings with prompt lookup."""
    return dataclasses.replace(config, prompt_lookup_num_tokens=num_tokens)


def batch_of(config, *sequences):
    """Return the `Batch` of random sequences, each a list of parts."""
    drawn = [random_sequence(config, parts, seed) for seed, parts in enumerate(sequences)]
    arguments = make_batch(drawn)
    arguments.setdefault("attention_mask", torch.ones_like(arguments["input_ids"]))
    return Batch(**{name: tensor.numpy() for name, tensor in arguments.items()})


def model_of(config, seed=5, **options):
    """Return a random model without an end token; such a model soon repeats itself."""
    model = our_model(config, random_weights(config, seed), **options)
    model.generation_config = {"eos_token_id": [], "pad_token_id": 0}
    return model


@pytest.fixture
def count_rows():
    """Return a function: its list collects how many tokens each pass of a model runs."""
    handles = []

    def count(model):
        rows = []
        layer = model.model.layers[0]
        handles.append(layer.register_forward_hook(lambda m, args, out: rows.append(out.shape[1])))
        return rows

    yield count
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def bundled():
    """Return the bundled model in float32, with its end token."""
    return load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)


def conversation(name, question="Describe this image."):
    """Return a question about an image of examples/."""
    image = {"type": "image", "image": str(ROOT / "examples" / f"{name}.png")}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def repeated_question(model, processor, name):
    """Return a conversation in which the question that was answered is asked again."""
    messages = conversation(name)
    [answer] = generate(model, processor(messages), 60, GREEDY)
    text = processor.tokenizer.decode(answer)
    again = {"role": "user", "content": "Describe this image."}
    return [*messages, {"role": "assistant", "content": text}, again]


# ------------------------------------------------------------------------------------ where to look
def longest_match(ids):
    """Return the place and length of the longest earlier match of the last tokens, the latest."""
    found = (0, 0)
    for place in range(1, len(ids)):
        length = 0
        while length < place and ids[place - 1 - length] == ids[-1 - length]:
            length += 1
        if length >= max(found[1], MIN_MATCH):
            found = (place, length)
    return found


@given(st.lists(st.integers(0, 2), max_size=28))
@settings(max_examples=100)
def test_ngram_lookup_finds_the_latest_of_the_longest_matches(ids):
    whole = NgramLookup(ids)
    assert whole.find() == longest_match(ids)
    grown = NgramLookup(ids[:5])
    for token in ids[5:]:
        grown.append(token)
    assert grown.find() == whole.find()


def lookup_of(ids, num_tokens=8, eos=()):
    """Return a `PromptLookup` whose sequence so far is ids."""
    model = model_of(SHAPES["shallow"])
    return PromptLookup(model, ids, num_tokens, set(eos), decode_step)


def test_guess_continues_the_match_with_as_many_tokens_as_matched():
    ids = [*range(10, 30), 50, 10, 11, 12]
    assert lookup_of(ids).guess(100) == [13, 14, 15]
    assert lookup_of([*ids, 13, 14, 15]).guess(100) == [16, 17, 18, 19, 20, 21]
    assert lookup_of([*ids, *range(13, 20)]).guess(100) == list(range(20, 28))
    assert lookup_of(ids[:-1]).guess(100) == []


def test_guess_repeats_a_short_period():
    assert lookup_of([7, 8, 9, *[5, 6] * 5]).guess(100) == [5, 6, 5, 6, 5, 6, 5, 6]


def test_guess_is_bounded_by_the_setting_and_by_the_room_in_the_cache():
    ids = [*range(10, 30), 50, *range(10, 20)]
    assert lookup_of(ids, num_tokens=4).guess(100) == [20, 21, 22, 23]
    assert lookup_of(ids).guess(2) == [20, 21]
    assert lookup_of(ids).guess(0) == []


def test_guess_holds_neither_end_tokens_nor_placeholders():
    ids = [10, 11, 12, 13, 14, 15, 16, 50, 10, 11, 12]
    assert lookup_of(ids, eos=[14]).guess(100) == [13]
    assert lookup_of(ids, eos=[13]).guess(100) == []
    ids[4] = IMAGE
    assert lookup_of(ids).guess(100) == [13]


def test_guess_needs_a_long_match_while_earlier_guesses_have_failed():
    step = lookup_of([*range(10, 30), 50, 10, 11, 12])
    step.guesses = [13, 14, 15]
    step.accepted = 0
    step.settle()
    assert step.guess(100) == []
    for token in (13, 14, 15):
        step.lookup.append(token)
    assert step.guess(100) == [16, 17, 18, 19, 20, 21]
    for token in (50, 10, 11, 12):
        step.lookup.append(token)
    step.guesses = []
    for _ in range(70):  # passes without a guess
        step.settle()
    assert step.guess(100) != []
    step.guesses = [13]
    for _ in range(3):
        step.settle()
    assert step.guess(100) == []
    step.lookup = NgramLookup([*range(100, 150), 50, *range(100, 131)])
    assert step.guess(100) == []
    step.lookup.append(131)
    assert step.guess(100) == list(range(132, 140))


# ----------------------------------------------------------------------- the same tokens and state
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", ["default", "no sharing", "deep", "real head widths"])
def test_generate_steps_with_prompt_lookup_gives_the_tokens_of_plain_decoding(
    shape, sampling, count_rows
):
    model = model_of(SHAPES[shape])
    batch = batch_of(SHAPES[shape], PARTS)
    rows = count_rows(model)
    expected = list(generate_steps(model, batch, 80, SAMPLINGS[sampling]))
    assert len(rows) == 80
    rows.clear()
    steps = list(generate_steps(model, batch, 80, with_lookup(SAMPLINGS[sampling])))
    assert [step.tokens for step in steps] == [step.tokens for step in expected]
    assert max(rows[1:]) > 1, "nothing was guessed"
    if not SAMPLINGS[sampling].do_sample:  # what is drawn repeats itself less
        assert len(rows) < 76
    for step, plain in zip(steps, expected, strict=True):
        assert step.logits.shape == plain.logits.shape
        assert gap(step.logits, plain.logits) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_generate_with_prompt_lookup_repeats_the_sampled_tokens_of_a_seed(
    seed, bundled, processor, count_rows
):
    batch = processor(repeated_question(bundled, processor, "shapes"))
    config = GenerationConfig(True, temperature=1.2, seed=seed)
    rows = count_rows(bundled)
    [expected] = generate(bundled, batch, 40, config)
    rows.clear()
    assert generate(bundled, batch, 40, with_lookup(config)) == [expected]
    assert len(rows) < len(expected)


@pytest.mark.parametrize("name", IMAGES)
def test_generate_with_prompt_lookup_repeats_an_answer_in_few_passes(
    name, bundled, processor, count_rows
):
    batch = processor(repeated_question(bundled, processor, name))
    rows = count_rows(bundled)
    [expected] = generate(bundled, batch, 60, GREEDY)
    assert len(rows) == len(expected)
    rows.clear()
    assert generate(bundled, batch, 60, with_lookup(GREEDY)) == [expected]
    assert len(rows) <= 2 + len(expected) // 6


def test_cache_holds_what_was_chosen_at_each_step():
    model = model_of(SHAPES["default"])
    batch = batch_of(SHAPES["default"], PARTS)
    caches = []
    for config in (GREEDY, with_lookup(GREEDY)):
        cache = new_cache(model, 1, batch.input_ids.shape[1], 60)
        states = []
        for _ in generate_steps(model, batch, 60, config, cache):
            states.append((cache.length, cache.next_position.tolist()))
        caches.append((cache, states))
    (plain, expected), (cache, states) = caches
    assert states == expected
    length = plain.length
    assert gap(cache.keys[..., :length, :], plain.keys[..., :length, :]) < 1e-5
    assert gap(cache.values[..., :length, :], plain.values[..., :length, :]) < 1e-5


def test_generate_is_unchanged_when_the_cache_grows_between_guesses(monkeypatch):
    model = model_of(SHAPES["default"])
    batch = batch_of(SHAPES["default"], PARTS)
    expected = generate(model, batch, 60, GREEDY)
    monkeypatch.setattr(command, "INITIAL_CAPACITY", 1)
    assert generate(model, batch, 60, with_lookup(GREEDY)) == expected


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generate_with_a_sliding_window_is_unchanged(attention, count_rows):
    config = small_config(use_sliding_window=True, sliding_window=7, max_window_layers=1)
    model = model_of(config, seed=7, attn_implementation=attention)
    batch = batch_of(config, PARTS)
    rows = count_rows(model)
    expected = generate(model, batch, 60, GREEDY)
    rows.clear()
    assert generate(model, batch, 60, with_lookup(GREEDY)) == expected
    assert len(rows) < 30


def test_generate_with_a_padded_prompt_is_unchanged(count_rows):
    model = model_of(SHAPES["default"])
    both = batch_of(SHAPES["default"], PARTS, [30])
    padded = Batch(
        input_ids=both.input_ids[:1],
        attention_mask=both.attention_mask[:1],
        pixel_values=both.pixel_values,
        image_grid_thw=both.image_grid_thw,
    )
    assert padded.attention_mask.sum() < padded.attention_mask.size
    rows = count_rows(model)
    expected = generate(model, padded, 60, GREEDY)
    rows.clear()
    assert generate(model, padded, 60, with_lookup(GREEDY)) == expected
    assert len(rows) < 56


def test_generate_of_several_sequences_ignores_prompt_lookup(count_rows):
    model = model_of(SHAPES["default"])
    batch = batch_of(SHAPES["default"], PARTS, [5])
    rows = count_rows(model)
    expected = generate(model, batch, 40, GREEDY)
    assert generate(model, batch, 40, with_lookup(GREEDY)) == expected
    assert set(rows[1:40]) == {1}
    assert rows[40:] == rows[:40]


def test_captured_decode_step_runs_where_nothing_is_guessed():
    model = model_of(SHAPES["default"])
    batch = batch_of(SHAPES["default"], PARTS)
    expected = list(command.stream(model, batch, 60, GREEDY))
    with pytest.warns(UserWarning, match="CUDA graph"):
        captured = CapturedDecodeStep(model, decode_step)
    assert list(command.stream(model, batch, 60, with_lookup(GREEDY), decode=captured)) == expected
    assert captured.step is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES[:2])
def test_generate_with_prompt_lookup_equals_the_reference_with_it(name, bundled, processor):
    theirs = pytest.importorskip("transformers").Qwen2VLForConditionalGeneration
    model = theirs.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()
    batch = processor(repeated_question(bundled, processor, name))
    inputs = {key: torch.from_numpy(value) for key, value in batch.arrays().items()}
    expected = model.generate(
        **inputs,
        mm_token_type_ids=(inputs["input_ids"] == bundled.config.image_token_id).int(),
        max_new_tokens=40,
        do_sample=False,
        prompt_lookup_num_tokens=8,
    )[:, batch.input_ids.shape[1] :]
    assert generate(bundled, batch, 40, with_lookup(GREEDY)) == expected.tolist()


@pytest.mark.parametrize("shape", ["default", "like 7B"])
def test_generate_of_random_models_equals_the_reference_with_prompt_lookup(shape):
    config = SHAPES[shape]
    reference = reference_model(config, random_weights(config, seed=5), attn_implementation="sdpa")
    batch = batch_of(config, PARTS)
    inputs = {name: torch.from_numpy(value) for name, value in batch.arrays().items()}
    with torch.no_grad():
        expected = reference.generate(
            **inputs,
            mm_token_type_ids=token_types(config, inputs["input_ids"]),
            max_new_tokens=64,
            do_sample=False,
            pad_token_id=0,
            prompt_lookup_num_tokens=8,
        )[:, batch.input_ids.shape[1] :]
    assert generate(model_of(config), batch, 64, with_lookup(GREEDY)) == expected.tolist()


def forced_logits(model, batch, tokens):
    """Return the logits [n, V] from which plain decoding would choose each of the tokens."""
    with torch.inference_mode():
        cache = new_cache(model, 1, batch.input_ids.shape[1], len(tokens))
        rows = [prefill(model, batch, cache)]
        for token in tokens[:-1]:
            rows.append(decode_step(model, [token], cache, None))
    return torch.cat(rows)


@pytest.mark.parametrize("bits", ["bfloat16", "int8", "int4"])
def test_generate_in_few_bits_chooses_from_logits_near_those_of_plain_decoding(
    bits, processor, count_rows
):
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.bfloat16)
    if bits != "bfloat16":
        quantize_linears(model, bits)
    batch = processor(repeated_question(model, processor, "shapes"))
    rows = count_rows(model)
    steps = list(generate_steps(model, batch, 40, with_lookup(GREEDY)))
    assert len(rows) < 12
    tokens = [step.tokens[0] for step in steps]
    logits = torch.cat([step.logits for step in steps])
    assert logits.argmax(1).tolist() == tokens
    plain = forced_logits(model, batch, tokens)
    cosine = torch.cosine_similarity(logits.float(), plain.float(), dim=1)
    assert cosine.min() > 0.9995


# ---------------------------------------------------------------------------------- where it ends
def accepted_positions(model, batch, count, rows):
    """Return which new tokens are chosen from logits that a guess has computed.

    rows: of `count_rows`.
    """
    positions = []
    before = 0
    for position, _ in enumerate(generate_steps(model, batch, count, with_lookup(GREEDY))):
        if len(rows) == before:
            positions.append(position)
        before = len(rows)
    return positions


def test_generate_ends_at_each_limit_within_accepted_guesses(count_rows):
    model = model_of(SHAPES["default"])
    batch = batch_of(SHAPES["default"], PARTS)
    accepted = accepted_positions(model, batch, 60, count_rows(model))
    assert len(accepted) > 10
    [expected] = generate(model, batch, 60, GREEDY)
    for limit in [1, *accepted[::2]]:  # the last token has been a guess
        assert generate(model, batch, limit, with_lookup(GREEDY)) == [expected[:limit]]


def test_generate_ends_at_an_end_token_within_accepted_guesses(bundled, processor, count_rows):
    batch = processor(repeated_question(bundled, processor, "shapes"))
    [whole] = generate(bundled, batch, 60, GREEDY)
    accepted = accepted_positions(bundled, batch, 60, count_rows(bundled))
    checked = 0
    settings = bundled.generation_config
    try:
        for position in accepted:
            eos = whole[position]
            bundled.generation_config = settings | {"eos_token_id": [eos]}
            expected = whole[: whole.index(eos) + 1]
            assert generate(bundled, batch, 60, with_lookup(GREEDY)) == [expected]
            checked += whole.index(eos) == position
    finally:
        bundled.generation_config = settings
    assert checked >= 3


@pytest.mark.parametrize("stop", ["circle", " a black", "left, a", "center.", "een sq", "zebra"])
def test_generate_ends_at_a_stop_string_within_accepted_guesses(stop, bundled, processor):
    batch = processor(repeated_question(bundled, processor, "shapes"))
    config = GenerationConfig(stop_strings=[stop])
    expected = generate(bundled, batch, 60, config, processor.tokenizer)
    assert generate(bundled, batch, 60, with_lookup(config), processor.tokenizer) == expected


def test_generate_with_a_cache_that_is_full_runs_no_guess_beyond_it(bundled, processor):
    batch = processor(repeated_question(bundled, processor, "shapes"))
    [expected] = generate(bundled, batch, 50, GREEDY)
    length = batch.input_ids.shape[1]
    cache = new_cache(bundled, 1, length, 14)
    steps = generate_steps(bundled, batch, 50, with_lookup(GREEDY), cache)
    assert [next(steps).tokens[0] for _ in range(15)] == expected[:15]
    with pytest.raises(ValueError, match=f"the KV cache holds {length + 14} tokens"):
        next(steps)


# --------------------------------------------------------------------------------------------- chat
QUESTIONS = ["Describe this image.", "Describe this image.", "How many shapes are there?"]


def ask_all(chat, stop_after=None):
    """Return the tokens of the answers to QUESTIONS; the second is closed after some tokens."""
    chat.add(conversation("shapes")[0]["content"][0])
    answers = []
    for number, question in enumerate(QUESTIONS):
        steps = chat.ask(question)
        if number == 1 and stop_after is not None:
            answers.append([next(steps) for _ in range(stop_after)])
            steps.close()
        else:
            answers.append(list(steps))
    return answers


@pytest.mark.parametrize("stop_after", [None, 5, 12])
@pytest.mark.parametrize(
    "config",
    [GREEDY, GenerationConfig(True, 0.7, seed=4), GenerationConfig(repetition_penalty=1.05)],
    ids=["greedy", "sampled", "penalty"],
)
def test_chat_with_prompt_lookup_gives_the_same_answers(
    config, stop_after, bundled, processor, count_rows
):
    plain = Chat(bundled, processor, config, 40)
    expected = ask_all(plain, stop_after)
    rows = count_rows(bundled)
    chat = Chat(bundled, processor, with_lookup(config), 40)
    assert ask_all(chat, stop_after) == expected
    assert len(rows) < sum(map(len, expected)) - 1
    assert chat.cached_ids == plain.cached_ids
    assert chat.cache.length == plain.cache.length == len(chat.cached_ids)
    assert torch.equal(chat.cache.next_position, plain.cache.next_position)


# ------------------------------------------------------------------------------- what can go wrong
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_generation_config_refuses_an_invalid_number_of_guesses(value):
    with pytest.raises(ValueError, match="prompt_lookup_num_tokens: expected a positive integer"):
        GenerationConfig(prompt_lookup_num_tokens=value)


def test_generation_config_of_a_checkpoint_does_not_turn_prompt_lookup_on():
    model = model_of(SHAPES["shallow"])
    model.generation_config = {"prompt_lookup_num_tokens": 10}
    assert GenerationConfig.from_model(model).prompt_lookup_num_tokens is None
    config = GenerationConfig.from_model(model, prompt_lookup_num_tokens=4)
    assert config.prompt_lookup_num_tokens == 4


def test_prompt_lookup_refuses_rope_scaled_with_the_length():
    scaling = SHAPES["default"]["rope_scaling"] | {"type": "dynamic", "factor": 2.0}
    config = small_config(rope_scaling=scaling)
    with pytest.raises(ValueError, match="no prompt lookup for rope of type dynamic"):
        generate(model_of(config), batch_of(config, PARTS), 4, with_lookup(GREEDY))


def test_generate_refuses_logits_that_are_not_finite_after_an_accepted_guess():
    model = model_of(SHAPES["default"])
    steps = generate_steps(model, batch_of(SHAPES["default"], PARTS), 60, with_lookup(GREEDY))
    for _ in range(50):
        next(steps)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NotFiniteError, match=r"not finite in float32.*--debug-nan"):
        list(steps)


# ------------------------------------------------------------------------------- command line
def guessing_steps(monkeypatch):
    """Return a list that collects each `PromptLookup` that is made."""
    made = []

    class Recorded(PromptLookup):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(command, "PromptLookup", Recorded)
    return made


def test_prompt_lookup_option_gives_the_answer(monkeypatch, capsys):
    options = ["--image", str(ROOT / "examples" / "wide.png"), "--prompt", "Describe this image."]
    options += ["--dtype", "float32", "--device", "cpu", "--quiet"]
    assert command.main(options) == 0
    expected = capsys.readouterr().out
    made = guessing_steps(monkeypatch)
    assert command.main([*options, "--prompt-lookup", "--debug-nan"]) == 0
    assert capsys.readouterr().out == expected
    assert [step.num_tokens for step in made] == [prompt_lookup.DEFAULT_NUM_TOKENS]


def test_prompt_lookup_option_of_batch_serves_lines_that_run_alone(monkeypatch, tmp_path):
    questions = tmp_path / "questions.jsonl"
    lines = [json.dumps(conversation(name)) for name in ("small", "wide", "tall")]
    questions.write_text("\n".join(lines))
    made = guessing_steps(monkeypatch)
    options = ["--prompt-lookup", "--dtype", "float32", "--device", "cpu", "--quiet"]
    answers = []
    for exact in ([], ["--exact"]):
        out = tmp_path / f"answers{len(exact)}.jsonl"
        assert batch_app.main([str(questions), "--out", str(out), *options, *exact]) == 0
        answers.append([json.loads(line)["answer"] for line in out.read_text().splitlines()])
        assert len(made) == 3 * len(exact)
    assert answers[0] == answers[1]


def test_prompt_lookup_option_of_chat(monkeypatch, capsys):
    from apps import chat

    monkeypatch.setattr("sys.stdin", io.StringIO("Describe this image.\n"))
    made = guessing_steps(monkeypatch)
    options = ["--image", str(ROOT / "examples" / "wide.png"), "--prompt", "Describe this image."]
    assert chat.main([*options, "--prompt-lookup", "--device", "cpu", "--quiet"]) == 0
    assert capsys.readouterr().out.count("A blue circle at the top") == 2
    assert len(made) == 2


# ------------------------------------------------------------------- attention of a few new tokens
@pytest.mark.parametrize("new", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_sdpa_attention_of_a_few_tokens_equals_the_formula(new, heads):
    generator = torch.Generator().manual_seed(new)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query_heads, key_heads = heads
    q = draw(2, query_heads, new, 8)
    k = draw(2, key_heads, 20, 8)
    v = draw(2, key_heads, 20, 8)
    mask = torch.ones(2, 1, new, 20, dtype=torch.bool).tril(20 - new)
    mask[1, ..., :4] = False  # padding of one sequence
    context = AttentionContext(mask=mask)
    assert gap(sdpa_attention(q, k, v, context), eager_attention(q, k, v, context)) < 1e-14
