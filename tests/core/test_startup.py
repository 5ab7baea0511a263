"""Signals, and standard streams that are closed or full, from the first line of each program."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import command_line
import startup

ROOT = Path(__file__).parents[2]
APPS = sorted(path.stem for path in (ROOT / "apps").glob("*.py") if "__main__" in path.read_text())
PROGRAMS = [["generate.py"], *(["-m", f"apps.{name}"] for name in APPS)]

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")

# Stops the process where it imports a module, until a signal comes.
SITE = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["STOP_AT"]:
            os.write(1, b"here")
            signal.pause()

sys.meta_path.insert(0, Finder())
"""


def start(program, tmp_path, stop_at, **options):
    """Start a program that stops where it imports the module `stop_at`."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "STOP_AT": stop_at}
    command = [sys.executable, *program, "--prompt", "x"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **(pipes | options))


# ------------------------------------------------------------------------------------------ signals
@pytest.mark.slow
@posix
@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_ctrl_c_ends_the_imports_of_each_program(program, tmp_path):
    with start(program, tmp_path, "torch") as process:
        assert process.stdout.read(4) == b"here"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (b"", b"")
    assert process.returncode == 130


@pytest.mark.slow
@posix
@pytest.mark.parametrize("module", ["argparse", "numpy", "PIL", "tokenizers", "debug_nan"])
def test_ctrl_c_ends_each_import(module, tmp_path):
    with start(["generate.py"], tmp_path, module) as process:
        assert process.stdout.read(4) == b"here"
        process.send_signal(signal.SIGINT)
        assert process.communicate() == (b"", b"")
    assert process.returncode == 130


def run_in_process(main, number=None):
    """Run `main` as a program whose process gets a signal first; return its exit code."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}

    def signaled():
        if number is not None:
            signal.raise_signal(number)
        return main()

    try:
        with pytest.raises(SystemExit) as caught:
            command_line.run_program("test", signaled)
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    return caught.value.code


@pytest.fixture
def streams(monkeypatch):
    """Keep what `run_program` changes of this process."""
    monkeypatch.setattr(command_line, "prepare_streams", lambda: None)
    monkeypatch.setattr(command_line.warnings, "formatwarning", None)
    monkeypatch.setattr(command_line.linear, "prefer_pytorch_gemv", lambda: None)
    monkeypatch.setattr(command_line.startup, "end_imports", lambda: None)


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_run_program_unwinds_at_a_signal(number, code, streams, capsys):
    cleaned = []

    def main():
        raise AssertionError("the signal came before")

    def cleaning():
        try:
            signal.raise_signal(number)
        finally:
            cleaned.append(1)
        return main()

    assert run_in_process(cleaning) == code
    assert cleaned == [1]
    assert run_in_process(main, number) == code
    assert "Traceback" not in capsys.readouterr().err


def test_run_program_returns_the_code_of_the_program_and_of_argparse(streams):
    assert run_in_process(lambda: 2) == 2
    assert run_in_process(lambda: sys.exit(2)) == 2
    assert run_in_process(lambda: sys.exit()) == 0


def test_garbage_collector_rests_until_the_imports_are_done(tmp_path):
    code = """
import startup; startup.begin()
import gc, command_line
def main():
    print(gc.isenabled(), gc.get_freeze_count() > 100_000)
    return 0
print(gc.isenabled())
command_line.run_program("test", main)
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "False\nTrue True\n"


# ------------------------------------------------------------------------------------------ streams
@posix
def test_run_program_needs_stdout_unless_told_otherwise(streams, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(command_line, "close_output", lambda program, code: code)
    assert run_in_process(lambda: pytest.fail("nobody could get its answer")) == 2
    assert capsys.readouterr().err == "test: stdout is closed, expected it open for the answer\n"


def shell(line, tmp_path, **options):
    """Run a line of the shell in the repository."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    line = f"cd {ROOT} && {line}"
    environment["OUT"] = str(tmp_path / "answers.jsonl")
    return subprocess.run(["sh", "-c", line], capture_output=True, env=environment, **options)


@pytest.mark.slow
@posix
@pytest.mark.parametrize(
    "redirection",
    [
        "2>&-",
        pytest.param(
            "2>/dev/full",
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full"),
        ),
        "2>/dev/full 0<&-",
    ],
)
def test_answer_is_written_whatever_stderr_is(redirection, tmp_path):
    done = shell(f'"$PYTHON" generate.py --prompt "How many?" {redirection}', tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 1
    assert b"loaded" not in done.stdout


@pytest.mark.slow
@posix
def test_error_is_exit_code_2_without_any_stderr(tmp_path):
    done = shell('"$PYTHON" generate.py --image gone.png 2>&-', tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


@pytest.mark.slow
@posix
def test_closed_stdout_is_one_sentence_where_the_answer_goes_there(tmp_path):
    done = shell('"$PYTHON" generate.py --prompt x >&-', tmp_path)
    assert done.returncode == 2
    assert done.stderr == b"generate.py: stdout is closed, expected it open for the answer\n"
    batch = '"$PYTHON" -m apps.batch examples/questions.jsonl --out "$OUT"'
    done = shell(f"{batch} --max-new-tokens 2 >&- 2>&-", tmp_path)
    assert done.returncode == 0
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith('{"line": ') for line in lines)
    assert len(lines) == 3


def test_fill_standard_descriptors_opens_none_but_the_closed_ones(monkeypatch):
    opened = []
    closed = []
    answers = iter([0, 2, 7])  # stdin and stderr are closed

    def open_null(path, flags):
        opened.append(path)
        return next(answers)

    monkeypatch.setattr(os, "open", open_null)
    monkeypatch.setattr(os, "close", closed.append)
    monkeypatch.setattr(os, "set_inheritable", lambda descriptor, inheritable: None)
    startup.fill_standard_descriptors()
    assert opened == [os.devnull] * 3
    assert closed == [7]


def test_lossy_stream_drops_what_cannot_be_written(tmp_path, monkeypatch):
    with open(tmp_path / "a", "w", encoding="ascii") as file:
        stream = command_line.lossy_stream(file)
        print("whole é", file=stream)
        monkeypatch.setattr(os, "write", fail_with(errno.ENOSPC))
        print("lost", file=stream)
        stream.flush()
        assert not stream.isatty()
        assert stream.fileno() == file.fileno()
    assert (tmp_path / "a").read_text() == "whole \\xe9\n"


def fail_with(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_put_names_a_stdout_that_takes_nothing(monkeypatch):
    class Full(io.StringIO):
        write = fail_with(errno.ENOSPC)

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(OSError, match="cannot write the answer to stdout: No space left"):
        command_line.put("x")
