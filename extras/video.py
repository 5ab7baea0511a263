"""Films, folders and lists of frames → the few frames that the model sees, resized, with their times.

Which frames, and how large, is the rule of qwen-vl-utils 0.0.14 (`smart_nframes`, `calculate_video_frame_range` and
`fetch_video` in its `vision_process.py`); numbers and sizes are the same wherever that gives any. Three differences:

* `video_start` and `video_end` are held against each frame's true time, not against its number divided by the mean
  rate. At a constant rate both say the same, except where the helper's product of time and rate is rounded across an
  exact frame: 0.07 s at 100 frames a second is 7.000000000000001 there, and frame 7 is missed.
* A range of one frame, a film of one frame and a film with fewer frames than asked give what there is.
* Frames are turned upright, and resized by Pillow, as pictures are.

A film is read twice. First its packets, without decoding, for the time of every frame and where decoding can start
(key frames). Then what is sampled is decoded: on from the last frame, or from a later key frame where there is one.
Only sampled frames are converted to RGB, and each is resized at once, so memory holds one frame in full, the resized
ones and a few numbers for each frame of the film.

Letters: F frames, H and W pixels.
"""

import io
import itertools
import math
import re
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from PIL import Image

from media import load_image, open_media, source_name, to_rgb
from preprocess import Clip, ImageConfig, resize, smart_resize

FPS, MIN_FRAMES, MAX_FRAMES = 2.0, 4, 768
MIN_TOKENS, MAX_TOKENS = 128, 768  # of one frame
TOTAL_TOKENS = 128000 * 0.9  # of all frames; a token covers temporal_patch_size of them
SIZE_TOKENS = 4, 16384  # of one frame whose size is asked for
LITTER = {"thumbs.db", "ehthumbs.db", "desktop.ini"}  # and whatever starts with a dot


class Lost(Exception):
    """The times that the packets of a film carry do not lead to its frames."""


def load(
    source: object, config: ImageConfig, fps: float | None = None, nframes: int | None = None,
    min_frames: int | None = None, max_frames: int | None = None, video_start: float | None = None,
    video_end: float | None = None, min_pixels: int | None = None, max_pixels: int | None = None,
    total_pixels: int | None = None, resized_height: int | None = None, resized_width: int | None = None,
) -> Clip:  # fmt: skip
    """Sample and resize a film, or frames that are given one by one.

    A film is anything `open_media` takes; an open file is read from its beginning and stays open. Frames are a list
    of what `load_image` takes, a folder of pictures (frame2 comes before frame10), or uint8 [F, H, W, 3]. `nframes`
    or `fps` (default 2.0, within `min_frames` and `max_frames`) say how many frames of a film are taken, spread
    evenly from `video_start` to `video_end` (seconds); `frame_size` tells what the other options do.

    Of given frames all are taken, unless `nframes` asks for fewer; `fps` says how many made a second when they were
    taken, and min_frames and max_frames mean nothing. (The helper resizes such frames twice, first as pictures and to
    multiples of two tokens, so that its sizes differ where that first rounding decides.)

    Raises FileNotFoundError or ValueError with one sentence; warns where less is given than asked for.
    """
    sizes = {"min_pixels": min_pixels, "max_pixels": max_pixels, "total_pixels": total_pixels}
    sizes |= {"resized_height": resized_height, "resized_width": resized_width}
    positive = sizes | {"fps": fps, "nframes": nframes, "max_frames": max_frames}
    others = {"min_frames": min_frames, "video_start": video_start, "video_end": video_end}
    for name, value in (positive | others).items():
        if value is None:
            continue
        if (
            not isinstance(value, Real)
            or not math.isfinite(value)
            or (name in positive and value <= 0)
        ):
            raise ValueError(
                f"{name} is {value!r}, expected a {'positive ' * (name in positive)}number"
            )
    span = video_start, video_end

    name, frames = source_name(source), given_frames(source)
    if frames is not None:
        rate = fps or FPS
        times = [index / rate for index in range(len(frames))]
        first, last = frames_between(times, *span, name, rate=rate)
        n = last - first + 1
        if nframes is not None and nframes > n:
            warnings.warn(
                f"nframes {nframes} is more than the {n} frames there are: all are taken",
                stacklevel=3,
            )
        elif nframes is not None and nframes < n:
            n = count_frames(n, rate, config.temporal_patch_size, nframes=nframes)
        wanted = spread(first, last, n)
        pictures = same_size((load_image(frames[index]) for index in wanted), name)
        return finish(pictures, [times[index] for index in wanted], config, sizes)

    options = {"fps": fps, "nframes": nframes, "min_frames": min_frames, "max_frames": max_frames}
    media = open_media(source)
    try:
        return load_film(media, name, config, span, options, sizes, counting=False)
    except Lost as reason:
        warnings.warn(
            f"{name}: {reason}, so all of it is decoded, twice, to count its frames", stacklevel=3
        )
    return load_film(media, name, config, span, options, sizes, counting=True)


