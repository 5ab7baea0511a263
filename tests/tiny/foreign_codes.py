"""Three drawing codes: matplotlib patches, SVG text, and Pillow at four times the size.

Each takes a scene (`foreign_scenes.py`) and returns an RGB image of its size. They share no
drawing: each uses the primitives that its library has, and those who write such code use.
"""

import io
import math

import numpy as np
import resvg_py
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, PathPatch, Polygon, Rectangle, RegularPolygon
from matplotlib.path import Path
from matplotlib.transforms import Affine2D
from PIL import Image, ImageDraw

from tests.tiny.foreign_scenes import TRIANGLES, Scene, Shape

FRAME = "dimgray"
FRAME_WIDTH = 2


def draw(scene: Scene) -> Image.Image:
    """Draw a scene with its drawing code."""
    drawing_codes = {"matplotlib": draw_matplotlib, "svg": draw_svg, "pillow": draw_pillow}
    return drawing_codes[scene.code](scene)


# --------------------------------------------------------------------------------------- matplotlib

DPI = 64  # a power of two: pixels ÷ 64 inches × 64 is the same number of pixels


def draw_matplotlib(scene: Scene) -> Image.Image:
    size = (scene.width / DPI, scene.height / DPI)
    figure = Figure(figsize=size, dpi=DPI, facecolor=scene.background)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.set_axis_off()
    if scene.frame:
        border = Rectangle((1, 1), scene.width - 2, scene.height - 2, fill=False, edgecolor=FRAME)
        border.set_linewidth(in_points(FRAME_WIDTH))
        axes.add_patch(border)
    for shape in scene.shapes:
        patch = make_patch(shape)
        patch.set_joinstyle("round")
        if shape.stroke:
            patch.set(fill=False, edgecolor=shape.shade, linewidth=in_points(shape.stroke))
        else:
            patch.set(facecolor=shape.shade, linewidth=0)
        axes.add_patch(patch)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy())


def in_points(pixels: float) -> float:
    return pixels * 72 / DPI


def make_patch(shape: Shape) -> Patch:
    """Return the patch of a shape. The y-axis points downward, so angles run clockwise."""
    center = (shape.x, shape.y)
    if shape.kind == "circle":
        return Circle(center, shape.radius)
    if shape.kind == "square":
        side = shape.radius * math.sqrt(2)
        corner = (shape.x - side / 2, shape.y - side / 2)
        return Rectangle(corner, side, side, angle=shape.angle, rotation_point="center")
    if shape.kind == "star":
        star = Path.unit_regular_star(5, innerCircle=shape.depth)
        turned = Affine2D().rotate_deg(180 + shape.angle)
        return PathPatch(star.transformed(turned.scale(shape.radius).translate(*center)))
    if shape.triangle == TRIANGLES[0]:
        return RegularPolygon(
            center, 3, radius=shape.radius, orientation=math.radians(180 + shape.angle)
        )
    return Polygon(shape.corners())


# ---------------------------------------------------------------------------------------------- svg


def draw_svg(scene: Scene) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=write_svg(scene), skip_system_fonts=True)
    return Image.open(io.BytesIO(png)).convert("RGB")


def write_svg(scene: Scene) -> str:
    """Return the text of the SVG image of a scene."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{scene.width}" height="{scene.height}">',
        f'<rect width="100%" height="100%" fill="{scene.background}"/>',
    ]
    if scene.frame:
        lines.append(
            f'<rect x="1" y="1" width="{scene.width - 2}" height="{scene.height - 2}" '
            f'fill="none" stroke="{FRAME}" stroke-width="{FRAME_WIDTH}"/>'
        )
    lines += [write_element(shape) for shape in scene.shapes]
    return "\n".join([*lines, "</svg>"])


def write_element(shape: Shape) -> str:
    """Return the SVG element of a shape."""
    paint = f'fill="{shape.shade}"'
    if shape.stroke:
        paint = (
            f'fill="none" stroke="{shape.shade}" stroke-width="{shape.stroke:.2f}" '
            'stroke-linejoin="round"'
        )
    if shape.kind == "circle":
        return f'<circle cx="{shape.x:.2f}" cy="{shape.y:.2f}" r="{shape.radius:.2f}" {paint}/>'
    if shape.kind == "square":
        side = shape.radius * math.sqrt(2)
        return (
            f'<rect x="{shape.x - side / 2:.2f}" y="{shape.y - side / 2:.2f}" '
            f'width="{side:.2f}" height="{side:.2f}" {paint} '
            f'transform="rotate({shape.angle:.2f} {shape.x:.2f} {shape.y:.2f})"/>'
        )
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in shape.corners())
    if shape.kind == "triangle":
        return f'<polygon points="{points}" {paint}/>'
    return f'<path d="M {points.replace(" ", " L ")} Z" {paint}/>'


# ------------------------------------------------------------------------------------------- pillow

SCALE = 4  # ImageDraw does not smooth edges; the reduction does


def draw_pillow(scene: Scene) -> Image.Image:
    large = (SCALE * scene.width, SCALE * scene.height)
    image = Image.new("RGB", large, scene.background)
    canvas = ImageDraw.Draw(image)
    if scene.frame:
        bounds = (0, 0, large[0] - 1, large[1] - 1)
        canvas.rectangle(bounds, outline=FRAME, width=SCALE * FRAME_WIDTH)
    for shape in scene.shapes:
        paint_pillow(canvas, shape)
    return image.resize((scene.width, scene.height), Image.Resampling.LANCZOS)


def paint_pillow(canvas: ImageDraw.ImageDraw, shape: Shape) -> None:
    """Paint a shape on the large image."""
    stroke = round(SCALE * shape.stroke)
    if shape.kind == "circle":
        bounds = tuple(SCALE * side for side in shape.box())
        if stroke:
            canvas.ellipse(bounds, outline=shape.shade, width=stroke)  # inside the bounds
        else:
            canvas.ellipse(bounds, fill=shape.shade)
        return
    corners = [(SCALE * x, SCALE * y) for x, y in shape.corners()]
    if stroke:
        # The joint of the ends is rounded only if the line runs over it.
        canvas.line([*corners, *corners[:2]], fill=shape.shade, width=stroke, joint="curve")
    elif shape.kind == "square":
        circle = (SCALE * shape.x, SCALE * shape.y, SCALE * shape.radius)
        canvas.regular_polygon(circle, 4, rotation=-shape.angle, fill=shape.shade)
    else:
        canvas.polygon(corners, fill=shape.shade)
