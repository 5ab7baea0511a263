"""Images and files from wherever they are: a path, a URL, bytes, an open file, an array.

    source ── open_media ──> path or open file (video.py decodes it)
    source ── load_image ──> Pillow image, upright ── to_rgb ──> RGB

Everything that comes from outside enters through these functions, so each turns whatever a server
or a decoder raises into one sentence that names the source. A source that is sound but is not used
in full (later frames, values beyond 8 bits, an orientation that cannot be read) costs one warning
that names it.
"""

import base64
import binascii
import codecs
import io
import os
import re
import stat
import struct
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image, UnidentifiedImageError

from download import download
from errors import error_reason, one_line


@dataclass(frozen=True)
class MediaLimits:
    """What an image or video from outside may cost. Pixels are those of the file, before resizing.

    A file of less than a megabyte can declare any number of them. On the way to RGB, a pixel takes
    8 bytes at the peak, in a WebP image and in one of floats 16: up to 1.1 and 2.3 GB.
    """

    max_image_pixels: int = 2**27  # a photo of 108 million pixels is read
    max_frame_pixels: int = 2**26  # of a video: 8K has half of it; decoders hold up to 17 frames
    max_download_bytes: int = 2**30  # also of a data: URL
    max_download_seconds: float = 600.0  # redirects and headers included

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if not value > 0:
                raise ValueError(f"{limit.name} is {value!r}, expected a number above 0")


DEFAULT_LIMITS = MediaLimits()

# The formats that Pillow may open, in the order in which it tries them. Each is decoded inside this
# process: EPS, which starts Ghostscript, and WMF, which calls the operating system, are left out on
# purpose. Some builds of Pillow lack some of these, and HEIF needs a plugin such as pillow-heif.
IMAGE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
IMAGE_FORMATS += ("JPEG2000", "PPM", "ICO", "ICNS", "QOI", "PSD", "DDS", "PCX", "SGI", "DIB", "TGA")

# What a file is that is no image, by how it begins (after white space). The dots skip a length.
OTHER_FILES = (
    (
        rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)",
        "HEIC is not supported by Pillow; convert it to JPEG or PNG",
    ),
    (rb".{4}ftypavi[fs]", "this build of Pillow does not support AVIF; convert it to JPEG or PNG"),
    (rb".{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI |FLV", "it is a video; pass it as a video (--video)"),
    (rb"\xff\n|.{4}JXL ", "JPEG XL is not supported by Pillow; convert it to JPEG or PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript is not opened as an image; convert it to PNG"),
    (rb"%PDF", "it is a PDF; convert its pages to PNG"),
    (
        rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg[^>]*>\s*)?<svg",
        "it is an SVG drawing; convert it to PNG",
    ),
    (
        rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<(!doctype )?html",
        "it is a web page (HTML), not an image",
    ),
    (
        rb"version https://git-lfs",
        "it is a Git LFS pointer; run git lfs pull to get the image itself",
    ),
)

