"""Write tests/golden/preprocess.json: what the reference, transformers 5.23.0 with Pillow 13.0.0, makes of pictures.

    python tests/make_golden_preprocess.py

For each picture of `pictures()`: its grid, a hash of all its pixel values, and some of the values themselves, so
that a difference shows its size. Run it again only when the pictures change or Pillow is updated.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FOLDER = Path(__file__).parent / "golden"
GOLDEN = FOLDER / "preprocess.json"
ROTATED = FOLDER / "rotated.jpg"  # 60×40 stored pixels with EXIF orientation 6: 40×60 when upright
BOUNDS = {
    "min_pixels": 56 * 56,
    "max_pixels": 300 * 300,
}  # so that pictures of both kinds stay small


def colours(height: int, width: int, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels]: ramps with hard edges and a fine grain, the same on every machine."""
    y, x, c = np.ogrid[:height, :width, :channels]
    ramp = (x * 255 // max(width - 1, 1)) * (c != 1) + (y * 255 // max(height - 1, 1)) * (c != 0)
    edges = 120 * ((x // 7 + y // 5 + c) % 2)
    grain = (x * 31 + y * 17 + c * 101 + x * y) % 23
    return ((ramp + edges + grain) % 256).astype(np.uint8)


def pictures() -> dict[str, Image.Image]:
    """Pictures of every Pillow mode that a file can have, and of sizes at the edges of what is allowed."""
    rgb = Image.fromarray(colours(61, 83))
    alpha = Image.fromarray(colours(61, 83, 1)[..., 0])
    found = {
        mode: rgb.convert(mode)
        for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "RGBX")
    }
    found["RGBA"] = rgb.copy()
    found["RGBA"].putalpha(alpha)
    found["LA"] = rgb.convert("L")
    found["LA"].putalpha(alpha)
    found["PA"] = rgb.convert("P").convert("PA")
    found["PA"].putalpha(alpha)
    found["RGBa"] = found["RGBA"].convert("RGBa")
    wide = np.arange(61 * 83, dtype=np.uint16).reshape(61, 83)
    found["I;16"] = Image.fromarray(wide * 13)
    found["I;16 dark"] = Image.fromarray(wide // 17)
    found["I"] = Image.fromarray(wide.astype(np.int32) - 900)
    found["F"] = Image.fromarray(wide.astype(np.float32) / 19 - 0.3)

    found["P, one colour transparent"] = found["P"].copy()
    found["P, one colour transparent"].info["transparency"] = found["P"].getpixel((40, 30))
    found["P, alpha per colour"] = found["P"].copy()
    found["P, alpha per colour"].info["transparency"] = bytes(range(256))
    found["L, one level transparent"] = found["L"].copy()
    found["L, one level transparent"].info["transparency"] = found["L"].getpixel((40, 30))
    found["RGB, one colour transparent"] = rgb.copy()
    ImageDraw.Draw(found["RGB, one colour transparent"]).ellipse((10, 10, 50, 50), fill=(1, 2, 3))
    found["RGB, one colour transparent"].info["transparency"] = (1, 2, 3)

    sizes = [
        (1, 1),
        (1, 200),
        (200, 1),
        (2, 3),
        (10, 2000),
        (27, 29),
        (28, 28),
        (42, 70),
        (56, 56),
        (57, 3000),
    ]
    sizes += [(119, 120), (280, 280), (299, 301), (301, 299), (517, 333), (1000, 40)]
    return found | {
        f"{height}×{width}": Image.fromarray(colours(height, width)) for height, width in sizes
    }


def summary(pixel_values: np.ndarray, image_grid_thw: np.ndarray) -> dict:
    """The golden record of one picture: grid, hash of the little-endian float32 values, 12 of them spread out."""
    values = np.ascontiguousarray(pixel_values, dtype="<f4")
    spread = values.ravel()[:: values.size // 12 + 1]
    return {
        "grid": image_grid_thw.tolist(),
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "values": [float(value) for value in spread],
    }


def write_rotated() -> None:
    """Write the rotated JPEG, unless it is there: another libjpeg would write other bytes."""
    if not ROTATED.exists():
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(colours(40, 60)).save(ROTATED, quality=90, exif=exif)


def main() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    write_rotated()
    reference = Qwen2VLImageProcessorPil(**BOUNDS)
    golden = {}
    for name, picture in (pictures() | {ROTATED.name: str(ROTATED)}).items():
        found = reference([picture], return_tensors="np")
        golden[name] = summary(found["pixel_values"], found["image_grid_thw"])
    lines = [f"{json.dumps(name)}: {json.dumps(record)}" for name, record in golden.items()]
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"{GOLDEN}: {len(golden)} pictures, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