# --------------------------------------------------------------------------------------- which frames, how large


def count_frames(
    total: int, rate: float, factor: int = 2, fps: float | None = None, nframes: float | None = None,
    min_frames: float | None = None, max_frames: float | None = None,
) -> int:  # fmt: skip
    """How many of a film's `total` frames are taken, at `rate` frames a second: a multiple of `factor`.

    All of them where there are fewer than `factor`. Source: qwen-vl-utils 0.0.14, `smart_nframes`.
    """
    if fps is not None and nframes is not None:
        raise ValueError(f"fps {fps} and nframes {nframes} exclude each other: give one of them")
    if nframes is not None:
        asked = f"nframes {nframes}"
        n = round(nframes / factor) * factor
    else:
        low = math.ceil((MIN_FRAMES if min_frames is None else min_frames) / factor) * factor
        high = math.floor((MAX_FRAMES if max_frames is None else max_frames) / factor) * factor
        asked = f"fps {fps or FPS} within {low} to {high} frames"
        n = min(max(total / rate * (fps or FPS), low), high, total)
        n = math.floor(n / factor) * factor
    if total < factor:
        return total
    if n < factor:
        raise ValueError(f"{asked} comes to {n} frames, but at least {factor} are needed")
    if n > total:
        n = total // factor * factor
        warnings.warn(
            f"{asked} is more than the {total} frames there are: {n} are taken", stacklevel=5
        )
    return n


def spread(first: int, last: int, n: int) -> list[int]:
    """n frame numbers from first to last, evenly spaced: what `torch.linspace(first, last, n).round()` gives.

    That computes in float32, from both ends to the middle, and which neighbour a number near one half is rounded to
    hangs on its last bit. Product and sum are rounded once, together, as processors with fused multiply-add do it.
    """
    if n == 1:
        return [first]
    step = float(np.float32(last - first) / np.float32(n - 1))
    index = np.arange(n)
    values = np.where(
        index < n // 2, first + step * index, last - step * (n - 1 - index)
    )  # float64: exact, nearly
    return values.astype(np.float32).round().astype(int).tolist()


def frames_between(
    times: Sequence[float],
    start: float | None,
    end: float | None,
    name: str,
    rate: float,
    tolerance: float = 1e-6,
) -> tuple[int, int]:
    """The numbers of the first and last frame whose time lies in start … end, both in seconds and included.

    `tolerance`, also in seconds, is how far a time may be rounded. Raises ValueError when there is no such frame.
    """
    if not times:
        raise ValueError(f"{name} holds no frame")
    first = 0 if start is None else bisect_left(times, start - tolerance)
    last = len(times) - 1 if end is None else bisect_right(times, end + tolerance) - 1
    if first > last or (None not in (start, end) and start >= end):
        span = f"from {start or 0:g} s to {'the end' if end is None else f'{end:g} s'}"
        raise ValueError(f"{name} has no frame {span}: it lasts {times[-1] + 1 / rate:.2f} s")
    return first, last


