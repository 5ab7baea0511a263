"""Messages → prompt → token ids, and token ids → text.

Qwen2-VL uses the byte-level BPE of Qwen2: text is brought to Unicode form NFC, split into words by
a regular expression, and the UTF-8 bytes of each word are merged into tokens. `tokenizer.json`
describes all of that and the `tokenizers` library computes it. This file adds what surrounds it:
the chat format, a guard against forged special tokens, and decoding token by token.

    messages ── apply_chat_template ──> prompt ── encode ──> ids ── model ──> ids ── decode ──> text
"""

import codecs
import itertools
import json
import logging
import operator
import secrets
import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from chat_template import ChatTemplate, find_chat_template, is_built_in_template
from conversations import content_items, content_kind
from json_files import has_file, read_optional_json
from output_files import write_json
from tokenizer_files import (
    END_OF_TEXT,
    AddedToken,
    call_tokenizers,
    load_backend,
    read_special_tokens,
)

logger = logging.getLogger("qwen2vl")

# The chat format is written with these special tokens. Their ids differ between vocabularies and
# are looked up by name.
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VISION_PAD = "<|vision_pad|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

# Every vocabulary must hold these. `encode_chat` accepts them, and VISION_PAD, from the chat
# template alone; all other special tokens (boxes, object references) are legitimate in any text.
REQUIRED_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
GUARDED_TOKENS = (*REQUIRED_TOKENS, VISION_PAD)

DEFAULT_SYSTEM = "You are a helpful assistant."


# --- the chat format ---


def render_published_template(
    messages: list[dict], add_generation_prompt: bool = True, add_vision_id: bool = False
) -> str:
    """Return the prompt, character for character what the published `chat_template.json` renders.

    Source: the chat_template.json of Qwen2-VL-2B, 7B and 72B-Instruct (arXiv 2409.12191, §2.2).
    """
    prompt = ""
    image_count = 0
    video_count = 0
    for number, message in enumerate(messages):
        if number == 0 and message["role"] != "system":
            prompt += f"{IM_START}system\n{DEFAULT_SYSTEM}{IM_END}\n"
        prompt += f"{IM_START}{message['role']}\n"
        for item in content_items(message, number):
            kind = content_kind(item)
            if kind == "image":
                image_count += 1
                if add_vision_id:
                    prompt += f"Picture {image_count}: "
                prompt += f"{VISION_START}{IMAGE_PAD}{VISION_END}"
            elif kind == "video":
                video_count += 1
                if add_vision_id:
                    prompt += f"Video {video_count}: "
                prompt += f"{VISION_START}{VIDEO_PAD}{VISION_END}"
            else:
                prompt += item["text"]
        prompt += f"{IM_END}\n"
    if add_generation_prompt:
        prompt += f"{IM_START}assistant\n"
    return prompt


def is_guarded_role(role: str) -> bool:
    """Return whether a message's text comes from outside: any role but system and assistant."""
    return role not in ("system", "assistant")


def _replace_bars(value: Any, replacement: str) -> Any:
    """Return `value` with `|` replaced in every string within; other objects stay the same."""
    if isinstance(value, str):
        return value.replace("|", replacement)
    if isinstance(value, dict):
        return {key: _replace_bars(entry, replacement) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_bars(entry, replacement) for entry in value]
    return value


def _count_guarded(text: str) -> list[int]:
    return [text.count(token) for token in GUARDED_TOKENS]


# --- the tokenizer ---


class _GuardBackend(NamedTuple):
    """The vocabulary once more, with the guarded tokens under names that nobody can guess."""

    backend: tokenizers.Tokenizer
    secret_names: dict[str, str]  # guarded token → its name in `backend`, where it has the same id


def _make_guard_backend(backend: tokenizers.Tokenizer) -> _GuardBackend:
    """Copy `backend` and rename the guarded tokens; all ids stay."""
    description = json.loads(backend.to_str())
    vocab = description["model"]["vocab"]
    secret_names = {}
    for entry in description["added_tokens"]:
        name = entry["content"]
        if name in GUARDED_TOKENS:
            entry["content"] = f"<|{secrets.token_hex(16)}|>"
            secret_names[name] = entry["content"]
            vocab.pop(name, None)
        vocab[entry["content"]] = entry["id"]  # fixes the id, see `load_backend`
    text = json.dumps(description, ensure_ascii=False)
    copy = call_tokenizers(tokenizers.Tokenizer.from_str, "the tokenizer", text)
    return _GuardBackend(copy, secret_names)


