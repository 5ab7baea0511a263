"""Small films for the tests: drawn, and encoded with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def draw(index: int, width: int, height: int) -> np.ndarray:
    """Frame `index` of a film, uint8 [height, width, 3]: each differs from its neighbours.

    The upper left quarter is bright in green, and a blue bar wanders to the right through the lower half.
    """
    frame = np.empty((height, width, 3), dtype=np.uint8)
    frame[..., 0] = 20 + index * 11 % 220
    frame[..., 1] = np.linspace(30, 90, width).astype(np.uint8)
    frame[: height // 2, : width // 2, 1] = 220
    frame[..., 2] = np.linspace(20, 120, height).astype(np.uint8)[:, None]
    bar = index * 5 % width
    frame[height // 2 :, bar : bar + width // 8, 2] = 240
    return frame


def film(n: int, width: int, height: int) -> list[np.ndarray]:
    return [draw(index, width, height) for index in range(n)]


def encode(
    path: Path, frames: list[np.ndarray], codec="mpeg4", rate=10, pixels="yuv420p", options=None,
    times=None, tick=None, container_options=None,
) -> Path:  # fmt: skip
    """Write frames, uint8 [H, W, 3] each, to a path; gives it back.

    rate: frames a second. times: when each is shown instead, in ticks of `tick` seconds.
    """
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.codec_context.thread_count = 1  # the same bytes on every machine
        if tick is not None:
            stream.codec_context.time_base = stream.time_base = tick
        for index, values in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(values, format="rgb24")
            frame.pts = index if times is None else times[index]
            frame.time_base = tick or Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
