r"""Ask where something is; print the boxes of the answer in pixels and draw them.

    python -m apps.grounding --image examples/shapes.png \
        --prompt "Find the red circle." --out boxes.png

The answer of Qwen2-VL has special tokens around names and corners:

    <|object_ref_start|>the red circle<|object_ref_end|><|box_start|>(120,340),(560,780)<|box_end|>

Corners are (x,y) in thousandths of the image's width and height. A quad
(`<|quad_start|>`) has four corners.
Source: arXiv 2409.12191, section 2.2.
"""

import argparse
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

import command_line
from generate import choose_generation_config, generate
from media import load_image, to_rgb

GRID = 1000
CORNERS = {"box": 2, "quad": 4}  # points of each
MARKER = re.compile(r"<\|(object_ref|box|quad)_(start|end)\|>")
POINT = r"\(\s*[0-9]{1,4}\s*,\s*[0-9]{1,4}\s*\)"
POINTS = re.compile(rf"\s*{POINT}(?:[\s,]*{POINT})*\s*")


class Box(NamedTuple):
    """A rectangle with a label, in thousandths of the image's width and height."""

    label: str  # "" if the answer names nothing
    x1: int
    y1: int
    x2: int
    y2: int

    def in_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom in pixels, not rounded, within this image size."""
        left, right = sorted(min(max(x, 0), GRID) / GRID * width for x in (self.x1, self.x2))
        top, bottom = sorted(min(max(y, 0), GRID) / GRID * height for y in (self.y1, self.y2))
        return left, top, right, bottom


def parse_corners(text: str, points: int) -> list[list[int]]:
    """Return [x1, y1, x2, y2] of each box in "(x,y),(x,y)…", `points` to a box; [] if malformed."""
    if not POINTS.fullmatch(text):
        return []
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    size = 2 * points
    if len(numbers) % size or max(numbers) > GRID:
        return []
    corners = []
    for start in range(0, len(numbers), size):
        xs = numbers[start : start + size : 2]
        ys = numbers[start + 1 : start + size : 2]
        corners.append([min(xs), min(ys), max(xs), max(ys)])
    return corners


def find_boxes(text: str) -> list[Box]:
    """Return the boxes of an answer that was decoded with skip_special_tokens=False, in order.

    A label holds for all boxes up to the next label; one pair of box tokens may hold several
    boxes; a quad becomes its bounding box. Warns about and leaves out a box that is malformed or
    cut off: anything but pairs of integers, a wrong number of them, and integers above 1000, which
    come from a model with another scale.
    """
    pieces = MARKER.split(text)  # text, then kind, edge and text of each marker
    label = ""
    boxes = []
    for i in range(1, len(pieces), 3):
        kind, edge, content = pieces[i : i + 3]
        if edge == "end":
            continue
        if kind == "object_ref":
            label = " ".join(content.split())
            continue
        closed = pieces[i + 3 : i + 5] == [kind, "end"]
        found = parse_corners(content, CORNERS[kind]) if closed else []
        if not found:
            warnings.warn(
                f"left out a malformed {kind} of the answer: {content!r:.80}", stacklevel=2
            )
        boxes += [Box(label, *corners) for corners in found]
    return boxes


def format_box(box: Box, width: int, height: int) -> str:
    """Return one line in whole pixels: "the red circle: (12, 34) to (56, 78)"."""
    left, top, right, bottom = (round(value) for value in box.in_pixels(width, height))
    prefix = f"{box.label}: " if box.label else ""
    return f"{prefix}({left}, {top}) to ({right}, {bottom})"


# ------------------------------------------------------------------------------------------ drawing
def printable_label(box: Box, number: int, font: ImageFont.FreeTypeFont) -> str:
    """Return the box's label, or, with a warning, its number if the font lacks a character."""
    missing = bytes(font.getmask("\U0010ffff"))  # the glyph for a character that no font has
    if all(bytes(font.getmask(character)) != missing for character in box.label):
        return box.label
    warnings.warn(
        f"the font lacks letters of {box.label!r:.80}, drawn as {number} instead", stacklevel=3
    )
    return str(number)


