"""Conversation → prompt text → token ids, and ids → text again.

Qwen2-VL uses the byte-level BPE of Qwen2: text is brought to Unicode form NFC, cut into words by a regular
expression, and the UTF-8 bytes of each word are merged into tokens. All of that is described by `tokenizer.json`
and done by the `tokenizers` library. This file adds the chat format around the text, and decoding token by token.

    messages ── apply_chat_template ──> prompt ── encode ──> ids ── the model ──> ids ── decode ──> text
"""

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

# The chat format is written with these control tokens. Their ids differ between vocabularies and are looked up.
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"

DEFAULT_SYSTEM = "You are a helpful assistant."


def read_json(folder: str | Path, name: str) -> dict:
    """Read one JSON file of a checkpoint folder. Raises FileNotFoundError or ValueError naming folder and file."""
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name} in {folder}; is that a checkpoint folder?")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON, UTF-8 and nesting: none names the file
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(found).__name__}")
    return found


def content_kind(item: dict) -> str:
    """Return what one item of a message's content list is: "image", "video" or "text".

    The rule is that of the published template: the type `image` or a key `image` or `image_url` makes an image, else
    the type `video` or a key `video` makes a video, else it must carry `text`. A key whose value is None is absent,
    as data sets fill their rows with null. Raises ValueError for anything else.
    """
    if not isinstance(item, dict):
        raise ValueError(f"a content item must be a dict, not {type(item).__name__}: {item!r:.80}")
    if item.get("type") == "image" or has_value(item, "image") or has_value(item, "image_url"):
        return "image"
    if item.get("type") == "video" or has_value(item, "video"):
        return "video"
    if isinstance(item.get("text"), str):
        return "text"
    raise ValueError(f"a content item is neither image, video nor text: {item!r:.80}")


def has_value(item: dict, key: str) -> bool:
    """Return whether an item has a key with a value other than None."""
    return item.get(key) is not None


def content_items(message: dict, number: int) -> list[dict]:
    """Return the content of the message at index `number` as a list of items; text becomes one text item.

    Raises ValueError for a message without role or content.
    """
    if not isinstance(message, dict):
        raise ValueError(
            f"message {number} must be a dict with role and content, not {type(message).__name__}"
        )
    if not isinstance(message.get("role"), str):
        raise ValueError(f"message {number} needs a role, but has only {list(message)}")
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"the content of message {number} must be text or a list, not {type(content).__name__}"
        )
    return list(content)


