"""tokenizer.py beside transformers, beside tiktoken, and beside golden ids, all with the real Qwen2 vocabulary."""

import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from real_vocabulary import CONTROL_TOKENS, WORD_PATTERN, read_ranks
from texts import IDS, TEXTS
from transformers import Qwen2Tokenizer

from tokenizer import BYTE_OF, StreamDecoder, Tokenizer, content_kind

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8")
)

ids_of_any_kind = st.lists(
    st.one_of(
        st.integers(0, 255),  # single bytes, most of which are no UTF-8 together
        st.integers(0, 152063),
        st.integers(151643, 151656),  # control tokens
        st.sampled_from([172, 253, 246, 222, 9284]),  # parts of 😀
    ),
    max_size=40,
)
texts_of_any_kind = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(
            [*CONTROL_TOKENS, " ", "\n", "'s", "é", "e\u0301", "👩‍👧", "\u0e33", "1", "ﬀ"]
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
    """tiktoken's own BPE over the ranks: it shares neither code nor the list of merges with `tokenizers`."""
    ranks = read_ranks()
    control = {name: len(ranks) + n for n, name in enumerate(CONTROL_TOKENS)}
    return tiktoken.Encoding(
        "qwen2", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=control
    )


def streamed(tokenizer, ids, skip_special_tokens=True):
    decoder = StreamDecoder(tokenizer, skip_special_tokens)
    return [decoder.push(id) for id in ids] + [decoder.finish()]


# --- the vocabulary that the tests build ---


def test_built_vocabulary_is_the_published_one(qwen, qwen_tokenizer_folder):
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


def test_merges_rebuild_every_token(qwen):
    for spelled, id in qwen.backend.get_vocab(with_added_tokens=False).items():
        assert [token.id for token in qwen.backend.model.tokenize(spelled)] == [id]


# --- text to ids and back ---


@pytest.mark.parametrize("name", TEXTS)
def test_ids_equal_reference(qwen, reference, by_rank, name):
    text = TEXTS[name]
    ids = qwen.encode(text)
    assert ids == reference(text)["input_ids"]
    assert ids == by_rank.encode(unicodedata.normalize("NFC", text), allowed_special="all")
    assert ids == GOLDEN["ids"][name]


@pytest.mark.parametrize("name", [*TEXTS, *IDS])
def test_decoded_text_equals_reference(qwen, reference, name):
    ids = IDS.get(name) or GOLDEN["ids"][name]
    without_control, with_control = GOLDEN["text"][name]
    for skip, golden in ((True, without_control), (False, with_control)):
        text = qwen.decode(ids, skip_special_tokens=skip)
        assert text == reference.decode(ids, skip_special_tokens=skip)
        assert text == golden
    assert qwen.decode(ids) == without_control  # skipping is the default


@settings(max_examples=500)
@given(text=texts_of_any_kind)
def test_any_text_equals_reference(qwen, reference, text):
    ids = qwen.encode(text)
    assert ids == reference(text)["input_ids"]
    assert qwen.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@settings(max_examples=500)
@given(ids=ids_of_any_kind)
def test_any_ids_decode_as_reference(qwen, reference, by_rank, ids):
    for skip in (True, False):
        assert qwen.decode(ids, skip_special_tokens=skip) == reference.decode(
            ids, skip_special_tokens=skip
        )
    known = [id for id in ids if id < by_rank.n_vocab]
    assert qwen.decode(ids, skip_special_tokens=False) == by_rank.decode(known, errors="replace")


def test_no_token_is_put_in_front_or_behind(qwen):
    assert qwen.encode("") == []
    assert qwen.decode([]) == ""
    assert qwen.encode("a") == [64]


def test_saved_truncation_and_padding_are_ignored(qwen_tokenizer_folder, tmp_path):
    description = json.loads((qwen_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    description["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    shutil.copy(qwen_tokenizer_folder / "tokenizer_config.json", tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).encode("Describe this image.") == [
        74785,
        419,
        2168,
        13,
    ]


def test_folder_saved_by_the_reference(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    saved = Tokenizer.from_pretrained(tmp_path)
    assert (saved.pad_token_id, saved.eos_token_id) == (151643, 151645)
    assert saved.encode(TEXTS["all control tokens"]) == GOLDEN["ids"]["all control tokens"]


# --- streaming ---


@pytest.mark.parametrize("name", [*TEXTS, *IDS])
@pytest.mark.parametrize("skip", [True, False])
def test_stream_joins_to_the_decoded_text(qwen, name, skip):
    ids = IDS.get(name) or GOLDEN["ids"][name]
    assert "".join(streamed(qwen, ids, skip)) == qwen.decode(ids, skip_special_tokens=skip)


@settings(max_examples=500)
@given(ids=ids_of_any_kind, skip=st.booleans())
def test_any_stream_joins_to_the_decoded_text(qwen, ids, skip):
    assert "".join(streamed(qwen, ids, skip)) == qwen.decode(ids, skip_special_tokens=skip)


def test_stream_gives_a_character_when_it_is_whole_and_not_before(qwen):
    assert streamed(qwen, [172, 253, 246, 222, 419]) == ["", "", "", "😀", " this", ""]
    assert streamed(qwen, [9284, 151645, 246, 222]) == ["", "", "", "😀", ""]
    assert streamed(qwen, [9284, 419]) == ["", "\ufffd this", ""]
    assert streamed(qwen, [419, 9284]) == [" this", "", "\ufffd"]


def test_stream_does_not_wait_for_bytes_that_cannot_come(qwen):
    assert streamed(qwen, [222, 222, 222]) == ["\ufffd"] * 3 + [""]  # 0x80 starts no character
    whole = qwen.encode("\ufffd")
    assert (
        "".join(streamed(qwen, whole)[: len(whole)]) == "\ufffd"
    )  # U+FFFD itself is a character like any other


def test_stream_splits_no_character_of_real_text(qwen):
    for text in TEXTS.values():
        text = unicodedata.normalize("NFC", text)
        if "\ufffd" not in text:
            pieces = streamed(qwen, qwen.encode(text), skip_special_tokens=False)
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)


def test_stream_shows_control_tokens_on_request(qwen):
    ids = qwen.encode("a<|im_end|>")
    assert streamed(qwen, ids) == ["a", "", ""]
    assert streamed(qwen, ids, skip_special_tokens=False) == ["a", "<|im_end|>", ""]


def test_stream_decodes_added_tokens_that_are_no_control_tokens(qwen_tokenizer_folder):
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


def test_byte_alphabet_spells_each_byte_once():
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
        f"{SYSTEM}<|im_start|>user\nHi<|im_end|>\n<|im_start|>system\nBe brief.<|im_end|>\n{ASSISTANT}",
    ),
    "untrimmed text": (
        [
            {"role": "user", "content": "\n  a \r\n"},
            user({"type": "text", "text": " b "}, {"text": "\n"}),
        ],
        f"{SYSTEM}<|im_start|>user\n\n  a \r\n<|im_end|>\n<|im_start|>user\n b \n<|im_end|>\n{ASSISTANT}",
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
def test_prompt(qwen, name):
    messages, expected = PROMPTS[name]
    assert qwen.apply_chat_template(messages) == expected
    without = expected.removesuffix(ASSISTANT)
    assert qwen.apply_chat_template(messages, add_generation_prompt=False) == without


def test_vision_ids_count_over_the_whole_conversation(qwen):
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
        f"<|im_start|>user\nAnd Picture 2: {IMAGE}Video 1: {VIDEO}Picture 3: {IMAGE}Video 2: {VIDEO}<|im_end|>\n"
    )
    assert qwen.apply_chat_template(messages, add_vision_id=True) == numbered + ASSISTANT
    for label in ("Picture 1: ", "Picture 2: ", "Picture 3: ", "Video 1: ", "Video 2: "):
        numbered = numbered.replace(label, "")
    assert qwen.apply_chat_template(messages) == numbered + ASSISTANT


def test_prompt_ids_hold_each_control_token_once(qwen):
    ids = qwen.encode(qwen.apply_chat_template(PROMPTS["image and text"][0]))
    control = [id for id in ids if id >= 151643]
    assert control == [151644, 151645, 151644, 151652, 151655, 151653, 151645, 151644]


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
def test_malformed_message(qwen, messages, said):
    with pytest.raises(ValueError, match=said):
        qwen.apply_chat_template(messages)


def test_error_does_not_print_a_whole_picture():
    with pytest.raises(ValueError, match="neither") as error:
        content_kind({"data": "x" * 10_000})
    assert len(str(error.value)) < 200


def test_lone_surrogate(qwen):
    with pytest.raises(ValueError, match="not a valid Unicode string"):
        qwen.encode("a\udc80b")


@pytest.mark.parametrize("missing", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_file(qwen_tokenizer_folder, tmp_path, missing):
    shutil.copytree(qwen_tokenizer_folder, tmp_path / "folder")
    (tmp_path / "folder" / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {missing} in .*folder"):
        Tokenizer.from_pretrained(tmp_path / "folder")


WORDS = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "decoder": %s}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1", "tokenizer.json is not a JSON file"),
        ('{"version": "1.0", "added_tok', "tokenizer.json is not a JSON file"),
        ("[]", "tokenizer.json should hold a JSON object, but holds a list"),
        ('{"decoder": null}', "cannot be used: Model missing"),
        (WORDS % '{"type": "WordPiece", "prefix": "##", "cleanup": true}', "is not byte-level"),
        (WORDS % "null", "is not byte-level"),
    ],
)
def test_unusable_tokenizer_file(tmp_path, content, said):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("lacking", ["<|image_pad|>", "<|im_end|>", "<|video_pad|>"])
def test_missing_control_token(qwen_tokenizer_folder, tmp_path, lacking):
    text = (qwen_tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace(lacking, "<|other|>"), encoding="utf-8")
    shutil.copy(qwen_tokenizer_folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match="no token " + lacking.replace("|", r"\|")):
        Tokenizer.from_pretrained(tmp_path)


def test_control_tokens_named_by_the_config(qwen_tokenizer_folder, tmp_path):
    shutil.copy(qwen_tokenizer_folder / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"pad_token": {"content": "<|vision_pad|>"}, "eos_token": "<|endoftext|>"}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (151654, 151643)

    config.write_text('{"pad_token": null, "eos_token": "<|endoftext|>"}')
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json in .* names \[None, '<\|endoftext\|>'\]"
    ):
        Tokenizer.from_pretrained(tmp_path)

    config.write_text('{"pad_token": "<|pad|>", "eos_token": "<|endoftext|>"}')
    with pytest.raises(ValueError, match=r"no token <\|pad\|>"):
        Tokenizer.from_pretrained(tmp_path)


