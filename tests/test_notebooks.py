"""Every notebook of the course: runs from top to bottom offline, and is committed whole and clean."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# Runs before a notebook's own first cell: from then on Python reaches nothing but this machine.
OFFLINE = """
import socket

def offline(address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a notebook reached for the network: {address}")

def guarded(function):
    def connect(self, address):
        offline(address)
        return function(self, address)
    return connect

def guarded_lookup(function):
    def getaddrinfo(host, *rest, **more):
        offline((host or "localhost",))
        return function(host, *rest, **more)
    return getaddrinfo

socket.socket.connect = guarded(socket.socket.connect)
socket.socket.connect_ex = guarded(socket.socket.connect_ex)
socket.getaddrinfo = guarded_lookup(socket.getaddrinfo)
"""
# Runs after its last cell: the first one must also find the repository when the kernel was started in its root.
FROM_ROOT = "import os; os.chdir({root!r}); get_ipython().run_cell({first!r}).raise_error()"

MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(home|Users|root|tmp|work|usr|opt|var|mnt|private)/|\b[A-Z]:\\\\?\w"
)


def source_cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def solutions(notebook):
    """The Python blocks of the last cell's folded text: <details> folds in JupyterLab and in exported pages; a
    cell that is marked hidden does so in JupyterLab alone."""
    folded = re.findall(r"<details>(.*?)</details>", notebook.cells[-1].source, re.DOTALL)
    return [
        block
        for text in folded
        for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]


def output_texts(cell):
    """Everything in a code cell's outputs that is text: streams, values, tables; not the pictures."""
    for output in cell.outputs:
        yield output.get("text", "")
        for kind, value in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield str(value)


def test_there_are_notebooks_and_the_readme_lists_them():
    assert NOTEBOOKS
    readme = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"({path.name})" not in readme] == []


@every_notebook
def test_it_runs_from_top_to_bottom_offline_and_so_do_its_solutions(path, tmp_path, monkeypatch):
    # The kernel inherits these. Its history and connection files stay out of the user's folders.
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    monkeypatch.setenv("PYTHONPATH", "")  # the notebook finds the repository by itself
    notebook = nbformat.read(path, as_version=4)
    first = source_cells(notebook, "code")[0].source
    added = [*solutions(notebook), FROM_ROOT.format(root=str(ROOT), first=first)]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(OFFLINE))
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in added]
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()


@every_notebook
def test_it_is_committed_with_the_outputs_of_one_whole_run(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = source_cells(notebook, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"] == []
    assert not any(o.output_type == "error" for o in outputs)
    assert any("image/png" in o.get("data", {}) for o in outputs), "there is no picture in it"


@every_notebook
def test_it_is_small_and_says_nothing_about_the_machine_it_ran_on(path):
    assert path.stat().st_size <= 400 * 1024
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells]
    texts += [text for cell in source_cells(notebook, "code") for text in output_texts(cell)]
    assert [match[0] for text in texts for match in MACHINE_PATH.finditer(text)] == []
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert [
        cell.metadata for cell in notebook.cells if cell.metadata
    ] == []  # an editor keeps times there


@every_notebook
def test_it_opens_with_what_you_will_know_and_closes_with_three_exercises(path):
    notebook = nbformat.read(path, as_version=4)
    opening = notebook.cells[0]
    assert opening.cell_type == "markdown"
    assert opening.source.startswith("# ")
    assert re.search("you will know", opening.source, re.IGNORECASE)
    exercises = [
        cell.source
        for cell in source_cells(notebook, "markdown")
        if re.search(r"^#+ Exercises", cell.source, re.M)
    ]
    assert len(exercises) == 1
    assert re.findall(r"^(\d)\. ", exercises[0], re.MULTILINE) == ["1", "2", "3"]
    assert notebook.cells[-1].source.startswith("<details>\n<summary>")
    assert re.findall(r"^\*\*(\d)\.\*\*", notebook.cells[-1].source, re.MULTILINE) == [
        "1",
        "2",
        "3",
    ]
    assert solutions(notebook), "no solution has code"


def test_the_guard_against_the_network_works():
    probe = (
        OFFLINE + "\nimport urllib.request\nurllib.request.urlopen('http://192.0.2.1', timeout=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "OSError: a notebook reached for the network: ('192.0.2.1',)" in done.stderr
