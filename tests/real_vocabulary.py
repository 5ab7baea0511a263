"""Build the published Qwen2 tokenizer from its ranks, without network, in each layout of its files.

    PYTHONPATH=. python tests/real_vocabulary.py DIRECTORY

The package `dashscope` (a test requirement) contains `qwen.tiktoken`: one line per token, its bytes
in base64 and its rank, which is its id. A rank vocabulary needs no list of merges: of all adjacent
pairs, tiktoken joins the one whose union has the lowest rank. The `tokenizers` library requires the
merges, and they follow from the ranks: split an entry with the entries below its own rank, and the
two remaining pieces are the pair that makes it.
"""

import base64
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from tokenizer import BYTE_OF

# In the order of their ids, which follow the 151,643 ranks.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def rank_file() -> Path:
    """Return the path of the ranks in `dashscope`, without importing it, which takes seconds."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the package dashscope, which contains the Qwen2 ranks, is not installed"
        )
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


def read_ranks() -> dict[bytes, int]:
    """Return the 151,643 tokens: bytes → rank."""
    lines = rank_file().read_bytes().split(b"\n")
    return {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in lines if line)
    }


def pieces(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the bytes of `token` merged by the entries below its own rank."""
    parts = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while True:
        pairs = [ranks.get(left + right, limit) for left, right in pairwise(parts)]
        best = min(pairs, default=limit)
        if best >= limit:
            return parts
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def build_tokenizer(folder: str | Path) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` as in the published checkpoints.

    This takes a few seconds.
    """
    ranks = read_ranks()
    letter = {byte: character for character, byte in BYTE_OF.items()}
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            left, right = pieces(token, ranks)
            merges.append([spelled[left], spelled[right]])
    return _write_tokenizer(folder, {spelled[token]: ranks[token] for token in ranks}, merges)


# The 256 bytes and one word: a vocabulary that loads at once.
SMALL_MERGES = [["h", "e"], ["l", "l"], ["he", "ll"], ["hell", "o"]]


def _small_vocabulary() -> dict[str, int]:
    vocab = {character: byte for character, byte in BYTE_OF.items()}
    for left, right in SMALL_MERGES:
        vocab[left + right] = len(vocab)
    return vocab


SMALL_VOCABULARY = _small_vocabulary()


def build_small_tokenizer(folder: str | Path) -> Path:
    """Write the two files of `build_tokenizer` with SMALL_VOCABULARY in place of the real one."""
    return _write_tokenizer(folder, SMALL_VOCABULARY, SMALL_MERGES)


def _write_tokenizer(folder: str | Path, vocab: dict[str, int], merges: list[list[str]]) -> Path:
    special_tokens = [
        {
            "id": len(vocab) + n,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for n, name in enumerate(SPECIAL_TOKENS)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": WORD_PATTERN},
        "behavior": "Isolated",
        "invert": False,
    }
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special_tokens,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"}
            for token in special_tokens
        },
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 32768,
        "padding_side": "left",
        "split_special_tokens": False,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(
        json.dumps(description, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return folder


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def edit_json(path: Path, edit: Callable[[dict], object]) -> None:
    """Apply `edit` to the content of a JSON file in place."""
    content = _read_json(path)
    edit(content)
    _write_json(path, content)


def _lack_special_tokens(folder: Path, names: list[str]) -> None:
    """Leave out the added tokens with these names from `tokenizer.json` alone."""

    def leave_out(description: dict) -> None:
        added = description["added_tokens"]
        description["added_tokens"] = [token for token in added if token["content"] not in names]

    edit_json(folder / "tokenizer.json", leave_out)


def _split_vocabulary(folder: Path) -> None:
    """Write `vocab.json` and `merges.txt`, as all older transformers versions save them."""
    model = _read_json(folder / "tokenizer.json")["model"]
    _write_json(folder / "vocab.json", model["vocab"])
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in model["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_token_maps(folder: Path) -> None:
    """Write `added_tokens.json` and `special_tokens_map.json`, as older versions save them."""
    config = _read_json(folder / "tokenizer_config.json")
    added = config["added_tokens_decoder"]
    ids = {token["content"]: int(id) for id, token in added.items()}
    _write_json(folder / "added_tokens.json", ids)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    token_map = {
        "additional_special_tokens": config["additional_special_tokens"],
        "eos_token": {"content": config["eos_token"], **flags},
        "pad_token": {"content": config["pad_token"], **flags},
    }
    _write_json(folder / "special_tokens_map.json", token_map)


def _name_extra_tokens(config: dict) -> None:
    """Turn a `tokenizer_config.json` into what transformers 5 saves."""
    del config["added_tokens_decoder"]
    config["extra_special_tokens"] = config.pop("additional_special_tokens")
    config |= {"backend": "tokenizers", "is_local": True, "local_files_only": False}


def _drop_tokens(config: dict) -> None:
    """Leave out from a `tokenizer_config.json` what the older files hold."""
    for field in ("added_tokens_decoder", "additional_special_tokens", "eos_token", "pad_token"):
        del config[field]


LAYOUTS = (
    "published",  # all tokens in both files
    "incomplete",  # tokenizer.json lacks the vision tokens
    "incomplete in the middle",  # tokenizer.json lacks the box tokens, with the ids after them
    "without added tokens",  # tokenizer.json lacks all of them
    "4.45",  # all of them, in every kind of file
    "5.x",  # no added_tokens_decoder
    "vocab.json",  # no tokenizer.json
    "added_tokens.json",  # no tokenizer.json and no added_tokens_decoder
)


def write_layout(source: Path, folder: Path, layout: str) -> Path:
    """Write the files of `build_tokenizer` in `source` to `folder` in one of LAYOUTS."""
    shutil.copytree(source, folder)
    if layout == "incomplete":
        _lack_special_tokens(folder, SPECIAL_TOKENS[9:])
    if layout == "incomplete in the middle":
        _lack_special_tokens(folder, SPECIAL_TOKENS[3:9])
    if layout == "without added tokens":
        _lack_special_tokens(folder, SPECIAL_TOKENS)
    if layout in ("4.45", "vocab.json", "added_tokens.json"):
        _split_vocabulary(folder)
    if layout in ("4.45", "added_tokens.json"):
        _write_token_maps(folder)
    if layout == "5.x":
        edit_json(folder / "tokenizer_config.json", _name_extra_tokens)
    if layout in ("vocab.json", "added_tokens.json"):
        (folder / "tokenizer.json").unlink()
    if layout == "added_tokens.json":
        edit_json(folder / "tokenizer_config.json", _drop_tokens)
    return folder


if __name__ == "__main__":
    print(build_tokenizer(sys.argv[1]))
