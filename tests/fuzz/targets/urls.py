"""URLs, and what a server answers: each mutant is the raw answer of a server on this machine, or a
`data:` or other URL.
"""

import base64
import gzip
import socketserver
import threading
import zlib
from functools import lru_cache
from random import Random

from errors import one_line
from media import MediaLimits, load_image
from tests.fuzz.frame import Target
from tests.fuzz.mutations import byte_mutator
from tests.fuzz.targets.images import draw, save

LIMITS = MediaLimits(max_image_pixels=2**20, max_download_bytes=2**20, max_download_seconds=5.0)
IMAGE = save(draw(8, 8), "PNG")
TOKENS = (
    b"HTTP/1.1 200 302 Location: Content-Length: Content-Encoding: gzip chunked http://".split()
)
TOKENS += b"Transfer-Encoding: deflate br file:///etc/passwd data: ;base64, %00 [::1 @ # ?".split()
TOKENS += [b"\r\n", b"\r\n\r\n", b"\0", b"Location: /\r\n", b"127.0.0.1", b"\xff\xfe"]


def seeds() -> list[bytes]:
    """Return answers of a server, behind the word "answer", and URLs."""
    inputs = []
    encodings = ((b"identity", IMAGE), (b"gzip", gzip.compress(IMAGE, mtime=0)))
    encodings += ((b"deflate", zlib.compress(IMAGE)),)
    for encoding, content in encodings:
        length = str(len(content)).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: " + length
        inputs.append(head + b"\r\nContent-Encoding: " + encoding + b"\r\n\r\n" + content)
    chunk = hex(len(IMAGE))[2:].encode() + b"\r\n" + IMAGE + b"\r\n0\r\n\r\n"
    inputs.append(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
    inputs.append(b"HTTP/1.0 200 OK\r\n\r\n" + IMAGE)
    inputs = [b"answer " + data for data in inputs]
    inputs.append(b"data:image/png;base64," + base64.b64encode(IMAGE))
    inputs.append(b"data:," + b"".join(b"%%%02x" % byte for byte in IMAGE))
    return inputs


# Answers and URLs that are refused, and that a mutation may turn into others.
REFUSED = (
    b"answer HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\n\r\n",
    b"answer HTTP/1.1 301 Moved\r\nLocation: file:///etc/passwd\r\nContent-Length: 3\r\n\r\nabc",
    b"answer HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    b"answer HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n"
    + gzip.compress(bytes(2**21), mtime=0),
    b"http://127.0.0.1:1/x.png",
    b"https://user:name@127.0.0.1:1/a%20b?c=d#e",
    b"file:///nowhere/x.png",
    b"file://localhost/nowhere/x%41.png",
)
MUTATE_BYTES = byte_mutator(TOKENS)


def mutate(random: Random, inputs: list[bytes]) -> bytes:
    """Return a damaged answer or URL."""
    return MUTATE_BYTES(random, [*inputs, *REFUSED])


class Handler(socketserver.BaseRequestHandler):
    """Sends the current answer to whatever is asked."""

    answer = b""

    def handle(self) -> None:
        try:
            self.request.recv(65536)
            self.request.sendall(Handler.answer)
        except OSError:  # the client has closed the connection
            return


@lru_cache
def server_url() -> str:
    """Start a server for as long as this process lives, and return its URL."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}/x.png"


def run(data: bytes) -> None:
    """Open an image from the server that gives the answer, or from the URL itself."""
    url = data.decode("utf-8", errors="surrogateescape")
    if data.startswith(b"answer "):
        Handler.answer = data.removeprefix(b"answer ")
        url = server_url()
    if not is_local(url):
        return
    try:
        image = load_image(url, LIMITS)
    except (ValueError, OSError) as error:
        if one_line(url[:20]) in str(error):
            raise
        raise AssertionError("the sentence does not name the URL") from error
    assert image.width * image.height <= LIMITS.max_image_pixels


def is_local(url: str) -> bool:
    """Return whether a URL certainly asks nobody but this machine."""
    if not url[:5].lower().startswith("http"):
        return True
    return url.lower().startswith(
        (server_url(), "http://127.0.0.1:1/", "https://user:name@127.0.0.1:1/")
    )


TARGET = Target(seeds, run, mentions="", mutate=mutate, seconds=10.0, quick_count=150)
