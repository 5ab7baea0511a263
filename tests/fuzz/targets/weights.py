"""Weight files of a checkpoint: bytes, the header, and values that are not finite or extreme.

A mutant is a safetensors file. With two mutations of the name of a tensor, tensors are missing,
superfluous or there twice.
"""

import json
import struct
from random import Random
from typing import Any

from tests.fuzz import checkpoint
from tests.fuzz.frame import Target
from tests.fuzz.mutations import mutate_bytes

FILE = "model.safetensors"
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4")
SIZES = (-1, 0, 1, 2, 3, 16, 2**31, 2**32, 2**62, 2**63, 2**64, 1.5, "1", None, [1])
PREFIXES = ("model.", "language_model.", "module.", "model.language_model.", "x.")
ENDINGS = (".inv_freq", ".qweight", ".lora_A.weight", ".absmax", ".scales", "x")
# Float32: NaN, both infinities, the largest numbers, a denormal one. Float16 overflows by some.
FLOATS = [struct.pack("<f", value) for value in (float("nan"), float("inf"), -float("inf"), 1e-40)]
FLOATS += [struct.pack("<f", value) for value in (3e38, -3e38, 1e5, 1e10)]


def seeds() -> list[bytes]:
    """Return the weights of the small checkpoint."""
    return [(checkpoint.base_directory() / FILE).read_bytes()]


def split(data: bytes) -> tuple[dict, bytes]:
    """Return the header and the body of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header: Any, body: bytes) -> bytes:
    """Return the file of a header and a body."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def mutate(random: Random, files: list[bytes]) -> bytes:
    """Return a file that is damaged as bytes, in its header or in its values."""
    draw = random.random()
    if draw < 0.2:
        return mutate_bytes(random, files)
    header, body = split(files[0])
    if draw < 0.5:
        return join(header, mutate_values(random, body))
    for _ in range(random.choice((1, 1, 2, 4))):
        body = mutate_header(random, header, body)
    return join(header, body)


def mutate_values(random: Random, body: bytes) -> bytes:
    """Return the body with numbers that are extreme or none: a single one, some or very many."""
    values = bytearray(body)
    count = len(values) // 4
    start = random.randrange(count)
    length = random.choice((1, 1, 16, 1000, count - start))
    value = random.choice(FLOATS)
    length = min(length, count - start)
    values[4 * start : 4 * (start + length)] = value * length
    return bytes(values)


def mutate_header(random: Random, header: dict, body: bytes) -> bytes:
    """Damage the entry of one tensor, and return the body."""
    name = random.choice([name for name in header if name != "__metadata__"] or ["x"])
    entry = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    kind = random.randrange(9)
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[random.choice(PREFIXES) + name] = header.pop(name)
    elif kind == 2:
        header[name + random.choice(ENDINGS)] = header.pop(name)
    elif kind == 3:
        return add_tensor(random, header, entry, random.choice(PREFIXES) + name, body)
    elif kind == 4:
        entry["dtype"] = random.choice(DTYPES)
    elif kind == 5:
        entry["shape"] = random.choice((entry["shape"][::-1], [random.choice(SIZES)] * 2, []))
    elif kind == 6:
        entry["data_offsets"] = [random.choice(SIZES), random.choice(SIZES)]
    elif kind == 7:
        header["__metadata__"] = random.choice(({}, None, {"format": "np"}, {"a": 1}, []))
    else:
        rename_all(header, random.choice(PREFIXES))
    return body


def add_tensor(random: Random, header: dict, entry: dict, name: str, body: bytes) -> bytes:
    """Add a tensor with the entry of another one: with data of its own, or with the same data."""
    header[name] = dict(entry)
    try:
        start, end = entry["data_offsets"]
        length = end - start
    except (TypeError, ValueError):  # damaged by an earlier mutation
        return body
    if random.random() < 0.3 or not 0 <= length <= len(body):
        return body
    header[name]["data_offsets"] = [len(body), len(body) + length]
    return body + bytes(length)


def rename_all(header: dict, prefix: str) -> None:
    """Put a prefix before the names of all tensors."""
    for name in list(header):
        if name != "__metadata__":
            header[prefix + name] = header.pop(name)


def run(data: bytes) -> None:
    """Answer a question with the checkpoint whose weights are replaced."""
    checkpoint.ask(checkpoint.damaged_directory({FILE: data}))


TARGET = Target(seeds, run, checkpoint.NAME, mutate, seconds=10.0, quick_count=300)
