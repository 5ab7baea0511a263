"""apps/batch.py: each line is answered as if it were alone, whatever happens to the others."""

import contextlib
import errno
import io
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

import command_line
import cuda_graph
import generate
import linear
import memory
from apps import batch as batch_app
from apps.batch import Answerer, Question, answer_file, parse_arguments, read_answers
from command_line import BUNDLED_CHECKPOINT
from generate import GenerationConfig
from json_files import MAX_DEPTH
from load_weights import load_model
from output_files import locked
from preprocess import Processor

ROOT = Path(__file__).parents[2]
WIDE = str(ROOT / "examples" / "wide.png")
TALL = str(ROOT / "examples" / "tall.png")
SHAPES = str(ROOT / "examples" / "shapes.png")
PROCESSOR = Processor.from_pretrained(BUNDLED_CHECKPOINT)
GREEDY = GenerationConfig()


def user_message(*content):
    """Return a conversation of one user message; content: items, or text."""
    items = []
    for item in content:
        items.append({"type": "text", "text": item} if isinstance(item, str) else item)
    return [{"role": "user", "content": items}]


def image(path):
    return {"type": "image", "image": path}


VIDEO = {"type": "video", "video": [WIDE, WIDE, WIDE, WIDE]}
MIXED = [
    user_message(image(SHAPES), "Describe this image."),
    [{"role": "user", "content": "How many shapes are there?"}],
    {"id": "é", "messages": user_message(image(WIDE), image(TALL), "How many shapes are there?")},
    user_message(VIDEO, "Describe this video."),
    {"id": {"a": 1}, "messages": user_message(image(TALL), VIDEO, "What is at the top?")},
    [
        {"role": "system", "content": "Be brief."},
        *user_message(image(WIDE), "Describe this image."),
    ],
]


@pytest.fixture(scope="module")
def tiny():
    return load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)


@pytest.fixture(scope="module")
def random_model():
    """Return a float64 model with so many eos tokens that its answers end at many lengths."""
    special = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids = {name: PROCESSOR.tokenizer.token_id(token) for name, token in special.items()}
    vocab = max(ids.values()) + 1  # the special tokens come last
    config = small_config(vocab=vocab, **ids)
    model = our_model(config, random_weights(config, seed=3), torch.float64)
    model.generation_config = {
        "eos_token_id": list(range(0, vocab, 11)),
        "pad_token_id": vocab - 14,
    }
    return model


def conversation(line):
    return line["messages"] if isinstance(line, dict) else line


def prompt_length(line, **options):
    return PROCESSOR(conversation(line), **options).input_ids.shape[1]


def answer_alone(model, line, config=GREEDY):
    """Return the answer to one conversation by itself: text, number of tokens, whether it ended."""
    [ids] = generate.generate(model, PROCESSOR(conversation(line)), 24, config)
    ends = model.generation_config["eos_token_id"]
    assert not set(ids[:-1]) & set(ends)
    return PROCESSOR.tokenizer.decode(ids), len(ids), ids[-1] in ends


class Files:
    """A directory with questions.jsonl and answers.jsonl."""

    def __init__(self, directory):
        self.questions = directory / "questions.jsonl"
        self.out = directory / "answers.jsonl"

    def write(self, lines):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.questions.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
        return self

    def options(self, *more):
        paths = [str(self.questions), "--out", str(self.out)]
        return [*paths, "--max-new-tokens", "24", *map(str, more)]

    def run(self, model, *more, config=GREEDY):
        """Answer the questions; return the records in the order of the lines."""
        arguments = parse_arguments(self.options(*more))
        answerer = Answerer(
            model, PROCESSOR, config, arguments.max_new_tokens, arguments.add_vision_id
        )
        answer_file(
            answerer,
            arguments.questions,
            arguments.out,
            read_answers(arguments.out),
            arguments.batch_size,
            command_line.video_options(arguments),
        )
        return self.records()

    def records(self):
        records = [json.loads(line) for line in self.out.read_text(encoding="utf-8").splitlines()]
        return sorted(records, key=lambda record: record["line"])


