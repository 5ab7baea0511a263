"""The small world of the bundled model: pictures of coloured shapes, and questions about them.

A scene is data, drawn from a seed; the picture and the questions are functions of it:

    scene(seed) -> Scene              what stands where, in a picture of which size
    draw(scene) -> PIL.Image          the picture
    questions(scene, rng) -> list     (skill, question, answer), at most eight, in shuffled order

The world: one to four shapes of four kinds and six colours, each in its own cell of a 3×3 grid of places, on a
light background with a thin frame, in pictures of 84 to 200 pixels a side. Shapes of one colour are of one kind, but
not the other way round. Same seed, same scene, on every machine.

Evaluation and training never share a seed: evaluation owns the seeds below TRAIN_SEEDS, training counts up from
there, and `scene` is asked for nothing else.

`python -m tiny.scenes` writes the pictures and the clip of `examples/`.
"""

import argparse
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

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
NUMBERS = ("Zero", "One", "Two", "Three", "Four")
SIDES = (84, 200)  # pixels, shortest and longest side of a picture
# A picture has a thin frame. The vision tower knows positions only relative to each other, so on an even background
# it could hardly tell how far a lone shape is from the edges: nothing there looks like an edge.
FRAME, FRAME_COLOUR = 2, (110, 110, 110)

DESCRIBE = (
    "Describe this image.",
    "Describe the image.",
    "Describe the picture.",
    "What is in this image?",
    "What is in the picture?",
    "What do you see?",
)
COUNT = ("How many {} are there?", "How many {} do you see?", "Count the {}.")
WHERE = ("Where is the {}?", "Where do you see the {}?", "Tell me where the {} is.")
WHAT = ("What is {}?", "What do you see {}?", "Which shape is {}?")


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    place: str
    box: tuple[int, int, int, int]  # left, top, right, bottom in pixels; the right and bottom edges are outside

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]  # in reading order


def scene(seed: int, cells: tuple[int, int] | None = None, most: int = len(NUMBERS) - 1) -> Scene:
    """The scene of a seed. `most` is the largest number of shapes.

    `cells` (rows, columns), which only training sets, asks for a picture that the processor resizes to exactly
    that many 28-pixel cells, so that all pictures of a batch have one shape; without it any size may come.
    """
    rng = random.Random(seed)
    if cells is None:
        height, width = rng.randint(*SIDES), rng.randint(*SIDES)
    else:  # a side within 13 pixels of n * 28 is rounded to n * 28
        height, width = (rng.randint(max(SIDES[0], 28 * n - 13), min(SIDES[1], 28 * n + 13)) for n in cells)
    background = tuple(rng.randint(225, 255) for _ in range(3))

    # With kinds and colours drawn from all, three of a kind would be rare; from a few, all numbers turn up.
    kinds = rng.sample(KINDS, rng.randint(1, len(KINDS)))
    colours = rng.sample(list(COLOURS), rng.randint(1, len(COLOURS)))
    kind_of = {colour: rng.choice(kinds) for colour in colours}  # in one picture a colour belongs to one kind
    shapes = []
    for place in sorted(rng.sample(range(len(PLACES)), rng.randint(1, most))):
        row, column = divmod(place, 3)
        cell_width, cell_height = (width - 2 * FRAME) / 3, (height - 2 * FRAME) / 3
        side = round(rng.uniform(0.75, 0.95) * min(cell_width, cell_height))
        # Anywhere inside its cell, but in a long cell not so far from its middle that the place is in doubt.
        slack_x = min(cell_width - side, 0.4 * cell_width)
        slack_y = min(cell_height - side, 0.4 * cell_height)
        left = int(FRAME + (column + 0.5) * cell_width - side / 2 + rng.uniform(-0.5, 0.5) * slack_x)
        top = int(FRAME + (row + 0.5) * cell_height - side / 2 + rng.uniform(-0.5, 0.5) * slack_y)
        box = (left, top, left + side, top + side)
        colour = rng.choice(colours)
        shapes.append(Shape(kind_of[colour], colour, PLACES[place], box))
    return Scene(width, height, background, tuple(shapes))


