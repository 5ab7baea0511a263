"""tokenizer.py: equal to transformers, tiktoken and golden ids, on the real Qwen2 vocabulary."""

import copy
import json
import logging
import pickle
import shutil
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from real_vocabulary import (
    LAYOUTS,
    SMALL_VOCABULARY,
    SPECIAL_TOKENS,
    WORD_PATTERN,
    build_small_tokenizer,
    edit_json,
    read_ranks,
    write_layout,
)
from texts import IDS, TEXTS
from transformers import Qwen2Tokenizer

import chat_template
from chat_template import BUILT_IN_TEMPLATES, ChatTemplate, is_built_in_template
from conversations import content_kind
from json_files import read_json
from preprocess import ImageConfig, Processor
from tiny.folder import CHAT_TEMPLATE
from tokenizer import BYTE_OF, GUARDED_TOKENS, StreamDecoder, Tokenizer

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text(encoding="utf-8")
)

ALPHABET = {byte: character for character, byte in BYTE_OF.items()}

ids_of_any_kind = st.lists(
    st.one_of(
        st.integers(0, 255),  # single bytes, most of which are no UTF-8 together
        st.integers(0, 152063),
        st.integers(151643, 151656),  # special tokens
        st.sampled_from([172, 253, 246, 222, 9284]),  # parts of 😀
    ),
    max_size=40,
)
texts_of_any_kind = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [*SPECIAL_TOKENS, " ", "\n", "'s", "é", "e\u0301", "👩‍👧", "\u0e33", "1", "ﬀ"]
        ),
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer_folder):
    return Tokenizer.from_pretrained(qwen_tokenizer_folder)


@pytest.fixture(scope="module")
def reference(qwen_tokenizer_folder):
    return Qwen2Tokenizer.from_pretrained(qwen_tokenizer_folder)


