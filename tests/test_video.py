"""video.py and video_decode.py: golden values of qwen-vl-utils, and decoding of whole videos."""

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
from clips import draw, encode, film
from hypothesis import given
from hypothesis import strategies as st
from make_golden_video import FILMS, GOLDEN, ITEMS, summary, write_films
from PIL import Image

import video
import video_decode
from preprocess import Clip, ImageConfig, frame_size, load_video

GOLDEN_RECORDS = json.loads(GOLDEN.read_text(encoding="utf-8"))
SMALL = ImageConfig(patch_size=2)  # tokens of 4×4 pixels: a frame of 64×48 stays as it is


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return write_films(tmp_path_factory.mktemp("films"))


@pytest.fixture(scope="module")
def long_film(tmp_path_factory):
    """200 frames, 10 a second, a key frame every 20, with B-frames in between."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    options = {"g": "20", "bf": "2", "sc_threshold": "0"}
    return encode(path, film(200, 64, 48), codec="libx264", options=options)


@pytest.fixture
def quiet():
    """No warning passes unnoticed."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def all_frames(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def shown_frames(clip: Clip) -> list[int]:
    """Which of the first 50 frames of `draw` the frames of a clip are nearest to."""
    _, height, width, _ = clip.frames.shape
    drawn = np.stack(film(50, width, height)).astype(int)
    return [int(np.abs(drawn - frame).mean(axis=(1, 2, 3)).argmin()) for frame in clip.frames]


# --- beside the helper ---


@pytest.mark.parametrize("name", FILMS)
@pytest.mark.filterwarnings("ignore")
def test_films_equal_the_helpers(films, name):
    """Which frames and what size: equal. Values: at most 1 level apart (measured: 1), as Pillow's
    resize rounds between its two passes and torch's does not; 3 where that cuts off what a hard
    edge overshoots (the GIF).

    x264 does not write the same bytes every time, so its values are not those of the golden film;
    that its frames are those of plain decoding is another test's."""
    records = [record for record in GOLDEN_RECORDS["films"] if record["film"] == name]
    assert len(records) >= 3
    rate = float(FILMS[name][4]["rate"])
    for record in records:
        clip = load_video(films[name], ImageConfig(), **record["options"])
        found = summary(clip.frames)
        seconds = np.divide(record["indices"], rate)
        assert np.allclose(clip.timestamps, seconds, atol=1e-3), (
            record
        )  # Matroska counts in milliseconds
        assert found["size"] == record["size"], record
        if FILMS[name][4].get("codec") != "libx264":
            assert np.abs(np.subtract(found["values"], record["values"])).max() <= (
                3 if name == "gif" else 1
            ), record
            assert np.abs(np.subtract(found["means"], record["means"])).max() <= 0.1, record


def test_golden_holds_every_film():
    records = GOLDEN_RECORDS["films"]
    assert {record["film"] for record in records} == set(FILMS)
    assert len(records) > 0.9 * len(ITEMS)  # the rest is what the helper refuses


@pytest.mark.parametrize("record", GOLDEN_RECORDS["lists"], ids=lambda record: str(record["list"]))
def test_lists_equal_the_helpers(record):
    """The same sizes and nearly the same values, where the helper's first resize (to multiples of
    56) does nothing; elsewhere a list has the size of a film."""
    n, width, height = record["list"]
    frames = film(n, width, height)
    clip = load_video(
        [Image.fromarray(frame) for frame in frames], ImageConfig(), **record["options"]
    )
    found = summary(
        np.concatenate([clip.frames, clip.frames[-1:]]) if n % 2 else clip.frames
    )  # the helper pads
    if width % 56 or height % 56:
        assert tuple(found["size"]) == frame_size(
            height, width, n, ImageConfig(), **record["options"]
        )
    else:
        assert found["size"] == record["size"]
        assert np.abs(np.subtract(found["values"], record["values"])).max() <= 1


def test_counts_equal_the_helpers():
    for total, rate, options, n in GOLDEN_RECORDS["counts"]:
        assert video.count_frames(total, rate, **options) == n, (total, rate, options)


