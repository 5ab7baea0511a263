"""Video files as people have them: streams, damage, wrong headers, alpha, odd pixels; hangs."""

import io
import os
import signal
import struct
import threading
import warnings
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import draw, draw_frames, encode, encode_with
from PIL import Image

import video
import video_decode
import video_headers
from media import MediaLimits
from preprocess import ImageConfig, load_video

SMALL = ImageConfig(patch_size=2)  # tokens of 4×4 pixels: a frame of 64×48 stays as it is


@pytest.fixture
def quiet():
    """No warning passes unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def nearest(frames):
    """Which of the first 20 frames of `draw` each frame is nearest to."""
    drawn = np.stack(draw_frames(20, *frames.shape[2:0:-1])).astype(int)
    return [int(np.abs(drawn - frame).mean(axis=(1, 2, 3)).argmin()) for frame in frames]


# --- more streams than one ---

STREAMS = [
    ("mp4", "libx264", ["video", "audio"]),
    ("mp4", "libx264", ["audio", "video"]),
    ("mp4", "mpeg4", ["subtitle", "audio", "video"]),
    ("mp4", "mpeg4", ["cover", "video"]),
    ("mp4", "mpeg4", ["thumbnail", "video", "data"]),
    ("mov", "libx264", ["audio", "video", "subtitle"]),
    ("mov", "mpeg4", ["subtitle", "video"]),
    ("mkv", "libx264", ["subtitle", "audio", "video"]),
    ("mkv", "libx264", ["cover", "video", "thumbnail"]),
    ("webm", "libvpx", ["audio", "video"]),
    ("webm", "libvpx", ["subtitle", "video"]),
    ("avi", "mpeg4", ["audio", "video"]),
    ("avi", "mpeg4", ["thumbnail", "video", "audio"]),
    ("ts", "libx264", ["audio", "video"]),
    ("ts", "mpeg4", ["data", "video", "audio"]),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("suffix", "codec", "kinds"), STREAMS)
def test_load_video_accepts_every_stream_order(tmp_path, quiet, suffix, codec, kinds):
    path = encode_with(tmp_path / f"x.{suffix}", draw_frames(12, 64, 48), codec, kinds)
    with av.open(str(path)) as container:
        assert len(container.streams) == len(kinds)
    clip = load_video(path, SMALL, fps=10)
    assert clip.size == (64, 48)
    assert clip.timestamps == pytest.approx([n / 10 for n in range(12)])
    assert nearest(clip.frames) == list(range(12))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "mov"])
def test_load_video_ignores_metadata_that_is_not_utf8(tmp_path, quiet, suffix):
    path = encode_with(
        tmp_path / f"x.{suffix}", draw_frames(6, 64, 48), "mpeg4", ["video"], title="QTITLEQ"
    )
    data = path.read_bytes()
    assert b"QTITLEQ" in data
    clip = load_video(data.replace(b"QTITLEQ", b"Caf\xe9 \xff\xfe"), SMALL, fps=10)
    assert nearest(clip.frames) == list(range(6))


def test_load_video_ignores_stream_metadata_that_is_not_utf8(tmp_path, quiet):
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.metadata["title"] = "QTITLEQ"
        for pixels in draw_frames(6, 64, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert b"QTITLEQ" in data
    clip = load_video(data.replace(b"QTITLEQ", b"Caf\xe9 \xff\xfe"), SMALL, fps=10)
    assert len(clip.frames) == 6


def test_open_video_ends_at_an_index_error_after_the_last_packet():
    """PyAV, at the end of a file, reads memory of streams that began midway and may raise this."""

    class Container:
        def demux(self, stream):
            yield "packet"
            raise IndexError("list index out of range")

    opened = video_decode.OpenVideo(Container(), None, None)
    assert list(opened.packets(lambda: None)) == ["packet"]
    assert not opened.errors


# --- wrong headers ---


def set_matroska_rate(path, nanoseconds):
    """Declare the duration of a frame in a Matroska or WebM file (the element DefaultDuration)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"\x23\xe3\x83")
    size = data[start + 3] & 0x7F
    data[start + 4 : start + 4 + size] = nanoseconds.to_bytes(size, "big")
    path.write_bytes(data)
    return path


