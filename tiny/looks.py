"""Paint images as different people draw them: canvases, shades of colors, outlines, rotation.

A `Look` is how an image is painted and a `Paint` how one shape is. Both are drawn at random, once,
and then painting is a function of them:

    random_look(rng, framed) -> Look       a canvas from white to black, flat, graded or noisy
    visible_shades(look, color) -> list    the shades of a color that people see on that canvas
    random_paint(rng, look, ...) -> Paint  filled or outlined, rotated or upright
    canvas_image, paint_shape, compress    the three steps of painting

The framed drawing of `scenes.draw`, which the first training used, needs none of this.
"""

import io
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom exclusive
Points = list[tuple[float, float]]

SHADES: dict[str, tuple[Color, ...]] = {  # what people and drawing programs call by one name
    "red": (
        *((255, 0, 0), (220, 20, 60), (228, 26, 28), (214, 39, 40), (178, 34, 34)),
        *((200, 0, 0), (150, 0, 0), (231, 76, 60), (244, 67, 54), (220, 40, 40)),
    ),
    "yellow": (
        *((255, 255, 0), (255, 215, 0), (240, 200, 0), (255, 235, 59), (241, 196, 15)),
        *((255, 221, 0), (250, 225, 70), (230, 220, 30)),
    ),
    "green": (
        *((0, 128, 0), (0, 255, 0), (44, 160, 44), (77, 175, 74), (34, 139, 34)),
        *((50, 205, 50), (0, 100, 0), (46, 204, 113), (40, 160, 60), (110, 200, 40)),
    ),
    "blue": (
        *((0, 0, 255), (31, 119, 180), (55, 126, 184), (65, 105, 225), (30, 144, 255)),
        *((0, 0, 128), (52, 152, 219), (33, 150, 243), (0, 0, 205), (40, 80, 220)),
    ),
    "purple": (
        *((128, 0, 128), (148, 103, 189), (152, 78, 163), (106, 13, 173), (155, 89, 182)),
        *((156, 39, 176), (138, 43, 226), (150, 50, 180), (102, 51, 153), (160, 32, 240)),
    ),
    "black": ((0, 0, 0), (20, 20, 20), (34, 34, 34), (10, 10, 15)),
}
VISIBLE = 150.0  # least `color_distance` of a shape from its canvas
SUPERSAMPLING = 4  # of smooth edges
GRADIENTS = ("right", "down", "diagonal")


@dataclass(frozen=True)
class Look:
    """How an image is painted.

    background, second: the colors at the ends of the canvas; equal on a flat one. gradient: one of
    GRADIENTS. noise: largest change of a pixel. grain: side in pixels of the squares that change
    together. frame: its width in pixels, 0 for none. smooth: whether edges are anti-aliased. jpeg:
    the quality of a JPEG round trip, 0 for none.
    """

    background: Color
    second: Color
    gradient: str
    noise: int
    grain: int
    noise_seed: int
    frame: int
    frame_color: Color
    smooth: bool
    jpeg: int


@dataclass(frozen=True)
class Paint:
    """How a shape is painted.

    outline: width of the line as a share of the smaller side of the box, 0 for a filled shape.
    angle: clockwise in degrees. stretch: height of a triangle over its base, or the inner radius of
    a star over the outer. edge: the color of a thin line around a filled shape.
    """

    color: Color
    outline: float = 0.0
    angle: float = 0.0
    stretch: float = 1.0
    edge: Color | None = None


# ------------------------------------------------------------------------------------------- colors


def color_distance(a: Color, b: Color) -> float:
    """Return how different two colors appear: 0 to 765, the weighted Euclidean distance "redmean".

    Source: T. Riemersma, "Colour metric", CompuPhase.
    """
    red_mean = (a[0] + b[0]) / 2
    red = (2 + red_mean / 256) * (a[0] - b[0]) ** 2
    green = 4 * (a[1] - b[1]) ** 2
    blue = (2 + (255 - red_mean) / 256) * (a[2] - b[2]) ** 2
    return math.sqrt(red + green + blue)


