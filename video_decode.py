"""Video file → when its frames are shown, and the frames that are asked for: everything that calls
a video decoder.

    media ── read_index ──> VideoIndex ── sample_file in video.py ──> frame numbers
    media, frame numbers ── read_frames ──> upright RGB images

A file is read twice. First its packets, without decoding, for the time of every frame and where
decoding can start (key frames). Then what is sampled is decoded: on from the last frame, or from a
later key frame where there is one. Where the packets do not lead to the frames, or one of them is
damaged, all of the file is decoded instead, twice: once to number the frames that do decode, once
for those that are sampled.

Seeking pays: of an hour of 320×180 H.264 with 30 frames per second and a key frame every 250, on
one core, 8 frames take 0.8 s instead of 10 s, and 768 frames two thirds of the time that decoding
all takes. Memory is the same, 85 MB in the process beside the resized frames.

Decoders are foreign code that reads strangers' files: they hang, and nothing in Python can
interrupt them. So they run in a thread of their own, one step at a time, and the calling thread
waits only as long as there is progress.

Dimension names: H, W height and width in pixels.
"""

import io
import itertools
import queue
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Container, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from media import DEFAULT_LIMITS, MediaLimits, check_regular_file, to_rgb
from video_headers import check_sample_counts

STALL_SECONDS = 20.0  # a decoder that has not finished a single packet by then is given up
DEADLINE_SECONDS = 1800.0  # for one pass over a file
POLL_SECONDS = 0.5  # between two checks of the progress; on Windows, Ctrl-C takes effect then
JOIN_SECONDS = 1.0  # how long a thread that is no longer needed may take to close the file
SILENT_LOSS = 0.02  # packets without a frame or an error, from which on a video is called damaged
MAX_REORDERED = 16  # frames that a decoder holds back at most (H.264 and H.265, DPB size)
MAX_PIXEL_ASPECT = 8  # pixels that are more stretched than this are a damaged header

# The containers that are opened (names of FFmpeg's demuxers): files that hold video themselves, not
# playlists, session descriptions and scripts that make FFmpeg open other files or ports. Audio
# files are opened to say so.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,mxf,dv,ivf,rm,nut,wtv,nsv,swf,"
    "roq,flic,yuv4mpegpipe,h261,h263,h264,hevc,vvc,m4v,av1,obu,vc1,mjpeg,mjpeg_2000,cavsvideo,"
    "dirac,png_pipe,jpeg_pipe,bmp_pipe,wav,mp3,flac,aac,w64,amr,ac3,aiff"
)
# FFmpeg's own decoders of VP8 and VP9 drop the alpha channel; these keep it.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


class VideoError(ValueError):
    """A video that cannot be read; the message is one sentence that names it."""


class UnreliableIndex(Exception):
    """The packets of a file do not lead to its frames, for the reason given; decoding all does."""


@dataclass
class VideoIndex:
    """When each frame of a video is shown. Lists are in the order in which frames are shown."""

    pts: list[Any]  # presentation timestamps, integers in ticks; None where a frame has none
    tick: Fraction = Fraction(1)  # seconds
    declared_rate: float | None = None  # frames per second, by the header
    last_duration: float = 0.0  # seconds that the last frame is shown; 0 if unknown
    key_frames: dict[int, int] = field(default_factory=dict)  # pts → the timestamp to seek it by
    damage: str = ""  # what could not be read, if anything
    decode_all: bool = False  # frames are numbered by decoding, not by packet

    @property
    def is_ordered(self) -> bool:
        """Whether the timestamps can be used: all present and strictly ascending."""
        return None not in self.pts and all(a < b for a, b in itertools.pairwise(self.pts))


class Frame(NamedTuple):
    """One frame of a video."""

    image: Image.Image  # RGB and upright, as stored
    display_size: tuple[
        int, int
    ]  # width and height to show it in: another one if pixels are not square


# ------------------------------------------------------------------------------ what video.py calls


def read_index(
    media: str | BinaryIO,
    name: str,
    decode_all: bool = False,
    limits: MediaLimits = DEFAULT_LIMITS,
) -> VideoIndex:
    """Return when each frame of a video is shown, by its packets or (decode_all) by decoding all of
    its frames.

    media: what `open_media` returns; name: what to call it in messages. Raises FileNotFoundError,
    VideoError or TimeoutError with one sentence, and UnreliableIndex where only decode_all can
    help.
    """

    def steps(step: Callable[[], None]) -> Iterator[VideoIndex]:
        if is_webp(media):
            yield webp_index(media, step, name, limits)
            return
        with opened(media, name, limits) as video:
            yield decoded_index(video, step) if decode_all else packet_index(video, step)

    [index] = in_thread(steps, media, name)
    return index


