"""What the foreign drawings show: shapes, colors and backgrounds that other people would choose.

The bundled model was trained on images of one drawing code (`tiny/`). These scenes share with it
only the words of its questions and answers (tiny/README.md); sizes, shades, backgrounds, outlines
and angles are chosen here. As in its world, shapes of one color in one image are of one kind.

A scene is a function of its seed. All lengths are in pixels, x to the right and y downward, and
angles in degrees, clockwise.
"""

import math
import random
from dataclasses import dataclass, replace
from functools import cache

from matplotlib.colors import to_rgb
from PIL import ImageColor

CODES = ("matplotlib", "svg", "pillow")
KINDS = ("circle", "square", "triangle", "star")
COLORS = ("red", "yellow", "green", "blue", "purple", "black")
COLUMNS = ("left", "", "right")
ROWS = ("top", "", "bottom")
PLACES = tuple(f"{row} {column}".strip() or "center" for row in ROWS for column in COLUMNS)
NUMBERS = ("Zero.", "One.", "Two.", "Three.")  # of at most three shapes

# How each library, and those who use it, write a color.
SHADES = {
    "matplotlib": {
        "red": ("red", "tab:red", "crimson", "xkcd:red"),
        "yellow": ("yellow", "gold", "xkcd:yellow", "#ffdd00"),
        "green": ("green", "tab:green", "limegreen", "xkcd:green"),
        "blue": ("blue", "tab:blue", "royalblue", "xkcd:blue"),
        "purple": ("purple", "tab:purple", "darkviolet", "xkcd:purple"),
        "black": ("black", "xkcd:black", "#111111", "#1a1a1a"),
    },
    "svg": {  # CSS, Material, Tailwind, Bootstrap
        "red": ("red", "#f44336", "#ef4444", "#dc3545"),
        "yellow": ("yellow", "#ffeb3b", "#facc15", "#ffd000"),
        "green": ("green", "#4caf50", "#22c55e", "#198754"),
        "blue": ("blue", "#2196f3", "#3b82f6", "#0d6efd"),
        "purple": ("purple", "#9c27b0", "#a855f7", "#6f42c1"),
        "black": ("black", "#212121", "#0a0a0a", "#111827"),
    },
    "pillow": {
        "red": ("red", "crimson", "firebrick", "hsl(0,100%,40%)"),
        "yellow": ("yellow", "gold", "#f7d716", "hsl(52,100%,50%)"),
        "green": ("green", "limegreen", "forestgreen", "mediumseagreen"),
        "blue": ("blue", "royalblue", "dodgerblue", "mediumblue"),
        "purple": ("purple", "darkviolet", "darkorchid", "rebeccapurple"),
        "black": ("black", "#0f0f0f", "#1c1c1c", "hsl(0,0%,8%)"),
    },
}

BACKGROUNDS = {  # names that mean the same in the three libraries
    "white": ("white",),
    "light": (
        "whitesmoke",
        "beige",
        "lavender",
        "aliceblue",
        "mistyrose",
        "honeydew",
        "lightgray",
        "#eaeaf2",
    ),
    "mid": ("gray", "darkgray", "slategray", "tan", "rosybrown", "cadetblue", "darkseagreen"),
    "dark": ("black", "#222222", "#1e1e2e", "midnightblue", "darkslategray", "#3b2f2f", "#002b36"),
}
LEAST_CONTRAST = 45  # CIE76 distance of a shape from the background; black and white are 100 apart
DARK = 50  # L* of middle gray
LEAST_LIGHTER = 18  # in L*, if both are dark: black on navy blue is 62 away and hard to see

STAR_DEPTHS = (0.382, 0.45)  # inner radius of a star over the outer one; the first is a pentagram
TRIANGLES = (  # angles of the corners on the circle around them
    (-90, 30, 150),  # equilateral
    (-90, 55, 125),  # narrow
    (-90, 10, 170),  # wide
    (-135, 45, 135),  # right-angled
)
PROPORTIONS = (1, 1, 4 / 3, 3 / 2, 16 / 9, 2, 3)
SHORTEST, LONGEST = 100, 448
MARGIN = 3  # least distance of two shapes, and of a shape from the edge of the image


