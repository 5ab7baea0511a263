"""Answer thousands of questions in one process: memory, open files and time must stay flat.

    python -m tests.soak                # 10,000 generations, 1,000 images, 500 videos, 500 turns
    python -m tests.soak --small        # what pytest runs
    python -m tests.soak --images 200 --generations 0 --videos 0 --turns 0

The bundled model in float32, one thread. Each tenth image and video is damaged, as what is held
after an error is what is lost most easily. Four phases:

    generations   short answers to text and to one image, greedy and sampled, one or two at a time
    images        many sizes, formats and modes, from paths, bytes, arrays and Pillow images
    videos        several codecs and containers, and directories of frames
    turns         of one chat, which holds its KV cache and its images until it is reset

Memory (the resident set of the process), Python objects, open files and threads are sampled 60
times in a phase. The first third is the warm-up. Over the rest, growth is the slope of the samples
(Theil-Sen: the median of the slopes of all pairs, so that one peak does not count) times the items.
Flat is: at most 8 MB of memory, at most half an object per item, and not one open file or thread
more than in the warm-up. Times are CPU seconds, reported and not judged.

Sizes of images repeat after the warm-up, as each new size adds about 1 MB with this model: in part
what oneDNN compiles for new shapes, which ONEDNN_PRIMITIVE_CACHE_CAPACITY=0 turns off.

The chat grows by design. Its cache may take at most twice what apps.estimate counts for its tokens,
as it doubles when it is full; the memory of the process may grow by at most 1.5 times the cache
(while it doubles, there are two), the pixels and 8 MB; and after a reset it is back to 8 MB of what
it was. An equal chat before it is the warm-up: each length of a prompt is a new shape.
The exit code is 1 if anything is not flat. For Linux.
"""

import argparse
import ctypes
import gc
import io
import itertools
import logging
import os
import resource
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from apps.chat import Chat
from command_line import BUNDLED_CHECKPOINT
from generate import GenerationConfig, generate
from load_weights import load_model
from memory import Run, cache_size
from preprocess import Processor
from tests.clips import draw_frames, encode

SAMPLES = 60
MEMORY_LIMIT = 8_000_000  # bytes of growth that the allocator's fragments are allowed
OBJECTS_PER_ITEM = 0.5
FULL = {"generations": 10_000, "images": 1_000, "videos": 500, "turns": 500}
SMALL = {"generations": 240, "images": 132, "videos": 60, "turns": 20}
EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTIONS = (
    "How many shapes are there?",
    "Where is the red circle?",
    "What is at the top left?",
    "Is there a triangle?",
)


# ---------------------------------------------------------------------------------------- measuring
def resident_memory() -> int:
    """Return the bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def open_files() -> int:
    """Return the number of file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def release_memory() -> None:
    """Return free memory of the allocator to the system, so that what remains is held."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Samples:
    """What was measured in one phase: a list entry for each sample."""

    items: list[int] = field(default_factory=list)  # done so far
    memory: list[int] = field(default_factory=list)  # bytes
    objects: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # CPU time per item since the last sample

    def add(self, items: int, seconds: float) -> None:
        """Take a sample after so many items."""
        gc.collect()
        self.items.append(items)
        self.memory.append(resident_memory())
        self.objects.append(len(gc.get_objects()))
        self.files.append(open_files())
        self.threads.append(threading.active_count())
        self.seconds.append(seconds)

    @property
    def start(self) -> int:
        """Return the index of the first sample after the warm-up."""
        return len(self.items) // 3

    def growth(self, values: list[int]) -> float:
        """Return how much a list of samples grew after the warm-up, by its Theil-Sen slope."""
        points = list(zip(self.items[self.start :], values[self.start :], strict=True))
        slopes = [(b - a) / (m - n) for (n, a), (m, b) in itertools.combinations(points, 2)]
        return statistics.median(slopes) * (points[-1][0] - points[0][0])

    def problems(self) -> list[str]:
        """Return what is not flat, empty if all is."""
        found = []
        grown = self.growth(self.memory)
        if grown > MEMORY_LIMIT:
            found.append(f"memory grew by {grown / 1e6:.1f} MB")
        grown = self.growth(self.objects)
        if grown > OBJECTS_PER_ITEM * (self.items[-1] - self.items[self.start]):
            found.append(f"{grown:.0f} more Python objects")
        for name in ("files", "threads"):
            values = getattr(self, name)
            more = max(values[self.start :]) - max(values[: self.start])
            if more > 0:
                found.append(f"{more} more {name}")
        return found

    def mean_seconds(self, part: slice) -> float:
        """Return the mean CPU time of an item over some samples."""
        return statistics.fmean(self.seconds[part])


def measure(count: int, work: Callable[[int], None]) -> Samples:
    """Call work(number) for each item of a phase, and sample."""
    samples = Samples()
    steps = np.unique(np.linspace(0, count, SAMPLES + 1).astype(int))
    for first, end in itertools.pairwise(steps.tolist()):
        begin = time.process_time()
        for number in range(first, end):
            work(number)
        samples.add(end, (time.process_time() - begin) / (end - first))
    return samples


# ------------------------------------------------------------------------------ what is asked about
def draw_pixels(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return smooth colors with some noise, uint8 [height, width, 3]."""
    corners = random.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    smooth = Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)
    noise = random.integers(0, 16, (height, width, 3), dtype=np.uint8)
    return np.asarray(smooth) // 2 + noise