def read_frames(
    media: str | BinaryIO,
    name: str,
    index: VideoIndex,
    wanted: list[int],
    limits: MediaLimits = DEFAULT_LIMITS,
) -> Iterator[Frame]:
    """Yield the frames with the given numbers (ascending), one by one. Raises as `read_index`."""

    def steps(step: Callable[[], None]) -> Iterator[Frame]:
        if is_webp(media):
            yield from webp_frames(media, wanted, step)
            return
        with opened(media, name, limits) as video:
            if index.decode_all:
                frames = numbered_frames(video, wanted, step)
            else:
                frames = sought_frames(video, index, wanted, step)
            for frame in frames:
                yield Frame(to_image(frame), display_size(frame, video.stream))

    return in_thread(steps, media, name)


# --------------------------------------------------------------------- bounds in time, one boundary


class Stopped(Exception):
    """Raised in the decoder's thread when its results are no longer needed."""


class DecoderThread:
    """Runs a generator in a daemon thread, an item at a time and only when it is requested.

    make: called with a function `step`, which the generator calls between any two calls of foreign
    code.
    """

    def __init__(self, make: Callable[[Callable[[], None]], Generator], name: str):
        self.make = make
        self.name = name
        self.steps = 0
        self.is_stopped = False
        self.requests: queue.SimpleQueue = queue.SimpleQueue()
        self.results: queue.SimpleQueue = queue.SimpleQueue()  # (item, None), (None, error) or None
        self.deadline = time.monotonic() + DEADLINE_SECONDS
        self.thread = threading.Thread(target=self.run, name="video decoder", daemon=True)
        self.thread.start()

    def run(self) -> None:
        """Answer each request with one result, in the decoder's thread; None or an error ends."""
        items = self.make(self.step)
        try:
            while self.requests.get():
                item = next(items, None)
                if item is None:
                    break
                self.results.put((item, None))
                del item  # the caller's alone
            items.close()  # closes the file
            self.results.put(None)
        except BaseException as error:  # also a panic of an extension; the calling thread raises it
            self.results.put((None, error))

    def step(self) -> None:
        self.steps += 1
        if self.is_stopped:
            raise Stopped

    def request(self) -> None:
        """Let the thread make the next item."""
        self.requests.put(True)

    def next_result(self) -> tuple[Any, BaseException | None] | None:
        """Return what was requested. Raise TimeoutError when there is too little progress."""
        steps = self.steps
        stalled_at = time.monotonic() + STALL_SECONDS
        while True:
            try:
                return self.results.get(timeout=min(POLL_SECONDS, STALL_SECONDS))
            except queue.Empty:
                now = time.monotonic()
            if self.steps != steps:
                steps = self.steps
                stalled_at = now + STALL_SECONDS
            elif now > stalled_at:
                waited = f"a decoder made no progress for {STALL_SECONDS:g} seconds"
                raise TimeoutError(f"cannot read {self.name} as a video: {waited}")
            if now > self.deadline:
                waited = f"it is not decoded after {DEADLINE_SECONDS:g} seconds"
                raise TimeoutError(f"cannot read {self.name} as a video: {waited}")

    def stop(self) -> None:
        """Let the thread close the file and end, without waiting for a decoder that hangs."""
        self.is_stopped = True
        self.requests.put(False)
        self.thread.join(JOIN_SECONDS)


def in_thread(make: Callable, media: str | BinaryIO, name: str) -> Iterator:
    """Yield what a generator yields in a thread of its own; its errors become one sentence.

    It makes the next item while the caller works on this one; so two exist at a time.
    """
    if isinstance(media, str):
        try:
            check_regular_file(media)
        except (OSError, ValueError) as refusal:
            raise one_sentence(refusal, name) from refusal
    else:
        if isinstance(media, io.TextIOBase) or not media.seekable():
            raise VideoError(
                f"{name} must be opened in binary mode and be seekable to be read as a video"
            )
        media.seek(0)
    decoder = DecoderThread(make, name)
    try:
        decoder.request()
        while (result := decoder.next_result()) is not None:
            item, error = result
            if error is not None:
                raise one_sentence(error, name) from error
            decoder.request()
            yield item
            del item, result  # the caller's alone
    finally:
        decoder.stop()