# EXIF orientation (tag 0x0112) → how the stored pixels are transposed to be upright; 1 is upright
# already.
ORIENTATION_TAG = 0x0112
TRANSPOSITIONS: dict[float, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
METADATA_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # of Image.info

MAX_JPEG_SCANS = 100  # encoders write about 10; each costs a pass over all pixels in a few bytes
MAX_EXIF_SEGMENTS = 64  # of 64 kB; a camera writes one
MAX_REPAIRED_BYTES = 2**28  # of a damaged file that is read again without its metadata
STRIP_PIXELS = 2**22  # that are composited at a time

# Pillow warns about an image of more than 89 million pixels. `MediaLimits` decides here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


# ------------------------------------------------------------------------------------------ sources
def source_name(source: object) -> str:
    """Return what to call a source in a message: its path or URL, shortened, or the type of the
    object.
    """
    if isinstance(source, str | Path):
        return one_line(str(source)[:200])
    return f"the given {type(source).__name__}"


def open_media(source: Any, limits: MediaLimits = DEFAULT_LIMITS) -> str | BinaryIO:
    """Return the path of the file that a source names, or an open binary file with its content.

    source: a path, a `file://`, `http(s)://` or `data:` URL, the bytes themselves, or an open
    binary file. A path is taken literally: `~` is not expanded. Raises ValueError or OSError with
    one sentence naming the source.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return source
    if not isinstance(source, str | Path):
        raise ValueError(
            f"expected a path, a URL, bytes or an open file, got {type(source).__name__}"
        )
    text = str(source)
    scheme = text[:8].lower()  # schemes are case-insensitive
    if scheme.startswith("data:"):
        return read_data_url(text, limits.max_download_bytes)
    if scheme.startswith(("http://", "https://")):
        return download(text, limits.max_download_seconds, limits.max_download_bytes)
    if scheme.startswith("file://"):
        return file_url_path(text)
    return text


def file_url_path(url: str, windows: bool = os.name == "nt") -> str:
    """Return the path that a `file://` URL names (RFC 8089).

    The host `localhost` is dropped. Where a URL has no third slash, as in
    `file://examples/shapes.png`, the rest is a relative path, as in qwen-vl-utils 0.0.14. On
    Windows `file:///C:/x.png` is C:/x.png, and a host names a share. Percent signs are decoded,
    unless only the path as it is written exists.
    """
    written = url[len("file://") :]
    if written.lower().startswith("localhost/"):
        written = written[len("localhost") :]
    if windows and re.match(r"/[A-Za-z][:|]", written):
        written = written[1] + ":" + written[3:]
    elif windows and re.match(r"[^/\\:]+[/\\]", written):
        written = "//" + written
    decoded = unquote(written)
    if not os.path.lexists(decoded) and os.path.lexists(written):
        return written
    return decoded


def check_regular_file(path: str) -> None:
    """Raise ValueError for a directory, pipe, device or socket, which would block or never end when
    it is read.

    Raises FileNotFoundError, and OSError or ValueError, where the file system does not have the
    path.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise ValueError("it is a directory, expected a file")
    if not stat.S_ISREG(mode):
        raise ValueError("it is a pipe, device or socket, expected a regular file")


def decode_base64(text: str | bytes) -> bytes:
    """Return the bytes of a base64 text, with the standard or the URL-safe alphabet.

    White space is ignored; in the URL-safe alphabet the padding at the end may be missing (RFC
    4648, 5). Raises ValueError for anything else.
    """
    raw = text.encode("ascii") if isinstance(text, str) else text
    raw = b"".join(raw.split())
    if b"-" in raw or b"_" in raw:
        raw = raw.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
        raw += b"=" * (-len(raw) % 4)
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its base64 is malformed: {error}") from error


def read_data_url(url: str, max_bytes: int = DEFAULT_LIMITS.max_download_bytes) -> BinaryIO:
    """Return the content of a `data:` URL (RFC 2397, percent-encoded or base64) as an open file."""
    header, comma, content = url[len("data:") :].partition(",")
    name = one_line(url[:80])
    if not comma:
        raise ValueError(f"cannot read the URL {name}: expected a comma before its content")
    try:
        data = decode_percent(content)
        if header.split(";")[-1].strip().lower() == "base64":
            data = decode_base64(data)
    except ValueError as error:
        raise ValueError(f"cannot read the URL {name}: {error}") from error
    if len(data) > max_bytes:
        found = f"it holds {len(data):,} bytes, expected at most {max_bytes:,}"
        raise ValueError(f"cannot read the URL {name}: {found}")
    return io.BytesIO(data)


def decode_percent(text: str) -> bytes:
    """Return the bytes of a percent-encoded text (RFC 3986, 2.1), decoded piece by piece.

    In one piece, Python's function takes about 17 bytes of memory for each of the text.
    """
    decoded = bytearray()
    start = 0
    while start < len(text):
        end = start + 2**16
        cut = text.find("%", end - 2, end)  # an escape that the end would split
        if cut >= 0:
            end = cut + 3
        decoded += unquote_to_bytes(text[start:end])
        start = end
    return bytes(decoded)


def bare_base64(text: str) -> bytes | None:
    """Return the image whose bytes a text holds in base64 without `data:` in front, or None.

    The reference takes such a text for an image wherever no file has that name (transformers
    5.23.0, `load_image`). Here it must also be long and begin as an image file does, so that a
    misspelled path stays a path.
    """
    if len(text) < 64:
        return None
    try:
        data = decode_base64(text)
    except ValueError:
        return None
    begins = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
    return data if data.startswith(begins) or data[4:8] == b"ftyp" else None


# ------------------------------------------------------------------------------------------- images
def load_image(source: Any, limits: MediaLimits = DEFAULT_LIMITS) -> Image.Image:
    """Open an image: anything `open_media` takes, bare base64, a Pillow image, an array or a
    tensor.

    An image from a file is rotated upright as its EXIF (or XMP) orientation specifies; a Pillow
    image is taken as it is, and so is its mode: `to_rgb` comes later. Arrays and tensors: see
    `array_to_image`.

    Raises FileNotFoundError or ValueError with one sentence naming the source. Warns where only a
    part is used: the first of several frames or pages, values clipped to 8 bits, an orientation
    that cannot be read.
    """
    name = source_name(source)
    if isinstance(source, Image.Image):
        image = load_pillow_image(source, name)
    elif hasattr(source, "__array__"):
        image = array_to_image(source)
    else:
        image = read_image(source, name, limits)
    warn_about_clipping(image, name)
    return image


def load_pillow_image(image: Image.Image, name: str) -> Image.Image:
    """Return an opened Pillow image once its pixels are decoded."""
    try:
        image.load()
    except Exception as error:
        raise ValueError(f"cannot read {name} as an image: {error_reason(error)}") from error
    return image


def read_image(
    source: str | Path | bytes | BinaryIO, name: str, limits: MediaLimits
) -> Image.Image:
    """Decode an image file upright. Where it fails with damaged metadata, decode it without its
    metadata.

    This is the boundary around Pillow's decoders, which raise nearly anything for a damaged file.
    """
    media = open_media(source, limits)
    if not isinstance(media, str):
        return decode_open_file(media, name, limits)
    media = existing_file(media, name)
    if not isinstance(media, str):
        return decode_open_file(media, name, limits)
    try:
        file = open(media, "rb")
    except OSError as error:
        raise ValueError(f"cannot read {name} as an image: {error_reason(error)}") from error
    with file:
        return decode_open_file(file, name, limits)


def decode_open_file(file: BinaryIO, name: str, limits: MediaLimits) -> Image.Image:
    """Decode an open image file from its beginning."""
    try:
        file = seekable(file)
        return decode_image(file, name, limits)
    except TooCostly as error:
        raise ValueError(f"cannot read {name} as an image: {error}") from error
    except Exception as error:
        image = decode_without_metadata(file, name, limits)
        if image is not None:
            return image
        reason = unreadable_reason(error, file)
        raise ValueError(f"cannot read {name} as an image: {reason}") from error


def seekable(file: BinaryIO) -> BinaryIO:
    """Return an open file at its beginning; one that cannot be seeked is read first."""
    try:
        file.seek(0)
    except (AttributeError, OSError):  # a pipe, the body of a response
        return io.BytesIO(file.read())
    return file


def existing_file(path: str, name: str) -> str | BinaryIO:
    """Return the path of a regular file, or the content of a text that is base64 and no path.

    Raises FileNotFoundError or ValueError. Anything that is no regular file is never opened.
    """
    try:
        check_regular_file(path)
    except OSError as error:  # not there, or too long for a name
        data = bare_base64(path)
        if data is not None:
            return io.BytesIO(data)
        if isinstance(error, FileNotFoundError):
            hint = " (~ is not expanded)" if path.startswith("~") else ""
            raise FileNotFoundError(f"there is no image at {name}{hint}") from None
        raise ValueError(f"cannot read {name} as an image: {error_reason(error)}") from error
    except ValueError as error:  # no regular file, or a name with a null character
        raise ValueError(f"cannot read {name} as an image: {error_reason(error)}") from error
    return path


class TooCostly(ValueError):
    """An image that is not decoded, because that would take more than it may."""


def decode_image(file: BinaryIO, name: str, limits: MediaLimits) -> Image.Image:
    """Decode the first frame with Pillow, as a copy, so that the file may be closed. The file is at
    its beginning.

    Raises TooCostly, before any pixel is decoded, for more of them than the limits allow.
    """
    if file.read(3) == b"\xff\xd8\xff":
        check_jpeg(file)
    opened = read_header(file)
    check_pixels(opened, limits)
    opened.load()
    image = upright(opened, name)
    warn_about_frames(opened, name)
    return image


def read_header(file: BinaryIO) -> Image.Image:
    """Return an image whose header is read, by the first of IMAGE_FORMATS that accepts it.

    As `Image.open`, which would refuse more pixels than PIL.Image.MAX_IMAGE_PIXELS, one number for
    the whole process. Raises UnidentifiedImageError where no format accepts the file.
    """
    Image.init()
    file.seek(0)
    start = file.read(16)
    for name in IMAGE_FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        try:
            if accept is not None and accept(start) is not True:  # a text: it has no decoder
                continue
            file.seek(0)
            return factory(file, "")
        except (SyntaxError, IndexError, TypeError, struct.error):  # how Pillow's formats refuse
            continue
    raise UnidentifiedImageError("no format accepts it")


def check_pixels(image: Image.Image, limits: MediaLimits) -> None:
    """Raise TooCostly for an image that is larger than the limits allow."""
    if image.width * image.height > limits.max_image_pixels:
        size = f"it has {image.width:,}×{image.height:,} pixels"
        raise TooCostly(
            f"{size}, expected at most {limits.max_image_pixels:,} in all; shrink it, or allow "
            "more with --max-image-pixels (MediaLimits.max_image_pixels)"
        )


# The next marker of a JPEG file: not a stuffed zero, a restart marker or a fill byte (ITU T.81,
# B.1.1).
JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd8-\xfe])")
JPEG_START_OF_SCAN = 0xDA
JPEG_IMAGE_ENDS = (0xD8, 0xD9)  # the markers that have no length