@pytest.fixture
def files(tmp_path):
    command_line.set_up_logging(quiet=True)
    return Files(tmp_path)


def record_group_sizes(monkeypatch):
    """Return a list that gets the size of each group that reaches the model."""
    sizes = []
    stream = generate.stream

    def counting(model, batch, *more, **options):
        sizes.append(len(batch.input_ids))
        return stream(model, batch, *more, **options)

    monkeypatch.setattr(batch_app, "stream", counting)
    return sizes


# ------------------------------------------------------------------------------------------ answers
@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize("name", ["tiny", "random_model"])
def test_answer_file_answers_each_line_as_alone(name, size, files, request):
    model = request.getfixturevalue(name)
    records = files.write(MIXED).run(model, "--batch-size", size)
    for number, (line, record) in enumerate(zip(MIXED, records, strict=True), start=1):
        text, count, finished = answer_alone(model, line)
        expected = {"line": number, "answer": text, "tokens_out": count, "finished": finished}
        expected["tokens_in"] = prompt_length(line)
        if isinstance(line, dict):
            expected["id"] = line["id"]
        assert record == expected | {"sha256": record["sha256"]}
    if name == "random_model":
        assert len({record["tokens_out"] for record in records}) > 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_answer_file_draws_a_line_with_its_own_seed(size, files, random_model):
    lines = [MIXED[1], MIXED[0], MIXED[1], MIXED[2]]
    config = GenerationConfig(do_sample=True, temperature=1.5, seed=7)
    records = files.write(lines).run(random_model, "--batch-size", size, config=config)
    for number, (line, record) in enumerate(zip(lines, records, strict=True)):
        own_config = GenerationConfig(do_sample=True, temperature=1.5, seed=7 + number)
        assert record["answer"] == answer_alone(random_model, line, own_config)[0]
    assert records[0]["answer"] != records[2]["answer"]


@pytest.mark.slow
def test_answer_file_ends_each_answer_before_a_stop_string(files, tiny):
    """`finished` is true for an answer that a stop string ends."""
    expected = files.write(MIXED).run(tiny)
    files.out = files.out.with_name("stopped.jsonl")
    config = GenerationConfig(stop_strings=["circle"])
    stopped = files.run(tiny, "--batch-size", len(MIXED), config=config)
    counts = []
    for record, whole in zip(stopped, expected, strict=True):
        assert record["answer"] == whole["answer"].split("circle")[0]
        if "circle" in whole["answer"]:
            assert record["finished"]
            counts.append(whole["tokens_out"] - record["tokens_out"])
        else:
            assert record == whole
    assert max(counts) > 1
    assert len(counts) < len(MIXED)


def test_answer_file_makes_an_error_of_a_seed_beyond_the_last(files, random_model):
    config = GenerationConfig(do_sample=True, seed=2**63 - 2)
    records = files.write([MIXED[1]] * 3).run(random_model, config=config)
    assert ["error" in record for record in records] == [False, False, True]
    assert records[2]["error"].startswith("seed is 9223372036854775808, expected")


def test_answer_file_writes_an_answer_before_its_group_has_ended(files, tiny, monkeypatch):
    counts = []
    stream = generate.stream

    def counting(*arguments, **options):
        for tokens in stream(*arguments, **options):
            yield tokens
            counts.append(len(files.records()))

    monkeypatch.setattr(batch_app, "stream", counting)
    files.write([MIXED[0], MIXED[1]]).run(tiny)
    assert counts[0] == 0
    assert counts[-2] == 1


@pytest.mark.slow
def test_answer_file_prefers_the_options_of_a_video_to_the_programs(files, tiny):
    lines = [
        MIXED[2],
        user_message(VIDEO, "What?"),
        user_message(VIDEO | {"nframes": 4}, "What?"),
    ]
    options = ("--add-vision-id", "--nframes", 2, "--max-new-tokens", 2)
    records = files.write(lines).run(tiny, *options)
    lines[1] = user_message(VIDEO | {"nframes": 2}, "What?")
    expected = [prompt_length(line, add_vision_id=True) for line in lines]
    assert [record["tokens_in"] for record in records] == expected
    assert records[1]["tokens_in"] != records[2]["tokens_in"]
    assert [(record["tokens_out"], record["finished"]) for record in records] == [(2, False)] * 3


