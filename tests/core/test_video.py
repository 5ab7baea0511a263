"""`video.py` and `video_decode.py`: golden values of qwen-vl-utils, sampling and decoding."""

import io
import json
import random
import struct
import tracemalloc
import warnings
import weakref
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import draw, draw_frames, encode
from hypothesis import given
from hypothesis import strategies as st
from make_golden_video import GOLDEN, ITEMS, VIDEOS, summary, write_videos
from PIL import Image

import video
import video_decode
from preprocess import Clip, ImageConfig, frame_size, load_video

GOLDEN_RECORDS = json.loads(GOLDEN.read_text(encoding="utf-8"))
SMALL = ImageConfig(patch_size=2)  # tokens of 4×4 pixels: a frame of 64×48 is not resized


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return {name: path} of the golden videos."""
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """Return a video of 200 frames, 10 per second, with B-frames and a key frame every 20."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    options = {"g": "20", "bf": "2", "sc_threshold": "0"}
    return encode(path, draw_frames(200, 64, 48), codec="libx264", options=options)


@pytest.fixture
def no_warnings():
    """Turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def decode_all(path):
    """Return all frames as PyAV decodes them."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def nearest_indices(sampled: Clip) -> list[int]:
    """Return for each sampled frame the index of the nearest of the first 50 frames of `draw`."""
    _, height, width, _ = sampled.frames.shape
    drawn = np.stack(draw_frames(50, width, height)).astype(int)
    return [int(np.abs(drawn - frame).mean(axis=(1, 2, 3)).argmin()) for frame in sampled.frames]


# --------------------------------------------------------------- golden values of qwen-vl-utils ---


@pytest.mark.sweep
@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.filterwarnings("ignore")
def test_load_video_equals_qwen_vl_utils(videos, name):
    """Compare frame indices and sizes exactly, and values within 1 level (measured: 1).

    Pillow's resize rounds between its two passes, torch's does not; the difference is 3 where this
    clips the overshoot of a hard edge (the GIF). x264 does not write the same bytes every time, so
    its values are not compared here; `test_read_frames_equals_decoding_everything` compares them.
    """
    records = [record for record in GOLDEN_RECORDS["films"] if record["film"] == name]
    assert len(records) >= 3
    rate = float(VIDEOS[name][4]["rate"])
    for record in records:
        sampled = load_video(videos[name], ImageConfig(), **record["options"])
        result = summary(sampled.frames)
        seconds = np.divide(record["indices"], rate)
        # Matroska counts in milliseconds.
        assert np.allclose(sampled.timestamps, seconds, atol=1e-3), record
        assert result["size"] == record["size"], record
        if VIDEOS[name][4].get("codec") != "libx264":
            tolerance = 3 if name == "gif" else 1
            assert np.abs(np.subtract(result["values"], record["values"])).max() <= tolerance, (
                record
            )
            assert np.abs(np.subtract(result["means"], record["means"])).max() <= 0.1, record


def test_golden_file_contains_every_video():
    records = GOLDEN_RECORDS["films"]
    assert {record["film"] for record in records} == set(VIDEOS)
    assert len(records) > 0.9 * len(ITEMS)  # qwen-vl-utils refuses the rest


@pytest.mark.sweep
@pytest.mark.parametrize("record", GOLDEN_RECORDS["lists"], ids=lambda record: str(record["list"]))
def test_load_video_of_a_list_equals_qwen_vl_utils(record):
    """Compare sizes exactly and values within 1 level.

    Only for multiples of 56, to which qwen-vl-utils first resizes a list; a list of other sizes is
    resized as a video of its size.
    """
    n, width, height = record["list"]
    images = [Image.fromarray(frame) for frame in draw_frames(n, width, height)]
    frames = load_video(images, ImageConfig(), **record["options"]).frames
    if n % 2:  # qwen-vl-utils pads
        frames = np.concatenate([frames, frames[-1:]])
    result = summary(frames)
    if width % 56 or height % 56:
        expected = frame_size(height, width, n, ImageConfig(), **record["options"])
        assert tuple(result["size"]) == expected
    else:
        assert result["size"] == record["size"]
        assert np.abs(np.subtract(result["values"], record["values"])).max() <= 1


def test_count_frames_equals_qwen_vl_utils():
    for total, rate, options, n in GOLDEN_RECORDS["counts"]:
        assert video.count_frames(total, rate, **options) == n, (total, rate, options)


def test_spread_equals_qwen_vl_utils():
    """Check videos of thousands of frames, whose indices depend on the last bit of float32."""
    for first, last, indices in GOLDEN_RECORDS["spread"]:
        assert video.spread(first, last, len(indices)) == indices


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="torch rounds product and sum separately here",
)
@given(first=st.integers(0, 10**5), length=st.integers(0, 10**5), n=st.integers(1, 800))
def test_spread_equals_torch_linspace(first, length, n):
    expected = torch.linspace(first, first + length, n).round().long().tolist()
    assert video.spread(first, first + length, n) == expected


