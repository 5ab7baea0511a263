"""`--stop` in the programs that answer one question; chat and batch have tests of their own."""

import importlib

import pytest
from example_batches import EXAMPLES

QUESTION = ["--image", str(EXAMPLES / "shapes.png"), "--dtype", "float32", "--device", "cpu"]


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["attention_report", "grounding", "logprobs", "trace"])
def test_program_cuts_its_answer_before_a_stop_string(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # the report is written there
    program = importlib.import_module(f"apps.{name}")
    assert program.main([*QUESTION, "--quiet", "--stop", "angle at"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "A blue tri" in lines


@pytest.mark.slow
def test_grounding_finds_the_box_that_a_stop_string_ends(capsys):
    program = importlib.import_module("apps.grounding")
    options = [*QUESTION, "--prompt", "Find the red circle.", "--quiet"]
    assert program.main(options) == 0
    whole = capsys.readouterr().out
    assert len(whole.splitlines()) == 2  # the answer and its box
    assert program.main([*options, "--stop", "<|box_end|>"]) == 0
    assert capsys.readouterr().out == whole
    assert program.main([*options, "--stop", " circle<|"]) == 0
    assert capsys.readouterr().out == "the red\n"