def frame_size(
    height: int, width: int, n: int, config: ImageConfig, min_pixels: float | None = None,
    max_pixels: float | None = None, total_pixels: float | None = None,
    resized_height: float | None = None, resized_width: float | None = None,
) -> tuple[int, int]:  # fmt: skip
    """The size (height, width) to which each of n frames is resized.

    A frame has at least `min_pixels` (default: 128 tokens) and at most 768 tokens, or less where the n frames would
    have more than `total_pixels` together, a token counted once for its temporal_patch_size frames; `max_pixels` can
    only lower that. `resized_height` and `resized_width` replace all this, rounded to multiples of config.factor.

    Source: qwen-vl-utils 0.0.14, `fetch_video`.
    """
    token = config.factor**2
    if (resized_height is None) != (resized_width is None):
        raise ValueError("resized_height and resized_width belong together: give both or neither")
    if resized_height is not None:
        return fit(
            resized_height,
            resized_width,
            config.factor,
            *(tokens * token for tokens in SIZE_TOKENS),
        )
    n += -n % config.temporal_patch_size
    low = MIN_TOKENS * token if min_pixels is None else min_pixels
    total = TOTAL_TOKENS * token if total_pixels is None else total_pixels
    high = max(min(MAX_TOKENS * token, total / n * config.temporal_patch_size), int(low * 1.05))
    if max_pixels is not None:
        if max_pixels > high:
            warnings.warn(
                f"max_pixels {max_pixels} is lowered to {high:.0f}, the limit for {n} frames",
                stacklevel=6,
            )
        high = min(max_pixels, high)
    if high < low:
        raise ValueError(
            f"max_pixels {high} is less than min_pixels, {low}: give a lower min_pixels, too"
        )
    return fit(height, width, config.factor, low, high)


def fit(height: float, width: float, factor: int, low: float, high: float) -> tuple[int, int]:
    """`smart_resize` as the helper has it: a thin side becomes one factor before the bounds are looked at."""
    fitted = smart_resize(height, width, factor, low, high)
    rounded = tuple(max(factor, round(side / factor) * factor) for side in (height, width))
    return rounded if low <= math.prod(rounded) <= high else fitted


def finish(
    pictures: Iterable[Image.Image], times: list[float], config: ImageConfig, sizes: dict
) -> Clip:
    """Resize each picture as it comes; there is one for each time."""
    frames, explicit = None, sizes["resized_height"] is not None
    for index, picture in enumerate(pictures):
        if frames is None:
            size = picture.size
            height, width = picture.height, picture.width
            if config.do_resize or explicit:
                height, width = frame_size(height, width, len(times), config, **sizes)
            frames = np.empty((len(times), height, width, 3), dtype=np.uint8)
        if config.do_resize or explicit:
            frames[index] = to_rgb(picture).resize((width, height), resample=config.resample)
        else:
            frames[index] = resize(
                picture, config
            )  # checks that the sides are multiples of config.factor
    return Clip(frames, times, size)


# ------------------------------------------------------------------------------------------- frames one by one


def given_frames(source: object) -> Sequence | None:
    """The frames of a list, array or folder; None for a film."""
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 4 or source.shape[3] != 3:
            found = f"{source.dtype} {list(source.shape)}"
            raise ValueError(f"an array must be uint8 [frames, height, width, 3], not {found}")
        return source
    if isinstance(source, list | tuple):
        return source
    if not isinstance(source, str | Path):
        return None
    folder = open_media(source) if str(source).startswith("file://") else source
    if str(source).startswith(("http://", "https://", "data:")) or not Path(folder).is_dir():
        return None
    found = (path for path in Path(folder).iterdir() if path.is_file())
    return sorted(
        (path for path in found if path.name[0] != "." and path.name.lower() not in LITTER),
        key=natural,
    )


def natural(path: Path) -> tuple:
    """A key that sorts numbers in names by their value."""
    parts = re.split(r"([0-9]+)", path.name.lower())  # every second one is a number
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], path.name