def test_load_video_resizes_within_one_level_of_torch():
    """Compare all values of some frames; measured: at most 1 level, in 5 % of the values."""
    frames = np.stack(draw_frames(4, 300, 200))
    sampled = load_video(frames, ImageConfig())
    values = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    values = torch.nn.functional.interpolate(
        values, sampled.frames.shape[1:3], mode="bicubic", antialias=True
    )
    difference = values.clamp(0, 255).round().permute(0, 2, 3, 1).numpy() - sampled.frames
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.1


# ---------------------------------------------------------------- number of frames, range, size ---


@given(
    total=st.integers(1, 3000),
    rate=st.floats(1, 120),
    factor=st.integers(1, 4),
    fps=st.none() | st.floats(0.01, 100),
    limits=st.tuples(st.integers(4, 1000), st.integers(4, 1000)),
)
def test_count_frames_is_a_multiple_within_its_limits(total, rate, factor, fps, limits):
    n = video.count_frames(
        total, rate, factor, fps=fps, min_frames=min(limits), max_frames=max(limits)
    )
    assert n == total < factor or (n % factor == 0 and factor <= n <= total)
    assert n <= max(limits)
    assert n >= min(*limits, total) - factor


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fps": 1, "nframes": 4}, "fps 1 and nframes 4 exclude each other: give one of them"),
        ({"nframes": 1}, "nframes 1 comes to 0 frames, but at least 2 are needed"),
        (
            {"max_frames": 1},
            "fps 2.0 within 4 to 0 frames comes to 0 frames, but at least 2 are needed",
        ),
    ],
    ids=str,
)
def test_count_frames_refuses_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        video.count_frames(10, 5.0, **options)


def test_load_video_warns_when_fewer_frames_exist_than_requested(videos):
    message = "nframes 20 is more than the 7 frames there are: 6 are taken"
    with pytest.warns(UserWarning, match=message) as caught:
        sampled = load_video(videos["lossless"], SMALL, nframes=20)
    assert len(caught) == 1
    # The frames nearest to 0, 1.2, 2.4, 3.6, …
    assert sampled.timestamps == [0, 0.25, 0.5, 1.0, 1.25, 1.5]


def test_load_video_reads_a_video_of_one_frame(tmp_path, no_warnings):
    sampled = load_video(encode(tmp_path / "one.mp4", draw_frames(1, 64, 48)), SMALL)
    assert sampled.frames.shape == (1, 48, 64, 3)
    assert sampled.timestamps == [0.0]


def test_load_video_samples_a_multiple_of_temporal_patch_size(videos, no_warnings):
    config = ImageConfig(patch_size=2, temporal_patch_size=3)
    sampled = load_video(videos["30 fps"], config, fps=3)
    assert len(sampled.frames) == 6  # 2.5 s at 3 fps is 7.5


@pytest.mark.parametrize(
    ("start", "end", "indices"),
    [
        (0.5, 0.8, [5, 6, 7, 8]),
        (0.41, 0.89, [5, 6, 7, 8]),
        (-3, 0.1, [0, 1]),
        (2.85, 77, [29, 30]),
        (0.48, 0.52, [5]),  # qwen-vl-utils refuses a single frame
    ],
)
def test_load_video_samples_within_a_range(videos, no_warnings, start, end, indices):
    """Sample all frames of a video of 10 per second with timestamps in milliseconds."""
    options = {"fps": 10, "video_start": start, "video_end": end, "min_frames": 0}
    sampled = load_video(videos["vp9"], SMALL, **options)
    assert np.round(np.multiply(sampled.timestamps, 10), 6).tolist() == indices


def test_load_video_range_includes_ends_that_the_file_rounds(videos, no_warnings):
    sampled = load_video(videos["vp8"], SMALL, fps=12, video_start=1 / 12, video_end=2 / 12)
    assert sampled.timestamps == [0.083, 0.167]  # rounded to milliseconds, down and up


@given(
    rate=st.integers(1, 120), pair=st.tuples(st.integers(0, 999), st.integers(0, 999)).map(sorted)
)
def test_frames_between_includes_both_ends(rate, pair):
    """Check ends that qwen-vl-utils loses by rounding: ceil(0.07 * 100) is 8, 3 * 0.1 > 0.3."""
    times = [index / rate for index in range(1000)]
    first, last = pair
    if first < last:
        start = first * (1 / rate)
        end = last * (1 / rate)
        assert video.frames_between(times, start, end, "x", rate) == (first, last)


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        (5, None, "from 5 s to the end"),
        (None, -1, "from 0 s to -1 s"),
        (2, 1, "from 2 s to 1 s"),
        (1, 1, "from 1 s to 1 s"),
        (0.51, 0.59, "from 0.51 s to 0.59 s"),
    ],
)
def test_load_video_refuses_a_range_without_a_frame(videos, start, end, span):
    with pytest.raises(ValueError, match=rf"f\.webm has no frame {span}: it lasts 3\.10 s$"):
        load_video(videos["vp9"], SMALL, video_start=start, video_end=end)


def test_frame_size_refuses_or_lowers_impossible_bounds():
    config = ImageConfig()
    with pytest.raises(
        ValueError, match=r"max_pixels 50000 is less than min_pixels, 100352: give a lower"
    ):
        frame_size(100, 100, 4, config, max_pixels=50_000)
    with pytest.raises(ValueError, match="resized_height and resized_width belong together"):
        frame_size(100, 100, 4, config, resized_height=50)
    with pytest.warns(
        UserWarning, match="max_pixels 700000 is lowered to 602112, the limit for 4 frames"
    ):
        assert frame_size(2000, 2000, 4, config, max_pixels=700_000) == (756, 756)
    with pytest.raises(ValueError, match="one side is more than 200 times the other"):
        frame_size(10, 2001, 4, config)


