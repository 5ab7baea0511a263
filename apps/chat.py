"""A conversation of several turns, in which each turn computes only its own tokens.

    python -m apps.chat --image examples/shapes.png

The keys and values of earlier turns are in the KV cache. A new turn encodes the whole conversation,
which is cheap, and compares its token ids with those in the cache: the prefix that both share is
reused, and only the rest goes through the model, with only the images and videos that are new. The
answer is the one that a fresh run over the whole conversation gives.

An answer is not always encoded as the ids that the model chose: the text "ab" may have been made as
"a" + "b" and is encoded as "ab", and special tokens are no part of the text. Then the prefix ends
where the two differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

import command_line
import rope_types
from generate import (
    GenerationConfig,
    choose_decode_step,
    choose_generation_config,
    debugging,
    decode_step,
    new_cache,
    new_token_limits,
    stream,
)
from preprocess import Batch, Media, Processor
from qwen2vl import KVCache, Qwen2VL
from tokenizer import StreamDecoder, content_kind

logger = logging.getLogger("qwen2vl")

HELP = """\
/image FILE   attach an image to the next question; repeat for several; a URL works as well
/video FILE   attach a video, or a directory of its frames
/reset        start again: only the system message stays
/save FILE    write the conversation as a line of JSON, which apps.batch reads
/help         show these lines
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with // is a question that begins with /."""


# --------------------------------------------------------------------------------- the conversation
class Attachment(NamedTuple):
    """An image or video for the next question."""

    item: dict  # its content item as it was given, such as {"type": "image", "image": "a.png"}
    media: Media

    def content_item(self) -> dict:
        """Return the item for the Processor, which keeps what was given for `Chat.save`."""
        kind = content_kind(self.item)
        return {"type": kind, kind: self.media, "original": self.item}


def read_attachment(processor: Processor, item: dict) -> Attachment:
    """Read an image or video. Raises what `Processor.prepare` raises."""
    attachment = Attachment(item, processor.prepare(item))
    logger.info(attachment.media.summary(processor.image_config))
    return attachment