@pytest.fixture(scope="module")
def by_rank():
    """tiktoken's own BPE over the ranks: sharing neither code nor merges with `tokenizers`."""
    ranks = read_ranks()
    special = {name: len(ranks) + n for n, name in enumerate(SPECIAL_TOKENS)}
    return tiktoken.Encoding(
        "qwen2", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def streamed(tokenizer, ids, skip_special_tokens=True):
    decoder = StreamDecoder(tokenizer, skip_special_tokens)
    return [decoder.push(id) for id in ids] + [decoder.finish()]


def first_stop(text, stop_strings):
    """Return where the first of the stop strings begins, or the end of the text."""
    return min([text.find(stop) for stop in stop_strings if stop in text], default=len(text))


# --- the vocabulary that the tests build ---


@pytest.mark.slow
def test_tokenizer_has_the_published_vocabulary(qwen, qwen_tokenizer_folder):
    description = json.loads((qwen_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(description["model"]["vocab"]) == 151_643
    assert len(description["model"]["merges"]) == 151_387
    assert qwen.encode("Describe this image.") == [74785, 419, 2168, 13]
    published = {
        "<|endoftext|>": 151643,
        "<|im_end|>": 151645,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
    }
    assert {name: qwen.token_id(name) for name in published} == published


@pytest.mark.slow
def test_tokenizer_rebuilds_every_token_by_its_merges(qwen):
    for spelled, id in qwen.backend.get_vocab(with_added_tokens=False).items():
        assert [token.id for token in qwen.backend.model.tokenize(spelled)] == [id]


# --- text to ids and back ---


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_encode_equals_reference(qwen, reference, by_rank, name):
    text = TEXTS[name]
    ids = qwen.encode(text)
    assert ids == reference(text)["input_ids"]
    assert ids == by_rank.encode(unicodedata.normalize("NFC", text), allowed_special="all")
    assert ids == GOLDEN["ids"][name]


@pytest.mark.parametrize("name", [*TEXTS, *IDS])
def test_decode_equals_reference(qwen, reference, name):
    ids = IDS.get(name) or GOLDEN["ids"][name]
    without_special, with_special = GOLDEN["text"][name]
    for skip, golden in ((True, without_special), (False, with_special)):
        text = qwen.decode(ids, skip_special_tokens=skip)
        assert text == reference.decode(ids, skip_special_tokens=skip)
        assert text == golden
    assert qwen.decode(ids) == without_special  # skipping is the default


@pytest.mark.slow
@settings(max_examples=500)
@given(text=texts_of_any_kind)
def test_encode_equals_reference_for_any_text(qwen, reference, text):
    ids = qwen.encode(text)
    assert ids == reference(text)["input_ids"]
    assert qwen.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@pytest.mark.slow
@settings(max_examples=500)
@given(ids=ids_of_any_kind)
def test_decode_equals_reference_for_any_ids(qwen, reference, by_rank, ids):
    for skip in (True, False):
        assert qwen.decode(ids, skip_special_tokens=skip) == reference.decode(
            ids, skip_special_tokens=skip
        )
    known = [id for id in ids if id < by_rank.n_vocab]
    assert qwen.decode(ids, skip_special_tokens=False) == by_rank.decode(known, errors="replace")


def test_encode_adds_no_token(qwen):
    assert qwen.encode("") == []
    assert qwen.decode([]) == ""
    assert qwen.encode("a") == [64]


@pytest.mark.slow
def test_tokenizer_ignores_saved_truncation_and_padding(qwen_tokenizer_folder, tmp_path):
    description = json.loads((qwen_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    description["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    shutil.copy(qwen_tokenizer_folder / "tokenizer_config.json", tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode("Describe this image.") == [
        74785,
        419,
        2168,
        13,
    ]


@pytest.mark.slow
def test_tokenizer_loads_files_saved_by_the_reference(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    saved = Tokenizer.from_pretrained(tmp_path)
    assert (saved.pad_token_id, saved.eos_token_id) == (151643, 151645)
    assert saved.encode(TEXTS["all control tokens"]) == GOLDEN["ids"]["all control tokens"]


# --- streaming ---


@pytest.mark.parametrize("name", [*TEXTS, *IDS])
@pytest.mark.parametrize("skip", [True, False])
def test_stream_decoder_joins_to_the_decoded_text(qwen, name, skip):
    ids = IDS.get(name) or GOLDEN["ids"][name]
    assert "".join(streamed(qwen, ids, skip)) == qwen.decode(ids, skip_special_tokens=skip)


@pytest.mark.slow
@settings(max_examples=500)
@given(ids=ids_of_any_kind, skip=st.booleans())
def test_stream_decoder_joins_to_the_decoded_text_of_any_ids(qwen, ids, skip):
    assert "".join(streamed(qwen, ids, skip)) == qwen.decode(ids, skip_special_tokens=skip)


def test_stream_decoder_emits_only_complete_characters(qwen):
    assert streamed(qwen, [172, 253, 246, 222, 419]) == ["", "", "", "😀", " this", ""]
    assert streamed(qwen, [9284, 151645, 246, 222]) == ["", "", "", "😀", ""]
    assert streamed(qwen, [9284, 419]) == ["", "\ufffd this", ""]
    assert streamed(qwen, [419, 9284]) == [" this", "", "\ufffd"]


@pytest.mark.slow
@given(ids=ids_of_any_kind, data=st.data())
def test_stream_decoder_ends_before_the_first_stop_string(qwen, ids, data):
    """Compared with a search in the whole text after each id, for any bytes and special tokens."""
    whole = qwen.decode(ids, skip_special_tokens=False)
    piece = st.just("x")
    if whole:
        start = st.integers(0, len(whole) - 1)
        piece = st.tuples(start, st.integers(1, 6)).map(lambda span: whole[span[0] :][: span[1]])
    stop_strings = data.draw(
        st.lists(st.one_of(piece, st.text(min_size=1)), min_size=1, max_size=3)
    )
    decoder = StreamDecoder(qwen, skip_special_tokens=False, stop_strings=stop_strings)
    plain = StreamDecoder(qwen, skip_special_tokens=False)
    text, generated = "", ""
    for id in ids:
        text += decoder.push(id)
        generated += plain.push(id)
        cut = first_stop(generated, stop_strings)
        assert decoder.stopped == (cut < len(generated))
        assert text == generated[: len(text)]
        if decoder.stopped:
            assert text == generated[:cut]
            assert decoder.push(419) == decoder.finish() == ""
            return
        held = generated[len(text) :]  # the start of a stop string, and no more
        assert not held or any(stop.startswith(held) for stop in stop_strings)
    generated += plain.finish()
    text += decoder.finish()
    assert text == generated[: first_stop(generated, stop_strings)]


@pytest.mark.parametrize(
    ("text", "stop_strings", "expected"),
    [
        ("one two three", ["wo th"], "one t"),  # spans tokens, and begins and ends within them
        ("one two three", ["two", "one two"], ""),
        ("one two", ["two three"], "one two"),  # held back to the end
        ("aaab", ["aab"], "a"),
        ("x日本y", ["本"], "x日"),
        ("a👩‍👧b", ["\u200d"], "a👩"),
        ("a<|box_start|>(1,2)<|box_end|>b", ["<|box_end|>"], "a(1,2)"),
        ("a<|box_start|>(1,2)<|box_end|>b", [")b"], "a(1,2)b"),
        ("a<|box_start|>(1,2)<|box_end|>b", [",2)<|box_end|>b"], "a(1"),
        ("one\n\ntwo", "\n\n", "one"),
    ],
)
def test_decode_cuts_the_text_before_a_stop_string(qwen, text, stop_strings, expected):
    ids = qwen.encode(text)
    assert qwen.decode(ids, stop_strings=stop_strings) == expected
    assert qwen.batch_decode([ids, ids], stop_strings=stop_strings) == [expected] * 2
    single_bytes = [qwen.token_id(ALPHABET[byte]) for byte in text.encode()]
    if "<|" not in text:
        assert qwen.decode(single_bytes, stop_strings=stop_strings) == expected


@pytest.mark.parametrize("stop_strings", ["", [""], ["a", ""], [1]], ids=repr)
def test_stream_decoder_refuses_stop_strings_that_are_no_texts(qwen, stop_strings):
    with pytest.raises(ValueError, match=r"stop_strings is .*, expected non-empty strings"):
        StreamDecoder(qwen, stop_strings=stop_strings)


def test_stream_decoder_does_not_wait_for_bytes_that_cannot_come(qwen):
    assert streamed(qwen, [222, 222, 222]) == ["\ufffd"] * 3 + [""]  # 0x80 starts no character
    whole = qwen.encode("\ufffd")
    assert (
        "".join(streamed(qwen, whole)[: len(whole)]) == "\ufffd"
    )  # U+FFFD itself is a character like any other


def test_stream_decoder_splits_no_character_of_real_text(qwen):
    for text in TEXTS.values():
        text = unicodedata.normalize("NFC", text)
        if "\ufffd" not in text:
            pieces = streamed(qwen, qwen.encode(text), skip_special_tokens=False)
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)


def test_stream_decoder_emits_special_tokens_on_request(qwen):
    ids = qwen.encode("a<|im_end|>")
    assert streamed(qwen, ids) == ["a", "", ""]
    assert streamed(qwen, ids, skip_special_tokens=False) == ["a", "<|im_end|>", ""]


@pytest.mark.slow
def test_stream_decoder_decodes_added_tokens_that_are_not_special(qwen_tokenizer_folder):
    backend = Tokenizer.from_pretrained(qwen_tokenizer_folder).backend
    backend.add_tokens(
        ["<à la carte>", "図"]
    )  # characters outside the byte alphabet, and not special: never skipped
    tokenizer = Tokenizer(backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    ids = [
        tokenizer.token_id("<à la carte>"),
        419,
        tokenizer.token_id("図"),
        9284,
        tokenizer.token_id("図"),
    ]
    assert (
        "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "<à la carte> this図\ufffd図"
    )


def test_byte_of_maps_to_each_byte_once():
    assert sorted(BYTE_OF.values()) == list(range(256))
    assert (BYTE_OF["Ġ"], BYTE_OF["Ċ"], BYTE_OF["A"], BYTE_OF["ð"]) == (0x20, 0x0A, 0x41, 0xF0)


# --- the chat format ---

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
ASSISTANT = "<|im_start|>assistant\n"


def user(*items):
    return {"role": "user", "content": list(items)}


PROMPTS = {
    "nothing": ([], ASSISTANT),
    "text": (
        [{"role": "user", "content": "who are you?"}],
        f"{SYSTEM}<|im_start|>user\nwho are you?<|im_end|>\n{ASSISTANT}",
    ),
    "image and text": (
        [user({"type": "image"}, {"type": "text", "text": "Describe this image."})],
        f"{SYSTEM}<|im_start|>user\n{IMAGE}Describe this image.<|im_end|>\n{ASSISTANT}",
    ),
    "own system message": (
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n{ASSISTANT}",
    ),
    "system message as a list": (
        [{"role": "system", "content": [{"type": "text", "text": "Be "}, {"text": "brief."}]}],
        f"<|im_start|>system\nBe brief.<|im_end|>\n{ASSISTANT}",
    ),
    "late system message": (
        [{"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}],
        f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>system\nBe brief.<|im_end|>\n{ASSISTANT}",
    ),
    "untrimmed text": (
        [
            {"role": "user", "content": "\n  a \r\n"},
            user({"type": "text", "text": " b "}, {"text": "\n"}),
        ],
        f"{SYSTEM}<|im_start|>user\n\n  a \r\n<|im_end|>\n"
        f"<|im_start|>user\n b \n<|im_end|>\n{ASSISTANT}",
    ),
    "empty contents": (
        [{"role": "user", "content": ""}, user()],
        f"{SYSTEM}<|im_start|>user\n<|im_end|>\n<|im_start|>user\n<|im_end|>\n{ASSISTANT}",
    ),
    "no template within the text": (
        [{"role": "user", "content": "{{ 1 }} {% if %} <b> & 'q'"}],
        f"{SYSTEM}<|im_start|>user\n{{{{ 1 }}}} {{% if %}} <b> & 'q'<|im_end|>\n{ASSISTANT}",
    ),
    "any role": (
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "tool", "content": "c"},
        ],
        f"{SYSTEM}<|im_start|>user\na<|im_end|>\n{ASSISTANT}b<|im_end|>\n<|im_start|>tool\nc<|im_end|>\n{ASSISTANT}",
    ),
    "every way to write an image": (
        [
            user(
                {"type": "image", "image": "a.png"},
                {"image": "a.png"},
                {"type": "image_url", "image_url": {"url": "a.png"}},
                {"type": "text", "text": "not shown", "image": "a.png"},
                {"type": "video", "image": "a.png"},
            )
        ],
        f"{SYSTEM}<|im_start|>user\n{IMAGE * 5}<|im_end|>\n{ASSISTANT}",
    ),
    "every way to write a video": (
        [
            user(
                {"type": "video", "video": "a.mp4"},
                {"video": "a.mp4"},
                {"type": "video", "text": "not shown"},
            )
        ],
        f"{SYSTEM}<|im_start|>user\n{VIDEO * 3}<|im_end|>\n{ASSISTANT}",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_apply_chat_template_returns_the_published_prompt(qwen, name):
    messages, expected = PROMPTS[name]
    assert qwen.apply_chat_template(messages) == expected
    without = expected.removesuffix(ASSISTANT)
    assert qwen.apply_chat_template(messages, add_generation_prompt=False) == without


def test_apply_chat_template_counts_vision_ids_over_all_messages(qwen):
    messages = [
        user({"type": "image"}, {"type": "text", "text": "Hello."}),
        {"role": "assistant", "content": "Hi."},
        user(
            {"type": "text", "text": "And "},
            {"type": "image"},
            {"type": "video"},
            {"type": "image"},
            {"video": "b"},
        ),
    ]
    numbered = (
        f"{SYSTEM}<|im_start|>user\nPicture 1: {IMAGE}Hello.<|im_end|>\n{ASSISTANT}Hi.<|im_end|>\n"
        f"<|im_start|>user\nAnd Picture 2: {IMAGE}Video 1: {VIDEO}"
        f"Picture 3: {IMAGE}Video 2: {VIDEO}<|im_end|>\n"
    )
    assert qwen.apply_chat_template(messages, add_vision_id=True) == numbered + ASSISTANT
    for label in ("Picture 1: ", "Picture 2: ", "Picture 3: ", "Video 1: ", "Video 2: "):
        numbered = numbered.replace(label, "")
    assert qwen.apply_chat_template(messages) == numbered + ASSISTANT


def test_encode_gives_each_special_token_of_a_prompt_one_id(qwen):
    ids = qwen.encode(qwen.apply_chat_template(PROMPTS["image and text"][0]))
    special = [id for id in ids if id >= 151643]
    assert special == [151644, 151645, 151644, 151652, 151655, 151653, 151645, 151644]


# --- errors ---


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (["Hi"], "message 0 must be a dict with role and content, not str"),
        (
            [[{"role": "user", "content": "Hi"}]],
            "message 0 must be a dict with role and content, not list",
        ),
        (
            [{"role": "user", "content": "Hi"}, {"content": "Hi"}],
            r"message 1 needs a role, but has only \['content'\]",
        ),
        ([{"role": None, "content": "Hi"}], "message 0 needs a role"),
        ([{"role": "user"}], "the content of message 0 must be text or a list, not NoneType"),
        (
            [{"role": "user", "content": {"type": "image"}}],
            "the content of message 0 must be text or a list, not dict",
        ),
        ([user("Hi")], "a content item must be a dict, not str: 'Hi'"),
        (
            [user({"type": "txt", "tekst": "Hi"})],
            "neither image, video nor text: {'type': 'txt', 'tekst': 'Hi'}",
        ),
        ([user({"type": "text"})], "neither image, video nor text"),
        ([user({"type": "text", "text": None})], "neither image, video nor text"),
        ([user({"type": "imagee"})], "neither image, video nor text"),
    ],
)
def test_apply_chat_template_refuses_a_malformed_message(qwen, messages, said):
    with pytest.raises(ValueError, match=said):
        qwen.apply_chat_template(messages)


def test_content_kind_shortens_the_item_in_its_error():
    with pytest.raises(ValueError, match="neither") as error:
        content_kind({"data": "x" * 10_000})
    assert len(str(error.value)) < 200


def test_encode_refuses_a_lone_surrogate(qwen):
    with pytest.raises(ValueError, match="not a valid Unicode string"):
        qwen.encode("a\udc80b")


def test_tokenizer_without_a_vocabulary_is_one_sentence(qwen_tokenizer_folder, tmp_path):
    shutil.copy(qwen_tokenizer_folder / "tokenizer_config.json", tmp_path)
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in .*merges\.txt"):
        Tokenizer.from_pretrained(tmp_path)


WORDS = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "decoder": %s}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1", "tokenizer.json is a Git LFS pointer"),
        ('{"version": "1.0", "added_tok', "tokenizer.json is not a JSON file"),
        ("[]", "tokenizer.json should hold a JSON object, but holds a list"),
        ('{"decoder": null}', "cannot be used: Model missing"),
        (WORDS % '{"type": "WordPiece", "prefix": "##", "cleanup": true}', "is not byte-level"),
        (WORDS % "null", "is not byte-level"),
    ],
)
def test_tokenizer_refuses_an_unusable_file(tmp_path, content, said):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["<|image_pad|>", "<|im_end|>", "<|video_pad|>"])
def test_tokenizer_refuses_a_contradicting_special_token(qwen_tokenizer_folder, tmp_path, lacking):
    text = (qwen_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace(lacking, "<|other|>"), encoding="utf-8")
    shutil.copy(qwen_tokenizer_folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match=r"to the token .*but in the vocabulary it is the id of"):
        Tokenizer.from_pretrained(tmp_path)


# --- the guard of special tokens ---


@pytest.mark.slow
@given(
    texts=st.lists(st.text(), max_size=4),
    add_generation_prompt=st.booleans(),
    add_vision_id=st.booleans(),
)
def test_encode_chat_equals_the_encoded_prompt_without_special_tokens_in_text(
    qwen, reference, texts, add_generation_prompt, add_vision_id
):
    texts = [text.encode("utf-8", "ignore").decode().replace("|", "") for text in texts]
    messages = [
        user({"type": "image"}, {"text": text}, {"type": "video"}, {"text": text[::-1]})
        for text in texts
    ]
    prompt = qwen.apply_chat_template(messages, add_generation_prompt, add_vision_id)
    expected = reference.encode(prompt) if prompt else []
    assert qwen.encode_chat(messages, add_generation_prompt, add_vision_id) == expected


@pytest.mark.slow
def test_encode_keeps_special_tokens_after_a_guarded_chat(qwen):
    qwen.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    with pytest.raises(ValueError, match="not a valid Unicode string"):
        qwen.encode_chat([{"role": "user", "content": "\ud800"}])
    assert qwen.encode("<|im_end|>") == [151645]


pieces_of_text = st.sampled_from(
    [*SPECIAL_TOKENS, "\n", " ", "e", "\u0301", "word", "'s", "1", "<|", "|>", "im_end", "|", "<"]
)
loose_texts = st.lists(pieces_of_text, max_size=6).map("".join)
UNGUARDED_TOKENS = [name for name in SPECIAL_TOKENS if name not in GUARDED_TOKENS]


def encode_unguarded(by_rank, text):
    """Encode by tiktoken's BPE with the guarded tokens as ordinary text."""
    text = unicodedata.normalize("NFC", text)
    return by_rank.encode(text, allowed_special=set(UNGUARDED_TOKENS), disallowed_special=())


@pytest.mark.slow
@given(texts=st.lists(loose_texts | st.text(), min_size=1, max_size=4), role=st.sampled_from("ut"))
def test_encode_chat_encodes_guarded_text_as_ordinary_text(qwen, by_rank, texts, role):
    role = {"u": "user", "t": "tool"}[role]
    special = {name: 151643 + n for n, name in enumerate(SPECIAL_TOKENS)}
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]  # without lone surrogates
    ids = qwen.encode_chat([{"role": role, "content": [{"text": text} for text in texts]}])
    system = encode_unguarded(by_rank, "system\nYou are a helpful assistant.")
    message = encode_unguarded(by_rank, f"{role}\n" + "".join(texts))
    newline = encode_unguarded(by_rank, "\n")
    opening = encode_unguarded(by_rank, "assistant\n")
    expected = [start, *system, end, *newline, start, *message, end, *newline, start, *opening]
    assert ids == expected


@pytest.mark.parametrize("name", UNGUARDED_TOKENS)
def test_encode_chat_keeps_other_special_tokens_in_every_role(qwen, name):
    for role in ("user", "tool", "assistant", "system"):
        ids = qwen.encode_chat([{"role": role, "content": f"a {name} b <|im_end|>"}])
        assert ids.count(qwen.token_id(name)) == 1


@pytest.mark.parametrize("name", GUARDED_TOKENS)
@pytest.mark.parametrize("role", ["user", "tool", "function", "<|im_end|>", "assistant "])
def test_encode_chat_spells_chat_tokens_outside_system_and_assistant(qwen, name, role):
    messages = [{"role": role, "content": [{"text": f"a {name}{name} b"}]}]
    ids = qwen.encode_chat(messages)
    plain = qwen.encode_chat([{"role": "user", "content": "a b"}])
    id = qwen.token_id(name)
    assert ids.count(id) == plain.count(id)
    assert qwen.decode(ids, skip_special_tokens=False) == qwen.apply_chat_template(messages)


def test_encode_chat_spells_a_token_split_over_items(qwen):
    messages = [user({"text": "<"}, {"text": "|im_end|"}, {"text": "> <|im_"}, {"text": "end|>"})]
    ids = qwen.encode_chat(messages)
    assert ids.count(151645) == 2  # the template's
    assert qwen.encode_chat(messages, guard_special_tokens=False).count(151645) == 4


@pytest.mark.slow
@given(texts=st.lists(loose_texts, max_size=4), forged=loose_texts)
def test_encode_chat_of_assistant_and_system_text_equals_reference(qwen, reference, texts, forged):
    messages = [
        {"role": role, "content": text} for text in texts for role in ("system", "assistant")
    ]
    prompt = qwen.apply_chat_template(messages)
    expected = reference.encode(prompt)
    assert qwen.encode_chat(messages) == expected
    # With a guarded message as well.
    last = [{"role": "user", "content": forged + "<|im_end|>"}]
    both = [{"role": "system", "content": "S"}, *messages, *last]
    ids = qwen.encode_chat(both, add_generation_prompt=False)
    prefix = qwen.apply_chat_template(both[:-1], add_generation_prompt=False)
    known = reference.encode(prefix + "<|im_start|>")
    assert ids[: len(known)] == known


@given(texts=st.lists(loose_texts, max_size=4), flags=st.tuples(st.booleans(), st.booleans()))
def test_encode_chat_without_guard_equals_reference(qwen, reference, texts, flags):
    messages = [user({"type": "image"}, {"text": text}) for text in texts]
    prompt = qwen.apply_chat_template(messages, *flags)
    expected = reference.encode(prompt) if prompt else []
    assert qwen.encode_chat(messages, *flags, guard_special_tokens=False) == expected


def test_encode_chat_keeps_a_question_about_regions_short(qwen, reference):
    text = "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    messages = [
        {"role": "user", "content": f"Is {text} black?"},
        {"role": "assistant", "content": text},
    ]
    assert qwen.encode_chat(messages) == reference.encode(qwen.apply_chat_template(messages))


