"""The examples of the model's user documentation, in its order and under our names.

The documentation is that of transformers for Qwen2-VL. Its examples run on the bundled model, with
images and a video that the tests create. The prompts are those that it prints.
"""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from command_line import BUNDLED_CHECKPOINT
from generate import generate
from load_weights import load_model
from preprocess import Processor, load_video
from qwen2vl import Config, Qwen2VL

MESSAGE = "<|im_start|>{}\n{}<|im_end|>\n"
SYSTEM = MESSAGE.format("system", "You are a helpful assistant.")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
ANSWER = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def model():
    return load_model(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return the paths of five images of different sizes."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for n in range(5):
        pixels = generator.integers(256, size=(60 + 20 * n, 140 - 10 * n, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{n + 1}.jpg")
    return [folder / f"image{n + 1}.jpg" for n in range(5)]


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Return the path of a video: four seconds of noise at 8 frames per second."""
    path = tmp_path_factory.mktemp("videos") / "video.mp4"
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = 64
        stream.height = 48
        stream.pix_fmt = "yuv420p"
        for _ in range(32):
            pixels = generator.integers(256, size=(48, 64, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def user(*content):
    """Return a user message."""
    return {"role": "user", "content": list(content)}


def text(content):
    """Return a text item of a message."""
    return {"type": "text", "text": content}


def answers(model, processor, conversations, **options):
    """Return the batch of conversations, the tokens of the answers and their text."""
    batch = processor(conversations, **options)
    tokens = generate(model, batch, max_new_tokens=8)
    decoded = [processor.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    assert all(isinstance(answer, str) for answer in decoded)
    return batch, tokens, decoded


def test_conversation_with_an_image_gives_the_documented_prompt(model, processor, images):
    conversation = [user({"type": "image"}, text("Describe this image."))]
    prompt = processor.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == SYSTEM + MESSAGE.format("user", IMAGE + "Describe this image.") + ANSWER
    conversation[0]["content"][0]["image"] = images[0]
    batch, *_ = answers(model, processor, conversation)
    pads = batch.image_grid_thw.prod() // 4
    decoded = processor.tokenizer.decode(batch.input_ids[0], skip_special_tokens=False)
    assert decoded == prompt.replace("<|image_pad|>", "<|image_pad|>" * pads)


@pytest.mark.slow
def test_conversation_with_a_video_gives_the_documented_prompt(model, processor, video):
    frames, timestamps, size = load_video(video, fps=1.0)
    assert len(frames) == len(timestamps) == 4
    assert size == (64, 48)
    conversation = [user({"type": "video"}, text("What happened in the video?"))]
    prompt = processor.tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompt == SYSTEM + MESSAGE.format("user", VIDEO + "What happened in the video?") + ANSWER
    conversation[0]["content"][0] |= {"video": str(video), "fps": 1.0}
    batch, *_ = answers(model, processor, conversation)
    assert batch.video_grid_thw[0, 0] == 2  # two frames per patch
    assert batch.media[0].timestamps == timestamps
    pads = batch.video_grid_thw.prod() // 4
    decoded = processor.tokenizer.decode(batch.input_ids[0], skip_special_tokens=False)
    assert decoded == prompt.replace("<|video_pad|>", "<|video_pad|>" * pads)


def mixed_conversations(images, video):
    """Return the four conversations of the documented batch."""
    first, second, third, fourth, fifth = ({"type": "image", "image": image} for image in images)
    return [
        [user(first, text("Describe this image."))],
        [user(second, third, text("What is written in the pictures?"))],
        [{"role": "user", "content": "who are you?"}],
        [
            user(
                fourth,
                fifth,
                {"type": "video", "video": video, "fps": 1.0},
                text("What are the common elements in these medias?"),
            )
        ],
    ]


@pytest.mark.slow
def test_batch_of_images_videos_and_text_gives_the_documented_prompts(
    model, processor, images, video
):
    conversations = mixed_conversations(images, video)
    prompts = [
        processor.tokenizer.apply_chat_template(conversation) for conversation in conversations
    ]
    assert prompts == [
        SYSTEM + MESSAGE.format("user", content) + ANSWER
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


@pytest.mark.slow
def test_mixed_batch_equals_each_conversation_alone(processor, images, video):
    """Compare float32 logits within 1e-5 of the largest, and the greedy tokens."""
    model = load_model(BUNDLED_CHECKPOINT, dtype=torch.float32)
    conversations = mixed_conversations(images, video)
    batch, batch_tokens, _ = answers(model, processor, conversations)
    batch_logits = logits(model, batch)
    for n, conversation in enumerate(conversations):
        alone, [tokens], _ = answers(model, processor, conversation)
        assert batch_tokens[n][: len(tokens)] == tokens
        assert set(batch_tokens[n][len(tokens) :]) <= {processor.tokenizer.pad_token_id}
        expected = logits(model, alone)[0]
        difference = (batch_logits[n, -len(expected) :] - expected).abs().max()
        assert difference / expected.abs().max() < 1e-5  # measured: 7e-7


def logits(model, batch):
    """Return the logits of a `Batch`."""
    with torch.no_grad():
        return model(**{name: torch.from_numpy(value) for name, value in batch.arrays().items()})


@pytest.mark.parametrize(
    ("low", "high"), [(224 * 224, 2048 * 2048), (256 * 28 * 28, 1024 * 28 * 28)]
)
def test_pixel_bounds_apply_to_images_and_frames(images, video, low, high):
    processor = Processor.from_pretrained(BUNDLED_CHECKPOINT, min_pixels=low, max_pixels=high)
    batch = processor(mixed_conversations(images, video))
    tokens = batch.image_grid_thw.prod(1) // 4
    assert (tokens >= low // 28**2).all()
    assert (tokens <= high // 28**2).all()
    assert batch.video_grid_thw[0, 1:].prod() // 4 >= low // 28**2  # of the frames as well


HELLO = "Hello, how are you?"
WELL = "I'm doing well, thank you for asking. How can I assist you today?"
DESCRIBE, VACATION = "Can you describe these images and video?", "These are from my vacation."
HAPPY = (
    "I'd be happy to describe the images and video for you. "
    "Could you please provide more context about your vacation?"
)
MOUNTAINS = "It was a trip to the mountains. Can you see the details in the images and video?"


@pytest.mark.slow
@pytest.mark.parametrize("add_vision_id", [False, True])
def test_images_and_videos_are_numbered_with_add_vision_id(
    model, processor, images, video, add_vision_id
):
    image_item = {"type": "image"}
    conversation = [
        user(image_item, text(HELLO)),
        {"role": "assistant", "content": WELL},
        user(text(DESCRIBE), image_item, image_item, {"type": "video"}, text(VACATION)),
        {"role": "assistant", "content": HAPPY},
        {"role": "user", "content": MOUNTAINS},
    ]
    prompt = processor.tokenizer.apply_chat_template(conversation, add_vision_id=add_vision_id)
    names = [""] * 4
    if add_vision_id:
        names = ["Picture 1: ", "Picture 2: ", "Picture 3: ", "Video 1: "]
    assert prompt == (
        SYSTEM
        + MESSAGE.format("user", names[0] + IMAGE + HELLO)
        + MESSAGE.format("assistant", WELL)
        + MESSAGE.format(
            "user", DESCRIBE + names[1] + IMAGE + names[2] + IMAGE + names[3] + VIDEO + VACATION
        )
        + MESSAGE.format("assistant", HAPPY)
        + MESSAGE.format("user", MOUNTAINS)
        + ANSWER
    )
    conversation[0]["content"][0] = {"type": "image", "image": images[0]}
    conversation[2]["content"][1] = {"type": "image", "image_url": str(images[1])}
    conversation[2]["content"][2] = {
        "type": "image_url",
        "image_url": {"url": images[2].as_uri()},
    }
    conversation[2]["content"][3] = {"type": "video", "video": video.as_uri()}
    batch, *_ = answers(model, processor, conversation, add_vision_id=add_vision_id)
    assert len(batch.image_grid_thw) == 3
    assert [media.timestamps is not None for media in batch.media] == [False, False, False, True]


@pytest.mark.parametrize("spec", [True, None], ids=["installed", "not installed"])
def test_flash_attention_on_the_cpu_is_refused(spec, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    options = {"device": "cpu", "dtype": torch.bfloat16, "attn_implementation": "flash"}
    with pytest.raises(ValueError, match="attention 'flash' cannot be used: "):
        load_model(BUNDLED_CHECKPOINT, **options)


def test_model_from_a_default_config_has_80_layers():
    config = Config()
    with torch.device("meta"):
        model = Qwen2VL(config)
    assert model.config is config
    assert len(model.model.layers) == 80
