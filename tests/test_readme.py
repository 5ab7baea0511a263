"""What the README shows is run: its commands, its Python, its links and the answer that it prints."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from extras import command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
# The first two set up and test; `.ci/run` runs them, as this file is part of the second.
OTHERS = COMMANDS[2:]


@pytest.fixture
def workplace(tmp_path):
    """A folder that looks like the repository, for commands that write into it."""
    for path in ROOT.iterdir():
        if not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def run(line, folder):
    return subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=folder, capture_output=True, text=True)


def test_the_first_two_blocks_are_setup_and_tests():
    assert COMMANDS[0].startswith("python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && ")
    assert "generate.py --image examples/" in COMMANDS[0]
    assert COMMANDS[1].startswith(".venv/bin/pip install -r requirements-dev.txt && ")
    assert COMMANDS[1].endswith("-m pytest")


@pytest.mark.parametrize("line", [line for line in OTHERS if "Qwen/" not in line])
def test_each_command_runs(line, workplace):
    done = run(line, workplace)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() or "--out" in line
    if "--out" in line:
        assert "error" not in (workplace / shlex.split(line)[-1]).read_text()


@pytest.mark.parametrize("line", [line for line in OTHERS if "Qwen/" in line])
def test_each_command_that_downloads_has_valid_options(line):
    words = shlex.split(line)
    assert words[:2] == [".venv/bin/python", "generate.py"]
    assert command_line.parse_arguments(words[2:]).model.startswith("Qwen/")


def test_the_answer_shown_is_the_answer_given(workplace):
    line, answer = re.search(r"^    \$ (.+)\n    (.+)$", README, flags=re.MULTILINE).groups()
    assert run(line, workplace).stdout.strip() == answer


def test_the_python_shown_runs():
    [text] = [text for kind, text in BLOCKS if kind == "python"]
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("page", ["README.md", "tiny/README.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("https://"):
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_requirements_are_pinned():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            wanted = line.split("#")[0].strip()
            assert not wanted or wanted.startswith("-r ") or re.fullmatch(r"[\w-]+==[\d.]+", wanted), line


def test_the_table_of_ideas_links_to_the_right_lines():
    links = re.findall(r"\[`(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert len(links) > 15
    wrong = []
    for name, file, line in links:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        [right] = [n for n, text in enumerate(lines, 1) if re.match(rf" *(def|class) {name}\b", text)]
        if right != int(line):
            wrong.append(f"{name}: {file}#L{right}")
    assert not wrong
