"""An answer to each line of a file of conversations.

    python -m apps.batch questions.jsonl --out answers.jsonl

A line is a conversation in any layout that `conversations.py` reads: a list of messages, or an
object with `messages` and, optionally, `images` and an `id`, which is copied to the answer. Blank
lines are skipped. Each line gives one record, written as soon as it is done:

    {"line": 1, "id": "a", "answer": "A cat.", "tokens_in": 91, "tokens_out": 4, "finished": true,
     "sha256": "…"}
    {"line": 2, "error": "there is no image at missing.png"}

`line` counts from 1; `tokens_out` includes the token that ends an answer, and `finished` is false
where --max-new-tokens ended it before; `sha256` is the start of the line's hash.

The file is read in windows. A window is sorted by prompt length, and neighbors are answered
together, so that there is little padding. That changes an answer by rounding at most: greedy
answers are those of each conversation alone. With --seed, line n draws with seed + n - 1, whatever
it is answered with.

A second run continues: lines that have an answer are skipped, whichever options it was made with.
Lines with an error are tried again (the file may be there by now) and their records replaced; a
half-written record is dropped. An answer never is: where an answered line is not the one that its
record was made from, nothing is done.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

import command_line
from conversations import read_conversation
from generate import (
    GenerationConfig,
    choose_decode_step,
    choose_generation_config,
    debugging,
    decode_step,
    eos_token_ids,
    new_token_limits,
    stream,
)
from preprocess import Processor
from qwen2vl import Qwen2VL
from tokenizer import content_kind

logger = logging.getLogger("qwen2vl")

WINDOW = 16  # groups that are sorted together
WINDOW_BYTES = 2**30  # of patches, after which a window ends early
RECORD_START = b'{"line": '  # how each record begins


# -------------------------------------------------------------------------------------------- files
def check_paths(path: str, out: str) -> None:
    """Raise ValueError or FileNotFoundError for a file of questions or answers that is unusable."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}, expected one conversation on each line")
    command_line.check_directory(out)
    if os.path.exists(out) and not os.path.isfile(out):
        raise ValueError(f"--out is {out}, expected a file")
    if os.path.exists(out) and os.path.samefile(out, path):
        raise ValueError(f"--out is the file of the questions, {path}, expected another one")


def lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, with their numbers from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def digest(line: bytes) -> str:
    """Return 16 hexadecimal digits that distinguish a line from others."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def resume(path: str, out: str) -> tuple[dict[int, str], int]:
    """Reduce the file `out` to its complete answers.

    Return them as {line: hash of the question}, and the number of questions in `path`. Raises
    ValueError, and leaves `out` as it is, if it holds anything that was not written here, or
    answers to other questions.
    """
    target = os.path.realpath(out)
    reduced = Path(target + ".new")
    try:
        answered = copy_answers(out, reduced)
        total = check_answered(path, out, answered)
        os.replace(reduced, target)
    finally:
        reduced.unlink(missing_ok=True)
    return answered, total


def copy_answers(out: str, reduced: Path) -> dict[int, str]:
    """Copy the answers of `out`, which may be missing, to `reduced`; return {line: hash}."""
    answered: dict[int, str] = {}
    with open(reduced, "wb") as file:
        if not os.path.exists(out):
            return answered
        for number, line in lines(out):
            if is_half_written(line):
                logger.warning("%s: its last record is only half written and is dropped", out)
                break
            try:
                record = parse_record(line)
                if record["line"] in answered:
                    raise ValueError("a second answer to one question")
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"line {number} of {out} is no record of apps.batch: expected another --out"
                ) from error
            if "error" not in record:
                answered[record["line"]] = record["sha256"]
                file.write(line)
    return answered


def is_half_written(line: bytes) -> bool:
    """Return whether a line is the start of a record whose end is missing."""
    return not line.endswith(b"\n") and RECORD_START.startswith(line[: len(RECORD_START)])


def parse_record(line: bytes) -> dict:
    """Return a record as `RecordWriter` writes them. Raises ValueError for anything else."""
    record = json.loads(line)
    if not line.endswith(b"\n") or not isinstance(record, dict):
        raise ValueError("expected a JSON object and a line end")
    if not isinstance(record.get("line"), int):
        raise ValueError("expected the number of a line")
    if "error" not in record and not isinstance(record.get("sha256"), str):
        raise ValueError("expected an error or a hash")
    return record


def check_answered(path: str, out: str, answered: dict[int, str]) -> int:
    """Return the number of questions in `path`. Raises ValueError where `out` answers others."""
    total = 0
    missing = set(answered)
    for number, line in lines(path):
        total += 1
        missing.discard(number)
        if number in answered and answered[number] != digest(line):
            raise ValueError(
                f"line {number} of {path} is not the one that {out} answers: expected another --out"
            )
    if missing:
        raise ValueError(
            f"{out} answers line {min(missing)} of {path}, which is not there: "
            "expected another --out"
        )
    return total


class ProgressStream:
    """Stderr for the progress bar; a closed or full one loses the bar and no answer."""

    def write(self, text: str) -> None:
        """Write text, if possible."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Write what is buffered, if possible."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    @property
    def encoding(self) -> str | None:
        """The encoding, by which tqdm chooses the characters of its bar."""
        return getattr(sys.stderr, "encoding", None)


