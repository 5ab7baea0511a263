"""Fixtures and settings that several test files share."""

import sys

import helpers
import pytest
from hypothesis import settings
from real_vocabulary import build_tokenizer

# The same examples in every run, and no time limit for one: a red test is red again when it is looked at.
# `--hypothesis-profile=default` draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def qwen_tokenizer_folder(tmp_path_factory):
    """A folder with the tokenizer files of the published checkpoints, built once per test run."""
    return build_tokenizer(tmp_path_factory.mktemp("qwen_tokenizer"))


@pytest.fixture
def flash(monkeypatch):
    """The stand-in for flash-attn, which works on any device and in any dtype. (Not for every test: transformers
    would find it as well, and take it for the real one.)"""
    module = helpers.flash_attn_stand_in()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module
