"""extras/logprobs.py beside a re-computation of the whole answer without a cache, and its table."""

import ast
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extras.logprobs import Step, Watch, columns, token_text
from generate import TINY, Sampling, generate, generate_steps, main
from load_weights import load_model
from preprocess import Processor
from tokenizer import BYTE_OF, Tokenizer

PICTURE = TINY.parent.parent / "examples" / "shapes.png"
WILD = Sampling(
    do_sample=True, temperature=2.5, top_k=40, top_p=0.99, repetition_penalty=1.2, seed=3
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def batch():
    content = [
        {"type": "image", "image": str(PICTURE)},
        {"type": "text", "text": "Describe this image."},
    ]
    return Processor.from_pretrained(TINY)([{"role": "user", "content": content}])


@pytest.fixture(scope="module")
def model():
    return load_model(TINY, "cpu", torch.float32)


def watched(model, batch, sampling=None, **settings):
    watch = Watch(**settings)
    for step in generate_steps(model, batch, 20, sampling):
        watch.chosen(step.tokens[0], step.logits[0])
    return watch


def recomputed(model, batch, tokens):
    """The log-probabilities [tokens, V] from one pass over prompt and answer."""
    ids = torch.tensor([[*batch.input_ids[0].tolist(), *tokens]])
    pictures = {
        name: torch.from_numpy(getattr(batch, name)) for name in ("pixel_values", "image_grid_thw")
    }
    with torch.no_grad():
        logits = model(ids, **pictures)[0, -len(tokens) - 1 : -1]
    return logits.log_softmax(-1)


# ---------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("sampling", [None, WILD], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_log_probabilities_equal_a_pass_over_the_whole_answer(batch, sampling, dtype, tolerance):
    model = load_model(TINY, "cpu", dtype)
    steps = watched(model, batch, sampling).steps
    tokens = [step.token for step in steps]
    assert tokens == [row[0] for row in zip(*generate(model, batch, 20, sampling), strict=True)]
    expected = recomputed(model, batch, tokens)
    for step, row in zip(steps, expected, strict=True):
        assert step.logprob == pytest.approx(row[step.token].item(), abs=tolerance)
        order = row.argsort(descending=True).tolist()
        assert step.rank == order.index(step.token) + 1
        others = [id for id in order if id != step.token][:4]
        assert [logprob for _, logprob in step.runners_up] == pytest.approx(
            row[others].tolist(), abs=tolerance
        )
        for id, logprob in step.runners_up:
            assert row[id].item() == pytest.approx(logprob, abs=tolerance)
    assert (max(step.rank for step in steps) > 1) == (sampling is WILD)


def test_half_precision_logits_are_normalised_in_float32():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)).bfloat16()
    watch = Watch()
    watch.chosen(7, logits)
    expected = logits.double().log_softmax(-1)[7].item()
    assert watch.steps[0].logprob == pytest.approx(expected, abs=1e-5)


