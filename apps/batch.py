"""An answer to each line of a file of conversations.

    python -m apps.batch questions.jsonl --out answers.jsonl

A line is a conversation in any layout that `conversations.py` reads, perhaps with an `id`. Blank
lines are skipped. Each other line gives one record, written as soon as it is done:

    {"line": 1, "id": "a", "answer": "A cat.", "tokens_in": 91, "tokens_out": 4, "finished": true,
     "sha256": "…"}
    {"line": 2, "error": "there is no image at missing.png"}

`line` counts from 1; `tokens_out` includes the tokens that end an answer, and `finished` is false
where --max-new-tokens ended it before; `sha256` is the start of the line's hash.

The file is read in windows. A window is sorted by prompt length, and neighbors are answered
together, so that there is little padding. That changes an answer by rounding at most: greedy
answers are those of each conversation alone. With --seed, line n draws with seed + n - 1, whatever
it is answered with.

A second run continues: lines that have an answer are skipped, whichever options it was made with,
and lines with an error are tried again. Where the answers are not those of this file of questions,
nothing is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO

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
)
from preprocess import Processor
from qwen2vl import Qwen2VL
from tokenizer import StreamDecoder, content_kind

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


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, with their numbers from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


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
    for number, line in numbered_lines(out):
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
    for number, line in numbered_lines(path):
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


def write_record(file: IO[bytes], record: dict) -> None:
    """Write one record, so that it is not lost when the process is killed."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    # Lone surrogates, as in a file name that is not UTF-8, become what JSON has for them: \udc80.
    file.write(line.encode(errors="backslashreplace"))
    file.flush()


# ---------------------------------------------------------------------------------------- questions
@dataclass
class Question:
    """A line of the file, with its images and videos read."""

    record: dict  # of its answer, as far as it is known: `line`, perhaps `id`, `error` if unusable
    sha256: str = ""
    messages: list[dict] = field(default_factory=list)  # with a Media for each image and video
    length: int = 0  # of the prompt in tokens
    size: int = 0  # of the patches in bytes


def read_questions(
    path: str,
    processor: Processor,
    video_options: dict,
    add_vision_id: bool = False,
    answered: Container[int] = (),
) -> Iterator[Question]:
    """Yield the lines of a file in order, without those in `answered`, each read when asked for.

    video_options: fps or nframes of videos that have neither. A line that cannot be used is a
    Question whose record has an `error`.
    """
    for number, line in numbered_lines(path):
        if number in answered:
            continue
        question = Question({"line": number}, line_hash(line))
        try:
            content = json.loads(line.rstrip().decode("utf-8-sig"))
            if isinstance(content, dict) and "id" in content:
                question.record["id"] = content["id"]
            question.messages = read_messages(content, processor, video_options)
            batch = processor([question.messages], add_vision_id=add_vision_id)
            question.length = batch.input_ids.shape[1]
            question.size = sum(media.patches.nbytes for media in batch.media)
        except json.JSONDecodeError as error:
            question.record["error"] = f"the line is not JSON: {error.msg} at column {error.colno}"
        except Exception as error:  # a line costs its own record and nothing else
            unexpected = f"the line cannot be used: {type(error).__name__}: {error}"
            question.record["error"] = command_line.error_sentence(error) or unexpected
        yield question


def read_messages(content: object, processor: Processor, video_options: dict) -> list[dict]:
    """Return the messages of a parsed line, with a Media for each image and video.

    Raises what `read_conversation` and the processor raise.
    """
    messages = []
    for message in read_conversation(content):
        items = [read_item(item, processor, video_options) for item in message["content"]]
        messages.append(message | {"content": items})
    if not messages:
        raise ValueError("expected a list of messages, got an empty one")
    return messages


def read_item(item: dict, processor: Processor, video_options: dict) -> dict:
    """Return a content item with its image or video read."""
    kind = content_kind(item)
    if kind == "text":
        return item
    if kind == "video" and item.get("fps") is None and item.get("nframes") is None:
        item = item | video_options
    return {"type": kind, kind: processor.prepare(item)}


def groups(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Yield groups of at most `size` questions of similar length.

    They come window after window. A window is WINDOW groups, or as many questions as reach
    WINDOW_BYTES; no more than one is held in memory.
    """
    window: list[Question] = []
    held_bytes = 0
    for question in questions:
        window.append(question)
        held_bytes += question.size
        if len(window) == WINDOW * size or held_bytes >= WINDOW_BYTES:
            yield from split(window, size)
            window = []
            held_bytes = 0
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
        """Yield the records of a group, each as soon as its answer has ended.

        Where memory does not suffice for the group, or one of it has logits that are not finite,
        those without an answer are asked again one by one: only the cause gives an error record.
        """
        waiting = {}
        for question in group:
            if "error" in question.record:
                yield question.record
            else:
                waiting[question.record["line"]] = question
        try:
            for record in self.batch_answers(list(waiting.values())):
                del waiting[record["line"]]
                yield record
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
        if not questions:
            return
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


def answer_file(
    answerer: Answerer,
    path: str,
    out: str,
    batch_size: int = 8,
    video_options: dict | None = None,
) -> None:
    """Answer each line of the file `path` that has no answer in `out` yet.

    What fails in one conversation costs only its own record. Raises ValueError or OSError with one
    sentence for unusable files.
    """
    answers = read_answers(out)
    total = count_questions(path, out, answers)
    target = os.path.realpath(out)
    with command_line.naming(out), open(target + ".new", "wb") as file:
        for record in answers.values():
            write_record(file, record)
    os.replace(target + ".new", target)  # at once, so that no answer is lost

    questions = read_questions(
        path, answerer.processor, video_options or {}, answerer.add_vision_id, answers
    )
    quiet = not logger.isEnabledFor(logging.INFO)
    progress = tqdm(total=total, initial=len(answers), unit=" lines", disable=quiet)
    errors = 0
    written = 0
    with progress, command_line.naming(out), open(out, "ab") as file:
        for group in groups(questions, batch_size):
            for record in answerer.answers(group):
                write_record(file, record)
                written += 1
                errors += "error" in record
                progress.set_postfix(errors=errors, refresh=False)
                progress.update()
    counts = f"{written - errors} answers, {errors} errors"
    logger.info("%s: %s, %d were there already", out, counts, len(answers))


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
        command_line.checked_run(arguments, directory, processor),
    )
    answer_file(
        answerer,
        arguments.questions,
        arguments.out,
        arguments.batch_size,
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
    command_line.add_cuda_graph_option(parser)
    arguments = command_line.parse_arguments(parser, argv, needs_question=False)
    command_line.check_cuda_graph_option(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.batch", run, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.batch", main)