def check_jpeg(file: BinaryIO) -> None:
    """Raise TooCostly for a JPEG file of more than MAX_JPEG_SCANS scans, and ValueError for one of
    more than MAX_EXIF_SEGMENTS, which can be read without them.

    275 kB can hold 100 scans of 67 million pixels, which take 22 s to decode; libjpeg has no limit.
    Pillow joins EXIF segments one by one, in quadratic time: 20 MB of them take 0.5 s.
    """
    file.seek(0)
    data = file.read()
    scans = 0
    exif_segments = 0
    position = 2  # after the marker that starts the image
    while match := JPEG_MARKER.search(data, position):
        marker = match[1][0]
        if marker == 0xD9:  # the end of the image
            return
        position = match.end()
        exif_segments += marker == 0xE1 and data[position + 2 : position + 6] == b"Exif"
        scans += marker == JPEG_START_OF_SCAN
        if marker not in JPEG_IMAGE_ENDS:
            position += int.from_bytes(data[position : position + 2], "big")
        if exif_segments > MAX_EXIF_SEGMENTS:
            raise ValueError(f"it has more than {MAX_EXIF_SEGMENTS} EXIF segments")
        if scans > MAX_JPEG_SCANS:
            raise TooCostly(f"it has more than {MAX_JPEG_SCANS} scans; save it again as a JPEG")


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return a copy of a decoded image, rotated or mirrored as its EXIF or XMP orientation
    specifies.

    Damaged metadata cost the orientation at most: the image is then taken as it is stored, with a
    warning. An orientation other than 2 to 8 means upright. Source of the table: Pillow,
    `ImageOps.exif_transpose`.
    """
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception as error:  # Pillow's EXIF reader raises nearly anything
        reason = f"its EXIF data cannot be read ({error_reason(error)})"
        warnings.warn(f"{name}: {reason}, so it is not rotated", stacklevel=2)
        orientation = None
    method = None
    if isinstance(orientation, int | float):
        method = TRANSPOSITIONS.get(orientation)
    result = image.copy() if method is None else image.transpose(method)
    for key in METADATA_KEYS:  # the copy is upright, whatever they specify
        result.info.pop(key, None)
    return result


def warn_about_frames(image: Image.Image, name: str) -> None:
    """Warn where a file holds more frames or pages than the first, which alone is used.

    They are not counted: for that, all of a GIF or TIFF file would be read. Not for MPO, whose
    further images are previews or depth maps of the same photo, and PSD, whose frames are layers.
    """
    if image.format in ("MPO", "PSD"):
        return
    try:
        is_animated = getattr(image, "is_animated", False)
    except Exception:  # the first frame is sound, and only the others are not known
        return
    if not is_animated:
        return
    if image.format == "TIFF":
        advice = "the first of several pages; save each page as an image to use all"
    else:
        advice = "the first of several frames; pass it as a video (--video) for all"
    warnings.warn(f"{name}: the image is {advice}", stacklevel=2)


def warn_about_clipping(image: Image.Image, name: str) -> None:
    """Warn where the conversion to 8 bits loses the values of a 16-bit, 32-bit or float image.

    The pixels stay those of the reference, which clips to 0…255 in `convert("RGB")`.
    """
    if not image.mode.startswith(("I", "F")) or 0 in image.size:
        return
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    advice = "convert it to 8 bits first, scaled as you need"
    if not values.size:
        warnings.warn(f"{name}: none of its values is finite; {advice}", stacklevel=2)
        return
    low, high = values.min(), values.max()
    if low < 0 or high > 255:
        found = f"its values ({low:g} to {high:g}) are clipped to 0…255"
        warnings.warn(f"{name}: {found}; {advice}", stacklevel=2)
    elif image.mode == "F" and high <= 1:
        found = f"its values ({low:g} to {high:g}) count as levels of 0…255, so it is black"
        warnings.warn(f"{name}: {found}; {advice}", stacklevel=2)


def unreadable_reason(error: Exception, file: BinaryIO) -> str:
    """Return why Pillow cannot decode a file, in words that a user can act on."""
    if isinstance(error, Image.DecompressionBombError):  # an image in an icon, a strip of a TIFF
        return f"{error_reason(error)}; shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS"
    if isinstance(error, MemoryError):
        return "there is not enough memory for its pixels; shrink it"
    if not isinstance(error, UnidentifiedImageError):
        return error_reason(error)
    head = file_bytes(file, 1024).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head:
        return "it is empty"
    for pattern, reason in OTHER_FILES:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return reason
    return "it has no format that Pillow knows"  # whose own message shows the file object


def file_bytes(file: BinaryIO, size: int) -> bytes:
    """Return the first bytes of an open file, or nothing where they cannot be read."""
    try:
        file.seek(0)
        return bytes(file.read(size))
    except Exception:  # the caller has a better error
        return b""


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB; transparency is composited on white, and 16 bits are clipped
    to 255.

    Source: transformers 5.23.0, `convert_to_rgb`.
    """
    if image.mode == "La":  # premultiplied gray, which Pillow converts to nothing else
        image = image.convert("LA")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return composite_on_white(image)
    return image.convert("RGB")


