r"""Ask where something is; print the boxes of the answer in pixels and draw them.

    python -m apps.grounding --image examples/shapes.png \
        --prompt "Find the red circle." --out boxes.png

The answer of Qwen2-VL has special tokens around names and corners:

    <|object_ref_start|>the red circle<|object_ref_end|><|box_start|>(120,340),(560,780)<|box_end|>

Corners are (x,y) in thousandths of the image's width and height.
Source: arXiv 2409.12191, section 2.2.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    import startup

    startup.begin()

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
from output_files import write_file

GRID = 1000  # coordinates run from 0 to this
# Kind, content and end token; that is "" where another special token or nothing follows.
MARKED = re.compile(r"<\|(object_ref|box)_start\|>(.*?)(<\|\1_end\|>|(?=<\|)|$)", re.DOTALL)
POINT = r"\(\s*([0-9]{1,4})\s*,\s*([0-9]{1,4})\s*\)"
CORNERS = re.compile(rf"{POINT}[\s,]*{POINT}[\s,]*")


class Box(NamedTuple):
    """A rectangle with a label, in thousandths of the image's width and height."""

    label: str  # "" if the answer names nothing
    x1: int
    y1: int
    x2: int
    y2: int

    def in_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom in an image of this size, in pixels, not rounded."""
        x_scale = width / GRID
        y_scale = height / GRID
        return self.x1 * x_scale, self.y1 * y_scale, self.x2 * x_scale, self.y2 * y_scale


def parse_boxes(label: str, text: str) -> list[Box]:
    """Return the boxes in "(x1,y1),(x2,y2)…"; none where anything in it is malformed."""
    boxes = []
    for corners in CORNERS.findall(text):
        x1, y1, x2, y2 = map(int, corners)
        if max(x1, y1, x2, y2) > GRID:
            return []
        boxes.append(Box(label, min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)))
    return [] if CORNERS.sub("", text).strip() else boxes


def find_boxes(text: str) -> list[Box]:
    """Return the boxes of an answer that was decoded with skip_special_tokens=False, in order.

    A label holds for all boxes up to the next label, and one pair of box tokens may hold several
    boxes. Warns about and leaves out what is malformed or cut off; integers above 1000 come from
    a model with another scale.
    """
    label = ""
    boxes = []
    for kind, content, end in MARKED.findall(text):
        if kind == "object_ref":
            label = " ".join(content.split())
            continue
        marked_boxes = parse_boxes(label, content) if end else []
        if not marked_boxes:
            warnings.warn(f"left out a malformed box of the answer: {content!r:.80}", stacklevel=2)
        boxes += marked_boxes
    return boxes


def format_box(box: Box, width: int, height: int) -> str:
    """Return one line in pixels: "the red circle: (12, 34) to (56, 78)"."""
    left, top, right, bottom = map(round, box.in_pixels(width, height))
    prefix = f"{box.label}: " if box.label else ""
    return f"{prefix}({left}, {top}) to ({right}, {bottom})"


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
    font = ImageFont.load_default(max(10, round(scale / 36)))
    canvas = ImageDraw.Draw(image)
    labels = list(dict.fromkeys(box.label for box in boxes))
    for number, box in enumerate(boxes, start=1):
        # Light colors, each with a contrast of at least 4.5 to black.
        color = f"hsl({137.5 * labels.index(box.label) % 360}, 100%, 70%)"
        left, top, right, bottom = map(round, box.in_pixels(width, height))
        left = min(left, width - 1)
        top = min(top, height - 1)
        corners = (left, top, max(right - 1, left), max(bottom - 1, top))  # all inside the box
        canvas.rectangle(corners, outline="black", width=line + 1)
        canvas.rectangle(corners, outline=color, width=line)
        if not box.label:
            continue
        label = printable_label(box, number, font)
        label_width = math.ceil(font.getlength(label)) + 2 * line
        label_height = sum(font.getmetrics())
        x = max(0, min(left, width - label_width))
        y = top - label_height  # above the box, or below it at the upper edge of the image
        if y < 0:
            y = min(bottom, height - label_height)
        canvas.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill=color)
        canvas.text((x + line, y), label, fill="black", font=font)
    return image


def check_image_path(path: str) -> None:
    """Raise ValueError for a suffix of no image format."""
    image_format = Image.registered_extensions().get(Path(path).suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(
            f"cannot write {path}: expected the suffix of an image format, such as .png"
        )


def run(arguments: argparse.Namespace) -> None:
    """Answer the question, print the answer and its boxes, and write the drawing."""
    if arguments.out is not None:
        check_image_path(arguments.out)
        command_line.check_output_options(arguments)
    session = command_line.open_session(arguments)
    config = choose_generation_config(arguments, session.model)
    tokenizer = session.processor.tokenizer
    [ids] = generate(session.model, session.batch, arguments.max_new_tokens, config, tokenizer)
    print(tokenizer.decode(ids, stop_strings=config.stop_strings))
    # Not cut, as a stop string such as <|box_end|> may close a box.
    boxes = find_boxes(tokenizer.decode(ids, skip_special_tokens=False))
    for box in boxes:
        print(format_box(box, *session.batch.media[0].size))
    if arguments.out is None:
        return
    if not boxes:
        warnings.warn(f"the answer has no box, so {arguments.out} is not written", stacklevel=2)
        return
    drawing = draw(load_image(arguments.media[0]["image"], session.processor.limits), boxes)
    write_file(arguments.out, drawing.save, arguments.force)


def main(argv: list[str] | None = None) -> int:
    parser = command_line.build_parser(
        "Find objects in one image and print their boxes in pixels.", "python -m apps.grounding"
    )
    command_line.add_output_options(parser, "FILE", "draw the boxes into a copy of the image")
    arguments = command_line.parse_arguments(parser, argv)
    if [item["type"] for item in arguments.media] != ["image"]:
        parser.error("expected exactly one --image and no --video")
    return command_line.run_main("apps.grounding", run, arguments)


if __name__ == "__main__":
    command_line.run_program("apps.grounding", main)
