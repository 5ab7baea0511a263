"""An `http(s)://` URL → an open file, within bounds on time and size.

Servers are strangers: they answer a byte at a time, redirect forever, to other protocols or with a
body of gigabytes, and compress a gigabyte into a megabyte. So one deadline holds for everything
from the name of the host to the last byte, redirects are followed one by one with their bodies
unread, and what is compressed is bounded by its size when it is not.
"""

import asyncio
import ssl
import tempfile
import threading
import zlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, BinaryIO

from errors import error_reason, one_line

SILENT_SECONDS = 20.0  # without a byte
GRACE_SECONDS = 1.0  # to close the connection after the deadline
MAX_REDIRECTS = 10
SPOOL_BYTES = 2**26  # a larger download is kept in a temporary file instead of memory
PIECE_BYTES = 2**18  # of compressed content that is decompressed at a time


class Refused(ValueError):
    """A response that is not used: its status, its size, its encoding or where it redirects to."""


def download(
    url: str,
    max_seconds: float = 600.0,
    max_bytes: int = 2**30,
    silent_seconds: float = SILENT_SECONDS,
) -> BinaryIO:
    """Download an `http(s)://` URL into an open file that can be read and seeked. Redirects are
    followed.

    max_seconds: in all; silent_seconds: without a byte; max_bytes: of the content, decompressed.
    Raises ValueError for a malformed URL, a status other than 200 and more than max_bytes; OSError
    (TimeoutError) if the server cannot be reached, is silent, is too slow or breaks the protocol.
    """
    import httpx2  # takes a while to import, and files do not need it

    name = one_line(url[:80])
    try:
        return run_in_thread(url, name, max_seconds, max_bytes, silent_seconds)
    except Refused:
        raise
    except TimeoutError as error:
        raise TimeoutError(f"{name} was not there after {max_seconds:g} seconds") from error
    except httpx2.TimeoutException as error:
        raise TimeoutError(f"{name} sent nothing for {silent_seconds:g} seconds") from error
    except httpx2.InvalidURL as error:
        raise ValueError(f"{name} is not a URL: {error_reason(error)}") from error
    except Exception as error:  # of the protocol, TLS, the encoding of the name, the disk, ...
        raise OSError(f"cannot fetch {name}: {error_reason(error)}") from error


def run_in_thread(
    url: str, name: str, max_seconds: float, max_bytes: int, silent_seconds: float
) -> BinaryIO:
    """Return the content of a URL. Raises whatever is raised on the way, TimeoutError at the
    deadline.

    The event loop, which can cancel any step, runs in a thread of its own: the caller's thread may
    have one already, as in a notebook.
    """
    files: list[BinaryIO] = []
    errors: list[BaseException] = []

    async def within_deadline() -> BinaryIO:
        async with asyncio.timeout(max_seconds):
            return await fetch(url, name, max_bytes, silent_seconds)

    def run() -> None:
        try:
            files.append(asyncio.run(within_deadline()))
        except BaseException as error:  # the calling thread raises it
            errors.append(error)

    thread = threading.Thread(target=run, name="download", daemon=True)
    thread.start()
    thread.join(min(max_seconds + GRACE_SECONDS, threading.TIMEOUT_MAX))
    if thread.is_alive():  # in a call of the operating system, such as one for a host's address
        raise TimeoutError
    if errors:
        raise errors[0]
    return files[0]


async def fetch(url: str, name: str, max_bytes: int, silent_seconds: float) -> BinaryIO:
    """Follow the redirects of a URL, and return the content of the last response as an open
    file.
    """
    import httpx2

    client = httpx2.AsyncClient(
        timeout=silent_seconds,
        headers={"Accept-Encoding": "identity"},  # images and videos are compressed already
        verify=ssl_context(),
    )
    async with client:
        request = client.build_request("GET", url)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = await client.send(request, stream=True)
            except httpx2.InvalidURL as error:  # of a redirect, which httpx2 2.16.0 checks here
                raise Refused(f"{name} redirects to no URL: {error_reason(error)}") from error
            try:
                if response.next_request is None:
                    check_response(response, name, max_bytes)
                    return await read_content(response, name, max_bytes)
                request = response.next_request
                check_redirect(request.url, name)
            finally:
                await response.aclose()  # a body that was not read is not read here either
    raise Refused(f"{name} redirects more than {MAX_REDIRECTS} times")


@lru_cache
def ssl_context() -> ssl.SSLContext:
    """Return what verifies certificates. Reading them takes longer than a small download."""
    import httpx2

    return httpx2.create_ssl_context()


def check_redirect(target: Any, name: str) -> None:
    """Raise Refused for a redirect to anything but HTTP."""
    if target.scheme not in ("http", "https"):
        where = one_line(str(target)[:80])
        raise Refused(f"{name} redirects to {where}, expected an http or https URL")


def check_response(response: Any, name: str, max_bytes: int) -> None:
    """Raise Refused for a response whose status or announced length rules it out."""
    if response.status_code != 200:
        reason = one_line(response.reason_phrase[:80])
        raise Refused(f"{name} was answered with {response.status_code} {reason}")
    length = response.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 30 or int(length) > max_bytes):
        raise too_large(name, max_bytes)


def too_large(name: str, max_bytes: int) -> Refused:
    """Return the error for a download of more than max_bytes."""
    return Refused(
        f"{name} holds more than {max_bytes / 1e6:,.0f} MB; allow more with --max-download-mb "
        "(MediaLimits.max_download_bytes), or download it and give the file"
    )


async def read_content(response: Any, name: str, max_bytes: int) -> BinaryIO:
    """Return the content of a response as an open file at its beginning."""
    file = tempfile.SpooledTemporaryFile(SPOOL_BYTES)
    inflater = content_inflater(response.headers.get("content-encoding", ""), name)
    async for data in response.aiter_raw():
        for piece in inflate(inflater, data):
            file.write(piece)
            if file.tell() > max_bytes:  # a server need not give its length, nor keep to it
                raise too_large(name, max_bytes)
    if inflater is not None and not inflater.eof:
        raise OSError("its compressed content is cut off")
    file.seek(0)
    return file  # type: ignore[return-value]  # typeshed does not call it a BinaryIO


def content_inflater(encoding: str, name: str) -> Any | None:
    """Return what decompresses content of a Content-Encoding; None for content that is not
    compressed.

    Some servers send files compressed although nobody asked for it. Raises Refused for an encoding
    other than gzip and deflate (RFC 9110, 8.4.1).
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(zlib.MAX_WBITS | 32)  # by its header
    raise Refused(f"{name} was sent with Content-Encoding {encoding[:80]!r}, expected none or gzip")


def inflate(inflater: Any | None, data: bytes) -> Iterator[bytes]:
    """Yield content decompressed in pieces of at most PIECE_BYTES, however far it expands."""
    if inflater is None:
        yield data
        return
    while data and not inflater.eof:
        yield inflater.decompress(data, PIECE_BYTES)
        data = inflater.unconsumed_tail