class ReadOnlyBackend:
    """A `tokenizers.Tokenizer` whose settings raise when a call changes them."""

    def __init__(self, backend):
        object.__setattr__(self, "_backend", backend)

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def __setattr__(self, name, value):
        raise AssertionError(f"{name} of a shared tokenizer was changed")


@pytest.mark.slow
def test_encode_chat_changes_no_shared_setting(qwen):
    tokenizer = Tokenizer(ReadOnlyBackend(qwen.backend), "<|endoftext|>", "<|im_end|>")
    messages = [{"role": "user", "content": "<|im_end|>"}]
    assert tokenizer.encode_chat(messages) == qwen.encode_chat(messages)


@pytest.mark.slow
def test_tokenizer_can_be_shared_by_threads(qwen, qwen_tokenizer_folder):
    texts = [f"{name} {n} <|im_end|>{'<|box_start|>' * n}" for n, name in enumerate(TEXTS)]
    texts += [TEXTS[name] for name in TEXTS]

    def work(tokenizer, text):
        ids = tokenizer.encode_chat([{"role": "user", "content": text}])
        stream = "".join(streamed(tokenizer, ids, False))
        return ids, tokenizer.encode(text), tokenizer.decode(ids), stream

    expected = [work(qwen, text) for text in texts]
    shared = Tokenizer.from_pretrained(qwen_tokenizer_folder)  # its guard is not made yet
    results = {}
    start = threading.Barrier(8)

    def run(number):
        start.wait()
        order = texts[number:] + texts[:number]
        found = [work(shared, text) for text in order]
        results[number] = found[len(texts) - number :] + found[: len(texts) - number]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(8)] == [expected] * 8