def test_ranks_and_runners_up_leave_the_chosen_one_out():
    watch = Watch(runners_up=2)
    for token in (2, 1, 0):
        watch.chosen(token, torch.tensor([1.0, 3.0, 5.0, 4.0]))
    assert [step.rank for step in watch.steps] == [1, 3, 4]
    assert [[id for id, _ in step.runners_up] for step in watch.steps] == [[3, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("runners_up", [0, 1, 3, 99])
def test_as_many_runners_up_as_asked_for_and_there_are(runners_up):
    watch = Watch(runners_up)
    watch.chosen(0, torch.arange(5.0))
    assert len(watch.steps[0].runners_up) == min(runners_up, 4)


def test_what_is_kept_are_a_few_plain_numbers(model, batch):
    watch = watched(model, batch)
    for step in watch.steps:
        assert [type(value) for value in step[:3]] == [int, float, int]
        assert all((type(id), type(logprob)) == (int, float) for id, logprob in step.runners_up)


def test_logits_of_several_conversations_and_a_negative_number_are_refused():
    with pytest.raises(ValueError, match="of one conversation, got"):
        Watch().chosen(0, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="runners_up is -1, expected 0 or more"):
        Watch(-1)


def test_steps_hold_the_logits_that_a_hook_on_the_head_sees(model, batch):
    seen = []
    hook = model.lm_head.register_forward_hook(lambda _m, _i, output: seen.append(output[:, -1]))
    steps = list(generate_steps(model, batch, 20, WILD))
    hook.remove()
    assert torch.equal(torch.cat([step.logits for step in steps]), torch.cat(seen))


# ------------------------------------------------------------------------------------------------------ the table


def test_the_table_of_an_answer(model, batch, tokenizer):
    watch = watched(model, batch)
    head, *lines, total = watch.table(tokenizer)
    assert head.split()[:4] == ["token", "id", "%", "rank"]
    assert len(lines) == len(watch.steps)
    assert "".join(
        ast.literal_eval(line[: line.rindex("'", 0, 12) + 1]) for line in lines
    ) == tokenizer.decode(step.token for step in watch.steps)
    logprobs = torch.tensor([step.logprob for step in watch.steps], dtype=torch.float64)
    perplexity = torch.exp(-logprobs.mean())
    assert (
        total
        == f"20 tokens, sum of log-probabilities {logprobs.sum():.4f}, perplexity {perplexity:.4f}"
    )


def test_a_line_says_all_of_its_token(model, tokenizer):
    watch = Watch(2)
    red, end, byte = tokenizer.encode(" red<|im_end|>\n")
    watch.steps.append(Step(red, -0.5, 1, [(end, -1.0), (byte, -12.0)]))
    watch.steps.append(Step(end, -2.0, 2, [(red, -0.25), (byte, -3.0)]))
    _, first, second, total = watch.table(tokenizer)
    assert first.split() == [
        "'",
        "red'",
        str(red),
        "60.65",
        "<|im_end|>",
        "36.79",
        r"'\n'",
        "<0.01",
    ]
    assert second.split() == [
        "<|im_end|>",
        str(end),
        "13.53",
        "#2",
        "'",
        "red'",
        "77.88",
        r"'\n'",
        "4.98",
    ]
    assert total == "2 tokens, sum of log-probabilities -2.5000, perplexity 3.4903"
    assert Watch().table(tokenizer) == []


def test_numbers_that_are_none_are_shown_as_such(model, tokenizer):
    watch = Watch(1)
    watch.steps = [Step(5, float("nan"), 1, [(6, float("nan"))])]
    assert watch.table(tokenizer)[1].split()[2:] == ["nan", repr(tokenizer.decode([6])), "nan"]


def spelt(data):
    """Bytes as a byte-level vocabulary spells them."""
    character = {byte: character for character, byte in BYTE_OF.items()}
    return "".join(character[byte] for byte in data)


def vocabulary(*names, special=()):
    names = dict(enumerate(names))
    return SimpleNamespace(
        backend=SimpleNamespace(id_to_token=names.get), special_ids=frozenset(special)
    )


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("\ue000\ue001".encode(), r"'\ue000\ue001'"),
        (b" red", "' red'"),
        (b"\n\t", r"'\n\t'"),
        (b"it's", '"it\'s"'),
        (b"\\n", r"'\\n'"),
        ("圆é".encode(), "'圆é'"),
        (b"\xe2", "<0xE2>"),
        (b" \xe2\x9c", "' '<0xE2><0x9C>"),
        (b"\xa9a", "<0xA9>'a'"),
        ("\u200b\u202e\x1b".encode(), r"'\u200b\u202e\x1b'"),
        (b"<0xE2>", "'<0xE2>'"),
        (b"<|im_end|>", "'<|im_end|>'"),
    ],
)
def test_a_token_is_shown_with_all_its_characters(data, shown):
    assert token_text(vocabulary(spelt(data)), 0) == shown


@given(st.binary(min_size=1, max_size=8))
def test_what_is_shown_tells_every_byte(data):
    shown = token_text(vocabulary(spelt(data)), 0)
    parts = re.findall(r"<0x(..)>|('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", shown)
    assert (
        b"".join(
            bytes.fromhex(byte) if byte else ast.literal_eval(text).encode() for byte, text in parts
        )
        == data
    )


def test_control_tokens_and_ids_without_a_token(tokenizer):
    assert token_text(tokenizer, tokenizer.eos_token_id) == "<|im_end|>"
    assert token_text(tokenizer, 151935) == "<no token>"
    assert token_text(vocabulary("<工具>"), 0) == "'<工具>'"  # an added token that is text


def test_a_wide_character_takes_two_columns_and_a_combining_one_none():
    assert [columns(text) for text in ("ab", "圆", "e\u0301", "a圆！")] == [2, 2, 1, 5]


any_token = st.text(max_size=30) | st.text("圆 \n👍🏽e\u0301", max_size=60)
rows = st.lists(
    st.tuples(st.integers(0, 9), st.floats(-30, 0), st.integers(1, 151936)), min_size=1, max_size=5
)


@settings(max_examples=50)
@given(st.lists(any_token, min_size=10, max_size=10), rows, st.integers(0, 4))
def test_the_columns_are_aligned_and_fit(names, rows, runners_up):
    tokenizer = vocabulary(*(spelt(name.encode()) for name in names))
    tokenizer.backend.id_to_token = lambda id, names=tokenizer.backend.id_to_token: names(id % 10)
    watch = Watch(runners_up)
    watch.steps = [
        Step(151640 + id, logprob, rank, [(100000 + id + i, logprob) for i in range(runners_up)])
        for id, logprob, rank in rows
    ]
    *lines, _ = watch.table(tokenizer)
    assert max(columns(line) for line in lines) <= 110
    ends = {columns(line[: line.rindex(" 1516") + 7]) for line in lines[1:]}
    assert len(ends) == 1
    if runners_up:
        assert len({columns(line) for line in lines[1:]}) == 1


def test_the_command_line_prints_the_table_after_the_answer(capsys):
    assert (
        main(
            [
                "--image",
                str(PICTURE),
                "--prompt",
                "How many shapes are there?",
                "--logprobs",
                "--quiet",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "Four.\n"
    lines = err.splitlines()
    assert [line.split()[0] for line in lines] == ["token", "'Four'", "'.'", "<|im_end|>", "3"]
