"""Preprocessing of long videos, beside qwen-vl-utils 0.0.14 and transformers' video processor.

    .venv/bin/pip install --no-deps --target peer torchvision==0.28.0 qwen-vl-utils==0.0.14 decord
    .venv/bin/python -m benchmarks.long_videos --packages peer

From a video file to patches: decoding, sampling, resizing, normalizing, patchifying. The video is
drawn here: 64 seconds of H.264 at 25 frames per second, so that the 2 frames per second of the
official rule are 128. Each figure is the median of new processes, one at a time, in turns; both
sides have read another, short video before. Ours is `load_video` and `frames_to_patches`, as
`Processor` calls them. The peer's is `fetch_video`, which reads by decord, and
`Qwen2VLVideoProcessor`, which needs torchvision: the version that belongs to the installed torch,
0.28 to 2.13.

Printed are frames per second, their ratio, and the peak of memory in multiples of the patches,
which both sides return in float32. The grids must be equal, and the patches may differ by 0.02 in
the mean, as the two sides round colors and resized pixels in their own ways.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import av
import numpy as np

from benchmarks.options import add_process_options, check_common_options
from benchmarks.processes import Record, Say, run_quietly, say_on_stderr
from benchmarks.protocol import report, status_bytes
from preprocess import ImageConfig, frames_to_patches, load_video

RATE = 25
SECONDS = 64
SIZE = (1280, 720)
KEY_FRAMES = 50  # one of so many frames is a key frame, as ordinary encoders have it
SHORT = 8  # frames of the video that warms a process up
LARGEST_DIFFERENCE = 0.02  # of the mean, in units of normalized pixels: about one level of 256
SAMPLED = 64  # values of the patches are compared, one in so many


# ---------------------------------------------------------------------------------------- the video
def draw_frames(count: int) -> Iterator[np.ndarray]:
    """Yield uint8 [H, W, 3]: a textured canvas that moves, with a box that crosses it."""
    width, height = SIZE
    y, x = np.mgrid[:height, : 2 * width]
    waves = np.sin(x / 37) * np.cos(y / 23) + np.sin((x + y) / 11) / 2
    canvas = np.empty((height, 2 * width, 3), dtype=np.uint8)
    for channel, shift in enumerate((110, 128, 146)):
        canvas[..., channel] = (shift + 50 * waves).astype(np.uint8)
    for index in range(count):
        left = 2 * index % width
        frame = canvas[:, left : left + width].copy()
        box = 5 * index % (width - 100)
        frame[300:400, box : box + 100] = (200, 40, 40)
        yield frame


def write_video(path: Path, frames: int) -> None:
    """Write H.264 with a key frame every two seconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            "libx264", rate=Fraction(RATE), options={"preset": "fast"}
        )
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = KEY_FRAMES
        for array in draw_frames(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


# ------------------------------------------------------------------------------------ the two sides
Patches = tuple[np.ndarray, np.ndarray]  # float32 [N, 1176] and int64 [1, 3]


def make_ours(job: dict) -> Callable[[str, int], Patches]:
    """Return a function from a file and a number of frames to patches and grid."""
    import torch

    torch.set_num_threads(job["threads"])
    config = ImageConfig()

    def preprocess(path: str, frames: int) -> Patches:
        clip = load_video(path, config, nframes=frames)
        patches, grid = frames_to_patches(clip.frames, config)
        return patches, np.array([grid])

    return preprocess


def make_peer(job: dict) -> Callable[[str, int], Patches]:
    """Return the same function by the packages of job["packages"]."""
    import torch

    sys.path.insert(0, job["packages"])
    if not torch.version.cuda:
        # torchvision's compiled operators, of which none is used here, load with CUDA builds only;
        # this module would declare them once more for shapes.
        name = "torchvision._meta_registrations"
        sys.modules[name] = ModuleType(name)
    from qwen_vl_utils import vision_process
    from transformers import Qwen2VLVideoProcessor

    torch.set_num_threads(job["threads"])
    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=False)

    def preprocess(path: str, frames: int) -> Patches:
        video = vision_process.fetch_video({"video": path, "nframes": frames})
        batch = processor([video], do_resize=False, do_sample_frames=False, return_tensors="np")
        return batch["pixel_values_videos"], batch["video_grid_thw"]

    return preprocess


MAKE = {"ours": make_ours, "peer": make_peer}


