"""Write tests/golden/video.json: small videos and lists of frames, sampled by qwen-vl-utils 0.0.14.

    python tests/make_golden_video.py

It installs qwen-vl-utils into a temporary directory, so it needs the package index; PyAV, torch,
requests and packaging must be installed. qwen-vl-utils imports torchvision, which has no CPU-only
wheel on the package index, and reads videos with torchvision or decord. Both are replaced here:
PyAV decodes, as in torchvision, and `resize` computes what torchvision 0.24 does to tensors:
bicubic with antialiasing in float32, rounded.
"""

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import numpy as np
from clips import draw_frames, encode
from PIL import Image

GOLDEN = Path(__file__).parent / "golden" / "video.json"

# name: (file name, frames, width, height, arguments of `encode`)
VIDEOS = {
    "30 fps": ("a.mp4", 75, 64, 48, {"rate": 30}),
    "29.97 fps": ("b.mp4", 61, 48, 64, {"rate": Fraction(30000, 1001)}),
    "24 fps, B-frames": (
        "c.mp4",
        49,
        96,
        64,
        {"rate": 24, "codec": "libx264", "options": {"bf": "3", "g": "12"}},
    ),
    "25 fps, long": ("d.mp4", 300, 48, 32, {"rate": 25}),
    "mov": ("e.mov", 18, 60, 50, {"rate": 6}),
    "vp9": ("f.webm", 31, 80, 60, {"rate": 10, "codec": "libvpx-vp9"}),
    "vp8": ("g.webm", 20, 64, 64, {"rate": 12, "codec": "libvpx"}),
    "gif": ("h.gif", 12, 40, 60, {"rate": 10, "codec": "gif", "pixels": "rgb8"}),
    "lossless": ("i.mkv", 7, 70, 98, {"rate": 4, "codec": "ffv1", "pixels": "bgr0"}),
    "two frames": ("j.mp4", 2, 64, 48, {"rate": 10}),
    "three frames": ("k.mp4", 3, 64, 48, {"rate": 10}),
    "thin": ("l.mkv", 8, 12, 900, {"rate": 4, "codec": "ffv1"}),
    "large": ("m.mp4", 5, 1280, 720, {"rate": 2}),
}
COMMON = [
    {},
    {"fps": 1},
    {"fps": 5.0},
    {"nframes": 2},
    {"nframes": 5},
    {"max_frames": 3},
    {"min_frames": 7},
]
COMMON += [
    {"video_start": 0.3},
    {"video_end": 0.45},
    {"video_start": -1, "video_end": 99, "fps": 3},
]
COMMON += [
    {"total_pixels": 400_000},
    {"min_pixels": 20_000, "max_pixels": 60_000},
    {"min_pixels": 3136},
]
COMMON += [
    {"max_pixels": 9_000_000},
    {"min_pixels": 200_000},
    {"max_pixels": 120_000, "nframes": 4},
]
COMMON += [
    {"resized_height": 100, "resized_width": 150},
    {"resized_height": 5, "resized_width": 400},
]
ITEMS = [
    (name, options) for name in VIDEOS for options in (COMMON[:14:4] if name == "large" else COMMON)
]
ITEMS += [
    ("25 fps, long", {"video_start": start, "video_end": end})
    for start, end in ((1, 3), (2.02, 11.51), (0.04, 12))
]
ITEMS += [("25 fps, long", {"fps": fps}) for fps in (0.1, 0.7, 2.5)]
ITEMS += [("25 fps, long", {"fps": 3, "min_frames": 40, "max_frames": 41, "video_start": 1.5})]

# Lists of frames (n, width, height). qwen-vl-utils first resizes them to multiples of 56, which
# changes the first 4.
LISTS = [
    (2, 320, 240),
    (3, 640, 360),
    (5, 480, 640),
    (8, 1280, 720),
    (1, 336, 224),
    (6, 112, 112),
    (3, 1008, 560),
]
LIST_OPTIONS = [{}, {"total_pixels": 300_000}]


def fake_modules() -> dict[str, ModuleType]:
    """Return the replacements for torchvision and decord, to put into sys.modules."""
    import torch

    def read(path):
        with av.open(path) as container:
            rate = float(container.streams.video[0].average_rate)
            return np.stack(
                [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            ), rate

    def read_video(path, start_pts, end_pts, pts_unit, output_format):
        assert (start_pts, end_pts) == (0.0, None), "ranges are read by the fake decord"
        frames, rate = read(path)
        return torch.from_numpy(frames).permute(0, 3, 1, 2), None, {"video_fps": rate}

    def resize(video, size, interpolation, antialias):
        values = torch.nn.functional.interpolate(
            video.float(), size, mode=interpolation, antialias=antialias
        )
        return values.clamp(0, 255).round().to(torch.uint8)

    class VideoReader:
        def __init__(self, path):
            self.frames, self.rate = read(path)

        def __len__(self):
            return len(self.frames)

        def get_avg_fps(self):
            return self.rate

        def get_batch(self, indices):
            return SimpleNamespace(asnumpy=lambda: self.frames[indices])

    modules = {
        name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "decord")
    }
    torchvision, transforms, decord = modules.values()
    torchvision.__version__ = "0.24.0"
    torchvision.transforms = transforms
    torchvision.io = SimpleNamespace(read_video=read_video)
    transforms.functional = SimpleNamespace(resize=resize)
    transforms.InterpolationMode = SimpleNamespace(BICUBIC="bicubic")
    decord.VideoReader = VideoReader
    return modules