# Held while a tokenizer makes its guard backend; of the module, so that tokenizers can be pickled.
_GUARD_LOCK = threading.Lock()


class Tokenizer:
    """The Qwen2 tokenizer with the chat format of Qwen2-VL. Threads may share one.

    backend: the `tokenizers.Tokenizer` underneath; no method changes it
    pad_token, eos_token: names, and pad_token_id, eos_token_id: their ids
    special_ids: ids of all tokens that `decode` skips
    largest_id: of all tokens
    chat_template: the checkpoint's own template, None for the published one
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pad_token: str,
        eos_token: str,
        chat_template: ChatTemplate | None = None,
        largest_id: int | None = None,
    ):
        """Raise ValueError for a vocabulary without the special tokens of the chat format."""
        self.backend = backend
        if largest_id is None:
            largest_id = max(backend.get_vocab().values())  # for the published ones 0.2 s
        self.largest_id = largest_id
        self.chat_template = chat_template
        for name in REQUIRED_TOKENS:
            self.token_id(name)  # fail here rather than in the middle of a conversation
        self.pad_token = pad_token
        self.eos_token = eos_token
        self.pad_token_id = self.token_id(pad_token)
        self.eos_token_id = self.token_id(eos_token)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self._guard: _GuardBackend | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer files and the chat template of a checkpoint directory.

        The vocabulary comes from `tokenizer.json`, or from `vocab.json` and `merges.txt`; added
        tokens also from `tokenizer_config.json`, or `added_tokens.json` and
        `special_tokens_map.json`. Without a pad_token or eos_token it is `<|endoftext|>`.

        Raises FileNotFoundError when there is no vocabulary, ValueError when a file cannot be used.
        """
        folder = Path(folder)
        config_path = folder / "tokenizer_config.json"
        config = read_optional_json(config_path)
        special = read_special_tokens(folder, config)
        backend, largest_id = load_backend(folder, config, special)
        fallback = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else IM_END
        pad_token = special.named.get("pad_token", fallback)
        eos_token = special.named.get("eos_token", fallback)

        if not has_file(config_path):
            logger.warning(
                "there is no tokenizer_config.json in %s: eos is %s and pad is %s",
                folder,
                eos_token,
                pad_token,
            )
        template = None
        found = find_chat_template(folder, config)
        if found is not None and not is_built_in_template(found[0]):
            template = ChatTemplate(*found, special.named)
            logger.warning(
                "prompts are rendered with the chat template in %s, "
                "which differs from the published one of Qwen2-VL",
                template.source,
            )
        return cls(backend, pad_token, eos_token, template, largest_id)

    def token_id(self, name: str) -> int:
        """Return the id of a token by its exact name. Raises ValueError when there is none."""
        id = self.backend.token_to_id(name)
        if id is None:
            raise ValueError(f"the tokenizer has no token {name}, which Qwen2-VL needs")
        return id

    def __len__(self) -> int:
        """Return how many rows of the embeddings the tokens need: the largest id plus one."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def add_tokens(self, tokens: list[str], special: bool = False) -> "Tokenizer":
        """Return a tokenizer with further tokens, whose ids follow the largest one in their order.

        Each is one id wherever its text occurs; one that the vocabulary holds keeps its id.
        special: `decode` leaves them out by default. Where `len` of the result exceeds the model's
        vocab_size, `load_weights.resize_token_embeddings` adds the rows.
        Raises ValueError for anything but non-empty strings.
        Source: transformers 5.23.0, `add_tokens`, which gives the same ids without gaps in them.
        """
        for token in tokens:
            if not isinstance(token, str) or not token:
                raise ValueError(f"tokens: expected non-empty strings, got {token!r:.80}")
        description = json.loads(self.backend.to_str())
        vocab = description["model"]["vocab"]
        known = {entry["content"]: entry["id"] for entry in description["added_tokens"]}
        vocab |= known  # fixes the ids, see `load_backend`
        next_id = len(self)
        for token in dict.fromkeys(tokens):
            if token in known:
                continue
            if token not in vocab:
                vocab[token] = next_id
                next_id += 1
            entry = AddedToken(vocab[token], token, normalized=not special, special=special)
            description["added_tokens"].append(entry._asdict())
        description["added_tokens"].sort(key=operator.itemgetter("id"))
        text = json.dumps(description, ensure_ascii=False)
        backend = tokenizers.Tokenizer.from_str(text)
        return Tokenizer(backend, self.pad_token, self.eos_token, self.chat_template)

    def save(self, folder: str | Path) -> None:
        """Write the tokens of a fine-tune into the tokenizer files of a checkpoint directory.

        tokenizer.json is written whole, and of tokenizer_config.json the added tokens and the names
        of eos and pad; its other fields, and a chat template, stay as the directory has them.
        Raises OSError naming a file that cannot be written, ValueError for a damaged one.
        """
        folder = Path(folder)
        description = json.loads(self.backend.to_str())
        entries = {}
        for entry in description["added_tokens"]:
            fields = dict(entry)
            entries[str(fields.pop("id"))] = fields
        config = read_optional_json(folder / "tokenizer_config.json")
        config.setdefault("tokenizer_class", "Qwen2Tokenizer")
        config["added_tokens_decoder"] = entries
        config["eos_token"] = self.eos_token
        config["pad_token"] = self.pad_token
        write_json(folder / "tokenizer_config.json", config, ensure_ascii=False)
        write_json(folder / "tokenizer.json", description, ensure_ascii=False)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens in it, such as `<|im_end|>`, become their ids.

        Raises ValueError for a string that UTF-8 cannot express (a lone surrogate, from a badly
        decoded source).
        """
        return self._encode_with(self.backend, text)

    @staticmethod
    def _encode_with(backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise ValueError(f"this is not a valid Unicode string: {text!r:.80}") from error
        encode = partial(backend.encode, add_special_tokens=False)
        return call_tokenizers(encode, "the tokenizer", text).ids

    def decode(
        self,
        ids: int | Iterable[int],
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
    ) -> str:
        """Return the text of token ids: one id, or a sequence, array or tensor [S] of integers.

        stop_strings: cut the text before the first of these, as `StreamDecoder` does.

        Bytes that are not UTF-8 become U+FFFD, and ids without a token are left out. Spaces are
        never cleaned up, whatever `clean_up_tokenization_spaces` is in the checkpoint, as in
        transformers 5.23.0 for BPE. Raises ValueError for negative ids and anything not an integer.
        """
        ids = [_check_id(id) for id in _id_list(ids)]
        if not stop_strings:
            decode = partial(self.backend.decode, skip_special_tokens=skip_special_tokens)
            return call_tokenizers(decode, "the tokenizer", ids)
        decoder = StreamDecoder(self, skip_special_tokens, stop_strings)
        return "".join([*map(decoder.push, ids), decoder.finish()])

    def batch_decode(
        self,
        sequences: Iterable,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
    ) -> list[str]:
        """Return the text of each sequence of ids in a list, array or tensor [B, S].

        stop_strings: cut each text before the first of these.
        One flat sequence of ids is a batch of one, as in transformers 5.23.0.
        """
        sequences = [
            entry.tolist() if hasattr(entry, "tolist") else entry for entry in _id_list(sequences)
        ]
        if sequences and all(hasattr(entry, "__index__") for entry in sequences):
            sequences = [sequences]
        return [self.decode(ids, skip_special_tokens, stop_strings) for ids in sequences]

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = True, add_vision_id: bool = False
    ) -> str:
        """Return the prompt: the messages in the chat format of the checkpoint.

        messages: `[{"role": ..., "content": text or list of items}, ...]`, the items as in
            `content_kind`.
        add_generation_prompt: end with the opening of the assistant's turn.
        add_vision_id: number images and videos over the whole conversation ("Picture 1: ").

        In the published format the default system message is put first unless the first message is
        a system message. Text is left untrimmed. Each image or video is one placeholder token;
        `preprocess.Processor` expands it.

        Raises ValueError for a malformed message (the published template ignores what it does not
        know, so a misspelled key would silently lose an image) and for an error in the template.
        """
        return self._render(messages, add_generation_prompt, add_vision_id, datetime.now())

    def _render(
        self, messages: list[dict], add_generation_prompt: bool, add_vision_id: bool, now: datetime
    ) -> str:
        for number, message in enumerate(messages):
            for item in content_items(message, number):
                content_kind(item)
        if self.chat_template is None:
            return render_published_template(messages, add_generation_prompt, add_vision_id)
        return self.chat_template.render(messages, add_generation_prompt, add_vision_id, now)

    def encode_chat(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        guard_special_tokens: bool = True,
    ) -> list[int]:
        """Return the ids of the prompt, with the special tokens of the chat format guarded.

        In `encode` a user who types `<|im_end|>` ends the turn and can put words into anyone's
        mouth. Here GUARDED_TOKENS in user and tool text (every role but system and assistant) are
        ordinary text. All else is `encode(apply_chat_template(...))`: boxes and other special
        tokens keep their ids, and so does everything in system and assistant messages.

        guard_special_tokens: False for `encode(apply_chat_template(...))`, as in the reference.

        Raises ValueError as `apply_chat_template` and `encode` do, and where a checkpoint's own
        template rewrites a text so that the guarded tokens in it cannot be told apart.
        """
        # Every guarded token contains a `|`. Rendered once more with all of them in guarded text
        # replaced by a number that nobody can guess, the prompt holds the template's tokens alone.
        now = datetime.now()
        prompt = self._render(messages, add_generation_prompt, add_vision_id, now)
        if not guard_special_tokens:
            return self.encode(prompt)
        bar = str(10**38 + secrets.randbelow(9 * 10**38))
        shielded = [
            _replace_bars(message, bar) if is_guarded_role(message["role"]) else message
            for message in messages
        ]
        rendered = self._render(shielded, add_generation_prompt, add_vision_id, now)
        if _count_guarded(rendered) == _count_guarded(prompt):
            return self.encode(prompt)
        if rendered.replace(bar, "|") != prompt:
            source = self.chat_template.source if self.chat_template else "tokenizer.py"
            raise ValueError(
                f"the chat template in {source} rewrites text that contains special tokens of the "
                "chat format; remove them, or pass guard_special_tokens=False"
            )
        guard = self._guard_backend()
        for token, secret_name in guard.secret_names.items():
            rendered = rendered.replace(token, secret_name)
        return self._encode_with(guard.backend, rendered.replace(bar, "|"))

    def _guard_backend(self) -> _GuardBackend:
        """Return the backend with renamed special tokens, made when first needed (a second)."""
        with _GUARD_LOCK:
            if self._guard is None:
                self._guard = _make_guard_backend(self.backend)
            return self._guard

    def check_placeholders(self, ids: list[int], image_count: int, video_count: int) -> None:
        """Raise ValueError unless the prompt has one placeholder token per image and per video."""
        self._check_placeholder(ids, "image", IMAGE_PAD, image_count)
        self._check_placeholder(ids, "video", VIDEO_PAD, video_count)

    def _check_placeholder(self, ids: list[int], kind: str, pad: str, expected: int) -> None:
        count = ids.count(self.token_id(pad))
        if count == expected:
            return
        cause = "a message spells that token"
        if self.chat_template is not None:
            source = self.chat_template.source
            cause += f", or the chat template in {source} does"
            if count < expected:
                cause = f"the chat template in {source} ignores {kind}s"
        raise ValueError(
            f"expected {expected} tokens {pad} in the prompt, one for each {kind} of the "
            f"conversation, got {count}: {cause}"
        )