def measure_preprocessing(job: dict) -> None:
    """Preprocess one video; it runs in a process of its own (`benchmarks.workers`)."""
    preprocess = MAKE[job["side"]](job)
    preprocess(job["short"], SHORT)
    memory_before = status_bytes("VmRSS")
    start = time.monotonic()
    patches, grid = preprocess(job["video"], job["frames"])
    end = time.monotonic()
    np.save(job["values"], patches.ravel()[::SAMPLED])
    report(
        task=f"{job['frames']} frames",
        start=start,
        end=end,
        grid=np.asarray(grid).tolist(),
        patch_bytes=patches.nbytes,
        peak_bytes=status_bytes("VmHWM") - memory_before,
    )


# ------------------------------------------------------------------------------------------ measure
class Line(NamedTuple):
    """The medians for one number of frames."""

    frames: int
    seconds: dict[str, float]  # of each side
    spread: float  # the range of the less steady side's seconds, divided by their median
    memory: dict[str, float]  # of each side: its peak in multiples of the patches
    difference: float  # the mean of the patches' differences; infinite where the grids differ


def measure(options: argparse.Namespace, folder: Path, say: Say) -> list[Line]:
    """Run all processes, repetition by repetition, every second time in reverse."""
    jobs = []
    for frames in options.frames:
        for side in MAKE:
            job = {"kind": "preprocessing", "side": side, "frames": frames}
            job |= {"video": str(folder / "long.mp4"), "short": str(folder / "short.mp4")}
            job |= {
                "packages": str(options.packages),
                "values": str(folder / f"{side}-{frames}.npy"),
            }
            jobs.append(job)
    records: dict[tuple[str, int], list[Record]] = {}
    for repetition in range(options.repetitions):
        for job in jobs if repetition % 2 == 0 else jobs[::-1]:
            key = (job["side"], job["frames"])
            records[key] = records.get(key, []) + run_quietly(job, options, say)
    return [summarize(frames, records, folder) for frames in options.frames]


def summarize(frames: int, records: dict[tuple[str, int], list[Record]], folder: Path) -> Line:
    """Return the medians of the quiet records; of all of them where none was quiet."""
    seconds = {}
    memory = {}
    spreads = []
    for side in MAKE:
        own = records[side, frames]
        kept = [record for record in own if record["quiet"]] or own
        times = [record["end"] - record["start"] for record in kept]
        seconds[side] = statistics.median(times)
        spreads.append((max(times) - min(times)) / seconds[side])
        memory[side] = statistics.median(r["peak_bytes"] / r["patch_bytes"] for r in kept)
    difference = float("inf")
    if records["ours", frames][0]["grid"] == records["peer", frames][0]["grid"]:
        values = [np.load(folder / f"{side}-{frames}.npy") for side in MAKE]
        difference = float(np.abs(values[0] - values[1]).mean())
    return Line(frames, seconds, max(spreads), memory, difference)


def table(lines: list[Line]) -> str:
    """Return a Markdown table; above 1 ours is faster."""
    rows = [
        "| frames | frames/s | vs qwen-vl-utils | spread | memory | of qwen-vl-utils | differ by |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        ours, peer = (line.seconds[side] for side in MAKE)
        memory = " | ".join(f"{line.memory[side]:.2f}×" for side in MAKE)
        rows.append(
            f"| {line.frames} | {line.frames / ours:.1f} | {peer / ours:.2f}× | {line.spread:.0%} "
            f"| {memory} | {line.difference:.4f} |"
        )
    return "\n".join(rows)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_process_options(parser)
    parser.add_argument(
        "--packages", type=Path, required=True, help="where the peers are installed"
    )
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    options = parser.parse_args(argv)
    check_common_options(parser, options)
    if not (options.packages / "qwen_vl_utils").is_dir():
        parser.error(f"--packages: {options.packages} has no directory qwen_vl_utils")
    if min(options.frames) < 4 or max(options.frames) > RATE * SECONDS:
        parser.error(f"--frames is {options.frames}, expected 4 to {RATE * SECONDS}")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_video(folder / "short.mp4", 2 * RATE)
        write_video(folder / "long.mp4", RATE * SECONDS)
        lines = measure(options, folder, say_on_stderr)
    print(table(lines))
    return 0 if all(line.difference <= LARGEST_DIFFERENCE for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