def test_frame_numbers_equal_the_helpers():
    """Films of thousands of frames, where the last bit of float32 decides."""
    for first, last, indices in GOLDEN_RECORDS["spread"]:
        assert video.spread(first, last, len(indices)) == indices


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="rounds product and sum one by one"
)
@given(first=st.integers(0, 10**5), more=st.integers(0, 10**5), n=st.integers(1, 800))
def test_frame_numbers_equal_torch(first, more, n):
    expected = torch.linspace(first, first + more, n).round().long().tolist()
    assert video.spread(first, first + more, n) == expected


def test_resize_is_near_torchs():
    """Every value of some frames; measured: at most 1 level, in 5 % of the values."""
    frames = np.stack(film(4, 300, 200))
    clip = load_video(frames, ImageConfig())
    values = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    values = torch.nn.functional.interpolate(
        values, clip.frames.shape[1:3], mode="bicubic", antialias=True
    )
    difference = values.clamp(0, 255).round().permute(0, 2, 3, 1).numpy() - clip.frames
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.1


# --- how many frames, which, how large ---


@given(
    total=st.integers(1, 3000),
    rate=st.floats(1, 120),
    factor=st.integers(1, 4),
    fps=st.none() | st.floats(0.01, 100),
    limits=st.tuples(st.integers(4, 1000), st.integers(4, 1000)),
)
def test_count_is_a_multiple_within_its_limits(total, rate, factor, fps, limits):
    n = video.count_frames(
        total, rate, factor, fps=fps, min_frames=min(limits), max_frames=max(limits)
    )
    assert n == total < factor or (n % factor == 0 and factor <= n <= total)
    assert n <= max(limits)
    assert n >= min(*limits, total) - factor


def test_count_refuses_what_means_nothing():
    with pytest.raises(
        ValueError, match=r"fps 1 and nframes 4 exclude each other: give one of them"
    ):
        video.count_frames(10, 5.0, fps=1, nframes=4)
    with pytest.raises(ValueError, match=r"nframes 1 comes to 0 frames, but at least 2 are needed"):
        video.count_frames(10, 5.0, nframes=1)
    with pytest.raises(
        ValueError,
        match=r"fps 2.0 within 4 to 0 frames comes to 0 frames, but at least 2 are needed",
    ):
        video.count_frames(10, 5.0, max_frames=1)


def test_shorter_than_asked(films):
    with pytest.warns(
        UserWarning, match="nframes 20 is more than the 7 frames there are: 6 are taken"
    ) as caught:
        clip = load_video(films["lossless"], SMALL, nframes=20)
    assert len(caught) == 1
    assert clip.timestamps == [
        0,
        0.25,
        0.5,
        1.0,
        1.25,
        1.5,
    ]  # of 0, 1.2, 2.4, 3.6 … the nearest frames


def test_one_frame(tmp_path, quiet):
    clip = load_video(encode(tmp_path / "one.mp4", film(1, 64, 48)), SMALL)
    assert clip.frames.shape == (1, 48, 64, 3)
    assert clip.timestamps == [0.0]


def test_three_frames_a_token(films, quiet):
    clip = load_video(films["30 fps"], ImageConfig(patch_size=2, temporal_patch_size=3), fps=3)
    assert len(clip.frames) == 6  # 2.5 s at 3 fps is 7.5


def test_range(films, quiet):
    """10 frames a second, timed in milliseconds."""

    def seconds(start, end):
        clip = load_video(
            films["vp9"], SMALL, fps=10, video_start=start, video_end=end, min_frames=0
        )
        return np.round(np.multiply(clip.timestamps, 10), 6).tolist()

    assert seconds(0.5, 0.8) == [5, 6, 7, 8]
    assert seconds(0.41, 0.89) == [5, 6, 7, 8]
    assert seconds(-3, 0.1) == [0, 1]
    assert seconds(2.85, 77) == [29, 30]
    assert seconds(0.48, 0.52) == [5]  # the helper refuses a single frame
    clip = load_video(films["vp8"], SMALL, fps=12, video_start=1 / 12, video_end=2 / 12)
    assert clip.timestamps == [
        0.083,
        0.167,
    ]  # in the file rounded to milliseconds, downwards and upwards