def same_size(pictures: Iterable[Image.Image], name: str) -> Iterator[Image.Image]:
    size = None
    for picture in pictures:
        size = size or picture.size
        if picture.size != size:
            found = f"{size[0]}×{size[1]} and {picture.width}×{picture.height} (width × height)"
            raise ValueError(f"{name}: frames must have one size, but these have {found}")
        yield picture


# ------------------------------------------------------------------------------------------------------- films


def load_film(
    media: str | BinaryIO,
    name: str,
    config: ImageConfig,
    span: tuple,
    options: dict,
    sizes: dict,
    counting: bool,
) -> Clip:
    """Read a film. `counting`: number its frames by decoding all of them, instead of trusting the packets' times.

    Raises Lost where these cannot be trusted.
    """
    with opened(media, name) as (container, stream):
        if counting:
            pts = [frame.pts for frame in counted(container, stream, name)]
        else:
            pts, keys, broken = packet_times(container, stream)
        rate, tick = stream.average_rate, stream.time_base
    ordered = None not in pts and all(a < b for a, b in itertools.pairwise(pts))
    if rate is None or rate == 0:  # unknown, as with a single frame
        rate = (
            Fraction(len(pts) - 1, (pts[-1] - pts[0]) * tick) if ordered and len(pts) > 1 else FPS
        )
    times = (
        [float((time - pts[0]) * tick) for time in pts]
        if ordered
        else [n / float(rate) for n in range(len(pts))]
    )

    # A time is rounded to the tick of the file. Some files have ticks as long as a frame: those are exact.
    tolerance = 1e-6 + min(float(tick) / 2, 0.0005)
    first, last = frames_between(times, *span, name, float(rate), tolerance)
    n = count_frames(last - first + 1, float(rate), config.temporal_patch_size, **options)
    wanted = spread(first, last, n)
    with opened(media, name) as (container, stream):
        if counting:
            chosen = set(wanted)
            frames = (
                frame
                for number, frame in enumerate(counted(container, stream, name))
                if number in chosen
            )
        else:
            frames = sampled(container, stream, name, wanted, pts, keys, broken)
        return finish(map(to_picture, frames), [times[index] for index in wanted], config, sizes)


@contextmanager
def opened(media: str | BinaryIO, name: str) -> Iterator[tuple]:
    """Open a film: its container and its video stream. PyAV's errors become ValueErrors or FileNotFoundErrors."""
    if not isinstance(media, str):
        if isinstance(media, io.TextIOBase) or not media.seekable():
            raise ValueError(
                f"{name} must be opened in binary mode and be seekable to be read as a film"
            )
        media.seek(0)
    # Literally this file, whatever its name looks like; and what it names must not reach into the network.
    place = f"file:{media}" if isinstance(media, str) else media
    try:
        with av.open(place, "r", options={"protocol_whitelist": "file"}) as container:
            stream = container.streams.best("video")
            cover = (
                stream is not None and stream.disposition & av.stream.Disposition.attached_pic
            )  # of a song
            if (
                stream is None or cover or container.format.name == "tty"
            ):  # which plays text on a terminal
                raise ValueError(f"{name} is no film: it has no video stream")
            if stream.codec_context is None:
                raise ValueError(
                    f"{name} cannot be decoded: this build of FFmpeg does not know its codec"
                )
            stream.thread_type = (
                "AUTO"  # several frames at once where the codec can; they come in the same order
            )
            for other in container.streams:
                if other is not stream:
                    other.discard = "all"
            yield container, stream
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no film at {name}") from None
    except (av.FFmpegError, OSError) as error:
        raise ValueError(f"cannot read {name} as a film: {error.strerror or error}") from error


