"""Images as people have them: metadata, formats, arrays, tensors; what is refused or warned of."""

import base64
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from make_golden_preprocess import draw_pixels
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import generate as command
import media
from apps import batch, chat
from media import MediaLimits, file_url_path, load_image, to_rgb
from preprocess import ImageConfig, Processor, preprocess_images

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES = EXAMPLES / "shapes.png"
PIXELS = draw_pixels(40, 60)


# --- building EXIF by hand: what Pillow reads, it would not write ---


def tiff_directory(*entries, order="<", first=8):
    """EXIF bytes with one directory; an entry is (tag, type, count, four bytes of value)."""
    mark = b"II" if order == "<" else b"MM"
    header = mark + struct.pack(f"{order}HI", 42, first)
    body = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        body += struct.pack(f"{order}HHI", tag, kind, count) + value
    return header + body + bytes(4)


def orientation(value, order="<"):
    return 0x0112, 3, 1, struct.pack(f"{order}HH", value, 0)


DAMAGED = {
    "empty": b"",
    "three bytes": b"II*",
    "seven bytes": b"II*\0\x08\0\0",
    "no byte order": b"XX*\0\x08\0\0\0" + bytes(20),
    "half a byte order": b"IM*\0\x08\0\0\0" + bytes(20),
    "offset beyond the end": tiff_directory(orientation(6), first=0x7FFFFFFF),
    "more entries than bytes": tiff_directory(orientation(6))[:8] + b"\xff\xff\x12\x01",
    "text": b"not EXIF at all",
}
UNREADABLE = ("three bytes", "seven bytes", "no byte order", "half a byte order", "text")

UPRIGHT = {
    "orientation 0": tiff_directory(orientation(0)),
    "orientation 9": tiff_directory(orientation(9)),
    "orientation 65535": tiff_directory(orientation(65535)),
    "orientation a string": tiff_directory((0x0112, 2, 2, b"6\0\0\0")),
    "orientation a rational beyond the end": tiff_directory((0x0112, 5, 1, b"\xff\xff\0\0")),
    "orientation of an unknown type": tiff_directory((0x0112, 99, 1, bytes(4))),
}
ROTATED = {
    "a tag of the wrong type": tiff_directory((0x010E, 5, 1, bytes(4)), orientation(6)),
    "big-endian": tiff_directory(orientation(6, ">"), order=">"),
    "a directory that names itself": tiff_directory((0x8769, 4, 1, b"\x08\0\0\0"), orientation(6)),
    "a huge count": tiff_directory((0x010E, 2, 0x7FFFFFFF, bytes(4)), orientation(6)),
    "an offset beyond the end": tiff_directory(
        (0x010E, 2, 99, b"\xff\xff\xff\x7f"), orientation(6)
    ),
    "a list, whose first value counts": tiff_directory((0x0112, 3, 2, struct.pack("<HH", 6, 6))),
    "a float, which is equal to 6": tiff_directory((0x0112, 11, 1, struct.pack("<f", 6.0))),
}


def with_exif(file_format, exif):
    """The bytes of an image of PIXELS that carries these EXIF bytes, whatever they are."""
    buffer = io.BytesIO()
    picture = Image.fromarray(PIXELS)
    if file_format == "PNG":
        picture.save(buffer, "PNG")
        data = buffer.getvalue()
        return data[:33] + png_chunk(b"eXIf", exif) + data[33:]
    if file_format == "JPEG":
        picture.save(buffer, "JPEG", quality=95)
        segment = b"Exif\0\0" + exif
        marker = b"\xff\xe1" + struct.pack(">H", len(segment) + 2)
        return b"\xff\xd8" + marker + segment + buffer.getvalue()[2:]
    picture.save(buffer, "WEBP", lossless=True, exif=b"Exif\0\0" + exif + b"\0" * (not exif))
    return buffer.getvalue()


def png_chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


FORMATS = ("JPEG", "PNG", "WEBP")


def assert_shows(image, pixels, file_format):
    """The image has these pixels, up to the loss of JPEG."""
    found = np.asarray(image.convert("RGB"))
    assert found.shape == pixels.shape
    if file_format != "JPEG":
        assert np.array_equal(found, pixels)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", [*DAMAGED, *UPRIGHT])