def summary(frames: np.ndarray) -> dict:
    """Return of uint8 [F, H, W, 3] the size, the mean of up to 4 frames, and every n-th value."""
    selected = frames[:: len(frames) // 4 + 1]
    return {
        "size": list(frames.shape[1:3]),
        "means": [round(float(frame.mean()), 2) for frame in selected],
        "values": frames.ravel()[:: frames.size // 12 + 1].tolist(),
    }


def write_videos(directory: Path) -> dict[str, Path]:
    """Encode all of VIDEOS; return {name: path}."""
    paths = {name: directory / file for name, (file, *_) in VIDEOS.items()}
    for name, (_, n, width, height, arguments) in VIDEOS.items():
        encode(paths[name], draw_frames(n, width, height), **arguments)
    return paths


def run_helper(helper, paths: dict[str, Path]) -> dict:
    """Return the golden records of `helper`, the module qwen_vl_utils.vision_process."""
    draw = random.Random(0)
    return {
        "films": sample_videos(helper, paths),
        "lists": resize_lists(helper),
        "counts": count_frames(helper, draw),
        "spread": spread_indices(draw),
    }


def sample_videos(helper, paths: dict[str, Path]) -> list[dict]:
    """Return a record for each of ITEMS that the helper accepts."""
    records = []
    for name, options in ITEMS:
        item = {"video": str(paths[name]), **options}
        try:
            # Raises where `fetch_video` would fall back to torchvision.
            helper._read_video_decord(item)
            video, metadata = helper.fetch_video(item, return_video_metadata=True)
        except (ValueError, AssertionError):
            continue  # too few frames, a range of one frame, or impossible bounds
        indices = metadata["frames_indices"]
        if not options.keys() & {"video_start", "video_end"}:
            assert helper._read_video_torchvision(item)[1]["frames_indices"].tolist() == indices
        frames = video.permute(0, 2, 3, 1).byte().numpy()
        record = {"film": name, "options": options, "indices": indices}
        records.append(record | summary(frames))
    return records


def resize_lists(helper) -> list[dict]:
    """Return a record for each list of frames and its options."""
    records = []
    for (n, width, height), options in itertools.product(LISTS, LIST_OPTIONS):
        images = [Image.fromarray(frame) for frame in draw_frames(n, width, height)]
        video = helper.fetch_video({"video": images, **options})
        frames = video.permute(0, 2, 3, 1).byte().numpy()
        records.append({"list": [n, width, height], "options": options, **summary(frames)})
    return records


def count_frames(helper, draw: random.Random) -> list[list]:
    """Return 300 random inputs of `smart_nframes` with its result."""
    records = []
    while len(records) < 300:
        total = int(10 ** draw.uniform(0.3, 5))
        rate = draw.choice([4, 10, 15, 24, 25, 30, 60, 30000 / 1001, 12.34])
        if draw.random() < 0.3:
            item = {"nframes": draw.randint(1, 800)}
        else:
            item = {"fps": round(10 ** draw.uniform(-2, 1.5), 2)}
        if "fps" in item and draw.random() < 0.5:
            item |= {"min_frames": draw.randint(0, 20), "max_frames": draw.randint(2, 900)}
        try:
            records.append([total, rate, item, helper.smart_nframes(item, total, rate)])
        except ValueError:
            continue
    return records


def spread_indices(draw: random.Random) -> list[list]:
    """Return 12 frame ranges with the indices that float32 gives."""
    import torch

    records = []
    while len(records) < 12:  # where float64 gives other integers
        first = draw.randint(0, 9)
        total = draw.randint(2000, 200_000)
        n = draw.randint(20, 120)
        indices = torch.linspace(first, first + total, n).round().long().tolist()
        if indices != np.linspace(first, first + total, n).round().astype(int).tolist():
            records.append([first, first + total, indices])
    return records


def import_helper(directory: Path) -> ModuleType:
    """Return `qwen_vl_utils.vision_process` of the package installed in `directory`."""
    package = directory / "qwen_vl_utils"
    spec = importlib.util.spec_from_file_location(package.name, package / "__init__.py")
    sys.modules[package.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[package.name])
    return importlib.import_module("qwen_vl_utils.vision_process")


def main() -> None:
    os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
    with tempfile.TemporaryDirectory() as directory:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            directory,
            "qwen-vl-utils==0.0.14",
        ]
        subprocess.run(install, check=True)
        sys.modules.update(fake_modules())
        helper = import_helper(Path(directory))
        golden = run_helper(helper, write_videos(Path(directory)))
    parts = (
        f'"{part}": [\n' + ",\n".join(map(json.dumps, records)) + "\n]"
        for part, records in golden.items()
    )
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    counts = ", ".join(f"{len(records)} {part}" for part, records in golden.items())
    print(f"{GOLDEN}: {counts}, {GOLDEN.stat().st_size} bytes")


if __name__ == "__main__":
    main()