def draw(image: Image.Image, boxes: list[Box]) -> Image.Image:
    """Return an RGB copy of the image with the boxes and labels, each label in its own color."""
    image = to_rgb(image)  # a copy, also of an RGB image
    width, height = image.size
    scale = math.sqrt(width * height)
    line = max(1, round(scale / 200))
    edge = max(1, round(scale / 800))  # black, on both sides of a line
    font = ImageFont.load_default(max(10, round(scale / 36)))
    canvas = ImageDraw.Draw(image)
    labels = list(dict.fromkeys(box.label for box in boxes))
    for number, box in enumerate(boxes, start=1):
        # Light colors, each with a contrast of at least 4.5 to black.
        color = f"hsl({137.5 * labels.index(box.label) % 360}, 100%, 70%)"
        left, top, right, bottom = box.in_pixels(width, height)
        left = min(int(left), width - 1)
        top = min(int(top), height - 1)
        right = max(math.ceil(right) - 1, left)  # the last pixel inside
        bottom = max(math.ceil(bottom) - 1, top)
        outer = (left - edge, top - edge, right + edge, bottom + edge)
        canvas.rectangle(outer, outline="black", width=line + 2 * edge)
        canvas.rectangle((left, top, right, bottom), outline=color, width=line)
        if not box.label:
            continue
        label = printable_label(box, number, font)
        label_width = math.ceil(font.getlength(label)) + 2 * line
        label_height = sum(font.getmetrics())
        x = max(0, min(left, width - label_width))
        y = top - label_height  # above the box, or below it at the upper edge of the image
        if y < 0:
            y = max(0, min(bottom + 1, height - label_height))
        plate = (x, y, x + label_width, y + label_height)
        canvas.rectangle(plate, fill=color, outline="black", width=edge)
        canvas.text((x + line, y), label, fill="black", font=font)
    return image


# ------------------------------------------------------------------------------------------ program
def check_image_path(path: str) -> None:
    """Raise ValueError for a suffix of no image format, FileNotFoundError for no directory."""
    image_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(f"cannot write {path}: expected the suffix of an image format, as .png")
    command_line.check_directory(path)


def save(image: Image.Image, path: str) -> None:
    """Write an image. Raises OSError with one sentence that names the path."""
    try:
        image.save(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}") from error


def run(arguments: argparse.Namespace) -> None:
    """Answer the question, print the answer and its boxes, and write the drawing."""
    if arguments.out is not None:
        check_image_path(arguments.out)
    session = command_line.open_session(arguments)
    config = choose_generation_config(arguments, session.model)
    [ids] = generate(session.model, session.batch, arguments.max_new_tokens, config)
    tokenizer = session.processor.tokenizer
    print(tokenizer.decode(ids))
    boxes = find_boxes(tokenizer.decode(ids, skip_special_tokens=False))
    for box in boxes:
        print(format_box(box, *session.batch.media[0].size))
    if arguments.out is None:
        return
    if not boxes:
        warnings.warn(f"the answer has no box, so {arguments.out} is not written", stacklevel=2)
        return
    save(draw(load_image(arguments.media[0]["image"]), boxes), arguments.out)


def main(argv: list[str] | None = None) -> int:
    parser = command_line.build_parser(
        "Find objects in one image and print their boxes in pixels.", "python -m apps.grounding"
    )
    parser.add_argument("--out", metavar="FILE", help="draw the boxes into a copy of the image")
    arguments = command_line.parse_arguments(parser, argv)
    if [item["type"] for item in arguments.media] != ["image"]:
        parser.error("expected exactly one --image and no --video")
    return command_line.run_main("apps.grounding", run, arguments)


if __name__ == "__main__":
    command_line.run_program("apps.grounding", main)
