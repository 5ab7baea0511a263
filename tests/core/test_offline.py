"""With local files nothing reaches for the network, although HF_HUB_OFFLINE is not set.

The guard is in Python's sockets, which the hub client and the HTTP client use. It records each
attempt, so that one that is caught and swallowed fails the test, too.
"""

import contextlib
import io
import json
import socket
import sys

import pytest
from example_batches import EXAMPLES
from huggingface_hub import constants, utils

import generate as generate_program
from apps import attention_report, batch, chat, estimate, grounding, logprobs, trace
from command_line import BUNDLED_CHECKPOINT
from generate import generate
from load_weights import find_checkpoint, load_model
from media import load_image
from preprocess import Processor

LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "", None)
IMAGE = str(EXAMPLES / "small.png")
VIDEO = str(EXAMPLES / "crossing.mp4")
QUICK = ["--max-new-tokens", "3", "--quiet"]
EXTERNAL_URL = "http://192.0.2.1/image.png"  # an address that is reserved for documentation


def host_of(address):
    """Return the host of a socket's address; None for one of this machine alone (AF_UNIX)."""
    return address[0] if isinstance(address, tuple) else None


@contextlib.contextmanager
def closed_network():
    """Within it, connections and look-ups raise OSError unless they are local; yield the others."""
    attempts = []
    with pytest.MonkeyPatch.context() as patch:

        def guard(owner, name, host_in):
            original = getattr(owner, name)

            def guarded(*arguments, **options):
                host = host_in(arguments)
                if host not in LOCAL_HOSTS:
                    attempts.append((name, host))
                    raise OSError(f"{name} of {host}: the network is closed")
                return original(*arguments, **options)

            patch.setattr(owner, name, guarded)

        for name in ("connect", "connect_ex", "sendto"):
            guard(socket.socket, name, lambda arguments: host_of(arguments[-1]))
        for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
            guard(socket, name, lambda arguments: arguments[0])
        yield attempts


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Close the network for a test, which fails if anything reached for it."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with closed_network() as attempts:
        yield
    assert attempts == []


@pytest.fixture
def hub_online(monkeypatch, tmp_path):
    """Let the hub client try to reach the hub, with an empty cache."""
    if hasattr(utils, "reset_sessions"):  # huggingface_hub 0: an earlier test may be offline
        utils.reset_sessions()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_closed_network_records_what_reaches_for_it(hub_online):
    """The guard is in the way of the hub client, of the HTTP client and of plain sockets."""
    with closed_network() as attempts:
        with pytest.raises(OSError, match="Someone/Qwen2-VL"):
            find_checkpoint("Someone/Qwen2-VL")
        assert attempts
        attempts.clear()
        with pytest.raises(OSError, match=r"192\.0\.2\.1"):
            load_image(EXTERNAL_URL)
        assert attempts
        attempts.clear()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            with pytest.raises(OSError, match="closed"):
                sender.sendto(b"", ("192.0.2.1", 9))
        assert attempts == [("sendto", "192.0.2.1")]


def test_load_and_answer_reach_for_no_network(no_network):
    directory = find_checkpoint(str(BUNDLED_CHECKPOINT))
    model = load_model(directory)
    processor = Processor.from_pretrained(directory)
    content = [
        {"type": "image", "image": IMAGE},
        {"type": "video", "video": VIDEO, "nframes": 2},
        {"type": "text", "text": "What is this?"},
    ]
    [tokens] = generate(model, processor([{"role": "user", "content": content}]), 3)
    assert len(tokens) == 3


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("program", "options"),
    [
        (generate_program, ["--image", IMAGE]),
        (generate_program, ["--video", VIDEO, "--nframes", "2"]),
        (generate_program, ["--prompt", "Hello", "--processor", str(BUNDLED_CHECKPOINT)]),
        (generate_program, ["--image", IMAGE, "--model", str(BUNDLED_CHECKPOINT)]),
        (generate_program, ["--prompt", "Hello", "--quantize", "int8"]),
        (attention_report, ["--image", IMAGE, "--out", "report.html"]),
        (batch, ["questions.jsonl", "--out", "answers.jsonl"]),
        (estimate, ["--video", VIDEO, "--nframes", "2"]),
        (grounding, ["--image", IMAGE, "--prompt", "Find the red circle."]),
        (logprobs, ["--image", IMAGE]),
        pytest.param(trace, ["--image", IMAGE], marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", None) or " ".join(value[::2]),
)
def test_programs_reach_for_no_network(no_network, tmp_path, monkeypatch, capsys, program, options):
    question = {"role": "user", "content": [{"type": "image", "image": IMAGE}]}
    (tmp_path / "questions.jsonl").write_text(json.dumps([question]) + "\n")
    monkeypatch.chdir(tmp_path)
    assert program.main([*options, *QUICK]) == 0


@pytest.mark.slow
def test_chat_reaches_for_no_network(no_network, tmp_path, monkeypatch, capsys):
    lines = f"/image {IMAGE}\nWhat is this?\n/video {VIDEO}\nAnd this?\n/save {tmp_path}/chat\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert chat.main(["--fps", "1", *QUICK]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert (tmp_path / "chat").exists()
