"""The tokenizer files of a checkpoint, in every published layout → one `tokenizers.Tokenizer`.

The vocabulary comes from tokenizer.json, or from vocab.json and merges.txt; added tokens also from
tokenizer_config.json, added_tokens.json and special_tokens_map.json, with the ids and flags given
there. Source: transformers 5.23.0, and the layouts that 4.45 to 5.23 write.
"""

import json
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from errors import first_line
from json_files import check_size, has_file, parse_json, read_optional_json, read_text

END_OF_TEXT = "<|endoftext|>"

# How Qwen2 splits text into words before BPE. `tokenizer.json` holds it; a checkpoint that has
# only vocab.json and merges.txt does not.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# The order in which the reference appends special tokens that the vocabulary lacks; others follow.
NAMED_TOKENS: tuple[str, ...] = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
NAMED_TOKENS += ("cls_token", "mask_token")


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


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a directory holds a vocabulary; that of an adapter may."""
    return has_file(folder / "tokenizer.json") or has_file(folder / "vocab.json")


def call_tokenizers(function: Callable, source: Path | str, *args: object) -> Any:
    """Call into the `tokenizers` library; turn whatever it raises into a ValueError with `source`.

    A Rust panic arrives as `pyo3_runtime.PanicException`, which derives from BaseException.
    """
    try:
        return function(*args)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = first_line(error)
        raise ValueError(f"{source} cannot be used: {reason:.200}") from error


def _read_tokenizer_json(folder: Path) -> tuple[dict, str | None]:
    """Return the content of `tokenizer.json` parsed and as text.

    An older upload holds `vocab.json` and `merges.txt` instead: then the content is built from
    them, as in transformers 5.23.0, `Qwen2Tokenizer`, and the text is None.
    """
    path = folder / "tokenizer.json"
    if has_file(path):
        text = read_text(path)
        description = parse_json(text, path)
        _check_model(description, path)
        return description, text
    vocab_path = folder / "vocab.json"
    merges_path = folder / "merges.txt"
    if not (has_file(vocab_path) and has_file(merges_path)):
        raise FileNotFoundError(
            f"there is no tokenizer.json in {folder}, and not both vocab.json and merges.txt; "
            "is that a checkpoint folder?"
        )
    check_size(vocab_path)
    check_size(merges_path)
    read_bpe_files = tokenizers.models.BPE.read_file
    files = (str(vocab_path), str(merges_path))
    vocab, merges = call_tokenizers(read_bpe_files, vocab_path, *files)
    # The library skips entries that are not ids.
    _check_vocab(read_optional_json(vocab_path), vocab_path)
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


def _parse_id(id: Any, source: str) -> int:
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


def read_special_tokens(folder: Path, config: dict) -> SpecialTokens:
    """Return the special tokens that `tokenizer_config.json` and `special_tokens_map.json` name.

    Like the reference, read the second file only where the first has no `added_tokens_decoder`,
    and take `<|endoftext|>` for eos, pad and unk where no file mentions the field.
    """
    named: dict[str, str | None] = dict.fromkeys(NAMED_TOKENS)
    named |= {"eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    extra: list[str] = []
    sources = {folder / "tokenizer_config.json": config}
    if config.get("added_tokens_decoder") is None:
        path = folder / "special_tokens_map.json"
        sources[path] = read_optional_json(path)
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
    declared = {field: name for field, name in named.items() if name is not None}
    return SpecialTokens(declared, extra)


def _declared_tokens(folder: Path, description: dict, config: dict, special: set[str]) -> list:
    """Return (where, AddedToken) for every added token that a file of the checkpoint declares.

    Later entries override the flags of earlier ones, as in transformers 5.23.0, `_from_pretrained`.
    """
    declared = []
    decoder = config.get("added_tokens_decoder")
    if config.get("added_tokens_decoder") is None:
        source = str(folder / "added_tokens.json")
        for content, id in read_optional_json(folder / "added_tokens.json").items():
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


def load_backend(
    folder: Path, config: dict, special: SpecialTokens
) -> tuple[tokenizers.Tokenizer, int]:
    """Return the `tokenizers.Tokenizer` of a checkpoint with all added tokens, and its largest id.

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
    backend = call_tokenizers(tokenizers.Tokenizer.from_str, path, text)
    for token in added:
        if backend.token_to_id(token.content) != token.id:
            raise ValueError(
                f"{path} cannot be used: expected the id {token.id} for the token "
                f"{token.content}, got {backend.token_to_id(token.content)}"
            )
    # A file saved by a training script may carry these; they would cut or pad prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend, max([*vocab.values(), *(token.id for token in added)])
