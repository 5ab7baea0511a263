"""Conversations about images and videos for the tests of the programs in apps/, and the model that answers them."""

from pathlib import Path

import numpy as np
import torch
from helpers import make_batch, random_sequence

from command_line import BUNDLED_CHECKPOINT
from load_weights import load_model
from preprocess import Batch, Media, normalize, patchify

EXAMPLES = Path(__file__).parent.parent / "examples"
CASES = {
    "one image": ("shapes",),
    "two images": ("shapes", "wide"),
    "a video": (5,),
    "images and videos": ("tall", 3, "small", 12),
    "twenty images": ("shapes", "wide", "tall", "small") * 5,
    "text alone": (),
}


def load_tiny(dtype=torch.float32, **options):
    """Return the bundled model, whose answers no token ends, so that tests do not depend on them."""
    model = load_model(BUNDLED_CHECKPOINT, "cpu", dtype, **options)
    model.generation_config = {"eos_token_id": [], "pad_token_id": 0}
    return model


def make_video(processor, frames, rows=4, cols=6, name="walk.mp4"):
    """Return a video of colored squares as Media, two frames a second; rows and cols count tokens."""
    side = processor.image_config.factor
    random = np.random.default_rng(frames)
    squares = random.integers(0, 256, (frames, rows, cols, 3), dtype=np.uint8)
    pixels = squares.repeat(side, axis=1).repeat(side, axis=2)
    patches, grid = patchify(normalize(pixels, processor.image_config), processor.image_config)
    return Media(patches, grid, name, (cols * side, rows * side), [n / 2 for n in range(frames)])


def make_conversation(processor, *media, text="Describe this image."):
    """Return a batch with a question about images, by the names of the examples, and videos, by frame count."""
    items = []
    for source in media:
        if isinstance(source, int):
            items.append({"type": "video", "video": make_video(processor, source)})
        else:
            items.append({"type": "image", "image": str(EXAMPLES / f"{source}.png")})
    return processor([{"role": "user", "content": [*items, {"type": "text", "text": text}]}])


def make_small_batch(config, parts):
    """Return a batch with one conversation of random tokens and patches, see `helpers.random_sequence`."""
    arrays = make_batch([random_sequence(config, parts)])
    arrays["attention_mask"] = torch.ones_like(arrays["input_ids"])
    return Batch(**{name: tensor.numpy() for name, tensor in arrays.items()})
