"""Run the quick tests with the oldest and the newest versions of everything, each from scratch.

    python -m tests.versions                          # every environment, one after the other
    python -m tests.versions newest --python python3.13
    python -m tests.versions oldest --directory /tmp/venvs --tests tests/core/test_video.py

Each environment is a new venv in a temporary directory, which is removed at the end (with
--directory it is kept, and used again). Packages come from where pip is set up to look; on Linux
PyTorch brings its CUDA libraries, about 6 GB an environment. What was installed and how the tests
ended is printed as a line of the table in tests/README.md. The exit code is 1 if anything failed.

    locked      requirements-dev.txt: what the project is tested with
    oldest      the lower bounds of pyproject.toml. The references (transformers, peft) do not run
                with them, so the tests that compare with them are skipped, see conftest.py
    reference   the lower bounds that leave the reference something to run with: all but those of
                tokenizers, huggingface_hub and safetensors, whose ranges it narrows
    newest      the newest of everything in pyproject.toml, with the reference as locked
"""

import argparse
import datetime
import os
import re
import signal
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ("locked", "oldest", "reference", "newest")
NARROWED = ("tokenizers", "huggingface_hub", "safetensors")  # by the reference
NOT_NEEDED = ("ruff", "mypy", "jupyterlab")  # by the tests
REFERENCES = ("transformers", "peft")  # peft would bring an old transformers
LIST_VERSIONS = """
import importlib.metadata, platform, sys
packages = [f"{name} {importlib.metadata.version(name)}" for name in sys.argv[1:]]
print(platform.python_version(), ", ".join(packages), sep=" | ")
"""


def requirement_lines(path: Path) -> list[str]:
    """Return the requirements of one file, without comments and without other files (`-r`)."""
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


def package_name(requirement: str) -> str:
    """Return the name in a requirement such as "numpy>=2"."""
    return re.split(r"[<>=!~\[; ]", requirement, maxsplit=1)[0]


def lower_bound(requirement: str) -> str:
    """Return a requirement with its lower bound as the only version: numpy>=2 → numpy==2."""
    return requirement.replace(">=", "==")


def requirements(environment: str) -> list[str]:
    """Return the arguments of `pip install` for an environment."""
    if environment == "locked":
        return ["-r", str(ROOT / "requirements-dev.txt")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    ours = project["project"]["dependencies"]
    for_tests = requirement_lines(ROOT / "requirements-dev.txt")
    for_tests += requirement_lines(ROOT / "requirements-notebooks.txt")
    for_tests = [line for line in for_tests if package_name(line) not in NOT_NEEDED]
    if environment == "newest":
        return ["--upgrade", *ours, *for_tests]
    if environment == "oldest":
        for_tests = [line for line in for_tests if package_name(line) not in REFERENCES]
        return [*map(lower_bound, ours), *for_tests]
    pinned = [lower_bound(line) for line in ours if package_name(line) not in NARROWED]
    narrowed = [line for line in ours if package_name(line) in NARROWED]
    return [*pinned, *narrowed, *for_tests]


def run(command: list[str | Path], **options) -> subprocess.CompletedProcess:
    """Print a command and run it."""
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, check=False, text=True, **options)


def build(environment: str, python: str, directory: Path) -> str | None:
    """Make the venv of an environment; return what is wrong with it, or None."""
    interpreter = directory / "bin" / "python"
    if not interpreter.exists():
        if run([python, "-m", "venv", directory]).returncode:
            return "no venv"
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check"]
    if run([*pip, "install", "--quiet", *requirements(environment)]).returncode:
        return "not installed"
    if run([*pip, "check"]).returncode:
        return "pip check failed"
    return None


def run_tests(directory: Path, tests: list[str]) -> str:
    """Run the quick tests in a venv; return the last line of pytest, such as "9 passed in 2s"."""
    command = [directory / "bin" / "python", "-m", "pytest", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-rf", *tests]
    # On CPU and with one thread everywhere, so that the environments differ in versions only.
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = run(command, env=os.environ | settings, stdout=subprocess.PIPE)
    print(result.stdout, flush=True)
    lines = result.stdout.strip().splitlines() or ["no output"]
    ending = re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= "))
    return ending if result.returncode == 0 else f"FAILED: {ending}"


def table_line(environment: str, directory: Path, ending: str) -> str:
    """Return the line of the table for an environment that was built."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    names = [package_name(line) for line in project["project"]["dependencies"]]
    command = [directory / "bin" / "python", "-c", LIST_VERSIONS, *names]
    result = run(command, stdout=subprocess.PIPE)
    versions = result.stdout.strip() or "? | ?"
    today = datetime.date.today().isoformat()
    return f"| {environment} | {today} | {versions} | {ending} |"


def check(environment: str, python: str, directory: Path, tests: list[str]) -> tuple[str, bool]:
    """Build an environment and run the tests; return its line of the table, and whether it held."""
    problem = build(environment, python, directory)
    ending = run_tests(directory, tests) if problem is None else f"FAILED: {problem}"
    return table_line(environment, directory, ending), not ending.startswith("FAILED")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("environments", nargs="*", metavar="ENVIRONMENT")
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the venvs")
    parser.add_argument("--directory", type=Path, help="keep the venvs here, and use them again")
    parser.add_argument("--tests", nargs="+", default=[], help="arguments of pytest")
    arguments = parser.parse_args(argv)
    for name in arguments.environments:
        if name not in ENVIRONMENTS:
            parser.error(f"expected environments among {', '.join(ENVIRONMENTS)}, got {name}")
    # A shell starts background jobs with SIGINT ignored, which children inherit; the tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lines = []
    all_held = True
    with tempfile.TemporaryDirectory() as temporary:
        parent = arguments.directory or Path(temporary)
        for name in arguments.environments or ENVIRONMENTS:
            line, held = check(name, arguments.python, parent / name, arguments.tests)
            lines.append(line)
            all_held = all_held and held
    print(*lines, sep="\n")
    return 0 if all_held else 1


if __name__ == "__main__":
    sys.exit(main())
