"""Checks of configuration values from JSON files: a field's annotation names what it accepts.

@dataclass
class SomeConfig:
    width: Size = 64
    theta: Positive | None = None

    def __post_init__(self):
        check_fields(self)
"""

import math
import reprlib
from dataclasses import fields
from typing import Any, TypeGuard

Size = int  # a positive integer
Positive = float  # a positive number


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether the value is an integer, not a boolean, that fits into 32 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31


def is_number(value: object) -> TypeGuard[float]:
    """Return whether the value is a 32-bit integer or a finite float; a boolean is neither."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def is_size(value: object) -> bool:
    """Return whether the value is a positive integer."""
    return is_integer(value) and value > 0


def is_positive(value: object) -> bool:
    """Return whether the value is a positive number."""
    return is_number(value) and value > 0


def is_token_id_or_list(value: object) -> bool:
    """Return whether the value is one integer or a list of them."""
    return is_integer(value) or (isinstance(value, list) and all(map(is_integer, value)))


FIELD_TYPES = {  # annotation → the check of a value, and the words for what is expected
    "Size": (is_size, "a positive integer"),
    "int": (is_integer, "an integer"),
    "int | list[int]": (is_token_id_or_list, "an integer or a list of integers"),
    "Positive": (is_positive, "a positive number"),
    "float": (is_number, "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "dict": (lambda value: isinstance(value, dict), "an object"),
}


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise ValueError naming the first field of a dataclass whose value violates its annotation.

    " | None" in the annotation adds null; annotations that are not in FIELD_TYPES are not checked.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        annotation = str(field.type)
        kind = annotation.removesuffix(" | None")
        if value is None and kind != annotation:
            continue
        if kind not in FIELD_TYPES:
            continue
        fits, expected = FIELD_TYPES[kind]
        if not fits(value):
            got = reprlib.repr(value)
            raise ValueError(f"{prefix}{field.name}: expected {expected}, got {got}")