def test_frame_size_allows_slightly_more_than_min_pixels_for_a_small_budget():
    """The smallest budget is 1.05 times min_pixels: 132 tokens of 28×28."""
    assert frame_size(308, 336, 4, ImageConfig(), total_pixels=1000) == (308, 336)
    assert frame_size(336, 336, 4, ImageConfig(), total_pixels=1000) == (308, 308)


def test_frame_size_splits_the_budget_of_a_long_video():
    """768 frames, 2 per token: a total of 90316800 pixels is 300 tokens each."""
    assert frame_size(2000, 2000, 768, ImageConfig()) == (17 * 28, 17 * 28)


@pytest.mark.parametrize("option", ["fps", "nframes", "video_start"])
def test_load_video_refuses_a_number_that_is_no_float(option):
    with pytest.raises(ValueError, match=rf"{option} is 1000+\.\.\.0+, expected a (positive )?nu"):
        load_video(draw_frames(2, 8, 8), SMALL, **{option: 10**400})


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "2"])
@pytest.mark.parametrize(
    "option", ["fps", "nframes", "max_frames", "min_pixels", "total_pixels", "resized_width"]
)
def test_load_video_refuses_options_that_are_not_positive_numbers(option, value):
    with pytest.raises(ValueError, match=rf"{option} is {value!r}, expected a positive number"):
        load_video(draw_frames(2, 8, 8), SMALL, **{option: value})


def test_load_video_without_do_resize_requires_multiples_of_the_token_size(videos):
    off = ImageConfig(do_resize=False)
    message = r"do_resize is off, but 48×64 \(height × width\) is no multiple of 28"
    with pytest.raises(ValueError, match=message):
        load_video(videos["30 fps"], off)
    frames = np.stack(draw_frames(4, 56, 28))
    assert np.array_equal(load_video(frames, off).frames, frames)


# ------------------------------------------------------------------------------------- decoding ---


class PassCounts:
    """Count the decoded frames and the seeks of one pass over a video."""

    def __init__(self):
        self.decoded = 0
        self.seeks = 0
        self.closed = False


@pytest.fixture
def counted(monkeypatch):
    """Return the counts of each pass over a video, and the timestamps of all converted frames."""
    passes = []
    converted = []
    original_opened = video_decode.opened
    original_decode = video_decode.OpenVideo.decode
    original_seek = video_decode.seek
    original_to_image = video_decode.to_image

    @contextmanager
    def opened(*arguments):
        with original_opened(*arguments) as opened_video:
            passes.append(PassCounts())
            yield opened_video
        passes[-1].closed = True

    def decode(opened_video, packet):
        for frame in original_decode(opened_video, packet):
            passes[-1].decoded += 1
            yield frame

    def seek(*arguments):
        passes[-1].seeks += 1
        original_seek(*arguments)

    def to_image(frame):
        converted.append(frame.pts)
        return original_to_image(frame)

    monkeypatch.setattr(video_decode, "opened", opened)
    monkeypatch.setattr(video_decode.OpenVideo, "decode", decode)
    monkeypatch.setattr(video_decode, "seek", seek)
    monkeypatch.setattr(video_decode, "to_image", to_image)
    return passes, converted


def test_load_video_decodes_and_converts_only_what_it_samples(long_video, counted, no_warnings):
    passes, converted = counted
    sampled = load_video(long_video, SMALL, nframes=4, video_start=3, video_end=16.2)
    assert sampled.timestamps == [3.0, 7.4, 11.8, 16.2]
    packet_pass, frame_pass = passes
    assert packet_pass.decoded == 0
    assert frame_pass.seeks == 4  # to 2, 6, 10 and 16 s
    assert 8 < frame_pass.decoded < 11 + 15 + 19 + 3  # from each key frame on, some B-frames not
    assert len(converted) == 4


INTERLACED = "interlaced=1:bframes=2:b-adapt=0:keyint=20:scenecut=0"


@pytest.mark.parametrize(
    ("codec", "options", "decoded"),
    [
        # A B-frame in each group of three is no reference, none of the last group, 19 and 20.
        ("libx264", {"x264-params": INTERLACED.replace("interlaced=1", "b-pyramid=0")}, None),
        ("libx264", {"x264-params": INTERLACED}, 20),  # a packet may hold one of two fields
        ("libx265", {"x265-params": "bframes=2:b-adapt=0:keyint=20:log-level=none"}, 20),
    ],
    ids=["progressive", "interlaced", "H.265"],
)
def test_load_video_skips_frames_that_no_other_refers_to(
    codec, options, decoded, tmp_path, counted, no_warnings
):
    path = encode(tmp_path / "x.mp4", draw_frames(20, 64, 64), codec, 10, options=options)
    passes, _ = counted
    sampled = load_video(path, SMALL, nframes=2, resized_height=64, resized_width=64)
    assert sampled.timestamps == pytest.approx([0.0, 1.9])
    if decoded is None:
        assert 6 < passes[1].decoded < 14
    else:
        assert passes[1].decoded == decoded