def test_answer_file_counts_on_stderr_unless_quiet(files, tiny, capsys):
    files.write([MIXED[1], "no json"])
    command_line.set_up_logging(quiet=False)
    files.run(tiny)
    written = capsys.readouterr()
    assert written.out == ""
    assert "2/2" in written.err
    assert written.err.endswith(f"{files.out}: 1 answers, 1 errors, 0 were there already\n")
    command_line.set_up_logging(quiet=True)
    files.run(tiny)
    assert capsys.readouterr() == ("", "")


class LostTerminal(io.StringIO):
    """A stream that fails as that of a terminal which has been closed."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


def test_answer_file_answers_where_the_terminal_is_lost(files, tiny, monkeypatch):
    monkeypatch.setattr(sys, "stderr", LostTerminal())
    command_line.set_up_logging(quiet=False)
    records = files.write(MIXED[:2]).run(tiny)
    assert ["answer" in record for record in records] == [True, True]


# ------------------------------------------------------------------------------------------- groups
@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 50), max_size=60),
    size=st.integers(1, 5),
    window=st.integers(1, 4),
    limit=st.integers(1, 400),
)
def test_groups_are_sorted_complete_and_bounded(lengths, size, window, limit):
    asked = [Question({"line": number}, "", length=n) for number, n in enumerate(lengths)]
    read = []

    def reading():
        for question in asked:
            read.append(question)
            yield question

    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_app, "WINDOW", window)
        patch.setattr(batch_app, "WINDOW_TOKENS", limit)
        for group in batch_app.groups(reading(), size):
            assert 1 <= len(group) <= size
            group_lengths = [question.length for question in group]
            assert group_lengths == sorted(group_lengths, reverse=True)
            held = [question for question in read if question not in done]
            assert len(held) <= window * size
            assert sum(question.length for question in held[:-1]) < limit
            assert max(question.length for question in held) == group_lengths[0]
            done += group
    assert sorted(question.record["line"] for question in done) == list(range(len(lengths)))


@pytest.fixture(scope="module")
def near_ties():
    """Return a bfloat16 model whose answers differ between groups, as it is never certain."""
    return load_near_ties()


def load_near_ties():
    model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


NEAR_TIES = [user_message(f"{'very ' * (n % 4)}{n} shapes?") for n in range(11)]


@pytest.mark.slow
def test_exact_makes_the_promise_that_groups_cannot(files, near_ties, monkeypatch):
    """In bfloat16 some answers of a group differ from those alone; with --exact none does."""
    files.write(NEAR_TIES)
    alone = [answer_alone(near_ties, line)[0] for line in NEAR_TIES]
    grouped = [record["answer"] for record in files.run(near_ties)]
    assert grouped != alone
    files.out = files.out.with_name("exact.jsonl")
    monkeypatch.setattr(command_line, "load_model", lambda *_: near_ties)
    assert batch_app.main(files.options("--exact", "--quiet", "--batch-size", 8)) == 0
    assert [record["answer"] for record in files.records()] == alone


# ---------------------------------------------------------------------------------------- bad lines
BAD = {
    "{": "the line is not JSON: Expecting property name enclosed in double quotes at column 2",
    "3": "expected a list of messages, or an object with such a list under messages",
    "[]": "expected a list of messages",
    '{"id": 5, "message": []}': "expected a list of messages",
    '{"id": 5, "messages": "Hello"}': "expected a list of messages",
    '[[{"role": "user", "content": "two in one"}]]': "message 0 must be a dict with role",
    '[{"content": "x"}]': "message 0 needs a role",
    '[{"role": "user", "content": 5}]': "the content of message 0 must be text or a list",
    '[{"role": "user", "content": [5]}]': "a content item must be a dict",
    '[{"role": "user", "content": [{"text": 5}]}]': "a content item is neither image, video nor",
    '[{"role": "user", "content": [{"image": "gone.png"}]}]': "there is no image at gone.png",
    '[{"role": "user", "content": [{"image": 5}]}]': "expected a path, a URL, bytes or an open",
    '[{"role": "user", "content": [{"video": "gone.mp4"}]}]': "there is no",
    '[{"role": "user", "content": "\\ud800"}]': "this is not a valid Unicode string",
    json.dumps(user_message(image(WIDE) | {"max_pixels": []})): "max_pixels: expected a pos",
    json.dumps(user_message(image(WIDE) | {"max_pixels": 0})): "max_pixels: expected a pos",
    "[" * 100_000: "the line cannot be used: RecursionError",
    '{"id": ' + "9" * 5000 + ', "messages": []}': "Exceeds the limit",
    json.dumps(user_message("ab" * 20_000)): "the text has ",
    json.dumps(user_message("a" * 3_000_000)): "the text has 3,000,000 characters, but",
    json.dumps(user_message(image(WIDE) | {"min_pixels": 10**12})): "min_pixels: expected at most",
}


def test_answer_file_makes_an_error_record_of_a_bad_line(files, tiny):
    records = files.write([MIXED[1], *BAD, " ", MIXED[1]]).run(tiny)
    assert [record["line"] for record in records] == [*range(1, len(BAD) + 2), len(BAD) + 3]
    for (line, sentence), record in zip(BAD.items(), records[1:-1], strict=True):
        assert record["error"].startswith(sentence), line[:80]
        assert "answer" not in record
        assert ("id" in record) == ('"id": 5' in line)
    assert records[0]["answer"] == records[-1]["answer"]


def deepest_json():
    """Return how many lists in one another json.loads reads here: Python's versions differ."""
    readable, unreadable = 1, 2**18
    while unreadable - readable > 1:
        depth = (readable + unreadable) // 2
        try:
            json.loads("[" * depth + "]" * depth)
            readable = depth
        except RecursionError:
            unreadable = depth
    return readable


