"""Images and files from wherever they are: a path, a URL, bytes, an open file, an array.

    source ── open_media ──> path or open file (video.py decodes it)
    source ── load_image ──> Pillow image, upright ── to_rgb ──> RGB

Everything that comes from outside enters through these functions, so each turns whatever a server or a decoder
raises into one sentence that names the source.
"""

import io
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

DOWNLOAD_TIMEOUT = 20.0  # seconds without a byte
DOWNLOAD_DEADLINE = 600.0  # seconds in all
DOWNLOAD_MAX_BYTES = 2**30
SPOOL_BYTES = 2**26  # a larger download is kept in a temporary file instead of memory


def source_name(source: object) -> str:
    """Return what to call a source in a message: its path or URL, shortened, or the kind of object it is."""
    if isinstance(source, str | Path):
        return f"{source!s:.200}"
    return f"the given {type(source).__name__}"


def open_media(source: str | Path | bytes | BinaryIO) -> str | BinaryIO:
    """Return the path of the file that a source names, or an open binary file with its content.

    source: a path, a `file://`, `http(s)://` or `data:` URL, the bytes themselves, or an open binary file.
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
    if text.startswith("data:"):
        return read_data_url(text)
    if text.startswith(("http://", "https://")):
        return download(text)
    if text.startswith("file://"):
        return unquote(text.removeprefix("file://"))
    return text


def read_data_url(url: str) -> BinaryIO:
    """Return the content of a `data:` URL (RFC 2397, plain or base64) as an open file."""
    try:
        with urllib.request.urlopen(url) as content:
            return io.BytesIO(content.read())
    except ValueError as error:
        raise ValueError(f"cannot read the URL {url:.80}: {error}") from error


def download(
    url: str,
    timeout: float | None = None,
    deadline: float | None = None,
    max_bytes: int | None = None,
) -> BinaryIO:
    """Download an `http(s)://` URL into an open file that can be read and seeked. Redirections are followed.

    timeout: seconds without a byte; deadline: seconds in all; max_bytes: of the content. The defaults are the
    constants above. Raises ValueError for a malformed URL, a response other than 200 and more than max_bytes;
    OSError (TimeoutError) if the server cannot be reached, is silent or is too slow.
    """
    import httpx2  # takes a while to import, and files do not need it

    timeout = DOWNLOAD_TIMEOUT if timeout is None else timeout
    deadline = DOWNLOAD_DEADLINE if deadline is None else deadline
    max_bytes = DOWNLOAD_MAX_BYTES if max_bytes is None else max_bytes
    name = f"{url:.80}"
    too_large = ValueError(
        f"{name} holds more than {max_bytes / 1e6:,.0f} MB; download it and give the file"
    )
    file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)
    end = time.monotonic() + deadline
    try:
        with httpx2.stream("GET", url, timeout=timeout, follow_redirects=True) as response:
            if response.status_code != 200:
                raise ValueError(
                    f"{name} was answered with {response.status_code} {response.reason_phrase}"
                )
            if int(response.headers.get("content-length", 0)) > max_bytes:
                raise too_large
            for part in response.iter_bytes():
                file.write(part)
                if file.tell() > max_bytes:  # a server need not give its length, nor keep to it
                    raise too_large
                if time.monotonic() > end:
                    raise TimeoutError(f"{name} was not there after {deadline:.0f} seconds")
    except httpx2.TimeoutException as error:
        raise TimeoutError(f"{name} sent nothing for {timeout:g} seconds") from error
    except httpx2.InvalidURL as error:
        raise ValueError(f"{name} is not a URL: {error}") from error
    except httpx2.HTTPError as error:
        raise OSError(f"cannot fetch {name}: {error}") from error
    file.seek(0)
    return file


def load_image(source: str | Path | bytes | BinaryIO | Image.Image | np.ndarray) -> Image.Image:
    """Open an image: anything `open_media` takes, a Pillow image, or an array uint8 [H, W, 3] in RGB.

    An image from a file is rotated upright as its EXIF orientation specifies; a Pillow image is taken as it is, and
    so is its mode: `to_rgb` comes later. Raises FileNotFoundError or ValueError with one sentence naming the source.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ValueError(
                f"an array must be uint8 [height, width, 3], not {source.dtype} {list(source.shape)}"
            )
        return Image.fromarray(source)
    file, name = open_media(source), source_name(source)
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(
                image
            )  # a copy, so the whole file has been read and may be closed
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no image at {name}") from None
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        # Damaged, cut off, or no image at all: Pillow's decoders raise any of these.
        unknown = isinstance(error, UnidentifiedImageError)  # whose message shows the file object
        reason = (
            "it has no format that Pillow knows"
            if unknown
            else getattr(error, "strerror", None) or error
        )
        raise ValueError(f"cannot read {name} as an image: {reason}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any Pillow mode to RGB; transparency is composited on white, and 16 bits are clipped to 255.

    Source: transformers 5.23.0, `convert_to_rgb`.
    """
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