def _id_list(ids: object) -> list:
    """Return ids, or sequences of ids, as a list; an array or tensor of any shape, or one id."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if hasattr(ids, "__index__"):
        return [ids]
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Iterable):
        raise ValueError(f"expected token ids, got {type(ids).__name__}: {ids!r:.80}")
    return list(ids)


def _check_id(id: Any) -> int:
    """Return an id as an int. Raises ValueError unless it is an integer that fits 32 bits."""
    try:
        number = operator.index(id)
    except TypeError as error:
        raise ValueError(
            f"expected a token id, got {type(id).__name__}: {id!r:.80} "
            "(several sequences are for batch_decode)"
        ) from error
    if not 0 <= number < 2**32:
        raise ValueError(f"expected a token id from 0 to 2**32 - 1, got {number}")
    return number


# --- decoding token by token ---


def _byte_alphabet() -> dict[str, int]:
    """Return character → byte: how a byte-level vocabulary spells bytes.

    Bytes that print as a Latin-1 character are spelled as themselves; the other 68, the space among
    them, as the characters from U+0100 on, in order. Hence the `Ġ` in `Ġword`.
    Source: GPT-2, `bytes_to_unicode`.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    byte_of = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for n, byte in enumerate(others):
        byte_of[chr(256 + n)] = byte
    return byte_of


