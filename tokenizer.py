"""Messages → prompt → token ids, and token ids → text.

Qwen2-VL uses the byte-level BPE of Qwen2: text is brought to Unicode form NFC, split into words by
a regular expression, and the UTF-8 bytes of each word are merged into tokens. `tokenizer.json`
describes all of that and the `tokenizers` library computes it. This file adds what surrounds it:
reading the tokenizer files of a checkpoint, the chat format, and decoding token by token.

    messages ── apply_chat_template ──> prompt ── encode ──> ids ── the model ──> ids ── decode ──> text
"""

import codecs
import hashlib
import json
import logging
import operator
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import tokenizers

logger = logging.getLogger(__name__)

# The chat format is written with these special tokens. Their ids differ between vocabularies and
# are looked up by name.
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VISION_PAD = "<|vision_pad|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
END_OF_TEXT = "<|endoftext|>"

# Every vocabulary must hold these. `encode_chat` accepts them, and VISION_PAD, from the chat
# template alone; all other special tokens (boxes, object references) are legitimate in any text.
REQUIRED_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
GUARDED_TOKENS = (*REQUIRED_TOKENS, VISION_PAD)

DEFAULT_SYSTEM = "You are a helpful assistant."


def read_json(folder: str | Path, name: str) -> dict:
    """Return the JSON object in one file of a checkpoint directory.

    Raises FileNotFoundError or ValueError, naming directory and file.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no {name} in {folder}; is that a checkpoint folder?")
    return _parse_json(_read_text(path), path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a JSON file or text in UTF-8: {error}") from error


def _parse_json(text: str, path: Path) -> dict:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a usable JSON file: it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, but holds a {type(content).__name__}")
    return content


def _read_optional_json(path: Path) -> dict:
    """Return the JSON object in `path`, or an empty one if there is no such file."""
    return _parse_json(_read_text(path), path) if path.is_file() else {}


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


# --- the tokenizer files of a checkpoint ---

# How Qwen2 splits text into words before BPE. `tokenizer.json` holds it; a checkpoint that has
# only vocab.json and merges.txt does not.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# The order in which the reference appends special tokens that the vocabulary lacks; others follow.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
NAMED_TOKENS += ("mask_token",)


class AddedToken(NamedTuple):
    """A token that is matched in the text before BPE; the fields are those of `tokenizer.json`."""

    id: int
    content: str
    single_word: bool = False  # match only where no letter or digit is adjacent
    lstrip: bool = False  # the match includes whitespace on its left
    rstrip: bool = False  # the match includes whitespace on its right
    normalized: bool = False  # match in the text after NFC instead of before
    special: bool = True  # left out by decode(skip_special_tokens=True)


class SpecialTokens(NamedTuple):
    """What a checkpoint declares to be special, by name (`eos_token`) or in a mere list."""

    named: dict[str, str]  # field → token
    extra: list[str]


def _foreign_call(function: Callable, source: Path, *args: object) -> object:
    """Call into the `tokenizers` library; turn whatever it raises into a ValueError with `source`.

    A Rust panic arrives as `pyo3_runtime.PanicException`, which derives from BaseException.
    """
    try:
        return function(*args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = f"{error}".partition("\n")[0]
        raise ValueError(f"{source} cannot be used: {reason:.200}") from error


def _read_tokenizer_json(folder: Path) -> tuple[dict, str | None]:
    """Return the content of `tokenizer.json` parsed and as text.

    An older upload holds `vocab.json` and `merges.txt` instead: then the content is built from
    them, as in transformers 5.23.0, `Qwen2Tokenizer`, and the text is None.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        text = _read_text(path)
        description = _parse_json(text, path)
        _check_model(description, path)
        return description, text
    vocab_path = folder / "vocab.json"
    merges_path = folder / "merges.txt"
    if not (vocab_path.is_file() and merges_path.is_file()):
        raise FileNotFoundError(
            f"there is no tokenizer.json in {folder}, and not both vocab.json and merges.txt; "
            "is that a checkpoint folder?"
        )
    read_bpe_files = tokenizers.models.BPE.read_file
    files = (str(vocab_path), str(merges_path))
    vocab, merges = _foreign_call(read_bpe_files, vocab_path, *files)
    # The library skips entries that are not ids.
    _check_vocab(_read_optional_json(vocab_path), vocab_path)
    return _qwen2_description(vocab, merges), None


