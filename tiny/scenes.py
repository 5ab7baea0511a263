"""The small world of the bundled model: pictures and clips, and questions about them.

A lesson is data, drawn from a topic and a seed: what is to be seen, and what is asked about it, with the answers.

    lesson(topic, seed) -> Lesson     scenes and exchanges of questions and answers; same seed, same lesson
    draw(scene) -> PIL.Image          one picture, or one frame of a clip
    messages(lesson, exchanges)       the conversation, as the processor takes it

Four topics:

    shapes   a picture of one to six coloured shapes at nine places, on a light background with a thin frame
    words    a picture of one or two printed lines: a word or a number of up to six characters each
    album    two or three small pictures of shapes
    clip     four to eight frames: a ball moves, or shapes appear and disappear, and the light may flash

Evaluation and training never share a seed: evaluation owns the seeds below TRAIN_SEEDS, training counts up from
there.

`python -m tiny.scenes` writes the pictures and the clip of `examples/`.
"""

import argparse
import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TRAIN_SEEDS = 1_000_000  # seeds 0 ... 999,999 are for evaluation, those from here on for training

KINDS = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (240, 200, 0),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (150, 50, 180),
    "black": (20, 20, 20),
}
PLACES = (  # in reading order: place i is row i // 3, column i % 3
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
NUMBERS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six")
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SKILLS = {  # by topic
    "shapes": (
        "describe",
        "count",
        "what",
        "colour",
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
# A picture has a thin frame. The vision tower knows positions only relative to each other, so on an even background
# it could hardly tell how far a lone shape is from the edges: nothing there looks like an edge.
FRAME, FRAME_COLOUR = 2, (110, 110, 110)
SMALLEST = 20  # pixels, the side of the smallest shape
MANY = 84  # pixels: a picture with a shorter side has at most two shapes, or one line
# Sizes of print, small to large: of the scalable font, and negative: how often the bitmap font is enlarged.
PRINT = (-3, 28, 32, -4, 40, 48)
SPACED = 28  # pixels from letter to letter in a spaced line, as much as a token is wide

DESCRIBE = (
    "Describe the image.",
    "Describe this image.",
    "Describe the picture.",
    "What do you see?",
)
COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
WHAT = ("What is {}?", "What do you see {}?")
COLOUR = ("What colour is the {}?", "Which colour does the {} have?")
SHAPE = ("What shape is {}?", "Which shape is {}?")
WHERE = ("Where is the {}?", "Where do you see the {}?", "Tell me where the {} is.")
RELATION = "Is the {} {} the {}?"
GROUND = ("Find the {}.", "Detect the {}.", "Draw a box around the {}.")
READ = ("What is written here?", "Read the text.", "What does it say?")
MORE = ("Which picture has more {}?", "Which picture shows more {}?")
MOST = ("Which picture has the most {}?", "Which picture shows the most {}?")
IN_ONE, SHOWS = "How many {} are there in picture {}?", "Which picture shows a {}?"
INSIDE = "What is in picture {}?"
MOVES = ("Which way does the ball move?", "Where does the ball go?")
FIRST = ("What happens first?", "What is the first thing that happens?")
LAST = ("What happens last?", "What is the last thing that happens?")
BEGIN, END = "What is there at first?", "What is there at the end?"
FLASHES = ("How many flashes are there?", "How many flashes?", "Count the flashes.")
WAYS = {
    "To the left.": (0, False),
    "To the right.": (0, True),
    "Up.": (1, False),
    "Down.": (1, True),
}  # axis, forward


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    place: str
    box: tuple[
        int, int, int, int
    ]  # left, top, right, bottom in pixels; the right and bottom edges are outside

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Line:
    """A printed line. `size` is that of the scalable font; negative: how often the bitmap font is enlarged. In a
    spaced line each letter stands in the middle of as many pixels as `pitch` says; 0: one follows the other."""

    text: str
    colour: str
    size: int
    left: int
    top: int
    pitch: int = 0


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...] = ()  # in reading order
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True)
class Exchange:
    """One question and its answer, or two in a row of which the second cannot do without the first."""

    skill: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Lesson:
    topic: str
    scenes: tuple[Scene, ...]  # one picture, two or three, or the frames of a clip
    exchanges: tuple[Exchange, ...]


# ---------------------------------------------------------------------------------------------------- the pictures


# By topic: the rows and columns of 28-pixel cells that a picture may have, each from … to, the largest area in cells,
# how many times as high as wide it may be, or as wide as high, and how far a side may be from its cells, in pixels.
# (The processor rounds sides to whole cells, so 13 pixels of 56 are a visible distortion, which letters do not bear.)
SIZES = {
    "shapes": ((2, 12), (2, 12), 96, 2, 2, 13),
    "words": ((2, 4), (2, 8), 24, 1, 4, 4),
    "album": ((3, 4), (3, 4), 16, 2, 2, 13),
    "clip": ((3, 4), (3, 4), 16, 2, 2, 13),
}
# Training begins with pictures of one size, where a place or a letter is just one token, and goes on with small ones.
START, SMALL, WHOLE = 0, 1, 2
START_SIZE = {"shapes": (3, 3), "words": (2, 6)}


def sizes(topic: str, stage: int = WHOLE) -> list[tuple[int, int]]:
    """The sizes of a topic's pictures as (rows, columns) of cells; small ones stand there more than once."""
    if stage == START:
        return [START_SIZE[topic]]
    heights, widths, area, high, wide, _ = SIZES[topic]
    return [
        (rows, columns)
        for rows in range(heights[0], heights[1] + 1)
        for columns in range(widths[0], widths[1] + 1)
        if rows * columns <= (area if stage == WHOLE else 16)
        and rows <= high * columns
        and columns <= wide * rows
        for _ in range(round(96 / (8 + rows * columns)))
    ]


def canvas(
    rng: random.Random, topic: str, cells: tuple[int, int] | None = None, stage: int = WHOLE
) -> Scene:
    """An empty scene that the processor will resize to exactly `cells`."""
    off = 0 if stage == START else SIZES[topic][-1]
    height, width = (
        rng.randint(max(56, 28 * n - off), min(336, 28 * n + off))
        for n in cells or rng.choice(sizes(topic))
    )
    return Scene(width, height, tuple(rng.randint(225, 255) for _ in range(3)))


def with_shapes(rng: random.Random, empty: Scene, most: int = 6, few_larger: bool = True) -> Scene:
    """Shapes at different places, not touching each other. Few shapes may be larger than a ninth of the picture."""
    width, height = empty.width, empty.height
    most = min(most, 6 if min(width, height) >= MANY else 2)
    # With kinds and colours drawn from all, three of a kind would be rare; from a few, all numbers turn up.
    kinds = rng.sample(KINDS, rng.randint(1, len(KINDS)))
    colours = rng.sample(list(COLOURS), rng.randint(1, len(COLOURS)))
    kind_of = {
        colour: rng.choice(kinds) for colour in colours
    }  # in one picture a colour belongs to one kind
    count = rng.randint(1, most)
    cell_width, cell_height = (width - 2 * FRAME) / 3, (height - 2 * FRAME) / 3
    while True:
        shapes = []
        for place in sorted(rng.sample(range(len(PLACES)), count)):
            row, column = divmod(place, 3)
            side = rng.uniform(0.75, 1.4 if count < 3 and few_larger else 0.95) * min(
                cell_width, cell_height
            )
            side = max(SMALLEST, round(side))
            # Its middle stays near that of the cell, so that its place is never in doubt.
            x = FRAME + (column + 0.5 + rng.uniform(-0.2, 0.2)) * cell_width
            y = FRAME + (row + 0.5 + rng.uniform(-0.2, 0.2)) * cell_height
            left = int(min(max(x - side / 2, FRAME + 1), width - FRAME - 1 - side))
            top = int(min(max(y - side / 2, FRAME + 1), height - FRAME - 1 - side))
            colour = rng.choice(colours)
            shapes.append(
                Shape(kind_of[colour], colour, PLACES[place], (left, top, left + side, top + side))
            )
        if not any(near(one.box, other.box) for one, other in combinations(shapes, 2)):
            return replace(empty, shapes=tuple(shapes))


def near(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    """Whether two boxes overlap or are less than two pixels apart."""
    return all(one[i] < other[i + 2] + 2 and other[i] < one[i + 2] + 2 for i in (0, 1))


@cache
def font(size: int):
    """Pillow's own fonts: the scalable one in a size, or for a negative size the bitmap one."""
    return ImageFont.load_default(size) if size > 0 else ImageFont.load_default_imagefont()


def printed(line: Line) -> Image.Image:
    """The line as a mask: 255 where the ink is, 0 elsewhere. A spaced line has all letters on one base line."""
    if line.pitch:
        letters = [printed(replace(line, text=letter, pitch=0)) for letter in line.text]
        height = max(letter.height for letter in letters)
        mask = Image.new("L", (line.pitch * len(letters), height))
        for i, letter in enumerate(letters):
            mask.paste(
                letter, (line.pitch * i + (line.pitch - letter.width) // 2, height - letter.height)
            )
        return mask
    mask = Image.new("L", tuple(math.ceil(edge) for edge in font(line.size).getbbox(line.text)[2:]))
    ImageDraw.Draw(mask).text((0, 0), line.text, fill=255, font=font(line.size))
    mask = mask.crop(mask.getbbox())
    return mask.resize([side * max(1, -line.size) for side in mask.size], Image.Resampling.NEAREST)


def with_lines(rng: random.Random, empty: Scene, spaced: float = 0.25) -> Scene:
    """One line, or in a high picture also two, each anywhere in its part of it, in a size that fits. `spaced` is the
    share of spaced lines."""
    count = 1 if empty.height < MANY - 4 else rng.randint(1, 2)
    height, lines = (empty.height - 2 * FRAME) // count, []
    colour = rng.choice([colour for colour in COLOURS if colour != "yellow"])
    for row in range(count):
        free = [-1]
        while min(free) < 0:
            text = "".join(rng.choices(rng.choice((LETTERS, LETTERS, DIGITS)), k=rng.randint(1, 6)))
            line = Line(
                text, colour, rng.choice(PRINT), 0, 0, SPACED if rng.random() < spaced else 0
            )
            free = [
                a - b - 4
                for a, b in zip((empty.width - 2 * FRAME, height), printed(line).size, strict=True)
            ]
        left, top = (
            FRAME + 2 + rng.randint(0, free[0]),
            FRAME + 2 + row * height + rng.randint(0, free[1]),
        )
        lines.append(replace(line, left=left, top=top))
    return replace(empty, lines=tuple(lines))


def with_first_letters(rng: random.Random, empty: Scene) -> Scene:
    """As many letters as the picture has columns of tokens, each in the middle of its own: reading begins so."""
    colour = rng.choice([colour for colour in COLOURS if colour != "yellow"])
    line = Line(
        "".join(rng.choices(LETTERS + DIGITS, k=empty.width // 28)), colour, 32, 0, 0, SPACED
    )
    return replace(empty, lines=(replace(line, top=(empty.height - printed(line).height) // 2),))


def draw(scene: Scene, scale: int = 3) -> Image.Image:
    """The picture of a scene: painted `scale` times as large, then averaged down, for smooth edges."""
    image = Image.new("RGB", (scene.width * scale, scene.height * scale), scene.background)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle(
        (0, 0, image.width - 1, image.height - 1), outline=FRAME_COLOUR, width=FRAME * scale
    )
    for shape in scene.shapes:
        left, top, right, bottom = (edge * scale for edge in shape.box)
        paint = COLOURS[shape.colour]
        if shape.kind == "circle":
            canvas.ellipse((left, top, right - 1, bottom - 1), fill=paint)
        elif shape.kind == "square":
            canvas.rectangle((left, top, right - 1, bottom - 1), fill=paint)
        elif shape.kind == "triangle":
            canvas.polygon(
                [((left + right) / 2, top), (right - 1, bottom - 1), (left, bottom - 1)], fill=paint
            )
        else:  # a star: ten corners, by turns on an outer and an inner circle
            x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
            corners = []
            for i in range(10):
                r, angle = radius * (1, 0.42)[i % 2], math.pi * i / 5
                corners.append((x + r * math.sin(angle), y - r * math.cos(angle)))
            canvas.polygon(corners, fill=paint)
    image = image.reduce(scale)
    for line in scene.lines:
        image.paste(COLOURS[line.colour], (line.left, line.top), printed(line))
    return image


# --------------------------------------------------------------------------------------------------- the questions


def at(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def describe(scene: Scene) -> str:
    """ "A red circle at the top left, a blue square in the center." """
    return sentence(", ".join(f"a {shape.name} {at(shape.place)}" for shape in scene.shapes))


def boxed(shape: Shape, scene: Scene) -> str:
    """A shape in the published format: its box in thousandths of width and height, here rounded to tens."""
    sides = (scene.width, scene.height) * 2
    left, top, right, bottom = (
        10 * round(100 * edge / side) for edge, side in zip(shape.box, sides, strict=True)
    )
    reference = f"<|object_ref_start|>the {shape.name}<|object_ref_end|>"
    return f"{reference}<|box_start|>({left},{top}),({right},{bottom})<|box_end|>"


def totals(scene: Scene) -> dict[str, int]:
    """How many there are of what: of all shapes, of each kind and of each colour."""
    found = {"shapes": len(scene.shapes)}
    found |= {f"{kind}s": sum(shape.kind == kind for shape in scene.shapes) for kind in KINDS}
    return found | {
        f"{colour} shapes": sum(shape.colour == colour for shape in scene.shapes)
        for colour in COLOURS
    }


def something(rng: random.Random, scene: Scene) -> str:
    """What to count. The number is chosen first, then what there are so many of: otherwise nearly all answers would
    be zero or one, and "is there any?" would do for counting."""
    found = totals(scene)
    number = rng.choice(sorted(set(found.values())))
    return rng.choice([what for what, total in found.items() if total == number])


def related(rng: random.Random, one: Shape, other: Shape, plain: bool = False) -> tuple[str, str]:
    """Asks for one of the directions in which the places of the two differ. `plain`: only "left of" and "above".

    With all four words, neither a word nor a place alone makes an answer likelier: nothing to begin with.
    """
    (row, column), (other_row, other_column) = (
        divmod(PLACES.index(shape.place), 3) for shape in (one, other)
    )
    ways = [("above", "below", row, other_row), ("left of", "right of", column, other_column)]
    before, after, first, second = rng.choice([way for way in ways if way[2] != way[3]])
    said = before if plain else rng.choice((before, after))
    return RELATION.format(one.name, said, other.name), "Yes." if (said == before) == (
        first < second
    ) else "No."


def shapes_questions(rng: random.Random, scene: Scene, plain: bool = False) -> list[Exchange]:
    """About one picture of shapes. What names a shape names just one; where none can be named so, less is asked."""
    shapes, found = scene.shapes, totals(scene)
    names, kinds = (Counter(getattr(shape, by) for shape in shapes) for by in ("name", "kind"))
    by_name = [shape for shape in shapes if names[shape.name] == 1]  # "the red circle" is clear
    by_kind = [shape for shape in shapes if kinds[shape.kind] == 1]  # even "the circle" is
    asked = [("describe", (rng.choice(DESCRIBE), describe(scene)))]

    def count(phrase: str, what: str) -> tuple[str, str]:
        return phrase.format(what), NUMBERS[found[what]] + "."

    asked += [("count", count(rng.choice(COUNT), something(rng, scene))) for _ in range(2)]
    by_place = {shape.place: f"a {shape.name}" for shape in shapes}
    for _ in range(2):
        place = rng.choice((rng.choice(shapes).place, rng.choice(shapes).place, rng.choice(PLACES)))
        asked.append(
            ("what", (rng.choice(WHAT).format(at(place)), sentence(by_place.get(place, "nothing"))))
        )
    one = rng.choice(shapes)
    asked.append(("shape", (rng.choice(SHAPE).format(at(one.place)), sentence(f"a {one.kind}"))))
    first, second = rng.sample(("circles", "squares", "triangles", "stars", "shapes"), 2)
    chats = [
        (
            count(rng.choice(COUNT), first),
            count(rng.choice(("And {}?", "And how many {}?")), second),
        )
    ]

    its_colour, it_is_at = (
        ("And its colour?", "What colour is it?"),
        ("And where is it?", "Where is it?"),
    )
    colour = (rng.choice(its_colour), sentence(one.colour))
    chats.append(((rng.choice(SHAPE).format(at(one.place)), sentence(f"a {one.kind}")), colour))
    for one in rng.sample(by_kind, min(2, len(by_kind))):
        colour, place = sentence(one.colour), sentence(at(one.place))
        asked.append(("colour", (rng.choice(COLOUR).format(one.kind), colour)))
        chats.append(((rng.choice(COLOUR).format(one.kind), colour), (rng.choice(it_is_at), place)))
        chats.append(
            ((rng.choice(WHERE).format(one.kind), place), (rng.choice(its_colour), colour))
        )
    for one in rng.sample(by_name, min(4, len(by_name))):
        asked.append(("where", (rng.choice(WHERE).format(one.name), sentence(at(one.place)))))
    for one in rng.sample(by_name, min(2, len(by_name))):
        asked.append(("ground", (rng.choice(GROUND).format(one.name), boxed(one, scene))))
    for one, other in [rng.sample(by_name, 2) for _ in range(3) if len(by_name) > 1]:
        asked.append(("relation", related(rng, one, other, plain)))
        where = (rng.choice(WHERE).format(one.name), sentence(at(one.place)))
        chats.append((where, (f"And the {other.name}?", sentence(at(other.place)))))
    asked = [Exchange(skill, (turn,)) for skill, turn in asked]
    return [*asked, Exchange("chat", rng.choice(chats))]


def album_questions(rng: random.Random, scenes: tuple[Scene, ...]) -> list[Exchange]:
    """Which picture has more of something, which one holds something, how many or what is in one of them."""
    found, more = [totals(scene) for scene in scenes], []
    for what in rng.sample(sorted(found[0]), len(found[0])):
        numbers = [each[what] for each in found]
        if numbers.count(max(numbers)) == 1:
            question = rng.choice(MORE if len(scenes) == 2 else MOST).format(what)
            more.append((question, f"Picture {numbers.index(max(numbers)) + 1}."))
    which = rng.randrange(len(scenes))
    what = something(rng, scenes[which])
    in_one = (IN_ONE.format(what, which + 1), NUMBERS[found[which][what]] + ".")
    asked = [("compare", turn) for turn in (*more[:3], in_one)]
    names = [
        (shape.name, number) for number, scene in enumerate(scenes, 1) for shape in scene.shapes
    ]
    alone = [(name, n) for name, n in names if {m for other, m in names if other == name} == {n}]
    for name, number in rng.sample(alone, min(2, len(alone))):
        asked.append(("shows", (SHOWS.format(name), f"Picture {number}.")))
    for number, scene in enumerate(scenes, 1):
        there = ", ".join(f"a {shape.name}" for shape in scene.shapes)
        asked.append(("inside", (INSIDE.format(number), sentence(there))))
    return [Exchange(skill, (turn,)) for skill, turn in asked]


def clip(
    rng: random.Random, empty: Scene, most: int = 6
) -> tuple[tuple[Scene, ...], list[Exchange]]:
    """Frames in which a ball moves, or two shapes come or go one after the other; in some the light flashes.

    `most` of 1: only one shape comes or goes, both first and last.
    """
    length, grey = rng.randint(4, 8), rng.randint(140, 170)
    empty = replace(empty, background=(grey, grey, grey))
    moves = rng.random() < 0.5
    frames, exchanges = (
        moving(rng, empty, length) if moves else coming_and_going(rng, empty, length, most)
    )
    number = rng.randint(0, length // 2)
    starts = sorted(rng.sample(range(length - number + 1), number))
    flashes = [start + i for i, start in enumerate(starts)]  # so that no two are neighbours
    for i in flashes:
        frames[i] = replace(frames[i], background=(255, 255, 255))
    exchanges.append(Exchange("video", ((rng.choice(FLASHES), NUMBERS[len(flashes)] + "."),)))
    return tuple(frames), exchanges


def moving(rng: random.Random, empty: Scene, length: int) -> tuple[list[Scene], list[Exchange]]:
    side = round(rng.uniform(0.22, 0.32) * min(empty.width, empty.height))
    room = [edge - 2 * FRAME - 2 - side for edge in (empty.width, empty.height)]
    begin = [
        rng.random(),
        rng.random(),
    ]  # as shares of the room; along its way it passes at least 30 % of it
    end, answer, colour, frames = list(begin), rng.choice(list(WAYS)), rng.choice(list(COLOURS)), []
    axis, forward = WAYS[answer]
    begin[axis], end[axis] = sorted(
        (rng.uniform(0, 0.35), rng.uniform(0.65, 1)), reverse=not forward
    )
    for i in range(length):
        shares = [a + (b - a) * i / (length - 1) for a, b in zip(begin, end, strict=True)]
        left, top = (
            FRAME + 1 + round(share * free) for share, free in zip(shares, room, strict=True)
        )
        frames.append(
            replace(
                empty, shapes=(Shape("circle", colour, "", (left, top, left + side, top + side)),)
            )
        )
    asked = [
        ("video", (rng.choice(MOVES), answer)),
        ("frame", ("What colour is the ball?", sentence(colour))),
    ]
    return frames, [Exchange(skill, (turn,)) for skill, turn in asked]


def coming_and_going(
    rng: random.Random, empty: Scene, length: int, most: int
) -> tuple[list[Scene], list[Exchange]]:
    pair = ()
    while len({shape.name for shape in pair}) < 2:
        pair = with_shapes(rng, empty, 2).shapes
    times = (0, 0)
    while times[1] - times[0] < 2:
        times = sorted(rng.sample(range(1, length), 2))
    events = list(
        zip(rng.sample(pair, 2), times, rng.choices(("appears", "disappears"), k=2), strict=True)
    )
    events, frames = events[:most], []
    for i in range(length):
        shapes = [shape for shape, when, what in events if (i >= when) == (what == "appears")]
        frames.append(replace(empty, shapes=tuple(shapes)))
    first, *_, last = (f"The {shape.name} {what}." for shape, _, what in (events[0], *events))
    seen = [
        ", ".join(f"a {shape.name}" for shape in frame.shapes) or "nothing"
        for frame in (frames[0], frames[-1])
    ]
    asked = [("video", (rng.choice(FIRST), first)), ("video", (rng.choice(LAST), last))]
    asked += [
        ("frame", (question, sentence(shapes)))
        for question, shapes in zip((BEGIN, END), seen, strict=True)
    ]
    return frames, [Exchange(skill, (turn,)) for skill, turn in asked]


def lesson(
    topic: str, seed: int, cells: tuple[int, int] | None = None, stage: int = WHOLE, most: int = 6
) -> Lesson:
    """The lesson of a topic and a seed; the exchanges are in random order.

    `cells` (rows, columns), `stage` and `most` are set by training only: pictures that the processor resizes to
    exactly that many 28-pixel cells, so that all of a batch have one shape, and simpler ones with fewer shapes at the
    start.
    """
    rng = random.Random(f"{topic} {seed}")

    def empty() -> Scene:
        return canvas(rng, topic, cells, stage)

    if topic == "clip":
        scenes, exchanges = clip(rng, empty(), most)
    elif topic == "album":
        scenes = tuple(with_shapes(rng, empty(), most) for _ in range(rng.randint(2, 3)))
        exchanges = album_questions(rng, scenes)
    elif topic == "words":
        spaced = 0.25 if stage == WHOLE else 0.5
        scenes = (
            with_first_letters(rng, empty())
            if stage == START
            else with_lines(rng, empty(), spaced),
        )
        # At the start always the same question: each letter is said at the same distance from its token.
        question = READ[0] if stage == START else rng.choice(READ)
        exchanges = [
            Exchange("read", ((question, " ".join(line.text for line in scenes[0].lines)),))
        ]
    else:
        scenes = (with_shapes(rng, empty(), most, few_larger=stage != START),)
        exchanges = shapes_questions(rng, scenes[0], plain=stage == START)
    rng.shuffle(exchanges)
    return Lesson(topic, scenes, tuple(exchanges))


def scene(seed: int, cells: tuple[int, int] | None = None, most: int = 6) -> Scene:
    """The picture of a lesson about shapes."""
    return lesson("shapes", seed, cells, most=most).scenes[0]


def messages(lesson: Lesson, exchanges: list[Exchange]) -> list[dict]:
    """The conversation: what there is to see stands before the first question."""
    pictures = [draw(scene) for scene in lesson.scenes]
    seen = [{"type": "image", "image": picture} for picture in pictures]
    if lesson.topic == "clip":
        seen = [
            {"type": "video", "video": pictures, "min_pixels": 56 * 56, "max_pixels": 336 * 224}
        ]
    said = []
    for question, answer in (turn for exchange in exchanges for turn in exchange.turns):
        said.append({"role": "user", "content": [*seen, {"type": "text", "text": question}]})
        said.append({"role": "assistant", "content": answer})
        seen = []
    return said


# name: evaluation seed, above those that the score is taken on
EXAMPLES = {
    "shapes.png": 89095,
    "wide.png": 10943,
    "tall.png": 13446,
    "square.png": 24796,
    "small.png": 10004,
}
CLIP = "crossing.mp4"


def crossing(frames: int = 24) -> list[Image.Image]:
    """A red ball goes from the left to the right."""
    empty = Scene(112, 84, (155, 155, 155))
    lefts = [round(6 + i / (frames - 1) * (112 - 12 - 26)) for i in range(frames)]
    return [
        draw(replace(empty, shapes=(Shape("circle", "red", "", (x, 28, x + 26, 54)),)))
        for x in lefts
    ]


def main(argv=None) -> int:
    import av  # training does without it

    parser = argparse.ArgumentParser(description="Write the example pictures and the example clip.")
    parser.add_argument("--folder", type=Path, default=Path("examples"))
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in EXAMPLES.items():
        example = scene(seed)
        draw(example).save(folder / name)
        print(f"{folder / name}  {example.width}x{example.height}  {describe(example)}")
    with av.open(str(folder / CLIP), "w") as film:
        stream = film.add_stream("libx264", rate=6, options={"crf": "18"})
        pictures = crossing()
        (stream.width, stream.height), stream.pix_fmt = pictures[0].size, "yuv420p"
        for picture in pictures:
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    print(f"{folder / CLIP}  {stream.width}x{stream.height}  {crossing.__doc__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