def one_sentence(error: BaseException, name: str) -> Exception:
    """Return what to raise for an error of a decoder, of Pillow or of a file object."""
    if isinstance(error, VideoError | UnreliableIndex) or type(error) is MemoryError:
        return error  # FFmpeg's own MemoryError is about sizes that a damaged file declares
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"there is no video at {name}")
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # whose message shows the file object
        reason = "it is a damaged WebP image"
    if reason == "Invalid argument":  # FFmpeg knows the format, and it is not one of CONTAINERS
        reason = "it has no video format that is opened here"
    return VideoError(f"cannot read {name} as a video: {reason}")


# ---------------------------------------------------------------------------------- FFmpeg: packets


@dataclass
class OpenVideo:
    """An open file and the decoder of its video stream (PyAV's objects)."""

    container: Any
    stream: Any
    decoder: Any
    packet_count: int = 0  # that should give a frame
    last_pts: int | None = None  # of the last frame that was decoded
    is_progressive: bool = False  # the last frame
    errors: int = 0  # packets that could not be read or decoded
    reason: str = ""  # of the last one

    def packets(self, step: Callable[[], None]) -> Iterator:
        """Yield the packets of the stream from here on. An error of the file ends them."""
        import av

        packets = self.container.demux(self.stream)
        while True:
            step()
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self.count_error(error.strerror or str(error))
                return
            except IndexError:  # PyAV, at the end of a file in which another stream began midway
                return
            if packet is None:
                return
            yield packet

    def frames(self, step: Callable[[], None], wanted: Container[int] | None = None) -> Iterator:
        """Yield the decoded frames from here on; what cannot be decoded is counted and left out.

        wanted: timestamps. Other frames may then be left out, where that spares their decoding.
        """
        codec = self.decoder.codec.canonical_name
        for packet in self.packets(step):
            self.packet_count += is_shown(packet, codec)
            if codec == "h264" and wanted is not None:
                self.skip_unless(packet.pts in wanted or packet.pts is None)
            yield from self.decode(packet)
        # What the decoder holds back, where an error ended the packets.
        yield from self.decode(None)

    def decode(self, packet: Any) -> Iterator:
        """Yield the frames that a packet (None: the end) completes."""
        import av

        try:
            frames = self.decoder.decode(packet)
        except av.EOFError:  # nothing is held back
            return
        except av.FFmpegError as error:
            self.count_error(error.strerror or str(error))
            return
        for frame in frames:
            if frame.is_corrupt:
                self.count_error("a frame that it refers to is missing")
                continue
            if (
                self.errors
                and None not in (frame.pts, self.last_pts)
                and frame.pts <= self.last_pts
            ):
                continue  # after damage, some decoders return frames in the wrong order
            self.last_pts = frame.pts
            self.is_progressive = not frame.interlaced_frame
            yield frame

    def skip_unless(self, is_wanted: bool) -> None:
        """Let the H.264 decoder skip its next frame, unless it is wanted or others refer to it.

        That is about half of the frames of most encoders. Not where frames are interlaced, as a
        packet may then hold one field of a frame; and not in H.265, which also marks those as
        unreferenced that only frames of a higher temporal layer refer to.
        """
        may_skip = self.is_progressive and not is_wanted
        self.decoder.skip_frame = "NONREF" if may_skip else "DEFAULT"

    def count_error(self, reason: str) -> None:
        self.errors += 1
        self.reason = reason