def draw(scene: Scene, scale: int = 3) -> Image.Image:
    """The picture of a scene: painted `scale` times as large, then averaged down, for smooth edges."""
    image = Image.new("RGB", (scene.width * scale, scene.height * scale), scene.background)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, image.width - 1, image.height - 1), outline=FRAME_COLOUR, width=FRAME * scale)
    for shape in scene.shapes:
        left, top, right, bottom = (edge * scale for edge in shape.box)
        paint = COLOURS[shape.colour]
        if shape.kind == "circle":
            canvas.ellipse((left, top, right - 1, bottom - 1), fill=paint)
        elif shape.kind == "square":
            canvas.rectangle((left, top, right - 1, bottom - 1), fill=paint)
        elif shape.kind == "triangle":
            canvas.polygon([((left + right) / 2, top), (right - 1, bottom - 1), (left, bottom - 1)], fill=paint)
        else:  # a star: ten corners, by turns on an outer and an inner circle
            x, y, radius = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
            corners = []
            for i in range(10):
                r, angle = radius * (1, 0.42)[i % 2], math.pi * i / 5
                corners.append((x + r * math.sin(angle), y - r * math.cos(angle)))
            canvas.polygon(corners, fill=paint)
    return image.reduce(scale)


def at(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def describe(scene: Scene) -> str:
    """ "A red circle at the top left, a blue square in the center." """
    return sentence(", ".join(f"a {shape.name} {at(shape.place)}" for shape in scene.shapes))


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def questions(scene: Scene, rng: random.Random, most: int = 8) -> list[tuple[str, str, str]]:
    """At most eight (skill, question, answer), shuffled: one description, three to count, two each where and what.

    `where` is asked only of a shape that is alone in its kind and colour, so a picture may have none. With a
    smaller `most`, the description and some of the others.
    """
    shapes, asked = scene.shapes, []

    # To count: all shapes, those of a kind or those of a colour. The number is chosen first, then what there are so
    # many of: otherwise nearly all answers would be zero or one, and "is there any?" would do for counting.
    totals = {"shapes": len(shapes)}
    totals |= {f"{kind}s": sum(shape.kind == kind for shape in shapes) for kind in KINDS}
    totals |= {f"{colour} shapes": sum(shape.colour == colour for shape in shapes) for colour in COLOURS}
    for _ in range(3):
        number = rng.choice(sorted(set(totals.values())))
        what = rng.choice([what for what, total in totals.items() if total == number])
        asked.append(("count", rng.choice(COUNT).format(what), NUMBERS[number] + "."))

    names = Counter(shape.name for shape in shapes)
    unique = [shape for shape in shapes if names[shape.name] == 1]
    for shape in rng.sample(unique, min(2, len(unique))):
        asked.append(("where", rng.choice(WHERE).format(shape.name), sentence(at(shape.place))))

    # What is there: mostly at a place that holds something.
    by_place = {shape.place: f"a {shape.name}" for shape in shapes}
    for place in (rng.choice(shapes).place, rng.choice((rng.choice(shapes).place, rng.choice(PLACES)))):
        asked.append(("what", rng.choice(WHAT).format(at(place)), sentence(by_place.get(place, "nothing"))))

    rng.shuffle(asked)
    asked = [("describe", rng.choice(DESCRIBE), describe(scene)), *asked[: most - 1]]
    rng.shuffle(asked)
    return asked


# name: evaluation seed, one above those that the score is taken on
CLIP = "crossing.mp4"
EXAMPLES = {"shapes.png": 62454, "wide.png": 12897, "tall.png": 29736, "square.png": 20032, "small.png": 3451}


def crossing(frames: int = 24) -> list[Image.Image]:
    """A clip: a red circle goes from the left to the right, past a blue square. (No training has shown clips yet.)"""
    square = Shape("square", "blue", "bottom", (86, 78, 110, 102))
    pictures = []
    for i in range(frames):
        left = round(6 + i / (frames - 1) * (196 - 12 - 36))
        circle = Shape("circle", "red", "top", (left, 20, left + 36, 56))
        pictures.append(draw(Scene(196, 112, (244, 240, 232), (circle, square))))
    return pictures


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
        stream.width, stream.height, stream.pix_fmt = 196, 112, "yuv420p"
        for picture in crossing():
            film.mux(stream.encode(av.VideoFrame.from_image(picture)))
        film.mux(stream.encode())
    print(f"{folder / CLIP}  196x112  {crossing.__doc__}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
