"""One line about an exception, for a sentence that names its source."""

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager

MAX_REASON = 300  # characters of a foreign message: some quote a whole response or file


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or the name of its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:MAX_REASON] if lines else type(error).__name__


def one_line(text: object) -> str:
    """Return a text without line breaks, as every error and warning is one line."""
    return " ".join(str(text).split())


def error_reason(error: BaseException) -> str:
    """Return what an exception of a foreign library specifies: one line, bounded and never empty.

    An HTTP client, for example, quotes all of a line that it cannot parse.
    """
    text = one_line(getattr(error, "strerror", None) or error)[:MAX_REASON]
    if isinstance(error, OSError | ValueError | SyntaxError) and text:
        return text
    return f"{type(error).__name__}: {text}".removesuffix(": ")


@contextmanager
def naming(source: str) -> Iterator[None]:
    """Name the source in a ValueError of the block, which does not know it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def printable(name: str) -> str:
    """Return a name of a file's for a message: in quotes and shortened where it is not ordinary."""
    if len(name) <= 200 and name.isprintable():
        return name
    return reprlib.repr(name)