@contextmanager
def opened(
    media: str | BinaryIO, name: str, limits: MediaLimits = DEFAULT_LIMITS
) -> Iterator[OpenVideo]:
    """Open a video file and choose its stream and decoder."""
    import av  # takes a while to import, and images do not need it

    check_header(media)
    # Literally this file, whatever its name looks like; and what it names must not reach into the
    # network.
    place = f"file:{media}" if isinstance(media, str) else media
    max_pixels = str(2 * limits.max_frame_pixels + 2**16)  # decoders count their padding, too
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    options["max_pixels"] = max_pixels  # where FFmpeg decodes a frame to find its format
    arguments: dict[str, Any] = {"options": options, "timeout": STALL_SECONDS}
    if int(av.__version__.partition(".")[0]) < 19:
        # Metadata is not used, so text that is not UTF-8 does not matter. PyAV 19 accepts it.
        arguments["metadata_errors"] = "replace"
    with av.open(place, "r", **arguments) as container:
        stream = best_stream(container, name)
        check_frame_pixels(stream.width, stream.height, name, limits)
        decoder = alpha_decoder(stream) or stream.codec_context
        # Also where the size of the frames themselves is another one than the header's.
        decoder.options = {"max_pixels": max_pixels}
        # Not FRAME (or AUTO): the frame threads of the H.265 decoder wait for each other forever
        # after some damage.
        decoder.thread_type = "SLICE"
        yield OpenVideo(container, stream, decoder)


def check_header(media: str | BinaryIO) -> None:
    """Raise ValueError for a file whose header declares more frames than FFmpeg has memory for."""
    if isinstance(media, str):
        with open(media, "rb") as file:
            check_sample_counts(file)
    else:
        check_sample_counts(media)
        media.seek(0)


def check_frame_pixels(width: int, height: int, name: str, limits: MediaLimits) -> None:
    """Raise VideoError for frames that are larger than the limits allow: a decoder holds up to 17
    of them.
    """
    if width * height > limits.max_frame_pixels:
        raise VideoError(
            f"cannot read {name} as a video: its frames have {width:,}×{height:,} pixels, expected "
            f"at most {limits.max_frame_pixels:,} in all; scale it down first, with a video editor "
            "or FFmpeg"
        )


def best_stream(container: Any, name: str) -> Any:
    """Return the video stream that players show: not the cover of a song, nor a thumbnail."""
    import av

    cover = av.stream.Disposition.attached_pic | av.stream.Disposition.timed_thumbnails
    videos = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not videos:
        raise VideoError(f"cannot read {name} as a video: it has no video stream")
    videos = [stream for stream in videos if stream.codec_context is not None]
    if not videos:
        raise VideoError(
            f"cannot read {name} as a video: this build of FFmpeg has no decoder for it"
        )
    return max(videos, key=importance)  # the first of several


def importance(stream: Any) -> tuple[int, bool]:
    """Return a key by which the video itself comes after previews and other angles."""
    import av

    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return stream.width * stream.height, is_default


def alpha_decoder(stream: Any) -> Any:
    """Return a decoder that keeps the alpha channel where a WebM file declares one; else None."""
    import av

    decoder_name = ALPHA_DECODERS.get(stream.codec_context.codec.canonical_name)
    tags = {key.lower(): value for key, value in stream.metadata.items()}
    if decoder_name is None or tags.get("alpha_mode") != "1":
        return None
    if decoder_name not in av.codecs_available:  # another build of FFmpeg
        return None
    decoder = av.CodecContext.create(decoder_name, "r")
    decoder.extradata = stream.codec_context.extradata
    return decoder


def packet_index(video: OpenVideo, step: Callable[[], None]) -> VideoIndex:
    """Return the times of all frames by the packets, and the key frames.

    FFmpeg finds key frames of mp4 and Matroska by when they are shown, those of other files by when
    they are decoded, which is earlier where a later frame is needed to decode the next ones.
    """
    stream = video.stream
    codec = stream.codec_context.codec.canonical_name
    by_dts = not video.container.format.name.startswith(("mov", "matroska"))
    durations = {}  # of the frames that are shown, by pts
    key_frames = {}
    packet_count = 0
    cut_pts = None  # of the last packet, if the end of the file cuts through it
    for packet in video.packets(step):
        if (
            packet.size == 0
        ):  # the last one, which marks the end, or a frame that repeats the one before
            packet_count += packet.pts is not None
            continue
        if packet.pts is None:
            raise UnreliableIndex("its packets carry no timestamps")
        packet_count += 1
        cut_pts = packet.pts if packet.is_corrupt else None
        if packet.is_keyframe:
            key_frames[packet.pts] = packet.dts if by_dts else packet.pts
        if not is_shown(packet, codec):
            continue
        if packet.pts in durations:
            raise UnreliableIndex("several of its frames carry the same timestamp")
        durations[packet.pts] = packet.duration or 0
    durations.pop(cut_pts, None)

    index = stream_index(stream, sorted(durations), video.reason)
    index.key_frames = dict(sorted(key_frames.items()))
    if durations:
        index.last_duration = float(durations[max(durations)] * index.tick)
    if cut_pts is not None or (not by_dts and packet_count < len(stream.index_entries)):
        index.damage = index.damage or "it ends before the last of its frames"
    return index