@pytest.mark.sweep
@pytest.mark.parametrize("declared", [1000, 250, 60, 3])
@pytest.mark.parametrize("suffix", ["webm", "mkv"])
def test_load_video_prefers_timestamps_to_the_declared_rate(tmp_path, suffix, declared):
    """30 frames, 10 per second by their timestamps: 2 per second are 6 frames."""
    codec = "libvpx" if suffix == "webm" else "mpeg4"
    path = encode(tmp_path / f"x.{suffix}", draw_frames(30, 64, 48), codec)
    expected = load_video(path, SMALL)
    assert len(expected.frames) == 6
    set_matroska_rate(path, 10**9 // declared)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == declared
    message = rf"declares {declared} frames per second, but by its timestamps it has "
    with pytest.warns(UserWarning, match=message) as caught:
        clip = load_video(path, SMALL)
    assert len(caught) == 1
    assert clip.timestamps == expected.timestamps
    assert np.array_equal(clip.frames, expected.frames)


def test_load_video_sorts_timestamps_in_decoding_order(tmp_path):
    """AVI has no presentation times, so those of B-frames are exchanged with their neighbors'."""
    options = {"bf": "2", "g": "40"}
    times = [2 * n for n in range(40)]  # 10 frames per second, in a file that declares 20
    path = tmp_path / "x.avi"
    encode(path, draw_frames(40, 64, 48), "libx264", 20, "yuv420p", options, times, Fraction(1, 20))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 20
        decoded = [frame.pts for frame in container.decode(video=0)]
    assert decoded != sorted(decoded)
    with pytest.warns(UserWarning, match="declares 20 frames per second"):
        clip = load_video(path, SMALL)
    assert clip.timestamps == pytest.approx([0, 0.6, 1.1, 1.7, 2.2, 2.8, 3.3, 3.9], abs=0.11)


def test_in_display_order_keeps_timestamps_that_begin_again():
    joined = [*range(0, 200, 4), *range(1, 200, 4)]
    assert video_decode.in_display_order(joined) == joined
    assert video_decode.in_display_order([1, 3, 2, None]) == [1, 3, 2, None]
    assert video_decode.in_display_order([1, 3, 2, 4]) == [1, 2, 3, 4]


@pytest.mark.parametrize("rate", [30, Fraction(30000, 1001), 60, 15])
def test_frame_rate_of_times_in_milliseconds_is_not_too_high(tmp_path, rate):
    """10 s give 20 frames, although the last time, cut to milliseconds, is early."""
    times = [int(n * 1000 / rate) / 1000 for n in range(round(10 * rate))]
    measured, is_contradicted = video.frame_rate(times, 0.0, 1000.0, 0.001)
    assert is_contradicted
    assert measured == pytest.approx(float(rate), rel=1e-9)
    assert video.count_frames(len(times), measured) == 20
    assert video.frame_rate([0.0, 0.033, 0.067, 0.1, 0.5], 0.0, None, 0.001)[0] == 8
    assert video.frame_rate([0.0, 0.3, 0.95], 0.0, None, 0.001)[0] == pytest.approx(2 / 0.95)


def test_frame_rate_keeps_a_declared_rate_that_agrees():
    """As in qwen-vl-utils, which trusts it; exactly, so that counts are equal."""
    declared = 30000 / 1001
    ntsc = [n / declared for n in range(300)]
    dropped = ntsc[:100] + ntsc[115:]  # a twentieth of the frames
    assert video.frame_rate(ntsc, 0.0, declared) == (declared, False)
    assert video.frame_rate(dropped, 1 / declared, declared) == (declared, False)
    assert video.frame_rate([0.0, 0.1], 0.1, 12.0) == (12.0, False)
    slides = [0.0, 0.1, 0.2, 0.3]  # the last one is shown for a minute
    assert video.frame_rate(slides, 60.0, 4 / 60.3) == (4 / 60.3, False)


@pytest.mark.parametrize("declared", [90000.0, 1000.0, 60.0, 12.0, 8.0, 1.0, 0.001])
def test_frame_rate_is_measured_where_the_declared_one_is_wrong(declared):
    times = [n / 10 for n in range(100)]
    for last_duration in (0.0, 1 / declared if declared > 5 else 0.1):
        rate, is_contradicted = video.frame_rate(times, last_duration, declared)
        assert is_contradicted
        assert rate == pytest.approx(10)


def test_frame_rate_is_measured_where_none_is_declared():
    assert video.frame_rate([0.0, 0.1, 0.2], 0.0, None)[0] == pytest.approx(10)
    assert video.frame_rate([0.0], 0.0, None) == (2.0, False)


def test_load_video_measures_a_rate_declared_as_zero(tmp_path, quiet):
    path = set_matroska_rate(encode(tmp_path / "x.mkv", draw_frames(30, 64, 48)), 0)
    assert len(load_video(path, SMALL).frames) == 6


def test_load_video_scales_pixels_that_are_not_square(tmp_path, quiet):
    """64×48 pixels, each twice as wide as high, and then rotated by a quarter."""
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for pixels in draw_frames(4, 64, 48):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    clip = load_video(path, SMALL)
    assert clip.size == (128, 48)
    assert clip.frames.shape == (4, 48, 128, 3)
    green = clip.frames[0, :24, :, 1]  # the upper left quarter of `draw` is bright
    assert green[:, :60].min() > 180 > green[:, 68:].max()
    assert load_video(path, ImageConfig(patch_size=2, do_resize=False)).frames.shape[2] == 128

    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", data, start, 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    clip = load_video(data, SMALL)
    assert clip.size == (48, 128)
    assert clip.frames.shape == (4, 128, 48, 3)


@pytest.mark.parametrize("aspect", [Fraction(1, 300), Fraction(250, 1)])
def test_display_size_ignores_an_impossible_aspect_ratio(aspect):
    class Video:
        width, height, side_data = 64, 48, {}
        sample_aspect_ratio = aspect

    assert video_decode.display_size(Video, Video) == (64, 48)


# --- alpha ---

ALPHA = [
    ("webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    ("webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
    ("mkv", "ffv1", "bgra", {}),
    ("mov", "qtrle", "argb", {}),
    ("mov", "png", "rgba", {}),
    ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
    ("apng", "apng", "rgba", {}),
]


@pytest.mark.parametrize(("suffix", "codec", "pixels", "options"), ALPHA)
def test_load_video_composites_transparency_on_white(
    tmp_path, quiet, suffix, codec, pixels, options
):
    """The left half is opaque and blue, the right half transparent."""
    rgba = np.zeros((48, 64, 4), dtype=np.uint8)
    rgba[..., 2] = 200
    rgba[:, :32, 3] = 255
    path = tmp_path / f"x.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        for number in range(6):
            rgba[:8, :8, 0] = 40 * number
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pixels)
            frame.pts = number
            frame.time_base = Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = load_video(path, SMALL, fps=10)
    assert len(clip.frames) == 6
    for frame in clip.frames.astype(int):
        assert np.abs(frame[12:, :28] - [0, 0, 200]).max() <= 16
        assert frame[:, 36:].min() >= 250


@pytest.mark.slow
def test_load_video_keeps_alpha_when_seeking(tmp_path, quiet):
    """The decoder that keeps it is not the stream's own, so a seek must reset it as well."""
    rgba = np.zeros((48, 64, 4), dtype=np.uint8)
    path = tmp_path / "x.webm"
    with av.open(str(path), "w") as container:
        options = {"auto-alt-ref": "0", "g": "10"}
        stream = container.add_stream("libvpx", rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva420p"
        for number in range(60):
            rgba[:, :, 3] = 4 * number
            frame = av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="yuva420p")
            frame.pts = number
            frame.time_base = Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = load_video(path, SMALL, nframes=4).frames.astype(int)
    levels = frames.mean(axis=(1, 2, 3))
    assert np.abs(levels - [255, 255 - 80, 255 - 156, 255 - 236]).max() < 6


def animated_webp(path, **options):
    """10 frames of half-transparent red: 5 of 100 ms and 5 of 300 ms."""
    images = [Image.new("RGBA", (64, 48), (20 * n, 0, 0, 128)) for n in range(10)]
    durations = [100] * 5 + [300] * 5
    images[0].save(
        path, "WEBP", save_all=True, append_images=images[1:], duration=durations, lossless=True
    )
    return path


def test_load_video_reads_animated_webp_by_its_own_durations(tmp_path, quiet):
    path = animated_webp(tmp_path / "x.webp")
    for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
        clip = load_video(source, SMALL, nframes=10)
        assert clip.timestamps == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.1, 1.4, 1.7]
        assert clip.size == (64, 48)
        reds = clip.frames[:, 20, 20, 0].astype(int)
        assert np.abs(reds - [127 + 10 * n for n in range(10)]).max() <= 2
        assert np.abs(clip.frames[..., 1].astype(int) - 127).max() <= 1
    assert len(load_video(path, SMALL).frames) == 4  # 2 s
    assert load_video(path, SMALL, video_start=0.8).timestamps == [0.8, 1.1, 1.4, 1.7]