class Chat:
    """A conversation, and what the model has computed of it."""

    def __init__(
        self,
        model: Qwen2VL,
        processor: Processor,
        config: GenerationConfig | None = None,
        max_new_tokens: int | None = None,
        add_vision_id: bool = False,
        decode: Callable[..., Tensor] = decode_step,
    ):
        """max_new_tokens: of an answer; None: what `generate.new_token_limit` gives."""
        self.model = model
        self.processor = processor
        self.config = config
        self.max_new_tokens = max_new_tokens
        self.add_vision_id = add_vision_id
        self.decode = decode
        self.messages: list[dict] = []  # as the Processor reads them, see `Attachment.content_item`
        self.pending: list[Attachment] = []  # for the next question
        self.computed: Batch | None = None  # of the last turn: the ids and media not in the cache
        self.drop_cache()

    def drop_cache(self) -> None:
        """Drop what was computed, not the messages: the next turn computes all of them again."""
        self.cache: KVCache | None = None
        self.cached_ids: list[int] = []  # the tokens whose keys and values the cache holds
        self.media_end = 0  # how many of them reach to the end of the last image or video
        self.image_count = 0  # images in the cache
        self.video_count = 0

    def reset(self) -> None:
        """Return to the start: only the system message stays."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self.pending = []
        self.drop_cache()

    def add(self, item: dict) -> Media:
        """Attach an image or video, as `{"type": "image", "image": source}`, to the next question.

        Raises what `Processor.prepare` raises.
        """
        attachment = read_attachment(self.processor, item)
        self.pending.append(attachment)
        return attachment.media

    def ask(self, text: str) -> Iterator[int]:
        """Ask about the pending media and all messages before; yield the token ids of the answer.

        Closing the iterator ends the answer; what has been yielded of it becomes a message. Any
        other interruption withdraws the question: messages and pending media are as before.
        Raises ValueError for text that is not valid Unicode, and what `generate_steps` raises.
        """
        content = [attachment.content_item() for attachment in self.pending]
        content.append({"type": "text", "text": text})
        question = {"role": "user", "content": content}
        batch = self.processor([*self.messages, question], add_vision_id=self.add_vision_id)
        ids = batch.input_ids[0].tolist()
        image_count = count_grids(batch.image_grid_thw)
        video_count = count_grids(batch.video_grid_thw)
        answer = []
        try:
            [new_tokens] = new_token_limits(self.model, batch, self.max_new_tokens)
            prefix = self._reuse_cache(ids, new_tokens)
            self._leave_out_cached_media(batch)
            self.computed = replace(batch, input_ids=batch.input_ids[:, prefix:])
            steps = stream(
                self.model, batch, self.max_new_tokens, self.config, self.cache, self.decode
            )
            # It is closed between two tokens, when the cache is complete.
            with contextlib.suppress(GeneratorExit):
                for (token,) in steps:
                    answer.append(token)
                    yield token
            self.cached_ids = [*ids, *answer][: self.cache.length]  # the last token was never run
            self.media_end = self._media_end(ids)
            self.image_count = image_count
            self.video_count = video_count
            reply = {"role": "assistant", "content": self.processor.tokenizer.decode(answer)}
            self.messages = [*self.messages, question, reply]
            self.pending = []
        except BaseException:  # perhaps a KeyboardInterrupt in the middle of a layer
            self.drop_cache()
            raise

    def _reuse_cache(self, ids: list[int], new_tokens: int) -> int:
        """Shorten the cache to the prefix that it shares with ids, and return the prefix's length.

        The cache may then hold ids and new_tokens more; its memory grows in the forward pass.
        """
        prefix = self._shared_prefix(ids)
        if prefix < self.media_end or self._angles_change(len(ids)):
            self.drop_cache()
            prefix = 0
        if self.cache is None:
            self.cache = new_cache(self.model, 1, len(ids), new_tokens)
            return 0
        cache = self.cache
        # At least twice the capacity, so that the memory doubles instead of growing in each turn.
        cache.max_length = max(cache.max_length, len(ids) + new_tokens, 2 * cache.capacity)
        # What is removed is text, in which each token is one position.
        cache.next_position = cache.next_position - (cache.length - prefix)
        cache.length = prefix
        return prefix

    def _shared_prefix(self, ids: list[int]) -> int:
        """Return how many tokens of the cache can be reused; the last of ids is always run."""
        most = min(len(ids) - 1, len(self.cached_ids))
        for i in range(most):
            if ids[i] != self.cached_ids[i]:
                return i
        return most

    def _angles_change(self, length: int) -> bool:
        """Return whether RoPE rotates all tokens, also those of the cache, in another way now.

        Scaled RoPE of these types depends on the number of tokens beyond the trained length.
        """
        config = self.model.config
        if config.rope_type not in ("dynamic", "longrope"):
            return False
        trained_length = config.max_position_embeddings
        scaled_from = rope_types.original_length(config.rope_scaling, trained_length)
        return length > min(scaled_from, trained_length)

    def _media_end(self, ids: list[int]) -> int:
        """Return the index after the last placeholder of an image or video, 0 without any."""
        config = self.model.config
        is_media = np.isin(ids, [config.image_token_id, config.video_token_id])
        return int(is_media.nonzero()[0].max(initial=-1)) + 1

    def _leave_out_cached_media(self, batch: Batch) -> None:
        """Remove the images and videos in the cache from the whole conversation's batch."""
        batch.pixel_values, batch.image_grid_thw = media_after(
            self.image_count, batch.pixel_values, batch.image_grid_thw
        )
        batch.pixel_values_videos, batch.video_grid_thw = media_after(
            self.video_count, batch.pixel_values_videos, batch.video_grid_thw
        )

    def save(self, path: str) -> None:
        """Write {"messages": [...]} as one line of JSON to a new file.

        Raises OSError, also for a file that exists, or ValueError.
        """
        if not any(message["role"] == "user" for message in self.messages):
            raise ValueError("there is nothing to save yet")
        content = {"messages": [original_message(message) for message in self.messages]}
        line = json.dumps(content, ensure_ascii=False, default=refuse_object) + "\n"
        try:
            with open(path, "xb") as file:
                # A file name that is not UTF-8 has lone surrogates, which JSON writes as \udc80.
                file.write(line.encode(errors="backslashreplace"))
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from error