def composite_on_white(image: Image.Image) -> Image.Image:
    """Return an image with transparency as RGB, computed in strips of full width: all at once, four
    copies of the image would be in memory.
    """
    result = Image.new("RGB", image.size)
    height = max(1, STRIP_PIXELS // max(1, image.width))
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        strip = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), box)
    return result


# ------------------------------------------------------------------------------- arrays and tensors
def array_to_image(source: Any) -> Image.Image:
    """Convert an array or tensor (anything with `__array__`, on any device, with or without grad)
    to an image.

    | shape                          | meaning                                             |
    |--------------------------------|-----------------------------------------------------|
    | [H, W], [H, W, 1], [1, H, W]   | gray                                                |
    | [H, W, 3], [3, H, W]           | RGB                                                 |
    | [H, W, 4], [4, H, W]           | RGBA (`to_rgb` composites it on white)              |
    | both ends 1, 3 or 4: [3, H, 3] | ambiguous: ValueError                               |

    | dtype          | values         | becomes                                            |
    |----------------|----------------|----------------------------------------------------|
    | uint8          | any            | itself                                             |
    | bool           | False, True    | 0, 255                                             |
    | float          | 0…1            | round(255 · x)                                     |
    | other integers | 0…255          | themselves                                         |
    | any            | others, or NaN | ValueError (16 bits, 0…255 floats, normalized, …)  |

    (The reference divides floats of 0…1 by 255 once more; here they are the levels that they
    represent.)
    """
    kind = type(source).__name__
    try:
        array = to_numpy(source)
    except Exception as error:
        raise ValueError(f"cannot convert the {kind} to an array: {error_reason(error)}") from error
    found = f"{array.dtype} {list(array.shape)}"
    levels = to_levels(channels_last(array, found), found)
    if levels.shape[2] == 1:
        levels = levels[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(levels))