def packet_times(container, stream) -> tuple[list[int], dict[int, int], int | None]:
    """When each frame is shown, ascending; when each key frame is, with the time to seek it by; and when the last one
    is, if the end of the file cuts through it.

    All in the stream's ticks. FFmpeg finds key frames of mp4 and Matroska by when they are shown, those of other
    files by when they are decoded, which is earlier where a later frame is needed to decode the next ones.
    """
    shown, keys, broken, by_dts = (
        [],
        {},
        None,
        not container.format.name.startswith(("mov", "matroska")),
    )
    for packet in container.demux(stream):
        if packet.size == 0:  # the last one, which says that there are no more
            continue
        if packet.pts is None:
            raise Lost("its packets carry no times")
        if packet.is_keyframe:
            keys[packet.pts] = packet.dts if by_dts and packet.dts is not None else packet.pts
        if not packet.is_discard and not is_hidden(stream.codec.canonical_name, memoryview(packet)):
            shown.append(packet.pts)
        broken = packet.pts if packet.is_corrupt else None
    if len(set(shown)) < len(shown):
        raise Lost("several of its frames carry the same time")
    return sorted(shown), dict(sorted(keys.items())), broken


def is_hidden(codec: str, packet: memoryview) -> bool:
    """Whether a packet of VP8 or VP9 holds nothing but a frame that others refer to and nobody sees.

    Source: RFC 6386 §9.1; VP9 bitstream specification 0.6, §6.2 (uncompressed header) and annex B (superframes).
    """
    head = packet[0]
    if codec == "vp8":
        return not head >> 4 & 1  # show_frame
    if codec == "vp9" and packet[-1] >> 5 != 0b110:  # else several frames, the last of them shown
        head >>= 0 if head >> 4 & 0b11 == 0b11 else 1  # profile 3 has one more bit before these
        return not head >> 2 & 1 and not head & 1  # show_existing_frame, show_frame
    return False


def sampled(
    container,
    stream,
    name: str,
    wanted: list[int],
    pts: list[int],
    keys: dict[int, int],
    broken: int | None = None,
) -> Iterator:
    """The frames with the given numbers, found by their times, which `packet_times` has collected."""
    frames, position = (
        container.decode(stream),
        -1,
    )  # position: the number of the last frame that was decoded
    starts, reason = list(keys), "Unexpected end of the film"
    for target in wanted:
        key = bisect_right(starts, pts[target]) - 1  # the latest at or before the target
        if (
            key >= 0 and bisect_left(pts, starts[key]) > position + 1
        ):  # else there is nothing to skip
            try:
                container.seek(keys[starts[key]], stream=stream)
            except av.FFmpegError as error:
                raise Lost("FFmpeg cannot seek in it") from error
            frames, position = container.decode(stream), -1
        try:
            while position < target and (frame := next(frames, None)):
                before, position = (
                    position,
                    bisect_left(pts, math.inf if frame.pts is None else frame.pts),
                )
                if position <= before or position == len(pts) or pts[position] != frame.pts:
                    raise Lost("its frames carry other times than its packets")
        except av.FFmpegError as error:
            broken, reason = pts[target], error.strerror
        if pts[target] == broken or (position < target and broken is not None):
            at = f"frame {target} of {len(pts)}, at {float((pts[target] - pts[0]) * stream.time_base):.2f} s"
            raise ValueError(f"{name} is damaged or cut off: {at}, cannot be decoded: {reason}")
        if position != target:
            raise Lost("a frame is not where its packet's time says")
        yield frame


def counted(container, stream, name: str) -> Iterator:
    """All frames, from the beginning on."""
    count = 0
    try:
        for frame in container.decode(stream):
            yield frame
            count += 1
    except av.FFmpegError as error:
        raise ValueError(
            f"{name} is damaged or cut off at frame {count}: {error.strerror}"
        ) from error


def to_picture(frame) -> Image.Image:
    """A decoded frame in RGB, upright.

    The file's display matrix, a b 0, c d 0, x y 1, shows the pixel (x, y) at (ax + cy, bx + dy), that is, turned by
    quarters and perhaps mirrored. Source: ISO/IEC 14496-12, §8.3.2, and FFmpeg's `libavutil/display.h`.
    """
    pixels = frame.to_ndarray(format="rgb24")  # [H, W, 3]
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
        if abs(b) > abs(a):
            pixels, a, d = pixels.swapaxes(0, 1), c, b
        pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return Image.fromarray(np.ascontiguousarray(pixels))