def test_load_video_of_damaged_webp_is_one_sentence(tmp_path):
    data = animated_webp(tmp_path / "x.webp").read_bytes()
    with pytest.raises(ValueError, match=r"^cannot read the given bytes as a video: "):
        load_video(data[:30], SMALL)


@pytest.mark.parametrize("pixels", ["gray", "gray16le", "yuv420p10le", "yuvj420p", "bgr0"])
def test_load_video_gives_the_same_frames_in_each_pixel_format(tmp_path, quiet, pixels):
    codec = "mjpeg" if pixels == "yuvj420p" else "ffv1"
    path = encode(tmp_path / "x.mkv", draw_frames(4, 65, 49), codec, pixels=pixels)
    clip = load_video(path, ImageConfig(patch_size=2), nframes=4)
    assert clip.size == (65, 49)
    images = [Image.fromarray(frame) for frame in draw_frames(4, 65, 49)]
    if "gray" in pixels:
        images = [image.convert("L").convert("RGB") for image in images]
    expected = np.stack([image.resize((64, 48)) for image in images]).astype(int)
    assert np.abs(clip.frames - expected).mean() < 8


def test_load_video_resizes_frames_that_change_their_size(tmp_path, quiet):
    """Video calls are recorded with the resolution that the network allowed at the time."""
    path = tmp_path / "x.ts"
    parts = [
        encode(tmp_path / f"{w}.ts", draw_frames(8, w, w), "mpeg2video", 25).read_bytes()
        for w in (64, 96)
    ]
    path.write_bytes(b"".join(parts))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its timestamps begin again
        clip = load_video(path, SMALL, nframes=8)
    assert clip.frames.shape[1:] == (64, 64, 3)


