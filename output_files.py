"""Files that the programs write: never over an input, whole or not at all, by one run at a time.

    check_output(path, inputs, force)     before any long computation
    write_file(path, write)               under a temporary name, then renamed
    with locked(path): ...                a second run on the same file is refused

Each error is one sentence that names the file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from errors import first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt


# ------------------------------------------------------------------------------------------- checks
def check_directory(path: str | Path) -> None:
    """Raise FileNotFoundError if the directory of an output file is missing.

    Raises PermissionError if nothing can be written there. Called before any long computation.
    """
    directory = Path(os.path.realpath(path)).parent
    if not directory.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {Path(path).parent}")
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"cannot write {path}: its directory cannot be written")


def check_output(
    path: str | Path, inputs: Iterable[str | Path] = (), force: bool = False, option: str = "--out"
) -> None:
    """Raise OSError or ValueError if `path` cannot be written, or holds what must not be lost.

    inputs: files that are read, and directories whose files are read; nothing replaces one of
    these, by whatever path or link. force: whether another file that exists may be replaced.
    option: what gave the path. Devices and pipes are refused: renaming would replace them.
    """
    check_directory(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:  # such as a name that is too long
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{option} is {path}, expected a file")
    for source in inputs:
        if is_same_file(path, source):
            raise ValueError(f"{option} is {path}, which is an input: expected another file")
    if not force:
        hint = ", or --force to replace it" if option == "--out" else ""
        raise FileExistsError(f"{path} exists: expected a new file for {option}{hint}")


def is_same_file(path: str | Path, source: str | Path) -> bool:
    """Return whether two paths lead to one file, or `path` to a file of the directory `source`."""
    try:
        if not os.path.isdir(source):
            return os.path.samefile(path, source)
        file = os.stat(path)
        with os.scandir(source) as entries:
            return any(os.path.samestat(file, os.stat(entry.path)) for entry in entries)
    except (OSError, ValueError):  # a source that cannot be read is refused where it is read
        return False


# ------------------------------------------------------------------------------------------ writing
def write_file(path: str | Path, write: Callable[[Path], object], replace: bool = True) -> None:
    """Call `write` with a temporary path in the same directory, and rename that to `path`.

    Its suffix is that of `path`. A symbolic link stays, and the file that it names is replaced.
    replace: whether a file that exists meanwhile may be.
    Raises OSError naming the file, also for a directory or a device, which a file would replace.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"cannot write {path}: expected a file, got a directory or a device")
    temporary = target.with_name(f".{target.stem[:40]}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        write(temporary)
        rename(temporary, target, replace)
    except MemoryError:
        raise
    except FileExistsError as error:
        raise FileExistsError(f"{path} exists: expected a new file") from error
    except Exception as error:  # the safetensors library has its own for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        raise OSError(f"cannot write {path}: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: dict, ensure_ascii: bool = True) -> None:
    """Write a JSON file by `write_file`. ensure_ascii: escape all characters beyond ASCII."""
    text = json.dumps(values, indent=2, ensure_ascii=ensure_ascii) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def rename(temporary: Path, target: Path, replace: bool) -> None:
    """Rename a file. Raises FileExistsError where `target` exists and is not to be replaced."""
    if replace:
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, it never replaces
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links
        if target.exists():
            raise FileExistsError(errno.EEXIST, "the file exists") from error
        os.replace(temporary, target)


# ------------------------------------------------------------------------------------------ locking
@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the lock of an output file. Raises BlockingIOError where another run holds it.

    The lock belongs to the operating system, which drops it when a process ends in whatever way.
    It is on a file beside the output, since the output itself may be replaced; that file is removed
    at the end, and one that a killed run has left behind is no obstacle.
    """
    target = Path(os.path.realpath(path))
    lock_path = target.with_name(f".{target.name}.lock")
    file = open_locked(path, lock_path)
    try:
        yield
    finally:
        if fcntl is None:  # Windows removes no open file
            file.close()
        with contextlib.suppress(OSError):
            lock_path.unlink()
        file.close()


def open_locked(path: str | Path, lock_path: Path) -> BinaryIO:
    """Return `lock_path` open and locked. Raises BlockingIOError naming `path`."""
    while True:
        try:
            file = open(lock_path, "ab")
        except OSError as error:
            raise OSError(f"cannot write {lock_path}: {error.strerror}") from error
        try:
            lock(file, path)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(lock_path)):
                return file
        except FileNotFoundError:  # a run that has just ended removed it
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def lock(file: BinaryIO, path: str | Path) -> None:
    """Lock an open file, or raise BlockingIOError naming `path`."""
    try:
        if fcntl is None:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            raise BlockingIOError(
                f"another run is writing {path}: wait for its end, or name another file"
            ) from error
        warnings.warn(
            f"{path} cannot be locked ({error.strerror}): make sure that no other run writes it",
            stacklevel=5,
        )
