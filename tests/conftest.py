"""Fixtures and settings that several test modules share."""

import sys

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
