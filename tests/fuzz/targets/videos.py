"""Video files in every container, damaged anywhere."""

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from media import MediaLimits
from preprocess import ImageConfig, load_video
from tests.clips import draw_frames, encode, encode_with
from tests.fuzz.frame import Target
from tests.fuzz.mutations import byte_mutator

CONFIG = ImageConfig(patch_size=2)
LIMITS = MediaLimits(max_image_pixels=2**20, max_frame_pixels=2**20)
TOKENS = (
    b"ftyp moov trak mdia stbl stsz stts ctts stsc stco elst trun tfhd moof mdat cmov free".split()
)
TOKENS += b"RIFF AVI hdrl strf idx1 movi 00dc webm matroska GIF89a FLV OggS WEBPVP8X ANMF".split()
TOKENS += [b"\x1aE\xdf\xa3", b"\x1f\x43\xb6\x75", b"\0\0\1", b"\0\0\0\1", b"G@", b"\xff\xd8\xff"]

# Container, codec and options: few and tiny frames, so that a mutant takes milliseconds.
VARIANTS = (
    ("mp4", "libx264", {"g": "3"}),
    ("mp4", "mpeg4", {}),
    ("mov", "qtrle", {}),
    ("mkv", "libx264", {"g": "3"}),
    ("webm", "libvpx", {"g": "3"}),
    ("webm", "libvpx-vp9", {"g": "3"}),
    ("avi", "mpeg4", {}),
    ("avi", "mjpeg", {}),
    ("ts", "mpeg2video", {}),
    ("flv", "flv1", {}),
    ("mpg", "mpeg1video", {}),
    ("gif", "gif", {}),
    ("apng", "apng", {}),
    ("wmv", "wmv2", {}),
    ("y4m", "wrapped_avframe", {}),
)
SAME_BYTES = {"fflags": "+bitexact"}  # no dates and random numbers
PIXEL_FORMATS = {"qtrle": "rgb24", "mjpeg": "yuvj420p", "gif": "rgb8", "apng": "rgb24"}


def seeds() -> list[bytes]:
    """Return one file of each variant, one of several streams, a fragmented one and a WebP."""
    frames = draw_frames(6, 32, 32)
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix, codec, options in VARIANTS:
            path = Path(folder) / f"x.{suffix}"
            pixels = PIXEL_FORMATS.get(codec, "yuv420p")
            encode(path, frames, codec, 25, pixels, options, container_options=SAME_BYTES)
            files.append(path.read_bytes())
        path = Path(folder) / "y.mp4"
        encode_with(path, frames, "mpeg4", ["cover", "video", "subtitle"])
        files.append(path.read_bytes())
        options = SAME_BYTES | {"movflags": "frag_keyframe+empty_moov"}
        path = Path(folder) / "z.mp4"
        files.append(encode(path, frames, container_options=options).read_bytes())
        images = [Image.fromarray(frame) for frame in frames]
        path = Path(folder) / "z.webp"
        images[0].save(path, save_all=True, append_images=images[1:])
        files.append(path.read_bytes())
    return files


def run(data: bytes) -> None:
    """Sample frames as the processor does."""
    clip = load_video(data, CONFIG, LIMITS, max_frames=8)
    assert len(clip.frames) == len(clip.timestamps) > 0
    assert clip.frames.dtype == np.uint8
    assert clip.timestamps == sorted(clip.timestamps)


TARGET = Target(
    seeds,
    run,
    mentions="the given bytes",
    mutate=byte_mutator(TOKENS),
    seconds=20.0,
    quick_count=200,
)
