"""Small videos for the tests, drawn frame by frame and encoded with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Required by FFmpeg's subtitle encoders.
ASS_HEADER = b"""[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,16

[Events]
Format: Layer, Start, End, Text
"""


def draw(index: int, width: int, height: int) -> np.ndarray:
    """Return frame `index` of a video, uint8 [height, width, 3]; each differs from the next.

    The upper left quarter is bright green, and a blue bar moves to the right through the lower
    half.
    """
    frame = np.empty((height, width, 3), dtype=np.uint8)
    frame[..., 0] = 20 + index * 11 % 220
    frame[..., 1] = np.linspace(30, 90, width).astype(np.uint8)
    frame[: height // 2, : width // 2, 1] = 220
    frame[..., 2] = np.linspace(20, 120, height).astype(np.uint8)[:, None]
    bar = index * 5 % width
    frame[height // 2 :, bar : bar + width // 8, 2] = 240
    return frame


def draw_frames(n: int, width: int, height: int) -> list[np.ndarray]:
    """Return the first n frames of `draw`."""
    return [draw(index, width, height) for index in range(n)]


def encode(
    path: Path,
    frames: list[np.ndarray],
    codec="mpeg4",
    rate=10,
    pixels="yuv420p",
    options=None,
    times=None,
    tick=None,
    container_options=None,
) -> Path:
    """Write frames, uint8 [H, W, 3] each, to a video file and return its path.

    rate: frames per second. times: instead of a rate, the timestamp of each frame, in units of
    `tick` seconds.
    """
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width = width
        stream.height = height
        stream.pix_fmt = pixels
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


def encode_with(
    path: Path, frames: list[np.ndarray], codec: str, kinds: list[str], **tags: str
) -> Path:
    """Write a file with several streams, in the given order, and return its path.

    kinds: "video" (the frames, 10 per second), "audio", "subtitle", "data", "cover" (an image of
    16×16) and "thumbnail" (a video of 16×16). tags: metadata of the container.
    """
    duration = Fraction(len(frames), 10)
    with av.open(str(path), "w") as container:
        container.metadata.update(tags)
        streams = [add_stream(container, kind, path.suffix, codec, frames) for kind in kinds]
        packets = []
        for kind, stream in zip(kinds, streams, strict=True):
            container.start_encoding()
            packets += packets_of(kind, stream, frames, duration)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


def add_stream(container, kind: str, suffix: str, codec: str, frames: list[np.ndarray]):
    """Add one stream of `encode_with` to a container."""
    if kind == "audio":
        codecs = {".webm": "libopus", ".avi": "pcm_s16le", ".ts": "mp2", ".mkv": "flac"}
        return container.add_stream(codecs.get(suffix, "aac"), rate=48000, layout="stereo")
    if kind == "subtitle":
        codecs = {".mkv": "subrip", ".webm": "webvtt"}
        stream = container.add_stream(codecs.get(suffix, "mov_text"))
        stream.codec_context.subtitle_header = ASS_HEADER
        return stream
    if kind == "data":
        return container.add_data_stream("bin_data")
    if kind == "cover":
        codec = "mjpeg"
    stream = container.add_stream(codec, rate=10)
    stream.codec_context.thread_count = 1
    stream.height, stream.width = frames[0].shape[:2] if kind == "video" else (16, 16)
    stream.pix_fmt = "yuvj420p" if kind == "cover" else "yuv420p"
    if kind == "cover":
        stream.disposition = av.stream.Disposition.attached_pic
    elif kind == "thumbnail":
        stream.disposition = av.stream.Disposition(0)
    return stream


def packets_of(kind: str, stream, frames: list[np.ndarray], duration: Fraction) -> list[av.Packet]:
    """Return the packets of one stream of `encode_with`."""
    if kind in ("subtitle", "data"):
        text = b"Hello"
        is_mov_text = kind == "subtitle" and stream.codec_context.name == "mov_text"
        packet = av.Packet(len(text).to_bytes(2, "big") + text if is_mov_text else text)
        packet.stream = stream
        packet.time_base = Fraction(1, 1000)
        packet.pts = packet.dts = 0
        packet.duration = 500
        return [packet]
    if kind == "audio":
        return [*silence(stream, int(duration * 48000)), *stream.encode(None)]
    if kind != "video":
        frames = [np.full((16, 16, 3), 255, dtype=np.uint8)] * (1 if kind == "cover" else 4)
    packets = []
    for number, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = number
        frame.time_base = Fraction(1, 10)
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def silence(stream, samples: int) -> list[av.Packet]:
    """Return packets of silence."""
    context = stream.codec_context
    planar = context.format.name.endswith("p")
    size = context.frame_size or 1024
    packets = []
    for start in range(0, samples, size):
        shape = (2, size) if planar else (1, 2 * size)
        dtype = np.float32 if context.format.name.startswith("flt") else np.int16
        values = np.zeros(shape, dtype=dtype)
        frame = av.AudioFrame.from_ndarray(values, format=context.format.name, layout="stereo")
        frame.sample_rate = 48000
        frame.pts = start
        frame.time_base = Fraction(1, 48000)
        packets += stream.encode(frame)
    return packets