def test_load_video_decodes_consecutive_frames_without_seeking(long_video, counted, no_warnings):
    passes, converted = counted
    load_video(long_video, SMALL, fps=10, video_end=9.9)
    assert passes[1].seeks == 0
    assert passes[1].decoded == 100
    assert len(converted) == 100


CODECS = [
    ("mp4", "libx264", {"g": "12", "bf": "3"}),
    ("mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    ("mp4", "libx264", {"g": "1"}),
    ("mp4", "libx264", {"g": "20", "bf": "7", "x264-params": "b-pyramid=normal:b-adapt=2:ref=4"}),
    ("mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "interlaced=1"}),
    ("ts", "libx264", {"g": "12", "bf": "3", "x264-params": "interlaced=1"}),
    ("mp4", "libx265", {"g": "12", "x265-params": "bframes=4:temporal-layers=3:log-level=none"}),
    ("mp4", "mpeg4", {"g": "12", "bf": "2"}),
    ("mkv", "libx264", {"g": "12", "bf": "3"}),
    ("mkv", "ffv1", {"g": "1"}),
    ("ts", "libx264", {"g": "12", "bf": "3"}),
    ("ts", "mpeg2video", {"g": "12", "bf": "2"}),
    ("flv", "flv", {"g": "12"}),
    ("webm", "libvpx", {"g": "12"}),
    ("webm", "libvpx-vp9", {"g": "12"}),
    ("avi", "mpeg4", {"g": "12"}),
    ("gif", "gif", {}),
]


@pytest.mark.sweep
@pytest.mark.parametrize(("suffix", "codec", "options"), CODECS)
def test_read_frames_equals_decoding_everything(tmp_path, no_warnings, suffix, codec, options):
    """Compare random frames, reached by seeking, exactly."""
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    path = encode(tmp_path / f"x.{suffix}", draw_frames(41, 64, 48), codec, 25, pixels, options)
    expected = decode_all(path)
    generator = random.Random(0)
    index = video_decode.read_index(str(path), "x")
    assert not index.damage
    assert len(index.pts) == len(expected) == 41
    assert len(index.key_frames) > 1 or suffix == "gif"
    for _ in range(20):
        indices = sorted(generator.sample(range(41), generator.choice([1, 2, 5])))
        frames = video_decode.read_frames(str(path), "x", index, indices)
        for frame, number in zip(frames, indices, strict=True):
            assert np.array_equal(frame.image, expected[number]), indices


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "reason"),
    [
        ("h264", "libx264", {"g": "10", "bf": "2"}, "its packets carry no timestamps"),
        (
            "avi",
            "libx264",
            {"g": "10", "bf": "2"},
            "its frames carry other timestamps than its packets",
        ),
        (
            "mp4",
            "libx264",
            {"x264-params": "keyint=20:intra-refresh=1"},
            "a frame is not where its packet's timestamp places it",
        ),
    ],
)
def test_load_video_counts_frames_whose_timestamps_are_unreliable(
    tmp_path, suffix, codec, options, reason
):
    path = encode(tmp_path / f"x.{suffix}", draw_frames(60, 64, 48), codec, 25, options=options)
    message = f"x.{suffix}: {reason}, so all of it is decoded, twice, to count its frames"
    with pytest.warns(UserWarning, match=message) as caught:
        sampled = load_video(path, SMALL, nframes=4, video_start=1)
    assert len(caught) == 1
    expected = decode_all(path)
    assert np.array_equal(sampled.frames, [expected[n] for n in (25, 36, 48, 59)])
    assert sampled.timestamps == [1.0, 1.44, 1.92, 2.36]