def stream_index(stream: Any, pts: list[Any], damage: str) -> VideoIndex:
    """Return a VideoIndex with what the header of a stream declares."""
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    return VideoIndex(pts, stream.time_base or Fraction(0), rate or None, damage=damage)


def is_shown(packet: Any, codec: str) -> bool:
    """Return whether a packet gives a frame that is shown."""
    return packet.size > 0 and not packet.is_discard and not is_hidden(codec, memoryview(packet))


def is_hidden(codec: str, packet: memoryview) -> bool:
    """Return whether a packet of VP8 or VP9 holds only a frame that others refer to and that is
    never shown.

    Source: RFC 6386 §9.1; VP9 bitstream specification 0.6, §6.2 (uncompressed header) and annex B
    (superframes).
    """
    head = packet[0]
    if codec == "vp8":
        return not head >> 4 & 1  # show_frame
    if codec == "vp9" and packet[-1] >> 5 != 0b110:  # else several frames, the last of them shown
        if head >> 4 & 0b11 != 0b11:  # profile 3 has one more bit before these
            head >>= 1
        return not head >> 2 & 1 and not head & 1  # show_existing_frame, show_frame
    return False


# ----------------------------------------------------------------------------------- FFmpeg: frames


def sought_frames(
    video: OpenVideo, index: VideoIndex, wanted: list[int], step: Callable[[], None]
) -> Iterator:
    """Yield the frames with the given numbers, found by their timestamps; skip to key frames on the
    way.

    Raises UnreliableIndex where one is not found, or where anything on the way cannot be decoded.
    """
    pts = index.pts
    key_pts = list(index.key_frames)
    key_numbers = [bisect_left(pts, key) for key in key_pts]
    seek_times = list(index.key_frames.values())
    wanted_pts = {pts[target] for target in wanted}
    decoded = video.frames(step, wanted_pts)
    position = -1  # the number of the last frame that was decoded
    for target in wanted:
        key = bisect_right(key_pts, pts[target]) - 1  # the latest at or before it
        if key >= 0 and key_numbers[key] > position + 1:  # else there is nothing to skip
            seek(video, seek_times[key])
            decoded = video.frames(step, wanted_pts)
            position = -1
        frame = None
        while position < target:
            frame = next(decoded, None)
            if video.errors:
                raise UnreliableIndex(f"a part of it cannot be decoded ({video.reason})")
            if frame is None:
                raise UnreliableIndex("a frame is not where its packet's timestamp places it")
            position = checked_number(frame, pts, position)
        if position != target:
            raise UnreliableIndex("a frame is not where its packet's timestamp places it")
        yield frame


def seek(video: OpenVideo, timestamp: int) -> None:
    """Go to the key frame with a timestamp."""
    import av

    try:
        video.container.seek(timestamp, stream=video.stream)
    except av.FFmpegError as error:
        raise UnreliableIndex("FFmpeg cannot seek in it") from error
    if video.decoder.is_open:
        video.decoder.flush_buffers()
    video.last_pts = None
    video.is_progressive = False


def checked_number(frame: Any, pts: list[int], before: int) -> int:
    """Return the number of a decoded frame, which must come after the number `before`."""
    if frame.pts is not None:
        number = bisect_left(pts, frame.pts)
        if before < number < len(pts) and pts[number] == frame.pts:
            return number
    raise UnreliableIndex("its frames carry other timestamps than its packets")


def decoded_index(video: OpenVideo, step: Callable[[], None]) -> VideoIndex:
    """Return the times of all frames that can be decoded."""
    pts = in_display_order([frame.pts for frame in video.frames(step)])
    missing = max(video.errors, video.packet_count - len(pts))
    damage = ""
    if video.errors or missing > 2 + video.packet_count * SILENT_LOSS:
        damage = f"{missing} of its {video.packet_count} packets give no sound frame"
    index = stream_index(video.stream, pts, damage)
    index.decode_all = True
    return index


