"""Video, directory or list of images → the few frames that the model attends to, with their
timestamps.

    source ── given_frames ──> list of images ── sample_list ──┐
           ── open_media ────> video file ────── sample_file ──┴──> SampledVideo

`preprocess.load_video` resizes its frames.

Which frames, and how large, is the rule of qwen-vl-utils 0.0.14 (`smart_nframes`,
`calculate_video_frame_range` and `fetch_video` in its `vision_process.py`); numbers and sizes are
equal wherever that gives any. The differences:

* The frame rate is the declared one unless the timestamps contradict it (`frame_rate`);
  qwen-vl-utils trusts headers.
* `video_start` and `video_end` are compared with each frame's timestamp, not with its number
  divided by the mean rate. At a constant rate both give the same, except where its product of time
  and rate is rounded across an exact frame: 0.07 s at 100 frames per second is 7.000000000000001
  there, and frame 7 is missed.
* A range of one frame, a video of one frame and a video with fewer frames than asked for give
  what there is.
* Frames are upright, in display proportions, composited on white, and resized by Pillow, as
  images are.

The `fetch_video` in transformers' documentation of Qwen2-VL is another rule: 1 frame per second,
rounded to the nearest even number and without bounds, at `torch.linspace(0, last, count)` cut to
integers, and not resized. `fps=1.0` comes close to it; its result, and that of qwen-vl-utils, can
be passed as a video, see `given_frames`.

`video_decode.py` reads the files. Only sampled frames are converted to RGB, and they are yielded
one by one, so memory holds two frames in full and a few numbers for each frame of the video.
"""

import math
import os
import re
import reprlib
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

import numpy as np

from media import DEFAULT_LIMITS, MediaLimits, load_image, to_numpy
from video_decode import Frame, VideoError, VideoIndex, read_frames, read_index

DEFAULT_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768
MIN_TOKENS = 128  # of one frame
MAX_TOKENS = 768  # of one frame
MIN_SIZE_TOKENS = 4  # of one frame whose size is asked for
MAX_SIZE_TOKENS = 16384  # of one frame whose size is asked for
TOTAL_TOKENS = 128000 * 0.9  # of all frames; a token covers temporal_patch_size of them
RATE_TOLERANCE = 0.1  # by which a declared rate may differ from that of the timestamps
CHANNELS = (1, 3, 4)  # of a frame: gray, RGB, RGBA
NOT_FRAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}  # and every name that starts with a dot
POSITIVE_OPTIONS = {
    "fps",
    "nframes",
    "max_frames",
    "min_pixels",
    "max_pixels",
    "total_pixels",
    "resized_height",
    "resized_width",
}


@dataclass
class SampledVideo:
    """The frames that are sampled from a video. They can be read once, one by one."""

    timestamps: list[float]  # of each frame, in seconds from the first frame of the video
    frames: Iterator[Frame]  # as many: an upright image and the size to show it in


def check_options(options: dict) -> None:
    """Raise ValueError for an option of `load_video` that is not a finite (or positive) number."""
    for name, value in options.items():
        if value is None:
            continue
        if name in POSITIVE_OPTIONS and not (is_number(value) and value > 0):
            raise ValueError(f"{name} is {reprlib.repr(value)}, expected a positive number")
        if not is_number(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}, expected a number")


