"""Images and videos from files, bytes, `data:` and `http(s)://` URLs, all by one function."""

import asyncio
import base64
import gzip
import io
import ssl
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

import httpx2
import numpy as np
import pytest
from PIL import Image

import download as download_module
import generate as command
from download import download
from media import DEFAULT_LIMITS, MediaLimits, decode_percent, load_image, open_media
from preprocess import load_video

SHAPES = Path(__file__).parents[2] / "examples" / "shapes.png"


REDIRECTIONS = {
    "/moved": "/shapes.png",
    "/round": "/round",
    "/to-file": SHAPES.as_uri(),
    "/to-data": "data:image/png;base64,iVBORw0KGgo=",
    "/to-ftp": "ftp://127.0.0.1/shapes.png",
}
RAW_RESPONSES = {
    "/strange": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    "/garbage": b"\x00\xff nothing of HTTP\r\n\r\n",
    "/long-status": b"HTTP/1.1 " + b"\xff" * 1000 + b"\r\n\r\n",
    "/nowhere": b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\nContent-Length: 0\r\n\r\n",
}
# What is sent before the connection stays open without another byte.
BEGINNINGS = {
    "/silent": b"",
    "/half-headers": b"HTTP/1.1 200 OK\r\nX-Name: ",
    "/half-body": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc",
    "/endless-redirect": b"HTTP/1.1 302 Found\r\nLocation: /shapes.png\r\n"
    b"Content-Encoding: gzip\r\nContent-Length: 9999999\r\n\r\n" + gzip.compress(bytes(2**20)),
}
# Content that is sent compressed, by Content-Encoding.
ENCODED = {
    "/gzip": ("gzip", gzip.compress(SHAPES.read_bytes())),
    "/GZIP": ("GZIP ", gzip.compress(SHAPES.read_bytes())),
    "/deflate": ("deflate", zlib.compress(SHAPES.read_bytes())),
    "/identity": ("identity", SHAPES.read_bytes()),
    "/bomb": ("gzip", gzip.compress(bytes(2**24))),
    "/cut-gzip": ("gzip", gzip.compress(SHAPES.read_bytes())[:-9]),
    "/not-gzip": ("gzip", SHAPES.read_bytes()),
    "/br": ("br", b"abc"),
    "/twice": ("gzip, gzip", gzip.compress(gzip.compress(SHAPES.read_bytes()))),
}
BODIES = {
    "/shapes.png": SHAPES.read_bytes(),
    "/crossing.mp4": SHAPES.with_name("crossing.mp4").read_bytes(),
    "/words": b"no picture",
    "/page": b"<!DOCTYPE html><html><body>Log in first</body></html>",
}


