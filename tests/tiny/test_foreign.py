"""The foreign drawings show what their answers name, and what the model in tiny/open knows of them.

The drawings are judged by their pixels alone: what a shape painted is what differs from the same
image without it.
"""

import colorsys
import math
import re

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="one of the foreign drawing codes")
pytest.importorskip("resvg_py", reason="one of the foreign drawing codes")

from dataclasses import replace

from tests.tiny import foreign_drawings
from tests.tiny.foreign_codes import draw
from tests.tiny.foreign_drawings import IMAGES, Result, score, tally
from tests.tiny.foreign_scenes import (
    BACKGROUNDS,
    CODES,
    COLORS,
    KINDS,
    PLACES,
    Question,
    Scene,
    Shape,
    make_questions,
    make_scene,
    to_lab,
)
from tiny.score import OPEN_CHECKPOINT

SEEDS = range(IMAGES)

# The least share of all questions that the weights trained on open drawings answer correctly:
# just below the 0.958 that they reach (python -m tests.tiny.foreign_drawings tiny/open).
LEAST = 0.95


def painted(scene: Scene, shape: Shape) -> np.ndarray:
    """Return which pixels are painted by a shape alone: [H, W], bool."""
    without = np.asarray(draw(replace(scene, shapes=())), dtype=int)
    alone = np.asarray(draw(replace(scene, shapes=(shape,))), dtype=int)
    change = np.abs(alone - without).max(axis=-1)
    return change > change.max() / 2