# --- what is opened ---


def test_load_video_opens_only_regular_files(tmp_path):
    """A pipe would block until the decoder is given up, and a device never ends."""
    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", "/dev/zero"):
        with pytest.raises(ValueError, match="as a video: it is a pipe, device or socket"):
            load_video(path)
    with pytest.raises(ValueError, match="embedded null"):
        load_video("a\0b.mp4")
    with pytest.raises(FileNotFoundError, match="there is no video at"):
        load_video(tmp_path / "missing.mp4")


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nx.ts\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile x.ts\n",
        "<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    ],
    ids=["m3u8", "concat", "dash", "sdp"],
)
def test_load_video_opens_no_playlist(tmp_path, monkeypatch, text):
    """They name other files, which would be read."""
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "x.ts", draw_frames(4, 64, 48))
    (tmp_path / "list.m3u8").write_text(text)
    for source in (tmp_path / "list.m3u8", text.encode()):
        with pytest.raises(ValueError, match=r"^cannot read .* as a video: "):
            load_video(source, SMALL)


@pytest.mark.parametrize("prefix", ["concat:", "subfile,,start,0,end,9,,:", "crypto:", "file:"])
def test_load_video_takes_the_name_of_a_protocol_as_a_part_of_the_file_name(
    tmp_path, monkeypatch, prefix
):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "x.mp4", draw_frames(4, 64, 48))
    with pytest.raises(FileNotFoundError, match=f"there is no video at {prefix}x"):
        load_video(f"{prefix}x.mp4", SMALL)
    (tmp_path / "x.mp4").rename(tmp_path / f"{prefix}x.mp4")
    assert len(load_video(f"{prefix}x.mp4", SMALL).frames) == 4


