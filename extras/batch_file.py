"""`generate.py --batch conversations.jsonl --out answers.jsonl`: an answer to each line of a file.

A line is a conversation in any layout that `conversations.py` reads: a list of messages, or an object with
`messages` and, if wanted, `images` and an `id`, which is copied to the answer. Blank lines are skipped. Each line
gives one record, in the order of being done:

    {"line": 1, "id": "a", "answer": "A cat.", "tokens_in": 91, "tokens_out": 4, "finished": true, "sha256": "…"}
    {"line": 2, "error": "there is no image at missing.png"}

`line` counts from 1; `tokens_out` includes the id that ends an answer, and `finished` is false where --max-new-tokens
cut it off before one; `sha256` is the start of the line's hash.

The file is read in windows, a window is sorted by prompt length, and neighbours are answered together, so that little
is padded. That changes an answer by no more than rounding: greedy answers are those of each conversation alone. With
--seed, line n draws with seed + n - 1, whatever it is answered with.

Run again, it goes on: lines that have an answer are skipped, whichever options it was made with. Lines with an error
are tried again (the path may be mended by now) and their records replaced; a record that was only half written is
dropped. An answer never is: where an answered line is not the one that its record was made from, nothing is done.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from conversations import read_conversation
from extras import command_line
from generate import Sampling, end_ids, new_token_limits, stream
from preprocess import Processor
from qwen2vl import Qwen2VL
from tokenizer import content_kind

WINDOW = 16  # groups that are sorted together
WINDOW_BYTES = 2**30  # of patches, after which a window ends early
FIRST = b'{"line": '  # how each record starts


@dataclass
class Question:
    """A line of the file, its pictures read."""

    record: dict  # of its answer, as far as it is known: `line`, perhaps `id`; `error` if it cannot be asked
    sha256: str
    messages: list[dict] = field(
        default_factory=list
    )  # with a Media in the place of each picture and clip
    length: int = 0  # of the prompt in tokens
    size: int = 0  # of the patches in bytes


def run(
    arguments: argparse.Namespace, model: Qwen2VL, processor: Processor, sampling: Sampling
) -> None:
    """Answers each line of `arguments.batch` that has no answer in `arguments.out` yet; says how many on stderr.

    A line that cannot be asked becomes an error record. Raises ValueError or OSError with one sentence for files and
    options that do not fit. What goes wrong with one conversation costs only its own record.
    """
    check(arguments)
    done, total = resume(arguments.batch, arguments.out)
    written = {"answer": 0, "error": 0}
    with (
        command_line.naming(arguments.out),
        open(
            arguments.out, "a", encoding="utf-8", errors="backslashreplace", newline="\n"
        ) as file,  # for surrogates
        tqdm(
            total=total, initial=len(done), unit=" lines", disable=arguments.quiet, file=sys.stderr
        ) as bar,
    ):

        def write(record: dict) -> None:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            written["error" if "error" in record else "answer"] += 1
            bar.set_postfix(errors=written["error"], refresh=False)
            bar.update()

        def askable() -> Iterator[Question]:
            for question in questions(arguments, processor, done):
                if "error" in question.record:
                    write(question.record)
                else:
                    yield question

        for group in groups(askable(), arguments.batch_size):
            for record in answers(arguments, model, processor, sampling, group):
                write(record)
    if not arguments.quiet:
        counts = f"{written['answer']} answers, {written['error']} errors, {len(done)} were there already"
        print(f"{arguments.out}: {counts}", file=sys.stderr)


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for options that mean nothing here and for files that cannot be used."""
    given = {
        "--image or --video": arguments.media,
        "--prompt": arguments.prompt,
        "--system": arguments.system,
    }
    if names := [name for name, value in given.items() if value not in (None, [])]:
        raise ValueError(
            f"{names[0]} means nothing with --batch, where each line is a whole conversation"
        )
    batch, out = Path(arguments.batch), Path(arguments.out)
    if not batch.is_file():
        raise FileNotFoundError(f"there is no file {batch}, which --batch names")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent}, in which --out is to be written")
    if out.exists() and not out.is_file():
        raise ValueError(f"--out names {out}, which is no file")
    if out.exists() and out.samefile(batch):
        raise ValueError(f"--out names the very file that --batch names, {batch}")


def lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file that are not blank, with their numbers from 1."""
    with open(path, "rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def digest(line: bytes) -> str:
    """16 hexadecimal digits that tell a line from others."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def resume(batch: str, out: str) -> tuple[dict[int, str], int]:
    """Reduces `out` to its whole answers. Gives them as {line: hash}, and how many lines there are to answer in all.

    Raises ValueError, and leaves the file as it is, if it holds anything that was not written here, or answers to
    other lines than those of `batch`.
    """
    done, total, new = {}, 0, Path(os.path.realpath(out) + ".new")
    try:
        with open(new, "wb") as kept:
            for number, line in lines(out) if os.path.exists(out) else ():
                whole = line.endswith(b"\n")
                if not whole and FIRST.startswith(line[: len(FIRST)]):
                    print(
                        f"{out}: its last record is only half written and is dropped",
                        file=sys.stderr,
                    )
                    break
                try:
                    record = json.loads(line)
                    if not whole or (answered := record["line"]) in done:
                        raise ValueError("two records for one line, or none")
                    if "error" not in record:
                        done[answered] = record["sha256"]
                        kept.write(line)
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(
                        f"line {number} of {out} is no answer of --batch: give another --out"
                    ) from error
        missing = dict(done)
        for number, line in lines(batch):
            total += 1
            if missing.pop(number, digest(line)) != digest(line):
                raise ValueError(
                    f"line {number} of {batch} is not the one that {out} answers: give another --out"
                )
        if missing:
            raise ValueError(
                f"{out} answers line {min(missing)} of {batch}, which is not there: give another --out"
            )
        os.replace(new, os.path.realpath(out))
    finally:
        new.unlink(missing_ok=True)
    return done, total


def questions(
    arguments: argparse.Namespace, processor: Processor, done: Container[int] = ()
) -> Iterator[Question]:
    """The lines of the file in their order, without those in `done`, each prepared when it is asked for."""
    defaults = {
        name: value
        for name in ("fps", "nframes")
        if (value := getattr(arguments, name)) is not None
    }
    for number, line in lines(arguments.batch):
        if number in done:
            continue
        question = Question({"line": number}, digest(line))
        try:
            content = json.loads(line.rstrip().decode("utf-8-sig"))
            if isinstance(content, dict) and "id" in content:
                question.record["id"] = content["id"]
            messages = read_conversation(content)
            if not messages:
                raise ValueError("expected a list of messages, got an empty one")
            for message in messages:
                items = [read_media(item, processor, defaults) for item in message["content"]]
                question.messages.append(message | {"content": items})
            batch = processor([question.messages], add_vision_id=arguments.add_vision_id)
            question.length = batch.input_ids.shape[1]
            question.size = sum(media.patches.nbytes for media in batch.media)
        except json.JSONDecodeError as error:
            question.record["error"] = f"the line is not JSON: {error.msg} at column {error.colno}"
        except (ValueError, OSError) as error:
            question.record["error"] = str(error)
        except Exception as error:  # a line costs its own record and nothing else
            question.record["error"] = f"the line cannot be used: {type(error).__name__}: {error}"
        yield question


def read_media(item: dict, processor: Processor, defaults: dict) -> dict:
    """Return a content item with its image or video read; `defaults` are for videos without fps and nframes."""
    kind = content_kind(item)
    if kind == "text":
        return item
    if kind == "video" and item.get("fps") is None and item.get("nframes") is None:
        item = item | defaults
    return {"type": kind, kind: processor.prepare(item)}


def groups(asked: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Groups of at most `size` questions of like length: the longest of a window first, window after window.

    A window is WINDOW groups, or as many conversations as reach WINDOW_BYTES; no more than one is held.
    """
    window, held = [], 0
    for question in asked:
        window.append(question)
        held += question.size
        if len(window) == WINDOW * size or held >= WINDOW_BYTES:
            yield from split(window, size)
            window, held = [], 0
    yield from split(window, size)


def split(window: list[Question], size: int) -> Iterator[list[Question]]:
    window.sort(key=lambda question: -question.length)
    while window:
        yield [window.pop(0) for _ in range(min(size, len(window)))]


def answers(
    arguments: argparse.Namespace,
    model: Qwen2VL,
    processor: Processor,
    sampling: Sampling,
    group: list[Question],
) -> Iterator[dict]:
    """Yield the records of a group, each as soon as its answer has ended.

    Where memory does not suffice for the group, or one of it has scores that are not finite, those without an
    answer are asked again one by one, and only the cause becomes an error record.
    """
    waiting = {question.record["line"]: question for question in group}
    try:
        for record in group_answers(arguments, model, processor, sampling, group):
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
        yield from answers(arguments, model, processor, sampling, [question])


def group_answers(
    arguments: argparse.Namespace,
    model: Qwen2VL,
    processor: Processor,
    sampling: Sampling,
    group: list[Question],
) -> Iterator[dict]:
    """Yield the records of conversations that are answered together. Raises what `stream` raises."""
    ends = end_ids(model)
    if sampling.seed is not None:
        seeds = [sampling.seed + question.record["line"] - 1 for question in group]
        sampling = replace(sampling, seed=seeds)
    batch = processor(
        [question.messages for question in group], add_vision_id=arguments.add_vision_id
    )
    limits = new_token_limits(model, batch, arguments.max_new_tokens)

    def record(question: Question, ids: list[int]) -> dict:
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        counts = {"tokens_in": question.length, "tokens_out": len(ids), "finished": ids[-1] in ends}
        return question.record | {"answer": text, **counts, "sha256": question.sha256}

    running = {row: [] for row in range(len(group))}  # the ids of each answer that has not ended
    for step in stream(model, batch, arguments.max_new_tokens, sampling):
        for row in list(running):
            running[row].append(step[row])
            if step[row] in ends or len(running[row]) == limits[row]:
                yield record(group[row], running.pop(row))
