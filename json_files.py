"""Reading the JSON files of a checkpoint: any fault is one sentence that names the file.

Only regular files are read, of at most MAX_BYTES, with values nested at most MAX_DEPTH deep. Links
are followed, wherever they lead: the directories in the cache of the hub's client consist of links.
A link can make this process read another file of its user, but what is read is data (nothing is
executed or sent anywhere), and an error shows at most a short value of it.
"""

import json
import os
import stat
from itertools import chain
from pathlib import Path
from typing import Any

# The largest published file, a tokenizer.json, has 11 MB. Parsed, 32 MiB of nothing but empty
# lists take 0.8 GB (measured).
MAX_BYTES = 2**25
LFS_POINTER = "version https://git-lfs"  # how the file begins that `git` leaves without LFS
MAX_DEPTH = 64  # published files have values nested 6 deep


def has_file(path: Path) -> bool:
    """Return whether there is a regular file at this path, perhaps through links.

    Raises OSError for what is there and is none: a directory, a pipe, a device, a broken link.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise FileNotFoundError(
                f"{path} is a link to {os.readlink(path):.200}, which does not exist"
            ) from error
        return False
    except OSError as error:  # no permission, a circle of links
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: expected a regular file, got {kind_of_file(mode)}")
    return True


def kind_of_file(mode: int) -> str:
    """Return what a path that is no regular file leads to, by its `st_mode`."""
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"


def read_json(folder: str | Path, name: str) -> dict:
    """Return the JSON object in one file of a checkpoint directory.

    Raises OSError or ValueError, naming directory and file.
    """
    path = Path(folder) / name
    if not has_file(path):
        raise FileNotFoundError(f"there is no {name} in {folder}; is that a checkpoint folder?")
    return parse_json(read_text(path), path)


def check_size(path: Path, limit: int = MAX_BYTES) -> int:
    """Return the size of a file in bytes. Raises ValueError if it is larger than the limit."""
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"{path}: expected a file of at most {limit:,} bytes, got {size:,}")
    return size


def read_text(path: Path, limit: int = MAX_BYTES) -> str:
    """Return the text of a file in UTF-8. Raises OSError or ValueError that names the file."""
    size = check_size(path, limit)
    with open(path, "rb") as file:
        # No more than the size: files in /proc have size 0, and reading some of them never ends.
        content = file.read(size)
    try:
        return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a JSON file or text in UTF-8: {error}") from error


def parse_json(text: str, path: Path) -> dict:
    """Return the JSON object in a text. Raises ValueError that names the file."""
    if text.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer: run `git lfs pull` in {path.parent}")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a usable JSON file: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    if is_deeper_than(content, MAX_DEPTH):
        raise ValueError(f"{path} is not a usable JSON file: it is nested too deeply")
    return content


def is_deeper_than(content: dict, limit: int) -> bool:
    """Return whether objects and lists are nested more than `limit` deep.

    Printing, copying or writing such a value could exceed Python's recursion limit.
    """
    level: list[Any] = [content]
    for _ in range(limit):
        values = chain.from_iterable(  # of a dict its values, not its keys
            container.values() if type(container) is dict else container for container in level
        )
        level = [value for value in values if type(value) is list or type(value) is dict]
        if not level:
            return False
    return True


def read_optional_json(path: Path) -> dict:
    """Return the JSON object in `path`, or an empty one if there is no such file.

    Raises OSError or ValueError for a file that is there and cannot be used.
    """
    return parse_json(read_text(path), path) if has_file(path) else {}
