"""Build the published Qwen2 tokenizer from its ranks, without network.

The package `dashscope` (a test requirement) carries `qwen.tiktoken`: one line per token, its bytes in base64 and
its rank, which is its id. A rank vocabulary needs no list of merges: of all neighbours, tiktoken joins the pair
whose union has the lowest rank. The `tokenizers` library wants the merges spelled out, and they follow from the
ranks: cut an entry with the entries below its own rank, and the two pieces left over are the pair that makes it.
"""

import base64
import importlib.util
import json
import sys
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tokenizer import BYTE_OF

# In the order of their ids, which follow the 151,643 ranks.
CONTROL_TOKENS = [
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
    """Where `dashscope` keeps the ranks. The package is not imported: that would take seconds."""
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the package dashscope, which carries the Qwen2 ranks, is not installed"
        )
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


def read_ranks() -> dict[bytes, int]:
    """The 151,643 tokens: bytes → rank."""
    lines = rank_file().read_bytes().split(b"\n")
    return {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in lines if line)
    }


def pieces(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Merge the bytes of `token` as far as the entries below its own rank go."""
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
    """Write `tokenizer.json` and `tokenizer_config.json` as the published checkpoints hold them. A few seconds."""
    ranks = read_ranks()
    letter = {byte: character for character, byte in BYTE_OF.items()}
    spelled = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            left, right = pieces(token, ranks)
            merges.append([spelled[left], spelled[right]])

    control = [
        {
            "id": len(ranks) + n,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for n, name in enumerate(CONTROL_TOKENS)
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
        "added_tokens": control,
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
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in control
        },
        "additional_special_tokens": CONTROL_TOKENS[1:],
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


if __name__ == "__main__":
    print(build_tokenizer(sys.argv[1]))
