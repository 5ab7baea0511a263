"""Write tests/golden/preprocess.json: pixels of transformers 5.23.0 with Pillow 13.0.0.

    python tests/make_golden_preprocess.py

For each image of `sample_images()`: its grid, a hash of its pixel values, and some of the values,
which show how large a difference is. Needed only when the images change or Pillow is updated.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "golden"
GOLDEN = FOLDER / "preprocess.json"
ROTATED = FOLDER / "rotated.jpg"  # 60×40 stored pixels with EXIF orientation 6: 40×60 when upright
# Narrow bounds: both upscaled and downscaled images stay small.
BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 300 * 300}


def draw_pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Return uint8 [height, width, channels]: gradients with hard edges and fine grain."""
    y, x, c = np.ogrid[:height, :width, :channels]
    ramp = (x * 255 // max(width - 1, 1)) * (c != 1) + (y * 255 // max(height - 1, 1)) * (c != 0)
    edges = 120 * ((x // 7 + y // 5 + c) % 2)
    grain = (x * 31 + y * 17 + c * 101 + x * y) % 23
    return ((ramp + edges + grain) % 256).astype(np.uint8)


def sample_images() -> dict[str, Image.Image]:
    """Return images of every Pillow mode that a file can have, and of extreme sizes."""
    rgb = Image.fromarray(draw_pixels(61, 83))
    alpha = Image.fromarray(draw_pixels(61, 83, 1)[..., 0])
    images = {
        mode: rgb.convert(mode)
        for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "RGBX")
    }
    images["RGBA"] = rgb.copy()
    images["RGBA"].putalpha(alpha)
    images["LA"] = rgb.convert("L")
    images["LA"].putalpha(alpha)
    images["PA"] = rgb.convert("P").convert("PA")
    images["PA"].putalpha(alpha)
    images["RGBa"] = images["RGBA"].convert("RGBa")
    wide = np.arange(61 * 83, dtype=np.uint16).reshape(61, 83)
    images["I;16"] = Image.fromarray(wide * 13)
    images["I;16 dark"] = Image.fromarray(wide // 17)
    images["I"] = Image.fromarray(wide.astype(np.int32) - 900)
    images["F"] = Image.fromarray(wide.astype(np.float32) / 19 - 0.3)

    images["P, one colour transparent"] = images["P"].copy()
    images["P, one colour transparent"].info["transparency"] = images["P"].getpixel((40, 30))
    images["P, alpha per colour"] = images["P"].copy()
    images["P, alpha per colour"].info["transparency"] = bytes(range(256))
    images["L, one level transparent"] = images["L"].copy()
    images["L, one level transparent"].info["transparency"] = images["L"].getpixel((40, 30))
    images["RGB, one colour transparent"] = rgb.copy()
    ImageDraw.Draw(images["RGB, one colour transparent"]).ellipse((10, 10, 50, 50), fill=(1, 2, 3))
    images["RGB, one colour transparent"].info["transparency"] = (1, 2, 3)

    sizes = [(1, 1), (1, 200), (200, 1), (2, 3), (10, 2000), (27, 29), (28, 28), (42, 70)]
    sizes += [(56, 56), (57, 3000), (119, 120), (280, 280), (299, 301), (301, 299), (517, 333)]
    sizes += [(1000, 40)]
    for height, width in sizes:
        images[f"{height}×{width}"] = Image.fromarray(draw_pixels(height, width))
    return images


def summary(pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> dict:
    """Return grid, hash of the little-endian float32 values, and every n-th value."""
    values = np.ascontiguousarray(pixel_values, dtype="<f4")
    spread = values.ravel()[:: values.size // 12 + 1]
    return {
        "grid": image_grid_thw.tolist(),
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "values": [float(value) for value in spread],
    }


def write_rotated() -> None:
    """Write the rotated JPEG unless it exists: another libjpeg would write other bytes."""
    if not ROTATED.exists():
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(draw_pixels(40, 60)).save(ROTATED, quality=90, exif=exif)


def main() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    write_rotated()
    reference = Qwen2VLImageProcessorPil(**BOUNDS)
    golden = {}
    for name, image in (sample_images() | {ROTATED.name: str(ROTATED)}).items():
        batch = reference([image], return_tensors="np")
        golden[name] = summary(batch["pixel_values"], batch["image_grid_thw"])
    lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{GOLDEN}: {len(golden)} images, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
