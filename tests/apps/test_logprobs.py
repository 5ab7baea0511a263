"""apps/logprobs.py compared with a pass over the whole answer without a cache."""

import math
import re

import pytest
import torch

from apps.logprobs import TokenScore, format_table, main, score_token
from command_line import BUNDLED_CHECKPOINT
from generate import GenerationConfig, generate, generate_steps
from load_weights import load_model
from preprocess import Processor
from tokenizer import Tokenizer

IMAGE = BUNDLED_CHECKPOINT.parent.parent / "examples" / "shapes.png"
SAMPLED = GenerationConfig(
    do_sample=True, temperature=2.5, top_k=40, top_p=0.99, repetition_penalty=1.2, seed=3
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def batch():
    content = [{"type": "image", "image": str(IMAGE)}, {"type": "text", "text": "Describe this."}]
    return Processor.from_pretrained(BUNDLED_CHECKPOINT)([{"role": "user", "content": content}])


def recompute(model, batch, tokens):
    """Return the log-probabilities [tokens, V] from one pass over prompt and answer."""
    ids = torch.tensor([[*batch.input_ids[0].tolist(), *tokens]])
    images = {
        name: torch.from_numpy(getattr(batch, name)) for name in ("pixel_values", "image_grid_thw")
    }
    with torch.no_grad():
        logits = model(ids, **images)[0, -len(tokens) - 1 : -1]
    return logits.log_softmax(-1)


# ------------------------------------------------------------------------------------------- scores


@pytest.mark.sweep
@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_score_token_equals_a_pass_over_the_whole_answer(batch, sampling, dtype, tolerance):
    model = load_model(BUNDLED_CHECKPOINT, "cpu", dtype)
    scores = []
    for step in generate_steps(model, batch, 20, sampling):
        scores.append(score_token(step.tokens[0], step.logits[0], 4))
    tokens = [score.token for score in scores]
    assert [tokens] == generate(model, batch, 20, sampling)
    expected = recompute(model, batch, tokens)
    for score, row in zip(scores, expected, strict=True):
        assert score.logprob == pytest.approx(row[score.token].item(), abs=tolerance)
        order = row.argsort(descending=True).tolist()
        assert score.rank == order.index(score.token) + 1
        others = [id for id in order if id != score.token][:4]
        logprobs = [logprob for _, logprob in score.alternatives]
        assert logprobs == pytest.approx(row[others].tolist(), abs=tolerance)
        for id, logprob in score.alternatives:
            assert row[id].item() == pytest.approx(logprob, abs=tolerance)
    assert (max(score.rank for score in scores) > 1) == (sampling is SAMPLED)


def test_score_token_normalizes_half_precision_in_float32():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = logits.double().log_softmax(-1)[7].item()
    assert score_token(7, logits).logprob == pytest.approx(expected, abs=1e-5)


def test_score_token_leaves_the_token_out_of_its_alternatives():
    logits = torch.tensor([1.0, 3.0, 5.0, 4.0])
    scores = [score_token(token, logits, 2) for token in (2, 1, 0)]
    assert [score.rank for score in scores] == [1, 3, 4]
    assert [[id for id, _ in score.alternatives] for score in scores] == [[3, 1], [2, 3], [2, 3]]


@pytest.mark.parametrize("alternatives", [0, 1, 3, 99])
def test_score_token_has_as_many_alternatives_as_there_are(alternatives):
    score = score_token(0, torch.arange(5.0), alternatives)
    assert len(score.alternatives) == min(alternatives, 4)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [None, SAMPLED], ids=["greedy", "sampled"])
def test_generate_steps_yields_the_tokens_of_generate(batch, sampling):
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    steps = list(generate_steps(model, batch, 20, sampling))
    assert [[step.tokens[0] for step in steps]] == generate(model, batch, 20, sampling)
    assert {step.logits.shape for step in steps} == {(1, model.config.vocab_size)}


# -------------------------------------------------------------------------------------------- table


def test_format_table_shows_tokens_probabilities_and_perplexity(tokenizer):
    red, end, newline = tokenizer.encode(" red<|im_end|>\n")
    scores = [
        TokenScore(red, -0.5, 1, [(end, -1.0), (newline, -12.0)]),
        TokenScore(end, -2.0, 2, [(red, -0.25), (newline, -3.0)]),
    ]
    header, first, second, total = format_table(tokenizer, scores).splitlines()
    assert header.split() == ["token", "id", "p", "rank", "alternatives"]
    expected = ["'", "red'", str(red), "60.65%", "'<|im_end|>'", "36.79%", r"'\n'", "0.00%"]
    assert first.split() == expected
    expected = ["'<|im_end|>'", str(end), "13.53%", "#2", "'", "red'", "77.88%", r"'\n'", "4.98%"]
    assert second.split() == expected
    assert total == "2 tokens, sum of logprobs -2.5000, perplexity 3.4903"


def test_format_table_shows_nan_as_nan(tokenizer):
    scores = [TokenScore(5, math.nan, 1, [(6, math.nan)])]
    assert re.findall("nan", format_table(tokenizer, scores).splitlines()[1]) == ["nan", "nan"]


def test_format_table_shows_white_space_quotes_and_incomplete_characters(tokenizer):
    ids = tokenizer.encode("\n'é")
    lines = format_table(tokenizer, [TokenScore(id, 0.0, 1, []) for id in ids]).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [r"'\n'", '"\'"', "'\ufffd'", "'\ufffd'"]


# ------------------------------------------------------------------------------------------ program


def test_main_prints_the_answer_and_its_table(capsys):
    arguments = ["--image", str(IMAGE), "--prompt", "How many shapes are there?", "--quiet"]
    assert main([*arguments, "--alternatives", "2"]) == 0
    out, err = capsys.readouterr()
    answer, _, *lines = out.splitlines()
    assert (answer, err) == ("Four.", "")
    assert [line.split()[0] for line in lines] == ["token", "'Four'", "'.'", "'<|im_end|>'", "3"]
    assert [line.count("%") for line in lines[1:-1]] == [3, 3, 3]


@pytest.mark.parametrize("number", ["-1", "21", "x"])
def test_main_refuses_other_numbers_of_alternatives(number, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--prompt", "x", "--alternatives", number])
    assert "argument --alternatives: invalid" in capsys.readouterr().err
