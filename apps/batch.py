"""An answer to each line of a file of conversations.

    python -m apps.batch questions.jsonl --out answers.jsonl

A line is a conversation in any layout that `conversations.py` reads, perhaps with an `id`. Blank
lines are skipped. Each other line gives one record, written as soon as it is done:

    {"line": 1, "id": "a", "answer": "A cat.", "tokens_in": 91, "tokens_out": 4, "finished": true,
     "sha256": "…"}
    {"line": 2, "error": "there is no image at missing.png"}

`line` counts from 1; `tokens_out` includes the tokens that end an answer, and `finished` is false
where --max-new-tokens ended it before; `sha256` is the start of the line's hash.

On a CPU a group is decoded by a second copy of the decoder's weights, in the order in which its
matmul reads them fastest; --no-reorder does without.

The file is read in windows. A window is sorted by prompt length, and neighbors are answered
together, so that there is little padding. Numbers of a group are rounded differently than those of
a conversation alone. In float32 that has not changed a greedy answer in the tests; in bfloat16 it
may where two tokens are almost equally probable. --exact answers each line alone, and then an
answer is that of generate.py in any dtype. With --seed, line n draws with seed + n - 1, whatever it
is answered with.

A second run continues: lines that have an answer are skipped, whichever options it was made with,
and lines with an error are tried again. The groups depend on the questions alone, not on where a
run was stopped: one that was half answered is computed again as a whole, and only the missing
answers of it are written. So the file comes out as without the stop, to the byte, with the same
options (and --seed, where answers are sampled). At the end the records are sorted by line. Where
the answers are not those of this file of questions, nothing is done, and while another run writes
them, neither.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import errno
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor
from tqdm import tqdm

import command_line
import memory
from conversations import read_conversation
from generate import (
    GenerationConfig,
    choose_decode_step,
    choose_generation_config,
    decode_step,
    eos_token_ids,
    new_token_limits,
    stream,
    trained_length,
)
from json_files import MAX_DEPTH, is_deeper_than
from linear import reorder_weights
from output_files import check_output, locked, write_file
from preprocess import Processor
from qwen2vl import Qwen2VL
from tokenizer import StreamDecoder

logger = logging.getLogger("qwen2vl")

WINDOW = 16  # groups that are sorted together
WINDOW_TOKENS = 2**16  # of prompts, after which a window ends early: up to 1.2 GB of patches
MAX_LINE_BYTES = 2**26  # of one line; parsed JSON may take 20 times as much memory
MAX_CHARACTERS = 64  # of text, for each position of the model: beyond, it is not even tokenized
RECORD_START = b'{"line": '  # how each record begins


# -------------------------------------------------------------------------------------------- files
def check_paths(arguments: argparse.Namespace) -> None:
    """Raise ValueError or OSError for a file of questions or answers that is unusable."""
    path = arguments.questions
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}, expected one conversation on each line")
    inputs = [path, *command_line.input_paths(arguments)]
    check_output(arguments.out, inputs, force=True)  # answers that exist are continued


class Line(NamedTuple):
    """A line of a file that is not blank."""

    number: int  # from 1
    offset: int  # of its first byte
    data: bytes  # of a line beyond MAX_LINE_BYTES only the start, which is longer than that


def read_lines(path: str) -> Iterator[Line]:
    """Yield the lines of a file that are not blank."""
    with open(path, "rb") as file:
        for number in itertools.count(1):
            offset = file.tell()
            data = file.readline(MAX_LINE_BYTES + 1)
            if not data:
                return
            rest = data
            while len(data) > MAX_LINE_BYTES and rest and not rest.endswith(b"\n"):
                rest = file.readline(2**20)
            if data.strip():
                yield Line(number, offset, data)


def read_line(path: str, offset: int) -> bytes:
    """Return the line that begins at this byte."""
    with open(path, "rb") as file:
        file.seek(offset)
        return file.readline(MAX_LINE_BYTES + 1)


def line_hash(line: bytes) -> str:
    """Return 16 hexadecimal digits that distinguish a line from others."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def read_answers(out: str) -> dict[int, dict]:
    """Return the records in `out` that have an answer as {line: record}.

    Raises ValueError for anything that was not written here, but a record that was half written
    when a run was killed.
    """
    answers: dict[int, dict] = {}
    if not os.path.exists(out):
        return answers
    for number, _, line in read_lines(out):
        if not line.endswith(b"\n") and RECORD_START.startswith(line[: len(RECORD_START)]):
            logger.warning("%s: its last record is only half written and is dropped", out)
            break
        try:
            record = json.loads(line)
            question_line = record["line"]
            if "error" in record:
                continue
            if question_line in answers or "sha256" not in record:
                raise ValueError("expected one answer to each line, with the hash of its question")
            if not isinstance(record["tokens_in"], int):
                raise ValueError("expected the length of the prompt")
            answers[question_line] = record
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {out} is no record of apps.batch: expected another --out"
            ) from error
    return answers