class Tokenizer:
    """The Qwen2 tokenizer with the chat format of Qwen2-VL. `backend` is the `tokenizers.Tokenizer` underneath."""

    def __init__(self, backend: tokenizers.Tokenizer, pad_token: str, eos_token: str):
        self.backend = backend
        for name in (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD):
            self.token_id(
                name
            )  # a vocabulary that lacks one fails here, not in the middle of a conversation
        self.pad_token_id = self.token_id(pad_token)
        self.eos_token_id = self.token_id(eos_token)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Tokenizer":
        """Read `tokenizer.json` and `tokenizer_config.json` of a checkpoint folder.

        Raises FileNotFoundError when one of them is missing, ValueError when one of them cannot be used.
        """
        try:
            backend = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        except Exception as error:  # the library raises nothing narrower, and says little
            read_json(
                folder, "tokenizer.json"
            )  # says what is wrong, if no file or no JSON is there
            raise ValueError(f"the tokenizer.json in {folder} cannot be used: {error}") from error
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise ValueError(
                f"the tokenizer.json in {folder} is not byte-level, as that of Qwen2-VL is"
            )
        # A file saved by a training script may carry these two; they would cut or pad prompts silently.
        backend.no_truncation()
        backend.no_padding()

        config = read_json(folder, "tokenizer_config.json")
        found = [config.get(field) for field in ("pad_token", "eos_token")]
        names = [
            token.get("content") if isinstance(token, dict) else token for token in found
        ]  # some store it whole
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"the tokenizer_config.json in {folder} names {names}, not a pad_token and an eos_token"
            )
        return cls(backend, *names)

    def token_id(self, name: str) -> int:
        """The id of one token by its exact name, e.g. `<|image_pad|>`. Raises ValueError when there is none."""
        id = self.backend.token_to_id(name)
        if id is None:
            raise ValueError(f"the tokenizer has no token {name}, which Qwen2-VL needs")
        return id

    def encode(self, text: str) -> list[int]:
        """Text → ids. Control tokens written in the text, such as `<|im_end|>`, become their own id.

        Raises ValueError for a string that UTF-8 cannot express (a lone surrogate, from a badly decoded source).
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"this is not a valid Unicode string: {text!r:.80}") from error

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Ids → text. Bytes that are not UTF-8 become U+FFFD; ids that stand for no token are left out."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: list[dict], add_generation_prompt: bool = True, add_vision_id: bool = False
    ) -> str:
        """Messages → the prompt, character for character what the published `chat_template.json` renders.

        messages: `[{"role": ..., "content": text or list of items}, ...]`, the items as in `content_kind`.
        add_generation_prompt: end with the opening of the assistant's turn.
        add_vision_id: number pictures and videos over the whole conversation ("Picture 1: ").

        Unless the first message is a system message, the default one goes in front. Text is taken over untrimmed.
        Each picture or video is one placeholder token here; `preprocess.Processor` repeats it as often as needed.

        Raises ValueError for a malformed message. (The template itself passes over what it does not know, so that
        a mistyped key would lose a picture without a word.)
        """
        pieces = self._chat_pieces(messages, add_generation_prompt, add_vision_id)
        return "".join(text for _, text in pieces)

    def encode_chat(
        self, messages: list[dict], add_generation_prompt: bool = True, add_vision_id: bool = False
    ) -> list[int]:
        """Messages → ids, the same as those of the prompt text, but only the template writes control tokens.

        In `encode` a user who types `<|im_end|>` ends the turn and can put words into anyone's mouth. Here what a
        message contains is text and stays text.
        """
        pieces, ids = self._chat_pieces(messages, add_generation_prompt, add_vision_id), []
        # Neighbouring texts are encoded as one: a token may span the border, as in "user\n" + "\nHello".
        for is_control, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
            if is_control:
                ids += [self.token_id(name) for _, name in run]
                continue
            self.backend.encode_special_tokens = True  # their names are cut into ordinary tokens
            try:
                ids += self.encode("".join(text for _, text in run))
            finally:
                self.backend.encode_special_tokens = False
        return ids

    def _chat_pieces(
        self, messages: list[dict], add_generation_prompt: bool, add_vision_id: bool
    ) -> Iterator[tuple[bool, str]]:
        """The prompt in pieces, each with whether it is a control token of the template's."""
        seen = {"image": 0, "video": 0}
        for number, message in enumerate(messages):
            items = content_items(message, number)
            if number == 0 and message["role"] != "system":
                yield from (
                    (True, IM_START),
                    (False, f"system\n{DEFAULT_SYSTEM}"),
                    (True, IM_END),
                    (False, "\n"),
                )
            yield from ((True, IM_START), (False, f"{message['role']}\n"))
            for item in items:
                kind = content_kind(item)
                if kind == "text":
                    yield False, item["text"]
                    continue
                seen[kind] += 1
                label, pad = ("Picture", IMAGE_PAD) if kind == "image" else ("Video", VIDEO_PAD)
                if add_vision_id:
                    yield False, f"{label} {seen[kind]}: "
                yield from ((True, VISION_START), (True, pad), (True, VISION_END))
            yield from ((True, IM_END), (False, "\n"))
        if add_generation_prompt:
            yield from ((True, IM_START), (False, "assistant\n"))


def _byte_alphabet() -> dict[str, int]:
    """Character → byte: how a byte-level vocabulary spells bytes (GPT-2, `bytes_to_unicode`).

    Bytes that print as a Latin-1 character stand for themselves; the other 68, the space among them, are written
    as the characters from U+0100 on, in order. That is where the `Ġ` in `Ġword` comes from.
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


BYTE_OF = _byte_alphabet()


class StreamDecoder:
    """Decode ids one at a time, never emitting half a UTF-8 character.

    `push` returns the characters that have become certain, `finish` what is left. Joined they equal
    `tokenizer.decode(all_ids, skip_special_tokens)`, at a cost per token that does not grow with the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Take one id; return the text that is now complete: often a word, sometimes nothing."""
        token = None if int(id) in self._skipped else self._backend.id_to_token(int(id))
        if token is None:
            return ""
        if all(character in BYTE_OF for character in token):
            return self._utf8.decode(bytes(BYTE_OF[character] for character in token))
        return self._utf8.decode(
            token.encode()
        )  # an added token may hold other characters and is plain text

    def finish(self) -> str:
        """Return U+FFFD when the ids ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)
