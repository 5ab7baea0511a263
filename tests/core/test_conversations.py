"""conversations.py: the layouts that people have become messages, and no image is lost silently."""

import base64
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from apps.batch import main
from command_line import BUNDLED_CHECKPOINT
from conversations import content_kind, names_media, read_conversation
from preprocess import Processor

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDE, TALL, SHAPES = (str(EXAMPLES / f"{name}.png") for name in ("wide", "tall", "shapes"))


def text(words):
    return {"type": "text", "text": words}


def image(source):
    return {"type": "image", "image": source}


def user(*content):
    return {"role": "user", "content": list(content)}


EXPECTED = [user(image(WIDE), text("What"), image(TALL), text("?"))]
BARE = user({"type": "image", "text": None}, text("What"), {"type": "image"}, text("?"))
MARKED = {"role": "user", "content": "<image>What<image>?"}
SHAREGPT = {"from": "human", "value": "<image>What<image>?"}


@pytest.mark.parametrize(
    "line",
    [
        EXPECTED,
        {"messages": EXPECTED, "images": None, "videos": [], "id": 3, "label": "x"},
        {"messages": [MARKED], "images": [WIDE, TALL]},
        {"messages": [MARKED], "images": [{"path": WIDE, "bytes": None}, {"url": TALL}]},
        {"messages": [user(text("<image>What<image>?"))], "images": [WIDE, TALL]},
        {"messages": [BARE], "images": [WIDE, TALL]},
        {"messages": [user({"type": "image"}, text("What<image>?"))], "images": [WIDE, TALL]},
        {"conversations": [SHAREGPT], "images": [WIDE, TALL]},
        {"conversations": [SHAREGPT], "image": [WIDE, TALL], "image_id": "a", "file_size": "9 MB"},
        [MARKED | {"images": [WIDE, TALL]}],
        [
            user(
                {"type": "image_url", "image_url": {"url": WIDE, "detail": "low"}, "text": None},
                text("What"),
                {"type": "input_image", "image_url": TALL},
                {"type": "input_text", "text": "?"},
            )
        ],
        [
            user(
                {"type": "image", "source": {"type": "url", "url": WIDE}},
                text("What"),
                image(TALL),
                text("?"),
            )
        ],
        [
            user(
                {"image": WIDE, "video": None},
                {"text": "What", "image": None},
                image(TALL),
                text("?"),
            )
        ],
    ],
)
def test_read_conversation_keeps_the_order_of_each_layout(line):
    [message] = read_conversation(line)
    found = [item.get("text") or source(item) for item in message["content"]]
    assert found == [WIDE, "What", TALL, "?"]
    assert [content_kind(item) for item in message["content"]] == ["image", "text"] * 2


def source(item):
    value = item.get("image") or item.get("image_url")
    return value["url"] if isinstance(value, dict) else value


def test_read_conversation_puts_images_without_a_place_first():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    expected = [image(WIDE), image(TALL), text("What?")]
    for line in (
        {"messages": messages, "images": [WIDE, TALL]},
        [messages[0], messages[1] | {"images": [WIDE, TALL]}],
    ):
        found = read_conversation(line)
        assert found[1]["content"] == expected
        assert read_conversation(found) == found