def count_questions(path: str, out: str, answers: dict[int, dict]) -> int:
    """Return the number of questions in `path`. Raises ValueError where `out` answers others."""
    total = 0
    unmatched = set(answers)
    for number, _, line in read_lines(path):
        total += 1
        unmatched.discard(number)
        if number in answers and answers[number]["sha256"] != line_hash(line):
            raise ValueError(
                f"line {number} of {path} is not the one that {out} answers: expected another --out"
            )
    if unmatched:
        raise ValueError(
            f"{out} answers line {min(unmatched)}, which {path} lacks: expected another --out"
        )
    return total


def encode_record(record: dict) -> bytes:
    """Return one record as a line."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    # Lone surrogates, as in a file name that is not UTF-8, become what JSON has for them: \udc80.
    return line.encode(errors="backslashreplace")


def write_records(out: str, records: Iterable[dict]) -> None:
    """Replace the file of answers at once, so that no answer is lost."""
    data = b"".join(map(encode_record, records))
    write_file(out, lambda temporary: temporary.write_bytes(data))


def append_record(file: io.FileIO, record: dict) -> None:
    """Append one record to an unbuffered file.

    It is one write of the operating system, which no signal cuts in two. Where the disk is full
    after a part of it, that part is removed. Raises OSError.
    """
    line = encode_record(record)
    end = os.fstat(file.fileno()).st_size
    written = file.write(line)
    if written != len(line):
        file.truncate(end)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ---------------------------------------------------------------------------------------- questions
@dataclass
class Question:
    """A line of the file, with its images and videos read."""

    record: dict  # of its answer, as far as it is known: `line`, perhaps `id`, `error` if unusable
    sha256: str = ""
    messages: list[dict] = field(default_factory=list)  # with a Media for each image and video
    length: int = 0  # of the prompt in tokens
    is_answered: bool = False  # by an earlier run: then only `length` and `offset` are set
    offset: int = 0  # of the line in the file


@dataclass
class Reader:
    """Reads the lines of a file of questions."""

    path: str
    processor: Processor
    video_options: dict = field(default_factory=dict)  # fps or nframes of videos without their own
    add_vision_id: bool = False
    max_text_tokens: int = 2**15  # of a prompt

    def questions(self, answers: dict[int, dict]) -> Iterator[Question]:
        """Yield the questions of the file in order, each read when asked for.

        answers: the records of an earlier run by line; these lines are not read. A line that cannot
        be used is a Question whose record has an `error`.
        """
        for number, offset, line in read_lines(self.path):
            if number in answers:
                length = answers[number]["tokens_in"]
                yield Question({"line": number}, "", [], length, is_answered=True, offset=offset)
            else:
                yield self.question(number, line)

    def question(self, number: int, line: bytes) -> Question:
        """Return the question of a line."""
        question = Question({"line": number}, line_hash(line))
        try:
            self.fill(question, line)
        except json.JSONDecodeError as error:
            question.record["error"] = f"the line is not JSON: {error.msg} at column {error.colno}"
        except Exception as error:  # a line costs its own record and nothing else
            unexpected = f"the line cannot be used: {type(error).__name__}: {error}"
            question.record["error"] = command_line.error_sentence(error) or unexpected
        return question

    def fill(self, question: Question, line: bytes) -> None:
        """Read a line into its question. Raises what JSON and the processor raise."""
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(
                f"the line has more than {MAX_LINE_BYTES:,} bytes: expected paths of large files, "
                "not their content"
            )
        content = json.loads(line.rstrip().decode("utf-8-sig"))
        if isinstance(content, dict) and "id" in content:
            # How deeply nested what Python can read may be differs from what it can write.
            if is_deeper_than({"id": content["id"]}, MAX_DEPTH):
                raise ValueError(
                    f"id: expected lists and objects nested less than {MAX_DEPTH} deep"
                )
            question.record["id"] = content["id"]
        messages = read_conversation(content)
        if not messages:
            raise ValueError("expected a list of messages, got an empty one")
        self.check_text(messages)
        prepared = command_line.read_media(self.processor, messages, self.video_options)
        batch = self.processor([prepared], add_vision_id=self.add_vision_id)
        length = batch.input_ids.shape[1]
        patches = sum(len(media.patches) for media in batch.media)
        self.check_text_tokens(length - patches // self.processor.image_config.merge_size**2)
        question.messages = prepared
        question.length = length

    def check_text(self, messages: list[dict]) -> None:
        """Raise ValueError for so much text that its tokens alone would take minutes."""
        characters = sum(len(item.get("text", "")) for m in messages for item in m["content"])
        if characters > MAX_CHARACTERS * self.max_text_tokens:
            raise ValueError(
                f"the text has {characters:,} characters, but the model is trained for "
                f"{self.max_text_tokens:,} tokens"
            )

    def check_text_tokens(self, count: int) -> None:
        """Raise ValueError for a prompt whose answer is worthless, after hours perhaps."""
        if count > self.max_text_tokens:
            raise ValueError(
                f"the text has {count:,} tokens, but the model is trained for "
                f"{self.max_text_tokens:,}"
            )

    def complete(self, group: list[Question]) -> list[Question]:
        """Return a group with the lines read that an earlier run has answered.

        One that cannot be read any more is left out, with a warning.
        """
        complete = []
        for question in group:
            if question.is_answered:
                number = question.record["line"]
                question = self.question(number, read_line(self.path, question.offset))
                question.is_answered = True
                if "error" in question.record:
                    error = question.record["error"]
                    logger.warning("line %d was answered, but is unusable now: %s", number, error)
                    continue
            complete.append(question)
        return complete


def read_questions(
    path: str, processor: Processor, video_options: dict, add_vision_id: bool = False
) -> Iterator[Question]:
    """Yield the questions of a file in order, each read when asked for (see `Reader`)."""
    yield from Reader(path, processor, video_options, add_vision_id).questions({})


def groups(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Yield groups of at most `size` questions of similar length.

    They come window after window. A window is WINDOW groups, or as many questions as reach
    WINDOW_TOKENS; no more than one is held in memory.
    """
    window: list[Question] = []
    tokens = 0
    for question in questions:
        window.append(question)
        tokens += question.length
        if len(window) == WINDOW * size or tokens >= WINDOW_TOKENS:
            yield from split(window, size)
            window = []
            tokens = 0
    yield from split(window, size)


