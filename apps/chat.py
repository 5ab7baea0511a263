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

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TextIO

import numpy as np
from torch import Tensor

import command_line
import memory
from generate import (
    GenerationConfig,
    choose_decode_step,
    choose_generation_config,
    decode_step,
    new_cache,
    new_token_limits,
    stream,
)
from output_files import check_output, write_file
from preprocess import Processor
from qwen2vl import KVCache, Qwen2VL
from tokenizer import StreamDecoder, content_kind

logger = logging.getLogger("qwen2vl")

MAX_LINE = 2**24  # characters of a line of stdin

HELP = """\
/image FILE   attach an image to the next question; repeat for several; a URL works as well
/video FILE   attach a video, or a directory of its frames
/reset        start again: only the system message stays
/save FILE    write the conversation as a line of JSON, which apps.batch reads
/help         show these lines
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. A line that begins with // is a question that begins with /."""


# --------------------------------------------------------------------------------- the conversation
def read_attachment(processor: Processor, item: dict) -> dict:
    """Return a content item with its image or video read, and the one that was given.

    Raises what `Processor.prepare` raises.
    """
    kind = content_kind(item)
    media = processor.prepare(item)
    logger.info(media.summary(processor.image_config))
    return {"type": kind, kind: media, "original": item}


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
        run: memory.Run | None = None,
    ):
        """max_new_tokens: of an answer; None: what `config_fields.new_token_limit` gives.

        run: that the memory of each turn is checked for, before it starts; None: no check.
        """
        self.model = model
        self.processor = processor
        self.config = config or GenerationConfig.from_model(model)
        self.max_new_tokens = max_new_tokens
        self.add_vision_id = add_vision_id
        self.decode = decode
        self.run = run
        self.messages: list[dict] = []  # as the Processor reads them, see `read_attachment`
        self.pending: list[dict] = []  # images and videos for the next question
        self.prompt_tokens = 0  # that the last turn ran through the model
        self.drop_cache()

    def drop_cache(self) -> None:
        """Drop what was computed, not the messages: the next turn computes all of them again."""
        self.cache: KVCache | None = None
        self.cached_ids: list[int] = []  # the tokens whose keys and values the cache holds

    def reset(self) -> None:
        """Return to the start: only the system message stays."""
        self.messages = [message for message in self.messages[:1] if message["role"] == "system"]
        self.pending = []
        self.drop_cache()

    def add(self, item: dict) -> None:
        """Attach an image or video, as `{"type": "image", "image": source}`, to the next question.

        Raises what `Processor.prepare` raises.
        """
        self.pending.append(read_attachment(self.processor, item))

    def ask(self, text: str) -> Iterator[int]:
        """Ask about the pending media and all messages before; yield the token ids of the answer.

        Closing the iterator ends the answer; what has been yielded of it becomes a message. Any
        other interruption withdraws the question: messages and pending media are as before.
        Raises ValueError for text that is not valid Unicode, and what `generate_steps` raises.
        """
        content = [*self.pending, {"type": "text", "text": text}]
        question = {"role": "user", "content": content}
        batch = self.processor([*self.messages, question], add_vision_id=self.add_vision_id)
        ids = batch.input_ids[0].tolist()
        answer = []
        try:
            [new_tokens] = new_token_limits(self.model, batch, self.max_new_tokens)
            prefix = self._reuse_cache(ids, new_tokens)
            new = batch
            if prefix:  # the media of earlier messages are in the cache, and not in this batch
                new = self.processor([question], add_vision_id=self.add_vision_id)
                batch = replace(new, input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            if self.run is not None:
                memory.check_batch(self.run, new)
            self.prompt_tokens = len(ids) - prefix
            tokenizer = self.processor.tokenizer
            steps = stream(
                self.model,
                batch,
                self.max_new_tokens,
                self.config,
                self.cache,
                self.decode,
                tokenizer,
            )
            # It is closed between two tokens, when the cache is complete.
            with contextlib.suppress(GeneratorExit):
                for (token,) in steps:
                    answer.append(token)
                    yield token
            self.cached_ids = [*ids, *answer][: self.cache.length]  # the last token was never run
            reply_text = tokenizer.decode(answer, stop_strings=self.config.stop_strings)
            reply = {"role": "assistant", "content": reply_text}
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
        if prefix == 0:
            self.cache = new_cache(self.model, 1, len(ids), new_tokens)
            return 0
        cache = self.cache
        # At least twice the capacity, so that the memory doubles instead of growing in each turn.
        cache.max_length = max(len(ids) + new_tokens, 2 * cache.capacity)
        cache.set_length(prefix)  # what is removed is text
        return prefix

    def _shared_prefix(self, ids: list[int]) -> int:
        """Return how many tokens of the cache can be reused: all of its images, or nothing."""
        config = self.model.config
        if config.rope_type in ("dynamic", "longrope"):
            return 0  # these may rotate all tokens differently once the conversation is longer
        prefix = 0
        for new_id, cached_id in zip(ids[:-1], self.cached_ids, strict=False):  # the last is run
            if new_id != cached_id:
                break
            prefix += 1
        media_ids = [config.image_token_id, config.video_token_id]
        cuts_media = np.isin(self.cached_ids[prefix:], media_ids).any()
        return 0 if cuts_media else prefix

    def save(self, path: str) -> None:
        """Write {"messages": [...]} as one line of JSON to a new file.

        Raises OSError, also for a file that exists, and ValueError without any message.
        """
        if not any(message["role"] == "user" for message in self.messages):
            raise ValueError("there is nothing to save yet")
        content = {"messages": [original_message(message) for message in self.messages]}
        line = json.dumps(content, ensure_ascii=False) + "\n"
        # A file name that is not UTF-8 has lone surrogates, which JSON writes as \udc80.
        data = line.encode(errors="backslashreplace")
        check_output(path, option="/save")
        write_file(path, lambda temporary: temporary.write_bytes(data), replace=False)


def original_message(message: dict) -> dict:
    """Return a message with the content items that were given."""
    content = message["content"]
    if isinstance(content, str):
        return message
    return message | {"content": [item.get("original", item) for item in content]}


# ------------------------------------------------------------------------------------- the terminal
class Console:
    """Questions and commands from stdin; answers to stdout, all else to stderr."""

    def __init__(self, chat: Chat, video_options: dict):
        """video_options: fps or nframes of each `/video`."""
        self.chat = chat
        self.video_options = video_options
        self.is_typed = sys.stdin is not None and sys.stdin.isatty()
        # A prompt is for people: it would be mixed with the answers in a pipe or a file.
        self.has_prompt = self.is_typed and sys.stdout.isatty()

    def run(self, question: str | None = None) -> None:
        """Answer the question, if any, then one line of stdin after the other until its end.

        A mistake is one sentence, and the conversation continues.
        """
        if self.is_typed:
            enable_line_editing()
            logger.info("/help lists the commands")
        while True:
            try:
                self.take_turn(question)
            except EOFError:
                if self.has_prompt:
                    print()
                return
            except KeyboardInterrupt:
                if not self.is_typed:
                    raise
                note = "\ninterrupted; the conversation is as before (Ctrl-D or /exit leaves)"
                print(note, file=sys.stderr, flush=True)
            except Exception as error:
                sentence = command_line.error_sentence(error)
                if sentence is None or isinstance(error, (BrokenPipeError, LostInputError)):
                    raise  # nobody reads any more, or nothing comes any more
                logger.error(sentence)
            question = None

    def take_turn(self, question: str | None) -> None:
        """Answer the question; without one, read a line and run its command or answer it."""
        if question is None:
            question = self.run_command(self.read_line())
        if question is not None:
            answer(self.chat, question)

    def read_line(self) -> str:
        """Return the next line; the prompt shows what is pending.

        Raises EOFError at the end, LostInputError where stdin cannot be read, and ValueError for a
        line that is too long.
        """
        if sys.stdin is None:
            raise EOFError
        prompt = ""
        if self.has_prompt:
            pending = ", ".join(item["type"] for item in self.chat.pending)
            prompt = f"[{pending}] > " if pending else "> "
        try:
            line = input(prompt) if self.is_typed else read_piped_line(sys.stdin)
        except OSError as error:
            raise LostInputError(f"cannot read stdin: {error.strerror or error}") from error
        return command_line.recover_utf8(line, sys.stdin.encoding or "utf-8")

    def run_command(self, line: str) -> str | None:
        """Run a command; return any other line, as a question. Raises ValueError for a mistake."""
        if line.startswith("//"):
            return line.removeprefix("/")
        if not line.startswith("/"):
            return line if line.strip() else None
        command = line.split(maxsplit=1)[0]
        argument = line.removeprefix(command).strip()
        if command in ("/image", "/video", "/save"):
            self.use_file(command, typed_path(command, argument))
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

    def use_file(self, command: str, path: str) -> None:
        """Run `/image FILE`, `/video FILE` or `/save FILE`."""
        if command == "/image":
            self.chat.add(command_line.image_item(path))
        elif command == "/video":
            self.chat.add(command_line.video_item(path) | self.video_options)
        else:
            self.chat.save(path)
            logger.info("saved %d messages to %s", len(self.chat.messages), path)


class LostInputError(OSError):
    """Stdin cannot be read, now or later."""


def read_piped_line(stdin: TextIO) -> str:
    """Return a line without its end. Raises EOFError at the end, ValueError for one too long."""
    line = stdin.readline(MAX_LINE + 1)
    if not line:
        raise EOFError
    if line.endswith("\n") or len(line) <= MAX_LINE:
        return line.removesuffix("\n")
    while line and not line.endswith("\n"):
        line = stdin.readline(MAX_LINE)
    raise ValueError(f"a line of stdin has more than {MAX_LINE:,} characters")


def enable_line_editing() -> None:
    """Give input() editing and a history by the import of readline, which Windows lacks."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


def typed_path(command: str, text: str) -> str:
    """Return a path typed or dropped into a terminal: in quotes, with escaped spaces, or with ~.

    Raises ValueError where a command is given none.
    """
    if not text:
        raise ValueError(f"{command} needs a file: {command} FILE")
    if os.name != "posix":  # a backslash separates directories there
        return os.path.expanduser(text.strip('"'))
    if os.path.exists(text):
        return text
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe
        words = [text]
    return os.path.expanduser(words[0] if len(words) == 1 else text)


def answer(chat: Chat, question: str) -> None:
    """Stream the answer to stdout.

    The first Ctrl-C ends it after the next token, a second one at once.
    """
    tokenizer = chat.processor.tokenizer
    decoder = StreamDecoder(tokenizer, stop_strings=chat.config.stop_strings)
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
    line = command_line.describe_answer(chat.model, chat.prompt_tokens, times)
    logger.info("%s; %d tokens in the cache", line, len(chat.cached_ids))


@contextlib.contextmanager
def counted_interrupts() -> Iterator[list[int]]:
    """Within it, the first Ctrl-C is only appended to the list; the next one is KeyboardInterrupt.

    For the main thread, which alone receives signals.
    """
    presses = []

    def press(number, frame):
        presses.append(number)
        if len(presses) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


# -------------------------------------------------------------------------------------- the program
def run(arguments: argparse.Namespace) -> None:
    """Hold a conversation. Raises OSError or ValueError with one sentence for wrong options."""
    if sys.stdin is None and arguments.prompt is None:
        raise ValueError("stdin is closed, expected the questions of the chat, or --prompt")
    GenerationConfig(**command_line.sampling_options(arguments))  # checked before anything is read
    directory, processor = command_line.load_processor(arguments)
    # Before the model: a wrong path should not wait until the weights are loaded.
    pending = []
    for item in command_line.media_items(arguments):
        pending.append(read_attachment(processor, item))
    memory_run = command_line.checked_run(arguments, directory)
    model = command_line.load_checkpoint(arguments, directory, processor, memory_run)
    chat = Chat(
        model,
        processor,
        choose_generation_config(arguments, model),
        arguments.max_new_tokens,
        arguments.add_vision_id,
        choose_decode_step(arguments, model),
        memory_run,
    )
    chat.messages = command_line.system_messages(arguments)
    chat.pending = pending
    Console(chat, command_line.video_options(arguments)).run(arguments.prompt)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, checked. Exits with code 2 as argparse does."""
    parser = command_line.build_parser(
        "Hold a conversation about images and videos with Qwen2-VL. --image, --video and --prompt "
        "are its first question; the next ones are lines of stdin, where /help lists the commands.",
        "python -m apps.chat",
    )
    command_line.add_cuda_graph_option(parser)
    command_line.add_prompt_lookup_option(parser)
    arguments = command_line.parse_arguments(parser, argv, needs_question=False)
    command_line.check_cuda_graph_option(parser, arguments)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code (see `command_line.run_main`)."""
    return command_line.run_main("apps.chat", run, parse_arguments(argv))


if __name__ == "__main__":
    command_line.run_program("apps.chat", main)
