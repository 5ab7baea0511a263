"""Reading the JSON files of a checkpoint: any fault is one sentence that names the file."""

import json
from pathlib import Path


def read_json(folder: str | Path, name: str) -> dict:
    """Return the JSON object in one file of a checkpoint directory.

    Raises FileNotFoundError or ValueError, naming directory and file.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name} in {folder}; is that a checkpoint folder?")
    return parse_json(read_text(path), path)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a JSON file or text in UTF-8: {error}") from error


def parse_json(text: str, path: Path) -> dict:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a usable JSON file: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


def read_optional_json(path: Path) -> dict:
    """Return the JSON object in `path`, or an empty one if there is no such file."""
    return parse_json(read_text(path), path) if path.is_file() else {}
