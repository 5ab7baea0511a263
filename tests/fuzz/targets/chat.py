"""What is typed into apps.chat: questions and commands, in any bytes.

A mistake is one sentence and the conversation continues, until the end of the input.
"""

import contextlib
import io
import logging
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch

from apps.chat import Chat, Console
from command_line import BUNDLED_CHECKPOINT
from load_weights import load_model
from preprocess import Processor
from qwen2vl import Qwen2VL
from tests.fuzz.frame import Target
from tests.fuzz.mutations import byte_mutator

MAX_LINES = 12  # of a mutant that are answered
TOKENS = (
    b"/image /video /save /reset /help /exit // ~ . .. ../ \\ ' \" gone.png data:, file://".split()
)
TOKENS += [b"\n", b"\r\n", b"\r", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x0c"]
TOKENS += [b"<|im_end|>", b"<|image_pad|>", b"<|vision_start|>", b"\n/image examples/wide.png\n"]
TOKENS += [b"data:image/png;base64,", b"\x1b[A", b"\x04", b"\x03", "e\u0301\U0001f642".encode()]


def seeds() -> list[bytes]:
    """Return conversations with all commands."""
    return [
        b"How many?\nAnd now?\n",
        b"/image examples/wide.png\nWhat?\n/save a.json\n/reset\nHello\n",
        b"/video examples/crossing.mp4\nWhat?\n//x\n\n/help\n",
        b"/image 'a b.png'\n/image gone.png\n/nothing\n/save\n/save a.json\n/exit\nnot read\n",
        "Où?\n你好\n".encode(),
    ]


@lru_cache
def model_and_processor() -> tuple[Qwen2VL, Processor]:
    """Return the bundled model, and a processor that makes images and videos small."""
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
    return model, Processor.from_pretrained(BUNDLED_CHECKPOINT, 784, 3136)


class ConfinedChat(Chat):
    """A chat that saves into one directory only."""

    folder = ""

    def save(self, path: str) -> None:
        """Write the conversation as `Chat.save` does, whatever directory the path names."""
        super().save(str(Path(self.folder) / Path(path).name))


class Lines(logging.Handler):
    """Checks that each status line and error is one line."""

    def emit(self, record: logging.LogRecord) -> None:
        assert "\n" not in record.getMessage(), record.getMessage()


def run(data: bytes) -> None:
    """Hold the conversation."""
    if b"http" in data.lower():  # nobody but this machine is asked
        return
    data = b"".join(data.splitlines(keepends=True)[:MAX_LINES])
    stdin = io.TextIOWrapper(io.BytesIO(data), "utf-8", "surrogateescape")
    logger = logging.getLogger("qwen2vl")
    lines_alone = mock.patch.multiple(logger, handlers=[Lines()], propagate=False)
    chat = ConfinedChat(*model_and_processor(), max_new_tokens=3)
    output = io.StringIO()
    given = mock.patch.object(sys, "stdin", stdin)
    with lines_alone, given, tempfile.TemporaryDirectory() as folder:
        chat.folder = folder
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()):
            Console(chat, {"nframes": 2}).run()
    assert output.getvalue().count("\n") <= 4 * MAX_LINES  # three tokens may be line ends


TARGET = Target(seeds, run, mentions="stdin", mutate=byte_mutator(TOKENS), quick_count=150)