def test_load_image_loses_only_the_orientation_to_damaged_exif(file_format, name):
    data = with_exif(file_format, (DAMAGED | UPRIGHT)[name])
    assert_shows(load_image(data), PIXELS, file_format)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ROTATED)
def test_load_image_keeps_the_orientation_despite_other_damaged_exif(file_format, name):
    image = load_image(with_exif(file_format, ROTATED[name]))
    assert_shows(image, np.rot90(PIXELS, -1), file_format)


@pytest.mark.parametrize("name", UNREADABLE)
def test_load_image_warns_once_about_unreadable_exif(tmp_path, name):
    (tmp_path / "photo.png").write_bytes(with_exif("PNG", DAMAGED[name]))
    with pytest.warns(UserWarning, match=r"photo\.png: its EXIF data cannot be read") as caught:
        load_image(tmp_path / "photo.png")
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)


def test_load_image_removes_the_orientation_that_it_applied():
    image = load_image(with_exif("PNG", ROTATED["big-endian"]))
    assert image.getexif().get(0x0112) is None
    assert not {"exif", "xmp", "XML:com.adobe.xmp"} & image.info.keys()


def test_load_image_applies_xmp_orientation():
    text = b'<x:xmpmeta xmlns:tiff="t"><a tiff:Orientation="6"/></x:xmpmeta>'
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "WEBP", lossless=True, xmp=text)
    assert_shows(load_image(buffer.getvalue()), np.rot90(PIXELS, -1), "WEBP")


def test_load_image_reads_the_first_image_of_mpo_without_a_warning():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture = Image.fromarray(PIXELS)
    picture.save(buffer, "MPO", save_all=True, append_images=[picture], exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(buffer.getvalue())
    assert image.size == (40, 60)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("damage", ["bad checksum", "huge text", "broken profile"])
def test_load_image_reads_png_pixels_despite_a_damaged_chunk(damage):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    data = buffer.getvalue()
    if damage == "bad checksum":
        chunk = png_chunk(b"eXIf", b"II*\0")[:-4] + b"oops"
    elif damage == "huge text":  # as image generators write their whole workflow
        chunk = png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3 * 2**20))
    else:
        chunk = png_chunk(b"iCCP", b"p\0\0" + zlib.compress(b"x" * 3 * 2**20))
    assert_shows(load_image(data[:33] + chunk + data[33:]), PIXELS, "PNG")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("marker", [0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE])