class RecordWriter:
    """Writes records to the file of answers, each at once, and counts them."""

    def __init__(self, file: TextIO, progress: tqdm):
        self.file = file
        self.progress = progress
        self.answers = 0
        self.errors = 0

    def write(self, record: dict) -> None:
        """Write one record, with an answer or an error."""
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.file.flush()
        if "error" in record:
            self.errors += 1
        else:
            self.answers += 1
        self.progress.set_postfix(errors=self.errors, refresh=False)
        self.progress.update()


# ---------------------------------------------------------------------------------------- questions
@dataclass
class Question:
    """A line of the file, with its images and videos read."""

    record: dict  # of its answer, as far as it is known: `line`, perhaps `id`, `error` if unusable
    sha256: str
    messages: list[dict] = field(default_factory=list)  # with a Media for each image and video
    length: int = 0  # of the prompt in tokens
    size: int = 0  # of the patches in bytes


def questions(
    path: str | Path,
    processor: Processor,
    video_options: dict | None = None,
    add_vision_id: bool = False,
    answered: Container[int] = (),
) -> Iterator[Question]:
    """Yield the lines of a file in order, without those in `answered`, each read when asked for.

    video_options: fps or nframes of videos that have neither. A line that cannot be used is a
    Question whose record has an `error`.
    """
    for number, line in lines(path):
        if number in answered:
            continue
        question = Question({"line": number}, digest(line))
        try:
            content = json.loads(line.rstrip().decode("utf-8-sig"))
            read_question(question, content, processor, video_options or {}, add_vision_id)
        except json.JSONDecodeError as error:
            question.record["error"] = f"the line is not JSON: {error.msg} at column {error.colno}"
        except Exception as error:  # a line costs its own record and nothing else
            sentence = command_line.error_sentence(error)
            if sentence is None:
                sentence = f"the line cannot be used: {type(error).__name__}: {error}"
            question.record["error"] = sentence
        yield question


def read_question(
    question: Question,
    content: object,
    processor: Processor,
    video_options: dict,
    add_vision_id: bool,
) -> None:
    """Read a conversation and its images and videos into `question`.

    content: the parsed JSON of the line. Raises what `read_conversation` and the processor raise.
    """
    if isinstance(content, dict) and "id" in content:
        question.record["id"] = content["id"]
    messages = read_conversation(content)
    if not messages:
        raise ValueError("expected a list of messages, got an empty one")
    for message in messages:
        items = [read_media(item, processor, video_options) for item in message["content"]]
        question.messages.append(message | {"content": items})
    batch = processor([question.messages], add_vision_id=add_vision_id)
    question.length = batch.input_ids.shape[1]
    question.size = sum(media.patches.nbytes for media in batch.media)


def read_media(item: dict, processor: Processor, video_options: dict) -> dict:
    """Return a content item with its image or video read."""
    kind = content_kind(item)
    if kind == "text":
        return item
    if kind == "video" and item.get("fps") is None and item.get("nframes") is None:
        item = item | video_options
    return {"type": kind, kind: processor.prepare(item)}