def test_answer_file_has_a_record_for_ids_of_any_depth(files, tiny):
    """Also of a depth that can be read, and not be written."""
    limit = deepest_json()
    depths = [MAX_DEPTH - 1, MAX_DEPTH, *range(limit - 80, limit + 10)]
    lines = ['{"id": ' + "[" * depth + "]" * depth + ', "messages": []}' for depth in depths]
    first, *records = files.write(lines).run(tiny)
    assert first["error"].startswith("expected a list of messages")
    assert "id" in first
    sentences = {record["error"].split(" expected")[0][:40] for record in records}
    assert sentences == {"id:", "the line cannot be used: RecursionError:"}
    assert not any("id" in record for record in records)


def test_answer_file_reads_no_line_of_any_length(files, tiny, monkeypatch):
    """Neither into memory: what is beyond the bound is skipped in pieces."""
    monkeypatch.setattr(batch_app, "MAX_LINE_BYTES", 2000)
    good = json.dumps(MIXED[1])
    filler = " " * (2000 - len(good) - 1)
    lines = [good, "x" * 2001, good + filler, "y" * 2000, "z" * 3_000_000, good]
    records = files.write(lines).run(tiny)
    errors = [record.get("error", "") for record in records]
    expected = "the line has more than 2,000 bytes: expected paths of large files"
    assert [error.startswith(expected) for error in errors] == [0, 1, 0, 1, 1, 0]
    assert records[2]["answer"] == records[0]["answer"] == records[5]["answer"]
    largest = max(len(line.data) for line in batch_app.read_lines(files.questions))
    assert largest == 2001