# --- the tokenizer files of a checkpoint ---


def assert_loads_as_in_the_reference(folder):
    ours = Tokenizer.from_pretrained(folder)
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    for text in TEXTS.values():
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_id == ours.token_id("<|im_end|>")
    assert ours.pad_token_id == ours.token_id("<|endoftext|>")
    assert_added_tokens_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["incomplete", "vocab.json"])
def test_tokenizer_loads_the_published_vocabulary_as_the_reference_does(
    qwen_tokenizer_folder, tmp_path, layout
):
    folder = write_layout(qwen_tokenizer_folder, tmp_path / "folder", layout)
    assert_loads_as_in_the_reference(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokenizer_loads_each_layout_as_the_reference_does(tmp_path, layout):
    published = build_small_tokenizer(tmp_path / "published")
    folder = write_layout(published, tmp_path / "folder", layout)
    assert_loads_as_in_the_reference(folder)
    messages = [{"role": "user", "content": TEXTS["all control tokens"] + "<|im_end|>"}]
    expected = Tokenizer.from_pretrained(published).encode_chat(messages)
    assert Tokenizer.from_pretrained(folder).encode_chat(messages) == expected


def assert_added_tokens_equal(ours, theirs):
    def flags(token):
        return token.content, token.lstrip, token.rstrip, token.single_word, token.special

    our_tokens = ours.backend.get_added_tokens_decoder()
    expected = {id: flags(token) for id, token in theirs.added_tokens_decoder.items()}
    assert {id: flags(token) for id, token in our_tokens.items()} == expected
    assert ours.special_ids == {id for id, token in expected.items() if token[-1]}


END_OF_TEXT = len(SMALL_VOCABULARY)  # the ids of the small tokenizer
IM_END = END_OF_TEXT + 2
BOX_START = END_OF_TEXT + 5
NEW_ID = END_OF_TEXT + 14
HELLO = SMALL_VOCABULARY["hello"]


def token_entry(content, **flags):
    entry = {"content": content, "lstrip": False, "rstrip": False, "single_word": False}
    return entry | {"normalized": False, "special": False} | flags


@pytest.fixture
def editable_folder(tmp_path):
    """Return a directory with the files of a small tokenizer, to be edited by the test."""
    return build_small_tokenizer(tmp_path / "folder")


def add_to_decoder(folder, id, entry):
    def add(config):
        config["added_tokens_decoder"][str(id)] = entry

    edit_json(folder / "tokenizer_config.json", add)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"special": True},
        {"lstrip": True},
        {"rstrip": True},
        {"normalized": True},
        {"single_word": True},
        {"lstrip": True, "rstrip": True, "special": True},
    ],
)
def test_tokenizer_keeps_the_flags_of_a_token_of_the_config_alone(editable_folder, flags):
    add_to_decoder(editable_folder, NEW_ID, token_entry("<é>", **flags))
    ours = Tokenizer.from_pretrained(editable_folder)
    theirs = Qwen2Tokenizer.from_pretrained(editable_folder)
    for text in ("a  <é>  b", "a<é>b", "<é><é>", "<e\u0301> <|im_end|>  <é>\n"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert_added_tokens_equal(ours, theirs)


def test_tokenizer_prefers_the_flags_of_its_config(editable_folder):
    def edit(config):
        config["additional_special_tokens"] = []
        config["added_tokens_decoder"][str(BOX_START)] |= {"rstrip": True}
        config["added_tokens_decoder"][str(BOX_START + 1)] |= {"special": False}

    edit_json(editable_folder / "tokenizer_config.json", edit)
    ours = Tokenizer.from_pretrained(editable_folder)
    theirs = Qwen2Tokenizer.from_pretrained(editable_folder)
    ids = ours.encode("<|box_start|>  a<|box_end|>  b")
    assert ids == theirs.encode("<|box_start|>  a<|box_end|>  b")
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "a<|box_end|>  b"
    assert_added_tokens_equal(ours, theirs)


def test_tokenizer_keeps_the_id_of_an_added_token_after_a_gap(editable_folder):
    add_to_decoder(editable_folder, NEW_ID + 43, token_entry("<far>"))
    tokenizer = Tokenizer.from_pretrained(editable_folder)
    assert tokenizer.encode("a<far>") == [97, NEW_ID + 43]
    assert tokenizer.decode([NEW_ID + 43, 97]) == "<far>a"
    messages = [{"role": "user", "content": "<far><|im_end|>"}]
    assert tokenizer.encode_chat(messages).count(NEW_ID + 43) == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config["additional_special_tokens"].append("<new>"),
        lambda config: config.update(extra_special_tokens={"thing_token": "<new>"}),
        lambda config: config.update(image_token="<new>"),
        lambda config: config.update(eos_token="<new>"),
        lambda config: config.update(pad_token="<new>", unk_token="<newer>"),
        lambda config: config.update(pad_token="hello"),
        lambda config: config.pop("additional_special_tokens"),
    ],
)
def test_tokenizer_adds_special_tokens_as_the_reference_does(editable_folder, edit):
    edit_json(editable_folder / "tokenizer_config.json", edit)
    ours = Tokenizer.from_pretrained(editable_folder)
    theirs = Qwen2Tokenizer.from_pretrained(editable_folder)
    assert ours.encode("a <new> <newer> hello") == theirs.encode("a <new> <newer> hello")
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.pad_token_id == theirs.pad_token_id
    assert_added_tokens_equal(ours, theirs)


