"""The files of the bundled model's folder that need no weights: tokenizer, chat template, configuration.

    make_tokenizer(folder)          tokenizer.json, learned from the sentences of the world, and tokenizer_config.json
    make_config(folder) -> Config   the shape of the model; generation_config.json and preprocessor_config.json

They are what a published Qwen2-VL has, so other libraries open the folder, too.
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
from tiny.scenes import READ, TRAIN_SEEDS, lesson

CONTROL = (  # the names of the 14 control tokens of the published tokenizer, in its order
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end "
    "quad_start quad_end vision_start vision_end vision_pad image_pad video_pad"
)
CONTROL = [f"<|{name}|>" for name in CONTROL.split()]

# Qwen2 cuts text into words with this before it merges bytes; every digit is a word of its own.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The published chat template, for other libraries (tokenizer.py writes the same prompts without Jinja). It holds no
# literal line break, because renderers differ in how they treat one after a block.
CHAT_TEMPLATE = (
    "{% set seen = namespace(images=0, videos=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item or 'image_url' in item %}"
    "{% set seen.images = seen.images + 1 %}{% if add_vision_id %}{{ 'Picture ' ~ seen.images ~ ': ' }}{% endif %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% elif item['type'] == 'video' or 'video' in item %}"
    "{% set seen.videos = seen.videos + 1 %}{% if add_vision_id %}{{ 'Video ' ~ seen.videos ~ ': ' }}{% endif %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def make_tokenizer(folder: Path, lessons: int = 2000, merges: int = 400) -> None:
    """Learns the merges from the world's sentences; any other text just takes more tokens. Writes two files."""
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    into_words = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    into_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([into_words, into_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    sentences = []
    for seed in range(TRAIN_SEEDS, TRAIN_SEEDS + lessons):
        sentences += [
            "system\nYou are a helpful assistant.",
            "user\n",
            "assistant\n",
            "Picture 1: ",
            "Video 1: ",
        ]
        for topic in ("shapes", "album", "clip"):  # words are spelled letter by letter
            for exchange in lesson(topic, seed).exchanges:
                sentences += [
                    part
                    for turn in exchange.turns
                    for text in turn
                    for part in re.split(r"<\|.*?\|>", text)
                ]
    sentences += [question for question in READ for _ in range(100)]
    letters = pre_tokenizers.ByteLevel.alphabet()  # one for each byte
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(sentences, trainer)
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    entry = {
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    tokenizer_config = {
        "added_tokens_decoder": {
            bpe.token_to_id(token): {"content": token, **entry} for token in CONTROL
        },
        "additional_special_tokens": CONTROL[1:],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "tokenizer_class": "Qwen2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def make_config(folder: Path) -> Config:
    """The shape of the model, a published one made small; writes the two files that need no weights.

    Every text token costs a pass through the decoder and a conversation has some 200 of them, so the decoder is
    narrow and the eyes get their full share: telling shapes apart is what takes longest to learn.
    """
    bpe = BPE.from_file(str(folder / "tokenizer.json"))
    end, pad = bpe.token_to_id("<|im_end|>"), bpe.token_to_id("<|endoftext|>")
    generation = {
        "bos_token_id": pad,
        "do_sample": False,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
    }
    write_json(folder / "generation_config.json", generation)
    # The bounds are the smallest and the largest picture of the world: a photograph is shrunk to about the latter.
    images = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 56**2,
        "max_pixels": 336 * 224,
    }
    images["image_mean"] = [0.48145466, 0.4578275, 0.40821073]
    images["image_std"] = [0.26862954, 0.26130258, 0.27577711]
    images |= {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    write_json(folder / "preprocessor_config.json", images)
    return Config(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
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
            depth=4, embed_dim=160, num_heads=5, mlp_ratio=4, hidden_size=128
        ),
    )
