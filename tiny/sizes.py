"""The image sizes of the training data, in cells: what the processor makes one token of.

A batch has images of one size in cells, and `random_side` and `open_sides` return sides in pixels
that the processor resizes to it. The framed style has images of 56 to 336 pixels a side in its own
resolution. The open style has up to 448; the processor of the bundled model reduces large images to
MOST_PIXELS, and enlarges the frames of small videos to the least of the official rule, 128 tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from preprocess import smart_resize
from video import pixel_bounds

CELL = 28  # pixels
LARGEST_SIDE = 448
MOST_PIXELS = 336 * 224  # of a resized image: the bundled max_pixels


# --------------------------------------------------------------------------------- the framed style


@dataclass(frozen=True)
class SizeRange:
    """The image sizes of a topic, in cells of 28×28 pixels.

    The processor rounds sides to whole cells. A side may differ from its cells by at most `jitter`
    pixels: 13 pixels of 56 are a visible distortion, which shapes tolerate and letters do not.
    """

    rows: range
    columns: range
    largest_area: int
    tallest: int  # height / width at most
    widest: int  # width / height at most
    jitter: int


SIZES = {
    "shapes": SizeRange(range(2, 13), range(2, 13), 96, 2, 2, 13),
    "words": SizeRange(range(2, 5), range(2, 9), 24, 1, 4, 4),
    "album": SizeRange(range(3, 5), range(3, 5), 16, 2, 2, 13),
    "clip": SizeRange(range(3, 5), range(3, 5), 16, 2, 2, 13),
}
# The stages of training. It starts with images of one size, where a place or a letter is exactly
# one token, continues with small images and then uses all sizes.
START = 0
SMALL = 1
WHOLE = 2
START_SIZE = {"shapes": (3, 3), "words": (2, 6)}
SMALL_AREA = 16  # cells


def sizes(topic: str, stage: int = WHOLE, style: str = "framed") -> Sequence[tuple[int, int]]:
    """Return the image sizes of a topic as (rows, columns) of cells; small sizes are repeated, as
    weights.
    """
    if style != "framed":
        return open_sizes(topic)
    if stage == START:
        return [START_SIZE[topic]]
    allowed = SIZES[topic]
    return weighted_sizes(allowed, allowed.largest_area if stage == WHOLE else SMALL_AREA)


def weighted_sizes(allowed: SizeRange, largest_area: int) -> list[tuple[int, int]]:
    result = []
    for rows in allowed.rows:
        for columns in allowed.columns:
            if rows * columns > largest_area:
                continue
            if rows > allowed.tallest * columns or columns > allowed.widest * rows:
                continue
            result += [(rows, columns)] * round(96 / (8 + rows * columns))
    return result


def random_side(rng: random.Random, cells: int, jitter: int, largest: int = 336) -> int:
    """Return a side in pixels that is at most `jitter` away from its cells."""
    return rng.randint(max(56, CELL * cells - jitter), min(largest, CELL * cells + jitter))


# ----------------------------------------------------------------------------------- the open style

OPEN_SIZES = {
    "shapes": SizeRange(range(2, 17), range(2, 17), 96, 4, 4, 13),
    "words": SizeRange(range(2, 7), range(2, 13), 48, 2, 4, 6),
    "album": SizeRange(range(2, 13), range(2, 13), 64, 2, 2, 13),
    "clip": SizeRange(range(3, 6), range(3, 6), 20, 2, 2, 13),
}


@cache
def open_sizes(topic: str) -> tuple[tuple[int, int], ...]:
    """Return the sizes of the open style as (rows, columns), small ones repeated; a third of the
    videos have an official size.
    """
    own = weighted_sizes(OPEN_SIZES[topic], OPEN_SIZES[topic].largest_area)
    if topic != "clip":
        return tuple(own)
    official = set()
    for height in range(56, 340, 4):
        for width in range(max(56, height // 2), min(340, 2 * height), 4):
            if height * width < 128 * CELL**2:
                official.add(official_cells(height, width))
    smallest = sorted(cells for cells in official if cells[0] * cells[1] <= 136)
    repeats = max(1, len(own) // (2 * len(smallest)))
    return tuple(own + smallest * repeats)


def official_cells(height: int, width: int) -> tuple[int, int]:
    """Return the size to which the official rule resizes the frames of a short video, in cells."""
    least, most = pixel_bounds(8, CELL**2)
    new_height, new_width = smart_resize(height, width, CELL, least, most)
    return new_height // CELL, new_width // CELL


def is_official(cells: tuple[int, int]) -> bool:
    return cells[0] * cells[1] >= 128


def open_sides(rng: random.Random, topic: str, cells: tuple[int, int]) -> tuple[int, int]:
    """Return a random height and width that the processor resizes to the cells.

    More than half of the images are larger than their cells, where such a size is found.
    """
    if topic == "clip" and is_official(cells):
        while True:
            height, width = scaled_sides(rng, cells, 0.3, 1.0)
            if min(height, width) >= 56 and official_cells(height, width) == cells:
                return height, width
    rows, columns = cells
    attempts = 40 if rng.random() < 0.6 else 0
    for _ in range(attempts):
        height, width = scaled_sides(rng, cells, 1.0, LARGEST_SIDE / CELL / max(cells))
        if min(height, width) < 56:
            continue
        resized = smart_resize(height, width, CELL, 56**2, MOST_PIXELS)
        if resized == (CELL * rows, CELL * columns):
            return height, width
    jitter = OPEN_SIZES[topic].jitter
    height = random_side(rng, rows, jitter, LARGEST_SIDE)
    width = random_side(rng, columns, jitter, LARGEST_SIDE)
    return height, width


def scaled_sides(
    rng: random.Random, cells: tuple[int, int], low: float, high: float
) -> tuple[int, int]:
    """Return sides of about the proportions of the cells, low to high times as long."""
    scale = rng.uniform(low, high)
    height = round(CELL * (cells[0] + rng.uniform(-0.5, 0.5)) * scale)
    width = round(CELL * (cells[1] + rng.uniform(-0.5, 0.5)) * scale)
    return min(LARGEST_SIDE, height), min(LARGEST_SIDE, width)