def test_answer_file_keeps_text_that_utf_8_cannot_hold(files, tiny):
    good = json.dumps({"id": "\ud800ü", "messages": MIXED[1]}).encode()
    byte_order_mark = b"\xef\xbb\xbf"
    files.questions.write_bytes(byte_order_mark + good + b'\r\n["\xff"]\n' + good)
    records = files.run(tiny)
    assert [record.get("id") for record in records] == ["\ud800ü", None, "\ud800ü"]
    assert "can't decode byte 0xff" in records[1]["error"]
    assert "ü" in files.out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")], ids=repr
)
def test_answer_file_names_what_to_lower_for_media_that_memory_cannot_hold(
    error, files, tiny, monkeypatch
):
    def fail(*_):
        raise error

    monkeypatch.setattr(Processor, "prepare", fail)
    [first, second] = files.write([MIXED[0], MIXED[1]]).run(tiny)
    assert first["error"].startswith("out of memory")
    assert "lower --max-pixels" in first["error"]
    assert "answer" in second


@pytest.mark.slow
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
def test_answer_file_limits_a_failure_to_its_own_record(error, sentence, files, tiny, monkeypatch):
    """The others of its group are answered as ever, also where some have ended before it."""
    expected = {record["line"]: record for record in files.write(MIXED).run(tiny)}
    culprit = prompt_length(MIXED[2])
    stream = generate.stream
    files.out = files.out.with_name("broken.jsonl")

    def failing(model, batch, *more, **options):
        steps = stream(model, batch, *more, **options)
        if culprit not in batch.attention_mask.sum(1):
            return steps
        return broken(steps)

    def broken(steps):
        yield next(steps)
        yield next(steps)
        raise error

    monkeypatch.setattr(batch_app, "stream", failing)
    for record in files.run(tiny, "--batch-size", len(MIXED)):
        if prompt_length(MIXED[record["line"] - 1]) == culprit:
            assert record["error"].startswith(sentence)
        else:
            assert record == expected[record["line"]]


def test_answer_file_raises_an_error_of_the_program_itself(files, tiny, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(batch_app, "stream", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        files.write(MIXED).run(tiny)


def test_answer_file_applies_max_length_to_each_prompt(files, random_model, monkeypatch):
    """The shorter of two prompts may have the longer answer; a prompt beyond it is an error."""
    settings = {"eos_token_id": [], "pad_token_id": 0, "max_length": 60}
    monkeypatch.setattr(random_model, "generation_config", settings)
    long_question = user_message("How many of them are there in all, on the left side?")
    files.write([user_message("What?"), long_question, MIXED[2]])
    answerer = Answerer(random_model, PROCESSOR, GREEDY)
    answer_file(answerer, files.questions, files.out, {})
    together = files.records()
    files.out = files.out.with_name("alone.jsonl")
    answer_file(answerer, files.questions, files.out, {}, batch_size=1)
    assert together == files.records()
    assert sum("error" in record for record in together) == 1
    for record in together:
        if "error" in record:
            assert "max_length is 60" in record["error"]
        else:
            assert record["tokens_in"] + record["tokens_out"] == 60


# ----------------------------------------------------------------------------------------- resuming
@pytest.mark.slow
@pytest.mark.parametrize("groups_done", [0, 2])
def test_answer_file_continues_after_an_interruption(groups_done, files, tiny, monkeypatch):
    whole = Files(files.questions.parent)
    whole.out = whole.out.with_name("whole.jsonl")
    expected = whole.write(MIXED).run(tiny)
    stream = generate.stream
    calls = []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) > groups_done:
            raise KeyboardInterrupt
        return stream(*arguments, **options)

    monkeypatch.setattr(batch_app, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.run(tiny, "--batch-size", 2)
    assert len(files.records()) == 2 * groups_done
    sizes = record_group_sizes(monkeypatch)
    assert files.run(tiny, "--batch-size", 2) == expected
    assert sum(sizes) == len(MIXED) - 2 * groups_done
    assert files.run(tiny) == expected
    assert sum(sizes) == len(MIXED) - 2 * groups_done, "no question is asked a second time"


def interrupt_after(count, monkeypatch):
    """Make a run end after so many records, as if by Ctrl-C."""
    append = batch_app.append_record
    done = []

    def appending(file, record):
        if len(done) == count:
            raise KeyboardInterrupt
        append(file, record)
        done.append(record)

    monkeypatch.setattr(batch_app, "append_record", appending)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 5])