@given(
    rate=st.integers(1, 120), pair=st.tuples(st.integers(0, 999), st.integers(0, 999)).map(sorted)
)
def test_range_at_exact_frames_holds_both_ends(rate, pair):
    """Where float noise makes the helper miss one: ceil(0.07 * 100) is 8, and 3 * 0.1 is more than 0.3."""
    times = [index / rate for index in range(1000)]
    first, last = pair
    if first < last:
        assert video.frames_between(times, first * (1 / rate), last * (1 / rate), "x", rate) == (
            first,
            last,
        )


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [(5, None, "from 5 s to the end"), (None, -1, "from 0 s to -1 s"), (2, 1, "from 2 s to 1 s"),
     (1, 1, "from 1 s to 1 s"), (0.51, 0.59, "from 0.51 s to 0.59 s")],
)  # fmt: skip
def test_range_without_a_frame(films, start, end, span):
    with pytest.raises(ValueError, match=rf"f\.webm has no frame {span}: it lasts 3\.10 s$"):
        load_video(films["vp9"], SMALL, video_start=start, video_end=end)


def test_sizes_refused():
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


def test_a_small_budget_leaves_a_little_room():
    """However small, the budget leaves 1.05 times the least: 132 tokens of 28×28 stay."""
    assert frame_size(308, 336, 4, ImageConfig(), total_pixels=1000) == (308, 336)
    assert frame_size(336, 336, 4, ImageConfig(), total_pixels=1000) == (308, 308)


def test_long_films_share_a_budget():
    """768 frames, 2 to a token: 90316800 pixels in all leave each 300 tokens."""
    assert frame_size(2000, 2000, 768, ImageConfig()) == (17 * 28, 17 * 28)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "2"])
@pytest.mark.parametrize(
    "option", ["fps", "nframes", "max_frames", "min_pixels", "total_pixels", "resized_width"]
)
def test_options_must_be_positive_numbers(option, value):
    with pytest.raises(ValueError, match=rf"{option} is {value!r}, expected a positive number"):
        load_video(film(2, 8, 8), SMALL, **{option: value})


def test_do_resize_off(films):
    off = ImageConfig(do_resize=False)
    with pytest.raises(
        ValueError, match=r"do_resize is off, but 48×64 \(height × width\) is no multiple of 28"
    ):
        load_video(films["30 fps"], off)
    frames = np.stack(film(4, 56, 28))
    assert np.array_equal(load_video(frames, off).frames, frames)


# --- decoding ---


class Watched:
    """An open video that counts the frames it decodes and its seeks."""

    def __init__(self, opened):
        self.opened, self.decoded, self.seeks, self.closed = opened, 0, 0, False


@pytest.fixture
def watched(monkeypatch):
    """A list of all videos that are opened, and one of all frames that are converted."""
    videos, converted = [], []
    opening, converting = video_decode.opened, video_decode.to_image
    decoding, seeking = video_decode.OpenVideo.decode, video_decode.seek

    @contextmanager
    def opened(*arguments):
        with opening(*arguments) as opened_video:
            videos.append(Watched(opened_video))
            yield opened_video
        videos[-1].closed = True

    def decode(opened_video, packet):
        for frame in decoding(opened_video, packet):
            videos[-1].decoded += 1
            yield frame

    def seek(*arguments):
        videos[-1].seeks += 1
        seeking(*arguments)

    def to_image(frame):
        converted.append(frame.pts)
        return converting(frame)

    monkeypatch.setattr(video_decode, "opened", opened)
    monkeypatch.setattr(video_decode.OpenVideo, "decode", decode)
    monkeypatch.setattr(video_decode, "seek", seek)
    monkeypatch.setattr(video_decode, "to_image", to_image)
    return videos, converted


