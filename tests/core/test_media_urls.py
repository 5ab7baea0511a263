"""Images and videos from files, bytes, `data:` and `http(s)://` URLs, all by one function."""

import base64
import io
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
from PIL import Image

import media
from media import load_image, open_media
from preprocess import load_video

SHAPES = Path(__file__).parents[2] / "examples" / "shapes.png"


REDIRECTIONS = {"/moved": "/shapes.png", "/round": "/round"}
RAW_RESPONSES = {
    "/strange": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    "/garbage": b"\x00\xff nothing of HTTP\r\n\r\n",
}
BODIES = {
    "/shapes.png": SHAPES.read_bytes(),
    "/crossing.mp4": SHAPES.with_name("crossing.mp4").read_bytes(),
    "/words": b"no picture",
    "/page": b"<!DOCTYPE html><html><body>Log in first</body></html>",
}


class Handler(BaseHTTPRequestHandler):
    """Answers by path; `/silent` keeps the line open without a word until the test is over."""

    over = threading.Event()

    def do_GET(self):
        content = SHAPES.read_bytes()
        if self.path == "/silent":
            self.over.wait()
        elif self.path in RAW_RESPONSES:
            self.wfile.write(RAW_RESPONSES[self.path])
        elif self.path in REDIRECTIONS:
            self.reply(302, b"", Location=REDIRECTIONS[self.path])
        elif self.path == "/long":
            self.reply(200, content, length=False)
        elif self.path == "/cut":
            self.reply(200, content[:500], length=len(content))
        elif self.path in BODIES:
            self.reply(200, BODIES[self.path])
        else:
            self.reply(404, b"nothing here")

    def reply(self, status, content, length=True, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if length:
            self.send_header("Content-Length", str(len(content) if length is True else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        """Not to the terminal."""


@pytest.fixture(scope="module")
def server():
    """Return the URL of a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    Handler.over.set()
    server.shutdown()
    thread.join()
    server.server_close()


def sources(server):
    content = SHAPES.read_bytes()
    encoded = base64.b64encode(content).decode()
    urlsafe = base64.urlsafe_b64encode(content).decode()
    return {
        "path": SHAPES,
        "path as text": str(SHAPES),
        "file address": SHAPES.as_uri(),
        "bytes": content,
        "bytearray": bytearray(content),
        "file object": io.BytesIO(content),
        "base64": f"data:image/png;base64,{encoded}",
        "base64 without a type": f"data:;base64,{encoded}",
        "base64 with parameters": f"data:image/png;name=a.png;charset=utf-8;base64,{encoded}",
        "base64 with white space": f"DATA:image/png; base64,{encoded[:99]}\n  {encoded[99:]}\r\n",
        "base64 with percent signs": f"data:image/png;base64,{quote(encoded, safe='')}",
        "base64 of URLs": f"data:image/png;base64,{urlsafe.rstrip('=')}",
        "bare base64": encoded,
        "scheme in capitals": f"HTTP{server.removeprefix('http')}/shapes.png",
        "percent signs": f"data:image/png,{quote(content)}",
        "http": f"{server}/shapes.png",
        "http, moved": f"{server}/moved",
        "http, of unknown length": f"{server}/long",
        "Pillow image": Image.open(SHAPES),
        "array": np.asarray(Image.open(SHAPES).convert("RGB")),
    }


def test_load_image_gives_the_same_image_from_every_source(server):
    expected = np.asarray(Image.open(SHAPES).convert("RGB"))
    for name, source in sources(server).items():
        assert np.array_equal(np.asarray(load_image(source).convert("RGB")), expected), name


def test_load_video_gives_the_same_frames_from_every_source(server):
    film = Path(__file__).parents[2] / "examples" / "crossing.mp4"
    expected = load_video(film, nframes=4)
    encoded = base64.b64encode(film.read_bytes()).decode()
    for source in (
        film.as_uri(),
        film.read_bytes(),
        io.BytesIO(film.read_bytes()),
        f"{server}/crossing.mp4",
        f"data:video/mp4;base64,{encoded}",
    ):
        clip = load_video(source, nframes=4)
        assert np.array_equal(clip.frames, expected.frames), f"{source!r:.40}"
        assert clip.timestamps == expected.timestamps


def test_load_image_reads_an_open_file_from_its_start_and_leaves_it_open():
    with SHAPES.open("rb") as file:
        file.read(10)
        first, second = load_image(file), load_image(file)
        assert first.tobytes() == second.tobytes()
        assert not file.closed


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/nowhere.png", ValueError, "nowhere.png was answered with 404 Not Found"),
        ("/words", ValueError, "/words as an image: it has no format that Pillow knows"),
        ("/page", ValueError, "/page as an image: it is a web page"),
        ("/strange", OSError, "cannot fetch http://127.0.0.1"),
        ("/garbage", OSError, "cannot fetch http://127.0.0.1"),
        ("/cut", OSError, "cannot fetch http://127.0.0.1"),
        ("/round", OSError, "cannot fetch http://127.0.0.1"),
    ],
)
def test_load_image_makes_a_server_error_one_sentence(server, path, error, said):
    with pytest.raises(error, match=said) as caught:
        load_image(server + path)
    assert "\n" not in str(caught.value)


def test_load_image_of_a_server_that_cannot_be_reached_is_an_error():
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    with pytest.raises(OSError, match=r"cannot fetch http://127\.0\.0\.1"):
        load_image(f"http://127.0.0.1:{closed.server_port}/x.png")


def test_download_gives_up_a_silent_server(server):
    with pytest.raises(TimeoutError, match=r"sent nothing for 0\.01 seconds"):
        media.download(f"{server}/silent", timeout=0.01)


def test_download_gives_up_after_its_deadline(server):
    with pytest.raises(TimeoutError, match="was not there after 0 seconds"):
        media.download(f"{server}/shapes.png", deadline=0)


@pytest.mark.parametrize("path", ["/shapes.png", "/long"])
def test_download_limits_the_size_announced_or_not(server, path):
    size = len(SHAPES.read_bytes())
    assert len(media.download(server + path, max_bytes=size).read()) == size
    with pytest.raises(ValueError, match="holds more than"):
        media.download(server + path, max_bytes=size - 1)


def test_download_refuses_an_announced_size_before_reading(server, monkeypatch):
    def refuse(self, *arguments, **more):
        raise AssertionError("the content was read")

    monkeypatch.setattr(httpx2.Response, "iter_bytes", refuse)
    with pytest.raises(ValueError, match="holds more than"):
        media.download(f"{server}/shapes.png", max_bytes=100)


@pytest.mark.parametrize(
    "address", ["data:image/png;base64,abc", "data:nothing", "http://[::1", "https://"]
)
def test_open_media_of_a_malformed_url_is_one_sentence(address):
    with pytest.raises((ValueError, OSError), match=r"URL|fetch") as caught:
        open_media(address)
    assert "\n" not in str(caught.value)


def test_download_writes_a_large_response_to_a_temporary_file(server, monkeypatch):
    monkeypatch.setattr(media, "SPOOL_BYTES", 100)
    with media.download(f"{server}/shapes.png") as file:
        assert file._rolled
        assert file.read() == SHAPES.read_bytes()


@pytest.mark.parametrize(
    "error", [UnicodeError("x"), ssl.SSLError("x"), RuntimeError("x"), OSError(28, "No space left")]
)
def test_download_makes_any_exception_one_sentence(server, monkeypatch, error):
    def fail(self, *arguments, **more):
        raise error

    monkeypatch.setattr(httpx2.Response, "iter_bytes", fail)
    with pytest.raises(OSError, match=r"cannot fetch http://127\.0\.0\.1.*: .+"):
        media.download(f"{server}/shapes.png")


@pytest.mark.parametrize("url", ["http://a b/x.png", "http://\udc80/x.png"])
def test_download_of_a_host_that_cannot_be_encoded_is_one_sentence(url):
    with pytest.raises((ValueError, OSError), match=r"URL|fetch"):
        media.download(url, timeout=0.5)
