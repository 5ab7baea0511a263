"""output_files.py: nothing is overwritten that was not named for it, nothing is half written."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import output_files
from output_files import check_output, locked, write_file

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX")
ROOT = Path(__file__).parents[2]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------------------- checks
def test_check_output_names_the_missing_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_output(tmp_path / "page.html")
    check_output("page.html")
    with pytest.raises(FileNotFoundError, match=r"cannot write missing/a\.html: .* missing$"):
        check_output("missing/a.html")
    Path("file").write_text("x")
    with pytest.raises(FileNotFoundError, match="there is no directory file"):
        check_output("file/a.html")


@posix
def test_check_output_names_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=r"a\.html: its directory cannot be written"):
        check_output(tmp_path / "a.html")


@posix
@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_check_output_refuses_what_is_no_file(kind, tmp_path):
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(os.devnull)
    with pytest.raises(ValueError, match=r"--out is .*x, expected a file"):
        check_output(path, force=True)


def test_check_output_names_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OSError, match=r"cannot write .*xxx: "):
        check_output(tmp_path / ("x" * 300))


@posix
@pytest.mark.parametrize("kind", ["same", "dotted", "symbolic", "hard", "directory"])
def test_check_output_refuses_an_input_by_any_path(kind, tmp_path):
    source = tmp_path / "input.png"
    source.write_bytes(b"x")
    paths = {"same": source, "dotted": f"{tmp_path}/../{tmp_path.name}/input.png"}
    path = paths.get(kind, tmp_path / "link.png")
    if kind == "symbolic":
        path.symlink_to(source)
    elif kind == "hard":
        os.link(source, path)
    inputs = [tmp_path / "gone.png", "http://x/y.png", "nul\0", source]
    if kind == "directory":
        path = source
        inputs[-1] = tmp_path
    for force in (False, True):
        with pytest.raises(ValueError, match="which is an input: expected another file"):
            check_output(path, inputs, force)


def test_check_output_needs_force_for_a_file_that_exists(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"x")
    with pytest.raises(FileExistsError, match=r"a\.png exists: .* for --out, or --force"):
        check_output(path)
    check_output(path, [tmp_path / "other.png"], force=True)
    with pytest.raises(FileExistsError, match=r"a\.png exists: expected a new file for /save$"):
        check_output(path, option="/save")


# ------------------------------------------------------------------------------------------ writing
def test_write_file_is_whole_or_absent(tmp_path):
    path = tmp_path / "a.png"

    def fail(temporary):
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".png"
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"^cannot write .*a\.png: No space left on device$"):
        write_file(path, fail)
    assert names(tmp_path) == []
    path.write_text("old")
    with pytest.raises(OSError, match="No space"):
        write_file(path, fail)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_write_file_leaves_nothing_of_an_interruption(error, tmp_path):
    def fail(temporary):
        temporary.write_text("half")
        raise error

    with pytest.raises(type(error)):
        write_file(tmp_path / "a.png", fail)
    assert names(tmp_path) == []


@posix
def test_write_file_names_the_file_where_the_disk_is_full(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*a\.bin: File too large"):
            write_file(tmp_path / "a.bin", lambda path: path.write_bytes(bytes(2000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize("has_links", [True, False])
def test_write_file_replaces_only_where_it_is_told(has_links, tmp_path, monkeypatch):
    path = tmp_path / "a.txt"

    def fail(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not has_links:
        monkeypatch.setattr(os, "link", fail)
    write_file(path, lambda temporary: temporary.write_text("first"), replace=False)
    with pytest.raises(FileExistsError, match=r"a\.txt exists: expected a new file"):
        write_file(path, lambda temporary: temporary.write_text("second"), replace=False)
    assert path.read_text() == "first"
    write_file(path, lambda temporary: temporary.write_text("third"))
    assert path.read_text() == "third"
    assert names(tmp_path) == ["a.txt"]


@posix
@pytest.mark.parametrize("replace", [True, False])
def test_write_file_refuses_a_directory_or_device(replace, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "link", "."):
        with pytest.raises(OSError, match="expected a file, got a directory or a device"):
            write_file(tmp_path / name, lambda path: path.write_text("x"), replace)
    assert names(tmp_path) == ["link", "pipe"]
    assert not (tmp_path / "pipe").is_file()


@posix
def test_write_file_keeps_a_link_and_the_mode_of_its_file(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "a.txt"
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    write_file(link, lambda temporary: temporary.write_text("new"))
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640


def test_write_file_works_with_the_longest_name(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    write_file(path, lambda temporary: temporary.write_text("x"), replace=False)
    assert path.read_text() == "x"


# ------------------------------------------------------------------------------------------ locking
@posix
def test_locked_refuses_a_second_run_by_any_path(tmp_path):
    path = tmp_path / "a.jsonl"
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with locked(path):
        for other in (path, link):
            with pytest.raises(BlockingIOError, match="another run is writing"), locked(other):
                pass
        with locked(tmp_path / "b.jsonl"):
            pass
    assert names(tmp_path) == ["link.jsonl"]
    with locked(path):
        pass


def test_locked_is_released_by_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "a"):
        raise KeyboardInterrupt
    with locked(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


@posix
@pytest.mark.slow
def test_locked_is_no_obstacle_after_a_kill(tmp_path):
    code = "import sys, output_files\nwith output_files.locked('a'):\n print('x', flush=True)\n"
    code += " sys.stdin.read()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        process.stdout.readline()
        with pytest.raises(BlockingIOError), locked(tmp_path / "a"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == [".a.lock"]
    with locked(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_locked_lets_one_thread_in_at_a_time(tmp_path):
    """Also where the lock file is removed between its opening and its locking."""
    inside = []
    most = []

    def work():
        for _ in range(200):
            try:
                with locked(tmp_path / "a"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except BlockingIOError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most
    assert set(most) == {1}


@posix
def test_locked_warns_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output_files.fcntl, "flock", fail)
    with pytest.warns(UserWarning, match="a cannot be locked .No locks available."):
        with locked(tmp_path / "a"):
            pass


class WindowsLocks:
    """A stand-in for msvcrt with the outcome of `locking`."""

    LK_NBLCK = 2

    def __init__(self, number):
        self.number = number

    def locking(self, descriptor, mode, length):
        if self.number:
            raise OSError(self.number, "")


def test_locked_uses_msvcrt_on_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(output_files, "fcntl", None)
    monkeypatch.setattr(output_files, "msvcrt", WindowsLocks(0), raising=False)
    with locked(tmp_path / "a"):
        assert names(tmp_path) == [".a.lock"]
    assert names(tmp_path) == []
    monkeypatch.setattr(output_files, "msvcrt", WindowsLocks(errno.EDEADLK))
    with pytest.raises(BlockingIOError, match="another run is writing"), locked(tmp_path / "a"):
        pass