def test_answer_file_is_the_same_to_the_byte_wherever_it_was_stopped(
    seed, files, near_ties, monkeypatch
):
    """A model whose answers depend on what they are grouped with: also the groups are the same."""
    config = GREEDY
    if seed is not None:
        config = GenerationConfig(do_sample=True, temperature=0.5, seed=seed)
    files.write([*NEAR_TIES[:9], "{", *NEAR_TIES[9:]])
    options = ("--batch-size", 4, "--max-new-tokens", 12)
    monkeypatch.setattr(batch_app, "WINDOW", 2)
    files.run(near_ties, *options, config=config)
    whole = files.out.read_bytes()
    assert [record["line"] for record in map(json.loads, whole.splitlines())] == [*range(1, 13)]
    for count in range(12):
        files.out.unlink()
        with monkeypatch.context() as patch:
            interrupt_after(count, patch)
            with pytest.raises(KeyboardInterrupt):
                files.run(near_ties, *options, config=config)
        assert files.out.read_bytes().count(b"\n") == count
        files.run(near_ties, *options, config=config)
        assert files.out.read_bytes() == whole, count


def test_answer_file_leaves_out_an_answered_line_that_is_unusable_now(
    files, tiny, tmp_path, monkeypatch, capsys
):
    later = tmp_path / "later.png"
    shutil.copy(WIDE, later)
    lines = [user_message(image(str(later)), "What?"), MIXED[1], MIXED[1]]
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            files.write(lines).run(tiny)
    [first] = files.records()
    later.unlink()
    records = files.run(tiny)
    assert first in records
    assert ["answer" in record for record in records].count(True) >= 2
    assert ("was answered, but is unusable now" in capsys.readouterr().err) == (first["line"] == 1)


def test_append_record_leaves_no_part_of_a_record_on_a_full_disk(tmp_path):
    class FullDisk(io.FileIO):
        def write(self, data):
            return super().write(data[:5])

    path = tmp_path / "a"
    with FullDisk(path, "ab") as file:
        with pytest.raises(OSError, match="No space left"):
            batch_app.append_record(file, {"line": 1})
    assert path.read_bytes() == b""


@pytest.mark.skipif(os.name != "posix", reason="needs RLIMIT_FSIZE")
def test_answer_file_names_the_file_where_the_disk_is_full(files, tiny):
    import resource

    files.write([MIXED[1]] * 9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*answers\.jsonl: "):
            files.run(tiny)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.out.read_bytes().endswith(b"\n")
    kept = files.records()
    assert kept
    assert [record for record in files.run(tiny) if record in kept] == kept


def test_main_refuses_answers_that_another_run_writes(files, monkeypatch, capsys):
    monkeypatch.setattr(command_line, "load_model", None)  # it is refused before that
    with locked(files.write(MIXED[:1]).out):
        assert batch_app.main(files.options("--quiet")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"apps.batch: another run is writing {files.out}")
    assert error.count("\n") == 1
    assert not files.out.exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("number", "returncode"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143)],
)
def test_main_can_be_killed_at_any_time(number, returncode, files, tiny, monkeypatch):
    window = batch_app.WINDOW
    requested = threading.Event()
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.set()
            released.wait(60)
            with contextlib.suppress(OSError):  # the process that asked may have ended
                self.send_response(200)
                self.end_headers()
                self.wfile.write(Path(WIDE).read_bytes())

        def log_message(self, *arguments):
            """Not to the terminal."""

    # The image after the first window is at a URL whose server waits: the window is answered then.
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url = f"http://127.0.0.1:{server.server_port}/x.png"
        lines = [MIXED[1]] * window + [user_message(image(url), "What?")]
        options = files.write(lines).options("--batch-size", 1)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "apps.batch", *options]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment, cwd=ROOT)
        try:
            assert requested.wait(60)
            process.send_signal(number)
            errors = process.communicate()[1].decode()
            assert process.returncode == returncode
            assert "Traceback" not in errors
            assert len(files.records()) == window

            released.set()
            sizes = record_group_sizes(monkeypatch)
            assert len(files.run(tiny, "--batch-size", 1)) == window + 1
            assert sizes == [1]
        finally:
            process.kill()
            released.set()
            server.shutdown()


