"""Draw the training data of the bundled model: images and videos, and questions about them.

A sample is data, drawn at random from a topic and a seed: scenes, and question-answer pairs about
them. The same topic and seed give the same sample.

    make_sample(topic, seed) -> Sample          scenes and question-answer pairs
    draw(scene) -> PIL.Image                    one image, or one frame of a video
    to_conversation(sample, qa_pairs) -> list   the messages, as the processor takes them

There are four topics:

    shapes   an image of one to six colored shapes at nine places
    words    an image of one or two printed lines: a word or a number of up to six characters each
    album    two or three small images of shapes
    clip     a video of four to eight frames: a ball moves, or shapes appear and disappear, and the
             background may flash

And there are three styles of drawing:

    framed     light flat canvases with a thin gray frame, pure colors, upright filled shapes
    open       what people draw (looks.py), asked in more words (wording.py); one image in five is
               framed
    frameless  as open, but never framed

Training and evaluation never share a seed: evaluation uses the seeds below TRAIN_SEEDS, training
those from TRAIN_SEEDS upward. A change in the order of the random draws, in a topic's name (it
seeds the generator) or in a question's text would make another data set.

`python -m tiny.scenes` writes the images and the video of `examples/`.
"""

import argparse
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tiny import looks
from tiny.looks import Box, Look, Paint
from tiny.sizes import (
    CELL,
    SIZES,
    START,
    WHOLE,
    is_official,
    open_sides,
    open_sizes,
    random_side,
    sizes,
)
from tiny.wording import reword

TRAIN_SEEDS = 1_000_000  # seeds 0 to 999,999 are for evaluation, those from here on for training

KINDS = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (220, 40, 40),
    "yellow": (240, 200, 0),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (150, 50, 180),
    "black": (20, 20, 20),
}
PLACES = (  # in reading order: place i is in row i // 3, column i % 3
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SKILLS = {  # topic → what its questions ask for
    "shapes": (
        "describe",
        "count",
        "what",
        "color",
        "shape",
        "where",
        "relation",
        "ground",
        "chat",
    ),
    "words": ("read",),
    "album": ("compare", "shows", "inside"),
    "clip": ("video", "frame"),
}
# Style → the probability of a frame. The vision encoder knows only relative positions. A frame
# tells it how far a lone shape on an even canvas is from the edges; without one it has to count.
STYLES = {"framed": 1.0, "open": 0.2, "frameless": 0.0}
FRAME = 2  # pixels
FRAME_COLOR = (110, 110, 110)
SMALLEST = 20  # pixels, the side of the smallest shape
CLEAR = 26  # pixels, the same in the open style after resizing, where there is room
MANY = 84  # pixels: an image with a shorter side has at most two shapes, or one line
# Font sizes, small to large. Positive: of the scalable font. Negative: the enlargement of the
# bitmap font.
FONT_SIZES = (-3, 28, 32, -4, 40, 48)
SPACED = 28  # pixels from letter to letter in a letter-spaced line: the width of a token

# The wording of the questions. The bundled checkpoint knows these sentences, so their spelling
# stays as it is.
DESCRIBE = (
    "Describe the image.",
    "Describe this image.",
    "Describe the picture.",
    "What do you see?",
)
COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
COUNT_MORE = ("And {}?", "And how many {}?")
WHAT = ("What is {}?", "What do you see {}?")
COLOR = ("What colour is the {}?", "Which colour does the {} have?")
ITS_COLOR = ("And its colour?", "What colour is it?")
SHAPE = ("What shape is {}?", "Which shape is {}?")
WHERE = ("Where is the {}?", "Where do you see the {}?", "Tell me where the {} is.")
WHERE_IS_IT = ("And where is it?", "Where is it?")
RELATION = "Is the {} {} the {}?"
GROUND = ("Find the {}.", "Detect the {}.", "Draw a box around the {}.")
READ = ("What is written here?", "Read the text.", "What does it say?")
MORE = ("Which picture has more {}?", "Which picture shows more {}?")
MOST = ("Which picture has the most {}?", "Which picture shows the most {}?")
COUNT_IN_ONE = "How many {} are there in picture {}?"
SHOWS = "Which picture shows a {}?"
INSIDE = "What is in picture {}?"
MOVES = ("Which way does the ball move?", "Where does the ball go?")
BALL_COLOR = "What colour is the ball?"
FIRST = ("What happens first?", "What is the first thing that happens?")
LAST = ("What happens last?", "What is the last thing that happens?")
BEGINNING = "What is there at first?"
END = "What is there at the end?"
FLASHES = ("How many flashes are there?", "How many flashes?", "Count the flashes.")
DIRECTIONS = {  # answer → (axis, whether the coordinate grows)
    "To the left.": (0, False),
    "To the right.": (0, True),
    "Up.": (1, False),
    "Down.": (1, True),
}

Turn = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    place: str
    box: Box
    paint: Paint | None = None  # of the open style

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Line:
    """A printed line of text.

    size: an entry of FONT_SIZES. pitch: pixels from letter to letter in a letter-spaced line; 0:
    normal spacing. shade: of the color, in the open style.
    """

    text: str
    color: str
    size: int
    left: int
    top: int
    pitch: int = 0
    shade: looks.Color | None = None


@dataclass(frozen=True)
class Scene:
    """What one image or one frame of a video shows."""

    width: int
    height: int
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...] = ()  # in reading order
    lines: tuple[Line, ...] = ()
    look: Look | None = None  # of the open style
    reduction: float = 1.0  # by which the processor multiplies the sides, at most 1