def split(window: list[Question], size: int) -> Iterator[list[Question]]:
    """Yield the questions of a window in groups, from the longest prompt to the shortest."""
    window.sort(key=lambda question: -question.length)
    for start in range(0, len(window), size):
        yield window[start : start + size]


# ------------------------------------------------------------------------------------------ answers
@dataclass
class Answerer:
    """What answers questions: the model and its options."""

    model: Qwen2VL
    processor: Processor
    config: GenerationConfig
    max_new_tokens: int | None = None
    add_vision_id: bool = False
    decode: Callable[..., Tensor] = decode_step
    run: memory.Run | None = None  # that each group is checked for, before it runs; None: no check

    def answers(self, group: list[Question]) -> Iterator[dict]:
        """Yield the records of a group's usable questions, each as soon as its answer has ended.

        Where memory does not suffice for the group, or one of it has logits that are not finite,
        those without an answer are asked again one by one: only the cause gives an error record.
        """
        waiting = {q.record["line"]: q for q in group if not q.is_answered}
        try:
            for record in self.batch_answers(group):
                if waiting.pop(record["line"], None) is not None:
                    yield record
                if not waiting:
                    return
        except Exception as error:
            sentence = command_line.error_sentence(error)
            if sentence is None:
                raise
        for question in waiting.values():
            if len(group) == 1:
                yield question.record | {"error": sentence}
            else:
                yield from self.answers([question])

    def batch_answers(self, questions: list[Question]) -> Iterator[dict]:
        """Yield the records of questions in one batch. Raises what `stream` raises."""
        conversations = [question.messages for question in questions]
        batch = self.processor(conversations, add_vision_id=self.add_vision_id)
        if self.run is not None:
            memory.check_batch(self.run, batch)
        limits = new_token_limits(self.model, batch, self.max_new_tokens)
        end_ids = eos_token_ids(self.model)
        config = self.config
        if config.seed is not None:
            config = replace(config, seed=[config.seed + q.record["line"] - 1 for q in questions])
        tokenizer = self.processor.tokenizer
        decoders = [StreamDecoder(tokenizer, stop_strings=config.stop_strings) for _ in questions]
        steps = stream(
            self.model,
            batch,
            self.max_new_tokens,
            config,
            decode=self.decode,
            tokenizer=tokenizer,
        )
        answers: list[list[int]] = [[] for _ in questions]
        running = set(range(len(questions)))
        for tokens in steps:
            for i in sorted(running):
                answers[i].append(tokens[i])
                decoders[i].push(tokens[i])
                finished = tokens[i] in end_ids or decoders[i].stopped
                if finished or len(answers[i]) == limits[i]:
                    running.remove(i)
                    yield self.record(questions[i], answers[i], finished)

    def record(self, question: Question, ids: list[int], finished: bool) -> dict:
        """Return the record of an answer."""
        tokenizer = self.processor.tokenizer
        return question.record | {
            "answer": tokenizer.decode(ids, stop_strings=self.config.stop_strings),
            "tokens_in": question.length,
            "tokens_out": len(ids),
            "finished": finished,
            "sha256": question.sha256,
        }