def test_read_conversation_counts_markers_over_all_messages():
    messages = [
        {"role": "user", "content": "<image>First <video>"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And <image>"},
    ]
    found = read_conversation({"messages": messages, "images": [WIDE, TALL], "videos": ["a.mp4"]})
    video = {"type": "video", "video": "a.mp4"}
    assert found[0]["content"] == [image(WIDE), text("First "), video]
    assert found[2]["content"] == [text("And "), image(TALL)]


def test_read_conversation_accepts_sharegpt_roles_and_system_prompt():
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    found = read_conversation({"conversations": turns, "system": "Be brief."})
    assert [message["role"] for message in found] == ["system", "user", "assistant"]
    assert found[0]["content"] == [text("Be brief.")]


def test_processor_reads_base64_of_ollama_and_anthropic():
    content = base64.b64encode(Path(SHAPES).read_bytes()).decode()
    processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
    expected = processor([user(image(SHAPES), text("Hi"))])
    block = {"type": "base64", "media_type": "image/png", "data": content}
    for line in (
        [{"role": "user", "content": "Hi", "images": [content]}],
        [{"role": "user", "content": "Hi", "images": [SHAPES]}],
        [user({"type": "image", "source": block, "cache_control": {"type": "x"}}, text("Hi"))],
        [{"messages": [{"role": "user", "content": "Hi"}], "images": [SHAPES]}],
    ):
        batch = processor(line)
        assert np.array_equal(batch.input_ids, expected.input_ids)
        assert np.array_equal(batch.pixel_values, expected.pixel_values)


ASK = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ({"messages": [MARKED], "images": [WIDE]}, "1 images are given for 2 markers <image>"),
        ({"messages": [MARKED], "images": []}, "0 images are given for 2 markers <image>"),
        ({"messages": [MARKED], "images": [WIDE] * 3}, "3 images are given for 2 markers"),
        ({"messages": [BARE], "images": [WIDE]}, "1 images are given for 2 image items without"),
        ([MARKED | {"images": [WIDE]}], "message 0: 1 images are given for 2 markers"),
        ({"messages": ASK, "images": [WIDE, None]}, r"images\[1\] names no image"),
        ({"messages": ASK, "images": [WIDE], "image": TALL}, "got both"),
        ({"messages": ASK, "audios": ["a.wav"]}, "the line has the key 'audios'"),
        ({"messages": ASK, "image_path": WIDE}, "the line has the key 'image_path'"),
        ({"messages": ASK, "imageUrls": [WIDE]}, "the line has the key 'imageUrls'"),
        ({"messages": ASK, "attachments": [{}]}, "the line has the key 'attachments'"),
        ([ASK[0] | {"image_url": WIDE}], "message 0 has the key 'image_url'"),
        ([ASK[0] | {"audio": "a.wav"}], "message 0 has the key 'audio'"),
        ([user(text("Hi") | {"images": [WIDE]})], "a text item has the key 'images'"),
        ([user(text("Hi") | {"path": WIDE})], "a text item has the key 'path'"),
        ([user(image(WIDE) | {"audio": "x"})], "an image item has the key 'audio'"),
        ([user(image(WIDE) | {"video": "x"})], "an image item has the key 'video'"),
        ([user(image(WIDE) | {"path": TALL})], "got image and path"),
        ([user({"type": "input_audio", "input_audio": {}})], "neither image, video nor text"),
        ([user({"type": "input_image", "file_id": "f"})], "neither image, video nor text"),
        (
            [user({"type": "image", "source": {"type": "file", "file_id": "f"}})],
            "expected an image with a source",
        ),
        (
            [user({"type": "document", "source": {"type": "base64", "data": "x"}})],
            "expected an image with a source",
        ),
        ({"conversations": [{"from": "human"}]}, "expected text under value"),
        ({"prompt": "Hi"}, "expected a list of messages"),
        ("Hi", "expected a list of messages"),
    ],
)
def test_read_conversation_refuses_media_that_would_be_lost(line, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_conversation(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "image",
        "img_path",
        "input_image",
        "videoFile",
        "frames",
        "pixel_values",
        "image_b64",
        "audio",
        "media",
        "file",
        "url",
        "jpg",
        "screenshots",
    ],
)
def test_names_media_accepts_a_key_that_could_carry_media(key):
    assert names_media(key)


@pytest.mark.parametrize(
    "key",
    [
        "id",
        "label",
        "source",
        "tools",
        "profile",
        "objects",
        "image_id",
        "image_size",
        "framework",
        "videogame",
        "solution",
        "file_type",
        "curly",
    ],
)
def test_names_media_excludes_a_harmless_key(key):
    assert not names_media(key)


def test_read_conversation_keeps_a_marker_without_any_image_as_text():
    with pytest.warns(UserWarning, match="<image> stays text, as the conversation has no image"):
        [message] = read_conversation([MARKED])
    assert message["content"] == [text(MARKED["content"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_conversation([user(image(WIDE), text("What does <image> mean in SVG?"))])


def test_read_conversation_warns_about_text_in_an_image_item():
    with pytest.warns(UserWarning, match="the text of an item with image is not used"):
        read_conversation([user({"type": "text", "text": "Hi", "image": WIDE})])


def test_batch_main_reads_foreign_layouts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHAPES, "shapes.png")
    content = base64.b64encode(Path("shapes.png").read_bytes()).decode()
    question = "How many shapes are there?"
    lines = [
        {"messages": [{"role": "user", "content": f"<image>{question}"}], "images": ["shapes.png"]},
        {"messages": [{"role": "user", "content": question, "images": [content]}]},
        {
            "id": "c",
            "conversations": [{"from": "human", "value": f"<image>{question}"}],
            "image": "shapes.png",
        },
        {"messages": [{"role": "user", "content": question}], "image_path": "shapes.png"},
    ]
    Path("in.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert main(["in.jsonl", "--out", "out.jsonl", "--quiet"]) == 0
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    records.sort(key=lambda record: record["line"])
    assert [record.get("answer") for record in records] == ["Four.", "Four.", "Four.", None]
    assert records[2]["id"] == "c"
    assert "'image_path'" in records[3]["error"]
