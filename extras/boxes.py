"""Where things are: the boxes in an answer, as text, in pixels, and painted onto the picture.

Asked where something is, Qwen2-VL answers with control tokens around names and corners:

    <|object_ref_start|>the red circle<|object_ref_end|><|box_start|>(120,340),(560,780)<|box_end|>

The corners, x before y, lie on a grid that has 1000 steps along each side of the picture, whatever its size: 0 is the
left or upper edge, 1000 the right or lower one. A quad (`<|quad_start|>`) gives four corners, in any direction.
Source: arXiv 2409.12191, section 2.2.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from media import to_rgb

GRID = 1000
CONTROL = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")
POINT = r"\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)"
POINTS = re.compile(rf"\s*{POINT}(?:[\s,]*{POINT})*\s*")
CORNERS = {"box": 2, "quad": 4}  # points that make one

# Pillow's own font knows only ASCII. For other letters, the first of these that is installed and has them is taken.
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "PingFang.ttc",
         "arial.ttf", "msyh.ttc", "malgun.ttf")  # fmt: skip


class Box(NamedTuple):
    """A named rectangle on the grid of 0 to 1000."""

    label: str  # "" where the answer names nothing
    x1: int
    y1: int
    x2: int
    y2: int

    def in_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom in pixels of a picture of this size: grid value / 1000 · side, not rounded.

        They are edges and not pixel centres, so the whole picture is (0, 0, width, height). What lies outside is
        moved to the edge, and corners in the wrong order are put in order.
        """
        left, right = sorted(min(max(x, 0), GRID) / GRID * width for x in (self.x1, self.x2))
        top, bottom = sorted(min(max(y, 0), GRID) / GRID * height for y in (self.y1, self.y2))
        return left, top, right, bottom


def find_boxes(text: str) -> list[Box]:
    """The boxes of an answer that was decoded with skip_special_tokens=False, in its order; corners sorted.

    A name holds for all boxes up to the next name. One pair of box tokens may hold several boxes. Of a quad the
    rectangle around it is given.

    Left out, with a warning, is what cannot be read: a box that the end of the answer cuts off, anything but pairs
    of whole numbers, a wrong number of them, and numbers above 1000. Those say that the model took another scale,
    and moved to the edge they would make a box that looks right.
    """
    pieces = CONTROL.split(text)  # text, then kind, edge and text again for each control token
    marks = list(zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True))
    label, boxes = "", []
    for i, (kind, edge, inside) in enumerate(marks):
        if edge == "end":
            continue
        if kind == "object_ref":
            label = " ".join(inside.split())
            continue
        numbers = (
            [int(number) for number in re.findall("[0-9]+", inside)]
            if POINTS.fullmatch(inside)
            else []
        )
        step = 2 * CORNERS[kind]
        closed = [following[:2] for following in marks[i + 1 : i + 2]] == [(kind, "end")]
        if not closed or not numbers or len(numbers) % step or max(numbers) > GRID:
            warnings.warn(
                f"left out a {kind} of the answer that cannot be read: {inside!r:.80}", stacklevel=2
            )
            continue
        for start in range(0, len(numbers), step):
            x, y = numbers[start : start + step : 2], numbers[start + 1 : start + step : 2]
            boxes.append(Box(label, min(x), min(y), max(x), max(y)))
    return boxes


def format_box(box: Box, width: int, height: int) -> str:
    """One line for the terminal, in whole pixels: "the red circle: (12, 34) to (56, 78)"."""
    left, top, right, bottom = (round(value) for value in box.in_pixels(width, height))
    return f"{box.label}{': ' if box.label else ''}({left}, {top}) to ({right}, {bottom})"


