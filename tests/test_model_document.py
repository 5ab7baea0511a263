"""What the model's user documentation shows, done here: each of its examples, in its order, under our names.

The document is that of transformers for Qwen2-VL. Its examples are run on the bundled model, on pictures and a film
that the tests make. The prompts are those that it prints.
"""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from generate import TINY, generate
from load_weights import load_model
from preprocess import Processor, load_video
from qwen2vl import Config, Qwen2VL

ROW = "<|im_start|>{}\n{}<|im_end|>\n"
SYSTEM = ROW.format("system", "You are a helpful assistant.")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
ANSWER = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor():
    return Processor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return load_model(TINY)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five picture files of different sizes."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for n in range(5):
        pixels = random.integers(256, size=(60 + 20 * n, 140 - 10 * n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{n + 1}.jpg")
    return [folder / f"image{n + 1}.jpg" for n in range(5)]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Four seconds of noise at 8 frames a second."""
    path, random = tmp_path_factory.mktemp("films") / "video.mp4", np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(32):
            frame = av.VideoFrame.from_ndarray(
                random.integers(256, size=(48, 64, 3), dtype=np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


def answers(model, processor, conversations, **options):
    """The document's steps from the inputs to the text, for a list of conversations."""
    batch = processor(conversations, **options)
    rows = generate(model, batch, max_new_tokens=8)
    decoded = [processor.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    assert all(isinstance(answer, str) for answer in decoded)
    return batch, rows, decoded


def test_a_picture(model, processor, pictures):
    conversation = [user({"type": "image"}, text("Describe this image."))]
    prompt = processor.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == SYSTEM + ROW.format("user", IMAGE + "Describe this image.") + ANSWER
    conversation[0]["content"][0]["image"] = pictures[0]
    batch, *_ = answers(model, processor, conversation)
    pads = batch.image_grid_thw.prod() // 4
    shown = processor.tokenizer.decode(batch.input_ids[0], skip_special_tokens=False)
    assert shown == prompt.replace("<|image_pad|>", "<|image_pad|>" * pads)


def test_a_film(model, processor, film):
    frames, timestamps, size = load_video(film, fps=1.0)
    assert len(frames) == len(timestamps) == 4
    assert size == (64, 48)
    conversation = [user({"type": "video"}, text("What happened in the video?"))]
    prompt = processor.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == SYSTEM + ROW.format("user", VIDEO + "What happened in the video?") + ANSWER
    conversation[0]["content"][0] |= {"video": str(film), "fps": 1.0}
    batch, *_ = answers(model, processor, conversation)
    assert batch.video_grid_thw[0, 0] == 2  # two frames in each patch
    assert batch.media[0].timestamps == timestamps
    pads = batch.video_grid_thw.prod() // 4
    shown = processor.tokenizer.decode(batch.input_ids[0], skip_special_tokens=False)
    assert shown == prompt.replace("<|video_pad|>", "<|video_pad|>" * pads)


def mixed(pictures, film):
    first, second, third, fourth, fifth = (
        {"type": "image", "image": picture} for picture in pictures
    )
    return [
        [user(first, text("Describe this image."))],
        [user(second, third, text("What is written in the pictures?"))],
        [{"role": "user", "content": "who are you?"}],
        [user(fourth, fifth, {"type": "video", "video": film, "fps": 1.0},
              text("What are the common elements in these medias?"))],
    ]  # fmt: skip


def test_a_batch_of_pictures_films_and_words(model, processor, pictures, film):
    conversations = mixed(pictures, film)
    prompts = [processor.tokenizer.apply_chat_template(one) for one in conversations]
    assert prompts == [
        SYSTEM + ROW.format("user", content) + ANSWER
        for content in (
            IMAGE + "Describe this image.",
            IMAGE + IMAGE + "What is written in the pictures?",
            "who are you?",
            IMAGE + IMAGE + VIDEO + "What are the common elements in these medias?",
        )
    ]
    batch, _, decoded = answers(model, processor, conversations)
    assert len(decoded) == 4
    assert len(batch.image_grid_thw) == 5
    assert len(batch.video_grid_thw) == 1


def test_each_row_of_a_mixed_batch_equals_its_run_alone(processor, pictures, film):
    """Logits in float32 within 1e-5 of the largest, and the same greedy tokens."""
    model, conversations = load_model(TINY, dtype=torch.float32), mixed(pictures, film)
    batch, rows, _ = answers(model, processor, conversations)
    together = logits(model, batch)
    for n, conversation in enumerate(conversations):
        alone, [tokens], _ = answers(model, processor, conversation)
        assert rows[n][: len(tokens)] == tokens
        assert set(rows[n][len(tokens) :]) <= {processor.tokenizer.pad_token_id}
        own = logits(model, alone)[0]
        gap = (together[n, -len(own) :] - own).abs().max() / own.abs().max()
        assert gap < 1e-5  # measured: 7e-7


def logits(model, batch):
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in batch.arrays().items()})


@pytest.mark.parametrize(
    ("low", "high"), [(224 * 224, 2048 * 2048), (256 * 28 * 28, 1024 * 28 * 28)]
)
def test_bounds_of_the_resolution(pictures, film, low, high):
    processor = Processor.from_pretrained(TINY, min_pixels=low, max_pixels=high)
    batch = processor(mixed(pictures, film))
    tokens = batch.image_grid_thw.prod(1) // 4
    assert (tokens >= low // 28**2).all()
    assert (tokens <= high // 28**2).all()
    assert batch.video_grid_thw[0, 1:].prod() // 4 >= low // 28**2  # frames of a film as well


HELLO = "Hello, how are you?"
WELL = "I'm doing well, thank you for asking. How can I assist you today?"
DESCRIBE, VACATION = "Can you describe these images and video?", "These are from my vacation."
HAPPY = (
    "I'd be happy to describe the images and video for you. "
    "Could you please provide more context about your vacation?"
)
MOUNTAINS = "It was a trip to the mountains. Can you see the details in the images and video?"


@pytest.mark.parametrize("ids", [False, True])
def test_several_pictures_with_and_without_numbers(model, processor, pictures, film, ids):
    image, video = {"type": "image"}, {"type": "video"}
    conversation = [
        user(image, text(HELLO)),
        {"role": "assistant", "content": WELL},
        user(text(DESCRIBE), image, image, video, text(VACATION)),
        {"role": "assistant", "content": HAPPY},
        {"role": "user", "content": MOUNTAINS},
    ]
    prompt = processor.tokenizer.apply_chat_template(conversation, add_vision_id=ids)
    names = ["Picture 1: ", "Picture 2: ", "Picture 3: ", "Video 1: "] if ids else [""] * 4
    assert prompt == (
        SYSTEM
        + ROW.format("user", names[0] + IMAGE + HELLO)
        + ROW.format("assistant", WELL)
        + ROW.format(
            "user", DESCRIBE + names[1] + IMAGE + names[2] + IMAGE + names[3] + VIDEO + VACATION
        )
        + ROW.format("assistant", HAPPY)
        + ROW.format("user", MOUNTAINS)
        + ANSWER
    )
    conversation[0]["content"][0] = {"type": "image", "image": pictures[0]}
    conversation[2]["content"][1] = {"type": "image", "image_url": str(pictures[1])}
    conversation[2]["content"][2] = {
        "type": "image_url",
        "image_url": {"url": pictures[2].as_uri()},
    }
    conversation[2]["content"][3] = {"type": "video", "video": film.as_uri()}
    batch, *_ = answers(model, processor, conversation, add_vision_id=ids)
    assert len(batch.image_grid_thw) == 3
    assert [media.timestamps is not None for media in batch.media] == [False, False, False, True]


def test_flash_attention(monkeypatch):
    """Needs a GPU: here without one it is refused in one sentence, with the package and without it."""
    for installed in (True, False):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found or None)
        with pytest.raises(ValueError, match="attention 'flash' cannot be used: "):
            load_model(TINY, device="cpu", dtype=torch.bfloat16, attn_implementation="flash")


def test_a_model_from_a_default_configuration():
    """Of the size that the defaults say, so on the device that has no memory."""
    configuration = Config()
    with torch.device("meta"):
        model = Qwen2VL(configuration)
    assert model.config is configuration
    assert len(model.model.layers) == 80