@pytest.mark.parametrize("name", ["x%d.png", "x*.png", "x%03d.mp4"])
def test_load_video_takes_a_pattern_as_a_file_name(tmp_path, name):
    Image.fromarray(draw(0, 64, 48)).save(tmp_path / "x1.png")
    with pytest.raises(FileNotFoundError, match="there is no video at"):
        load_video(tmp_path / name, SMALL)


def test_load_video_of_an_unknown_codec_is_one_sentence(tmp_path):
    data = encode(tmp_path / "x.avi", draw_frames(4, 64, 48)).read_bytes()
    data = data.replace(b"FMP4", b"XQZ7").replace(b"mp4v", b"XQZ7")
    with pytest.raises(ValueError, match=r"as a video: this build of FFmpeg has no decoder"):
        load_video(data, SMALL)


# --- bounds ---


def test_load_video_refuses_frames_that_are_too_large(tmp_path):
    path = encode(tmp_path / "x.mp4", draw_frames(4, 64, 48))
    webp = animated_webp(tmp_path / "x.webp")
    assert len(load_video(path, SMALL, MediaLimits(max_frame_pixels=3072)).frames) == 4
    for source in (path, webp):
        with pytest.raises(ValueError, match=r"as a video: its frames have 64×48 pixels, expected"):
            load_video(source, SMALL, MediaLimits(max_frame_pixels=3071))


def motion_jpeg(path):
    """Frames of 512×384 in a file whose header declares 64×48."""
    data = encode(path, draw_frames(6, 512, 384), "mjpeg", pixels="yuvj420p").read_bytes()
    assert data.count(struct.pack("<II", 512, 384)) >= 2
    return data.replace(struct.pack("<II", 512, 384), struct.pack("<II", 64, 48))


@pytest.mark.filterwarnings("ignore")
def test_load_video_bounds_frames_that_are_larger_than_the_header_declares(tmp_path, monkeypatch):
    """By the decoder's own check, before it allocates them."""
    data = motion_jpeg(tmp_path / "x.avi")
    sizes = []
    size_of = video_decode.display_size
    monkeypatch.setattr(
        video_decode, "display_size", lambda *frame: sizes.append(size_of(*frame)) or sizes[-1]
    )
    assert len(load_video(data, SMALL).frames) == 4
    assert set(sizes) == {(512, 384)}
    with pytest.raises(ValueError, match="holds no frame that can be decoded"):
        load_video(data, SMALL, MediaLimits(max_frame_pixels=64 * 48))


def set_fields(data, box, place, layout, *values):
    """Overwrite fields of the first box of a name, `place` bytes after its name."""
    data = bytearray(data)
    struct.pack_into(layout, data, data.index(box) + 4 + place, *values)
    return bytes(data)


MANY = 2**22 + 1


def test_load_video_refuses_more_samples_than_bytes(tmp_path):
    frames = draw_frames(6, 64, 48)
    whole = encode(tmp_path / "a.mp4", frames).read_bytes()
    options = {"movflags": "frag_keyframe+empty_moov"}
    fragmented = encode(tmp_path / "b.mp4", frames, container_options=options).read_bytes()
    repeated = set_fields(whole, b"stsz", 8, ">I", 2**14)
    for data in (
        set_fields(whole, b"stsz", 4, ">II", 1, MANY),
        set_fields(fragmented, b"trun", 0, ">II", 1, MANY),
        set_fields(repeated, b"elst", 4, ">I", 2**11),
        b"\0\0\0\x08uuid" + set_fields(whole, b"stsz", 4, ">II", 1, MANY),
    ):
        with pytest.raises(
            ValueError, match=r"as a video: its header declares [\d,]+ samples, but"
        ):
            load_video(data, SMALL)


def test_check_sample_counts_reads_a_compressed_header():
    header = zlib.compress(b"stsz" + struct.pack(">III", 0, 1, MANY))
    box = b"moov\0\0\0\0cmovcmvd" + struct.pack(">I", 99) + header
    with pytest.raises(ValueError, match="declares"):
        video_headers.check_sample_counts(io.BytesIO(struct.pack(">I", len(box) + 4) + box))