@pytest.mark.slow
def test_answer_file_replaces_a_half_written_record(files, tiny, capsys):
    expected = files.write(MIXED[:3]).run(tiny)
    text = files.out.read_bytes()
    last = text[:-1].rindex(b"\n") + 1
    for end in (last + 3, last + 40, len(text) - 1):
        files.out.write_bytes(text[:end])
        assert files.run(tiny) == expected
        assert "only half written" in capsys.readouterr().err


def test_answer_file_tries_errors_again_and_keeps_answers(files, tiny, tmp_path, monkeypatch):
    missing = tmp_path / "later.png"
    question = user_message(image(str(missing)), "How many shapes are there?")
    first = files.write([MIXED[1], question, "{"]).run(tiny)
    assert ["error" in record for record in first] == [False, True, True]
    shutil.copy(WIDE, missing)
    files.write([MIXED[1], question, MIXED[1]])
    sizes = record_group_sizes(monkeypatch)
    second = files.run(tiny)
    assert second[0] == first[0]
    assert ["error" in record for record in second] == [False] * 3
    assert sizes == [3], "an answered one is in the group of an uninterrupted run, too"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([MIXED[0], user_message("Another"), MIXED[2]], "line 2 of .* is not the one that"),
        (MIXED[1:3], "line 1 of .* is not the one that .* answers"),
        (MIXED[:2], "answers line 3, which .* lacks"),
    ],
)
def test_answer_file_refuses_answers_to_other_questions(lines, sentence, files, tiny):
    files.write(MIXED[:3]).run(tiny)
    before = files.out.read_bytes()
    with pytest.raises(ValueError, match=sentence):
        files.write(lines).run(tiny)
    assert files.out.read_bytes() == before
    names = sorted(path.name for path in files.out.parent.iterdir())
    assert names == ["answers.jsonl", "questions.jsonl"]


@pytest.mark.parametrize(
    "text",
    [
        "notes\n",
        "notes",
        '["a list"]\n',
        '{"line": 1}\n',
        '"error"\n',
        '{"line": 1, "error": "x"}\nnotes',
        '{"line": 1, "sha256": "x", "tokens_in": 5}\n' * 2,
        '{"line": 1, "sha256": "x"}\n',
        '{"line": 1, "sha256": "x", "tokens_in": "5"}\n',
        '{"line": [1], "sha256": "x", "tokens_in": 5}\n',
        "[" * 100_000 + "\n",
    ],
    ids=lambda text: text[:60],
)
def test_answer_file_leaves_a_file_of_something_else_alone(text, files, tiny):
    files.write(MIXED[:1]).out.write_text(text)
    with pytest.raises(ValueError, match=r"line \d of .* is no record of apps\.batch"):
        files.run(tiny)
    assert files.out.read_text() == text