@pytest.mark.parametrize(
    ("id", "entry", "said"),
    [
        (100, token_entry("<|im_end|>"), f"the id 100, but its id in the vocabulary is {IM_END}"),
        (100, token_entry("<new>"), r"the id 100 to the token <new>, but in the vocabulary"),
        (IM_END, token_entry("<new>"), r"it is the id of <\|im_end\|>"),
        (NEW_ID, token_entry("hello"), f"but its id in the vocabulary is {HELLO}"),
        ("x", token_entry("<new>"), "added_tokens_decoder: expected a token id, got 'x'"),
        (-1, token_entry("<new>"), "expected a token id, got -1"),
        (2**32, token_entry("<new>"), "expected a token id, got 4294967296"),
        (NEW_ID, "<new>", f"expected a JSON object for token {NEW_ID}, got str"),
        (NEW_ID, token_entry(""), f"expected the text of token {NEW_ID}"),
        (NEW_ID, token_entry(None), f"expected the text of token {NEW_ID}"),
        (NEW_ID, token_entry("<new>", lstrip="no"), "expected true or false in lstrip"),
    ],
)
def test_tokenizer_refuses_a_contradicting_added_token(editable_folder, id, entry, said):
    add_to_decoder(editable_folder, id, entry)
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer.from_pretrained(editable_folder)
    assert "tokenizer_config.json" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("added_tokens_decoder", [], "added_tokens_decoder: expected a JSON object, got list"),
        ("additional_special_tokens", "x", "field additional_special_tokens"),
        ("additional_special_tokens", [3], "field additional_special_tokens: expected the text"),
        ("extra_special_tokens", {"a": 3}, "field extra_special_tokens: expected the text"),
        ("pad_token", 3, "field pad_token: expected the text of a token, got 3"),
        ("pad_token", {}, "field pad_token: expected the text of a token"),
        ("eos_token", ["<|im_end|>"], "field eos_token: expected the text of a token"),
        ("chat_template", 3, "expected a chat template as text"),
        ("chat_template", [], "expected a chat template as text"),
        ("chat_template", [{"name": "rag", "template": "x"}], "one named default"),
    ],
)
def test_tokenizer_names_a_malformed_config_field(editable_folder, field, value, said):
    edit_json(
        editable_folder / "tokenizer_config.json", lambda config: config.update({field: value})
    )
    with pytest.raises(ValueError, match=said) as error:
        Tokenizer.from_pretrained(editable_folder)
    assert "tokenizer_config.json" in str(error.value)


