"""Image files of every format that is opened, damaged anywhere."""

import io
import zlib
from random import Random

import numpy as np
from PIL import Image

from media import MediaLimits, load_image, to_rgb
from tests.fuzz.frame import Target
from tests.fuzz.mutations import byte_mutator

LIMITS = MediaLimits(max_image_pixels=2**20)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "ICNS")
FORMATS += ("QOI", "DDS", "PCX", "SGI", "DIB", "TGA")
# What the formats are recognized by, and what their parts are called.
TOKENS = b"IHDR PLTE tRNS IDAT IEND acTL zTXt iCCP eXIf VP8 VP8L VP8X ANIM ANMF GIF89a".split()
TOKENS += b", ! P1 P3 P6 P7 BM ftypavif ispe ihdr jp2c 8BPS icns".split()
TOKENS += [b"II*\0", b"MM\0*", b"\xff\xd8", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4"]
TOKENS += [b"\xff\xd9", b"\xff\xe1", b"\0\0\xff\xff", b"\xff\xff\0\0"]


def draw(width: int, height: int) -> Image.Image:
    """Return a small image with edges and a gradient."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    pixels[: height // 2, :, 1] = 200
    pixels[::3, :, 2] = 120
    return Image.fromarray(pixels)


def save(image: Image.Image, file_format: str, **options: object) -> bytes:
    """Return an image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def seeds() -> list[bytes]:
    """Return one file of each format, and of the variants that are decoded by other code."""
    image = draw(24, 16)
    files = [save(image.convert("RGBA") if name == "ICNS" else image, name) for name in FORMATS]
    files.append(save(image, "JPEG", progressive=True))
    files.append(save(image.convert("CMYK"), "JPEG"))
    files.append(save(image.convert("P"), "PNG", transparency=3))
    files.append(save(image.convert("I;16"), "PNG"))
    files.append(save(image.convert("RGBA"), "WEBP", lossless=True))
    files.append(save(image, "TIFF", compression="tiff_lzw"))
    files.append(save(image, "TIFF", compression="jpeg"))
    files.append(save(image.convert("1"), "TIFF", compression="group4"))
    files.append(save(image.convert("F"), "TIFF"))
    frames = [draw(24, 16).transpose(Image.Transpose.ROTATE_180), draw(24, 16)]
    for name in ("GIF", "PNG", "WEBP", "TIFF"):  # AVIF would hold the time of day
        files.append(save(image, name, save_all=True, append_images=frames))
    files.append(b"P3 2 2 255\n" + b"1 2 3 " * 4)
    files.append(photoshop())
    return files


def photoshop() -> bytes:
    """Return a PSD file of 4×4 pixels, which Pillow does not write."""
    header = b"8BPS\0\1" + bytes(6) + b"\0\3" + b"\0\0\0\4" * 2 + b"\0\x08\0\3"
    return header + bytes(12) + b"\0\0" + bytes(range(48))


MUTATE_BYTES = byte_mutator(TOKENS)


def mutate(random: Random, files: list[bytes]) -> bytes:
    """Return a damaged file; in a PNG file, half the time, with checksums that are right."""
    data = MUTATE_BYTES(random, files)
    if data.startswith(b"\x89PNG") and random.random() < 0.5:
        return with_checksums(data)
    return data


def with_checksums(data: bytes) -> bytes:
    """Return a PNG file with the checksum that belongs to each chunk."""
    fixed = bytearray(data)
    position = 8
    while position + 12 <= len(fixed):
        length = int.from_bytes(fixed[position : position + 4], "big")
        end = position + 8 + length
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = zlib.crc32(fixed[position + 4 : end]).to_bytes(4, "big")
        position = end + 4
    return bytes(fixed)


def run(data: bytes) -> None:
    """Open the file as the processor does."""
    image = to_rgb(load_image(data, LIMITS))
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)


TARGET = Target(seeds, run, mentions="the given bytes", mutate=mutate)
