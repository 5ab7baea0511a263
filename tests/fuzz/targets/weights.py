"""Weight files of a checkpoint: one file, or an index and shards.

Damaged are bytes, headers, values that are not finite or extreme, the index, and which files there
are. A mutant is a line of JSON with the name of each weight file, and the content of these files in
the same order. Where the line has a number, so many bytes follow; where it has the name of a file,
the content is that of the undamaged one.
"""

import json
import struct
from functools import cache
from random import Random
from typing import Any

import torch

from tests.fuzz import checkpoint
from tests.fuzz.checkpoint import INDEX
from tests.fuzz.frame import Target
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.targets.json_files import dump, mutate_value

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4")
SIZES = (-1, 0, 1, 2, 3, 16, 2**31, 2**32, 2**62, 2**63, 2**64, 1.5, "1", None, [1])
PREFIXES = ("model.", "language_model.", "module.", "model.language_model.", "x.")
ENDINGS = (".inv_freq", ".qweight", ".lora_A.weight", ".absmax", ".scales", "x")
# Float32: NaN, both infinities, the largest numbers, a denormal one. Float16 overflows by some.
FLOATS = [struct.pack("<f", value) for value in (float("nan"), float("inf"), -float("inf"), 1e-40)]
FLOATS += [struct.pack("<f", value) for value in (3e38, -3e38, 1e5, 1e10)]
# Names of weight files, for the index and for the files: absent ones, other formats and places.
NAMES = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
NAMES += ("model-00003-of-00003.safetensors", "model-00001-of-00002 (1).safetensors", "config.json")
NAMES += ("model-00001-of-00002.safetensors.incomplete", "adapter_model.safetensors", "", ".", "\0")
NAMES += ("pytorch_model.bin", "MODEL.SAFETENSORS", "x.gguf", "../base/model.safetensors", "\ud800")
# What is stored in the place of a file: the answer of a server, a pointer, nothing.
OTHER_CONTENTS = (b"<!DOCTYPE html><html><body>Not found</body></html>", b"Entry not found", b"")
OTHER_CONTENTS += (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", bytes(8))


def seeds() -> list[bytes]:
    """Return the weights of the small checkpoint as one file, and as an index with two shards."""
    files = undamaged_files()
    single = {"model.safetensors": files["model.safetensors"]}
    sharded = {name: content for name, content in files.items() if name not in single}
    return [pack(single), pack(sharded)]


@cache
def undamaged_files() -> dict[str, bytes]:
    """Return the weights of the small checkpoint in one file, and in two, with their index."""
    directory = checkpoint.base_directory()
    weight_map = checkpoint.write_shards(directory)
    names = ["model.safetensors", *sorted(set(weight_map.values()))]
    files = {name: (directory / name).read_bytes() for name in names}
    files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    return files


def pack(files: dict[str, bytes], known_files: dict[str, bytes] | None = None) -> bytes:
    """Return the mutant that holds these files; those whose content is known by a name alone."""
    known_names = {content: name for name, content in (known_files or {}).items()}
    header = {name: known_names.get(content, len(content)) for name, content in files.items()}
    contents = [content for content in files.values() if content not in known_names]
    return json.dumps(header).encode() + b"\n" + b"".join(contents)


def unpack(data: bytes) -> dict[str, bytes]:
    """Return the files that a mutant holds."""
    line, _, rest = data.partition(b"\n")
    files = {}
    for name, content in json.loads(line).items():
        if isinstance(content, str):
            files[name] = undamaged_files()[content]
        else:
            files[name] = rest[:content]
            rest = rest[content:]
    return files


def split(data: bytes) -> tuple[dict, bytes]:
    """Return the header and the body of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(header: Any, body: bytes) -> bytes:
    """Return the file of a header and a body."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def mutate(random: Random, inputs: list[bytes]) -> bytes:
    """Return files of which one is damaged inside, the index is, or the set of files is."""
    files = unpack(random.choice(inputs))
    for _ in range(random.choice((1, 1, 1, 2))):
        if INDEX in files:
            kinds = (damage_content, damage_content, damage_index, damage_index, *DAMAGES)
            random.choice(kinds)(random, files)
        elif random.random() < 0.7:
            damage_content(random, files)
        else:
            random.choice(DAMAGES)(random, files)
    return pack(files, undamaged_files())


def is_undamaged(content: bytes) -> bool:
    """Return whether a file with this content is one of undamaged tensors."""
    return any(content == file for name, file in undamaged_files().items() if name != INDEX)


def choose(random: Random, files: dict[str, bytes]) -> str:
    """Return the name of one of the files, the index only where it is alone."""
    return random.choice([name for name in files if name != INDEX] or [INDEX])


# ------------------------------------------------------------------------------- the set of files
def remove_file(random: Random, files: dict[str, bytes]) -> None:
    """Remove a file, as a download that broke off between two files does."""
    if len(files) > 1:
        del files[random.choice(list(files))]


def cut_off(random: Random, files: dict[str, bytes]) -> None:
    """Remove the end of a file, or fill it with zeros, as a download that broke off does."""
    name = choose(random, files)
    content = files[name]
    length = random.choice((random.randrange(len(content) + 1), max(len(content) - 1, 0)))
    files[name] = content[:length]
    if random.random() < 0.3:
        files[name] += bytes(len(content) - length)


def swap_files(random: Random, files: dict[str, bytes]) -> None:
    """Exchange the content of two files, or store one under both names."""
    first = random.choice(list(files))
    second = random.choice(list(files))
    content = files[first]
    files[first] = files[second]
    if random.random() < 0.7:
        files[second] = content


def rename_file(random: Random, files: dict[str, bytes]) -> None:
    """Give a file another name that a file can have, or store it under both."""
    name = choose(random, files)
    new_name = random.choice([name for name in NAMES if is_file_name(name)])
    files[new_name] = files[name] if random.random() < 0.3 else files.pop(name)


def is_file_name(name: str) -> bool:
    """Return whether a file in the checkpoint's directory can have this name."""
    return name not in ("", ".", "config.json") and not set("/\0\ud800") & set(name)


def replace_content(random: Random, files: dict[str, bytes]) -> None:
    """Store something else in the place of a file."""
    files[choose(random, files)] = random.choice(OTHER_CONTENTS)


def add_file(random: Random, files: dict[str, bytes]) -> None:
    """Add an undamaged file: an index beside the one file, or the one file beside the shards."""
    absent = [name for name in undamaged_files() if name not in files]
    if absent:
        name = random.choice(absent)
        files[name] = undamaged_files()[name]


def repeat_tensor(random: Random, files: dict[str, bytes]) -> None:
    """Store one tensor, or all of them, of an undamaged file in another one as well."""
    source = random.choice([name for name in undamaged_files() if name != INDEX])
    tensors, body = split(undamaged_files()[source])
    tensors.pop("__metadata__", None)
    name = choose(random, files)
    if not is_undamaged(files[name]):
        return
    header, own_body = split(files[name])
    keys = list(tensors) if random.random() < 0.2 else [random.choice(list(tensors))]
    for key in keys:
        start, end = tensors[key]["data_offsets"]
        offsets = [len(own_body), len(own_body) + end - start]
        header[key] = tensors[key] | {"data_offsets": offsets}
        own_body += body[start:end]
    files[name] = join(header, own_body)


DAMAGES = (remove_file, cut_off, swap_files, rename_file, replace_content, add_file, repeat_tensor)


# ------------------------------------------------------------------------------------- the index
def damage_index(random: Random, files: dict[str, bytes]) -> None:
    """Damage the index: its bytes, any of its values, or the files that it names."""
    draw = random.random()
    if draw < 0.2:
        files[INDEX] = mutate_bytes(random, [files[INDEX]])
        return
    index = json.loads(undamaged_files()[INDEX])
    if draw < 0.5:
        mutate_value(random, index)
    else:
        name_others(random, index["weight_map"])
    files[INDEX] = dump(index)


def name_others(random: Random, weight_map: dict[str, str]) -> None:
    """Let the index name other files for one tensor, some or all; or leave these tensors out."""
    names = list(weight_map)
    count = random.choice((1, 1, 3, len(names)))
    file = random.choice((None, *NAMES))
    for name in random.sample(names, count):
        weight_map[name] = random.choice(NAMES) if file is None else file
        if random.random() < 0.2:
            del weight_map[name]


# -------------------------------------------------------------------------------------- one file
def damage_content(random: Random, files: dict[str, bytes]) -> None:
    """Damage one file as bytes, in its header or in its values."""
    name = choose(random, files)
    draw = random.random()
    if draw < 0.2 or not is_undamaged(files[name]):
        files[name] = mutate_bytes(random, [files[name]])
        return
    header, body = split(files[name])
    if draw < 0.5:
        files[name] = join(header, mutate_values(random, body))
    else:
        for _ in range(random.choice((1, 1, 2, 4))):
            body = mutate_header(random, header, body)
        files[name] = join(header, body)


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


@cache
def undamaged_logits() -> torch.Tensor:
    """Return the logits of each step of the answer of the undamaged checkpoint."""
    return torch.stack(checkpoint.ask(checkpoint.damaged_directory({}, (INDEX,))))


def run(data: bytes) -> None:
    """Answer a question with the checkpoint whose weights are replaced.

    Where no file with tensors is damaged, but the index or the set of files, the answer must be
    that of the undamaged checkpoint.
    """
    files = unpack(data)
    logits = checkpoint.ask(checkpoint.damaged_directory(files, undamaged_files().keys()))
    if all(is_undamaged(content) for name, content in files.items() if name != INDEX):
        assert torch.equal(torch.stack(logits), undamaged_logits())


TARGET = Target(seeds, run, checkpoint.NAME, mutate, seconds=10.0, quick_count=300)