def _qwen2_description(vocab: dict[str, int], merges: list[tuple[str, str]]) -> dict:
    """Return the content of a Qwen2 `tokenizer.json` without added tokens."""
    split = {
        "type": "Split",
        "pattern": {"Regex": WORD_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _check_model(description: dict, path: Path) -> None:
    """Raise ValueError unless the `tokenizer.json` describes a byte-level BPE."""
    model = description.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"{path} cannot be used: Model missing, expected a JSON object `model`")
    decoder = description.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != "ByteLevel":
        raise ValueError(f"{path} is not byte-level, as that of Qwen2-VL is")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{path} holds a model of type {model['type']!r}, expected 'BPE'")
    if not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path} cannot be used: expected a JSON object `vocab` in its model")
    _check_vocab(model["vocab"], path)
    if not isinstance(description.get("added_tokens") or [], list):
        raise ValueError(f"{path} cannot be used: expected a list in the field added_tokens")


def _check_vocab(vocab: dict, source: Path) -> None:
    for content, id in vocab.items():
        if type(id) is not int:
            raise ValueError(f"{source} cannot be used: expected an id for {content!r}, got {id!r}")


def _parse_id(id: object, source: str) -> int:
    try:
        number = int(id) if isinstance(id, str) else operator.index(id)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: expected a token id, got {id!r:.80}") from error
    if not 0 <= number < 2**32:
        raise ValueError(f"{source}: expected a token id, got {number}")
    return number


def _parse_added_token(id: object, entry: object, source: str) -> AddedToken:
    """Return one entry of `added_tokens` or `added_tokens_decoder`. Raises ValueError."""
    number = _parse_id(id, source)
    if not isinstance(entry, dict):
        raise ValueError(
            f"{source}: expected a JSON object for token {number}, got {type(entry).__name__}"
        )
    content = entry.get("content")
    if not isinstance(content, str) or not content:
        raise ValueError(f"{source}: expected the text of token {number}, got {content!r:.80}")
    special = entry.get("special", False)
    flags = {
        "single_word": entry.get("single_word", False),
        "lstrip": entry.get("lstrip", False),
        "rstrip": entry.get("rstrip", False),
        "normalized": entry.get("normalized", not special),
        "special": special,
    }
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{source}: expected true or false in {flag} of token {content}")
    return AddedToken(number, content, **flags)


def _token_name(value: object, source: str) -> str:
    """Return the text of a special token given as a string or, as some files do, as an object."""
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str) or not name:
        raise ValueError(f"{source}: expected the text of a token, got {value!r:.80}")
    return name


