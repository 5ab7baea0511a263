"""benchmarks/finetune.py: both sides take the same steps, and wrong ones do not count.

No test depends on how long something took.
"""

import contextlib
import io
import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import checkpoint, finetune, workers
from benchmarks.summary import divide
from qwen2vl import Qwen2VL

pytest.importorskip("peft")
pytestmark = pytest.mark.slow  # it trains with transformers

TINY = ["--shapes", "tiny", "--steps", "2", "--threads", "1"]


def run_here(job, options, say):
    """Run a job as a worker does, but in this process, and return its records as quiet ones."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        workers.JOBS[job["kind"]](job | {"threads": options.threads})
    record = json.loads(output.getvalue().removeprefix("result "))
    return [record | {"side": job["side"], "dtype": job["dtype"], "quiet": True}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_main_compares_equal_steps_in_turns(dtype, monkeypatch, capsys):
    ran = []

    def run_and_note(job, options, say):
        ran.append((job["side"], job["task"], job["checkpointing"]))
        return run_here(job, options, say)

    monkeypatch.setattr(finetune, "run_quietly", run_and_note)
    assert finetune.main([*TINY, "--dtypes", dtype, "--repetitions", "2"]) == 0
    in_turn = []
    for task, settings in finetune.TASKS.items():
        in_turn += [(side, task, settings["checkpointing"]) for side in ("ours", "peft")]
    assert ran == in_turn + in_turn[::-1]
    output = capsys.readouterr().out
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert [(line["dtype"], line["task"]) for line in lines] == [
        (dtype, task) for task in finetune.TASKS
    ]
    for line in lines:
        assert line["ratio"] == divide(line["rates"]["ours"], line["rates"]["peft"])


def test_main_fails_where_the_gradients_differ(monkeypatch, capsys):
    def without_answers(model, batch):
        return right_loss(model, batch | {"labels": batch["labels"].flip(1)})

    right_loss = finetune.answer_loss
    monkeypatch.setattr(finetune, "run_quietly", run_here)
    monkeypatch.setattr(finetune, "answer_loss", without_answers)
    arguments = ["--dtypes", "float32", "--tasks", "plain", "--repetitions", "1"]
    assert finetune.main([*TINY, *arguments]) == 1
    line = json.loads(capsys.readouterr().out.splitlines()[0])
    assert not line["holds"]


def record_of(side, seconds, losses=(2.0, 1.0), quiet=True):
    """Return what a process of that side has reported."""
    common = {"dtype": "float32", "task": "plain", "tokens": 300, "quiet": quiet}
    return common | {"side": side, "seconds": seconds, "losses": list(losses)}


def jobs_with_gradients(folder, ours, theirs):
    """Return the jobs of both sides, whose processes have left these gradients of one matrix."""
    jobs = []
    for side, gradient in (("ours", ours), ("peft", theirs)):
        job = {"side": side, "dtype": "float32", "task": "plain", "gradients": str(folder)}
        save_file({"A": torch.tensor(gradient)}, finetune.gradients_path(job))
        jobs.append(job)
    return jobs


def test_summarize_divides_the_medians_of_quiet_processes(tmp_path):
    jobs = jobs_with_gradients(tmp_path, [1.0, 2.0], [1.0, 2.0])
    records = [record_of("ours", [1.0, 9.0, 1.0]), record_of("ours", [2.0]), record_of("ours", [3])]
    records += [record_of("peft", [4.0]), record_of("peft", [0.001], quiet=False)]
    line = finetune.summarize(*jobs, records)
    assert line["rates"] == {"ours": 150, "peft": 75}
    assert line["ratio"] == 2
    assert line["spread"] == pytest.approx((300 - 100) / 150)
    assert line["holds"]
    assert "| float32 | plain | 2.00× | 133% |" in finetune.table([line])


def test_summarize_compares_the_loss_of_each_step(tmp_path):
    jobs = jobs_with_gradients(tmp_path, [1.0, 2.0], [1.0, 2.0])
    records = [record_of("ours", [1.0]), record_of("peft", [1.0], losses=(2.0, 1.01))]
    line = finetune.summarize(*jobs, records)
    assert line["loss"] == pytest.approx(0.01 / 1.01)
    assert not line["holds"]


def test_summarize_has_no_ratio_without_a_quiet_process(tmp_path):
    jobs = jobs_with_gradients(tmp_path, [1.0], [1.0])
    records = [record_of("ours", [1.0]), record_of("peft", [1.0], quiet=False)]
    line = finetune.summarize(*jobs, records)
    assert line["ratio"] is None
    assert "not measured" in finetune.table([line])


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ({"A": [3.0, 4.0]}, 0.0),
        ({"A": [3.0, 4.5]}, 0.1),
        ({"A": [3.0, float("nan")]}, float("inf")),
        ({"B": [3.0, 4.0]}, float("inf")),
    ],
)
def test_largest_difference_is_relative_to_the_norm(ours, expected):
    tensors = {name: torch.tensor(values) for name, values in ours.items()}
    right = {"A": torch.tensor([3.0, 4.0])}
    assert finetune.largest_difference(tensors, right) == pytest.approx(expected)


def test_training_config_has_the_widths_of_2b_and_each_part_in_proportion():
    def count(config):
        with torch.device("meta"):
            model = Qwen2VL(config)
        parts = (model.model.layers, model.visual.blocks, model.lm_head)
        return torch.tensor([sum(p.numel() for p in part.parameters()) for part in parts])

    shares = count(finetune.training_config()) / count(checkpoint.model_config("2b"))
    assert shares.tolist() == pytest.approx([1 / 14] * 3, rel=0.15)