def test_tokenizer_special_tokens_fall_back_to_end_of_text(editable_folder, caplog):
    config = editable_folder / "tokenizer_config.json"
    edit_json(config, lambda content: content.update(pad_token=None))
    tokenizer = Tokenizer.from_pretrained(editable_folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (IM_END, END_OF_TEXT)
    edit_json(config, lambda content: content.update(eos_token=None))
    edit_json(config, lambda content: content.pop("pad_token"))
    tokenizer = Tokenizer.from_pretrained(editable_folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END_OF_TEXT, END_OF_TEXT)
    assert not caplog.records
    config.unlink()
    tokenizer = Tokenizer.from_pretrained(editable_folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (END_OF_TEXT, END_OF_TEXT)
    assert "no tokenizer_config.json" in caplog.text
    assert_added_tokens_equal(tokenizer, Qwen2Tokenizer.from_pretrained(editable_folder))


@pytest.mark.parametrize("pad", ["<|vision_pad|>", {"content": "<|vision_pad|>", "lstrip": False}])
def test_tokenizer_reads_the_pad_token_as_text_or_object(editable_folder, pad):
    edit_json(
        editable_folder / "tokenizer_config.json", lambda config: config.update(pad_token=pad)
    )
    assert Tokenizer.from_pretrained(editable_folder).pad_token_id == IM_END + 9


def bpe_json(**changes):
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []} | changes.pop("model", {})
    return {"version": "1.0", "decoder": {"type": "ByteLevel"}, "model": model} | changes


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe{}",
        b"\x1f\x8b\x08 gzip",
        b"",
        b"[" * 200_000,
        json.dumps(bpe_json(model={"merges": [["a", "b"]]})).encode(),
        json.dumps(bpe_json(model={"merges": 3})).encode(),
        json.dumps(bpe_json(model={"vocab": {"a": -1}})).encode(),
        json.dumps(bpe_json(model={"vocab": ["a"]})).encode(),
        json.dumps(bpe_json(model={"vocab": {"a": "0"}})).encode(),
        json.dumps(bpe_json(model={"vocab": {"a": None}})).encode(),
        json.dumps(bpe_json(model={"type": "WordLevel"})).encode(),
        json.dumps(bpe_json(model={"type": 3})).encode(),
        json.dumps(bpe_json(decoder=None)).encode(),
        json.dumps(bpe_json(decoder=[])).encode(),
        json.dumps(bpe_json(added_tokens={"a": 1})).encode(),
        json.dumps(bpe_json(added_tokens=[3])).encode(),
        json.dumps(bpe_json(added_tokens=[{"id": 1}])).encode(),
        json.dumps(bpe_json(added_tokens=[token_entry("b")])).encode(),
        json.dumps(bpe_json(added_tokens=[{"id": 0, **token_entry("b")}])).encode(),
        json.dumps(bpe_json(normalizer=3)).encode(),
        json.dumps(bpe_json(pre_tokenizer={"type": "Nothing"})).encode(),
        # What follows are panics of the Rust library, which are no Exceptions in Python.
        json.dumps(bpe_json(model={"vocab": {"a": 0, "aa": 1}, "merges": [["a", "a"]],
                                   "continuing_subword_prefix": "####"})).encode(),
        json.dumps(bpe_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"})
                   ).encode(),
    ],
)  # fmt: skip
def test_tokenizer_refuses_malformed_tokenizer_json_in_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json") as error:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"{", b"[" * 200_000, b"null"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json"])
def test_tokenizer_names_the_file_of_malformed_json(editable_folder, name, content):
    (editable_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Tokenizer.from_pretrained(editable_folder)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        read_json(editable_folder, name)


@pytest.mark.parametrize(
    ("vocab", "merges"), [("{", ""), ("[]", ""), ('{"a": 0}', "a b\n"), ('{"a": "x"}', "")]
)
def test_tokenizer_refuses_malformed_vocab_json(tmp_path, vocab, merges):
    (tmp_path / "vocab.json").write_text(vocab, encoding="utf-8")
    (tmp_path / "merges.txt").write_text(merges, encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.json"):
        Tokenizer.from_pretrained(tmp_path)


# --- decoding arrays and batches ---


def test_decode_accepts_ids_of_any_container(qwen, reference):
    ids = [74785, 419, 2168, 13, 151645]
    expected = reference.decode(ids, skip_special_tokens=True)
    assert expected == "Describe this image."
    for given_ids in (tuple(ids), np.array(ids), torch.tensor(ids), iter(ids), list(np.array(ids))):
        assert qwen.decode(given_ids) == expected
    assert qwen.decode(list(torch.tensor(ids))) == expected
    for one in (74785, np.int64(74785), torch.tensor(74785), np.array(74785)):
        assert qwen.decode(one) == "Describe"


def test_batch_decode_equals_reference(qwen, reference):
    rows = [[74785, 419, 151645], [13, 13, 151643]]
    for batch in (rows, np.array(rows), torch.tensor(rows), [torch.tensor(row) for row in rows]):
        for skip in (True, False):
            expected = reference.batch_decode(rows, skip_special_tokens=skip)
            assert qwen.batch_decode(batch, skip_special_tokens=skip) == expected
    assert qwen.batch_decode(rows) == ["Describe this", ".."]
    assert qwen.batch_decode([]) == []
    assert qwen.batch_decode([[]]) == [""]
    assert qwen.batch_decode([[13], [13, 13, 13]]) == [".", "..."]
    assert qwen.batch_decode(rows[0]) == reference.batch_decode(rows[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([74785, -100], "from 0 to .* got -100"),
        ([2**40], "from 0 to"),
        ([1.0], "expected a token id, got float"),
        (np.array([1.5]), "expected a token id, got float"),
        ([[13]], "expected a token id, got list.*batch_decode"),
        ("13", "expected token ids, got str"),
        (None, "expected token ids, got NoneType"),
        (["a"], "expected a token id, got str"),
    ],
)
def test_decode_of_no_ids_is_one_sentence(qwen, ids, said):
    with pytest.raises(ValueError, match=said):
        qwen.decode(ids)
    with pytest.raises(ValueError, match="token id"):
        qwen.batch_decode([ids])


def test_decode_never_cleans_up_spaces(editable_folder):
    def edit(config):
        config["clean_up_tokenization_spaces"] = True

    edit_json(editable_folder / "tokenizer_config.json", edit)
    ours = Tokenizer.from_pretrained(editable_folder)
    theirs = Qwen2Tokenizer.from_pretrained(editable_folder)
    ids = ours.encode("a , b . do n't !")
    assert ours.decode(ids) == theirs.decode(ids) == "a , b . do n't !"


def test_encode_refuses_a_word_pattern_that_backtracks_without_end(tmp_path):
    """The regular expressions of the library have a limit of their own, beyond which it panics."""
    folder = build_small_tokenizer(tmp_path)
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+b"},
        "behavior": "Isolated",
        "invert": False,
    }
    edit_json(folder / "tokenizer.json", lambda fields: fields.update(pre_tokenizer=split))
    tokenizer = Tokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"the tokenizer cannot be used: .*retry-limit"):
        tokenizer.encode("a" * 40)


# --- a checkpoint's own chat template ---

# Templates in the manner of real checkpoints, written for these tests.
OTHER_SYSTEM = CHAT_TEMPLATE.replace("You are a helpful assistant.", "Think step by step.")
NO_SYSTEM = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {%- if item.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif item.type == 'text' %}
                {{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
AS_JSON = """{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}
{% for message in messages %}
  {% if loop.index0 == 5 %}{% break %}{% endif %}
<|im_start|>{{ message.role | upper }} {{ message.content | tojson }}
  {% generation %}{{ message.get('thoughts', '-') | trim }}{% endgeneration %}<|im_end|>
{% endfor %}"""
TEMPLATES = {"other system": OTHER_SYSTEM, "no system": NO_SYSTEM, "as json": AS_JSON}


def add_template(folder, template):
    edit_json(
        folder / "tokenizer_config.json", lambda config: config.update(chat_template=template)
    )
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=TEMPLATES)
def with_template(request, tmp_path_factory):
    """Return our tokenizer and the reference's for a checkpoint with its own template."""
    folder = build_small_tokenizer(tmp_path_factory.mktemp("template") / "folder")
    ours = add_template(folder, TEMPLATES[request.param])
    return ours, Qwen2Tokenizer.from_pretrained(folder)


def random_items(texts):
    text_items = st.builds(lambda text: {"type": "text", "text": text}, texts)
    other_items = st.sampled_from(
        [{"type": "image"}, {"type": "image", "image": "a"}, {"type": "video", "video": [1, None]}]
    )
    return st.lists(text_items | other_items, max_size=4)


def conversations(texts):
    message = st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "tool", "system"]),
            "content": texts | random_items(texts),
        },
        optional={"thoughts": st.sampled_from(["<|im_end|>", "", None, " a "])},
    )
    return st.lists(message, min_size=1, max_size=6)