def _read_special_tokens(folder: Path, config: dict) -> SpecialTokens:
    """Return the special tokens that `tokenizer_config.json` and `special_tokens_map.json` name.

    Like the reference, read the second file only where the first has no `added_tokens_decoder`,
    and take `<|endoftext|>` for eos, pad and unk where no file mentions the field.
    """
    named = dict.fromkeys(NAMED_TOKENS)
    named |= {"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    extra: list[str] = []
    sources = {folder / "tokenizer_config.json": config}
    if config.get("added_tokens_decoder") is None:
        path = folder / "special_tokens_map.json"
        sources[path] = _read_optional_json(path)
    for path, fields in sources.items():
        for field, value in fields.items():
            if field.endswith("_token") and value is None:
                named[field] = None
            elif field.endswith("_token") and not isinstance(value, bool):
                named[field] = _token_name(value, f"{path}, field {field}")
        field = "extra_special_tokens"
        if not fields.get(field):
            field = "additional_special_tokens"
        tokens = fields.get(field) or []
        if isinstance(tokens, dict):
            for name, value in tokens.items():
                named[name] = _token_name(value, f"{path}, field {field}")
        elif isinstance(tokens, list):
            extra += [_token_name(value, f"{path}, field {field}") for value in tokens]
        else:
            raise ValueError(f"{path}: expected a list of tokens in the field {field}")
    named = {field: name for field, name in named.items() if name is not None}
    return SpecialTokens(named, extra)


def _declared_tokens(folder: Path, description: dict, config: dict, special: set[str]) -> list:
    """Return (where, AddedToken) for every added token that a file of the checkpoint declares.

    Later entries override the flags of earlier ones, as in transformers 5.23.0, `_from_pretrained`.
    """
    declared = []
    decoder = config.get("added_tokens_decoder")
    if config.get("added_tokens_decoder") is None:
        source = str(folder / "added_tokens.json")
        for content, id in _read_optional_json(folder / "added_tokens.json").items():
            is_special = content in special
            entry = {"content": content, "special": is_special}
            declared.append((source, _parse_added_token(id, entry, source)))
    source = str(folder / "tokenizer.json")
    for entry in description.get("added_tokens") or []:
        id = entry.get("id") if isinstance(entry, dict) else None
        declared.append((source, _parse_added_token(id, entry, source)))
    if decoder is not None:
        source = f"{folder / 'tokenizer_config.json'}, field added_tokens_decoder"
        if not isinstance(decoder, dict):
            raise ValueError(f"{source}: expected a JSON object, got {type(decoder).__name__}")
        for id, entry in decoder.items():
            declared.append((source, _parse_added_token(id, entry, source)))
    return declared


def _merge_added_tokens(
    declared: list[tuple[str, AddedToken]], vocab: dict[str, int], special: SpecialTokens
) -> list[AddedToken]:
    """Return all added tokens in the order of their ids.

    Tokens that the checkpoint names as special match exactly (no flags), as in transformers
    5.23.0, `Qwen2Tokenizer`; those without an id are appended to the vocabulary.
    Raises ValueError where two sources contradict each other.
    """
    by_content: dict[str, AddedToken] = {}
    content_of = {id: content for content, id in vocab.items()}
    for source, token in declared:
        known = by_content.get(token.content)
        known_id = known.id if known else vocab.get(token.content, token.id)
        if known_id != token.id:
            raise ValueError(
                f"{source} gives the token {token.content} the id {token.id}, "
                f"but its id in the vocabulary is {known_id}"
            )
        holder = content_of.setdefault(token.id, token.content)
        if holder != token.content:
            raise ValueError(
                f"{source} gives the id {token.id} to the token {token.content}, "
                f"but in the vocabulary it is the id of {holder}"
            )
        by_content[token.content] = token
    next_id = max(content_of, default=-1) + 1
    for name in dict.fromkeys([*special.named.values(), *special.extra]):
        id = by_content[name].id if name in by_content else vocab.get(name)
        if id is None:
            id = next_id
            next_id += 1
        by_content[name] = AddedToken(id, name)
    return sorted(by_content.values())


def _load_backend(folder: Path, config: dict, special: SpecialTokens) -> tokenizers.Tokenizer:
    """Return the `tokenizers.Tokenizer` of a checkpoint with all of its added tokens.

    The `tokenizer.json` alone may lack tokens that are declared in `tokenizer_config.json`, and
    the library numbers added tokens consecutively, whatever ids the file gives them: a gap in the
    ids would silently renumber the tokens after it. An entry in the model's vocabulary fixes an id.
    """
    description, text = _read_tokenizer_json(folder)
    path = folder / ("vocab.json" if text is None else "tokenizer.json")
    vocab = description["model"]["vocab"]
    special_names = {*special.named.values(), *special.extra}
    declared = _declared_tokens(folder, description, config, special_names)
    added = _merge_added_tokens(declared, vocab, special)

    in_file = [token for source, token in declared if source == str(path)]
    new_ids = [token.id for token in added if token.content not in vocab]
    is_consecutive = new_ids == list(range(len(vocab), len(vocab) + len(new_ids)))
    if text is None or added != in_file or not is_consecutive:
        description["added_tokens"] = [token._asdict() for token in added]
        vocab |= {token.content: token.id for token in added}
        text = json.dumps(description, ensure_ascii=False)
    backend = _foreign_call(tokenizers.Tokenizer.from_str, path, text)
    for token in added:
        if backend.token_to_id(token.content) != token.id:
            raise ValueError(
                f"{path} cannot be used: expected the id {token.id} for the token "
                f"{token.content}, got {backend.token_to_id(token.content)}"
            )
    # A file saved by a training script may carry these; they would cut or pad prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


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


# sha256 of the templates that `render_published_template` implements: the published one, and the
# one in the bundled model's directory, which renders the same without a literal line break.
BUILT_IN_TEMPLATES = (
    "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb",
    "d7fe15d51af6e26129a24b55cc8854b5808f9efe68d19961b6c47fc1c7e2b519",
)

# A template may repeat anything any number of times. The prompt that it renders is bounded, and so
# is the sum of the lengths of all `range(...)` that it loops over.
MAX_PROMPT_CHARACTERS = 2**26
MAX_RANGE_STEPS = 1_000_000


def is_built_in_template(text: str) -> bool:
    """Return whether `render_published_template` renders what the Jinja template `text` does.

    Jinja reads CR LF as a line feed and drops up to two line feeds after a final block.
    """
    text = text.replace("\r\n", "\n").removesuffix("\n").removesuffix("\n")
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() in BUILT_IN_TEMPLATES


def _template_data(value: object) -> object:
    """Return `value` as plain JSON types; an image or any other object becomes a mere name.

    So a template can neither call methods of foreign objects nor print an image into the prompt.
    Source: transformers 5.23.0, `_plain_template_data`.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        return {_template_data(key): _template_data(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_template_data(entry) for entry in value]
    return f"<{type(value).__name__}>"


def _template_message(message: dict) -> dict:
    """Return a message as the reference gives it to a template (`_normalize_conversations`).

    Keys without a value are left out, and an item {"type": "image_url", ...} becomes an image.
    """
    data = {key: _template_data(value) for key, value in message.items() if value is not None}
    if isinstance(data["content"], list):
        for number, item in enumerate(data["content"]):
            if item.get("type") == "image_url" and "image_url" in item:
                url = item["image_url"]
                url = url.get("url", "") if isinstance(url, dict) else url
                data["content"][number] = {"type": "image", "url": url}
    return data


class _BoundedRange:
    """`range` for templates; raises OverflowError once all ranges together exceed the bound."""

    def __init__(self):
        self._remaining = MAX_RANGE_STEPS

    def __call__(self, *arguments: int) -> range:
        steps = range(*arguments)
        self._remaining -= len(steps)
        if self._remaining < 0:
            raise OverflowError(f"its ranges exceed {MAX_RANGE_STEPS:,} steps in total")
        return steps


class ChatTemplate:
    """A checkpoint's own chat template in Jinja, rendered as in transformers 5.23.0.

    `source` names the file in error messages; `special_tokens` are variables of the template.
    """

    def __init__(self, text: str, source: str, special_tokens: dict[str, str] | None = None):
        self.text = text
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        try:
            self._compiled = _jinja_environment().from_string(text)
        except Exception as error:  # Jinja compiles to Python: more than TemplateError can arise
            raise self._error("cannot be used", error) from error

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool = True,
        add_vision_id: bool = False,
        now: datetime | None = None,
    ) -> str:
        """Return the prompt. Raises ValueError naming the file for whatever the template raises.

        now: what the template function `strftime_now` formats.
        """
        now = now or datetime.now()
        variables = self.special_tokens | {
            "messages": [_template_message(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "add_vision_id": add_vision_id,
            "strftime_now": now.strftime,
            "range": _BoundedRange(),
        }
        pieces = []
        length = 0
        try:
            for piece in self._compiled.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT_CHARACTERS:
                    raise OverflowError(f"the prompt exceeds {MAX_PROMPT_CHARACTERS:,} characters")
        except Exception as error:  # a template is foreign code
            raise self._error("cannot be rendered", error) from error
        return "".join(pieces)

    def __reduce__(self) -> tuple:
        # A compiled template cannot be pickled or copied.
        return ChatTemplate, (self.text, self.source, self.special_tokens)

    def _error(self, what: str, error: Exception) -> ValueError:
        reason = f"{error}".partition("\n")[0] or type(error).__name__
        return ValueError(f"the chat template in {self.source} {what}: {reason:.300}")


def _jinja_environment() -> object:
    """Return the sandbox that renders chat templates, with the reference's additions to Jinja.

    Source: transformers 5.23.0, `_cached_compile_jinja_template`.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class GenerationTag(jinja2.ext.Extension):
        """{% generation %}…{% endgeneration %} marks what a loss counts; the text is its body."""

        tags = {"generation"}  # noqa: RUF012 (the attribute that Jinja documents)

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes characters of HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _default_template(value: object, source: str) -> str | None:
    """Return the template text from a field `chat_template`: text, or several templates by name.

    Several are a list of {"name": ..., "template": ...} or an object; the one named default counts.
    """
    if value is None or isinstance(value, str):
        return value
    by_name = value
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        by_name = {entry.get("name"): entry.get("template") for entry in entries}
    text = by_name.get("default") if isinstance(by_name, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{source}: expected a chat template as text, or several with one named default, "
            f"got {type(value).__name__}"
        )
    return text


def find_chat_template(folder: Path, config: dict) -> tuple[str, str] | None:
    """Return (text, source) of the chat template in a checkpoint directory, None if it has none.

    Order of transformers 5.23.0, first the processor's (`get_processor_dict`), then the
    tokenizer's: processor_config.json, chat_template.json, chat_template.jinja,
    chat_templates/default.jinja, tokenizer_config.json (given as `config`).
    """
    for name in ("processor_config.json", "chat_template.json"):
        path = folder / name
        text = _default_template(_read_optional_json(path).get("chat_template"), str(path))
        if text is not None:
            return text, str(path)
    for path in (folder / "chat_template.jinja", folder / "chat_templates" / "default.jinja"):
        if path.is_file():
            return _read_text(path), str(path)
    source = str(folder / "tokenizer_config.json")
    text = _default_template(config.get("chat_template"), source)
    return None if text is None else (text, source)


def is_guarded_role(role: str) -> bool:
    """Return whether a message's text comes from outside: any role but system and assistant."""
    return role not in ("system", "assistant")


def _replace_bars(value: object, replacement: str) -> object:
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
        vocab[entry["content"]] = entry["id"]  # fixes the id, see `_load_backend`
    copy = tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
    return _GuardBackend(copy, secret_names)


# Held while a tokenizer makes its guard backend; of the module, so that tokenizers can be pickled.
_GUARD_LOCK = threading.Lock()


class Tokenizer:
    """The Qwen2 tokenizer with the chat format of Qwen2-VL. Threads may share one.

    backend: the `tokenizers.Tokenizer` underneath; no method changes it
    pad_token_id, eos_token_id: ids of the tokens given by name
    special_ids: ids of all tokens that `decode` skips
    chat_template: the checkpoint's own template, None for the published one
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pad_token: str,
        eos_token: str,
        chat_template: ChatTemplate | None = None,
    ):
        self.backend = backend
        self.chat_template = chat_template
        for name in REQUIRED_TOKENS:
            self.token_id(name)  # fail here rather than in the middle of a conversation
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
        config = _read_optional_json(config_path)
        special = _read_special_tokens(folder, config)
        backend = _load_backend(folder, config, special)
        fallback = END_OF_TEXT if backend.token_to_id(END_OF_TEXT) is not None else IM_END
        pad_token = special.named.get("pad_token", fallback)
        eos_token = special.named.get("eos_token", fallback)

        if not config_path.is_file():
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
        return cls(backend, pad_token, eos_token, template)

    def token_id(self, name: str) -> int:
        """Return the id of a token by its exact name. Raises ValueError when there is none."""
        id = self.backend.token_to_id(name)
        if id is None:
            raise ValueError(f"the tokenizer has no token {name}, which Qwen2-VL needs")
        return id

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens in it, such as `<|im_end|>`, become their ids.

        Raises ValueError for a string that UTF-8 cannot express (a lone surrogate, from a badly
        decoded source).
        """
        return self._encode_with(self.backend, text)

    @staticmethod
    def _encode_with(backend: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"this is not a valid Unicode string: {text!r:.80}") from error

    def decode(self, ids: int | Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids: one id, or a sequence, array or tensor [S] of integers.

        Bytes that are not UTF-8 become U+FFFD, and ids without a token are left out. Spaces are
        never cleaned up, whatever `clean_up_tokenization_spaces` is in the checkpoint, as in
        transformers 5.23.0 for BPE. Raises ValueError for negative ids and anything not an integer.
        """
        ids = [_check_id(id) for id in _id_list(ids)]
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable, skip_special_tokens: bool = True) -> list[str]:
        """Return the text of each sequence of ids in a list, array or tensor [B, S].

        One flat sequence of ids is a batch of one, as in transformers 5.23.0.
        """
        sequences = [
            entry.tolist() if hasattr(entry, "tolist") else entry for entry in _id_list(sequences)
        ]
        if sequences and all(hasattr(entry, "__index__") for entry in sequences):
            sequences = [sequences]
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

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
        if self.chat_template is not None and count < expected:
            cause = f"the chat template in {self.chat_template.source} ignores {kind}s"
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


def _check_id(id: object) -> int:
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


class StreamDecoder:
    """Decode ids one at a time, never emitting half a UTF-8 character.

    `push` returns the characters that have become certain, `finish` the rest. Joined they equal
    `tokenizer.decode(all_ids, skip_special_tokens)`; the cost per token is constant.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._backend = tokenizer.backend
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Take one id; return the text that is now complete: often a word, sometimes nothing."""
        number = _check_id(id)
        token = None if number in self._skipped else self._backend.id_to_token(number)
        if token is None:
            return ""
        if all(character in BYTE_OF for character in token):
            return self._utf8.decode(bytes(BYTE_OF[character] for character in token))
        return self._utf8.decode(token.encode())  # an added token outside the byte alphabet

    def finish(self) -> str:
        """Return U+FFFD when the ids ended within a character, else nothing."""
        return self._utf8.decode(b"", final=True)
