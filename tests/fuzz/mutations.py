"""Ways to damage an input. Each draws from the generator that it is given, and from nothing else.

A target takes `mutate_bytes`, or `byte_mutator` with strings that its format knows, or a function
of its own with the same signature.
"""

from collections.abc import Callable, Sequence
from random import Random

Mutate = Callable[[Random, list[bytes]], bytes]

INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
LONGEST = 2**16  # bytes that one mutation inserts at most


def mutate_bytes(random: Random, seeds: list[bytes]) -> bytes:
    """Return a damaged copy of one of the seeds."""
    return byte_mutator()(random, seeds)


def byte_mutator(tokens: Sequence[bytes] = ()) -> Mutate:
    """Return a function like `mutate_bytes` that also writes `tokens`, the words of a format."""

    def mutate(random: Random, seeds: list[bytes]) -> bytes:
        data = bytearray(random.choice(seeds))
        mutations = [flip_bit, set_byte, set_integer, cut, repeat, swap, truncate, insert_random]
        for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
            if tokens and random.random() < 0.2:
                insert_token(random, data, tokens)
            elif random.random() < 0.05:
                splice(random, data, random.choice(seeds))
            else:
                random.choice(mutations)(random, data)
        return bytes(data)

    return mutate


def place(random: Random, data: bytearray) -> int:
    """Return a position in the data; more often near its beginning, where headers are."""
    if random.random() < 0.5:
        return random.randrange(min(len(data), 64) + 1)
    return random.randrange(len(data) + 1)


def flip_bit(random: Random, data: bytearray) -> None:
    """Flip one bit."""
    position = place(random, data)
    if position < len(data):
        data[position] ^= 1 << random.randrange(8)


def set_byte(random: Random, data: bytearray) -> None:
    """Set one byte to any value."""
    position = place(random, data)
    if position < len(data):
        data[position] = random.randrange(256)


def set_integer(random: Random, data: bytearray) -> None:
    """Overwrite 1, 2, 4 or 8 bytes with an extreme or a small integer, in either byte order."""
    size = random.choice((1, 2, 4, 8))
    value = random.choice((random.choice(INTEGERS), random.randrange(300), len(data)))
    order = random.choice(("little", "big"))
    encoded = (value % 256**size).to_bytes(size, order)
    position = place(random, data)
    data[position : position + size] = encoded


def cut(random: Random, data: bytearray) -> None:
    """Remove some bytes."""
    position = place(random, data)
    del data[position : position + random_length(random)]


def repeat(random: Random, data: bytearray) -> None:
    """Repeat some bytes, once or many times."""
    position = place(random, data)
    piece = data[position : position + random_length(random)]
    times = random.choice((1, 1, 2, 50))
    data[position:position] = (piece * times)[:LONGEST]


def swap(random: Random, data: bytearray) -> None:
    """Copy some bytes over others."""
    source = place(random, data)
    target = place(random, data)
    piece = data[source : source + random_length(random)]
    data[target : target + len(piece)] = piece


def truncate(random: Random, data: bytearray) -> None:
    """Remove the end."""
    del data[place(random, data) :]


def insert_random(random: Random, data: bytearray) -> None:
    """Insert random bytes, or equal ones."""
    length = random_length(random)
    piece = random.choice((random.randbytes(length), bytes([random.randrange(256)]) * length))
    position = place(random, data)
    data[position:position] = piece


def insert_token(random: Random, data: bytearray, tokens: Sequence[bytes]) -> None:
    """Write one of the tokens, in place of other bytes or between them."""
    token = random.choice(tokens)
    position = place(random, data)
    replaced = random.choice((0, len(token)))
    data[position : position + replaced] = token


def splice(random: Random, data: bytearray, other: bytes) -> None:
    """Continue with the end of another seed."""
    data[place(random, data) :] = other[place(random, bytearray(other)) :]


def random_length(random: Random) -> int:
    """Return a length, small more often than large."""
    return random.choice((1, 2, 3, 4, 8, random.randrange(1, 64), random.randrange(1, 1024)))