@dataclass(frozen=True)
class Shape:
    """One shape. Its corners, if it has any, are on a circle of `radius` around (x, y)."""

    kind: str
    color: str  # the word of the answers
    shade: str  # the color as its library spells it
    place: str
    x: float
    y: float
    radius: float
    angle: float
    stroke: float  # width of the outline, half of it outside; 0 for a filled shape
    triangle: tuple[int, int, int] = TRIANGLES[0]
    depth: float = STAR_DEPTHS[0]

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"

    def corners(self) -> list[tuple[float, float]]:
        """Return the corners in their order, none of a circle."""
        if self.kind == "circle":
            return []
        directions = {
            "square": [(-135 + 90 * i, 1.0) for i in range(4)],
            "triangle": [(direction, 1.0) for direction in self.triangle],
            "star": [(-90 + 36 * i, self.depth if i % 2 else 1.0) for i in range(10)],
        }
        points = []
        for direction, length in directions[self.kind]:
            radians = math.radians(direction + self.angle)
            x = self.x + self.radius * length * math.cos(radians)
            y = self.y + self.radius * length * math.sin(radians)
            points.append((x, y))
        return points

    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of what is painted, the outline included."""
        half = self.stroke / 2
        corners = self.corners()
        if not corners:
            reach = self.radius + half
            return self.x - reach, self.y - reach, self.x + reach, self.y + reach
        xs = [x for x, _ in corners]
        ys = [y for _, y in corners]
        return min(xs) - half, min(ys) - half, max(xs) + half, max(ys) + half


@dataclass(frozen=True)
class Scene:
    code: str  # one of CODES: which library draws it
    tone: str  # one of BACKGROUNDS
    background: str
    width: int
    height: int
    frame: bool
    shapes: tuple[Shape, ...]


@dataclass(frozen=True)
class Question:
    skill: str
    text: str
    answer: str  # of `ground`: a box as the model writes it


@cache
def to_lab(rgb: tuple[int, ...]) -> tuple[float, float, float]:
    """Convert sRGB, 0 to 255, to CIE L*a*b* under the white D65 (IEC 61966-2-1, CIE 15)."""
    linear = []
    for level in rgb:
        c = level / 255
        linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
    r, g, b = linear
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    roots = []
    for t in (x, y, z):
        roots.append(t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29)
    return 116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])


def is_visible(shade: tuple[int, ...], background: tuple[int, ...]) -> bool:
    """Return whether everyone sees a shape of this sRGB color on this background."""
    a = to_lab(shade)
    b = to_lab(background)
    if a[0] < DARK and b[0] < DARK and abs(a[0] - b[0]) < LEAST_LIGHTER:
        return False
    return math.dist(a, b) >= LEAST_CONTRAST


def parse_color(code: str, color: str) -> tuple[int, ...]:
    """Return the sRGB levels of a color in the spelling of a drawing code."""
    if code == "matplotlib":
        return tuple(round(255 * level) for level in to_rgb(color))
    return ImageColor.getrgb(color)[:3]


# ------------------------------------------------------------------------------------------- scenes


def make_scene(seed: int) -> Scene:
    """Return the scene of a seed; drawing codes and backgrounds take turns."""
    rng = random.Random(f"foreign {seed}")
    code = CODES[seed % len(CODES)]
    tone = list(BACKGROUNDS)[seed // len(CODES) % len(BACKGROUNDS)]
    background = rng.choice(BACKGROUNDS[tone])
    width, height = choose_size(rng)
    frame = rng.random() < 0.1
    wanted = rng.choice((1, 1, 2, 3))
    scene = Scene(code, tone, background, width, height, frame, ())
    shapes: list[Shape] = []
    while len(shapes) < wanted:
        shape = choose_shape(rng, scene, alone=wanted == 1)
        if fits(shape, shapes, scene):
            shapes.append(shape)
    return Scene(code, tone, background, width, height, frame, tuple(shapes))


def choose_size(rng: random.Random) -> tuple[int, int]:
    """Return width and height of an image."""
    proportion = rng.choice(PROPORTIONS)
    longer = rng.randint(math.ceil(SHORTEST * proportion), LONGEST)
    sides = [longer, round(longer / proportion)]
    rng.shuffle(sides)
    return sides[0], sides[1]


def choose_shape(rng: random.Random, scene: Scene, *, alone: bool) -> Shape:
    """Return a shape at random; a lone one may be larger than a ninth of the image.

    Squares are turned by at most 20°: on its corner, a square is called a diamond by many.
    """
    background = parse_color(scene.code, scene.background)
    shades = []
    for color, spellings in SHADES[scene.code].items():
        for shade in spellings:
            if is_visible(parse_color(scene.code, shade), background):
                shades.append((color, shade))
    color = rng.choice(sorted({color for color, _ in shades}))
    shade = rng.choice([shade for of_color, shade in shades if of_color == color])
    kind = rng.choice(KINDS)
    angle = 0.0
    if kind != "circle" and rng.random() < 0.5:
        angle = rng.uniform(-20, 20) if kind == "square" else rng.uniform(0, 360)
    cell = min(scene.width, scene.height) / 3
    extent = cell * rng.uniform(0.65, 2.0 if alone else 1.0)
    stroke = max(3.0, extent * rng.uniform(0.06, 0.12)) if rng.random() < 0.3 else 0.0
    row, column = divmod(rng.randrange(9), 3)
    shape = Shape(
        kind,
        color,
        shade,
        PLACES[3 * row + column],
        x=0,
        y=0,
        radius=1,
        angle=angle,
        stroke=0,
        triangle=rng.choice(TRIANGLES),
        depth=rng.choice(STAR_DEPTHS),
    )
    x = scene.width * (column + rng.uniform(0.2, 0.8)) / 3
    y = scene.height * (row + rng.uniform(0.2, 0.8)) / 3
    return place_shape(shape, x, y, extent, stroke)


def place_shape(shape: Shape, x: float, y: float, extent: float, stroke: float) -> Shape:
    """Scale a shape of radius 1 at (0, 0) so that its box is `extent` long and centered at (x, y).

    The circle around a triangle or a star has its center elsewhere.
    """
    left, top, right, bottom = shape.box()
    radius = (extent - stroke) / max(right - left, bottom - top)
    return replace(
        shape,
        x=x - radius * (left + right) / 2,
        y=y - radius * (top + bottom) / 2,
        radius=radius,
        stroke=stroke,
    )


def fits(shape: Shape, others: list[Shape], scene: Scene) -> bool:
    """Return whether a shape is inside the image, apart from the others and named as the rule."""
    left, top, right, bottom = shape.box()
    if min(left, top, scene.width - right, scene.height - bottom) < MARGIN:
        return False
    for other in others:
        if shape.place == other.place or boxes_meet(shape.box(), other.box(), MARGIN):
            return False
        if shape.color == other.color and shape.kind != other.kind:
            return False
    return True


def boxes_meet(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float], gap: float
) -> bool:
    """Return whether two boxes are less than `gap` apart in both directions."""
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


# ---------------------------------------------------------------------------------------- questions


def at(place: str) -> str:
    return "in the center" if place == "center" else f"at the {place}"


def cell_of(place: str, scene: Scene) -> tuple[float, float, float, float]:
    """Return the rectangle of a place."""
    row, column = divmod(PLACES.index(place), 3)
    width = scene.width / 3
    height = scene.height / 3
    return column * width, row * height, (column + 1) * width, (row + 1) * height


def make_questions(seed: int) -> list[Question]:
    """Return one question of each skill that the scene of a seed allows, two of `what`.

    A name is used only if it fits no other shape, and an empty place only if no shape reaches it.
    """
    rng = random.Random(f"foreign questions {seed}")
    scene = make_scene(seed)
    shapes = scene.shapes
    questions = []
    if len(shapes) == 1:
        text = f"A {shapes[0].name} {at(shapes[0].place)}."
        questions.append(Question("describe", "Describe the image.", text))
    if rng.random() < 0.5:
        kind = rng.choice(KINDS)
        count = sum(shape.kind == kind for shape in shapes)
        text = f"How many {kind}s are there?"
    else:
        color = rng.choice(shapes).color
        count = sum(shape.color == color for shape in shapes)
        text = f"Count the {color} shapes."
    questions.append(Question("count", text, NUMBERS[count]))
    shape = rng.choice(shapes)
    questions.append(Question("what", f"What is {at(shape.place)}?", f"A {shape.name}."))
    empty = [
        place
        for place in PLACES
        if not any(boxes_meet(other.box(), cell_of(place, scene), 0) for other in shapes)
    ]
    if empty:
        questions.append(Question("what", f"What is {at(rng.choice(empty))}?", "Nothing."))
    shape = rng.choice(shapes)
    questions.append(Question("shape", f"What shape is {at(shape.place)}?", f"A {shape.kind}."))
    kinds = [shape.kind for shape in shapes]
    lone = [shape for shape in shapes if kinds.count(shape.kind) == 1]
    if lone:
        shape = rng.choice(lone)
        text = f"What colour is the {shape.kind}?"
        questions.append(Question("color", text, f"{shape.color.capitalize()}."))
    names = [shape.name for shape in shapes]
    named = [shape for shape in shapes if names.count(shape.name) == 1]
    if named:
        shape = rng.choice(named)
        place = at(shape.place)
        text = f"Where is the {shape.name}?"
        questions.append(Question("where", text, f"{place[0].upper()}{place[1:]}."))
        shape = rng.choice(named)
        questions.append(Question("ground", f"Find the {shape.name}.", write_box(shape, scene)))
    return questions


def write_box(shape: Shape, scene: Scene) -> str:
    """Return the box of a shape as the model writes it, in thousandths of the image's sides."""
    left, top, right, bottom = shape.box()
    x1, x2 = round(1000 * left / scene.width), round(1000 * right / scene.width)
    y1, y2 = round(1000 * top / scene.height), round(1000 * bottom / scene.height)
    return (
        f"<|object_ref_start|>the {shape.name}<|object_ref_end|>"
        f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"
    )