def test_check_sample_counts_accepts_what_people_have(tmp_path):
    """Few samples beyond a cut, and uncompressed sound, of which FFmpeg indexes larger pieces."""
    data = encode(tmp_path / "a.mp4", draw_frames(6, 64, 48)).read_bytes()
    video_headers.check_sample_counts(io.BytesIO(set_fields(data, b"stsz", 4, ">II", 1, MANY - 1)))
    sound = encode_with(tmp_path / "x.mov", draw_frames(6, 64, 48), "mpeg4", ["video", "audio"])
    track = b"trak" + b"hdlr" + bytes(8) + b"soun" + b"stts" + struct.pack(">IIII", 0, 1, MANY, 1)
    track += b"stsz" + struct.pack(">III", 0, 2, MANY)
    box = struct.pack(">I", len(track) + 8) + b"moov" + track
    video_headers.check_sample_counts(io.BytesIO(box))
    video_headers.check_sample_counts(io.BytesIO(sound.read_bytes()))
    with pytest.raises(ValueError, match="declares"):
        video_headers.check_sample_counts(io.BytesIO(box.replace(b"soun", b"vide")))


def test_check_sample_counts_leaves_other_formats_alone(tmp_path):
    for suffix, codec in (
        ("avi", "mpeg4"),
        ("mkv", "mpeg4"),
        ("ts", "mpeg2video"),
        ("webm", "vp8"),
    ):
        path = encode(tmp_path / f"x.{suffix}", draw_frames(4, 64, 48), codec, 25)
        assert list(video_headers.header_boxes(io.BytesIO(path.read_bytes()), 10**9)) == []
    assert list(video_headers.header_boxes(io.BytesIO(b""), 0)) == []


