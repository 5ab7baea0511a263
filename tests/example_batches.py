"""Conversations about images and videos for the tests of apps/, and the model that answers them."""

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
    """Return the bundled model; no token ends its answers, so that tests do not depend on them."""
    model = load_model(BUNDLED_CHECKPOINT, "cpu", dtype, **options)
    model.generation_config = {"eos_token_id": [], "pad_token_id": 0}
    return model


def make_video(processor, frames, rows=4, cols=6, name="walk.mp4"):
    """Return a video of colored squares as Media: rows × cols tokens, two frames a second."""
    side = processor.image_config.factor
    random = np.random.default_rng(frames)
    squares = random.integers(0, 256, (frames, rows, cols, 3), dtype=np.uint8)
    pixels = squares.repeat(side, axis=1).repeat(side, axis=2)
    patches, grid = patchify(normalize(pixels, processor.image_config), processor.image_config)
    return Media(patches, grid, name, (cols * side, rows * side), [n / 2 for n in range(frames)])


def make_conversation(processor, *media, text="Describe this image."):
    """Return a batch with a question about media.

    media: an image by the name of an example, a video by its number of frames.
    """
    items = []
    for source in media:
        if isinstance(source, int):
            items.append({"type": "video", "video": make_video(processor, source)})
        else:
            items.append({"type": "image", "image": str(EXAMPLES / f"{source}.png")})
    return processor([{"role": "user", "content": [*items, {"type": "text", "text": text}]}])


def make_small_batch(config, parts):
    """Return a batch of one conversation of random tokens and patches, see `random_sequence`."""
    arrays = make_batch([random_sequence(config, parts)])
    arrays["attention_mask"] = torch.ones_like(arrays["input_ids"])
    return Batch(**{name: tensor.numpy() for name, tensor in arrays.items()})
