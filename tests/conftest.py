"""Fixtures and settings that several test modules share."""

import importlib.abc
import importlib.machinery
import importlib.util
import signal
import sys
import types

import helpers
import pytest
import torch
from example_batches import load_tiny
from hypothesis import settings
from real_vocabulary import build_tokenizer

from command_line import BUNDLED_CHECKPOINT
from preprocess import Processor

# The same examples in every run, without a deadline, so that a failure repeats.
# `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


class SkippingModule(types.ModuleType):
    """A module in the place of one that is not installed: what uses it is skipped."""

    __file__ = None
    __path__ = ()

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return SkippingModule(f"{self.__name__}.{name}")

    def __call__(self, *arguments, **options):
        pytest.skip(f"{self.__name__} is not installed")

    __getitem__ = __sub__ = __iter__ = __call__


REFERENCES = ("transformers", "peft")  # peft needs transformers


class ReferenceFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find transformers and peft, with their submodules, where transformers is not installed.

    So that the tests run with versions of other packages that it cannot be installed with.
    """

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in REFERENCES:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return SkippingModule(spec.name)

    def exec_module(self, module):
        pass


if importlib.util.find_spec("transformers") is None:
    sys.meta_path.append(ReferenceFinder())


def pytest_report_header():
    """Return the line that says that the reference is missing."""
    if any(isinstance(finder, ReferenceFinder) for finder in sys.meta_path):
        return "transformers is not installed: tests that compare with it or with peft are skipped"
    return None


def pytest_collection_modifyitems(items):
    """Mark as slow what opens a browser, and all tests of a `sweep` but the first."""
    seen = set()
    for item in items:
        if item.get_closest_marker("browser") is not None:
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("sweep") is None:
            continue
        function = item.nodeid.partition("[")[0]
        if function in seen:
            item.add_marker(pytest.mark.slow)
        seen.add(function)


@pytest.fixture(scope="session")
def qwen_tokenizer_folder(tmp_path_factory):
    """Return a directory with the published tokenizer files, built once per test run."""
    return build_tokenizer(tmp_path_factory.mktemp("qwen_tokenizer"))


@pytest.fixture(scope="module")
def processor():
    """Return the processor of the bundled checkpoint."""
    return Processor.from_pretrained(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def tiny():
    """Return the bundled model in float32 on the CPU."""
    return load_tiny()


@pytest.fixture
def no_gradients():
    """Run the test without recording gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def flash(monkeypatch):
    """Install the substitute for flash-attn, which supports every device and dtype.

    Only for tests without transformers, which would import it as the real package.
    """
    module = helpers.fake_flash_attn()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the handlers of signals, which `command_line.run_program` replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
