"""Each notebook runs offline from top to bottom, and is committed with the outputs of one run."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from notebooks import plots

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

MAX_BYTES = 400 * 1024
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(home|Users|root|tmp|work|usr|opt|var|mnt|private)/|\b[A-Z]:\\\\?\w"
)

# Runs before the first cell: from then on Python reaches nothing but this machine.
OFFLINE = """
import socket


def check_local(address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a notebook reached for the network: {address}")


def guard_connect(function):
    def connect(self, address):
        check_local(address)
        return function(self, address)

    return connect


def guard_lookup(function):
    def getaddrinfo(host, *arguments, **options):
        check_local((host or "localhost",))
        return function(host, *arguments, **options)

    return getaddrinfo


socket.socket.connect = guard_connect(socket.socket.connect)
socket.socket.connect_ex = guard_connect(socket.socket.connect_ex)
socket.getaddrinfo = guard_lookup(socket.getaddrinfo)
"""


def read_cells(path: Path, cell_type: str) -> list:
    """Return the cells of one type of a notebook."""
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == cell_type]


def read_outputs(path: Path) -> list:
    """Return the outputs of all code cells of a notebook."""
    return [output for cell in read_cells(path, "code") for output in cell.outputs]


def output_texts(path: Path) -> list[str]:
    """Return all text of the outputs of a notebook: streams, values and tables, but no images."""
    texts = []
    for output in read_outputs(path):
        texts.append(output.get("text", ""))
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/"):
                texts.append(str(value))
    return texts


def read_solutions(path: Path) -> list[str]:
    """Return the Python blocks in the folded last cell of a notebook."""
    last = read_cells(path, "markdown")[-1].source
    assert last.startswith("<details>\n<summary>")
    return re.findall(r"^```python\n(.*?)^```", last, re.DOTALL | re.MULTILINE)


def test_notebooks_readme_lists_each_notebook():
    readme = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert NOTEBOOKS
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in readme] == []


@pytest.mark.slow
@each_notebook
def test_notebook_runs_offline_with_its_solutions(path, tmp_path, monkeypatch):
    # The kernel inherits these. Its history and connection files go to a temporary directory.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this repository, if another one is installed
    notebook = nbformat.read(path, as_version=4)
    solutions = read_solutions(path)
    assert solutions
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    for source in solutions:
        notebook.cells.append(nbformat.v4.new_code_cell(source))
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()


@each_notebook
def test_notebook_is_committed_with_the_outputs_of_one_run(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    counts = [cell.execution_count for cell in read_cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1))
    outputs = read_outputs(path)
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert [output for output in outputs if output.output_type == "error"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)


@each_notebook
def test_notebook_is_small(path):
    assert path.stat().st_size <= MAX_BYTES


@each_notebook
def test_notebook_names_no_path_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells] + output_texts(path)
    assert [match[0] for text in texts for match in MACHINE_PATH.finditer(text)] == []


@each_notebook
def test_notebook_has_no_metadata_of_an_editor(path):
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []


@each_notebook
def test_notebook_has_three_exercises_with_solutions(path):
    *_, exercises, solutions = read_cells(path, "markdown")
    assert re.findall(r"^(\d)\. ", exercises.source, re.MULTILINE) == ["1", "2", "3"]
    assert re.findall(r"^\*\*(\d)\.\*\*", solutions.source, re.MULTILINE) == ["1", "2", "3"]


@each_notebook
def test_notebook_leaves_drawing_to_plots(path):
    sources = [cell.source for cell in read_cells(path, "code")]
    assert [source for source in sources if "matplotlib" in source] == []
    assert sum("plots." in source for source in sources) > 5


def test_plots_has_no_unused_function():
    sources = [inspect.getsource(plots)]
    for path in NOTEBOOKS:
        sources += [cell.source for cell in read_cells(path, "code")] + read_solutions(path)
    text = "\n".join(sources)
    functions = [name for name, _ in inspect.getmembers(plots, inspect.isfunction)]
    assert [name for name in functions if len(re.findall(rf"\b{name}\(", text)) < 2] == []


def test_offline_guard_refuses_the_network():
    fetch = "import urllib.request\nurllib.request.urlopen('http://192.0.2.1', timeout=1)"
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE + fetch], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "OSError: a notebook reached for the network: ('192.0.2.1',)" in result.stderr