# ------------------------------------------------------------------------------------------ program
@pytest.mark.parametrize(
    ("questions", "out", "sentence"),
    [
        ("gone.jsonl", "answers.jsonl", "there is no file gone.jsonl"),
        (".", "answers.jsonl", "there is no file ., expected one conversation on each line"),
        ("questions.jsonl", "gone/a.jsonl", "cannot write gone/a.jsonl: there is no directory"),
        ("questions.jsonl", ".", "--out is ., expected a file"),
        ("questions.jsonl", "link.jsonl", "--out is link.jsonl, which is an input: expected"),
        ("questions.jsonl", "notes.txt", "line 1 of notes.txt is no record of apps.batch"),
    ],
)
def test_main_names_a_path_that_cannot_be_used(
    questions, out, sentence, files, monkeypatch, capsys
):
    monkeypatch.chdir(files.write(MIXED[:1]).questions.parent)
    os.link("questions.jsonl", "link.jsonl")
    Path("notes.txt").write_text("notes")
    monkeypatch.setattr(command_line, "load_model", None)  # a wrong path is not worth a wait
    assert batch_app.main([questions, "--out", out, "--quiet"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith(f"apps.batch: {sentence}")
    assert written.err.count("\n") == 1
    assert not files.out.exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--image", WIDE], "unrecognized arguments: --image"),
        (["--prompt", "x"], "unrecognized arguments: --prompt"),
        (["--system", "x"], "unrecognized arguments: --system"),
        (["--batch-size", "0"], "--batch-size is 0, expected 1 or more"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, expected 1 or more"),
        (["--fps", "nan"], "--fps is nan, expected a number above 0"),
        (["--cuda-graph", "--debug-nan"], "exclude each other"),
    ],
)
def test_parse_arguments_names_an_option_that_cannot_be_used(options, sentence, files, capsys):
    with pytest.raises(SystemExit) as exit_info:
        batch_app.main(files.options(*options))
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err


def test_parse_arguments_needs_out(files, capsys):
    with pytest.raises(SystemExit) as exit_info:
        batch_app.main([str(files.questions)])
    assert exit_info.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:CUDA graph")  # a CPU has none
def test_main_answers_the_same_with_the_captured_step(files, monkeypatch):
    caches = []

    class CountedStep(cuda_graph.StaticStep):
        def __init__(self, model, cache):
            super().__init__(model, cache)
            caches.append(cache)

    monkeypatch.setattr(cuda_graph, "StaticStep", CountedStep)
    options = ("--quiet", "--dtype", "float32", "--device", "cpu", "--batch-size", 2)
    assert batch_app.main(files.write(MIXED[:3]).options(*options)) == 0
    expected = files.records()
    assert ["answer" in record for record in expected] == [True] * 3
    assert caches == []
    files.out = files.out.with_name("captured.jsonl")
    assert batch_app.main(files.options("--cuda-graph", *options)) == 0
    assert files.records() == expected
    assert len(caches) == 2, "one for each group"


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), 1), (("--batch-size", 1), 0), (("--exact",), 0), (("--no-reorder",), 0)],
)
def test_main_reorders_the_weights_for_groups(options, expected, files, monkeypatch):
    reordered = []

    def record(model):
        reordered.append(model)
        linear.reorder_weights(model)

    checked = []
    check = memory.check_weights_and_batch
    monkeypatch.setattr(batch_app, "reorder_weights", record)
    monkeypatch.setattr(
        memory,
        "check_weights_and_batch",
        lambda run, batch: checked.append(run) or check(run, batch),
    )
    options = ("--quiet", "--dtype", "float32", "--device", "cpu", *options)
    assert batch_app.main(files.write(MIXED[:3]).options(*options)) == 0
    assert ["answer" in record for record in files.records()] == [True] * 3
    assert len(reordered) == expected
    assert [run.reorder for run in checked] == [bool(expected)]
    if expected:
        assert reordered[0].lm_head.reordered is not None


def test_main_names_the_first_layer_with_nan(files, monkeypatch):
    load = command_line.load_checkpoint

    def load_damaged(*arguments):
        model = load(*arguments)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        return model

    monkeypatch.setattr(command_line, "load_checkpoint", load_damaged)
    options = ("--quiet", "--debug-nan", "--dtype", "float32", "--device", "cpu")
    assert batch_app.main(files.write(MIXED[:1]).options(*options)) == 0
    [record] = files.records()
    assert "model.layers.1.mlp.down_proj is the first with NaN" in record["error"]


def test_main_checks_sampling_before_it_reads_a_file(files, capsys):
    assert batch_app.main(["gone.jsonl", "--out", str(files.out), "--top-p", "2"]) == 2
    assert "top_p: expected a number above 0 and at most 1, got 2.0" in capsys.readouterr().err
