"""extras/batch_file.py: every line answered as if alone, whatever happens in between."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import our_model, random_weights, small_config
from hypothesis import given
from hypothesis import strategies as st

import generate
from extras import batch_file
from extras.batch_file import Question
from extras.command_line import parse_arguments
from generate import TINY, Sampling
from load_weights import load_model
from preprocess import Processor

EXAMPLES = Path(__file__).parent.parent / "examples"
WIDE, TALL, SHAPES = (str(EXAMPLES / f"{name}.png") for name in ("wide", "tall", "shapes"))
PROCESSOR = Processor.from_pretrained(TINY)
GREEDY = Sampling()


def ask(*content):
    items = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    return [{"role": "user", "content": items}]


def picture(path):
    return {"type": "image", "image": path}


CLIP = {"type": "video", "video": [WIDE, WIDE, WIDE, WIDE]}
MIXED = [
    ask(picture(SHAPES), "Describe this image."),
    [{"role": "user", "content": "How many shapes are there?"}],
    {"id": "é", "messages": ask(picture(WIDE), picture(TALL), "How many shapes are there?")},
    ask(CLIP, "Describe this video."),
    {"id": {"a": 1}, "messages": ask(picture(TALL), CLIP, "What is at the top?")},
    [{"role": "system", "content": "Be brief."}, *ask(picture(WIDE), "Describe this image.")],
]


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY, "cpu", torch.float32)


@pytest.fixture(scope="module")
def random_model():
    """Of no sense, in float64, with so many ends that its answers stop at many lengths."""
    ids = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    ids |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    ids = {name: PROCESSOR.tokenizer.token_id(f"<|{token}|>") for name, token in ids.items()}
    vocab = max(ids.values()) + 1  # the control tokens come last
    config = small_config(vocab=vocab, **ids)
    model = our_model(config, random_weights(config, seed=3), torch.float64)
    model.generation_config = {
        "eos_token_id": list(range(0, vocab, 11)),
        "pad_token_id": vocab - 14,
    }
    return model


def conversation(line):
    return line["messages"] if isinstance(line, dict) else line


def alone(model, line, count=24, sampling=GREEDY):
    """What one conversation by itself is answered: text, ids made, whether it ended."""
    [ids] = generate.generate(model, PROCESSOR(conversation(line)), count, sampling)
    ends = model.generation_config["eos_token_id"]
    assert not set(ids[:-1]) & set(ends)
    return PROCESSOR.tokenizer.decode(ids), len(ids), ids[-1] in ends


class Place:
    """A folder with conversations.jsonl and answers.jsonl in it."""

    def __init__(self, folder):
        self.batch, self.out = folder / "conversations.jsonl", folder / "answers.jsonl"

    def write(self, lines):
        text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
        self.batch.write_text(text, encoding="utf-8")
        return self

    def options(self, *more):
        return [
            "--batch",
            str(self.batch),
            "--out",
            str(self.out),
            "--max-new-tokens",
            "24",
            *map(str, more),
        ]

    def run(self, model, *more, sampling=GREEDY):
        """The records in the order of the lines."""
        batch_file.run(parse_arguments(self.options("--quiet", *more)), model, PROCESSOR, sampling)
        return self.records()

    def records(self):
        found = [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]
        return sorted(found, key=lambda record: record["line"])


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def asked_lengths(monkeypatch):
    """The number of rows of each group that reaches the model."""
    rows, stream = [], generate.stream

    def counting(model, batch, *more):
        rows.append(len(batch.input_ids))
        return stream(model, batch, *more)

    monkeypatch.setattr(batch_file, "stream", counting)
    return rows


# ------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("which", ["tiny", "random_model"])
def test_each_line_is_answered_as_it_is_alone(which, size, place, request):
    model = request.getfixturevalue(which)
    records = place.write(MIXED).run(model, "--batch-size", size)
    for number, (line, record) in enumerate(zip(MIXED, records, strict=True), 1):
        text, count, finished = alone(model, line)
        wanted = {"line": number, "answer": text, "tokens_out": count, "finished": finished}
        wanted["tokens_in"] = PROCESSOR(conversation(line)).input_ids.shape[1]
        wanted |= {"id": line["id"]} if isinstance(line, dict) else {}
        assert {name: value for name, value in record.items() if name != "sha256"} == wanted
    if which == "random_model":
        assert len({record["tokens_out"] for record in records}) > 2


@pytest.mark.parametrize("size", [1, 4])
def test_with_a_seed_a_line_draws_the_same_whatever_it_is_answered_with(size, place, random_model):
    sampling = Sampling(do_sample=True, temperature=1.5, seed=7)
    lines = [MIXED[1], MIXED[0], MIXED[1], MIXED[2]]
    records = place.write(lines).run(random_model, "--batch-size", size, sampling=sampling)
    for number, (line, record) in enumerate(zip(lines, records, strict=True)):
        assert (
            record["answer"]
            == alone(random_model, line, 24, Sampling(True, 1.5, seed=7 + number))[0]
        )
    assert records[0]["answer"] != records[2]["answer"]


def test_an_answer_is_written_before_its_group_has_ended(place, tiny, monkeypatch):
    seen, stream = [], generate.stream

    def watching(*arguments):
        for step in stream(*arguments):
            yield step
            seen.append(len(place.records()))

    monkeypatch.setattr(batch_file, "stream", watching)
    place.write([MIXED[0], MIXED[1]]).run(tiny)
    assert seen[0] == 0
    assert seen[-2] == 1


def test_options_reach_the_prompt_and_a_clips_own_come_first(place, tiny):
    lines = [MIXED[2], ask(CLIP, "What?"), ask(CLIP | {"nframes": 4}, "What?")]
    records = place.write(lines).run(tiny, "--add-vision-id", "--nframes", 2, "--max-new-tokens", 2)
    lines[1] = ask(CLIP | {"nframes": 2}, "What?")
    batches = [PROCESSOR(conversation(line), add_vision_id=True) for line in lines]
    assert [record["tokens_in"] for record in records] == [
        batch.input_ids.shape[1] for batch in batches
    ]
    assert records[1]["tokens_in"] != records[2]["tokens_in"]
    assert [(record["tokens_out"], record["finished"]) for record in records] == [(2, False)] * 3


def test_words_go_to_stderr_and_quiet_says_nothing(place, tiny, capsys):
    place.write([MIXED[1], "no json"])
    batch_file.run(parse_arguments(place.options()), tiny, PROCESSOR, GREEDY)
    said = capsys.readouterr()
    assert said.out == ""
    assert "2/2" in said.err
    assert said.err.endswith(f"{place.out}: 1 answers, 1 errors, 0 were there already\n")
    place.run(tiny)
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------------------- groups


@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 9)), max_size=60),
    size=st.integers(1, 5),
    window=st.integers(1, 4),
    limit=st.integers(1, 40),
)
def test_groups_hold_each_question_once_sorted_and_bounded(sizes, size, window, limit):
    asked = [
        Question({"line": n}, "", length=length, size=held)
        for n, (length, held) in enumerate(sizes)
    ]
    read = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_file, "WINDOW", window)
        patch.setattr(batch_file, "WINDOW_BYTES", limit)
        done = []
        for group in batch_file.groups((read.append(q) or q for q in asked), size):
            assert 1 <= len(group) <= size
            lengths = [q.length for q in group]
            assert lengths == sorted(lengths, reverse=True)
            held = [q for q in read if q not in done]
            assert len(held) <= window * size
            assert sum(q.size for q in held[:-1]) < limit
            assert max(q.length for q in held) == lengths[0]
            done += group
    assert sorted(q.record["line"] for q in done) == list(range(len(sizes)))


# ----------------------------------------------------------------------------------------------------- bad lines

BAD = {
    "{": "the line is not JSON: Expecting property name enclosed in double quotes at column 2",
    "3": "expected a list of messages, or an object with such a list under messages",
    "[]": "expected a list of messages",
    '{"id": 5, "message": []}': "expected a list of messages",
    '{"id": 5, "messages": "Hello"}': "expected a list of messages",
    '[[{"role": "user", "content": "two in one"}]]': "message 0 must be a dict with role and content, not list",
    '[{"content": "x"}]': "message 0 needs a role",
    '[{"role": "user", "content": 5}]': "the content of message 0 must be text or a list",
    '[{"role": "user", "content": [5]}]': "a content item must be a dict",
    '[{"role": "user", "content": [{"text": 5}]}]': "a content item is neither image, video nor text",
    '[{"role": "user", "content": [{"image": "gone.png"}]}]': "there is no image at gone.png",
    '[{"role": "user", "content": [{"image": 5}]}]': "expected a path, a URL, bytes or an open file, got int",
    '[{"role": "user", "content": [{"video": "gone.mp4"}]}]': "there is no",
    '[{"role": "user", "content": "\\ud800"}]': "this is not a valid Unicode string",
    json.dumps(ask(picture(WIDE) | {"max_pixels": []})): "max_pixels is [], expected an integer",
    json.dumps(ask(picture(WIDE) | {"max_pixels": 0})): "max_pixels is 0, expected an integer of",
    "[" * 100_000: "the line cannot be used: RecursionError",
}


def test_a_bad_line_becomes_an_error_record_and_the_rest_goes_on(place, tiny):
    records = place.write([MIXED[1], *BAD, " ", MIXED[1]]).run(tiny)
    assert [record["line"] for record in records] == [*range(1, len(BAD) + 2), len(BAD) + 3]
    for (line, sentence), record in zip(BAD.items(), records[1:-1], strict=True):
        assert record["error"].startswith(sentence), line[:80]
        assert ("id" in record) == ('"id"' in line)
    assert records[0]["answer"] == records[-1]["answer"]


def test_bytes_that_are_no_utf_8_and_words_that_utf_8_cannot_write(place, tiny):
    good = json.dumps({"id": "\ud800ü", "messages": MIXED[1]}).encode()
    place.batch.write_bytes(
        b"\xef\xbb\xbf" + good + b'\r\n["\xff"]\n' + good
    )  # a byte order mark, no last newline
    records = place.run(tiny)
    assert [record.get("id") for record in records] == ["\ud800ü", None, "\ud800ü"]
    assert "can't decode byte 0xff" in records[1]["error"]
    assert "ü" in place.out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("too much"), "out of memory (too much): lower --max-pixels"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (MemoryError(), "out of memory: lower"),
        (generate.NotFiniteError("the scores are not finite"), "the scores are not finite"),
    ],
    ids=str,
)
def test_what_breaks_one_conversation_costs_only_its_own_record(
    error, sentence, place, tiny, monkeypatch
):
    """The others of its group are answered as ever, also where it breaks after some have ended."""
    expected = {record["line"]: record for record in place.write(MIXED).run(tiny)}
    culprit = PROCESSOR(conversation(MIXED[2])).input_ids.shape[1]
    stream, place.out = generate.stream, place.out.with_name("broken.jsonl")

    def fails(model, batch, *more):
        steps = stream(model, batch, *more)
        if culprit not in batch.attention_mask.sum(1):
            return steps
        return broken(steps)

    def broken(steps):
        yield next(steps)
        yield next(steps)
        raise error

    monkeypatch.setattr(batch_file, "stream", fails)
    lengths = [PROCESSOR(conversation(line)).input_ids.shape[1] for line in MIXED]
    for record in place.run(tiny, "--batch-size", len(MIXED)):
        if lengths[record["line"] - 1] == culprit:
            assert record["error"].startswith(sentence)
        else:
            assert record == expected[record["line"]]


def test_an_error_of_the_program_itself_is_raised(place, tiny, monkeypatch):
    def fails(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(batch_file, "stream", fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        place.write(MIXED).run(tiny)


def test_a_limit_that_counts_the_prompt_is_the_same_in_a_group_as_alone(
    place, random_model, monkeypatch
):
    """The shorter of two prompts may have the longer answer; a prompt beyond the limit is an error of its own."""
    settings = {"eos_token_id": [], "pad_token_id": 0, "max_length": 60}
    monkeypatch.setattr(random_model, "generation_config", settings)
    lines = [ask("What?"), ask("How many of them are there in all, on the left side?"), MIXED[2]]
    arguments = parse_arguments(place.write(lines).options("--quiet"))
    arguments.max_new_tokens = None
    batch_file.run(arguments, random_model, PROCESSOR, GREEDY)
    together = place.records()
    arguments.out = str(place.out.with_name("alone.jsonl"))
    arguments.batch_size = 1
    batch_file.run(arguments, random_model, PROCESSOR, GREEDY)
    place.out = place.out.with_name("alone.jsonl")
    assert together == place.records()
    assert sum("error" in record for record in together) == 1
    for record in together:
        if "error" in record:
            assert "max_length is 60" in record["error"]
        else:
            assert record["tokens_in"] + record["tokens_out"] == 60


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("groups_done", [0, 2])
def test_what_was_interrupted_goes_on(groups_done, place, tiny, monkeypatch):
    whole = Place(place.batch.parent)
    whole.out = whole.out.with_name("whole.jsonl")
    wanted = whole.write(MIXED).run(tiny)
    stream, calls = generate.stream, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > groups_done:
            raise KeyboardInterrupt
        return stream(*arguments)

    monkeypatch.setattr(batch_file, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        place.run(tiny, "--batch-size", 2)
    assert len(place.records()) == 2 * groups_done
    rows = asked_lengths(monkeypatch)
    assert place.run(tiny, "--batch-size", 2) == wanted
    assert sum(rows) == len(MIXED) - 2 * groups_done
    assert place.run(tiny) == wanted
    assert sum(rows) == len(MIXED) - 2 * groups_done, "nothing was left to do"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_real_process_may_be_killed_at_any_time(name, place, tiny, monkeypatch):
    window = batch_file.WINDOW
    asked = threading.Event()
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            released.wait(60)
            with contextlib.suppress(OSError):  # the process that asked may have ended
                self.send_response(200)
                self.end_headers()
                self.wfile.write(Path(WIDE).read_bytes())

        def log_message(self, *arguments):
            """Not to the terminal."""

    # The image after the first window is at a URL whose server waits: then the window has been answered.
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url = f"http://127.0.0.1:{server.server_port}/x.png"
        lines = [MIXED[1]] * window + [ask(picture(url), "What?")]
        options = place.write(lines).options("--batch-size", 1)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        line = [sys.executable, generate.__file__, *options]
        process = subprocess.Popen(line, stderr=subprocess.PIPE, env=environment)
        try:
            assert asked.wait(60)
            process.send_signal(getattr(signal, name))
            said = process.communicate()[1].decode()
            assert process.returncode == {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}[name]
            assert "Traceback" not in said
            assert len(place.records()) == window

            released.set()
            rows = asked_lengths(monkeypatch)
            assert len(place.run(tiny)) == window + 1
            assert rows == [1]
        finally:
            released.set()
            server.shutdown()


def test_a_half_written_record_is_dropped_and_made_again(place, tiny, capsys):
    wanted = place.write(MIXED[:3]).run(tiny)
    text = place.out.read_bytes()
    last = text[:-1].rindex(b"\n") + 1
    for end in (last + 3, last + 40, len(text) - 1):
        place.out.write_bytes(text[:end])
        assert place.run(tiny) == wanted
        assert "its last record is only half written and is dropped" in capsys.readouterr().err


def test_lines_with_errors_are_tried_again_and_answers_stay(place, tiny, tmp_path, monkeypatch):
    missing = tmp_path / "later.png"
    first = place.write(
        [MIXED[1], ask(picture(str(missing)), "How many shapes are there?"), "{"]
    ).run(tiny)
    assert ["error" in record for record in first] == [False, True, True]
    shutil.copy(WIDE, missing)
    place.write([MIXED[1], ask(picture(str(missing)), "How many shapes are there?"), MIXED[1]])
    rows = asked_lengths(monkeypatch)
    second = place.run(tiny)
    assert second[0] == first[0]
    assert ["error" in record for record in second] == [False] * 3
    assert rows == [2]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda lines: [lines[0], ask("Another one"), lines[2]],
            "line 2 of .* is not the one that .* answers",
        ),
        (lambda lines: lines[1:], "line 1 of .* is not the one that .* answers"),
        (lambda lines: lines[:2], "answers line 3 of .*, which is not there"),
    ],
)
def test_another_input_is_noticed_and_nothing_is_done(change, sentence, place, tiny):
    place.write(MIXED[:3]).run(tiny)
    before = place.out.read_bytes()
    with pytest.raises(ValueError, match=sentence):
        place.write(change(MIXED[:3])).run(tiny)
    assert place.out.read_bytes() == before
    assert sorted(path.name for path in place.out.parent.iterdir()) == [
        "answers.jsonl",
        "conversations.jsonl",
    ]


@pytest.mark.parametrize(
    "text",
    ["notes\n", "notes", '["a list"]\n', '{"line": 1}\n', '"error"\n', '{"line": 1, "error": "x"}\nnotes',
     '{ "line": 1, "error": "x"}', '{"line": 1, "sha256": "x"}\n{"line": 1, "sha256": "x"}\n'],
)  # fmt: skip
def test_a_file_of_something_else_is_not_touched(text, place, tiny):
    place.write(MIXED[:1]).out.write_text(text)
    with pytest.raises(ValueError, match="is no answer of --batch: give another --out"):
        place.run(tiny)
    assert place.out.read_text() == text


# ------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", WIDE], "--image or --video means nothing with --batch"),
        (["--prompt", ""], "--prompt means nothing with --batch"),
        (["--system", "x"], "--system means nothing with --batch"),
        (["--batch", "gone.jsonl"], "there is no file gone.jsonl, which --batch names"),
        (["--batch", "."], "there is no file ., which --batch names"),
        (
            ["--out", "gone/answers.jsonl"],
            "there is no folder gone, in which --out is to be written",
        ),
        (["--out", "."], "--out names ., which is no file"),
        (["--out", "link.jsonl"], "--out names the very file that --batch names"),
    ],
)
def test_options_and_files_that_do_not_fit_are_one_sentence(
    options, sentence, place, tiny, monkeypatch
):
    monkeypatch.chdir(place.batch.parent)
    os.link(place.write(MIXED[:1]).batch, "link.jsonl")
    with pytest.raises((ValueError, OSError)) as caught:
        place.run(tiny, *options)
    assert str(caught.value).startswith(sentence)
    assert not place.out.exists()