@dataclass(frozen=True)
class QAPair:
    """A question-answer pair, or two in a row, the second of which depends on the first."""

    skill: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Sample:
    topic: str
    scenes: tuple[Scene, ...]  # one image, two or three images, or the frames of a video
    qa_pairs: tuple[QAPair, ...]
    enlarged: bool = False  # whether a video's frames are resized by the official rule


# ------------------------------------------------------------------------------------ empty images


def canvas(
    rng: random.Random,
    topic: str,
    cells: tuple[int, int] | None = None,
    stage: int = WHOLE,
    style: str = "framed",
) -> Scene:
    """Return an empty scene that the processor resizes to exactly `cells`."""
    if style != "framed":
        return open_canvas(rng, topic, cells, style)
    jitter = 0 if stage == START else SIZES[topic].jitter
    rows, columns = cells or rng.choice(sizes(topic))
    height = random_side(rng, rows, jitter)
    width = random_side(rng, columns, jitter)
    background = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
    return Scene(width, height, background)


def open_canvas(rng: random.Random, topic: str, cells: tuple[int, int] | None, style: str) -> Scene:
    """Return an empty scene of the open style; see `canvas`."""
    cells = cells or rng.choice(open_sizes(topic))
    height, width = open_sides(rng, topic, cells)
    look = looks.random_look(rng, STYLES[style])
    reduction = min(1.0, math.sqrt(cells[0] * cells[1] * CELL**2 / (height * width)))
    return Scene(width, height, look.background, look=look, reduction=reduction)


# ------------------------------------------------------------------------------------------- shapes


def with_shapes(rng: random.Random, empty: Scene, most: int = 6, few_larger: bool = True) -> Scene:
    """Return the scene with 1 to `most` shapes at different places that do not touch each other.

    few_larger: one or two shapes may be larger than a ninth of the image.
    """
    if min(empty.width, empty.height) < MANY:
        most = min(most, 2)
    if empty.look:
        return with_open_shapes(rng, empty, empty.look, most)
    # With kinds and colors drawn from all, three of a kind would be rare. Drawn from a few, all
    # numbers occur.
    kinds = rng.sample(KINDS, rng.randint(1, len(KINDS)))
    colors = rng.sample(list(COLORS), rng.randint(1, len(COLORS)))
    kind_of = {color: rng.choice(kinds) for color in colors}  # one kind to a color in an image
    count = rng.randint(1, min(most, 6))
    largest = 1.4 if count < 3 and few_larger else 0.95  # of a ninth of the image
    while True:
        shapes = []
        for place in sorted(rng.sample(range(len(PLACES)), count)):
            box = random_box(rng, empty, place, largest)
            color = rng.choice(colors)
            shapes.append(Shape(kind_of[color], color, PLACES[place], box))
        if not any(near(a.box, b.box) for a, b in combinations(shapes, 2)):
            return replace(empty, shapes=tuple(shapes))


def with_open_shapes(rng: random.Random, empty: Scene, look: Look, most: int) -> Scene:
    """Return the scene with 1 to `most` shapes of the open style, as `with_shapes` does.

    Half of the images have one kind to a color; in the others a color may belong to several kinds.
    """
    shades = {color: looks.visible_shades(look, color) for color in COLORS}
    visible = [color for color in COLORS if shades[color]]
    kinds = rng.sample(KINDS, rng.randint(1, len(KINDS)))
    colors = rng.sample(visible, rng.randint(1, len(visible)))
    kind_of = None
    if rng.random() < 0.5:
        kind_of = {color: rng.choice(kinds) for color in colors}
    count = rng.randint(1, min(most, 6))
    while True:
        shapes = []
        for place in sorted(rng.sample(range(len(PLACES)), count)):
            color = rng.choice(colors)
            kind = kind_of[color] if kind_of else rng.choice(kinds)
            shapes.append(open_shape(rng, empty, look, kind, color, place, count, shades[color]))
        if not any(near(a.box, b.box) for a, b in combinations(shapes, 2)):
            return replace(empty, shapes=tuple(shapes))