def test_load_video_counts_frames_with_equal_timestamps(tmp_path):
    whole = encode(tmp_path / "whole.mkv", draw_frames(12, 64, 48))
    path = copy_packets(whole, tmp_path / "x.mkv", times=lambda pts: pts // 200 * 200)
    message = r"x\.mkv: several of its frames carry the same timestamp, so all of it is decoded"
    with pytest.warns(UserWarning, match=message):
        sampled = load_video(path, SMALL, nframes=12)
    assert np.array_equal(sampled.frames, decode_all(whole))


def test_load_video_counts_frames_where_seeking_fails(long_video, counted, monkeypatch):
    def seek(*arguments, **options):
        raise video_decode.UnreliableIndex("FFmpeg cannot seek in it")

    monkeypatch.setattr(video_decode, "seek", seek)
    message = r"long\.mp4: FFmpeg cannot seek in it, so all of it is decoded, twice"
    with pytest.warns(UserWarning, match=message):
        sampled = load_video(long_video, SMALL, nframes=4, video_start=5)
    assert sampled.timestamps == pytest.approx([5, 10, 14.9, 19.9])


def test_load_video_memory_does_not_grow_with_the_video(tmp_path, no_warnings):
    """Memory contains the resized frames and at most two more, for any number of frames."""
    peaks = []
    frame_bytes = 256 * 192 * 3
    for n in (20, 200):
        path = encode(tmp_path / f"{n}.mp4", [draw(i, 256, 192) for i in range(n)])
        tracemalloc.start()
        sampled = load_video(path, SMALL, nframes=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert peaks[-1] < sampled.frames.nbytes + 3 * frame_bytes
    assert peaks[1] - peaks[0] < frame_bytes


def test_load_video_releases_images_one_by_one(videos, monkeypatch, no_warnings):
    """Count the images alive, as tracemalloc does not trace Pillow's memory."""
    references = []
    alive = []

    def count_alive(function):
        def counting(*arguments):
            image = function(*arguments)
            references.append(weakref.ref(image))
            alive.append(sum(reference() is not None for reference in references))
            return image

        return counting

    monkeypatch.setattr(video_decode, "to_image", count_alive(video_decode.to_image))
    monkeypatch.setattr(video, "load_image", count_alive(video.load_image))
    for source in (videos["vp9"], draw_frames(10, 64, 48)):
        alive.clear()
        load_video(source, SMALL, nframes=10)
        assert len(alive) == 10
        assert max(alive) <= 2


def test_load_video_uses_the_timestamps_of_a_variable_frame_rate(tmp_path, no_warnings):
    """The timestamps determine the range; the mean rate determines the number of frames."""
    milliseconds = [0, 10, 500, 520, 530, 2000, 2500, 2510]
    path = encode(
        tmp_path / "x.mp4", draw_frames(8, 64, 48), times=milliseconds, tick=Fraction(1, 1000)
    )
    sampled = load_video(path, SMALL, fps=100)
    assert np.allclose(sampled.timestamps, np.divide(milliseconds, 1000))
    sampled = load_video(path, SMALL, fps=100, video_start=0.5, video_end=2)
    assert np.allclose(sampled.timestamps, [0.5, 0.52, 0.53, 2.0])
    assert nearest_indices(sampled) == [2, 3, 4, 5]


def test_load_video_timestamps_start_at_the_first_frame(tmp_path, no_warnings):
    path = encode(
        tmp_path / "x.mkv",
        draw_frames(6, 64, 48),
        times=[n + 7 for n in range(6)],
        tick=Fraction(1, 10),
    )
    assert load_video(path, SMALL, fps=10).timestamps == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_load_video_gives_the_same_frames_for_every_kind_of_source(videos, no_warnings):
    path = videos["24 fps, B-frames"]
    expected = load_video(str(path), SMALL)
    assert expected.size == (96, 64)
    assert nearest_indices(expected) == [round(t * 24) for t in expected.timestamps]
    file = io.BytesIO(path.read_bytes())
    file.seek(100)  # reading starts at the beginning
    with path.open("rb") as opened:
        for source in (path, path.as_uri(), path.read_bytes(), file, opened):
            sampled = load_video(source, SMALL)
            assert np.array_equal(sampled.frames, expected.frames)
            assert sampled[1:] == expected[1:]
        assert not opened.closed


def test_load_video_reads_names_like_ffmpeg_protocols_as_paths(
    videos, tmp_path, no_warnings, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:0", "concat:a|b", "frame%03d.mp4", "http:x.mp4", "ü 100%.mp4"):
        (tmp_path / name).write_bytes(videos["30 fps"].read_bytes())
        assert len(load_video(name, SMALL).frames) == 4


# ------------------------------------------------------------------------ orientation and color ---

# Entries a b c d of the display matrix, and FFmpeg's filters that apply it.
MATRICES = {
    (1, 0, 0, 1): "null",
    (0, 1, -1, 0): "transpose=clock",
    (-1, 0, 0, -1): "hflip,vflip",
    (0, -1, 1, 0): "transpose=cclock",
    (-1, 0, 0, 1): "hflip",
    (1, 0, 0, -1): "vflip",
    (0, 1, 1, 0): "transpose=cclock_flip",
    (0, -1, -1, 0): "transpose=clock_flip",
}


def set_matrix(path, a, b, c, d):
    """Write the display matrix into the track header of an mp4 file."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # after version, times, id, duration, layer, volume
    assert struct.unpack_from(">9i", data, start) == (65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    struct.pack_into(">9i", data, start, *matrix)
    path.write_bytes(data)


def apply_filters(frame, stream, filters):
    """Return a frame after FFmpeg's filters, uint8 [H, W, 3]."""
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=stream)]
    for part in ["format=rgb24", *filters.split(",")]:
        nodes.append(graph.add(*part.split("=")))
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    graph.push(frame)
    return graph.pull().to_ndarray(format="rgb24")


@pytest.mark.parametrize(("matrix", "filters"), MATRICES.items(), ids=str)
def test_load_video_applies_the_display_matrix(tmp_path, no_warnings, matrix, filters):
    path = encode(tmp_path / "x.mp4", draw_frames(3, 64, 48))
    set_matrix(path, *matrix)
    sampled = load_video(path, SMALL)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        assert frame.rotation == {(0, 1, -1, 0): -90, (0, -1, 1, 0): 90}.get(matrix, frame.rotation)
        expected = apply_filters(frame, container.streams.video[0], filters)
    is_quarter_turn = matrix[0] == 0
    assert sampled.size == ((48, 64) if is_quarter_turn else (64, 48))
    assert np.array_equal(sampled.frames[0], expected)


def test_load_video_rotates_the_portrait_video_of_a_phone(tmp_path, no_warnings):
    """Matrix 0 1 -1 0 rotates clockwise: the bright upper left of `draw` is at the upper right."""
    path = encode(tmp_path / "x.mp4", draw_frames(2, 64, 48))
    set_matrix(path, 0, 1, -1, 0)
    green = load_video(path, SMALL).frames[0, ..., 1]
    assert green.shape == (64, 48)
    assert green[:28, 28:].min() > 180 > green[36:].max()
    assert green[:, :20].max() < 180


@pytest.mark.parametrize("name", ["24 fps, B-frames", "vp9", "gif"])
def test_load_video_colors_equal_rgb24(videos, name, no_warnings):
    """Compare with the conversion of torchvision's `read_video`."""
    sampled = load_video(videos[name], SMALL, nframes=6)
    frames = decode_all(videos[name])
    rate = float(VIDEOS[name][4]["rate"])
    assert sampled.frames.shape[1:] == frames[0].shape
    assert np.array_equal(sampled.frames, [frames[round(t * rate)] for t in sampled.timestamps])


# --------------------------------------------------------- packets that are not shown as frames ---


def copy_packets(path, target, change=lambda _, data: data, times=lambda pts: pts):
    """Copy a video by packets, with the content `change(number, bytes)` and the time `times(pts)`.

    Return the target.
    """
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if packet.size:
                new = av.Packet(change(number, bytes(packet)))
                new.pts = times(packet.pts)
                new.dts = times(packet.dts)
                new.time_base = packet.time_base
                new.is_keyframe = packet.is_keyframe
                new.stream = copy
                out.mux(new)
    return target


def hide_frame(data):
    """Return a VP8 packet without its show_frame flag, as in mere reference frames."""
    return bytes([data[0] & ~16]) + data[1:]


def test_load_video_skips_hidden_frames(videos, tmp_path, no_warnings):
    def hide_two(number, data):
        return hide_frame(data) if number in (3, 11) else data

    path = copy_packets(videos["vp8"], tmp_path / "hidden.webm", hide_two)
    expected = decode_all(path)
    assert len(expected) == 18
    sampled = load_video(path, SMALL, fps=12)
    assert np.array_equal(sampled.frames, expected)
    assert 3 not in np.round(np.multiply(sampled.timestamps, 12)).tolist()


@pytest.mark.parametrize(
    ("codec", "packet", "hidden"),
    [
        ("vp9", [0b10000010, 0], False),
        ("vp9", [0b10000000, 0], True),
        ("vp9", [0b10001000, 0], False),  # shows an existing frame
        ("vp9", [0b10110001, 0], False),  # profile 3
        ("vp9", [0b10110000, 0], True),
        ("vp9", [0b10110100, 0], False),
        ("vp9", [0b10000000, 0b11000001], False),  # a superframe, which ends in a byte 110xxxxx
        ("h264", [0, 0], False),
    ],
)
def test_is_hidden_reads_the_header_of_vp9(codec, packet, hidden):
    assert video_decode.is_hidden(codec, bytes(packet)) == hidden


def test_load_video_skips_frames_before_an_edit_list(tmp_path, no_warnings):
    """A stream copied from the middle of a group starts with hidden packets from the key frame."""
    path = encode(
        tmp_path / "x.mp4",
        draw_frames(30, 64, 48),
        options={"g": "30", "sc_threshold": "1000000000"},
    )
    frames = decode_all(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 4
    # Version 0, one entry of duration, start and rate.
    assert struct.unpack_from(">II", data, start) == (0, 1)
    # 2 s from frame 10 on; 10240 ticks are a second.
    struct.pack_into(">ii", data, start + 8, 2000, 1024 * 10)
    path.write_bytes(data)
    sampled = load_video(path, SMALL, fps=10)
    assert np.array_equal(sampled.frames, frames[10:])
    assert sampled.timestamps == pytest.approx([n / 10 for n in range(20)])


# -------------------------------------------------- sources that are not videos, damaged videos ---


def write(path, content):
    """Write bytes to a file and return its path."""
    path.write_bytes(content)
    return path


def test_load_video_refuses_sources_that_are_not_videos(tmp_path, videos):
    def check_refused(source, sentence, error=ValueError):
        with pytest.raises(error) as caught:
            load_video(source, SMALL)
        assert str(caught.value) == sentence

    check_refused(tmp_path / "no.mp4", f"there is no video at {tmp_path}/no.mp4", FileNotFoundError)
    check_refused(
        b"no video" * 99,
        "cannot read the given bytes as a video: Invalid data found when processing input",
    )
    empty = write(tmp_path / "empty.mp4", b"")
    check_refused(
        empty, f"cannot read {empty} as a video: Invalid data found when processing input"
    )
    text = write(tmp_path / "notes.txt", b"one\ntwo\n" * 99)
    no_format = "it has no video format that is opened here"
    check_refused(text, f"cannot read {text} as a video: {no_format}")  # FFmpeg would play it
    check_refused(
        io.StringIO("x"),
        "the given StringIO must be opened in binary mode and be seekable to be read as a video",
    )
    check_refused(5, "expected a path, a URL, bytes or an open file, got int")

    audio = tmp_path / "audio.wav"
    with av.open(str(audio), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    check_refused(audio, f"cannot read {audio} as a video: it has no video stream")

    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = 64
        cover.height = 48
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(draw(0, 64, 48), format="rgb24")))
    check_refused(song, f"cannot read {song} as a video: it has no video stream")

    hidden = copy_packets(videos["vp8"], tmp_path / "hidden.webm", lambda _, data: hide_frame(data))
    check_refused(hidden, f"{hidden} holds no frame")


def test_load_video_never_opens_a_network_connection_for_a_file():
    """A session description (SDP) names a port to listen on."""
    lines = [
        "v=0",
        "o=- 0 0 IN IP4 127.0.0.1",
        "s=x",
        "c=IN IP4 127.0.0.1",
        "t=0 0",
        "m=video 5004 RTP/AVP 96",
    ]
    described = "\n".join([*lines, "a=rtpmap:96 H264/90000", ""]).encode()
    with pytest.raises(ValueError, match="cannot read the given bytes as a video: it has no video"):
        load_video(described)


def test_load_video_reads_the_frames_of_a_truncated_video(tmp_path, counted):
    """The header comes first, as in videos from the web; the file ends within or before a frame."""
    options = {"movflags": "faststart"}
    whole = encode(tmp_path / "whole.mp4", draw_frames(40, 64, 48), container_options=options)
    with av.open(str(whole)) as container:
        packet = list(container.demux(video=0))[35]
        cut = write(tmp_path / "cut.mp4", whole.read_bytes()[: packet.pos + 9])
        clean_cut = write(tmp_path / "clean.mp4", whole.read_bytes()[: packet.pos])
    expected = decode_all(whole)
    for path in (cut, clean_cut):
        with pytest.warns(UserWarning, match=r"is damaged or cut off: .*; the other 35 frames"):
            sampled = load_video(path, SMALL, nframes=4)
        assert sampled.timestamps == [0, 1.1, 2.3, 3.4]
        assert np.array_equal(sampled.frames, [expected[n] for n in (0, 11, 23, 34)])
    assert all(counts.closed for counts in counted[0])


def test_load_video_refuses_a_video_without_its_header(videos, tmp_path):
    """As in an mp4 that is still being downloaded, whose header would come last."""
    data = videos["30 fps"].read_bytes()
    path = write(tmp_path / "cut.mp4", data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"^cannot read .*cut\.mp4 as a video: "):
        load_video(path)


def zero_packet(path, number):
    """Return the bytes of a video with zeros in place of one packet."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[number]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return data


@pytest.mark.filterwarnings("ignore:.*so all of it is decoded")
def test_load_video_reads_the_frames_around_a_damaged_packet(videos):
    """All frames before it and from the next key frame on are sampled, with their timestamps."""
    path = videos["24 fps, B-frames"]
    expected = decode_all(path)
    with pytest.warns(UserWarning, match="the given bytearray is damaged or cut off") as caught:
        sampled = load_video(zero_packet(path, 24), SMALL, fps=24)
    assert len(caught) == 2
    assert "a part of it cannot be decoded" in str(caught[0].message)
    numbers = np.round(np.multiply(sampled.timestamps, 24)).astype(int).tolist()
    assert numbers == sorted(set(numbers))
    assert set(range(20)) < set(numbers)
    assert set(range(37, 48)) < set(numbers)
    for number, frame in zip(numbers, sampled.frames, strict=True):
        if number < 20 or number > 36:
            assert np.array_equal(frame, expected[number])


# ------------------------------------------------------ directories, lists and arrays of frames ---


def test_load_video_reads_a_directory_in_natural_order(tmp_path, no_warnings):
    for n in (10, 9, 2, 1, 100):
        Image.fromarray(draw(n % 20, 64, 48)).save(tmp_path / f"frame{n}.png")
    for system_file in (".DS_Store", "Thumbs.db", "._frame1.png", "desktop.ini"):
        (tmp_path / system_file).write_bytes(b"no image")
    (tmp_path / "more").mkdir()
    for source in (tmp_path, str(tmp_path), tmp_path.as_uri()):
        sampled = load_video(source, SMALL)
        assert np.array_equal(sampled.frames, [draw(n % 20, 64, 48) for n in (1, 2, 9, 10, 100)])
        assert sampled.timestamps == [0, 0.5, 1.0, 1.5, 2.0]
        assert sampled.size == (64, 48)


def test_load_video_reads_lists_and_arrays(tmp_path, no_warnings):
    frames = draw_frames(9, 64, 48)
    Image.fromarray(frames[0]).save(tmp_path / "0.png")
    mixed = [tmp_path / "0.png", Image.fromarray(frames[1]), *frames[2:]]
    for source in (mixed, tuple(mixed), np.stack(frames)):
        sampled = load_video(source, SMALL, fps=4)
        assert np.array_equal(sampled.frames, frames)
        assert sampled.timestamps == [n / 4 for n in range(9)]
        assert load_video(source, SMALL, nframes=4).timestamps == [0, 1.5, 2.5, 4.0]
        sampled = load_video(source, SMALL, fps=4, video_start=0.5, video_end=1.25)
        assert nearest_indices(sampled) == [2, 3, 4, 5]
        assert len(load_video(source, SMALL, nframes=9).frames) == 9


def test_load_video_reads_what_other_libraries_return_for_a_video(no_warnings):
    """The tensors of `fetch_video`, uint8 or floats of 0…255, and every other spelling of them."""
    frames = np.stack(draw_frames(6, 64, 48))
    frames[0] = frames[0] // 255  # a nearly black frame: its floats alone could be 0…1
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2)  # [F, 3, H, W]
    sources = [
        tensor,
        tensor.contiguous(),
        tensor.float(),
        tensor.float() / 255,
        tensor.double(),
        tensor.float().requires_grad_(),
        tensor.numpy(),
        tensor.float().numpy(),
        frames.astype(np.float64) / 255,
        frames.astype(np.int64),
        list(tensor),
        [Image.fromarray(frame) for frame in frames],
        list(frames),
    ]
    for source in sources:
        assert np.array_equal(load_video(source, SMALL).frames, frames)
        assert load_video(source, SMALL).timestamps == [0, 0.5, 1, 1.5, 2, 2.5]
        assert load_video(source, SMALL, fps=1.0).timestamps == [0, 1, 2, 3, 4, 5]
        assert len(load_video(source, SMALL, nframes=4).frames) == 4


def test_given_frames_rounds_floats_of_levels():
    array = np.full((2, 8, 8, 3), 254.6, np.float32)
    assert (video.given_frames(array) == 255).all()
    assert video.given_frames(array / 255).dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "is_ambiguous"),
    [
        ((4, 3, 20, 3), True),
        ((4, 20, 3, 4), False),  # a thin RGBA frame: axis 1 is no number of channels
        ((3, 4, 48, 64), True),  # RGBA frames, or the colors of four frames
        ((3, 1, 48, 64), True),
        ((3, 6, 48, 64), None),  # [3, frames, height, width]
        ((6, 48, 64, 2), None),
        ((1, 6, 3, 48, 64), None),
        ((6, 48, 64), None),
        ((3, 3, 48, 64), False),
        ((3, 48, 64, 3), False),
    ],
    ids=str,
)
def test_given_frames_refuses_shapes_that_are_no_video_or_two(shape, is_ambiguous):
    array = np.zeros(shape, np.uint8)
    if is_ambiguous is False:
        assert video.given_frames(array) is array
        return
    expected = "expected a video as [frames, height, width, 3] or [frames, 3, height, width], got "
    if is_ambiguous:
        advice = ", where two axes can be the channels: pass a list of Pillow images"
    else:
        advice = ""
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_video(array, SMALL)
    assert str(caught.value) == f"{expected}{list(shape)}{advice}"


def test_load_video_warns_when_a_list_has_fewer_frames_than_requested():
    message = "nframes 20 is more than the 5 frames there are: all are taken"
    with pytest.warns(UserWarning, match=message):
        assert len(load_video(draw_frames(5, 64, 48), SMALL, nframes=20).frames) == 5


def test_load_video_names_a_video_whose_frames_are_too_thin_or_no_multiples():
    thin = np.zeros((2, 5, 1001, 3), np.uint8)
    with pytest.raises(ValueError, match="the given ndarray: one side is more than 200 times"):
        load_video(thin, SMALL)
    with pytest.raises(ValueError, match="the given ndarray: do_resize is off, but 5×1001"):
        load_video(thin, ImageConfig(patch_size=2, do_resize=False))


def test_load_video_refuses_empty_or_uneven_lists(tmp_path):
    def check_refused(source, sentence, **options):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_video(source, SMALL, **options)
        assert str(caught.value) == sentence

    check_refused([], "the given list holds no frame")
    check_refused(tmp_path, f"{tmp_path} holds no frame")
    check_refused(np.zeros((0, 8, 8, 3), np.uint8), "the given ndarray holds no frame")
    expected = "[frames, height, width, 3] or [frames, 3, height, width]"
    array = np.zeros((2, 8, 8), np.uint8)
    check_refused(array, f"expected a video as {expected}, got [2, 8, 8]")
    two = [draw(0, 64, 48), draw(1, 48, 64)]
    check_refused(
        two,
        "the given list: frames must have one size, "
        "but these have 64×48 and 48×64 (width × height)",
    )
    check_refused(
        two[:1], "the given list has no frame from 3 s to the end: it lasts 0.50 s", video_start=3
    )
    write(tmp_path / "notes.txt", b"x")
    with pytest.raises(ValueError, match=r"cannot read .*notes\.txt as an image"):
        load_video(tmp_path, SMALL)


def test_load_video_puts_transparent_frames_on_white(no_warnings):
    sampled = load_video([Image.new("RGBA", (64, 48), (0, 0, 0, 0))] * 2, SMALL)
    assert sampled.frames.min() == 255


@given(names=st.lists(st.integers(0, 10**6), unique=True, min_size=1))
def test_natural_orders_by_number(names):
    paths = [Path(f"shot2_{n}.png") for n in names]
    assert sorted(paths, key=video.natural) == [Path(f"shot2_{n}.png") for n in sorted(names)]


def test_natural_orders_names_with_and_without_numbers():
    names = ["10.png", "a.png", "2.png", "b10", "b9.png", "B1.png"]
    ordered = [path.name for path in sorted(map(Path, names), key=video.natural)]
    assert ordered == ["2.png", "10.png", "a.png", "B1.png", "b9.png", "b10"]
