"""EXIF and XMP metadata, damaged, in sound image files: the pixels must come out."""

import struct
import zlib
from random import Random

import numpy as np
from PIL import Image

from media import load_image
from tests.fuzz.frame import Target
from tests.fuzz.mutations import byte_mutator
from tests.fuzz.targets.images import draw, save

IMAGE = draw(24, 16)
KINDS = (b"JPEG", b"PNG ", b"WEBP", b"TIFF", b"AVIF")  # the first four bytes of a mutant
TOKENS = (b"II*\0", b"MM\0*", b"\x12\x01\x03\0", b"\x01\x12\0\x03", b"\x69\x87", b"\x25\x88")
TOKENS += (b"Exif\0\0", b'tiff:Orientation="6"', b"\xff\xff\xff\xff", b"\0\0\0\x08", b"\x08\0\0\0")


def seeds() -> list[bytes]:
    """Return metadata, each behind the name of the format of the image that carries it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description that is longer than four bytes"
    exif[0x011A] = 72.0
    exif.get_ifd(0x8769)[0x9003] = "2024:01:01 00:00:00"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    small = Image.Exif()
    small[0x0112] = 3
    contents = [exif.tobytes()[6:], small.tobytes()[6:], b""]
    return [kind + content for kind in KINDS for content in contents]


MUTATE_BYTES = byte_mutator(TOKENS)


def mutate(random: Random, inputs: list[bytes]) -> bytes:
    """Return damaged metadata for an image of any format."""
    damaged = MUTATE_BYTES(random, [data[4:] for data in inputs])
    return random.choice(KINDS) + damaged


def image_with(kind: bytes, content: bytes) -> bytes:
    """Return an image file that carries the metadata as they are."""
    if kind == b"JPEG":
        content = b"Exif\0\0" + content[:65000]
        segment = b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content
        return b"\xff\xd8" + segment + save(IMAGE, "JPEG")[2:]
    if kind == b"PNG ":
        data = save(IMAGE, "PNG")
        name = b"eXIf" if len(content) % 2 else b"iTXt"
        if name == b"iTXt":
            content = b"XML:com.adobe.xmp\0\0\0\0\0" + content
        chunk = struct.pack(">I", len(content)) + name + content
        return data[:33] + chunk + struct.pack(">I", zlib.crc32(name + content)) + data[33:]
    if kind == b"WEBP":
        return save(IMAGE, "WEBP", lossless=True, exif=b"Exif\0\0" + content, xmp=content)
    if kind == b"AVIF":
        return save(IMAGE, "AVIF", quality=100, subsampling="4:4:4", xmp=content)
    return tiff_with(content)


def tiff_with(content: bytes) -> bytes:
    """Return a TIFF file with a directory that begins with bytes of the metadata, and whose other
    tags are sound.
    """
    data = bytearray(save(IMAGE, "TIFF"))
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = [bytes(data[start + 2 + 12 * n :][:12]) for n in range(count)]
    for n in range(min(len(content) // 10, 200)):
        tag = 0x9000 + n if n % 2 else 0x010D + n % 8
        entries.append(struct.pack("<H", tag) + content[10 * n : 10 * n + 10])
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    struct.pack_into("<I", data, 4, len(data))
    return bytes(data) + directory + content


PIXELS = np.asarray(IMAGE)


def run(data: bytes) -> None:
    """Open the image, and compare its pixels with those of the image without metadata."""
    kind = data[:4]
    image = load_image(image_with(kind, data[4:]))
    assert sorted(image.size) == [16, 24]
    if kind in (b"PNG ", b"WEBP"):
        assert sorted(np.asarray(image).tobytes()) == sorted(PIXELS.tobytes())


TARGET = Target(seeds, run, mentions="the given bytes", mutate=mutate)