def is_number(value: object) -> bool:
    """Return whether a value is a number that is finite as a float; one of 400 digits is not."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


# -------------------------------------------------------------------------- which frames, how large


def count_frames(
    total: int,
    rate: float,
    factor: int = 2,
    fps: float | None = None,
    nframes: float | None = None,
    min_frames: float | None = None,
    max_frames: float | None = None,
) -> int:
    """Return how many of a video's `total` frames are sampled: a multiple of `factor`, or all if
    there are fewer.

    rate: frames per second of the video; fps: how many of them to sample per second. Raises
    ValueError where fewer than `factor` are asked for; warns where more are asked for than there
    are. Source: qwen-vl-utils 0.0.14, `smart_nframes`.
    """
    if fps is not None and nframes is not None:
        raise ValueError(f"fps {fps} and nframes {nframes} exclude each other: give one of them")
    if nframes is not None:
        asked = f"nframes {nframes}"
        count = round(nframes / factor) * factor
    else:
        fps = DEFAULT_FPS if fps is None else fps
        low = MIN_FRAMES if min_frames is None else min_frames
        high = MAX_FRAMES if max_frames is None else max_frames
        low = math.ceil(low / factor) * factor
        high = math.floor(high / factor) * factor
        asked = f"fps {fps} within {low} to {high} frames"
        most = min(max(total / rate * fps, low), high, total)
        count = math.floor(most / factor) * factor
    if total < factor:
        return total
    if count < factor:
        raise ValueError(f"{asked} comes to {count} frames, but at least {factor} are needed")
    if count > total:
        count = total // factor * factor
        warnings.warn(
            f"{asked} is more than the {total} frames there are: {count} are taken", stacklevel=4
        )
    return count


def spread(first: int, last: int, count: int) -> list[int]:
    """Return `count` frame numbers from first to last, evenly spaced: `torch.linspace(first, last,
    count).round()`.

    That computes in float32, from both ends to the middle, and which neighbor a number near one
    half is rounded to depends on its last bit. Product and sum are rounded once, together, as
    processors with fused multiply-add do it.
    """
    if count == 1:
        return [first]
    step = float(np.float32(last - first) / np.float32(count - 1))
    index = np.arange(count)
    from_first = first + step * index  # float64: exact, nearly
    from_last = last - step * (count - 1 - index)
    values = np.where(index < count // 2, from_first, from_last)
    return values.astype(np.float32).round().astype(int).tolist()


def frames_between(
    times: Sequence[float],
    start: float | None,
    end: float | None,
    name: str,
    rate: float,
    tolerance: float = 1e-6,
) -> tuple[int, int]:
    """Return the numbers of the first and last frame whose time is within start … end, in seconds,
    both included.

    tolerance: by how much a time may be rounded, in seconds. Raises ValueError when there is no
    such frame.
    """
    if not times:
        raise VideoError(f"{name} holds no frame")
    first = 0 if start is None else bisect_left(times, start - tolerance)
    last = len(times) - 1 if end is None else bisect_right(times, end + tolerance) - 1
    is_empty = start is not None and end is not None and start >= end
    if first > last or is_empty:
        until = "the end" if end is None else f"{end:g} s"
        span = f"from {start or 0:g} s to {until}"
        raise VideoError(f"{name} has no frame {span}: it lasts {times[-1] + 1 / rate:.2f} s")
    return first, last


def frame_rate(
    times: Sequence[float], last_duration: float, declared: float | None, tick: float = 0.0
) -> tuple[float, bool]:
    """Return a video's frames per second, and whether the timestamps contradict the declared rate.

    times: of all frames, in seconds from the first one, rounded to multiples of tick;
    last_duration: of the last one, 0 if that is unknown. The declared rate holds, as in
    qwen-vl-utils, as long as it agrees with the number of frames in that time up to RATE_TOLERANCE
    and one frame. Recorders in browsers declare 1000 frames per second, screen recorders the rate
    of the screen, and some files 90000 or nothing: there the timestamps count.
    """
    count = len(times)
    if count < 2:
        return declared or DEFAULT_FPS, False
    measured = usual_rate(count, times[-1], tick)
    if declared is None:
        return measured, False
    declared_count = declared * (times[-1] + (last_duration or 1 / measured))
    low = count * (1 - RATE_TOLERANCE) - 1
    high = count * (1 + RATE_TOLERANCE) + 1
    if low <= declared_count <= high:
        return declared, False
    return measured, True


def usual_rate(count: int, last_time: float, tick: float) -> float:
    """Return the frames per second of `count` frames, the last one at last_time ± tick, in seconds.

    A rate of n or n / 1.001 is taken for exact if the rounding of last_time allows it: 300 frames
    in whole milliseconds measure 30.002 frames per second, and sampling them by that would miss
    the last two of their 20 frames.
    """
    measured = (count - 1) / last_time
    for rate in (round(measured), round(measured * 1.001) / 1.001):
        if rate > 0 and abs((count - 1) / rate - last_time) <= tick * 1.001:
            return rate
    return measured


def pixel_bounds(
    count: int,
    token_pixels: int,
    temporal_patch_size: int = 2,
    min_pixels: float | None = None,
    max_pixels: float | None = None,
    total_pixels: float | None = None,
) -> tuple[float, float]:
    """Return the least and the most pixels (height × width) of each of `count` frames after
    resizing.

    token_pixels: pixels of one token, 28² in the published models. The least is `min_pixels`
    (default: 128 tokens). The most is 768 tokens, or less where all frames would have more than
    `total_pixels` together (a token counted once for its temporal_patch_size frames); `max_pixels`
    can only lower it. Source: qwen-vl-utils 0.0.14, `fetch_video`.
    """
    count += -count % temporal_patch_size
    low = MIN_TOKENS * token_pixels if min_pixels is None else min_pixels
    total = TOTAL_TOKENS * token_pixels if total_pixels is None else total_pixels
    high = min(MAX_TOKENS * token_pixels, total / count * temporal_patch_size)
    high = max(high, int(low * 1.05))
    if max_pixels is not None:
        if max_pixels > high:
            limit = f"{high:.0f}, the limit for {count} frames"
            warnings.warn(f"max_pixels {max_pixels} is lowered to {limit}", stacklevel=5)
        high = min(max_pixels, high)
    if high < low:
        raise ValueError(
            f"max_pixels {high} is less than min_pixels, {low}: give a lower min_pixels, too"
        )
    return low, high


# -------------------------------------------------------------------------------------- video files


def sample_file(
    media: str | BinaryIO,
    name: str,
    factor: int = 2,
    video_start: float | None = None,
    video_end: float | None = None,
    decode_all: bool = False,
    limits: MediaLimits = DEFAULT_LIMITS,
    **count_options: float | None,
) -> SampledVideo:
    """Choose the frames of a video file: spread evenly over those from video_start to video_end
    (seconds).

    media: what `open_media` returns; an open file is read from its beginning and stays open. name:
    what to call it in messages. count_options: those of `count_frames`. decode_all: number the
    frames by decoding all of them.

    A file that is damaged or cut off gives the frames that can be decoded, with a warning. Raises
    FileNotFoundError, ValueError or TimeoutError with one sentence, here or while the frames are
    read; raises UnreliableIndex, likewise, where only decode_all can help.
    """
    index = read_index(media, name, decode_all, limits)
    times, rate = frame_times(index, name)
    # A time is rounded to the tick of the file. Some files have ticks as long as a frame: those are
    # exact.
    tolerance = 1e-6 + min(float(index.tick) / 2, 0.0005)
    if not times and index.damage:
        raise VideoError(f"{name} is damaged and holds no frame that can be decoded")
    first, last = frames_between(times, video_start, video_end, name, rate, tolerance)
    if index.damage:
        warnings.warn(
            f"{name} is damaged or cut off: {index.damage}; the other {len(times)} frames are used",
            stacklevel=3,
        )
    count = count_frames(last - first + 1, rate, factor, **count_options)
    wanted = spread(first, last, count)
    frames = read_frames(media, name, index, wanted, limits)
    return SampledVideo([times[number] for number in wanted], frames)


def frame_times(index: VideoIndex, name: str) -> tuple[list[float], float]:
    """Return each frame's time in seconds from the first one, and the frame rate.

    Warns where the header contradicts the timestamps.
    """
    if not index.is_ordered:
        rate = index.declared_rate or DEFAULT_FPS
        return [number / rate for number in range(len(index.pts))], rate
    times = [float((pts - index.pts[0]) * index.tick) for pts in index.pts]
    rate, is_contradicted = frame_rate(
        times, index.last_duration, index.declared_rate, float(index.tick)
    )
    if is_contradicted and not index.damage:  # with frames missing, the header may be right
        declared = f"declares {index.declared_rate:g} frames per second"
        warnings.warn(
            f"{name} {declared}, but by its timestamps it has {rate:.4g}: the timestamps are used",
            stacklevel=4,
        )
    return times, rate


# ---------------------------------------------------------------------------------- lists of frames


def given_frames(source: Any) -> Sequence | None:
    """Return the frames of a list, a 4-D array or tensor, or a directory of images; None for a
    video file.

    Every item is something that `load_image` takes; images of a directory are in natural order (2
    before 10). An array or tensor is [F, H, W, 3] or [F, 3, H, W]: uint8, floats of 0…1, or floats
    of 0…255 as qwen-vl-utils returns them. Raises ValueError for another or an ambiguous shape.
    """
    if isinstance(source, list | tuple):
        return source
    if hasattr(source, "shape") and hasattr(source, "ndim"):  # of NumPy, torch, JAX, …
        check_video_shape(list(source.shape))
        return float_levels(source)
    if not isinstance(source, str | Path):
        return None
    path = str(source)
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    if path.startswith(("http://", "https://", "data:")) or not os.path.isdir(path):
        return None
    files = [file for file in Path(path).iterdir() if file.is_file() and is_frame(file.name)]
    return sorted(files, key=natural)


def check_video_shape(shape: list[int]) -> None:
    """Raise ValueError unless one axis alone can be the channels of a video."""
    expected = "expected a video as [frames, height, width, 3] or [frames, 3, height, width]"
    if len(shape) != 4:
        raise ValueError(f"{expected}, got {shape}")
    if 0 in shape:
        return  # `frames_between` reports that there is no frame
    is_first = shape[1] in CHANNELS
    is_last = shape[3] in CHANNELS
    if not is_first and not is_last:
        raise ValueError(f"{expected}, got {shape}")
    # [3, 4, height, width] may be three RGBA frames, and as well the colors of four frames.
    is_ambiguous = is_last or (shape[0] == 3 and shape[1] != 3)
    if is_first and is_ambiguous:
        raise ValueError(
            f"{expected}, got {shape}, where two axes can be the channels: pass a list of Pillow "
            "images"
        )


def float_levels(source: Any) -> Any:
    """Return an array or tensor of floats of 0…255 as uint8, rounded; any other as it is.

    Its range is that of all frames together, as one frame of a video may be black.
    """
    if not isinstance(source, np.ndarray) and not hasattr(source, "detach"):
        return source
    array = to_numpy(source)
    if array.dtype.kind != "f" or array.size == 0:
        return source
    if array.max() > 1 and array.min() >= 0 and array.max() <= 255:
        return np.round(array).astype(np.uint8)
    return source


def is_frame(name: str) -> bool:
    """Return whether a file in a directory of frames is meant as one, by its name."""
    return not name.startswith(".") and name.lower() not in NOT_FRAMES


def natural(path: Path) -> tuple:
    """Return a key that sorts numbers in names by their value."""
    parts = re.split(r"([0-9]+)", path.name.lower())  # every second one is a number
    parts[1::2] = map(int, parts[1::2])
    return parts, path.name


def sample_list(
    frames: Sequence,
    name: str,
    factor: int = 2,
    fps: float | None = None,
    nframes: float | None = None,
    min_frames: float | None = None,
    max_frames: float | None = None,
    video_start: float | None = None,
    video_end: float | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> SampledVideo:
    """Choose among frames that are given one by one: all from video_start to video_end, or
    `nframes` of these.

    fps is how many made a second when they were taken; min_frames and max_frames have no effect.
    (qwen-vl-utils resizes such frames twice, first as images and to multiples of two tokens, so
    that its sizes differ where that first rounding decides.)
    """
    rate = DEFAULT_FPS if fps is None else fps
    times = [number / rate for number in range(len(frames))]
    first, last = frames_between(times, video_start, video_end, name, rate)
    count = last - first + 1
    if nframes is not None and nframes > count:
        warnings.warn(
            f"nframes {nframes} is more than the {count} frames there are: all are taken",
            stacklevel=3,
        )
    elif nframes is not None and nframes < count:
        count = count_frames(count, rate, factor, nframes=nframes)
    wanted = spread(first, last, count)
    images = same_size((frames[number] for number in wanted), name, limits)
    return SampledVideo([times[number] for number in wanted], images)


def same_size(sources: Iterator[object], name: str, limits: MediaLimits) -> Iterator[Frame]:
    """Yield images one by one, as frames. Raise ValueError where sizes differ."""
    size = None
    for source in sources:
        image = load_image(source, limits)
        size = size or image.size
        if image.size != size:
            sizes = f"{size[0]}×{size[1]} and {image.width}×{image.height} (width × height)"
            raise VideoError(f"{name}: frames must have one size, but these have {sizes}")
        yield Frame(image, image.size)
        del image  # the caller's alone
