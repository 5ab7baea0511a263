"""The frame of the fuzzers, some mutants of each target, and every input that once failed."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import __main__ as program
from tests.fuzz import frame
from tests.fuzz.targets import weights

NAMES = frame.target_names()
CASES = [(name, path.name) for name in NAMES for path in frame.case_files(name)]

# A target whose mutants are right, refused, foreign, without end, a crash, or nameless by number.
ODD_TARGET = """
import os
from tests.fuzz.frame import Target

def run(data):
    if data == b"refused":
        raise ValueError("cannot read x.json: expected an object")
    if data == b"nameless":
        raise ValueError("expected an object")
    if data == b"lines":
        raise OSError("x.json is\\ndamaged")
    if data == b"foreign":
        raise KeyError("x.json")
    if data == b"crash":
        os._exit(3)
    if data == b"large":
        b"x" * 2**27
    while data == b"hang":
        pass

KINDS = [b"right", b"refused", b"foreign", b"crash", b"hang", b"nameless", b"lines", b"large"]
TARGET = Target(
    lambda: [b"right"], run, "x.json", lambda random, seeds: KINDS[random.randrange(8)],
    seconds=1.0, megabytes=60.0,
)
"""


@pytest.fixture
def odd_target(tmp_path, monkeypatch):
    """The name of a target that is no part of the repository."""
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "__init__.py").write_text("")
    (tmp_path / "odd" / "target.py").write_text(ODD_TARGET)
    monkeypatch.syspath_prepend(tmp_path)
    return "odd.target"


def numbers_by_kind(name):
    """Return the number of one mutant of each kind."""
    found = {}
    for number in range(200):
        found.setdefault(frame.make_mutant(name, 0, number).decode(), number)
    return found


@pytest.mark.slow
def test_run_mutants_classifies_outcomes_and_continues_after_failures(odd_target):
    numbers = numbers_by_kind(odd_target)
    kinds = ["right", "foreign", "crash", "hang", "refused", "nameless", "lines", "large", "right"]
    expected = ["right", "foreign", "foreign", "hang", "refused"]
    expected += ["foreign", "foreign", "memory", "right"]
    outcomes = dict(enumerate(frame.run_mutants(odd_target, 0, [numbers[kind] for kind in kinds])))
    assert [outcomes[index][1].kind for index in range(len(kinds))] == expected
    assert outcomes[2][1].detail == "the process ended with code 3"
    assert outcomes[4][1].detail == "cannot read x.json: expected an object"


@pytest.mark.slow
def test_run_mutants_computes_in_one_thread(tmp_path, monkeypatch):
    code = "import torch\nfrom tests.fuzz.frame import Target\ndef run(data):\n"
    code += "    assert torch.get_num_threads() == 1\nTARGET = Target(lambda: [b''], run, '')\n"
    (tmp_path / "threaded").mkdir()
    (tmp_path / "threaded" / "target.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert list(frame.run_mutants("threaded.target", 0, [0])) == [(0, frame.Outcome(frame.RIGHT))]


def test_make_mutant_depends_on_seed_and_number_alone():
    mutants = [frame.make_mutant("images", 0, number) for number in range(50)]
    assert mutants == [frame.make_mutant("images", 0, number) for number in range(50)]
    assert len(set(mutants)) > 40
    assert mutants != [frame.make_mutant("images", 1, number) for number in range(50)]


def test_weights_mutant_holds_the_files_that_it_names():
    undamaged = weights.undamaged_files()
    sharded = {name: content for name, content in undamaged.items() if "model-" in name}
    files = sharded | {weights.INDEX: b"{}", "x": sharded["model-00001-of-00002.safetensors"]}
    mutant = weights.pack(files, undamaged)
    assert weights.unpack(mutant) == weights.unpack(weights.pack(files)) == files
    assert len(mutant) < 300  # undamaged files are named
    names = [set(weights.unpack(frame.make_mutant("weights", 0, n))) for n in range(400)]
    assert {"model.safetensors"} in names  # one file
    assert {*sharded, weights.INDEX} in names
    assert {weights.INDEX, "model.safetensors"} in names  # an index left over
    assert {weights.INDEX, "model-00001-of-00002.safetensors"} in names  # a shard missing


@pytest.mark.slow
def test_weights_target_compares_the_answer_where_no_tensor_is_damaged(monkeypatch):
    target, seeds = frame.load_target("weights")
    assert [frame.judge(target, data).kind for data in seeds] == [frame.RIGHT] * 2
    other = weights.undamaged_logits() + 1
    monkeypatch.setattr(weights, "undamaged_logits", lambda: other)
    assert [frame.judge(target, data).kind for data in seeds] == [frame.FOREIGN] * 2


@pytest.mark.slow
def test_seeds_are_the_same_in_another_process():
    code = "from tests.fuzz import frame; import hashlib; "
    code += "print([hashlib.sha256(b''.join(frame.load_target(name)[1])).hexdigest() "
    code += "for name in frame.target_names()])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    ours = [hashlib.sha256(b"".join(frame.load_target(name)[1])).hexdigest() for name in NAMES]
    assert done.stdout == f"{ours}\n", done.stderr


def test_fuzz_returns_what_was_counted_before_ctrl_c(monkeypatch):
    def interrupted(*arguments):
        yield 0, frame.Outcome(frame.RIGHT)
        yield 1, frame.Outcome(frame.HANG)
        raise KeyboardInterrupt

    monkeypatch.setattr(frame, "run_mutants", interrupted)
    tally = frame.fuzz("images", 0, range(9))
    assert tally.is_interrupted
    assert tally.kinds == {frame.RIGHT: 1, frame.HANG: 1}
    assert tally.failures == [(1, frame.Outcome(frame.HANG))]


@pytest.mark.slow
def test_main_returns_1_and_saves_what_failed(odd_target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frame, "target_names", lambda: [odd_target])
    numbers = numbers_by_kind(odd_target)
    options = ["--mutants", "1", "--out", str(tmp_path)]
    assert program.main([*options, "--first", str(numbers["right"])]) == 0
    assert program.main([*options, "--first", str(numbers["foreign"])]) == 1
    output = capsys.readouterr()
    assert f"| {odd_target} | 1 | 0 | 0 | 1 | 0 | 0 |" in output.out
    assert "foreign: KeyError: 'x.json' (target.py:13" in output.err
    assert [path.read_bytes() for path in (tmp_path / odd_target).iterdir()] == [b"foreign"]


@pytest.mark.sweep
@pytest.mark.parametrize("name", NAMES)
def test_target_accepts_its_seeds(name):
    target, seeds = frame.load_target(name)
    outcomes = [frame.judge(target, data) for data in seeds]
    assert [outcome for outcome in outcomes if outcome.kind != frame.RIGHT] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_target_answers_or_refuses_its_mutants(name):
    target, _ = frame.load_target(name)
    failures = []
    for number in range(target.quick_count):
        outcome = frame.judge(target, frame.make_mutant(name, 0, number))
        if outcome.kind in frame.FAILURES:
            failures.append((number, outcome))
    assert failures == []


@pytest.mark.parametrize(("name", "file"), CASES)
def test_target_answers_or_refuses_what_once_failed(name, file):
    target, _ = frame.load_target(name)
    outcome = frame.judge(target, (frame.CASES / name / file).read_bytes())
    assert outcome.kind not in frame.FAILURES, outcome.detail
