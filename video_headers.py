"""How many samples (frames, pieces of sound) the header of an MP4 or QuickTime file declares.

FFmpeg makes an index entry of 24 bytes for each before it reads any of them. Two kinds of box
declare any number in a few bytes, and an edit list repeats them: a file of 1.5 kB took 1.5 GB.
Source: ISO/IEC 14496-12, §8.7.3 (`stsz`), §8.8.8 (`trun`) and §8.6.6 (`elst`).
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

FEWEST_REFUSED = 2**22  # index entries: 100 MB
MOST_REPEATED = 2**24  # samples × edits, not all of which are repeated
MAX_HEADER_BYTES = 2**28  # of one box; that of an hour of video has about one megabyte
MAX_BOXES = 2**20  # at the top level; a fragmented file has two for each second or so
BOX_NAME = re.compile(rb"[a-z]{4}")  # of the first box of a file; in other formats it is no word
EDIT_COUNT = re.compile(rb"elst.{4}(.{4})", re.DOTALL)
SAMPLE_COUNTS = re.compile(rb"stsz.{4}(.{4})(.{4})|trun.{4}(.{4})", re.DOTALL)
# A time-to-sample box with one entry whose samples last one tick each, as of uncompressed sound.
ONE_TICK_EACH = re.compile(rb"stts.{4}\x00\x00\x00\x01.{4}\x00\x00\x00\x01", re.DOTALL)


def check_sample_counts(file: BinaryIO) -> None:
    """Raise ValueError for an MP4 or QuickTime file that declares more samples than it has bytes.

    Few samples are always fine, so that a file that is cut off can be read.
    """
    file.seek(0, 2)
    size = file.tell()
    total = 0
    for header in header_boxes(file, size):
        total += declared_samples(header)
        if total > max(size, FEWEST_REFUSED):
            raise ValueError(f"its header declares {total:,} samples, but it has {size:,} bytes")


def header_boxes(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the content of each box at the top level, except for `mdat`, the frames themselves.

    Yields nothing for a file of another format.
    """
    position = 0
    for _ in range(MAX_BOXES):
        file.seek(position)
        start = file.read(16)
        if len(start) < 8:
            return
        length, kind = struct.unpack_from(">I4s", start)
        if position == 0 and not BOX_NAME.fullmatch(kind):
            return
        if length == 1 and len(start) == 16:  # of 64 bits
            (length,) = struct.unpack_from(">Q", start, 8)
        if length == 0:  # to the end of the file
            length = size - position
        if length < 8:
            return
        if kind != b"mdat":
            file.seek(position)
            yield with_inflated(file.read(min(length, MAX_HEADER_BYTES)))
        position += length


def with_inflated(header: bytes) -> bytes:
    """Return the content of a box, and of the compressed one in it if it has one (QuickTime File
    Format, `cmvd`).
    """
    place = header.find(b"cmvd")
    if place < 0:
        return header
    try:
        return header + zlib.decompressobj().decompress(header[place + 8 :], MAX_HEADER_BYTES)
    except zlib.error:  # FFmpeg cannot read it either
        return header


def declared_samples(header: bytes) -> int:
    """Return how many samples a box declares in all of its tracks without a size for each, or by
    repeating them.

    Boxes are recognized by their names wherever they are, as by FFmpeg. Uncompressed sound does not
    count: FFmpeg makes its index by larger pieces.
    """
    total = 0
    for track in header.split(b"trak"):
        is_sound = b"soun" in track and ONE_TICK_EACH.search(track) is not None
        samples = 0
        for sample_size, count, fragment_count in SAMPLE_COUNTS.findall(track):
            samples = max(samples, integer(count))
            if fragment_count:
                total += integer(fragment_count)
            elif integer(sample_size) > 0 and not is_sound:
                total += integer(count)
        edits = sum(integer(count) for count in EDIT_COUNT.findall(track))
        if edits > 1 and edits * samples > MOST_REPEATED:
            total += edits * samples
    return total


def integer(data: bytes) -> int:
    """Return an unsigned integer in the byte order of these files; 0 for no bytes."""
    return int.from_bytes(data, "big")