# ----------------------------------------------------------------------------------------------------- drawing
@functools.cache
def load_font(name: str | None, size: int) -> ImageFont.FreeTypeFont | None:
    """A font by its file name, wherever the system keeps its fonts; Pillow's own for None; None if there is none."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the font has a glyph for each character. One that it lacks looks like one that nobody can have."""
    lacking = bytes(font.getmask("\U0010ffff"))
    return all(bytes(font.getmask(character)) != lacking for character in text)


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """The first font at hand that can write the text; None if there is none."""
    fonts = (load_font(name, size) for name in (None, *FONTS))
    return next((font for font in fonts if font and has_letters(font, text)), None)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """As much of the text as fits into so many pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The area that two rectangles (left, top, right, bottom) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def draw(picture: Image.Image, boxes: list[Box]) -> Image.Image:
    """An RGB copy of the picture with the boxes and their labels on it, a colour for each label.

    Lines are light with black edges and letters black on a light plate, which can be seen on any ground. A label
    stands above its box, or below or in it where it would cover less of other labels; it is shortened to the
    picture's width. Where no font at hand has its letters, the box's number in the list (from 1) stands there, with a
    warning.
    """
    picture = to_rgb(picture)  # a copy, also of an RGB picture
    width, height = picture.size
    scale = math.sqrt(width * height)
    line, edge = max(1, round(scale / 200)), max(1, round(scale / 800))
    size, margin = max(10, round(scale / 36)), max(2, round(scale / 200))
    hues = {
        label: 137.5 * i % 360 for i, label in enumerate(dict.fromkeys(box.label for box in boxes))
    }
    colours = {
        label: f"hsl({hue}, 100%, 70%)" for label, hue in hues.items()
    }  # black on them has a contrast of 5

    canvas = ImageDraw.Draw(picture)
    rectangles = []
    for box in boxes:
        left, top, right, bottom = box.in_pixels(width, height)
        left, top = min(int(left), width - 1), min(int(top), height - 1)
        right, bottom = (
            max(math.ceil(right) - 1, left),
            max(math.ceil(bottom) - 1, top),
        )  # the last pixels inside
        rectangles.append((left, top, right, bottom))
        outer = (left - edge, top - edge, right + edge, bottom + edge)
        canvas.rectangle(outer, outline="black", width=line + 2 * edge)
        canvas.rectangle((left, top, right, bottom), outline=colours[box.label], width=line)

    plates = []
    for number, (box, (left, top, _, bottom)) in enumerate(
        zip(boxes, rectangles, strict=True), start=1
    ):
        if not box.label:
            continue
        font, text = font_for(box.label, size), box.label
        if font is None:
            warnings.warn(
                f"no font has all letters of {text!r:.80}, so it is drawn as {number}", stacklevel=2
            )
            font, text = load_font(None, size), str(number)
        text = shorten(text, font, width - 2 * margin)
        ascent, descent = font.getmetrics()
        w, h = math.ceil(font.getlength(text)) + 2 * margin, ascent + descent
        x = max(0, min(left, width - w))
        places = [(x, max(0, min(y, height - h))) for y in (top - h, bottom + 1, top)]
        places = [(x, y, x + w, y + h) for x, y in places]
        plate = min(places, key=lambda place: sum(overlap(place, other) for other in plates))
        plates.append(plate)
        x, y, right, bottom = plate
        canvas.rectangle(
            (x, y, right - 1, bottom - 1), fill=colours[box.label], outline="black", width=edge
        )
        canvas.text((x + margin, y), text, fill="black", font=font)
    return picture


def check_path(path: str | Path) -> None:
    """Raises ValueError for an ending that no picture format has, FileNotFoundError for a folder that is missing.

    To be asked before a long computation; `save` asks again.
    """
    path = Path(path)
    formats = Image.registered_extensions()
    if formats.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(
            f"cannot write {path}: its ending names no known picture format, such as .png or .jpg"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}")


def save(picture: Image.Image, boxes: list[Box], path: str | Path) -> None:
    """Writes the picture with the boxes on it; the path's ending decides the format.

    Raises ValueError, FileNotFoundError or OSError with one sentence that names the path.
    """
    check_path(path)
    try:
        draw(picture, boxes).save(path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