# --- damage ---


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [
        ("mp4", "libx265"),
        ("mp4", "libx264"),
        ("ts", "libx264"),
        ("webm", "libvpx"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("mkv", "mpeg4"),
        ("gif", "gif"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_load_video_of_damaged_data_gives_frames_or_one_sentence(tmp_path, suffix, codec):
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"g": "6"}
    path = encode(tmp_path / f"x.{suffix}", draw_frames(18, 64, 48), codec, 10, pixels, options)
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    answered = 0
    sentences = []
    for _ in range(12):
        data = bytearray(whole)
        for position in random.integers(len(data) // 5, len(data), 3):
            data[position] ^= random.integers(1, 256)
        try:
            clip = load_video(data, SMALL)
        except ValueError as error:
            sentences.append(str(error))
            continue
        assert len(clip.frames) == len(clip.timestamps) > 0
        answered += 1
    assert answered >= 3
    assert all("the given bytearray" in sentence for sentence in sentences)
    assert all("\n" not in sentence for sentence in sentences)


def test_opened_decodes_frames_by_slices(tmp_path):
    """Not several frames at once: those threads wait for each other forever after some damage."""
    path = encode(tmp_path / "x.mp4", draw_frames(4, 64, 48), "libx264")
    with video_decode.opened(str(path), "x") as opened:
        assert opened.decoder.thread_type.name == "SLICE"


# --- hangs ---


@pytest.fixture
def blocked(monkeypatch):
    """Decoding a packet blocks until the test is over, as a decoder does that hangs."""
    release, entered = threading.Event(), threading.Event()

    def decode(opened, packet):
        entered.set()
        release.wait()
        yield from ()

    monkeypatch.setattr(video_decode.OpenVideo, "decode", decode)
    monkeypatch.setattr(video_decode, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(video_decode, "JOIN_SECONDS", 0.01)
    yield entered
    release.set()


def test_in_thread_makes_one_item_ahead(tmp_path):
    """The next frame is decoded while the caller resizes this one, and no frame after it."""
    made = [threading.Event() for _ in range(4)]

    def make(step):
        for event in made:
            event.set()
            yield event

    items = video_decode.in_thread(make, str(encode_nothing(tmp_path)), "x.mp4")
    assert not made[0].is_set()
    for index in range(3):
        assert next(items) is made[index]
        assert made[index + 1].wait(20), "it was to be made without being asked for"
        assert not any(event.is_set() for event in made[index + 2 :])
    items.close()


def test_load_video_gives_up_a_decoder_that_hangs(tmp_path, blocked):
    path = encode(tmp_path / "x.mp4", draw_frames(4, 64, 48))
    with pytest.raises(TimeoutError, match=r"cannot read .*x\.mp4 as a video: a decoder made no"):
        load_video(path, SMALL)


def test_load_video_gives_up_a_file_that_hangs(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(av, "open", lambda *_, **__: release.wait())
    monkeypatch.setattr(video_decode, "STALL_SECONDS", 0.05)
    monkeypatch.setattr(video_decode, "JOIN_SECONDS", 0.01)
    path = encode_nothing(tmp_path)
    with pytest.raises(TimeoutError, match=r"a decoder made no progress for 0\.05 seconds"):
        load_video(path, SMALL)
    release.set()


def encode_nothing(folder):
    """A file that is only to be opened."""
    (folder / "x.mp4").write_bytes(bytes(64))
    return folder / "x.mp4"


def test_load_video_gives_up_a_decoder_without_end(tmp_path, monkeypatch):
    """It makes progress, and yet gives no frame."""
    path = encode(tmp_path / "x.mp4", draw_frames(4, 64, 48))
    monkeypatch.setattr(video_decode, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(video_decode, "DEADLINE_SECONDS", 0.03)

    def frames(opened, step, wanted=None):
        while True:
            step()
            yield from ()

    monkeypatch.setattr(video_decode.OpenVideo, "frames", frames)
    with pytest.raises(TimeoutError, match=r"it is not decoded after 0\.03 seconds"):
        load_video(path, SMALL)


def test_load_video_is_interrupted_in_a_decoder_that_hangs(tmp_path, blocked, monkeypatch):
    monkeypatch.setattr(video_decode, "STALL_SECONDS", 20.0)
    path = encode(tmp_path / "x.mp4", draw_frames(4, 64, 48))

    def interrupt():
        blocked.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        load_video(path, SMALL)


class Panic(BaseException):
    """Like the panic of an extension in Rust, no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("odd"), struct.error("odd"), Panic("odd")])
def test_load_video_makes_any_decoder_error_one_sentence(tmp_path, monkeypatch, error):
    def to_image(frame):
        raise error

    monkeypatch.setattr(video_decode, "to_image", to_image)
    path = encode(tmp_path / "x.mp4", draw_frames(4, 64, 48))
    with pytest.raises(ValueError, match=r"^cannot read .*x\.mp4 as a video: odd$"):
        load_video(path, SMALL)


def decoder_threads():
    return {thread for thread in threading.enumerate() if thread.name == "video decoder"}


def test_sample_file_ends_its_thread_when_reading_stops_early(tmp_path, monkeypatch):
    """Also where the error is the caller's, between two frames."""
    path = encode(tmp_path / "x.mp4", draw_frames(8, 64, 48))
    others = decoder_threads()  # given up by other tests
    with path.open("rb") as file:
        sampled = video.sample_file(file, "x", fps=10)
        next(sampled.frames)
        assert len(decoder_threads() - others) == 1
        sampled.frames.close()
        assert not decoder_threads() - others
        assert not file.closed
        monkeypatch.setattr("preprocess.frame_size", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_video(file, SMALL)
        assert not decoder_threads() - others


def test_load_video_runs_in_many_threads(tmp_path):
    paths = [encode(tmp_path / f"{n}.mp4", draw_frames(8, 64, 48)[n:]) for n in range(4)]
    expected = [load_video(path, SMALL, nframes=4).frames for path in paths]
    results = {}

    def read(number):
        results[number] = load_video(paths[number % 4], SMALL, nframes=4).frames

    threads = [threading.Thread(target=read, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(results[number], expected[number % 4]) for number in range(12))


# --- arrays and tensors ---


@pytest.mark.parametrize("shape", [(4, 8, 8, 3), (4, 3, 8, 8)])
def test_load_video_reads_each_frame_of_an_array_as_an_image(monkeypatch, quiet, shape):
    """What an array of three axes means as an image is decided in one place."""
    shapes = []

    def load_image(array, limits):
        shapes.append(array.shape)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(video, "load_image", load_image)
    assert len(load_video(np.zeros(shape), SMALL).frames) == 4
    assert shapes == [shape[1:]] * 4


def test_draw_differs_from_frame_to_frame():
    """What `nearest` relies on."""
    assert nearest(np.stack([draw(n, 64, 48) for n in range(20)])) == list(range(20))
