"""Each program that loads a checkpoint: memory that does not suffice, and numbers that overflow."""

import importlib
import io
import json
from pathlib import Path

import pytest
import torch

import command_line
import load_weights
import memory
from command_line import BUNDLED_CHECKPOINT
from memory import Free
from preprocess import Processor

ROOT = Path(__file__).parents[2]
IMAGE = str(ROOT / "examples" / "shapes.png")

PROGRAMS = {
    "generate": ["--image", IMAGE],
    "apps.attention_report": ["--image", IMAGE, "--out", "{out}.html"],
    "apps.batch": ["{questions}", "--out", "{out}"],
    "apps.chat": ["--image", IMAGE, "--prompt", "x"],
    "apps.embed": ["--image", IMAGE],
    "apps.grounding": ["--image", IMAGE],
    "apps.logprobs": ["--image", IMAGE],
    "apps.trace": ["--image", IMAGE],
}


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Return a function that runs a program with its options in PROGRAMS and others."""
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "x"}]
    question = json.dumps([{"role": "user", "content": content}])
    (tmp_path / "questions.jsonl").write_text(question)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # a chat ends after its --prompt

    def run(program, *options):
        places = {"questions": tmp_path / "questions.jsonl", "out": tmp_path / "out"}
        arguments = [argument.format(**places) for argument in PROGRAMS[program]]
        length = [] if program == "apps.embed" else ["--max-new-tokens", "2"]
        module = importlib.import_module(program)
        return module.main([*arguments, *length, *options, "--device", "cpu", "--quiet"])

    return run


@pytest.mark.sweep
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_refuses_what_cannot_fit_before_it_loads(program, main, monkeypatch, capsys):
    def load(*arguments):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(command_line, "load_model", load)
    monkeypatch.setattr(memory, "cpu_free", lambda: Free(10**5, 0, "on this machine"))
    # float32 weights of the bundled model are no longer used in place
    assert main(program, "--dtype", "float32") == 2
    message = capsys.readouterr().err
    assert "memory does not suffice" in message
    assert message.count("\n") == 1
    with pytest.raises(AssertionError, match="the model is loaded"):
        main(program, "--dtype", "float32", "--no-memory-check")


@pytest.mark.sweep
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_starts_where_mapped_weights_exceed_free_memory(
    program, main, monkeypatch, capsys
):
    monkeypatch.setattr(memory, "cpu_free", lambda: Free(4 * 10**6, 0, "on this machine"))
    with pytest.warns(UserWarning, match="again and again"):
        assert main(program) == 0


@pytest.fixture
def run_batch(tmp_path):
    """Return a function that runs apps.batch over contents of messages; it returns the records."""
    from apps import batch

    def run(contents, *options):
        questions = tmp_path / "contents.jsonl"
        lines = [json.dumps([{"role": "user", "content": content}]) for content in contents]
        questions.write_text("\n".join(lines))
        out = tmp_path / "answers.jsonl"
        arguments = [str(questions), "--out", str(out), *options]
        arguments += ["--max-new-tokens", "2", "--quiet", "--device", "cpu"]
        assert batch.main(arguments) == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        return sorted(records, key=lambda record: record["line"])

    return run


TEXT = [{"type": "text", "text": "How many?"}]


@pytest.mark.filterwarnings("ignore:the ")  # that memory is short
def test_batch_element_that_does_not_fit_costs_its_own_record(run_batch, monkeypatch):
    image = [{"type": "image", "image": str(ROOT / "examples" / "wide.png")}, *TEXT]
    config = load_weights.load_config(BUNDLED_CHECKPOINT)
    run = memory.Run(config, torch.device("cpu"), torch.bfloat16)
    batch = Processor.from_pretrained(BUNDLED_CHECKPOINT)([{"role": "user", "content": TEXT}])
    enough_for_text = 2 * memory.batch_needs(run, batch).total()
    monkeypatch.setattr(memory, "cpu_free", lambda: Free(enough_for_text, 0, "on this machine"))
    first, second, third = run_batch([TEXT, image, TEXT], "--no-reorder")
    assert "answer" in first
    assert "answer" in third
    assert second["error"].startswith("memory does not suffice: about ")
    assert "lower --max-pixels" in second["error"]


# ------------------------------------------------------------------------------------- the numbers
@pytest.fixture
def damage(monkeypatch):
    """Return a function that makes programs load a model with NaN in a parameter."""

    def load_damaged(name, index):
        def load(*arguments):
            model = load_weights.load_model(*arguments)
            # A head of its own: with that of the embeddings, NaN there would be in all logits.
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            with torch.no_grad():
                model.get_parameter(name)[index] = float("nan")
            return model

        monkeypatch.setattr(command_line, "load_model", load)

    return load_damaged


@pytest.mark.sweep
@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_ends_with_a_sentence_where_numbers_are_not_finite(
    program, main, damage, capsys, tmp_path
):
    damage("model.layers.1.mlp.up_proj.weight", 0)
    in_record = program == "apps.batch"
    is_console = program == "apps.chat"  # a turn that fails is withdrawn
    assert main(program) == (0 if in_record or is_console else 2)
    message = (tmp_path / "out").read_text() if in_record else capsys.readouterr().err
    assert "not finite" in message
    assert "--dtype float32" in message
    assert main(program, "--debug-nan") == (0 if in_record or is_console else 2)
    message = (tmp_path / "out").read_text() if in_record else capsys.readouterr().err
    assert "the output of model.layers.1.mlp.up_proj is the first with NaN, in bfloat16" in message


@pytest.mark.slow
def test_overflow_in_float16_suggests_bfloat16(main, monkeypatch, capsys):
    def load(*arguments):
        model = load_weights.load_model(*arguments)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
        return model

    monkeypatch.setattr(command_line, "load_model", load)
    for sampling in ([], ["--temperature", "0.8", "--seed", "1"]):
        assert main("generate", "--dtype", "float16", *sampling) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert "not finite in float16: try --dtype bfloat16 or float32" in output.err
        assert main("generate", "--dtype", "bfloat16", *sampling) == 0
        capsys.readouterr()


def test_batch_element_with_nan_costs_its_own_record(run_batch, damage):
    processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
    texts = ["How many?", "Which color?", "How many?"]
    [only_in_second, *_] = set(processor.tokenizer.encode(texts[1])) - set(
        processor.tokenizer.encode(texts[0])
    )
    damage("model.embed_tokens.weight", only_in_second)
    contents = [[{"type": "text", "text": text}] for text in texts]
    first, second, third = run_batch(contents)
    assert first["answer"] == third["answer"]
    assert "not finite" in second["error"]