def groups(asked: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Yield groups of at most `size` questions of similar length.

    They come window after window, each window from its longest prompt to its shortest. A window is
    WINDOW groups, or as many questions as reach WINDOW_BYTES; no more than one is held in memory.
    """
    window: list[Question] = []
    held_bytes = 0
    for question in asked:
        window.append(question)
        held_bytes += question.size
        if len(window) == WINDOW * size or held_bytes >= WINDOW_BYTES:
            yield from split(window, size)
            window = []
            held_bytes = 0
    yield from split(window, size)


def split(window: list[Question], size: int) -> Iterator[list[Question]]:
    """Yield the questions of a window in groups, and let go of each group when it is done."""
    window.sort(key=lambda question: -question.length)
    while window:
        group = window[:size]
        del window[:size]
        yield group


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

    def answers(self, group: list[Question]) -> Iterator[dict]:
        """Yield the records of a group, each as soon as its answer has ended.

        Where memory does not suffice for the group, or one of it has logits that are not finite,
        those without an answer are asked again one by one: only the cause gives an error record.
        """
        waiting = {question.record["line"]: question for question in group}
        try:
            for record in self.group_answers(group):
                del waiting[record["line"]]
                yield record
            return
        except Exception as error:
            sentence = command_line.error_sentence(error)
            if sentence is None:
                raise
        if len(group) == 1:
            yield group[0].record | {"error": sentence}
            return
        for question in waiting.values():
            yield from self.answers([question])

    def group_answers(self, group: list[Question]) -> Iterator[dict]:
        """Yield the records of a group in one batch. Raises what `stream` raises."""
        conversations = [question.messages for question in group]
        batch = self.processor(conversations, add_vision_id=self.add_vision_id)
        limits = new_token_limits(self.model, batch, self.max_new_tokens)
        ends = eos_token_ids(self.model)
        steps = stream(
            self.model, batch, self.max_new_tokens, self.group_config(group), decode=self.decode
        )
        answers: list[list[int]] = [[] for _ in group]
        running = set(range(len(group)))
        for tokens in steps:
            for i in sorted(running):
                answers[i].append(tokens[i])
                if tokens[i] in ends or len(answers[i]) == limits[i]:
                    running.remove(i)
                    yield self.record(group[i], answers[i], finished=tokens[i] in ends)

    def group_config(self, group: list[Question]) -> GenerationConfig:
        """Return the generation config of a group, in which each line has its own seed."""
        seed = self.config.seed
        if seed is None:
            return self.config
        return replace(self.config, seed=[seed + question.record["line"] - 1 for question in group])

    def record(self, question: Question, ids: list[int], finished: bool) -> dict:
        """Return the record of an answer."""
        return question.record | {
            "answer": self.processor.tokenizer.decode(ids, skip_special_tokens=True),
            "tokens_in": question.length,
            "tokens_out": len(ids),
            "finished": finished,
            "sha256": question.sha256,
        }


def answer_file(
    answerer: Answerer,
    path: str,
    out: str,
    batch_size: int = 8,
    video_options: dict | None = None,
    quiet: bool = False,
) -> None:
    """Answer each line of the file `path` that has no answer in `out` yet.

    A line that cannot be asked becomes an error record, and what fails in one conversation costs
    only its own record. Raises ValueError or OSError with one sentence for unusable files.
    """
    check_paths(path, out)
    answered, total = resume(path, out)
    # Lone surrogates, as in a file name that is not UTF-8, are written as JSON writes them: \udc80.
    with (
        command_line.naming(out),
        open(out, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
        tqdm(
            total=total,
            initial=len(answered),
            unit=" lines",
            disable=quiet,
            file=ProgressStream(),
        ) as progress,
    ):
        writer = RecordWriter(file, progress)
        asked = questions(path, answerer.processor, video_options, answerer.add_vision_id, answered)
        for group in groups(without_errors(asked, writer), batch_size):
            for record in answerer.answers(group):
                writer.write(record)
    counts = f"{writer.answers} answers, {writer.errors} errors"
    logger.info("%s: %s, %d were there already", out, counts, len(answered))


def without_errors(asked: Iterable[Question], writer: RecordWriter) -> Iterator[Question]:
    """Yield the questions that can be asked; write the records of the others."""
    for question in asked:
        if "error" in question.record:
            writer.write(question.record)
        else:
            yield question


# ------------------------------------------------------------------------------------------ program
def run(arguments: argparse.Namespace) -> None:
    """Answer a file. Raises OSError or ValueError with one sentence for wrong options and files."""
    GenerationConfig(**command_line.sampling_options(arguments))  # checked before anything is read
    check_paths(arguments.questions, arguments.out)
    directory, processor = command_line.load_processor(arguments)
    model = command_line.load_checkpoint(arguments, directory, processor)
    answerer = Answerer(
        model,
        processor,
        choose_generation_config(arguments, model),
        arguments.max_new_tokens,
        arguments.add_vision_id,
        choose_decode_step(arguments, model),
    )
    with debugging(arguments, model):
        answer_file(
            answerer,
            arguments.questions,
            arguments.out,
            arguments.batch_size,
            command_line.video_options(arguments),
            arguments.quiet,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = argparse.ArgumentParser(
        "python -m apps.batch",
        description="Answer a file of conversations about images and videos with Qwen2-VL.",
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
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="conversations that are answered together (default: 8)",
    )
    command_line.add_media_options(parser)
    command_line.add_model_options(parser)
    command_line.add_sampling_options(parser)
    command_line.add_debug_options(parser)
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing but warnings and errors"
    )
    arguments = parser.parse_args(argv)
    problem = command_line.number_problem(arguments)
    if arguments.batch_size < 1:
        problem = f"--batch-size is {arguments.batch_size}, expected 1 or more"
    if problem is not None:
        parser.error(problem)
    command_line.check_debug_options(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.batch", run, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.batch", main)
