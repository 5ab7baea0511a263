"""`generate.py --chat`: a conversation of several turns, in which a turn runs only its own tokens.

What earlier turns computed stands in the KV cache. A new turn encodes the whole conversation, which is cheap, and
compares the ids with those in the cache: all that they share stays, and only the rest goes through the model, with
only the pictures that are new. The answer is the one that a fresh run over the whole conversation gives.

An answer need not come back as the ids that the model chose: the text "ab" may have been made as "a" + "b" and is
encoded as "ab", and control tokens are no part of the text. Then the cache is cut back to where the two part.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import rope_types
from extras import command_line
from generate import Sampling, new_cache, new_token_limits, stream
from preprocess import Batch, Media, Processor
from qwen2vl import KVCache, Qwen2VL
from tokenizer import StreamDecoder, content_items, content_kind

HELP = """\
/image FILE   show a picture with the next question; repeat for several; an address works as well
/video FILE   show a film, or a folder of its frames
/reset        forget everything but the system message
/save FILE    write the conversation as a line of JSON, as --batch reads it
/help         show these lines
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with // is a question that begins with /."""


# -------------------------------------------------------------------------------------------- the conversation
class Chat:
    """A conversation, and what the model has computed of it."""

    def __init__(
        self,
        model: Qwen2VL,
        processor: Processor,
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        add_vision_id: bool = False,
    ):
        """max_new_tokens: of an answer; None: what `generate.new_token_limit` gives."""
        self.model, self.processor, self.sampling = model, processor, sampling
        self.max_new_tokens, self.add_vision_id = max_new_tokens, add_vision_id
        self.messages: list[
            dict
        ] = []  # for the Processor; an item with Media has what was given beside it
        self.waiting: list[dict] = []  # pictures and clips for the next question
        self.ran: Batch | None = None  # what the last question put through the model
        self.forget()

    def forget(self) -> None:
        """Drops what was computed, not what was said: the next turn runs the whole conversation again."""
        self.cache: KVCache | None = None
        self.cached_ids: list[int] = []  # whose keys and values the cache holds

    def reset(self) -> None:
        """Back to the start: only the system message stays."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self.waiting = []
        self.forget()

    def add(self, item: dict) -> Media:
        """Reads a picture or clip, as `{"type": "image", "image": source}`, for the next question.

        Raises what `Processor.prepare` raises.
        """
        media, kind = self.processor.prepare(item), content_kind(item)
        self.waiting.append({"type": kind, kind: media, "given": item})
        return media

    def ask(self, text: str) -> Iterator[int]:
        """Puts a question about what is waiting and all before it; yields the answer's token ids as they are made.

        Closing the iterator ends the answer, and what there is of it stands in the conversation. If anything else
        breaks it off, the question is withdrawn: messages and waiting are as before. Raises ValueError for a text
        that is not valid Unicode, and what `generate_steps` raises.
        """
        question = {"role": "user", "content": [*self.waiting, {"type": "text", "text": text}]}
        batch = self.processor([*self.messages, question], add_vision_id=self.add_vision_id)
        ids, answer = batch.input_ids[0].tolist(), []
        try:
            [limit] = new_token_limits(self.model, batch, self.max_new_tokens)
            kept = self._keep(ids, limit)
            self._leave_out_media(batch, kept)
            self.ran = replace(batch, input_ids=batch.input_ids[:, kept:])
            with contextlib.suppress(
                GeneratorExit
            ):  # closed between two tokens, when the cache is whole
                for (id,) in stream(
                    self.model, batch, self.max_new_tokens, self.sampling, self.cache
                ):
                    answer.append(id)
                    yield id
            self.cached_ids = [*ids, *answer][: self.cache.length]  # the last one was never run
            said = {"role": "assistant", "content": self.processor.tokenizer.decode(answer)}
            self.messages, self.waiting = [*self.messages, question, said], []
        except BaseException:  # perhaps a KeyboardInterrupt in the middle of a layer
            self.forget()
            raise

    def _keep(self, ids: list[int], new_tokens: int) -> int:
        """Cut the cache back to what it shares with ids, and return that length.

        The cache may then hold ids and new_tokens more; its memory grows in the forward pass.
        """
        config = self.model.config
        if config.rope_type in ("dynamic", "longrope"):
            trained_length = config.max_position_embeddings
            scaled_from = rope_types.original_length(config.rope_scaling, trained_length)
            if len(ids) > min(scaled_from, trained_length):
                self.forget()  # beyond that length all angles change with it, those of the cached keys as well
        most = min(len(ids) - 1, len(self.cached_ids))
        kept = next((i for i in range(most) if ids[i] != self.cached_ids[i]), most)
        if self.cache is None:
            self.cache = new_cache(self.model, 1, len(ids), new_tokens)
            return kept
        cache = self.cache
        # No less than twice the capacity, so that the memory doubles and is not enlarged in every turn.
        cache.max_length = max(cache.max_length, len(ids) + new_tokens, 2 * cache.capacity)
        cache.next_position = cache.next_position - (cache.length - kept)  # text: one step each
        cache.length = kept
        return kept

    def _leave_out_media(self, batch: Batch, kept: int) -> None:
        """Takes the pictures and clips of earlier turns, which the cache holds, out of the batch."""
        config = self.model.config
        items = [
            item for n, message in enumerate(self.messages) for item in content_items(message, n)
        ]
        for kind, pixels, grids, token_id in (
            ("image", "pixel_values", "image_grid_thw", config.image_token_id),
            ("video", "pixel_values_videos", "video_grid_thw", config.video_token_id),
        ):
            count = sum(content_kind(item) == kind for item in items) if kept else 0
            if not count:
                continue
            patches, grid = getattr(batch, pixels), getattr(batch, grids)
            start, rest = grid[:count].prod(1).sum(), count < len(grid)
            # The prompt before the last answer is encoded as it was, so the cache is never cut there.
            placeholders = (batch.input_ids[0, :kept] == token_id).sum()
            assert placeholders * config.vision_config.spatial_merge_size**2 == start, (
                "a picture was cut off"
            )
            setattr(batch, pixels, patches[start:] if rest else None)
            setattr(batch, grids, grid[count:] if rest else None)

    def save(self, path: str) -> None:
        """Writes {"messages": [...]} as one line of JSON. Raises OSError or ValueError; an existing file stays."""
        if not any(message["role"] == "user" for message in self.messages):
            raise ValueError("there is nothing to save yet")
        plain = [
            message
            if isinstance(content, str)
            else message | {"content": [x.get("given", x) for x in content]}
            for message in self.messages
            for content in (message["content"],)
        ]
        line = json.dumps({"messages": plain}, ensure_ascii=False) + "\n"
        try:
            with open(path, "xb") as file:
                file.write(line.encode())
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------- the command line
def run(
    arguments: argparse.Namespace,
    model: Qwen2VL,
    processor: Processor,
    sampling: Sampling,
    messages: list[dict],
) -> None:
    """Reads questions and commands from stdin until it ends; answers go to stdout, all else to stderr.

    messages: from the command line: a system message, and a user message that is asked at once if it has text.
    Raises what `Chat.add` raises for its pictures; later mistakes are one sentence each, and the chat goes on.
    """

    def say(line: str) -> None:
        if not arguments.quiet:
            print(line, file=sys.stderr, flush=True)

    chat, question = (
        Chat(model, processor, sampling, arguments.max_new_tokens, arguments.add_vision_id),
        None,
    )
    for message in messages:
        if message["role"] == "system":
            chat.messages.append(message)
            continue
        for item in message["content"]:
            if content_kind(item) == "text":
                question = item["text"]
            else:
                say(chat.add(item).summary(processor.image_config))
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("stdin is closed, expected the questions of --chat")
    if terminal := sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() editing and a history; not on Windows
        say("/help lists the commands")

    pressed = False  # Ctrl-C, and no line since
    while True:
        try:
            if question is None:
                line = read_line(chat, terminal and not arguments.quiet)
                pressed = False
                question = obey(chat, line, arguments, say)
            if question is not None:
                answer(chat, question, say)
        except EOFError:
            return say("") if terminal else None
        except KeyboardInterrupt:
            if pressed or not terminal:
                raise
            pressed = True
            withdrawn = question is not None and chat.cache is None
            say(
                "\nthe question is withdrawn"
                if withdrawn
                else "\n(Ctrl-C again, or Ctrl-D, leaves)"
            )
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except Exception as error:
            sentence = command_line.error_sentence(error)
            if sentence is None:
                raise
            print(sentence, file=sys.stderr, flush=True)
        question = None


def read_line(chat: Chat, prompted: bool) -> str:
    """Return the next line; the prompt shows what is waiting. Raises EOFError at the end."""
    waiting = ", ".join(item["type"] for item in chat.waiting)
    prompt = f"[{waiting}] > " if waiting else "> "
    if prompted and sys.stdout.isatty():
        line = input(prompt)  # readline must know the prompt, to draw the line again
    else:
        if prompted:  # input() would write the prompt between the answers
            print(prompt, end="", file=sys.stderr, flush=True)
        line = input()
    return command_line.recover_utf8(line, getattr(sys.stdin, "encoding", None) or "utf-8")


def obey(
    chat: Chat, line: str, arguments: argparse.Namespace, say: Callable[[str], None]
) -> str | None:
    """Does what a command says; gives any other line back, as the question that it is."""
    if not line.startswith("/") or line.startswith("//"):
        return line.removeprefix("/") if line.strip() else None
    command, rest = [*line.split(maxsplit=1), ""][:2]
    if command in ("/image", "/video", "/save") and not rest:
        raise ValueError(f"{command} needs a file: {command} FILE")
    if command in ("/image", "/video"):
        kind = command[1:]
        options = {
            name: value
            for name in ("fps", "nframes")
            if (value := getattr(arguments, name)) is not None
        }
        media = chat.add(
            {"type": kind, kind: plain_path(rest)} | (options if kind == "video" else {})
        )
        say(media.summary(chat.processor.image_config))
    elif command == "/save":
        chat.save(path := plain_path(rest))
        say(f"saved {len(chat.messages)} messages to {path}")
    elif command == "/reset":
        chat.reset()
        say("all forgotten but the system message")
    elif command == "/help":
        print(HELP, file=sys.stderr, flush=True)
    elif command == "/exit":
        raise EOFError
    else:
        raise ValueError(
            f"there is no command {command:.80}; /help lists them (a question may begin with //)"
        )
    return None


def plain_path(text: str) -> str:
    """A path as it was typed or dropped into the terminal: in quotes, or with its spaces escaped, or with ~."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif os.name == "posix":  # elsewhere a backslash separates folders
        text = re.sub(r"\\(.)", r"\1", text)
    return os.path.expanduser(text)


def answer(chat: Chat, question: str, say: Callable[[str], None]) -> None:
    """Streams the answer to stdout. The first Ctrl-C ends it after the next token, a second one at once."""
    words, times = StreamDecoder(chat.processor.tokenizer), [time.perf_counter()]
    try:
        with counted_interrupts() as presses, contextlib.closing(chat.ask(question)) as ids:
            for id in ids:
                times.append(time.perf_counter())
                command_line.put(words.push(id))
                if presses:
                    break
    finally:
        if len(times) > 1:
            command_line.put(words.finish(), end="\n")
    say(
        f"{command_line.spent(chat.model, chat.ran, times)}; {len(chat.cached_ids)} tokens in the cache"
    )


@contextlib.contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Within it the first Ctrl-C only goes into the list; any further one raises KeyboardInterrupt."""
    presses = []

    def press(number, frame):
        presses.append(number)
        if len(presses) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield presses  # only the main thread gets signals, and may handle them
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
