"""Checks of configuration values from JSON files: a field's annotation names what it accepts.

And the one field of generation_config.json that a run's memory depends on (`new_token_limit`).

@dataclass
class SomeConfig:
    width: Size = 64
    theta: Positive | None = None

    def __post_init__(self):
        check_fields(self)
"""

import math
import reprlib
from collections.abc import Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np

Size = int  # a positive integer
Count = int  # an integer of at least 0
Pixels = int  # a positive integer, perhaps of more than 32 bits
Positive = float  # a positive number
Share = float  # a number above 0 and at most 1
Probability = float  # a number from 0 to 1
Texts = list[str]  # strings that are not empty
Channels = Sequence[float]  # one number for R, G and B, or three
PositiveChannels = Sequence[float]

DEFAULT_NEW_TOKENS = 128  # where neither the caller nor generation_config.json gives a number


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether the value is an integer, not a boolean, that fits into 32 bits."""
    return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**31


def is_number(value: object) -> TypeGuard[float]:
    """Return whether the value is a 32-bit integer or a finite float; a boolean is neither."""
    if isinstance(value, Integral):
        return is_integer(value)
    return isinstance(value, Real) and math.isfinite(value)


def is_size(value: object) -> bool:
    """Return whether the value is a positive integer."""
    return is_integer(value) and value > 0


def is_count(value: object) -> bool:
    """Return whether the value is an integer of at least 0."""
    return is_integer(value) and value >= 0


def is_pixels(value: object) -> bool:
    """Return whether the value is a positive integer that a float64 holds exactly."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        return False
    return 0 < int(value) <= 2**53


def is_positive(value: object) -> bool:
    """Return whether the value is a 32-bit integer or a finite float above 0, and no boolean."""
    return is_number(value) and value > 0


def is_share(value: object) -> bool:
    """Return whether the value is a number above 0 and at most 1."""
    return is_number(value) and 0 < value <= 1


def is_probability(value: object) -> bool:
    """Return whether the value is a number from 0 to 1."""
    return is_number(value) and 0 <= value <= 1


def is_texts(value: object) -> bool:
    """Return whether the value is a list of strings that are not empty."""
    return isinstance(value, list) and all(isinstance(text, str) and text for text in value)


def is_token_id_or_list(value: object) -> bool:
    """Return whether the value is one integer or a list of them."""
    return is_integer(value) or (isinstance(value, list) and all(map(is_integer, value)))


def is_channels(value: object) -> bool:
    """Return whether the value is a number or three numbers."""
    if is_number(value):
        return True
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 3:
        return False
    return all(map(is_number, value))


def is_positive_channels(value: object) -> bool:
    """Return whether the value is a positive number or three of them."""
    return is_channels(value) and bool(np.all(np.asarray(value) > 0))


FIELD_TYPES = {  # annotation → the check of a value, and the words for what is expected
    "Size": (is_size, "a positive integer"),
    "Count": (is_count, "an integer of at least 0"),
    "Pixels": (is_pixels, "a positive integer"),
    "int": (is_integer, "an integer"),
    "int | list[int]": (is_token_id_or_list, "an integer or a list of integers"),
    "Positive": (is_positive, "a positive number"),
    "Share": (is_share, "a number above 0 and at most 1"),
    "Probability": (is_probability, "a number from 0 to 1"),
    "Texts": (is_texts, "a list of non-empty strings"),
    "float": (is_number, "a finite number"),
    "Channels": (is_channels, "a number or three, for R, G and B"),
    "PositiveChannels": (is_positive_channels, "a positive number or three, for R, G and B"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "dict": (lambda value: isinstance(value, dict), "an object"),
}


def field_problem(annotation: str, value: object) -> str | None:
    """Return "expected …, got …" for a value that violates the annotation of a field, else None.

    " | None" in the annotation adds null; annotations that are not in FIELD_TYPES accept anything.
    """
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    if kind not in FIELD_TYPES:
        return None
    is_valid, expected = FIELD_TYPES[kind]
    if is_valid(value):
        return None
    return f"expected {expected}, got {reprlib.repr(value)}"


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise ValueError naming the first field of a dataclass whose value violates its annotation.

    The module of the dataclass has `from __future__ import annotations`: an annotation is a text.
    """
    for field in fields(config):
        check_field(type(config), field.name, getattr(config, field.name), prefix)


def check_field(cls: type, name: str, value: object, prefix: str = "") -> None:
    """Raise ValueError if the value violates the annotation of that field of the dataclass."""
    [annotation] = [str(field.type) for field in fields(cls) if field.name == name]
    problem = field_problem(annotation, value)
    if problem is not None:
        raise ValueError(f"{prefix}{name}: {problem}")


def new_token_limit(settings: dict, prompt_length: int, max_new_tokens: int | None) -> int:
    """Return how many tokens an answer may have.

    settings: the content of generation_config.json. As in the reference (transformers 5.23.0,
    `GenerationMixin._prepare_generated_length`), the caller's number comes first, then
    max_new_tokens, then max_length, which counts the prompt.
    Raises ValueError for an unusable number.
    """
    if max_new_tokens is not None:
        return max_new_tokens
    for name in ("max_new_tokens", "max_length"):
        value = settings.get(name)
        if value is None:
            continue
        if not is_size(value):
            raise ValueError(
                f"generation_config.json: {name}: expected a positive integer, got "
                f"{reprlib.repr(value)}; --max-new-tokens replaces it"
            )
        if name == "max_new_tokens":
            return value
        if value <= prompt_length:
            raise ValueError(
                f"generation_config.json: max_length is {value}, but the prompt alone has "
                f"{prompt_length} tokens; --max-new-tokens replaces it"
            )
        return value - prompt_length
    return DEFAULT_NEW_TOKENS