def open_shape(
    rng: random.Random,
    scene: Scene,
    look: Look,
    kind: str,
    color: str,
    place: int,
    count: int,
    shades: list[looks.Color],
) -> Shape:
    """Return one of `count` shapes of the open style, at a place."""
    row, column = divmod(place, 3)
    cell_width = scene.width / 3
    cell_height = scene.height / 3
    largest = 1.5 if count < 3 else 0.95
    if count == 1 and PLACES[place] == "center":
        largest = 2.4
    side = rng.uniform(0.45, largest) * min(cell_width, cell_height)
    smallest = min(CLEAR, 0.85 * min(cell_width, cell_height) * scene.reduction)
    side = max(max(SMALLEST, smallest) / scene.reduction, side)
    thinnest = 3 / (side * scene.reduction)
    paint = looks.random_paint(rng, look, kind, rng.choice(shades), thinnest)
    shade = looks.shifted(rng, paint.color, 6)
    if looks.is_visible(look, shade):
        paint = replace(paint, color=shade)
    shares = looks.proportions(kind, paint)
    width = round(side * shares[0])
    height = round(side * shares[1])
    x = (column + 0.5 + rng.uniform(-0.25, 0.25)) * cell_width
    y = (row + 0.5 + rng.uniform(-0.25, 0.25)) * cell_height
    left = int(min(max(x - width / 2, 1), scene.width - 1 - width))
    top = int(min(max(y - height / 2, 1), scene.height - 1 - height))
    return Shape(kind, color, PLACES[place], (left, top, left + width, top + height), paint)


def random_box(rng: random.Random, scene: Scene, place: int, largest: float) -> Box:
    """Return a square box at one of the nine places; its center stays near the center of that
    ninth.
    """
    row, column = divmod(place, 3)
    cell_width = (scene.width - 2 * FRAME) / 3
    cell_height = (scene.height - 2 * FRAME) / 3
    side = rng.uniform(0.75, largest) * min(cell_width, cell_height)
    side = max(SMALLEST, round(side))
    x = FRAME + (column + 0.5 + rng.uniform(-0.2, 0.2)) * cell_width
    y = FRAME + (row + 0.5 + rng.uniform(-0.2, 0.2)) * cell_height
    left = int(min(max(x - side / 2, FRAME + 1), scene.width - FRAME - 1 - side))
    top = int(min(max(y - side / 2, FRAME + 1), scene.height - FRAME - 1 - side))
    return left, top, left + side, top + side


def near(a: Box, b: Box) -> bool:
    """Return whether two boxes overlap or are less than two pixels apart."""
    near_in_x = a[0] < b[2] + 2 and b[0] < a[2] + 2
    near_in_y = a[1] < b[3] + 2 and b[1] < a[3] + 2
    return near_in_x and near_in_y


# ------------------------------------------------------------------------------------- printed text


@cache
def font(size: int):
    """Return one of Pillow's own fonts: the scalable font in a size, or for a negative size the
    bitmap font.
    """
    if size > 0:
        return ImageFont.load_default(size)
    return ImageFont.load_default_imagefont()


def printed(line: Line) -> Image.Image:
    """Return the line as a mask: 255 where the ink is, 0 elsewhere."""
    if line.pitch:
        return printed_spaced(line)
    _, _, right, bottom = font(line.size).getbbox(line.text)
    mask = Image.new("L", (math.ceil(right), math.ceil(bottom)))
    ImageDraw.Draw(mask).text((0, 0), line.text, fill=255, font=font(line.size))
    mask = mask.crop(mask.getbbox())
    enlargement = max(1, -line.size)
    size = (mask.width * enlargement, mask.height * enlargement)
    return mask.resize(size, Image.Resampling.NEAREST)


def printed_spaced(line: Line) -> Image.Image:
    """Return a letter-spaced line as a mask: each letter centered in `pitch` pixels, all on one
    baseline.
    """
    letters = [printed(replace(line, text=letter, pitch=0)) for letter in line.text]
    height = max(letter.height for letter in letters)
    mask = Image.new("L", (line.pitch * len(letters), height))
    for i, letter in enumerate(letters):
        left = line.pitch * i + (line.pitch - letter.width) // 2
        mask.paste(letter, (left, height - letter.height))
    return mask


def ink_color(rng: random.Random) -> str:
    """Return a random color that is readable on a light background."""
    return rng.choice([color for color in COLORS if color != "yellow"])


def visible_ink(rng: random.Random, look: Look) -> tuple[str, looks.Color | None]:
    """Return a random color and a shade of it that is readable on the canvas."""
    shades = {}
    for color in COLORS:
        for shade in looks.visible_shades(look, color):
            if min(looks.color_distance(shade, part) for part in looks.canvas_colors(look)) >= 250:
                shades.setdefault(color, []).append(shade)
    color = rng.choice(list(shades))
    return color, rng.choice(shades[color])