def bounds(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the true pixels, the last two exclusive."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def middle_color(image: Image.Image, mask: np.ndarray) -> tuple[int, ...]:
    """Return the color that most of the masked pixels have."""
    red, green, blue = np.asarray(image)[mask].astype(int).T
    codes, counts = np.unique(red << 16 | green << 8 | blue, return_counts=True)
    code = int(codes[counts.argmax()])
    return code >> 16, code >> 8 & 255, code & 255


def color_word(rgb: tuple[int, ...]) -> str:
    """Return the word for a color, by its hue in degrees."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in rgb))
    if value < 0.2:
        return "black"
    assert saturation > 0.35, f"{rgb} has no color"
    hue *= 360
    ranges = {"yellow": (44, 66), "green": (95, 155), "blue": (200, 245), "purple": (250, 305)}
    for word, (first, last) in ranges.items():
        if first <= hue <= last:
            return word
    assert hue >= 340 or hue <= 10, f"{rgb} has the hue {hue:.0f}"
    return "red"


def kind_word(mask: np.ndarray) -> str:
    """Return the kind of a shape, filled or outlined, at any angle.

    A line through a star leaves it and comes back, which no line does with the others. Of the
    least rectangle around it, a square fills all, a circle π/4, and a triangle a half.
    """
    left, top, right, bottom = bounds(mask)
    shape = filled(mask[top:bottom, left:right])
    if max(notches(shape), notches(shape.T)) > 0.05 * shape.sum():
        return "star"
    height, width = shape.shape
    ys = np.tile(np.arange(height), 2)  # the first and the last pixel of each row are enough
    xs = np.concatenate([shape.argmax(axis=1), width - 1 - shape[:, ::-1].argmax(axis=1)])
    areas = []
    for angle in np.radians(np.arange(0, 90, 1.5)):
        along = xs * np.cos(angle) + ys * np.sin(angle)
        across = ys * np.cos(angle) - xs * np.sin(angle)
        areas.append((np.ptp(along) + 1) * (np.ptp(across) + 1))
    fill = shape.sum() / min(areas)
    if fill < 0.65:
        return "triangle"
    return "circle" if fill < 0.86 else "square"


def filled(mask: np.ndarray) -> np.ndarray:
    """Return the pixels that have a painted one, or are one, in each of the four directions.

    The corner between two points of a star is open by 108° or more: one direction is free there.
    """
    return between(mask) & between(mask.T).T


def between(shape: np.ndarray) -> np.ndarray:
    """Return the pixels from the first to the last of each row."""
    from_left = np.logical_or.accumulate(shape, axis=1)
    from_right = np.logical_or.accumulate(shape[:, ::-1], axis=1)[:, ::-1]
    return from_left & from_right


def notches(shape: np.ndarray) -> int:
    """Return how many pixels outside a shape are between two others of it in the same row."""
    return int((between(shape) & ~shape).sum())


# ------------------------------------------------------------------------------------------- scenes


def test_make_scene_covers_every_code_background_kind_color_and_place():
    scenes = [make_scene(seed) for seed in SEEDS]
    assert IMAGES >= 200
    for code in CODES:
        for tone in BACKGROUNDS:
            cases = [scene for scene in scenes if (scene.code, scene.tone) == (code, tone)]
            assert len(cases) == IMAGES / len(CODES) / len(BACKGROUNDS)
    assert {len(scene.shapes) for scene in scenes} == {1, 2, 3}
    assert 0.03 < sum(scene.frame for scene in scenes) / IMAGES < 0.2
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert {(shape.kind, shape.color) for shape in shapes} == {
        (k, c) for k in KINDS for c in COLORS
    }
    assert {shape.place for shape in shapes} == set(PLACES)
    for kind in KINDS:
        of_kind = [shape for shape in shapes if shape.kind == kind]
        assert {shape.stroke > 0 for shape in of_kind} == {False, True}
        if kind != "circle":
            assert {shape.angle != 0 for shape in of_kind} == {False, True}


def test_make_scene_has_sides_of_100_to_448_pixels_up_to_one_to_three():
    sides = [sorted((make_scene(seed).width, make_scene(seed).height)) for seed in SEEDS]
    assert min(shorter for shorter, _ in sides) >= 100
    assert max(longer for _, longer in sides) <= 448
    proportions = [longer / shorter for shorter, longer in sides]
    assert max(proportions) == pytest.approx(3, abs=0.02)
    assert sum(proportion == 1 for proportion in proportions) > IMAGES / 10
    assert {make_scene(seed).width > make_scene(seed).height for seed in SEEDS} == {False, True}


def test_make_scene_returns_the_same_image_for_a_seed():
    for seed in range(3):
        assert make_scene(seed) == make_scene(seed)
        assert make_questions(seed) == make_questions(seed)
        assert draw(make_scene(seed)).tobytes() == draw(make_scene(seed)).tobytes()


# L*a*b* of the primaries of sRGB, as tables of color spaces list them.
@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((0, 0, 0), (0, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
    ],
)
def test_to_lab_gives_the_known_values(rgb, expected):
    assert to_lab(rgb) == pytest.approx(expected, abs=0.1)


# ----------------------------------------------------------------------------------------- drawings


def scenes_of(code: str) -> list[Scene]:
    return [scene for seed in SEEDS if (scene := make_scene(seed)).code == code]


def check_shapes(scene: Scene) -> None:
    """Assert that each shape of a scene is drawn as its fields, and so the answers, say."""
    image = draw(scene)
    assert image.size == (scene.width, scene.height)
    assert image.mode == "RGB"
    together = np.zeros((scene.height, scene.width), dtype=int)
    masks = [painted(scene, shape) for shape in scene.shapes]
    background = middle_color(image, ~np.any(masks, axis=0))
    for shape, mask in zip(scene.shapes, masks, strict=True):
        color = middle_color(image, mask)
        assert color_word(color) == shape.color
        color_lab, background_lab = to_lab(color), to_lab(background)
        assert math.dist(color_lab, background_lab) > 40, "too little contrast"
        lightness = sorted((color_lab[0], background_lab[0]))
        assert lightness[1] > 45 or lightness[1] - lightness[0] > 15, "dark on dark"
        assert kind_word(mask) == shape.kind
        box = bounds(mask)
        assert box == pytest.approx(shape.box(), abs=2)
        row, column = divmod(PLACES.index(shape.place), 3)
        for low, high, index, side in (
            (box[0], box[2], column, scene.width),
            (box[1], box[3], row, scene.height),
        ):
            assert (index + 0.2) * side / 3 - 2 <= (low + high) / 2 <= (index + 0.8) * side / 3 + 2
        together += mask
    assert together.max() == 1, "shapes overlap"


@pytest.mark.parametrize("code", CODES)
def test_draw_paints_what_the_answers_name(code):
    for scene in scenes_of(code)[:12]:
        check_shapes(scene)


@pytest.mark.slow
@pytest.mark.parametrize("code", CODES)
def test_draw_paints_what_the_answers_name_in_every_image(code):
    for scene in scenes_of(code)[12:]:
        check_shapes(scene)


def test_draw_frames_only_where_the_scene_has_a_frame():
    for code in CODES:
        scenes = scenes_of(code)
        for frame in (False, True):
            scene = next(scene for scene in scenes if scene.frame == frame)
            pixels = np.asarray(draw(replace(scene, shapes=())))
            edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
            inside = pixels[scene.height // 2, scene.width // 2].astype(int)
            for edge in edges:
                assert (np.abs(edge - inside).max(axis=-1) > 20).all() == frame


# ---------------------------------------------------------------------------------------- questions


def place_in(text: str) -> str:
    if "in the center" in text:
        return "center"
    return re.search(r"at the ([a-z ]+)", text).group(1)


def matching(scene: Scene, words: str) -> list[Shape]:
    """Return the shapes that words like "red circle", "stars" or "red shapes" name."""
    found = []
    for shape in scene.shapes:
        known = {shape.kind, f"{shape.kind}s", shape.color, "shapes"}
        if set(words.split()) <= known:
            found.append(shape)
    return found


def answer_to(question: Question, scene: Scene) -> str:
    """Answer a question by looking at the shapes of the scene; boxes apart."""
    if question.skill == "count":
        words = re.search(r"(?:many|the) ([a-z ]+?)(?: are there\?|\.)$", question.text).group(1)
        return ("Zero.", "One.", "Two.", "Three.")[len(matching(scene, words))]
    if question.skill == "describe":
        [shape] = scene.shapes
        return f"A {shape.color} {shape.kind} " + (
            "in the center." if shape.place == "center" else f"at the {shape.place}."
        )
    if question.skill in ("what", "shape"):
        there = [shape for shape in scene.shapes if shape.place == place_in(question.text)]
        if not there:
            return "Nothing."
        words = f"{there[0].color} {there[0].kind}" if question.skill == "what" else there[0].kind
        return f"A {words}."
    [shape] = matching(scene, re.search(r"the ([a-z ]+)\W$", question.text).group(1))
    if question.skill == "color":
        return f"{shape.color}.".capitalize()
    return ("in the center." if shape.place == "center" else f"at the {shape.place}.").capitalize()


def test_make_questions_answers_follow_from_the_shapes():
    asked = dict.fromkeys(("describe", "count", "what", "color", "shape", "where", "ground"), 0)
    for seed in SEEDS:
        scene = make_scene(seed)
        for question in make_questions(seed):
            asked[question.skill] += 1
            if question.skill != "ground":
                assert answer_to(question, scene) == question.answer, question
                continue
            name, *corners = re.fullmatch(
                r"<\|object_ref_start\|>the (.+)<\|object_ref_end\|>"
                r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>",
                question.answer,
            ).groups()
            [shape] = matching(scene, name)
            assert question.text == f"Find the {name}."
            x1, y1, x2, y2 = (int(corner) / 1000 for corner in corners)
            box = (x1 * scene.width, y1 * scene.height, x2 * scene.width, y2 * scene.height)
            assert box == pytest.approx(shape.box(), abs=0.3)
    assert min(asked.values()) >= 100, asked


def test_make_questions_asks_about_empty_places_that_no_shape_reaches():
    empty = 0
    for seed in range(0, IMAGES, 8):
        scene = make_scene(seed)
        masks = [painted(scene, shape) for shape in scene.shapes]
        for question in make_questions(seed):
            if question.answer == "Nothing.":
                row, column = divmod(PLACES.index(place_in(question.text)), 3)
                rows = slice(row * scene.height // 3 + 1, (row + 1) * scene.height // 3)
                columns = slice(column * scene.width // 3 + 1, (column + 1) * scene.width // 3)
                assert not np.any([mask[rows, columns] for mask in masks])
                empty += 1
    assert empty >= 20


# -------------------------------------------------------------------------------------------- score


def box_text(x1: int, y1: int, x2: int, y2: int) -> str:
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def test_tally_counts_exact_answers_and_boxes_of_half_the_area():
    scene = make_scene(0)
    where = Question("where", "Where is the star?", "At the top.")
    ground = Question("ground", "Find the star.", box_text(0, 0, 100, 100))
    responses = [
        (where, "At the top."),
        (where, "At the top"),
        (ground, box_text(0, 0, 100, 51)),
        (ground, box_text(0, 0, 100, 49)),
        (ground, "At the top."),
    ]
    results = [Result(0, scene, question, response) for question, response in responses]
    assert tally(results) == {"where": (1, 2), "ground": (1, 3)}
    assert foreign_drawings.table(results).splitlines()[-1].startswith("| together | 40.0 % of 5 |")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:left out a malformed box")
def test_weights_of_open_drawings_know_foreign_drawings():
    counts = score(OPEN_CHECKPOINT)
    right = sum(count for count, _ in counts.values())
    asked = sum(count for _, count in counts.values())
    assert asked == sum(len(make_questions(seed)) for seed in SEEDS)
    assert right / asked >= LEAST, counts