class Handler(BaseHTTPRequestHandler):
    """Answers by path; those of BEGINNINGS keep the connection open until the tests are over."""

    over = threading.Event()

    def do_GET(self):
        content = SHAPES.read_bytes()
        if self.path in BEGINNINGS:
            self.wfile.write(BEGINNINGS[self.path])
            self.over.wait()
        elif self.path in ENCODED:
            encoding, content = ENCODED[self.path]
            self.reply(200, content, **{"Content-Encoding": encoding})
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
        "http, moved, with a body that does not end": f"{server}/endless-redirect",
        "http, compressed": f"{server}/gzip",
        "http, compressed, in capitals": f"{server}/GZIP",
        "http, deflated": f"{server}/deflate",
        "http, not compressed": f"{server}/identity",
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
        ("/long-status", OSError, "cannot fetch http://127.0.0.1"),
        ("/cut", OSError, "cannot fetch http://127.0.0.1"),
        ("/round", ValueError, "/round redirects more than 10 times"),
        ("/to-file", ValueError, "/to-file redirects to file://.*, expected an http or https URL"),
        ("/to-data", ValueError, "/to-data (was answered with 302 Found|redirects to no URL: )"),
        ("/to-ftp", ValueError, "/to-ftp redirects to ftp://.*, expected an http or https URL"),
        ("/nowhere", (ValueError, OSError), "/nowhere(: .*Invalid URL| was answered with 302 F)"),
        ("/cut-gzip", OSError, "cut-gzip: its compressed content is cut off"),
        ("/not-gzip", OSError, "not-gzip: error: .*incorrect header check"),
        ("/br", ValueError, "/br was sent with Content-Encoding 'br', expected none or gzip"),
        ("/twice", ValueError, "/twice was sent with Content-Encoding 'gzip, gzip'"),
    ],
)
def test_load_image_makes_a_server_error_one_sentence(server, path, error, said):
    with pytest.raises(error, match=said) as caught:
        load_image(server + path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_load_image_of_a_server_that_cannot_be_reached_is_an_error():
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    closed.server_close()
    with pytest.raises(OSError, match=r"cannot fetch http://127\.0\.0\.1"):
        load_image(f"http://127.0.0.1:{closed.server_port}/x.png")


def download_threads():
    return [thread for thread in threading.enumerate() if thread.name == "download"]


def test_download_gives_up_a_silent_server(server):
    with pytest.raises(TimeoutError, match=r"sent nothing for 0\.01 seconds"):
        download(f"{server}/silent", silent_seconds=0.01)


@pytest.mark.parametrize("path", ["/silent", "/half-headers", "/half-body", "/shapes.png"])
def test_download_gives_up_at_its_deadline_wherever_the_server_is(server, monkeypatch, path):
    """And leaves no thread behind."""
    monkeypatch.setattr(download_module, "GRACE_SECONDS", 60)  # on a busy machine
    seconds = 0 if path == "/shapes.png" else 0.05
    with pytest.raises(TimeoutError, match=rf"{path} was not there after {seconds} seconds"):
        download(server + path, max_seconds=seconds, silent_seconds=60)
    assert not download_threads()


def test_download_gives_up_a_call_that_cannot_be_cancelled(server, monkeypatch):
    """As the operating system's for the address of a host."""
    over = threading.Event()

    async def block(*arguments):
        over.wait()

    monkeypatch.setattr(download_module, "fetch", block)
    monkeypatch.setattr(download_module, "GRACE_SECONDS", 0.01)
    with pytest.raises(TimeoutError, match=r"was not there after 0\.01 seconds"):
        download(f"{server}/shapes.png", max_seconds=0.01)
    over.set()
    for thread in download_threads():
        thread.join()


def test_download_runs_within_an_event_loop(server):
    """As in a notebook."""

    async def cell():
        return download(f"{server}/shapes.png").read()

    assert asyncio.run(cell()) == SHAPES.read_bytes()


@pytest.mark.parametrize("path", ["/shapes.png", "/long", "/gzip"])
def test_download_limits_the_size_announced_or_not(server, path):
    size = len(SHAPES.read_bytes())
    assert len(download(server + path, max_bytes=size).read()) == size
    with pytest.raises(ValueError, match="holds more than"):
        download(server + path, max_bytes=size - 1)


def test_download_refuses_an_announced_size_before_reading(server, monkeypatch):
    def refuse(self, *arguments, **more):
        raise AssertionError("the content was read")

    monkeypatch.setattr(httpx2.Response, "aiter_raw", refuse)
    with pytest.raises(ValueError, match="holds more than"):
        download(f"{server}/shapes.png", max_bytes=100)


def test_download_bounds_content_by_its_size_when_decompressed(server):
    """16 MB of zeros are sent as 16 kB."""
    with pytest.raises(ValueError, match="/bomb holds more than 1 MB; allow more with"):
        download(f"{server}/bomb", max_bytes=2**20)


def test_inflate_yields_pieces_of_bounded_size():
    data = gzip.compress(bytes(2**22))
    inflater = download_module.content_inflater("gzip", "x")
    pieces = list(download_module.inflate(inflater, data))
    assert max(map(len, pieces)) <= download_module.PIECE_BYTES
    assert sum(map(len, pieces)) == 2**22
    assert inflater.eof


def test_open_media_limits_the_size_of_downloads_and_data_urls(server):
    limits = MediaLimits(max_download_bytes=1000)
    for url in (f"{server}/shapes.png", f"data:,{'a' * 1001}", f"data:;base64,{'YWFh' * 334}"):
        with pytest.raises(ValueError, match=r"holds more than|holds 1,00\d bytes"):
            open_media(url, limits)
    assert open_media(f"data:,{'a' * 1000}", limits).read() == b"a" * 1000


def test_load_video_limits_the_size_of_downloads(server):
    with pytest.raises(ValueError, match=r"crossing\.mp4 holds more than"):
        load_video(f"{server}/crossing.mp4", limits=MediaLimits(max_download_bytes=1000))


@pytest.mark.parametrize("cut", range(2**16 - 4, 2**16 + 1))
def test_decode_percent_of_a_long_text_equals_decoding_it_whole(cut):
    for text in ("a" * cut + "%41%C3%A9%zz%4" + "é%2" * 2**15, "a" * cut, "a" * cut + "%"):
        assert decode_percent(text) == unquote_to_bytes(text)


@pytest.mark.parametrize("name", [*vars(DEFAULT_LIMITS)])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_media_limits_refuse_a_number_that_is_not_positive(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, expected a number above 0"):
        MediaLimits(**{name: value})


def test_generate_bounds_a_download_by_its_option(server, capsys):
    options = ["--quiet", "--image", f"{server}/bomb", "--max-download-mb"]
    assert command.main([*options, "1"]) == 2
    assert "/bomb holds more than 1 MB; allow more with" in capsys.readouterr().err
    assert command.main([*options, "17"]) == 2
    assert "/bomb as an image: it has no format that" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main([*options, "0"])
    assert "--max-download-mb is 0, expected 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "address", ["data:image/png;base64,abc", "data:nothing", "http://[::1", "https://"]
)
def test_open_media_of_a_malformed_url_is_one_sentence(address):
    with pytest.raises((ValueError, OSError), match=r"URL|fetch") as caught:
        open_media(address)
    assert "\n" not in str(caught.value)


def test_download_writes_a_large_response_to_a_temporary_file(server, monkeypatch):
    monkeypatch.setattr(download_module, "SPOOL_BYTES", 100)
    with download(f"{server}/shapes.png") as file:
        assert file._rolled
        assert file.read() == SHAPES.read_bytes()


@pytest.mark.parametrize(
    "error", [UnicodeError("x"), ssl.SSLError("x"), RuntimeError("x"), OSError(28, "No space left")]
)
def test_download_makes_any_exception_one_sentence(server, monkeypatch, error):
    def fail(self, *arguments, **more):
        raise error

    monkeypatch.setattr(httpx2.Response, "aiter_raw", fail)
    with pytest.raises(OSError, match=r"cannot fetch http://127\.0\.0\.1.*: .+"):
        download(f"{server}/shapes.png")


@pytest.mark.parametrize("url", ["http://a b/x.png", "http://\udc80/x.png"])
def test_download_of_a_host_that_cannot_be_encoded_is_one_sentence(url):
    with pytest.raises((ValueError, OSError), match=r"URL|fetch"):
        download(url, silent_seconds=0.5)