def with_lines(rng: random.Random, empty: Scene, spaced: float = 0.25) -> Scene:
    """Return the scene with one line of text, or two where the image is high enough, each at a
    random position.

    spaced: the probability that a line is letter-spaced.
    """
    count = 1 if empty.height < MANY - 4 else rng.randint(1, 2)
    height = (empty.height - 2 * FRAME) // count  # of the part of the image that a line has
    color, shade = ink_color(rng), None
    if empty.look:
        color, shade = visible_ink(rng, empty.look)
    lines = []
    for row in range(count):
        line, free_width, free_height = fitting_line(rng, empty.width, height, color, spaced)
        left = FRAME + 2 + rng.randint(0, free_width)
        top = FRAME + 2 + row * height + rng.randint(0, free_height)
        lines.append(replace(line, left=left, top=top, shade=shade))
    return replace(empty, lines=tuple(lines))


def fitting_line(
    rng: random.Random, width: int, height: int, color: str, spaced: float
) -> tuple[Line, int, int]:
    """Return a random line that fits, and the pixels that are free beside it and below it."""
    while True:
        alphabet = rng.choice((LETTERS, LETTERS, DIGITS))
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 6)))
        size = rng.choice(FONT_SIZES)
        pitch = SPACED if rng.random() < spaced else 0
        line = Line(text, color, size, 0, 0, pitch)
        mask = printed(line)
        free_width = width - 2 * FRAME - mask.width - 4
        free_height = height - mask.height - 4
        if free_width >= 0 and free_height >= 0:
            return line, free_width, free_height


