"""benchmarks/quantized_perplexity.py: what is rounded, and what the losses are of."""

import math

import pytest
import torch

from benchmarks import quantized_perplexity
from linear import Int4Linear


def as_it_is(name, weight):
    return weight


@pytest.mark.parametrize(
    ("name", "layers", "form"),
    [
        ("lm_head", 28, "Q6_K"),
        ("model.layers.0.self_attn.v_proj", 28, "Q6_K"),
        ("model.layers.3.self_attn.v_proj", 28, "Q4_K"),
        ("model.layers.5.mlp.down_proj", 28, "Q6_K"),
        ("model.layers.24.mlp.down_proj", 28, "Q6_K"),
        ("model.layers.0.self_attn.q_proj", 28, "Q4_K"),
        ("model.layers.1.mlp.down_proj", 4, "Q4_K"),
        ("model.layers.3.mlp.down_proj", 4, "Q6_K"),
    ],
)
def test_q4_k_m_has_six_bits_where_llama_cpp_keeps_them(name, layers, form):
    assert quantized_perplexity.q4_k_m_form(name, layers) == form


def test_the_losses_are_those_of_the_right_answers_alone():
    batches = quantized_perplexity.make_batches(quantized_perplexity.CHECKPOINT, 3)
    losses, error = quantized_perplexity.rounded_losses(
        quantized_perplexity.CHECKPOINT, batches, as_it_is
    )
    assert len(losses) == sum(int(batch["answers"][:, 1:].sum()) for batch in batches)
    assert error == 0
    assert losses.mean() < 0.3  # it was trained on such answers, not on the questions


def test_a_head_that_is_rounded_to_zeros_guesses_evenly():
    def without_head(name, weight):
        return torch.zeros_like(weight) if name == "lm_head" else weight

    batches = quantized_perplexity.make_batches(quantized_perplexity.CHECKPOINT, 1)[:1]
    losses, error = quantized_perplexity.rounded_losses(
        quantized_perplexity.CHECKPOINT, batches, without_head
    )
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(545)))
    assert 0 < error < 1


def test_weights_are_rounded_as_the_layer_does():
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    rounded = quantized_perplexity.round_as_here(Int4Linear, weight)
    groups = rounded.unflatten(1, (-1, 32))
    assert all(len(group.unique()) <= 16 for row in groups for group in row)
    assert 0 < (rounded - weight).norm() / weight.norm() < 0.1


def test_table_shows_the_mean_difference_and_its_standard_error():
    losses = {"plain": torch.zeros(4), "rounded": torch.tensor([0.001, 0.003, 0.001, 0.003])}
    lines = quantized_perplexity.table(losses, {"plain": 0.0, "rounded": 0.08}).splitlines()
    assert lines[2] == "| plain | 1.00000 | 0.00 ± 0.00 | 0.00% |"
    assert lines[3] == "| rounded | 1.00200 | 2.00 ± 0.58 | 8.00% |"


def test_a_file_that_is_no_library_is_named(tmp_path, capsys):
    path = tmp_path / "libggml-base.so"
    path.write_text("no library")
    with pytest.raises(SystemExit):
        quantized_perplexity.main(["--ggml", str(path)])
    assert str(path) in capsys.readouterr().err