def mixed(a: Color, b: Color, share: float) -> Color:
    """Return the color at `share` of the way from a to b."""
    red, green, blue = (round(p + (q - p) * share) for p, q in zip(a, b, strict=True))
    return red, green, blue


def shifted(rng: random.Random, color: Color, most: int) -> Color:
    """Return the color with each channel changed by at most `most`."""
    red, green, blue = (min(255, max(0, x + rng.randint(-most, most))) for x in color)
    return red, green, blue


def canvas_colors(look: Look) -> list[Color]:
    """Return the color of the canvas, or five from one end of its gradient to the other."""
    if look.background == look.second:
        return [look.background]
    return [mixed(look.background, look.second, share / 4) for share in range(5)]


def is_visible(look: Look, color: Color) -> bool:
    """Return whether a color differs enough from every part of the canvas."""
    return all(color_distance(color, part) >= VISIBLE for part in canvas_colors(look))


@lru_cache(1000)
def visible_shades(look: Look, color: str) -> list[Color]:
    return [shade for shade in SHADES[color] if is_visible(look, shade)]


def random_background(rng: random.Random) -> Color:
    """Return white, black, a gray, a light or dark tint, or now and then any color."""
    kind = rng.random()
    if kind < 0.2:
        return 255, 255, 255
    if kind < 0.3:
        return 0, 0, 0
    if kind < 0.5:
        gray = rng.randint(0, 255)
        return gray, gray, gray
    if kind < 0.7:
        return shifted(rng, (235, 235, 235), 20)
    if kind < 0.85:
        return shifted(rng, (35, 35, 35), 35)
    return shifted(rng, (128, 128, 128), 100)


def random_look(rng: random.Random, framed: float) -> Look:
    """Return a random look; framed: the probability of a frame."""
    background = random_background(rng)
    second = background
    if rng.random() < 0.25:
        second = shifted(rng, background, 60)
    look = Look(
        background,
        second,
        gradient=rng.choice(GRADIENTS),
        noise=rng.randint(4, 20) if rng.random() < 0.25 else 0,
        grain=rng.choice((1, 1, 2, 4, 8)),
        noise_seed=rng.randrange(2**32),
        frame=rng.randint(1, 3) if rng.random() < framed else 0,
        frame_color=rng.choice(((110, 110, 110), (0, 0, 0), (200, 200, 200))),
        smooth=rng.random() < 0.75,
        jpeg=rng.randint(50, 95) if rng.random() < 0.2 else 0,
    )
    visible = sum(bool(visible_shades(look, color)) for color in SHADES)
    return look if visible >= 4 else random_look(rng, framed)


# ------------------------------------------------------------------------------------------- shapes


def random_paint(rng: random.Random, look: Look, kind: str, color: Color, thinnest: float) -> Paint:
    """Return a random paint of a color; thinnest: the least width of an outline, as a share."""
    outline = 0.0
    edge = None
    if rng.random() < 0.25:
        outline = min(0.3, max(thinnest, rng.uniform(0.08, 0.2)))
    elif rng.random() < 0.1:
        edges = ((0, 0, 0), (60, 60, 60), (255, 255, 255))
        edge = rng.choice([None, *(edge for edge in edges if is_visible(look, edge))])
    angle = 0.0
    if rng.random() < 0.5:
        angle = float(rng.randint(0, 359))
    elif kind == "triangle":
        angle = float(rng.choice((0, 0, 0, 180)))
    stretch = 1.0
    if kind == "triangle":
        stretch = rng.choice((1.0, 0.866, rng.uniform(0.75, 1.15)))
    if kind == "star":
        stretch = rng.choice((0.42, 0.382, rng.uniform(0.35, 0.5)))
    return Paint(color, outline, angle, stretch, edge)


def outline_points(kind: str, paint: Paint) -> Points:
    """Return the corners of a rotated square, triangle or star, in a unit of its own."""
    if kind == "square":
        points = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
    elif kind == "triangle":
        points = [(0.0, -paint.stretch), (1.0, paint.stretch), (-1.0, paint.stretch)]
    else:
        points = []
        for i in range(10):
            radius = paint.stretch if i % 2 else 1.0
            turn = math.pi * i / 5
            points.append((radius * math.sin(turn), -radius * math.cos(turn)))
    cos = math.cos(math.radians(paint.angle))
    sin = math.sin(math.radians(paint.angle))
    return [(x * cos - y * sin, x * sin + y * cos) for x, y in points]