def test_only_what_is_sampled_is_decoded_and_converted(long_film, watched, quiet):
    containers, converted = watched
    clip = load_video(long_film, SMALL, nframes=4, video_start=3, video_end=16.2)
    assert clip.timestamps == [3.0, 7.4, 11.8, 16.2]
    packets, frames = containers
    assert packets.decoded == 0
    assert frames.seeks == 4  # to 2, 6, 10 and 16 s
    assert frames.decoded == 11 + 15 + 19 + 3  # on from there
    assert len(converted) == 4


def test_neighbours_are_decoded_without_seeking(long_film, watched, quiet):
    containers, converted = watched
    load_video(long_film, SMALL, fps=10, video_end=9.9)
    assert (containers[1].seeks, containers[1].decoded, len(converted)) == (0, 100, 100)


WAYS = [
    ("mp4", "libx264", {"g": "12", "bf": "3"}),
    ("mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    ("mp4", "libx264", {"g": "1"}),
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


@pytest.mark.parametrize(("kind", "codec", "options"), WAYS)
def test_frames_reached_by_seeking_equal_those_of_plain_decoding(
    tmp_path, quiet, kind, codec, options
):
    """To the bit: any frames, in any container."""
    pixels = "rgb8" if codec == "gif" else "yuv420p"
    path = encode(tmp_path / f"x.{kind}", film(41, 64, 48), codec, 25, pixels, options)
    expected, draw_numbers = all_frames(path), random.Random(0)
    index = video_decode.read_index(str(path), "x")
    assert not index.damage
    assert len(index.pts) == len(expected) == 41
    assert len(index.key_frames) > 1 or kind == "gif"
    for _ in range(20):
        wanted = sorted(draw_numbers.sample(range(41), draw_numbers.choice([1, 2, 5])))
        frames = video_decode.read_frames(str(path), "x", index, wanted)
        for frame, number in zip(frames, wanted, strict=True):
            assert np.array_equal(frame.image, expected[number]), wanted


@pytest.mark.parametrize(
    ("kind", "codec", "options", "reason"),
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
def test_films_whose_times_lead_nowhere_are_counted(tmp_path, kind, codec, options, reason):
    path = encode(tmp_path / f"x.{kind}", film(60, 64, 48), codec, 25, options=options)
    said = f"x.{kind}: {reason}, so all of it is decoded, twice, to count its frames"
    with pytest.warns(UserWarning, match=said) as caught:
        clip = load_video(path, SMALL, nframes=4, video_start=1)
    assert len(caught) == 1
    expected = all_frames(path)
    assert np.array_equal(clip.frames, [expected[n] for n in (25, 36, 48, 59)])
    assert clip.timestamps == [1.0, 1.44, 1.92, 2.36]


def test_several_frames_of_one_time_are_counted(tmp_path):
    whole = encode(tmp_path / "whole.mkv", film(12, 64, 48))
    path = rewritten(whole, tmp_path / "x.mkv", times=lambda pts: pts // 200 * 200)
    with pytest.warns(
        UserWarning,
        match=r"x\.mkv: several of its frames carry the same timestamp, so all of it is decoded",
    ):
        clip = load_video(path, SMALL, nframes=12)
    assert np.array_equal(clip.frames, all_frames(whole))


def test_films_that_cannot_be_sought_are_counted(long_film, watched, monkeypatch):
    def seek(*arguments, **more):
        raise video_decode.UnreliableIndex("FFmpeg cannot seek in it")

    monkeypatch.setattr(video_decode, "seek", seek)
    with pytest.warns(
        UserWarning, match=r"long\.mp4: FFmpeg cannot seek in it, so all of it is decoded, twice"
    ):
        clip = load_video(long_film, SMALL, nframes=4, video_start=5)
    assert clip.timestamps == pytest.approx([5, 10, 14.9, 19.9])


def test_memory_does_not_grow_with_the_film(tmp_path, quiet):
    """Of pixels, memory holds the resized frames and two more, however many frames there are."""
    peaks = []
    for n in (20, 200):
        path = encode(tmp_path / f"{n}.mp4", [draw(i, 256, 192) for i in range(n)])
        tracemalloc.start()
        clip = load_video(path, SMALL, nframes=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        frame = 256 * 192 * 3
        assert peaks[-1] < clip.frames.nbytes + 3 * frame
    assert peaks[1] - peaks[0] < frame


def test_pictures_are_let_go_one_by_one(films, monkeypatch, quiet):
    """Pillow's memory is not tracemalloc's: here the pictures that are alive are counted."""
    seen, most = [], []

    def watch(function):
        def watching(source):
            picture = function(source)
            seen.append(weakref.ref(picture))
            most.append(sum(reference() is not None for reference in seen))
            return picture

        return watching

    monkeypatch.setattr(video_decode, "to_image", watch(video_decode.to_image))
    monkeypatch.setattr(video, "load_image", watch(video.load_image))
    for source in (films["vp9"], film(10, 64, 48)):
        most.clear()
        load_video(source, SMALL, nframes=10)
        assert len(most) == 10
        assert max(most) <= 2


def test_variable_rate(tmp_path, quiet):
    """True times count, both for the timestamps and for the range; how many are taken comes from the mean rate."""
    milliseconds = [0, 10, 500, 520, 530, 2000, 2500, 2510]
    path = encode(tmp_path / "x.mp4", film(8, 64, 48), times=milliseconds, tick=Fraction(1, 1000))
    clip = load_video(path, SMALL, fps=100)
    assert np.allclose(clip.timestamps, np.divide(milliseconds, 1000))
    clip = load_video(path, SMALL, fps=100, video_start=0.5, video_end=2)
    assert np.allclose(clip.timestamps, [0.5, 0.52, 0.53, 2.0])
    assert shown_frames(clip) == [2, 3, 4, 5]


def test_time_begins_with_the_first_frame(tmp_path, quiet):
    path = encode(
        tmp_path / "x.mkv", film(6, 64, 48), times=[n + 7 for n in range(6)], tick=Fraction(1, 10)
    )
    assert load_video(path, SMALL, fps=10).timestamps == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_every_source_gives_the_same_clip(films, quiet):
    path = films["24 fps, B-frames"]
    expected = load_video(str(path), SMALL)
    assert expected.size == (96, 64)
    assert shown_frames(expected) == [round(t * 24) for t in expected.timestamps]
    file = io.BytesIO(path.read_bytes())
    file.seek(100)  # it is read from its beginning
    with path.open("rb") as opened:
        for source in (path, path.as_uri(), path.read_bytes(), file, opened):
            clip = load_video(source, SMALL)
            assert np.array_equal(clip.frames, expected.frames)
            assert clip[1:] == expected[1:]
        assert not opened.closed


def test_strange_names_are_paths(films, tmp_path, quiet, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:0", "concat:a|b", "frame%03d.mp4", "http:x.mp4", "ü 100%.mp4"):
        (tmp_path / name).write_bytes(films["30 fps"].read_bytes())
        assert len(load_video(name, SMALL).frames) == 4


# --- upright, colours ---

MATRICES = {  # a b c d of the display matrix: what FFmpeg's own filters do to get upright
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


def filtered(frame, filters):
    """What FFmpeg's filters make of a frame."""
    graph = av.filter.Graph()
    nodes = [graph.add_buffer(template=frame[1])]
    for part in ["format=rgb24", *filters.split(",")]:
        nodes.append(graph.add(*part.split("=")))
    nodes.append(graph.add("buffersink"))
    graph.link_nodes(*nodes).configure()
    graph.push(frame[0])
    return graph.pull().to_ndarray(format="rgb24")


@pytest.mark.parametrize(("matrix", "filters"), MATRICES.items(), ids=str)
def test_films_are_turned_upright(tmp_path, quiet, matrix, filters):
    path = encode(tmp_path / "x.mp4", film(3, 64, 48))
    set_matrix(path, *matrix)
    clip = load_video(path, SMALL)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        turned = matrix[0] == 0
        assert frame.rotation == {(0, 1, -1, 0): -90, (0, -1, 1, 0): 90}.get(matrix, frame.rotation)
        expected = filtered((frame, container.streams.video[0]), filters)
    assert clip.size == ((48, 64) if turned else (64, 48))
    assert np.array_equal(clip.frames[0], expected)


def test_a_phones_portrait_film_is_upright(tmp_path, quiet):
    """Matrix 0 1 -1 0 shows the film turned clockwise by a quarter: what was left is up, so the
    bright quarter of `draw`, up and left, comes to be up and right."""
    path = encode(tmp_path / "x.mp4", film(2, 64, 48))
    set_matrix(path, 0, 1, -1, 0)
    green = load_video(path, SMALL).frames[0, ..., 1]
    assert green.shape == (64, 48)
    assert green[:28, 28:].min() > 180 > green[36:].max()
    assert green[:, :20].max() < 180


@pytest.mark.parametrize("name", ["24 fps, B-frames", "vp9", "gif"])
def test_colours_are_those_of_rgb24(films, name, quiet):
    """As torchvision's `read_video` converts them."""
    clip, frames = load_video(films[name], SMALL, nframes=6), all_frames(films[name])
    assert clip.frames.shape[1:] == frames[0].shape
    assert np.array_equal(
        clip.frames, [frames[round(t * float(FILMS[name][4]["rate"]))] for t in clip.timestamps]
    )


# --- what does not count as a frame ---


def rewritten(path, target, change=lambda _, data: data, times=lambda pts: pts):
    """Copy a film packet by packet; `change(number, bytes)` gives new contents, `times(pts)` new times."""
    with av.open(str(path)) as source, av.open(str(target), "w") as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for number, packet in enumerate(source.demux(stream)):
            if packet.size:
                new = av.Packet(change(number, bytes(packet)))
                new.pts, new.dts, new.time_base = (
                    times(packet.pts),
                    times(packet.dts),
                    packet.time_base,
                )
                new.is_keyframe, new.stream = packet.is_keyframe, copy
                out.mux(new)
    return target


def test_hidden_frames_do_not_count(films, tmp_path, quiet):
    """VP8 with the flag "show this" taken from two packets, as in those that only serve as references."""
    hide = lambda number, data: bytes([data[0] & ~16]) + data[1:] if number in (3, 11) else data  # noqa: E731
    path = rewritten(films["vp8"], tmp_path / "hidden.webm", hide)
    expected = all_frames(path)
    assert len(expected) == 18
    clip = load_video(path, SMALL, fps=12)
    assert np.array_equal(clip.frames, expected)
    assert 3 not in np.round(np.multiply(clip.timestamps, 12)).tolist()


def test_hidden_frames_of_vp9():
    """Profile 0 and 3; shown, hidden, shown again; and a superframe, which ends in a byte 110xxxxx."""
    for head, hidden in (
        ("10000010", 0),
        ("10000000", 1),
        ("10001000", 0),
        ("10110001", 0),
        ("10110000", 1),
        ("10110100", 0),
    ):
        assert video_decode.is_hidden("vp9", bytes([int(head, 2), 0])) == bool(hidden)
    assert not video_decode.is_hidden("vp9", bytes([0b10000000, 0b11000001]))
    assert not video_decode.is_hidden("h264", bytes([0, 0]))


def test_frames_cut_off_by_an_edit_list_do_not_count(tmp_path, quiet):
    """Stream-copying from the middle of a group keeps its packets from the key frame on, and hides them."""
    path = encode(
        tmp_path / "x.mp4", film(30, 64, 48), options={"g": "30", "sc_threshold": "1000000000"}
    )
    whole, data = all_frames(path), bytearray(path.read_bytes())
    start = data.index(b"elst") + 4
    assert struct.unpack_from(">II", data, start) == (
        0,
        1,
    )  # version, one entry: duration, start, rate
    struct.pack_into(
        ">ii", data, start + 8, 2000, 1024 * 10
    )  # 2 s from frame 10 on; there are 10240 ticks a second
    path.write_bytes(data)
    clip = load_video(path, SMALL, fps=10)
    assert np.array_equal(clip.frames, whole[10:])
    assert clip.timestamps == pytest.approx([n / 10 for n in range(20)])


# --- what is no film ---


def write(path, content):
    path.write_bytes(content)
    return path


def test_sources_that_are_no_films(tmp_path, films):
    def refused(source, sentence, error=ValueError):
        with pytest.raises(error) as caught:
            load_video(source, SMALL)
        assert str(caught.value) == sentence

    refused(tmp_path / "no.mp4", f"there is no video at {tmp_path}/no.mp4", FileNotFoundError)
    refused(
        b"no film" * 99,
        "cannot read the given bytes as a video: Invalid data found when processing input",
    )
    empty = write(tmp_path / "empty.mp4", b"")
    refused(empty, f"cannot read {empty} as a video: Invalid data found when processing input")
    text = write(tmp_path / "notes.txt", b"one\ntwo\n" * 99)
    no_format = "it has no video format that is opened here"
    refused(text, f"cannot read {text} as a video: {no_format}")  # FFmpeg would play it
    refused(
        io.StringIO("x"),
        "the given StringIO must be opened in binary mode and be seekable to be read as a video",
    )
    refused(5, "expected a path, a URL, bytes or an open file, got int")

    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    refused(sound, f"cannot read {sound} as a video: it has no video stream")

    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(draw(0, 64, 48), format="rgb24")))
    refused(song, f"cannot read {song} as a video: it has no video stream")

    nothing = rewritten(
        films["vp8"], tmp_path / "nothing.webm", lambda _, data: bytes([data[0] & ~16]) + data[1:]
    )
    refused(nothing, f"{nothing} holds no frame")


def test_a_file_does_not_reach_into_the_network():
    """A session description names a port to listen at."""
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


def test_a_video_that_is_cut_off_gives_what_there_is(tmp_path, watched):
    """The header comes first, as in videos from the web; the file ends within, or before, a frame."""
    options = {"movflags": "faststart"}
    whole = encode(tmp_path / "whole.mp4", film(40, 64, 48), container_options=options)
    with av.open(str(whole)) as container:
        packet = list(container.demux(video=0))[35]
        cut = write(tmp_path / "cut.mp4", whole.read_bytes()[: packet.pos + 9])
        clean_cut = write(tmp_path / "clean.mp4", whole.read_bytes()[: packet.pos])
    expected = all_frames(whole)
    for path in (cut, clean_cut):
        with pytest.warns(UserWarning, match=r"is damaged or cut off: .*; the other 35 frames"):
            clip = load_video(path, SMALL, nframes=4)
        assert clip.timestamps == [0, 1.1, 2.3, 3.4]
        assert np.array_equal(clip.frames, [expected[n] for n in (0, 11, 23, 34)])
    assert all(opened.closed for opened in watched[0])


def test_a_video_without_its_header_is_one_sentence(films, tmp_path):
    """An mp4 that is still being downloaded, whose header would come last."""
    data = films["30 fps"].read_bytes()
    path = write(tmp_path / "cut.mp4", data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"^cannot read .*cut\.mp4 as a video: "):
        load_video(path)


def with_hole(path, number):
    """The bytes of a video with zeros in place of one packet."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = list(container.demux(video=0))[number]
    data[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    return data


@pytest.mark.filterwarnings("ignore:.*so all of it is decoded")
def test_a_video_with_a_hole_gives_the_frames_that_decode(films):
    """All frames before the hole and after the next key frame are there, each with its own time."""
    path = films["24 fps, B-frames"]
    expected = all_frames(path)
    with pytest.warns(UserWarning, match="the given bytearray is damaged or cut off") as caught:
        clip = load_video(with_hole(path, 24), SMALL, fps=24)
    assert len(caught) == 2
    assert "a part of it cannot be decoded" in str(caught[0].message)
    numbers = np.round(np.multiply(clip.timestamps, 24)).astype(int).tolist()
    assert numbers == sorted(set(numbers))
    assert set(range(20)) < set(numbers)
    assert set(range(37, 48)) < set(numbers)
    for number, frame in zip(numbers, clip.frames, strict=True):
        if number < 20 or number > 36:
            assert np.array_equal(frame, expected[number])


# --- frames one by one ---


def test_folder_in_natural_order(tmp_path, quiet):
    for n in (10, 9, 2, 1, 100):
        Image.fromarray(draw(n % 20, 64, 48)).save(tmp_path / f"frame{n}.png")
    for litter in (".DS_Store", "Thumbs.db", "._frame1.png", "desktop.ini"):
        (tmp_path / litter).write_bytes(b"litter")
    (tmp_path / "more").mkdir()
    for source in (tmp_path, str(tmp_path), tmp_path.as_uri()):
        clip = load_video(source, SMALL)
        assert np.array_equal(clip.frames, [draw(n % 20, 64, 48) for n in (1, 2, 9, 10, 100)])
        assert clip.timestamps == [0, 0.5, 1.0, 1.5, 2.0]
        assert clip.size == (64, 48)


def test_lists_and_arrays(tmp_path, quiet):
    frames = film(9, 64, 48)
    Image.fromarray(frames[0]).save(tmp_path / "0.png")
    mixed = [tmp_path / "0.png", Image.fromarray(frames[1]), *frames[2:]]
    for source in (mixed, tuple(mixed), np.stack(frames)):
        clip = load_video(source, SMALL, fps=4)
        assert np.array_equal(clip.frames, frames)
        assert clip.timestamps == [n / 4 for n in range(9)]
        assert load_video(source, SMALL, nframes=4).timestamps == [0, 1.5, 2.5, 4.0]
        assert shown_frames(load_video(source, SMALL, fps=4, video_start=0.5, video_end=1.25)) == [
            2,
            3,
            4,
            5,
        ]
        assert len(load_video(source, SMALL, nframes=9).frames) == 9


def test_more_of_a_list_than_there_is():
    with pytest.warns(
        UserWarning, match="nframes 20 is more than the 5 frames there are: all are taken"
    ):
        assert len(load_video(film(5, 64, 48), SMALL, nframes=20).frames) == 5


def test_lists_refused(tmp_path):
    def refused(source, sentence, **options):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_video(source, SMALL, **options)
        assert str(caught.value) == sentence

    refused([], "the given list holds no frame")
    refused(tmp_path, f"{tmp_path} holds no frame")
    refused(np.zeros((0, 8, 8, 3), np.uint8), "the given ndarray holds no frame")
    expected = "[frames, height, width, 3] or [frames, 3, height, width]"
    array = np.zeros((2, 8, 8), np.uint8)
    refused(array, f"expected a video as {expected}, got [2, 8, 8]")
    two = [draw(0, 64, 48), draw(1, 48, 64)]
    refused(
        two,
        "the given list: frames must have one size, but these have 64×48 and 48×64 (width × height)",
    )
    refused(
        two[:1], "the given list has no frame from 3 s to the end: it lasts 0.50 s", video_start=3
    )
    write(tmp_path / "notes.txt", b"x")
    with pytest.raises(ValueError, match=r"cannot read .*notes\.txt as an image"):
        load_video(tmp_path, SMALL)


def test_lists_may_be_transparent(quiet):
    """White behind, as in pictures."""
    clip = load_video([Image.new("RGBA", (64, 48), (0, 0, 0, 0))] * 2, SMALL)
    assert clip.frames.min() == 255


@given(names=st.lists(st.integers(0, 10**6), unique=True, min_size=1))
def test_natural_order_is_that_of_numbers(names):
    paths = [Path(f"shot2_{n}.png") for n in names]
    assert sorted(paths, key=video.natural) == [Path(f"shot2_{n}.png") for n in sorted(names)]


def test_names_without_numbers_sort_beside_those_with():
    names = ["10.png", "a.png", "2.png", "b10", "b9.png", "B1.png"]
    ordered = [path.name for path in sorted(map(Path, names), key=video.natural)]
    assert ordered == ["2.png", "10.png", "a.png", "B1.png", "b9.png", "b10"]