def encode_image(number: int, image: Image.Image) -> bytes:
    """Return an image as the bytes of a file, in one of ten formats and modes."""
    formats = (
        ("PNG", "RGB", {}),
        ("JPEG", "RGB", {"exif": exif_bytes(number)}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {}),
        ("GIF", "P", {}),
        ("JPEG", "L", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("PNG", "1", {}),
    )
    name, mode, options = formats[number % len(formats)]
    file = io.BytesIO()
    image.convert(mode).save(file, format=name, **options)
    return file.getvalue()


def exif_bytes(number: int) -> Image.Exif:
    """Return metadata with one of the eight orientations."""
    exif = Image.Exif()
    exif[0x0112] = number % 8 + 1
    return exif


def image_source(number: int, distinct: int, directory: Path) -> object:
    """Return image `number` in one of the forms that a processor reads; each tenth is damaged.

    Its pixels are its own; size, format and form are those of image `number` % distinct.
    """
    kind = number % distinct
    sizes = np.random.default_rng(kind).uniform(np.log(4), np.log(400), 2)
    height, width = np.exp(sizes).astype(int).tolist()
    pixels = draw_pixels(np.random.default_rng(number), height, width)
    image = Image.fromarray(pixels)
    if kind % 10 == 9:
        content = encode_image(kind // 10, image)
        return content[: len(content) // 2]
    form = kind // 10 % 4
    if form == 0:
        return pixels
    if form == 1:
        return image
    content = encode_image(kind, image)
    if form == 2:
        return content
    path = directory / f"image{kind % 10}"
    path.write_bytes(content)
    return path


def make_videos(directory: Path) -> list[Path]:
    """Write ten short videos, the last of which is damaged, and return their paths."""
    paths = []
    kinds = (("mpeg4", "mp4"), ("mjpeg", "avi"), ("ffv1", "mkv"), ("libvpx", "webm"))
    for number in range(8):
        codec, suffix = kinds[number % 4]
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        frames = draw_frames(4 + 2 * number, 48 + 16 * number, 64)
        path = directory / f"video{number}.{suffix}"
        paths.append(encode(path, frames, codec, rate=4 + number, pixels=pixels))
    frames_directory = directory / "frames"
    frames_directory.mkdir()
    for number, pixels in enumerate(draw_frames(6, 64, 64)):
        Image.fromarray(pixels).save(frames_directory / f"{number}.png")
    damaged = directory / "damaged.avi"
    content = paths[1].read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    return [*paths, frames_directory, damaged]


# ------------------------------------------------------------------------------------------- phases
class Soak:
    """One model and one processor, and what is asked of them."""

    def __init__(self, directory: Path, distinct_images: int):
        self.directory = directory
        self.model = load_model(BUNDLED_CHECKPOINT, "cpu", torch.float32)
        self.processor = Processor.from_pretrained(BUNDLED_CHECKPOINT)
        self.videos = make_videos(directory)
        self.distinct_images = distinct_images
        gc.collect()
        gc.freeze()  # what exists before the first item is neither collected nor counted again
        self.refused = 0  # damaged images and videos that gave an error

    def answer(self, number: int, new_tokens: int, *items: dict) -> None:
        """Answer a question about images or videos; every other answer is sampled."""
        text = {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}
        batch = self.processor([{"role": "user", "content": [*items, text]}])
        config = GenerationConfig(do_sample=number % 2 == 1, seed=number)
        generate(self.model, batch, new_tokens, config)

    def generation(self, number: int) -> None:
        """Give one short answer; each fourth is about an image, each fourth is two together."""
        if number % 4 == 0:
            self.answer(number, 4, {"type": "image", "image": EXAMPLES / "small.png"})
        elif number % 4 == 1:
            question = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
            longer = [{"role": "user", "content": f"{number}: {QUESTIONS[0]}"}]
            generate(self.model, self.processor([question, longer]), 4)
        else:
            self.answer(number, 4)

    def image(self, number: int) -> None:
        """Answer a question about image `number`."""
        source = image_source(number, self.distinct_images, self.directory)
        self.ask_about(number, "image", source)

    def video(self, number: int) -> None:
        """Answer a question about one of the videos."""
        self.ask_about(number, "video", self.videos[number % len(self.videos)])

    def ask_about(self, number: int, kind: str, source: object) -> None:
        """Answer a question about an image or a video, which may be damaged."""
        try:
            self.answer(number, 2, {"type": kind, kind: source})
        except (OSError, ValueError):
            self.refused += 1

    def cache_estimate(self, chat: Chat) -> int:
        """Return the bytes that apps.estimate counts for the cache of all turns so far."""
        run = Run(
            self.model.config, torch.device("cpu"), torch.float32, max_new_tokens=new_tokens(chat)
        )
        return cache_size(run, self.processor(chat.messages)).bytes

    def chat(self, turns: int) -> tuple[Samples, list[str]]:
        """Hold one long chat; return its samples, and what its memory did not keep to."""
        warm_up = Chat(self.model, self.processor, max_new_tokens=8)
        for number in range(turns):
            self.talk(warm_up, number)
        del warm_up
        release_memory()
        before = resident_memory()
        chat = Chat(self.model, self.processor, max_new_tokens=8)
        samples = measure(turns, lambda number: self.talk(chat, number))
        problems = []
        cache = chat.cache.keys.nbytes + chat.cache.values.nbytes
        expected = self.cache_estimate(chat)
        release_memory()
        grown = resident_memory() - before
        pixels = sum(
            item[item["type"]].patches.nbytes
            for message in chat.messages
            if message["role"] == "user"
            for item in message["content"]
            if item["type"] != "text"
        )
        line = f"chat: {len(chat.cached_ids):,} tokens, cache {cache / 1e6:.1f} MB, estimate "
        line += f"{expected / 1e6:.1f} MB, pixels {pixels / 1e6:.1f} MB; the process grew by "
        line += f"{grown / 1e6:.1f} MB"
        if cache > 2 * expected:
            problems.append("the cache takes more than twice its estimate")
        if grown > 1.5 * cache + pixels + MEMORY_LIMIT:
            problems.append("the chat holds more than its cache and its pixels")
        if samples.files[-1] > samples.files[0] or samples.threads[-1] > samples.threads[0]:
            problems.append("the chat keeps files or threads open")
        chat.reset()
        release_memory()
        kept = resident_memory() - before
        if kept > MEMORY_LIMIT:
            problems.append(f"{kept / 1e6:.1f} MB remain after the reset of the chat")
        print(f"{line}, after its reset by {kept / 1e6:.1f} MB")
        return samples, problems

    def talk(self, chat: Chat, number: int) -> None:
        """Take one turn; each 25th has an image."""
        if number % 25 == 0:
            chat.add({"type": "image", "image": EXAMPLES / "small.png"})
        for _ in chat.ask(f"{QUESTIONS[number % len(QUESTIONS)]} ({number})"):
            pass


def new_tokens(chat: Chat) -> int:
    """Return how many tokens each answer of a chat may have."""
    assert chat.max_new_tokens is not None
    return chat.max_new_tokens


def report_line(name: str, samples: Samples, problems: list[str]) -> str:
    """Return the line of the table for a phase."""
    start = samples.start
    cells = [
        name,
        f"{samples.items[-1]:,}",
        f"{samples.memory[start] / 1e6:.0f} → {samples.memory[-1] / 1e6:.0f} MB",
        f"{samples.growth(samples.memory) / 1e6:+.2f} MB",
        f"{samples.growth(samples.objects):+.0f}",
        f"{samples.files[start]} → {samples.files[-1]}",
        f"{samples.threads[start]} → {samples.threads[-1]}",
        f"{1000 * samples.mean_seconds(slice(start, 2 * start)):.1f} → "
        f"{1000 * samples.mean_seconds(slice(2 * start, None)):.1f} ms",
        "; ".join(problems) or "as expected",
    ]
    return "| " + " | ".join(cells) + " |"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the options, with the number of items of each phase."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--small", action="store_true", help="about 20 seconds instead of minutes")
    for name in FULL:
        parser.add_argument(f"--{name}", type=int, metavar="N", help="items; 0 leaves it out")
    arguments = parser.parse_args(argv)
    for name, count in (SMALL if arguments.small else FULL).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, count)
        if 0 < getattr(arguments, name) < 12:
            parser.error(f"--{name}: expected 0 or at least 12, got {getattr(arguments, name)}")
    if not Path("/proc/self/statm").exists():
        parser.error("expected Linux, whose /proc holds the memory of a process")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the phases, print the table, and return the exit code."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    logging.getLogger("qwen2vl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # of what damaged files lose
    lines = []
    all_problems = []
    with tempfile.TemporaryDirectory() as directory:
        # All sizes are in the warm-up, see above; a multiple of ten, as each tenth is damaged.
        soak = Soak(Path(directory), max(40, arguments.images // 40 * 10))
        for name in ("generations", "images", "videos"):
            count = getattr(arguments, name)
            if count == 0:
                continue
            samples = measure(count, getattr(soak, name.removesuffix("s")))
            problems = samples.problems()
            lines.append(report_line(name, samples, problems))
            all_problems += problems
            print(lines[-1], file=sys.stderr, flush=True)
        if arguments.turns:
            samples, problems = soak.chat(arguments.turns)
            lines.append(report_line("turns", samples, problems))
            all_problems += problems
        print(f"{soak.refused} damaged images and videos gave an error")
    print(
        "| phase | items | memory | growth | objects | files | threads | CPU per item | verdict |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print(*lines, sep="\n")
    return 1 if all_problems else 0


if __name__ == "__main__":
    sys.exit(main())