def to_numpy(source: Any) -> np.ndarray:
    """Return the NumPy array of an array-like object; PyTorch tensors without importing torch."""
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        if source.is_floating_point():
            source = source.float()  # NumPy has no bfloat16
        source = source.numpy()
    return np.asarray(source)


def channels_last(array: np.ndarray, found: str) -> np.ndarray:
    """Return [H, W], HWC or CHW as [H, W, C] with C = 1, 3 or 4. Raises ValueError where that is
    unclear.
    """
    expected = "expected one image, [height, width], [height, width, channels] or "
    expected += "[channels, height, width]"
    if array.ndim not in (2, 3):
        raise ValueError(f"{expected}, got {found}")
    if array.size == 0:
        raise ValueError(f"expected at least one pixel, got {found}")
    if array.ndim == 2:
        return array[:, :, None]
    first = array.shape[0] in (1, 3, 4)
    last = array.shape[2] in (1, 3, 4)
    if first and last:
        raise ValueError(f"either end of {found} can be the channels; pass a Pillow image instead")
    if first:
        return array.transpose(1, 2, 0)
    if last:
        return array
    raise ValueError(f"{expected} with 1, 3 or 4 channels, got {found}")


def to_levels(array: np.ndarray, found: str) -> np.ndarray:
    """Return an array of any numeric dtype as uint8 levels. Raises ValueError where its range is
    unclear.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected an image of uint8, floats or integers, got {found}")
    low = array.min()
    high = array.max()
    values = f"got {found} with values {low:g} to {high:g}"
    if array.dtype.kind in "iu":
        if low < 0 or high > 255:
            raise ValueError(f"integers of an image must be 0…255, {values}; scale it to uint8")
        return array.astype(np.uint8)
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError(f"floats of an image must be 0…1, but some of {found} are NaN or infinite")
    if low < 0 or high > 1:
        advice = "convert levels of 0…255 to uint8, and undo any normalization"
        raise ValueError(f"floats of an image must be 0…1, {values}; {advice}")
    return np.round(array.astype(np.float64) * 255).astype(np.uint8)


# --------------------------------------------------------------------------------- damaged metadata
JPEG_METADATA = {*range(0xE0, 0xEE), 0xEF, 0xFE}  # APP0…13 and 15, comments; APP14 specifies colors
JPEG_COLORS = 0xEE  # APP14, of
JPEG_COLORS_LENGTH = 14  # bytes or more
# The chunks and tags that specify how pixels are stored:
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
TIFF_PIXELS = {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320}
TIFF_PIXELS |= {322, 323, 324, 325, 338, 339, 347, 529, 530, 532}


def decode_without_metadata(file: BinaryIO, name: str, limits: MediaLimits) -> Image.Image | None:
    """Decode an image whose file as a whole cannot be decoded from its pixel data alone; None if
    that fails too.
    """
    data = file_bytes(file, MAX_REPAIRED_BYTES + 1)
    if len(data) > MAX_REPAIRED_BYTES:
        return None
    try:
        stripped = without_metadata(data)
        if stripped is None:
            return None
        image = decode_image(io.BytesIO(stripped), name, limits)
    except Exception:  # the caller reports the first error
        return None
    reason = "its metadata are damaged, so they are ignored and it is not rotated"
    warnings.warn(f"{name}: {reason}", stacklevel=2)
    return image


def without_metadata(data: bytes) -> bytes | None:
    """Return an image file without what its pixels do not need (EXIF, XMP, text, color profiles),
    or None.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return without_jpeg_metadata(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return without_png_metadata(data)
    if data.startswith((b"II*\0", b"MM\0*")):
        return without_tiff_metadata(data)
    if data[4:8] == b"ftyp":  # AVIF: an item of an unknown type is not read
        return data.replace(b"Exif", b"none")
    return None


def without_jpeg_metadata(data: bytes) -> bytes:
    """Return a JPEG file without the segments of JPEG_METADATA (ITU T.81, B.1.1)."""
    kept = [data[:2]]
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:  # start of scan: the rest is pixel data
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        end = position + 2 + length
        is_damaged = marker == JPEG_COLORS and length < JPEG_COLORS_LENGTH
        if marker not in JPEG_METADATA and not is_damaged:
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, data[position:]])


def without_png_metadata(data: bytes) -> bytes:
    """Return a PNG file with the chunks of PNG_PIXELS alone."""
    kept = [data[:8]]
    position = 8
    while position + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if name in PNG_PIXELS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def without_tiff_metadata(data: bytes) -> bytes:
    """Return a TIFF file whose first directory holds the tags of TIFF_PIXELS alone and is the only
    one.
    """
    order = "<" if data.startswith(b"II") else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    kept = []
    for index in range(count):
        entry = data[start + 2 + 12 * index :][:12]
        (tag,) = struct.unpack_from(f"{order}H", entry)
        if tag in TIFF_PIXELS:
            kept.append(entry)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]