def with_first_letters(rng: random.Random, empty: Scene) -> Scene:
    """Return the scene with one letter centered in each column of tokens: the first samples of
    reading.
    """
    color = ink_color(rng)
    text = "".join(rng.choices(LETTERS + DIGITS, k=empty.width // 28))
    line = Line(text, color, 32, 0, 0, SPACED)
    top = (empty.height - printed(line).height) // 2
    return replace(empty, lines=(replace(line, top=top),))


# ------------------------------------------------------------------------------------------ drawing


def draw(scene: Scene, scale: int = 3) -> Image.Image:
    """Return the image of a scene, drawn at `scale` times its size and averaged down, for smooth
    edges; one of the open style as its look says.
    """
    if scene.look:
        return draw_open(scene, scene.look)
    image = Image.new("RGB", (scene.width * scale, scene.height * scale), scene.background)
    pen = ImageDraw.Draw(image)
    edges = (0, 0, image.width - 1, image.height - 1)
    pen.rectangle(edges, outline=FRAME_COLOR, width=FRAME * scale)
    for shape in scene.shapes:
        draw_shape(pen, shape, scale)
    image = image.reduce(scale)
    for line in scene.lines:
        image.paste(COLORS[line.color], (line.left, line.top), printed(line))
    return image


def draw_open(scene: Scene, look: Look) -> Image.Image:
    image = looks.canvas_image(scene.width, scene.height, look)
    for shape in scene.shapes:
        looks.paint_shape(image, shape.kind, shape.box, shape.paint, look.smooth)
    for line in scene.lines:
        image.paste(line.shade, (line.left, line.top), printed(line))
    return looks.compress(image, look.jpeg)


def draw_shape(pen: ImageDraw.ImageDraw, shape: Shape, scale: int) -> None:
    """Draw a shape at `scale` times its size."""
    left, top, right, bottom = (edge * scale for edge in shape.box)
    fill = COLORS[shape.color]
    if shape.kind == "circle":
        pen.ellipse((left, top, right - 1, bottom - 1), fill=fill)
    elif shape.kind == "square":
        pen.rectangle((left, top, right - 1, bottom - 1), fill=fill)
    elif shape.kind == "triangle":
        apex = ((left + right) / 2, top)
        pen.polygon([apex, (right - 1, bottom - 1), (left, bottom - 1)], fill=fill)
    else:
        center = ((left + right) / 2, (top + bottom) / 2)
        pen.polygon(star_corners(*center, (right - left) / 2), fill=fill)


def star_corners(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Return the ten corners of a star, alternately on an outer and an inner circle."""
    corners = []
    for i in range(10):
        r = radius * 0.42 if i % 2 else radius
        angle = math.pi * i / 5
        corners.append((x + r * math.sin(angle), y - r * math.cos(angle)))
    return corners


# ---------------------------------------------------------------------------------------- sentences


def at(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def describe(scene: Scene) -> str:
    """Return a description such as "A red circle at the top left, a blue square in the center."."""
    return sentence(", ".join(f"a {shape.name} {at(shape.place)}" for shape in scene.shapes))


def names_in(scene: Scene) -> str:
    """Return the names of the shapes such as "a red circle, a blue square"."""
    return ", ".join(f"a {shape.name}" for shape in scene.shapes)


def boxed(shape: Shape, scene: Scene) -> str:
    """Return a shape in the published format of boxes: thousandths of width and height, here
    rounded to tens.
    """
    left, top, right, bottom = shape.box
    x1 = 10 * round(100 * left / scene.width)
    y1 = 10 * round(100 * top / scene.height)
    x2 = 10 * round(100 * right / scene.width)
    y2 = 10 * round(100 * bottom / scene.height)
    reference = f"<|object_ref_start|>the {shape.name}<|object_ref_end|>"
    return f"{reference}<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def totals(scene: Scene) -> dict[str, int]:
    """Return the numbers of all shapes, of each kind and of each color."""
    result = {"shapes": len(scene.shapes)}
    for kind in KINDS:
        result[f"{kind}s"] = sum(shape.kind == kind for shape in scene.shapes)
    for color in COLORS:
        result[f"{color} shapes"] = sum(shape.color == color for shape in scene.shapes)
    return result


def something(rng: random.Random, scene: Scene) -> str:
    """Return what to count.

    The number is drawn first, then a group of that size. Otherwise nearly all answers would be zero
    or one.
    """
    counts = totals(scene)
    number = rng.choice(sorted(set(counts.values())))
    return rng.choice([group for group, count in counts.items() if count == number])


# ------------------------------------------------------------------------ questions about one image


def count_turn(scene: Scene, question: str, group: str) -> Turn:
    return question.format(group), NUMBERS[totals(scene)[group]] + "."


def what_turn(rng: random.Random, scene: Scene) -> Turn:
    """Ask for the shape at a place; at one place in three drawn at random there may be nothing."""
    places = (rng.choice(scene.shapes).place, rng.choice(scene.shapes).place, rng.choice(PLACES))
    place = rng.choice(places)
    question = rng.choice(WHAT).format(at(place))
    names = {shape.place: f"a {shape.name}" for shape in scene.shapes}
    return question, sentence(names.get(place, "nothing"))


def shape_turn(rng: random.Random, shape: Shape) -> Turn:
    return rng.choice(SHAPE).format(at(shape.place)), sentence(f"a {shape.kind}")


def color_turn(rng: random.Random, shape: Shape) -> Turn:
    return rng.choice(COLOR).format(shape.kind), sentence(shape.color)


def its_color_turn(rng: random.Random, shape: Shape) -> Turn:
    return rng.choice(ITS_COLOR), sentence(shape.color)


def where_turn(rng: random.Random, name: str, shape: Shape) -> Turn:
    return rng.choice(WHERE).format(name), sentence(at(shape.place))


def where_is_it_turn(rng: random.Random, shape: Shape) -> Turn:
    return rng.choice(WHERE_IS_IT), sentence(at(shape.place))


def relation_turn(rng: random.Random, first: Shape, second: Shape, plain: bool = False) -> Turn:
    """Ask for one of the directions in which the places of two shapes differ.

    plain: only "left of" and "above", for the start of training. With all four words, neither a
    word nor a place alone makes an answer more likely.
    """
    first_row, first_column = divmod(PLACES.index(first.place), 3)
    second_row, second_column = divmod(PLACES.index(second.place), 3)
    axes = []
    if first_row != second_row:
        axes.append(("above", "below", first_row < second_row))
    if first_column != second_column:
        axes.append(("left of", "right of", first_column < second_column))
    before, after, is_before = rng.choice(axes)
    direction = before if plain else rng.choice((before, after))
    is_true = is_before == (direction == before)
    return RELATION.format(first.name, direction, second.name), "Yes." if is_true else "No."


def only_one(shapes: tuple[Shape, ...], name_of: Callable[[Shape], str]) -> list[Shape]:
    """Return the shapes whose name no other shape has."""
    counts = Counter(name_of(shape) for shape in shapes)
    return [shape for shape in shapes if counts[name_of(shape)] == 1]


def shapes_questions(rng: random.Random, scene: Scene, plain: bool = False) -> list[QAPair]:
    """Return the question-answer pairs about one image of shapes.

    A name in a question fits exactly one shape. Where no shape has such a name, fewer questions are
    asked.
    """
    pairs = [QAPair("describe", ((rng.choice(DESCRIBE), describe(scene)),))]
    for _ in range(2):
        question = rng.choice(COUNT)
        pairs.append(QAPair("count", (count_turn(scene, question, something(rng, scene)),)))
    for _ in range(2):
        pairs.append(QAPair("what", (what_turn(rng, scene),)))
    shape = rng.choice(scene.shapes)
    pairs.append(QAPair("shape", (shape_turn(rng, shape),)))

    groups = rng.sample(("circles", "squares", "triangles", "stars", "shapes"), 2)
    count = count_turn(scene, rng.choice(COUNT), groups[0])
    count_more = count_turn(scene, rng.choice(COUNT_MORE), groups[1])
    # Its answer is drawn before the first question: the order of the draws is part of the data set.
    its_color = its_color_turn(rng, shape)
    chats = [(count, count_more), (shape_turn(rng, shape), its_color)]

    kind_pairs, kind_chats = questions_by_kind(rng, scene)
    name_pairs, name_chats = questions_by_name(rng, scene, plain)
    chat = QAPair("chat", rng.choice([*chats, *kind_chats, *name_chats]))
    return [*pairs, *kind_pairs, *name_pairs, chat]


def questions_by_kind(
    rng: random.Random, scene: Scene
) -> tuple[list[QAPair], list[tuple[Turn, Turn]]]:
    """Return pairs and two-turn chats about shapes that are the only ones of their kind ("the
    circle").
    """
    candidates = only_one(scene.shapes, lambda shape: shape.kind)
    pairs = []
    chats = []
    for shape in rng.sample(candidates, min(2, len(candidates))):
        pairs.append(QAPair("color", (color_turn(rng, shape),)))
        chats.append((color_turn(rng, shape), where_is_it_turn(rng, shape)))
        chats.append((where_turn(rng, shape.kind, shape), its_color_turn(rng, shape)))
    return pairs, chats


def questions_by_name(
    rng: random.Random, scene: Scene, plain: bool
) -> tuple[list[QAPair], list[tuple[Turn, Turn]]]:
    """Return pairs and two-turn chats about shapes with a unique name ("the red circle")."""
    candidates = only_one(scene.shapes, lambda shape: shape.name)
    pairs = []
    chats = []
    for shape in rng.sample(candidates, min(4, len(candidates))):
        pairs.append(QAPair("where", (where_turn(rng, shape.name, shape),)))
    for shape in rng.sample(candidates, min(2, len(candidates))):
        question = rng.choice(GROUND).format(shape.name)
        pairs.append(QAPair("ground", ((question, boxed(shape, scene)),)))
    if len(candidates) < 2:
        return pairs, chats
    for first, second in [rng.sample(candidates, 2) for _ in range(3)]:
        pairs.append(QAPair("relation", (relation_turn(rng, first, second, plain),)))
        and_second = (f"And the {second.name}?", sentence(at(second.place)))
        chats.append((where_turn(rng, first.name, first), and_second))
    return pairs, chats


# ------------------------------------------------------------------- questions about several images


def album_questions(rng: random.Random, scenes: tuple[Scene, ...]) -> list[QAPair]:
    """Return the question-answer pairs about several images."""
    return [
        *compare_questions(rng, scenes),
        *shows_questions(rng, scenes),
        *inside_questions(scenes),
    ]


def compare_questions(rng: random.Random, scenes: tuple[Scene, ...]) -> list[QAPair]:
    """Ask up to three times which image has the most of something, and once for a number in one
    image.
    """
    counts = [totals(scene) for scene in scenes]
    questions = MORE if len(scenes) == 2 else MOST
    turns = []
    for group in rng.sample(sorted(counts[0]), len(counts[0])):
        numbers = [each[group] for each in counts]
        if numbers.count(max(numbers)) == 1:
            question = rng.choice(questions).format(group)
            turns.append((question, f"Picture {numbers.index(max(numbers)) + 1}."))
    index = rng.randrange(len(scenes))
    group = something(rng, scenes[index])
    in_one = (COUNT_IN_ONE.format(group, index + 1), NUMBERS[counts[index][group]] + ".")
    return [QAPair("compare", (turn,)) for turn in (*turns[:3], in_one)]


def shows_questions(rng: random.Random, scenes: tuple[Scene, ...]) -> list[QAPair]:
    """Ask up to twice which image shows a shape that no other image shows."""
    numbers_of = {}  # name → the numbers of the images that show it
    shown = []
    for number, scene in enumerate(scenes, 1):
        for shape in scene.shapes:
            numbers_of.setdefault(shape.name, set()).add(number)
            shown.append((shape.name, number))
    unique = [(name, number) for name, number in shown if numbers_of[name] == {number}]
    chosen = rng.sample(unique, min(2, len(unique)))
    return [QAPair("shows", ((SHOWS.format(name), f"Picture {n}."),)) for name, n in chosen]


def inside_questions(scenes: tuple[Scene, ...]) -> list[QAPair]:
    """Ask for each image what it shows."""
    pairs = []
    for number, scene in enumerate(scenes, 1):
        pairs.append(QAPair("inside", ((INSIDE.format(number), sentence(names_in(scene))),)))
    return pairs


# ----------------------------------------------------------------------- videos and their questions


def make_video(
    rng: random.Random, empty: Scene, most: int = 6
) -> tuple[tuple[Scene, ...], list[QAPair]]:
    """Return frames in which a ball moves, or two shapes come or go in turn; in some frames the
    background flashes.

    most: with 1, only one shape comes or goes.
    """
    length = rng.randint(4, 8)
    if not empty.look:
        gray = rng.randint(140, 170)
        empty = replace(empty, background=(gray, gray, gray))
    if rng.random() < 0.5:
        frames, pairs = moving(rng, empty, length)
    else:
        frames, pairs = coming_and_going(rng, empty, length, most)
    flash_count = rng.randint(0, length // 2)
    if empty.look and not flash_of(frames, empty.look):
        flash_count = 0
    starts = sorted(rng.sample(range(length - flash_count + 1), flash_count))
    for i, start in enumerate(starts):
        flash = start + i  # so that no two flashes are adjacent
        frames[flash] = flashed(frames[flash], flash_of(frames, empty.look))
    pairs.append(QAPair("video", ((rng.choice(FLASHES), NUMBERS[flash_count] + "."),)))
    return tuple(frames), pairs


def flash_of(frames: list[Scene], look: Look | None) -> looks.Color | None:
    """Return white, or in the open style black or white: on which all shapes are visible and from
    which the canvas differs clearly; None if neither does.
    """
    if look is None:
        return 255, 255, 255
    for flash in ((255, 255, 255), (0, 0, 0)):
        lit = replace(look, background=flash, second=flash)
        colors = {shape.paint.color for frame in frames for shape in frame.shapes if shape.paint}
        differs = all(looks.color_distance(flash, c) >= 200 for c in looks.canvas_colors(look))
        if differs and all(looks.is_visible(lit, color) for color in colors):
            return flash
    return None


def flashed(frame: Scene, flash: looks.Color | None) -> Scene:
    """Return the frame with another background."""
    assert flash is not None
    if frame.look is None:
        return replace(frame, background=flash)
    return replace(
        frame, background=flash, look=replace(frame.look, background=flash, second=flash)
    )


def moving(rng: random.Random, empty: Scene, length: int) -> tuple[list[Scene], list[QAPair]]:
    """Return frames in which a ball moves along one axis, over at least 30 % of the free space."""
    side = round(rng.uniform(0.22, 0.32) * min(empty.width, empty.height))
    free = (empty.width - 2 * FRAME - 2 - side, empty.height - 2 * FRAME - 2 - side)
    start = [rng.random(), rng.random()]  # x and y, as shares of the free space
    end = list(start)
    direction = rng.choice(list(DIRECTIONS))
    color = rng.choice(list(COLORS))
    paint = None
    if empty.look:
        color, paint = ball_paint(rng, empty.look)
    axis, grows = DIRECTIONS[direction]
    low = rng.uniform(0, 0.35)
    high = rng.uniform(0.65, 1)
    start[axis] = low if grows else high
    end[axis] = high if grows else low
    frames = []
    for i in range(length):
        x, y = (a + (b - a) * i / (length - 1) for a, b in zip(start, end, strict=True))
        left = FRAME + 1 + round(x * free[0])
        top = FRAME + 1 + round(y * free[1])
        ball = Shape("circle", color, "", (left, top, left + side, top + side), paint)
        frames.append(replace(empty, shapes=(ball,)))
    move = QAPair("video", ((rng.choice(MOVES), direction),))
    return frames, [move, QAPair("frame", ((BALL_COLOR, sentence(color)),))]


def ball_paint(rng: random.Random, look: Look) -> tuple[str, Paint]:
    """Return a color and a paint of it that is visible on the canvas."""
    shades = {color: looks.visible_shades(look, color) for color in COLORS}
    color = rng.choice([color for color in COLORS if shades[color]])
    return color, looks.random_paint(rng, look, "circle", rng.choice(shades[color]), 0.15)


def coming_and_going(
    rng: random.Random, empty: Scene, length: int, most: int
) -> tuple[list[Scene], list[QAPair]]:
    """Return frames in which two shapes appear or disappear, at least two frames apart; with `most`
    1 only one.
    """
    shapes = two_different_shapes(rng, empty)
    times = two_distant_frames(rng, length)
    shapes = rng.sample(shapes, 2)
    verbs = rng.choices(("appears", "disappears"), k=2)
    events = list(zip(shapes, times, verbs, strict=True))[:most]
    frames = []
    for i in range(length):
        visible = []
        for shape, time, verb in events:
            if (i >= time) == (verb == "appears"):
                visible.append(shape)
        frames.append(replace(empty, shapes=tuple(visible)))
    event_sentences = [f"The {shape.name} {verb}." for shape, _, verb in events]
    beginning = sentence(names_in(frames[0]) or "nothing")
    end = sentence(names_in(frames[-1]) or "nothing")
    return frames, [
        QAPair("video", ((rng.choice(FIRST), event_sentences[0]),)),
        QAPair("video", ((rng.choice(LAST), event_sentences[-1]),)),
        QAPair("frame", ((BEGINNING, beginning),)),
        QAPair("frame", ((END, end),)),
    ]


def two_different_shapes(rng: random.Random, empty: Scene) -> tuple[Shape, ...]:
    while True:
        shapes = with_shapes(rng, empty, 2).shapes
        if len({shape.name for shape in shapes}) == 2:
            return shapes


def two_distant_frames(rng: random.Random, length: int) -> list[int]:
    """Return the indices of two frames, neither the first, that are at least two apart."""
    while True:
        first, second = sorted(rng.sample(range(1, length), 2))
        if second - first >= 2:
            return [first, second]


# ------------------------------------------------------------------------ samples and conversations


def make_sample(
    topic: str,
    seed: int,
    cells: tuple[int, int] | None = None,
    stage: int = WHOLE,
    most: int = 6,
    style: str = "framed",
) -> Sample:
    """Return the sample of a topic and a seed; its question-answer pairs are in random order.

    Only training sets cells, stage and most. cells: (rows, columns) of the images after resizing,
    so that all images of a batch have one size. stage: START, SMALL or WHOLE, of the framed style.
    most: the largest number of shapes in an image. style: one of STYLES.
    """
    name = topic if style == "framed" else f"{style} {topic}"
    rng = random.Random(f"{name} {seed}")
    if topic == "clip" and style != "framed":
        cells = cells or rng.choice(open_sizes(topic))
    scenes, pairs = make_scenes(rng, topic, cells, stage, most, style)
    rng.shuffle(pairs)
    if style == "framed":
        return Sample(topic, scenes, tuple(pairs))
    pairs = [reworded(rng, pair) for pair in pairs]
    return Sample(topic, scenes, tuple(pairs), topic == "clip" and is_official(cells))


def reworded(rng: random.Random, pair: QAPair) -> QAPair:
    turns = tuple((reword(rng, question), answer) for question, answer in pair.turns)
    return QAPair(pair.skill, turns)


def make_scenes(
    rng: random.Random,
    topic: str,
    cells: tuple[int, int] | None,
    stage: int,
    most: int,
    style: str,
) -> tuple[tuple[Scene, ...], list[QAPair]]:
    """Return the scenes of a sample and its question-answer pairs."""
    if topic == "clip":
        return make_video(rng, canvas(rng, topic, cells, stage, style), most)
    if topic == "album":
        count = rng.randint(2, 3)
        scenes = tuple(
            with_shapes(rng, canvas(rng, topic, cells, stage, style), most) for _ in range(count)
        )
        return scenes, album_questions(rng, scenes)
    if topic == "words":
        scene = printed_scene(rng, cells, stage, style)
        # At the start there is one question, so that each letter is at the same distance from its
        # token.
        question = READ[0] if stage == START else rng.choice(READ)
        text = " ".join(line.text for line in scene.lines)
        return (scene,), [QAPair("read", ((question, text),))]
    empty = canvas(rng, topic, cells, stage, style)
    scene = with_shapes(rng, empty, most, few_larger=stage != START)
    return (scene,), shapes_questions(rng, scene, plain=stage == START)


def printed_scene(
    rng: random.Random, cells: tuple[int, int] | None, stage: int, style: str
) -> Scene:
    empty = canvas(rng, "words", cells, stage, style)
    if stage == START:
        return with_first_letters(rng, empty)
    return with_lines(rng, empty, spaced=0.25 if stage == WHOLE else 0.5)


def scene(seed: int, cells: tuple[int, int] | None = None, most: int = 6) -> Scene:
    """Return the scene of a sample of the topic "shapes"."""
    return make_sample("shapes", seed, cells, most=most).scenes[0]


def to_conversation(sample: Sample, qa_pairs: list[QAPair]) -> list[dict]:
    """Return the messages of a conversation; the images or the video precede the first question."""
    images = [draw(scene) for scene in sample.scenes]
    if sample.topic == "clip":
        video = {"type": "video", "video": images}
        if not sample.enlarged:
            video |= {"min_pixels": 56**2, "max_pixels": 336 * 224}
        media = [video]
    else:
        media = [{"type": "image", "image": image} for image in images]
    messages = []
    for pair in qa_pairs:
        for question, answer in pair.turns:
            content = [{"type": "text", "text": question}]
            if not messages:
                content = media + content
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": answer})
    return messages


# ----------------------------------------------------------------------------------------- examples

EXAMPLES = {  # file name → evaluation seed, above those that the score uses
    "shapes.png": 89095,
    "wide.png": 10943,
    "tall.png": 13446,
    "square.png": 24796,
    "small.png": 10004,
}
EXAMPLE_VIDEO = "crossing.mp4"


def crossing(frames: int = 24) -> list[Image.Image]:
    """Return frames in which a red ball moves from the left to the right."""
    empty = Scene(112, 84, (155, 155, 155))
    images = []
    for i in range(frames):
        left = round(6 + i / (frames - 1) * (112 - 12 - 26))
        ball = Shape("circle", "red", "", (left, 28, left + 26, 54))
        images.append(draw(replace(empty, shapes=(ball,))))
    return images


def write_video(frames: list[Image.Image], path: Path) -> None:
    """Write frames as H.264 at 6 frames per second."""
    import av  # training does without it

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6, options={"crf": "18"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the example images and the example video.")
    parser.add_argument("--folder", type=Path, default=Path("examples"))
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in EXAMPLES.items():
        example = scene(seed)
        draw(example).save(folder / name)
        print(f"{folder / name}  {example.width}x{example.height}  {describe(example)}")
    frames = crossing()
    write_video(frames, folder / EXAMPLE_VIDEO)
    width, height = frames[0].size
    print(f"{folder / EXAMPLE_VIDEO}  {width}x{height}  {len(frames)} frames: a red ball crosses")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