def file_records(
    answerer: Answerer, reader: Reader, answers: dict[int, dict], batch_size: int
) -> Iterator[dict]:
    """Yield the records of all lines that have no answer in `answers`."""
    for group in groups(reader.questions(answers), batch_size):
        usable = []
        for question in group:
            if "error" in question.record:
                yield question.record
            else:
                usable.append(question)
        if any(not question.is_answered for question in usable):
            yield from answerer.answers(reader.complete(usable))


def answer_file(
    answerer: Answerer,
    path: str,
    out: str,
    answers: dict[int, dict],
    batch_size: int = 8,
    video_options: dict | None = None,
) -> None:
    """Answer each line of the file `path` that has no answer in `out` yet.

    answers: of `read_answers`, by the caller, who holds the lock of `out`.
    What fails in one conversation costs only its own record.
    Raises ValueError or OSError with one sentence for unusable files.
    """
    total = count_questions(path, out, answers)
    write_records(out, answers.values())  # without errors, and without half a record
    reader = Reader(
        path,
        answerer.processor,
        video_options or {},
        answerer.add_vision_id,
        trained_length(answerer.model.config),
    )
    quiet = not logger.isEnabledFor(logging.INFO)
    progress = tqdm(total=total, initial=len(answers), unit=" lines", disable=quiet)
    records = answers.copy()
    errors = 0
    with progress, command_line.naming(out), open(out, "ab", buffering=0) as file:
        for record in file_records(answerer, reader, answers, batch_size):
            append_record(file, record)
            records[record["line"]] = record
            errors += "error" in record
            progress.set_postfix(errors=errors, refresh=False)
            progress.update()
    write_records(out, [records[number] for number in sorted(records)])
    counts = f"{len(records) - len(answers) - errors} answers, {errors} errors"
    logger.info("%s: %s, %d were there already", out, counts, len(answers))


# ------------------------------------------------------------------------------------------ program
def run(arguments: argparse.Namespace) -> None:
    """Answer a file. Raises OSError or ValueError with one sentence for wrong options and files."""
    GenerationConfig(**command_line.sampling_options(arguments))  # checked before anything is read
    check_paths(arguments)
    with locked(arguments.out):
        run_locked(arguments)


def run_locked(arguments: argparse.Namespace) -> None:
    """Load the model and answer the file, whose answers no other run writes meanwhile."""
    # What is no file of answers is refused before a model is loaded.
    answers = read_answers(arguments.out)
    directory, processor = command_line.load_processor(arguments)
    batch_size = 1 if arguments.exact else arguments.batch_size
    reorder = arguments.reorder and batch_size > 1
    memory_run = command_line.checked_run(arguments, directory)
    if memory_run is not None:
        memory_run.reorder = reorder
    model = command_line.load_checkpoint(arguments, directory, processor, memory_run)
    if reorder:
        reorder_weights(model)
    answerer = Answerer(
        model,
        processor,
        choose_generation_config(arguments, model),
        arguments.max_new_tokens,
        arguments.add_vision_id,
        choose_decode_step(arguments, model),
        memory_run,
    )
    answer_file(
        answerer,
        arguments.questions,
        arguments.out,
        answers,
        batch_size,
        command_line.video_options(arguments),
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = command_line.build_parser(
        "Answer a file of conversations about images and videos with Qwen2-VL.",
        "python -m apps.batch",
        has_question=False,
    )
    parser.add_argument(
        "questions", metavar="QUESTIONS.jsonl", help="the conversations, one on each line"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="ANSWERS.jsonl",
        help="where the answers are added; lines that have one there are not answered again",
    )
    command_line.add_batch_size_option(parser)
    command_line.add_reorder_option(parser)
    parser.add_argument(
        "--exact",
        action="store_true",
        help="answer each line alone, as --batch-size 1 does: in a group an answer may differ from "
        "that by rounding, above all in bfloat16",
    )
    command_line.add_cuda_graph_option(parser)
    command_line.add_prompt_lookup_option(parser)
    arguments = command_line.parse_arguments(parser, argv, needs_question=False)
    command_line.check_cuda_graph_option(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.batch", run, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.batch", main, needs_stdout=False)