def proportions(kind: str, paint: Paint) -> tuple[float, float]:
    """Return width and height of a shape's box as shares of the larger of the two."""
    if kind == "circle":
        return 1.0, 1.0
    xs, ys = zip(*outline_points(kind, paint), strict=True)
    width = max(xs) - min(xs)
    height = max(ys) - min(ys)
    return width / max(width, height), height / max(width, height)


def fitted(points: Points, width: int, height: int) -> Points:
    """Return the points moved and scaled so that they span 0 to width - 1 and 0 to height - 1."""
    xs, ys = zip(*points, strict=True)
    x_scale = (width - 1) / (max(xs) - min(xs))
    y_scale = (height - 1) / (max(ys) - min(ys))
    return [((x - min(xs)) * x_scale, (y - min(ys)) * y_scale) for x, y in points]


def shape_mask(
    kind: str, paint: Paint, width: int, height: int, smooth: bool, line: float
) -> Image.Image:
    """Return a shape as a mask of width × height: 255 inside. line: width in pixels, 0 filled."""
    scale = SUPERSAMPLING if smooth else 1
    mask = Image.new("L", (width * scale, height * scale))
    pen = ImageDraw.Draw(mask)
    options = {"fill": 255} if line == 0 else {"outline": 255, "width": max(1, round(line * scale))}
    if kind == "circle":
        pen.ellipse((0, 0, mask.width - 1, mask.height - 1), **options)
    else:
        points = outline_points(kind, paint)
        pen.polygon(fitted(points, mask.width, mask.height), **options)
    return mask.reduce(scale) if smooth else mask


# ----------------------------------------------------------------------------------------- painting


def canvas_image(width: int, height: int, look: Look) -> Image.Image:
    """Return the canvas without shapes."""
    if look.background == look.second and not look.noise:
        image = Image.new("RGB", (width, height), look.background)
    else:
        image = Image.fromarray(graded(width, height, look))
    if look.frame:
        edges = (0, 0, width - 1, height - 1)
        ImageDraw.Draw(image).rectangle(edges, outline=look.frame_color, width=look.frame)
    return image


def graded(width: int, height: int, look: Look) -> np.ndarray:
    """Return the pixels of a canvas with a gradient and noise: uint8 [height, width, 3]."""
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    along = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    if look.gradient == "right":
        share = across + 0 * along
    elif look.gradient == "down":
        share = along + 0 * across
    else:
        share = (across + along) / 2
    first = np.array(look.background, np.float32)
    difference = np.array(look.second, np.float32) - first
    pixels = first + share[:, :, None] * difference
    if look.noise:
        generator = np.random.default_rng(look.noise_seed)
        shape = (-(-height // look.grain), -(-width // look.grain))
        noise = generator.integers(-look.noise, look.noise + 1, shape, dtype=np.int16)
        noise = noise.repeat(look.grain, 0).repeat(look.grain, 1)[:height, :width]
        pixels += noise[:, :, None]
    return pixels.clip(0, 255).astype(np.uint8)


def paint_shape(image: Image.Image, kind: str, box: Box, paint: Paint, smooth: bool) -> None:
    """Paint a shape so that it fills its box."""
    left, top, right, bottom = box
    width = right - left
    height = bottom - top
    line = paint.outline * min(width, height)
    mask = shape_mask(kind, paint, width, height, smooth, line)
    image.paste(paint.color, (left, top), mask)
    if paint.edge:
        thin = max(1.0, 0.04 * min(width, height))
        image.paste(paint.edge, (left, top), shape_mask(kind, paint, width, height, smooth, thin))


def compress(image: Image.Image, quality: int) -> Image.Image:
    """Return the image after a JPEG round trip; unchanged for quality 0."""
    if not quality:
        return image
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    file.seek(0)
    return Image.open(file).convert("RGB")