BYTE_OF = _byte_alphabet()


class _StopBuffer:
    """Pass text on up to the first stop string, and hold back what may be the start of one."""

    def __init__(self, stop_strings: Sequence[str]):
        if isinstance(stop_strings, str):
            stop_strings = [stop_strings]
        if not all(isinstance(text, str) and text for text in stop_strings):
            raise ValueError(f"stop_strings is {stop_strings!r}, expected non-empty strings")
        self.stop_strings = tuple(stop_strings)
        self.stopped = False
        self._held = ""
        self._is_visible: list[bool] = []  # of each held character

    def push(self, text: str, is_visible: bool = True) -> str:
        """Return the visible characters that no stop string can contain any more."""
        if self.stopped:
            return ""
        self._held += text
        self._is_visible += [is_visible] * len(text)
        starts = [self._held.find(stop) for stop in self.stop_strings if stop in self._held]
        if starts:
            self.stopped = True
            return self._release(min(starts))
        return self._release(len(self._held) - self._undecided())

    def finish(self) -> str:
        """Return the visible characters that are held back, unless a stop string came."""
        return "" if self.stopped else self._release(len(self._held))

    def _undecided(self) -> int:
        """Return the length of the longest end of the held text that begins a stop string."""
        longest = max(map(len, self.stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self.stop_strings):
                return length
        return 0

    def _release(self, count: int) -> str:
        """Remove the first `count` held characters and return those that are visible."""
        released = itertools.compress(self._held[:count], self._is_visible[:count])
        self._held = self._held[count:]
        self._is_visible = self._is_visible[count:]
        return "".join(released)


class StreamDecoder:
    """Decode ids one at a time, never emitting half a UTF-8 character or any of a stop string.

    `push` returns the characters that have become certain, `finish` the rest. Joined they equal
    `tokenizer.decode(all_ids, skip_special_tokens)`; the cost per token is constant.

    stop_strings: the text ends before the first occurrence of any of these, whichever tokens it
    spans or begins and ends in, and `stopped` is then True. They are compared with the text in
    which special tokens are spelled out, also where these are skipped, so that "<|box_end|>" can
    be one. Source: transformers 5.23.0, `StopStringCriteria`, which ends at the same token, but
    keeps the stop string, and whose match may begin in the prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop_strings: Sequence[str] = (),
    ):
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._buffer = _StopBuffer(stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred. No text follows."""
        return self._buffer.stopped

    def push(self, id: int) -> str:
        """Take one id; return the text that is now certain: often a word, sometimes nothing."""
        number = _check_id(id)
        token = self._backend.id_to_token(number)
        if token is None:
            return ""
        if number in self._skipped:
            return self._buffer.push(token, is_visible=False)
        data = token.encode()  # of an added token outside the byte alphabet
        if all(character in BYTE_OF for character in token):
            data = bytes(BYTE_OF[character] for character in token)
        return self._buffer.push(self._utf8.decode(data))

    def finish(self) -> str:
        """Return what was held back, and U+FFFD where the ids ended within a character."""
        text = self._buffer.push(self._utf8.decode(b"", final=True))
        return text + self._buffer.finish()