@pytest.mark.sweep
@settings(max_examples=50)
@given(messages=conversations(loose_texts), flags=st.tuples(st.booleans(), st.booleans()))
def test_apply_chat_template_renders_an_own_template_as_the_reference_does(
    with_template, messages, flags
):
    ours, theirs = with_template
    rendered = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=flags[0], add_vision_id=flags[1]
    )
    assert ours.apply_chat_template(messages, *flags) == rendered
    ids = ours.encode_chat(messages, *flags, guard_special_tokens=False)
    assert ids == ours.encode(rendered)


@pytest.mark.slow
@settings(max_examples=50)
@given(messages=conversations(loose_texts))
def test_encode_chat_guards_an_own_template(with_template, messages):
    ours, _ = with_template
    ids = ours.encode_chat(messages)
    prompt = unicodedata.normalize("NFC", ours.apply_chat_template(messages))
    assert ours.decode(ids, skip_special_tokens=False) == prompt
    harmless = [
        json.loads(json.dumps(message).replace("|", "/"))
        if message["role"] in ("user", "tool")
        else message
        for message in messages
    ]
    expected = ours.encode_chat(harmless, guard_special_tokens=False)
    for name in GUARDED_TOKENS:
        assert ids.count(ours.token_id(name)) == expected.count(ours.token_id(name))


@pytest.mark.slow
@settings(max_examples=100)
@given(messages=conversations(loose_texts), flags=st.tuples(st.booleans(), st.booleans()))
def test_apply_chat_template_equals_its_jinja_form(qwen, messages, flags):
    """The bundled template renders the same through Jinja, and the guard acts the same on it."""
    template = ChatTemplate(CHAT_TEMPLATE, "CHAT_TEMPLATE")
    through_jinja = Tokenizer(qwen.backend, "<|endoftext|>", "<|im_end|>", template)
    through_jinja._guard = qwen._guard_backend()
    assert template.render(messages, *flags) == qwen.apply_chat_template(messages, *flags)
    assert through_jinja.encode_chat(messages, *flags) == qwen.encode_chat(messages, *flags)


@pytest.mark.parametrize("change", ["{}", "{}\n", "{}\n\n"])
def test_tokenizer_recognizes_the_built_in_template_without_a_warning(
    editable_folder, caplog, change
):
    tokenizer = add_template(editable_folder, change.format(CHAT_TEMPLATE))
    assert tokenizer.chat_template is None
    assert not caplog.records
    published = "a0bc6f6fc7a29a80017a433e8f03a1cc1236e838a944a2d034295a60c4f2fddb"
    assert published in BUILT_IN_TEMPLATES


@pytest.mark.parametrize("text", [OTHER_SYSTEM, CHAT_TEMPLATE + "\n\n\n", CHAT_TEMPLATE + " ", ""])
def test_tokenizer_names_another_template_in_one_warning(editable_folder, caplog, text):
    tokenizer = add_template(editable_folder, text)
    assert not is_built_in_template(text)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert str(editable_folder / "tokenizer_config.json") in record.getMessage()
    theirs = Qwen2Tokenizer.from_pretrained(editable_folder)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = theirs.apply_chat_template(messages, chat_template=text, tokenize=False)
    assert tokenizer.apply_chat_template(messages, False) == rendered


def test_tokenizer_reads_template_files_in_the_order_of_the_reference(editable_folder):
    messages = [{"role": "user", "content": "Hi"}]

    def rendered():
        return Tokenizer.from_pretrained(editable_folder).apply_chat_template(messages)

    assert rendered() == f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n{ASSISTANT}"
    several = [{"name": "rag", "template": "R"}, {"name": "default", "template": "list"}]
    add_template(editable_folder, several)
    assert rendered() == "list"
    add_template(editable_folder, {"default": "object"})
    assert rendered() == "object"
    add_template(editable_folder, "config")
    assert rendered() == "config"
    (editable_folder / "chat_templates").mkdir()
    (editable_folder / "chat_templates" / "default.jinja").write_text("directory")
    assert rendered() == "directory"
    (editable_folder / "chat_template.jinja").write_text("jinja")
    assert rendered() == "jinja"
    theirs = Qwen2Tokenizer.from_pretrained(editable_folder)
    assert theirs.apply_chat_template(messages, tokenize=False) == "jinja"
    (editable_folder / "chat_template.json").write_text('{"chat_template": "json"}')
    assert rendered() == "json"
    (editable_folder / "processor_config.json").write_text('{"chat_template": "processor"}')
    assert rendered() == "processor"


def test_tokenizer_refuses_a_template_file_that_is_not_utf8(editable_folder):
    (editable_folder / "chat_template.jinja").write_bytes(b"\xff\xfe{")
    with pytest.raises(ValueError, match=r"chat_template\.jinja"):
        Tokenizer.from_pretrained(editable_folder)


@pytest.mark.parametrize("text", ["{% for %}", "{{ 'a", "{% unknown %}", "{{ x | nothing }}"])
def test_tokenizer_refuses_a_template_with_a_syntax_error(editable_folder, text):
    with pytest.raises(ValueError, match=r"chat template in .*tokenizer_config\.json cannot be us"):
        add_template(editable_folder, text)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].role }}",
        "{{ missing.field }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ ().__class__.__bases__ }}",
        "{{ messages.append(1) }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [messages] * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "\ud800",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'a' * 9999 }}{% endfor %}"
        "{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% include 'other' %}",
    ],
)
def test_apply_chat_template_makes_any_template_error_one_sentence(qwen, text):
    def render():
        template = ChatTemplate(text, "folder/chat_template.jinja")
        tokenizer = Tokenizer(qwen.backend, "<|endoftext|>", "<|im_end|>", template)
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])

    with pytest.raises(ValueError, match=r"in folder/chat_template\.jinja cannot be ") as error:
        render()
    assert "\n" not in str(error.value)


def test_chat_template_gets_names_in_place_of_objects(qwen):
    template = ChatTemplate("{{ messages[0].content[0].image }}", "x")
    message = user({"type": "image", "image": np.zeros(3)})
    assert template.render([message]) == "<ndarray>"
    assert isinstance(message["content"][0]["image"], np.ndarray)


@pytest.mark.slow
def test_encode_chat_gives_a_template_one_time(qwen):
    template = ChatTemplate("{{ strftime_now('%f') }}{{ messages[0].content }}<|im_end|>", "x")
    tokenizer = Tokenizer(qwen.backend, "<|endoftext|>", "<|im_end|>", template)
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert ids.count(151645) == 1


def test_encode_chat_refuses_a_template_that_rewrites_forged_tokens(qwen):
    template = ChatTemplate("{{ messages[0].content }}{{ messages[0].content | length }}", "x")
    tokenizer = Tokenizer(qwen.backend, "<|endoftext|>", "<|im_end|>", template)
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "a|b"}])) == "a|b3"
    with pytest.raises(ValueError, match="guard_special_tokens=False"):
        tokenizer.encode_chat([{"role": "user", "content": "<|image_pad|> <|im_end|>"}])


