"""Write the files of the bundled checkpoint that need no weights: tokenizer, template,
configuration.

    make_tokenizer(folder)          tokenizer.json, trained on the sentences of the training data,
                                    and tokenizer_config.json
    make_config(folder) -> Config   the shape of the model; generation_config.json and
                                    preprocessor_config.json

They are the files of a published Qwen2-VL, so other libraries open the directory, too.
"""

import json
import re
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as BPE

from qwen2vl import Config, VisionConfig
from tiny.scenes import READ, TRAIN_SEEDS, make_sample

SPECIAL_TOKENS = [  # the 14 of the published tokenizer, in its order
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

# Qwen2 splits text into words with this pattern before it merges bytes; every digit is a word.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The published chat template, for other libraries; tokenizer.py writes the same prompts without
# jinja2. It has no literal line break, because renderers treat one after a block differently.
CHAT_TEMPLATE = (
    "{% set seen = namespace(images=0, videos=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    "{% set seen.images = seen.images + 1 %}"
    "{% if add_vision_id %}{{ 'Picture ' ~ seen.images ~ ': ' }}{% endif %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif item['type'] == 'video' or 'video' in item %}"
    "{% set seen.videos = seen.videos + 1 %}"
    "{% if add_vision_id %}{{ 'Video ' ~ seen.videos ~ ': ' }}{% endif %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def training_sentences(samples: int) -> list[str]:
    """Return the texts of the first training samples, without special tokens.

    Printed words are left out: the model spells them letter by letter.
    """
    sentences = []
    for seed in range(TRAIN_SEEDS, TRAIN_SEEDS + samples):
        sentences += [
            "system\nYou are a helpful assistant.",
            "user\n",
            "assistant\n",
            "Picture 1: ",
            "Video 1: ",
        ]
        for topic in ("shapes", "album", "clip"):
            for pair in make_sample(topic, seed).qa_pairs:
                for question, answer in pair.turns:
                    sentences += split_at_special_tokens(question)
                    sentences += split_at_special_tokens(answer)
    for question in READ:
        sentences += [question] * 100
    return sentences


def split_at_special_tokens(text: str) -> list[str]:
    return re.split(r"<\|.*?\|>", text)


def make_tokenizer(folder: Path, samples: int = 2000, merges: int = 400) -> None:
    """Train the byte-level BPE tokenizer and write its two files.

    Any text can be encoded; what is not in the training data takes more tokens.
    """
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split_words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split_words, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(training_sentences(samples), trainer)
    bpe.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]
    )
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(bpe))


def tokenizer_config(bpe: BPE) -> dict:
    """Return the contents of tokenizer_config.json."""
    added_tokens = {}
    for token in SPECIAL_TOKENS:
        added_tokens[bpe.token_to_id(token)] = {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
    return {
        "added_tokens_decoder": added_tokens,
        "additional_special_tokens": SPECIAL_TOKENS[1:],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "Qwen2Tokenizer",
    }


def make_config(folder: Path, depth: int = 4) -> Config:
    """Return the shape of the model, a small published one; write generation and preprocessor
    config. depth: the layers of the decoder, and the blocks of the encoder.

    Every text token costs a pass through the decoder and a conversation has about 200 of them, so
    the decoder is narrow. The vision encoder is wider: telling shapes apart takes longest to learn.
    """
    bpe = BPE.from_file(str(folder / "tokenizer.json"))
    end = bpe.token_to_id("<|im_end|>")
    pad = bpe.token_to_id("<|endoftext|>")
    generation_config = {
        "bos_token_id": pad,
        "do_sample": False,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
    }
    write_json(folder / "generation_config.json", generation_config)
    # The bounds are the smallest and the largest image of the training data: a photograph is
    # resized to about the latter.
    preprocessor_config = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 56**2,
        "max_pixels": 336 * 224,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    write_json(folder / "preprocessor_config.json", preprocessor_config)
    return Config(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_theta=100.0,
        rope_scaling={"type": "mrope", "mrope_section": [1] * 14 + [2]},
        bos_token_id=pad,
        eos_token_id=end,
        vision_start_token_id=bpe.token_to_id("<|vision_start|>"),
        vision_end_token_id=bpe.token_to_id("<|vision_end|>"),
        image_token_id=bpe.token_to_id("<|image_pad|>"),
        video_token_id=bpe.token_to_id("<|video_pad|>"),
        vision_config=VisionConfig(
            depth=depth, embed_dim=160, num_heads=5, mlp_ratio=4, hidden_size=128
        ),
    )