# --- text is text ---

loose_texts = st.lists(
    st.sampled_from([*CONTROL_TOKENS, "\n", " ", "e", "\u0301", "word", "'s", "1", "<|", "|>"])
).map("".join)


@given(texts=st.lists(loose_texts | st.text(), min_size=1, max_size=4))
def test_only_the_template_writes_control_tokens(qwen, by_rank, texts):
    """What a message spells, control tokens included, becomes the ids of ordinary text, by tiktoken's BPE."""
    control = {name: 151643 + n for n, name in enumerate(CONTROL_TOKENS)}
    start, end = control["<|im_start|>"], control["<|im_end|>"]

    def ordinary(text):
        return by_rank.encode_ordinary(unicodedata.normalize("NFC", text))

    texts = [text.encode("utf-8", "ignore").decode() for text in texts]  # without lone surrogates
    ids = qwen.encode_chat([{"role": "user", "content": [{"text": text} for text in texts]}])
    system = [start, *ordinary("system\nYou are a helpful assistant."), end, *ordinary("\n")]
    asked = [start, *ordinary("user\n" + "".join(texts)), end, *ordinary("\n")]
    assert ids == system + asked + [start, *ordinary("assistant\n")]


@given(
    texts=st.lists(st.text(), max_size=4),
    add_generation_prompt=st.booleans(),
    add_vision_id=st.booleans(),
)
def test_chat_ids_of_text_without_control_tokens_are_those_of_the_prompt(
    qwen, reference, texts, add_generation_prompt, add_vision_id
):
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    messages = [
        user({"type": "image"}, {"text": text}, {"type": "video"}, {"text": text[::-1]})
        for text in texts
    ]
    prompt = qwen.apply_chat_template(messages, add_generation_prompt, add_vision_id)
    expected = reference.encode(prompt) if prompt else []
    assert qwen.encode_chat(messages, add_generation_prompt, add_vision_id) == expected


def test_encode_goes_on_knowing_control_tokens(qwen):
    qwen.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    with pytest.raises(ValueError, match="not a valid Unicode string"):
        qwen.encode_chat([{"role": "user", "content": "\ud800"}])
    assert qwen.encode("<|im_end|>") == [151645]