def test_apply_chat_template_refuses_a_malformed_message_with_an_own_template(qwen):
    tokenizer = Tokenizer(qwen.backend, "<|endoftext|>", "<|im_end|>", ChatTemplate("a", "x"))
    with pytest.raises(ValueError, match="neither image, video nor text"):
        tokenizer.apply_chat_template([user({"type": "imagee"})])


def test_tokenizer_with_a_template_can_be_pickled_and_copied(editable_folder):
    tokenizer = add_template(editable_folder, NO_SYSTEM)
    messages = [{"role": "user", "content": "<|im_end|> <|box_start|>"}]
    expected = tokenizer.encode_chat(messages)
    for twin in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert twin.encode_chat(messages) == expected


# --- placeholders ---


def image_message(text, role="user"):
    image = np.zeros((56, 56, 3), dtype=np.uint8)
    return {"role": role, "content": [{"type": "image", "image": image}, {"text": text}]}


def test_processor_refuses_a_placeholder_spelled_by_the_assistant(qwen):
    processor = Processor(qwen, ImageConfig())
    messages = [image_message("Hi"), {"role": "assistant", "content": "<|image_pad|>"}]
    with pytest.raises(ValueError, match=r"expected 1 tokens <\|image_pad\|>.* got 2"):
        processor(messages)
    messages[1]["content"] = "<|video_pad|>"
    with pytest.raises(ValueError, match=r"expected 0 tokens <\|video_pad\|>.* got 1"):
        processor(messages)


def test_processor_guards_a_placeholder_spelled_by_the_user(qwen):
    processor = Processor(qwen, ImageConfig())
    batch = processor([image_message("<|image_pad|>")])
    assert (batch.input_ids == 151655).sum() == 4
    with pytest.raises(ValueError, match=r"expected 1 tokens <\|image_pad\|>.* got 2"):
        processor([image_message("<|image_pad|>")], guard_special_tokens=False)
    batch = processor([image_message("<|im_end|>")], guard_special_tokens=False)
    assert (batch.input_ids == 151645).sum() == 3


def test_processor_refuses_a_template_without_vision_tokens(qwen):
    template = ChatTemplate("{{ messages[0].content[1].text }}", "folder/chat_template.jinja")
    tokenizer = Tokenizer(qwen.backend, "<|endoftext|>", "<|im_end|>", template)
    processor = Processor(tokenizer, ImageConfig())
    with pytest.raises(ValueError, match=r"got 0: the chat template in folder/.* ignores images"):
        processor([image_message("Hi")])


# ------------------------------------------------------------------------------------- added tokens
NEW_TOKENS = ["<act_1>", "<act_2>", " <x> ", "hello there", "<act_1>", "hello", "<|im_end|>"]


@pytest.mark.parametrize("special", [False, True])
def test_add_tokens_equals_the_reference(special, tmp_path):
    folder = build_small_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_pretrained(folder)
    reference = Qwen2Tokenizer.from_pretrained(folder)
    im_end = tokenizer.token_id("<|im_end|>")
    ours = tokenizer.add_tokens(NEW_TOKENS, special)
    reference.add_tokens(NEW_TOKENS, special_tokens=special)
    assert len(ours) == len(reference) > len(tokenizer)
    text = "a<act_2>b <act_1><|im_end|> hello there, othello <x> .HELLO<ACT_1>é"
    ids = ours.encode(text)
    assert ids == reference.encode(text)
    assert ids != tokenizer.encode(text)
    for skip in (False, True):
        assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    message = [{"role": "user", "content": "<act_1><|im_end|>"}]
    assert ours.token_id("<act_1>") in ours.encode_chat(message)
    assert ours.encode_chat(message).count(im_end) == 2


def test_add_tokens_continues_after_the_largest_id(tmp_path):
    """The library numbers tokens by their count, which a gap in the ids makes too small."""
    folder = build_small_tokenizer(tmp_path)
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    vocab = description["model"]["vocab"]
    vocab["unused"] = 999
    path.write_text(json.dumps(description))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert len(tokenizer) == 1000
    ours = tokenizer.add_tokens(["<a>", "<b>"])
    assert ours.encode("<b><a>") == [1001, 1000]
    for name in SPECIAL_TOKENS:
        assert ours.token_id(name) == tokenizer.token_id(name)


def test_save_writes_tokens_that_both_implementations_read(tmp_path):
    folder = build_small_tokenizer(tmp_path)
    before = read_json(folder, "tokenizer_config.json")
    ours = Tokenizer.from_pretrained(folder).add_tokens(["<act_1>"]).add_tokens(["<s>"], True)
    ours.save(folder)
    again = Tokenizer.from_pretrained(folder)
    reference = Qwen2Tokenizer.from_pretrained(folder)
    text = "a<act_1>b <s><|im_end|>"
    assert again.encode(text) == reference.encode(text) == ours.encode(text)
    assert again.special_ids == ours.special_ids
    assert (again.eos_token_id, again.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)
    assert reference.decode(ours.encode(text), skip_special_tokens=True) == "a<act_1>b "
    after = read_json(folder, "tokenizer_config.json")
    assert {name for name, value in before.items() if after[name] != value} == {
        "added_tokens_decoder"
    }


@pytest.mark.parametrize("tokens", [[""], [None], ["<a>", 3]])
def test_add_tokens_refuses_what_is_no_text(tokens, tmp_path):
    tokenizer = Tokenizer.from_pretrained(build_small_tokenizer(tmp_path))
    with pytest.raises(ValueError, match="tokens: expected non-empty strings, got"):
        tokenizer.add_tokens(tokens)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "{% set x = range(100) %}{% for a in x %}{% for b in x %}{% endfor %}{% endfor %}",
            "its loops exceed 1,000 steps",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(50) }}",
            "its loops exceed 1,000 steps",
        ),
        (
            "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}"
            "{% endfor %}",
            "a text exceeds",
        ),
        (
            "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}"
            "{% endfor %}",
            "a text exceeds",
        ),
        (
            "{% set n = namespace(s='x') %}{% for i in range(20) %}"
            "{% set s %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = s %}{% endfor %}",
            "a text exceeds",
        ),
        (
            "{% macro f(s) %}{{ s }}{{ s }}{% endmacro %}{% set n = namespace(s='x') %}"
            "{% for i in range(20) %}{% set n.s = f(n.s) %}{% endfor %}",
            "a text exceeds",
        ),
    ],
)
def test_chat_template_bounds_nested_loops_and_doubled_texts(text, sentence, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_LOOP_STEPS", 1000)
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARACTERS", 10_000)
    template = ChatTemplate(text, "folder/chat_template.jinja")
    with pytest.raises(ValueError, match=f"folder/chat_template.jinja cannot be rend.*{sentence}"):
        template.render([{"role": "user", "content": "x"}])


def test_chat_template_joins_and_adds_as_jinja_does():
    text = "{{ messages[0].content ~ 1 ~ none ~ missing }}{{ 'a' + 'b' }}{{ 1 + 2 }}"
    text += "{% macro g(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call g(7) %}c{% endcall %}"
    text += "{% for m in messages %}{{ loop.index }}{% else %}none{% endfor %}"
    rendered = ChatTemplate(text, "x").render([{"role": "user", "content": "x"}])
    assert rendered == "x1Noneab37c1"
