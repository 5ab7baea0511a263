"""benchmarks/long_videos.py: medians of quiet processes, and unequal patches do not count.

The peers are not installed for the tests, so both sides are ours here.
"""

import contextlib
import io
import json

import numpy as np
import pytest

from benchmarks import long_videos, workers


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A directory that looks like that of the peers, and a short, small video."""
    monkeypatch.setattr(long_videos, "SECONDS", 3)
    monkeypatch.setattr(long_videos, "SIZE", (640, 480))
    (tmp_path / "qwen_vl_utils").mkdir()
    return tmp_path


def run_here(job, options, say):
    """Run a job as a worker does, but in this process, and return its records as quiet ones."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        workers.JOBS[job["kind"]](job | {"threads": 1})
    return [json.loads(output.getvalue().removeprefix("result ")) | {"quiet": True}]


def arguments(packages):
    return ["--packages", str(packages), "--frames", "4", "6", "--repetitions", "2"]


def test_main_compares_equal_patches_in_turns(packages, monkeypatch, capsys):
    ran = []

    def run_and_note(job, options, say):
        ran.append((job["side"], job["frames"]))
        return run_here(job, options, say)

    monkeypatch.setattr(long_videos, "run_quietly", run_and_note)
    monkeypatch.setitem(long_videos.MAKE, "peer", long_videos.make_ours)
    assert long_videos.main(arguments(packages)) == 0
    turn = [("ours", 4), ("peer", 4), ("ours", 6), ("peer", 6)]
    assert ran == turn + turn[::-1]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["4", "6"]
    assert all(row.endswith("| 0.0000 |") for row in rows)


@pytest.mark.parametrize("fault", ["values", "grid"])
def test_main_fails_where_the_patches_differ(fault, packages, monkeypatch):
    def make_wrong(job):
        preprocess = long_videos.make_ours(job)

        def preprocess_wrongly(path, frames):
            patches, grid = preprocess(path, frames)
            return (patches + 0.1, grid) if fault == "values" else (patches, grid[:, ::-1])

        return preprocess_wrongly

    monkeypatch.setattr(long_videos, "run_quietly", run_here)
    monkeypatch.setitem(long_videos.MAKE, "peer", make_wrong)
    assert long_videos.main(arguments(packages)) == 1


def record(seconds, is_quiet=True):
    values = {"start": 5.0, "end": 5.0 + seconds, "quiet": is_quiet, "grid": [[2, 4, 4]]}
    return values | {"patch_bytes": 100, "peak_bytes": 100 * seconds}


def test_summarize_takes_the_medians_of_quiet_processes(tmp_path):
    for side in ("ours", "peer"):
        np.save(tmp_path / f"{side}-8.npy", np.zeros(3))
    records = {
        ("ours", 8): [record(1.0), record(2.0), record(9.0, is_quiet=False), record(3.0)],
        ("peer", 8): [record(6.0, is_quiet=False)],
    }
    line = long_videos.summarize(8, records, tmp_path)
    assert line.seconds == {"ours": 2.0, "peer": 6.0}
    assert line.memory == {"ours": 2.0, "peer": 6.0}
    assert line.spread == 1.0
    assert "| 8 | 4.0 | 3.00× | 100% | 2.00× | 6.00× | 0.0000 |" in long_videos.table([line])


@pytest.mark.parametrize("frames", ["3", "1601"])
def test_frames_must_be_possible(frames, packages, capsys):
    with pytest.raises(SystemExit):
        long_videos.parse_arguments(["--packages", str(packages), "--frames", frames])
    assert f"--frames is [{frames}], expected 4 to 75" in capsys.readouterr().err


def test_packages_must_hold_the_peers(tmp_path, capsys):
    with pytest.raises(SystemExit):
        long_videos.parse_arguments(["--packages", str(tmp_path)])
    assert "has no directory qwen_vl_utils" in capsys.readouterr().err