@pytest.mark.parametrize("start", [b"", b"JFIF", b"Exif", b"ICC_PROFILE\0", b"MPF\0", b"Adobe\0"])
def test_load_image_reads_jpeg_pixels_despite_a_segment_cut_short(marker, start):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    segment = bytes([0xFF, marker]) + struct.pack(">H", len(start) + 2) + start
    image = load_image(data[:2] + segment + data[2:])
    assert np.array_equal(np.asarray(image), np.asarray(load_image(data)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tag", [0x010E, 0x0112, 0x8769, 0x8825])
@pytest.mark.parametrize("kind", [0, 2, 5, 12, 99])
def test_load_image_reads_tiff_pixels_despite_a_damaged_tag(tag, kind):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "TIFF")
    data = buffer.getvalue()
    assert data[:4] == b"II*\0"
    (start,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, start)
    entries = [data[start + 2 + 12 * n :][:12] for n in range(count)]
    entries.append(struct.pack("<HHII", tag, kind, 0x7FFFFFFF, 0xFFFFFF))
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    damaged = data[:4] + struct.pack("<I", len(data)) + data[8:] + directory
    assert_shows(load_image(damaged), PIXELS, "TIFF")


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "GIF", "BMP"])
def test_load_image_makes_any_damage_a_value_error(file_format):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, file_format, exif=exif)
    whole = buffer.getvalue()
    random = np.random.default_rng(0)
    messages = []
    for _ in range(200):
        data = bytearray(whole)
        for position in random.integers(0, min(len(data), 400), size=3):
            data[position] = random.choice([0, 1, 127, 255])
        try:
            load_image(bytes(data))
        except ValueError as error:
            messages.append(str(error))
    assert all(text.startswith("cannot read the given bytes as an image: ") for text in messages)
    assert not any("\n" in text for text in messages)


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        struct.error("x"),
        AssertionError(),
        MemoryError(),
        zlib.error("x"),
        OverflowError("x"),
        AttributeError("x"),
    ],
)
def test_load_image_makes_any_decoder_exception_one_sentence(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(media, "decode_image", fail)
    with pytest.raises(ValueError, match=r"cannot read .*shapes\.png as an image: \w"):
        load_image(SHAPES)


def test_load_image_lets_keyboard_interrupt_through(monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(media, "decode_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_image(SHAPES)


# --- formats, and files that are no images ---


@pytest.mark.sweep
@pytest.mark.parametrize(
    "file_format",
    [
        "JPEG",
        "PNG",
        "WEBP",
        "GIF",
        "BMP",
        "TIFF",
        "AVIF",
        "JPEG2000",
        "PPM",
        "ICO",
        "ICNS",
        "QOI",
        "DDS",
        "PCX",
        "SGI",
        "TGA",
    ],
)
def test_load_image_reads_a_format_whatever_the_file_name(tmp_path, file_format):
    picture = Image.fromarray(draw_pixels(64, 64)).convert(
        "RGBA" if file_format == "ICNS" else "RGB"
    )
    picture.save(tmp_path / "x.txt", file_format)
    assert load_image(tmp_path / "x.txt").convert("RGB").size[0] >= 64


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


DOS_EPS = b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 32, len(EPS), 0, 0, 0, 0) + b"\xff\xff\0\0" + EPS


@pytest.mark.parametrize("data", [EPS, DOS_EPS])
def test_load_image_refuses_postscript_and_starts_no_program(tmp_path, monkeypatch, data):
    def refuse(*arguments, **options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    for name in ("x.png", "x.eps"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} as an image: PostScript is not opened"):
            load_image(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(20),
            "HEIC is not supported by Pillow; convert",
        ),
        (
            b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(20),
            "HEIC is not supported by Pillow; convert",
        ),
        (b"\0\0\0\x20ftypisom\0\0\x02\0isomiso2avc1mp41" + bytes(20), "it is a video"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"\n<!DOCTYPE html><html>", "it is a web page"),
        (b"<HTML><head>", "it is a web page"),
        (b'<?xml version="1.0"?>\n<svg xmlns="s"/>', "it is an SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="s"/>', "it is an SVG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "JPEG XL is not supported by Pillow; convert"),
        (b"\xff\n" + bytes(20), "JPEG XL is not supported by Pillow; convert"),
        (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
        (b"\xd7\xcd\xc6\x9a" + bytes(40), "it has no format that Pillow knows"),  # WMF
    ],
)
def test_load_image_names_what_a_file_is_that_is_no_image(tmp_path, data, reason):
    (tmp_path / "IMG_1.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=rf"cannot read .*IMG_1\.jpg as an image: {reason}"):
        load_image(tmp_path / "IMG_1.jpg")


def test_load_image_opens_only_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket.png"))
        for name in ("pipe.png", "socket.png"):
            with pytest.raises(ValueError, match="it is a pipe, device or socket"):
                load_image(tmp_path / name)
    with pytest.raises(ValueError, match="it is a directory, expected a file"):
        load_image(tmp_path / "folder.png")
    with pytest.raises(ValueError, match="/dev/zero as an image: it is a pipe"):
        load_image("/dev/zero")


class Pipe(io.RawIOBase):
    """A file that can be read once."""

    def __init__(self, data):
        self.data = io.BytesIO(data)

    def readinto(self, buffer):
        return self.data.readinto(buffer)

    def readable(self):
        return True


def test_load_image_reads_an_open_file_that_cannot_be_seeked():
    assert load_image(Pipe(SHAPES.read_bytes())).size == Image.open(SHAPES).size


def test_load_image_of_a_file_object_that_cannot_be_read_is_one_sentence():
    closed = io.BytesIO(SHAPES.read_bytes())
    closed.close()

    class Broken(Pipe):
        def readinto(self, buffer):
            raise RuntimeError("odd")

    for file in (closed, Broken(b"")):
        with pytest.raises(ValueError, match=r"^cannot read the given \w+ as an image: "):
            load_image(file)


def test_load_image_does_not_expand_the_home_directory():
    with pytest.raises(FileNotFoundError, match=r"no image at ~/x\.png \(~ is not expanded"):
        load_image("~/x.png")


@pytest.mark.parametrize(
    ("url", "windows", "path"),
    [
        ("file:///tmp/a%20b%25.png", False, "/tmp/a b%.png"),
        ("FILE:///tmp/a.png", False, "/tmp/a.png"),
        ("file://localhost/tmp/a.png", False, "/tmp/a.png"),
        ("file://examples/a.png", False, "examples/a.png"),
        ("file:///C:/a%20b.png", True, "C:/a b.png"),
        ("file:///c|/a.png", True, "c:/a.png"),
        (r"file://C:\a.png", True, r"C:\a.png"),
        ("file://server/share/a.png", True, "//server/share/a.png"),
    ],
)
def test_file_url_path_returns_the_path(url, windows, path):
    assert file_url_path(url, windows) == path


def test_load_image_accepts_literal_percent_signs_in_a_file_url(tmp_path):
    path = tmp_path / "a%20b.png"
    shutil.copy(SHAPES, path)
    assert load_image(f"file://{path}").size == Image.open(SHAPES).size


def test_load_image_accepts_bare_base64_as_the_reference_does():
    text = base64.b64encode(SHAPES.read_bytes()).decode()
    assert load_image(text).size == Image.open(SHAPES).size
    with pytest.raises(FileNotFoundError, match="there is no image at gone"):
        load_image("gone")
    with pytest.raises(FileNotFoundError, match="there is no image at home/a"):
        load_image("home/" + "a" * 95)


@pytest.mark.slow
def test_load_image_reads_a_large_photo_without_a_warning(tmp_path):
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")  # 90 million pixels
    code = f"import sys; sys.path[:0] = {sys.path!r}; from media import load_image; "
    code += f"print(load_image({str(tmp_path / 'large.png')!r}).size)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("(10000, 9000)\n", "")


# --- bounds ---


def encoded(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def refuse_to_decode(monkeypatch):
    def fail(*arguments):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image, "_getdecoder", fail)


@pytest.mark.parametrize(
    "file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "QOI"]
)
def test_load_image_refuses_too_many_pixels_by_the_header(tmp_path, monkeypatch, file_format):
    Image.fromarray(PIXELS).save(tmp_path / "x", file_format)  # 60×40 pixels
    assert load_image(tmp_path / "x", MediaLimits(max_image_pixels=2400)).size == (60, 40)
    refuse_to_decode(monkeypatch)
    with pytest.raises(
        ValueError, match=r"x as an image: it has 60×40 pixels, expected at most 2,"
    ):
        load_image(tmp_path / "x", MediaLimits(max_image_pixels=2399))


def test_load_image_refuses_a_bomb_and_does_not_retry_without_metadata(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(b"P6 60000 60000 255\n" + bytes(30))
    monkeypatch.setattr(media, "decode_without_metadata", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"bomb.png as an image: it has 60,000×60,000 pixels, exp"):
        load_image(tmp_path / "bomb.png")


def test_load_image_depends_on_its_own_limit_alone(monkeypatch):
    """Pillow's is one number for the whole process, and stays as it is."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for file_format in ("JPEG", "PNG", "BMP"):
        assert load_image(encoded(Image.fromarray(PIXELS), file_format)).size == (60, 40)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_load_image_of_an_icon_that_holds_more_than_it_declares_is_one_sentence():
    """The image within is bounded by Pillow."""
    data = bytearray(encoded(Image.fromarray(draw_pixels(64, 64)), "ICO", sizes=[(64, 64)]))
    start = data.index(b"IHDR") + 4
    data[start : start + 8] = struct.pack(">II", 30000, 30000)
    data[start + 13 : start + 17] = struct.pack(">I", zlib.crc32(data[start - 4 : start + 13]))
    with pytest.raises(ValueError, match=r"bytes as an image: .*exceeds limit.*; shrink it"):
        load_image(bytes(data))


def test_processor_bounds_images_and_frames_by_its_limits(processor, tmp_path):
    limits = MediaLimits(max_image_pixels=2399)
    limited = Processor(processor.tokenizer, processor.image_config, limits=limits)
    path = str(tmp_path / "1.png")
    Image.fromarray(PIXELS).save(path)
    for item in (
        {"type": "image", "image": path},
        {"type": "video", "video": str(tmp_path)},
        {"type": "video", "video": [path, path]},
    ):
        assert processor.prepare(item).patches.size
        with pytest.raises(ValueError, match=r"1\.png as an image: it has 60×40 pixels"):
            limited.prepare(item)


@pytest.mark.slow
def test_generate_bounds_pixels_by_its_option(capsys):
    arguments = ["--quiet", "--image", str(SHAPES), "--max-image-pixels"]
    width, height = Image.open(SHAPES).size
    assert command.main([*arguments, str(width * height)]) == 0
    assert command.main([*arguments, str(width * height - 1)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"generate.py: cannot read {SHAPES} as an image: it has {width}×{height}"
    )
    assert "--max-image-pixels" in error


def jpeg_with_scans(count, segment=b""):
    """A progressive JPEG whose last scan, with its Huffman table, is there `count` times more."""
    data = encoded(Image.fromarray(PIXELS), "JPEG", progressive=True)
    table = data.rindex(b"\xff\xc4", 0, data.rindex(b"\xff\xda"))
    return data[:2] + segment + data[2:-2] + data[table:-2] * count + data[-2:]


def test_load_image_bounds_the_scans_of_a_jpeg():
    usual = jpeg_with_scans(0).count(b"\xff\xda")
    assert 5 < usual < 20
    assert load_image(jpeg_with_scans(100 - usual)).size == (60, 40)
    with pytest.raises(ValueError, match="as an image: it has more than 100 scans"):
        load_image(jpeg_with_scans(101 - usual))


@pytest.mark.parametrize(("count", "size"), [(64, (40, 60)), (65, (60, 40))])
@pytest.mark.filterwarnings("ignore")
def test_load_image_ignores_exif_in_too_many_segments(count, size):
    exif = tiff_directory(orientation(6))
    start = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    more = b"\xff\xe1\0\x09Exif\0\0x" * (count - 1)
    assert load_image(jpeg_with_scans(0, start + more)).size == size


def test_load_image_counts_no_scans_in_metadata_or_after_the_image():
    inner = b"\xff\xda\0\2" * 200
    comment = b"\xff\xfe" + struct.pack(">H", len(inner) + 2) + inner
    assert load_image(jpeg_with_scans(0, comment)).size == (60, 40)
    assert load_image(jpeg_with_scans(0) + inner).size == (60, 40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", FORMATS)
def test_load_image_reads_overlapping_exif_values_within_bounds(file_format):
    """Thousands of tags, each of which names the same bytes as its value."""
    count = 4000
    start = 8 + 2 + 12 * (count + 1) + 4
    entries = [(0x9000 + n, 7, 10_000, struct.pack("<I", start)) for n in range(count)]
    data = with_exif(file_format, tiff_directory(orientation(6), *entries) + bytes(10_000))
    tracemalloc.start()
    try:
        assert load_image(data).size == (40, 60)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("strip_pixels", [1, 60, 61, 180, 10**6])
def test_to_rgb_composites_in_strips_as_in_one_piece(monkeypatch, strip_pixels):
    monkeypatch.setattr(media, "STRIP_PIXELS", strip_pixels)
    image = Image.fromarray(draw_pixels(40, 60, 4))
    white = Image.new("RGBA", image.size, "white")
    whole = Image.alpha_composite(white, image).convert("RGB")
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(whole))


def test_load_image_does_not_count_the_pages_of_a_tiff(monkeypatch):
    """A file can hold millions of empty ones."""
    pages = [Image.fromarray(PIXELS)] * 3
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(TiffImageFile, "n_frames", property(lambda image: 1 / 0))
    with pytest.warns(UserWarning, match="first of several pages"):
        load_image(data)


# --- what is used in part is warned about ---


def test_preprocess_images_warns_of_clipped_values_and_equals_reference(tmp_path):
    ramp = np.arange(56 * 56, dtype=np.uint16).reshape(56, 56) * 20
    Image.fromarray(ramp).save(tmp_path / "scan.png")
    Image.fromarray(ramp.astype(np.int32) - 5).save(tmp_path / "depth.tif")
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "map.tif")
    for name in ("scan.png", "depth.tif", "map.tif"):
        with pytest.warns(UserWarning, match=rf"{name}: its values \(.*\) are clipped") as caught:
            values, _ = preprocess_images([tmp_path / name], ImageConfig())
        assert len(caught) == 1
        with Image.open(tmp_path / name) as opened:
            reference = Qwen2VLImageProcessorPil()([opened], return_tensors="np")
        assert values.tobytes() == reference["pixel_values"].tobytes()


def test_load_image_warns_that_floats_of_one_at_most_are_black():
    with pytest.warns(UserWarning, match="so it is black"):
        load_image(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)))


def test_load_image_warns_once_about_no_finite_value():
    with pytest.warns(UserWarning, match="none of its values is finite") as caught:
        load_image(Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)))
    assert len(caught) == 1


@pytest.mark.parametrize(
    "values", [np.arange(64).astype(np.uint16), np.arange(64).astype(np.int32)]
)
def test_load_image_of_a_wide_dtype_with_small_values_gives_no_warning(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(Image.fromarray(values.reshape(8, 8)))


@pytest.mark.parametrize(
    ("file_format", "what"),
    [
        ("GIF", "first of several frames"),
        ("WEBP", "first of several frames"),
        ("PNG", "first of several frames"),
        ("TIFF", "first of several pages"),
        ("AVIF", "first of several frames"),
    ],
)
def test_load_image_warns_about_dropped_frames(tmp_path, file_format, what):
    frames = [Image.fromarray(np.roll(PIXELS, n * 5, 0)) for n in range(3)]
    frames[0].save(tmp_path / "x", file_format, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=rf"x: the image is the {what}") as caught:
        image = load_image(tmp_path / "x")
    assert len(caught) == 1
    with Image.open(tmp_path / "x") as opened:
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(opened.convert("RGB")))


# --- transparency ---


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La"])
def test_to_rgb_makes_an_invisible_image_of_any_mode_white(mode):
    picture = Image.new("LA" if mode == "La" else mode, (8, 8), 0)
    assert np.asarray(to_rgb(picture.convert(mode))).min() == 255


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("mode", "color", "transparency"),
    [
        ("P", 3, 3),
        ("P", 3, b"\xff\xff\xff\0"),
        ("L", 7, 7),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("I;16", 900, 900),
        ("1", 0, 0),
    ],
)
def test_to_rgb_makes_the_transparent_color_of_a_png_white(mode, color, transparency):
    picture = Image.new(mode, (8, 8), color)
    if mode == "P":
        picture.putpalette([0, 0, 0] * 4)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=transparency)
    assert np.asarray(to_rgb(load_image(buffer.getvalue()))).min() == 255


# --- arrays and tensors ---

GRAY = PIXELS[:, :, 1]
RGBA = draw_pixels(40, 60, 4)


def chw(array):
    return np.ascontiguousarray(array.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (PIXELS, PIXELS),
        (chw(PIXELS), PIXELS),
        (GRAY, GRAY),
        (GRAY[:, :, None], GRAY),
        (GRAY[None], GRAY),
        (RGBA, RGBA),
        (chw(RGBA), RGBA),
        (PIXELS[::-1, ::2], PIXELS[::-1, ::2]),
        ((PIXELS / 255).astype(np.float32), PIXELS),
        (chw(PIXELS) / 255, PIXELS),
        ((PIXELS / 255).astype(np.float16), PIXELS),
        (PIXELS.astype(np.int64), PIXELS),
        (PIXELS.astype(np.uint16), PIXELS),
        (GRAY > 99, np.where(GRAY > 99, 255, 0)),
        (np.zeros((30, 40), dtype=np.float32), np.zeros((30, 40))),
    ],
)
def test_load_image_converts_an_array_or_tensor(array, expected):
    """Also as a tensor, which may carry a gradient."""
    assert np.array_equal(np.asarray(load_image(array)), expected)
    if array.dtype == np.uint16:
        return
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if tensor.is_floating_point():
        tensor = tensor.requires_grad_()
    assert np.array_equal(np.asarray(load_image(tensor)), expected)


def test_load_image_reads_a_bfloat16_tensor():
    values = torch.tensor([[0.0, 0.5, 1.0]] * 5, dtype=torch.bfloat16)
    assert np.asarray(load_image(values))[0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("array", [PIXELS, chw(PIXELS), GRAY[:, :, None], GRAY[None]])
def test_preprocess_images_of_an_array_equals_reference(array):
    values, grid = preprocess_images([array], ImageConfig())
    reference = Qwen2VLImageProcessorPil()([array], return_tensors="np")
    assert values.tobytes() == reference["pixel_values"].tobytes()
    assert grid.tolist() == reference["image_grid_thw"].tolist()


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((3, 9, 3), np.uint8), "can be the channels"),
        (np.zeros((1, 9, 1), np.uint8), "can be the channels"),
        (np.zeros((9, 9, 2), np.uint8), "with 1, 3 or 4 channels"),
        (np.zeros((1, 3, 9, 9), np.uint8), "expected one image"),
        (np.zeros((9,), np.uint8), "expected one image"),
        (np.zeros((0, 9, 3), np.uint8), "at least one pixel"),
        (
            PIXELS.astype(np.float32),
            r"must be 0…1, got float32 \[40, 60, 3\] with values 0 to 25\d",
        ),
        ((PIXELS / 255 - 0.48) / 0.27, "must be 0…1, got .*normalization"),
        (np.full((9, 9), np.nan), "are NaN or infinite"),
        (np.full((9, 9), np.inf), "are NaN or infinite"),
        (np.full((9, 9), 256), "integers of an image must be 0…255"),
        (np.full((9, 9), -1), "integers of an image must be 0…255"),
        (np.full((9, 9), 1j), "expected an image of uint8, floats or integers"),
        (np.full((9, 9), "x"), "expected an image of uint8, floats or integers"),
        (np.full((9, 9), None), "expected an image of uint8, floats or integers"),
        (torch.zeros(9, 9).to_sparse(), "cannot convert the Tensor to an array"),
    ],
)
def test_load_image_of_an_ambiguous_array_is_one_sentence(array, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        load_image(array)
    assert "\n" not in str(caught.value)


# --- the programs continue ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a good image and two damaged photos, one of them still readable."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHAPES, "good.png")
    data = SHAPES.read_bytes()
    odd = data[:33] + png_chunk(b"eXIf", b"II*") + data[33:]
    Path("odd.png").write_bytes(odd)
    Path("broken.png").write_bytes(data[:900])
    return tmp_path


QUESTION = "How many shapes are there?"


def test_generate_answers_about_a_photo_with_damaged_metadata(folder, capsys):
    arguments = ["--quiet", "--prompt", QUESTION, "--image"]
    with pytest.warns(UserWarning, match="EXIF data cannot be read"):
        assert command.main([*arguments, "odd.png"]) == 0
    assert capsys.readouterr().out == "Four.\n"
    assert command.main([*arguments, "broken.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("generate.py: cannot read broken.png as an image: ")
    assert error.count("\n") == 1


@pytest.mark.filterwarnings("ignore")
def test_batch_loses_one_record_to_a_damaged_image(folder):
    names = ("good.png", "broken.png", "odd.png")
    lines = []
    for name in names:
        items = [{"type": "image", "image": name}, {"type": "text", "text": QUESTION}]
        lines.append(json.dumps([{"role": "user", "content": items}]))
    Path("in.jsonl").write_text("\n".join(lines))
    for _ in range(2):  # run again, it resumes
        assert batch.main(["in.jsonl", "--out", "out.jsonl", "--quiet"]) == 0
        records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
        records.sort(key=lambda record: record["line"])
        assert [record.get("answer") for record in records] == ["Four.", None, "Four."]
        assert records[1]["error"].startswith("cannot read broken.png as an image")


@pytest.mark.filterwarnings("ignore")
def test_chat_continues_after_a_damaged_image(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/image broken.png\n/image odd.png\n{QUESTION}"))
    assert chat.main(["--quiet"]) == 0
    output = capsys.readouterr()
    assert output.out == "Four.\n"
    assert output.err.startswith("cannot read broken.png as an image")