def in_display_order(pts: list[int | None]) -> list[int | None]:
    """Return the timestamps of decoded frames, sorted where only neighbors are exchanged.

    AVI stores no presentation times. With B-frames, the decoder returns the frames in the right
    order, but each with the time of another one nearby. Timestamps that begin again, as in files
    that were joined, are left as they are.
    """
    known = [time for time in pts if time is not None]
    if len(set(known)) < len(pts):
        return pts
    order = sorted(range(len(known)), key=lambda number: known[number])
    if any(abs(number - place) > MAX_REORDERED for place, number in enumerate(order)):
        return pts
    return [known[number] for number in order]


def numbered_frames(video: OpenVideo, wanted: list[int], step: Callable[[], None]) -> Iterator:
    """Yield the frames with the given numbers among those that can be decoded."""
    remaining = iter(wanted)
    target = next(remaining, None)
    for number, frame in enumerate(video.frames(step)):
        if target is None:
            return
        if number == target:
            yield frame
            target = next(remaining, None)
    if target is not None:
        raise ValueError(f"frame {target} was decoded the first time, but not the second time")


def to_image(frame: Any) -> Image.Image:
    """Return a decoded frame in RGB, upright, with transparency composited on white.

    The file's display matrix, a b 0, c d 0, x y 1, shows the pixel (x, y) at (ax + cy, bx + dy):
    rotated by multiples of 90°, perhaps mirrored. Source: ISO/IEC 14496-12, §8.3.2, and FFmpeg's
    `libavutil/display.h`.
    """
    if any(component.is_alpha for component in frame.format.components):
        pixels = np.asarray(to_rgb(Image.fromarray(frame.to_ndarray(format="rgba"))))
    else:
        pixels = frame.to_ndarray(format="rgb24")  # [H, W, 3]
    a, b, c, d = display_matrix(frame)
    if abs(b) > abs(a):
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return Image.fromarray(np.ascontiguousarray(pixels))


def display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """Return a, b, c, d of the display matrix; the identity if there is none."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(matrix, dtype=np.int32)[:5].tolist()
    return a, b, c, d


def display_size(frame: Any, stream: Any) -> tuple[int, int]:
    """Return the width and height to show a frame in, upright: the width is scaled by the pixels'
    aspect ratio.

    qwen-vl-utils and its readers take pixels as square, so that people in a DVD are too thin.
    """
    width = frame.width
    aspect = stream.sample_aspect_ratio or 1
    if 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        width = max(1, round(width * aspect))
    a, b, _, _ = display_matrix(frame)
    if abs(b) > abs(a):
        return frame.height, width
    return width, frame.height


# ---------------------------------------------------------------- Pillow: WebP, which FFmpeg cannot


def is_webp(media: str | BinaryIO) -> bool:
    """Return whether a file is a WebP image; FFmpeg has no decoder for animated ones."""
    if isinstance(media, str):
        with open(media, "rb") as file:
            head = file.read(12)
    else:
        head = media.read(12)
        media.seek(0)
    return head[:4] == b"RIFF" and head[8:] == b"WEBP"


def webp_index(
    media: str | BinaryIO, step: Callable[[], None], name: str, limits: MediaLimits
) -> VideoIndex:
    """Return the times of all frames of an animated WebP image, by its own durations."""
    durations = []  # milliseconds
    damage = ""
    with Image.open(media, formats=["WEBP"]) as image:
        check_frame_pixels(image.width, image.height, name, limits)
        count = getattr(image, "n_frames", 1)
        for number in range(count):
            step()
            try:
                image.seek(number)
                image.load()
            except (OSError, EOFError, ValueError, SyntaxError) as error:
                damage = f"{count - number} of its {count} frames cannot be decoded ({error})"
                break
            durations.append(max(1, int(image.info.get("duration") or 100)))
    pts = list(itertools.accumulate(durations[:-1], initial=0)) if durations else []
    last_duration = durations[-1] / 1000 if durations else 0.0
    return VideoIndex(pts, Fraction(1, 1000), last_duration=last_duration, damage=damage)


def webp_frames(
    media: str | BinaryIO, wanted: list[int], step: Callable[[], None]
) -> Iterator[Frame]:
    """Yield the frames of an animated WebP image with the given numbers."""
    with Image.open(media, formats=["WEBP"]) as image:
        for number in wanted:
            step()
            image.seek(number)
            rgb = to_rgb(image)
            yield Frame(rgb, rgb.size)
