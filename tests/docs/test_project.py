"""The project files: what `pyproject.toml` declares exists, and its ranges contain the lock."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked_versions():
    """Return {package: version} of requirements.txt."""
    versions = {}
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement:
            name, version = requirement.split("==")
            versions[name] = version
    return versions


def test_pyproject_lists_the_modules_at_the_top_level():
    modules = PROJECT["tool"]["setuptools"]["py-modules"]
    assert sorted(modules) == sorted(path.stem for path in ROOT.glob("*.py"))


def test_pyproject_lists_the_directories_with_init_file():
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


def test_pyproject_ranges_contain_the_locked_versions():
    requirements = pytest.importorskip("packaging.requirements")
    ranges = [requirements.Requirement(line) for line in PROJECT["project"]["dependencies"]]
    versions = locked_versions()
    assert sorted(item.name for item in ranges) == sorted(versions)
    for item in ranges:
        assert item.specifier.contains(versions[item.name]), item


def test_pyproject_type_checks_files_that_exist():
    for name in PROJECT["tool"]["mypy"]["files"]:
        assert (ROOT / name).exists(), name


def test_citation_file_has_the_required_keys():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["version"] == PROJECT["project"]["version"]
    [paper] = citation["references"]
    assert paper["url"].endswith("/2409.12191")