def count_grids(grids: np.ndarray | None) -> int:
    """Return the number of images (or videos) that grids [n, 3] describe."""
    return 0 if grids is None else len(grids)


def media_after(
    count: int, patches: np.ndarray | None, grids: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return patches [N, …] and grids [n, 3] without the first `count` images (or videos).

    Both are None where none is left.
    """
    if grids is None or count == len(grids):
        return None, None
    start = grids[:count].prod(1).sum()
    return patches[start:], grids[count:]


def original_message(message: dict) -> dict:
    """Return a message with the content items that were given."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return message | {"content": [item.get("original", item) for item in content]}


def refuse_object(value: object) -> None:
    """Raise ValueError for what JSON cannot hold."""
    found = type(value).__name__
    raise ValueError(f"cannot save the conversation: expected media as paths or URLs, got {found}")


# ------------------------------------------------------------------------------------- the terminal
class Console:
    """Questions and commands from stdin; answers to stdout, all else to stderr."""

    def __init__(self, chat: Chat, video_options: dict, quiet: bool = False):
        """video_options: fps or nframes of each `/video`."""
        self.chat = chat
        self.video_options = video_options
        self.is_terminal = sys.stdin.isatty()
        self.has_prompt = self.is_terminal and not quiet
        self.question: str | None = None  # that is being answered
        self.interrupted = False  # by Ctrl-C, with no line read since

    def run(self, question: str | None = None) -> None:
        """Answer the question, if any, then one line of stdin after the other until its end.

        A mistake is one sentence, and the conversation continues.
        """
        if self.is_terminal:
            enable_line_editing()
            logger.info("/help lists the commands")
        self.question = question
        while True:
            try:
                self.take_turn()
            except EOFError:
                if self.is_terminal:
                    logger.info("")
                return
            except KeyboardInterrupt:
                if self.interrupted or not self.is_terminal:
                    raise
                self.interrupted = True
                logger.info(self.interruption_note())
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except Exception as error:
                sentence = command_line.error_sentence(error)
                if sentence is None:
                    raise
                logger.error(sentence)
            self.question = None

    def take_turn(self) -> None:
        """Read a line, unless there is a question already; run its command or answer it."""
        if self.question is None:
            line = self.read_line()
            self.interrupted = False
            self.question = self.run_command(line)
        if self.question is not None:
            answer(self.chat, self.question)

    def interruption_note(self) -> str:
        """Return what Ctrl-C has done."""
        if self.question is not None and self.chat.cache is None:
            return "\nthe question is withdrawn"
        return "\n(Ctrl-C again, or Ctrl-D, leaves)"

    def read_line(self) -> str:
        """Return the next line; the prompt shows what is pending. Raises EOFError at the end."""
        pending = ", ".join(content_kind(attachment.item) for attachment in self.chat.pending)
        prompt = f"[{pending}] > " if pending else "> "
        if self.has_prompt and sys.stdout.isatty():
            line = input(prompt)  # readline must know the prompt, to draw the line again
        else:
            if self.has_prompt:  # input() would write the prompt between the answers
                print(prompt, end="", file=sys.stderr, flush=True)
            line = input()
        encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
        return command_line.recover_utf8(line, encoding)

    def run_command(self, line: str) -> str | None:
        """Run a command; return any other line, as a question. Raises ValueError for a mistake."""
        if not line.strip():
            return None
        if line.startswith("//"):
            return line.removeprefix("/")
        if not line.startswith("/"):
            return line
        command = line.split(maxsplit=1)[0]
        argument = line.removeprefix(command).strip()
        if command in ("/image", "/video"):
            self.attach(command, argument)
        elif command == "/save":
            self.save(command, argument)
        elif command == "/reset":
            self.chat.reset()
            logger.info("the conversation starts again; the system message stays")
        elif command == "/help":
            print(HELP, file=sys.stderr, flush=True)
        elif command == "/exit":
            raise EOFError
        else:
            advice = "/help lists them (a question may begin with //)"
            raise ValueError(f"there is no command {command:.80}; {advice}")
        return None

    def attach(self, command: str, argument: str) -> None:
        """Attach the file of `/image FILE` or `/video FILE` to the next question."""
        path = required_path(command, argument)
        if command == "/image":
            self.chat.add(command_line.image_item(path))
        else:
            self.chat.add(command_line.video_item(path) | self.video_options)

    def save(self, command: str, argument: str) -> None:
        """Write the conversation to the file of `/save FILE`."""
        path = required_path(command, argument)
        self.chat.save(path)
        logger.info("saved %d messages to %s", len(self.chat.messages), path)


def enable_line_editing() -> None:
    """Give input() editing and a history, where Python has readline: not on Windows.

    The import alone does it, so it must not happen without a terminal.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def required_path(command: str, argument: str) -> str:
    """Return the path that a command is given. Raises ValueError without one."""
    if not argument:
        raise ValueError(f"{command} needs a file: {command} FILE")
    return plain_path(argument)


def plain_path(text: str) -> str:
    """Return a path typed or dropped into a terminal: in quotes, with escaped spaces, or with ~."""
    text = text.strip()
    if text.startswith(("'", '"')):
        text = remove_quotes(text)
    elif os.name == "posix":  # elsewhere a backslash separates directories
        text = re.sub(r"\\(.)", r"\1", text)
    return os.path.expanduser(text)


def remove_quotes(text: str) -> str:
    """Return text without the quotes at both ends; text that is not quoted as a whole stays."""
    if os.name != "posix":
        is_quoted = len(text) > 1 and text[0] == text[-1]
        return text[1:-1] if is_quoted else text
    try:
        words = shlex.split(text)  # reads 'it'\''s.png', which terminals write for it's.png
    except ValueError:  # no closing quote
        return text
    return words[0] if len(words) == 1 else text


def answer(chat: Chat, question: str) -> None:
    """Stream the answer to stdout.

    The first Ctrl-C ends it after the next token, a second one at once.
    """
    decoder = StreamDecoder(chat.processor.tokenizer)
    times = [time.perf_counter()]
    try:
        with counted_interrupts() as presses, contextlib.closing(chat.ask(question)) as tokens:
            for token in tokens:
                times.append(time.perf_counter())
                command_line.put(decoder.push(token))
                if presses:
                    break
    finally:
        if len(times) > 1:
            command_line.put(decoder.finish(), end="\n")
    prompt_tokens = chat.computed.input_ids.shape[1]
    line = command_line.describe_answer(chat.model, prompt_tokens, times)
    logger.info("%s; %d tokens in the cache", line, len(chat.cached_ids))


@contextlib.contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Within it, the first Ctrl-C is only appended to the list; the next one is KeyboardInterrupt.

    Only the main thread receives signals and can handle them: in any other, nothing changes.
    """
    presses = []

    def press(number, frame):
        presses.append(number)
        if len(presses) > 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield presses
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


# -------------------------------------------------------------------------------------- the program
def run(arguments: argparse.Namespace) -> None:
    """Hold a conversation. Raises OSError or ValueError with one sentence for wrong options."""
    if sys.stdin is None or sys.stdin.closed:
        raise ValueError("stdin is closed, expected the questions of the chat")
    GenerationConfig(**command_line.sampling_options(arguments))  # checked before anything is read
    directory, processor = command_line.load_processor(arguments)
    # Before the model: a wrong path should not wait until the weights are loaded.
    pending = []
    for item in command_line.media_items(arguments):
        pending.append(read_attachment(processor, item))
    model = command_line.load_checkpoint(arguments, directory, processor)
    config = choose_generation_config(arguments, model)
    decode = choose_decode_step(arguments, model)
    chat = Chat(model, processor, config, arguments.max_new_tokens, arguments.add_vision_id, decode)
    chat.messages = command_line.system_messages(arguments)
    chat.pending = pending
    console = Console(chat, command_line.video_options(arguments), arguments.quiet)
    with debugging(arguments, model):
        console.run(arguments.prompt)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = command_line.build_parser(
        "Hold a conversation about images and videos with Qwen2-VL. --image, --video and --prompt "
        "are its first question; the next ones are lines of stdin, where /help lists the commands.",
        "python -m apps.chat",
    )
    command_line.add_debug_options(parser)
    arguments = command_line.parse_arguments(parser, argv, needs_question=False)
    command_line.check_debug_options(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.chat", run, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.chat", main)
