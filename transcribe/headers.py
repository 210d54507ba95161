"""What the bytes of a file say before anything is decoded: kinds, WAV chunks, MP3, Ogg, FLAC marks.

Pure but for reading from the file it is handed; knows no decoder.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

HEAD_BYTES = 65_536
TAIL_BYTES = 2 * 65_307  # two of the largest Ogg pages

KNOWN_MAGIC = re.compile(
    rb"RIFF|RIFX|RF64|riff|FORM|\.snd|caff|fLaC|OggS|NIST_1A|ID3|#!AMR|\x1aE\xdf\xa3|....ftyp"
    rb"|....moov|0&\xb2u|\x0bw|FLV|wvpk|MAC |Creative",
    re.DOTALL,
)

# --- telling files that are not audio apart ---------------------------------------------------

_OTHER_KINDS = (
    (re.compile(rb"%PDF"), "a PDF document"),
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a ZIP archive or office document"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8"), "a picture"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "an HTML or XML page"),
)


def other_kind(head: bytes) -> str | None:
    """What a file that is surely no audio is, in words, by its first bytes."""
    for pattern, kind in _OTHER_KINDS:
        if pattern.match(head):
            return kind
    return "a text file" if not KNOWN_MAGIC.match(head) and _is_text(head[:1024]) else None


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    # The blank: a silent A-law file is nothing but the letter U.
    has_blank = any(char.isspace() for char in text)
    return has_blank and all(char.isprintable() or char.isspace() for char in text)


# --- headers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WavHeader:
    """What the header says, and what lies behind the sound that it tells.

    Attributes:
        data_bytes: 0 when a recorder left the size open, None when no data chunk was seen.
        is_empty: there is no sound and no room for any.
        is_stale: sound goes on behind `data_bytes`: the recorder never wrote the last size.
        other_file_at: where another WAV file begins behind this one.
    """

    sample_rate: int
    n_channels: int
    bytes_per_s: int
    data_offset: int
    data_bytes: int | None
    is_empty: bool = False
    is_stale: bool = False
    other_file_at: int | None = None


# Encoders often write a wrong byte rate; the block size is what decoders go by.
_WAV_TAGS_PCM = (1, 3, 6, 7, 0xFFFE)
_WAV_TAGS_IN_BLOCKS = (2, 0x11, 0x31)  # MS ADPCM, IMA ADPCM, GSM


def is_unknown_size(n: int) -> bool:
    """Sizes that streaming recorders write because they cannot know: 0, 2 or 4 GiB, or nearly."""
    return n == 0 or 0x7FFF0000 <= n <= 0x80010000 or n >= 0xFFFF0000


def wav_header(file: BinaryIO) -> WavHeader | None:
    """The fmt and data chunks of a WAV file or of its head; None if it has no fmt chunk."""
    start = _read_at(file, 0, 12)
    if start[:4] not in (b"RIFF", b"RIFX", b"RF64") or start[8:12] != b"WAVE":
        return None
    order = ">" if start[:4] == b"RIFX" else "<"
    at, fmt, size_64 = 12, None, 0
    for _ in range(1000):
        chunk = _read_at(file, at, 28)
        if len(chunk) < 8:
            break
        name, (size,) = chunk[:4], struct.unpack_from(order + "I", chunk, 4)
        body = at + 8
        if name == b"ds64" and len(chunk) >= 24:
            (size_64,) = struct.unpack_from("<Q", chunk, 16)
        elif name == b"fmt " and size >= 16 and len(chunk) >= 24:
            fmt = struct.unpack_from(order + "HHIIHHHH", chunk[8:].ljust(20, b"\0"))
        elif name == b"data" and fmt:
            claimed = size_64 or (0 if is_unknown_size(size) else size)
            header = _wav_of(fmt, body, claimed)
            if not claimed:
                return replace(header, is_empty=size == 0 and _behind(file, body, order) is None)
            return _looked_behind(header, file, order)
        at = body + size + size % 2
    return _wav_of(fmt, min(at, 1 << 32), None) if fmt else None


def _looked_behind(header: WavHeader, file: BinaryIO, order: str) -> WavHeader:
    """Say what lies behind the sound, if that is more than chunks and filling."""
    assert header.data_bytes is not None
    end = header.data_offset + header.data_bytes
    # Some writers leave the odd byte out, which stands between a chunk and the next.
    behind = [_behind(file, at, order) for at in sorted({end, end + header.data_bytes % 2})]
    if None in behind:
        return header
    other = next((at for at in behind if at), None)
    if other:
        return replace(header, other_file_at=other)
    return replace(header, is_stale=True)


def _read_at(file: BinaryIO, at: int, n: int) -> bytes:
    file.seek(at)
    return file.read(n)


def _wav_of(fmt: tuple[int, ...], offset: int, claimed: int | None) -> WavHeader:
    tag, n_channels, sample_rate, bytes_per_s, block_bytes, _, _, samples_per_block = fmt
    if tag in _WAV_TAGS_IN_BLOCKS and samples_per_block:
        bytes_per_s = sample_rate * block_bytes // samples_per_block
    elif tag in _WAV_TAGS_PCM or not bytes_per_s:
        bytes_per_s = sample_rate * block_bytes
    return WavHeader(sample_rate, n_channels, bytes_per_s, offset, claimed)


_FEW_BYTES = 64  # behind the last chunk: less than anybody can hear
_TAGS = (b"ID3", b"TAG", b"APETAGEX")  # put behind a file by programs that know MP3 only
_OFTEN_LAST = (b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"_PMX", b"cue ", b"JUNK", b"junk")


def _behind(file: BinaryIO, at: int, order: str) -> int | None:
    """What lies between `at` and the end of a WAV file.

    Returns:
        None: nothing but chunks, tags and zeros; 0: something else, so it may be sound; else where
        another WAV file begins.
    """
    size_bytes = file.seek(0, 2)
    for _ in range(1000):
        if size_bytes - at < _FEW_BYTES:
            return None
        chunk = _read_at(file, at, 12)
        if chunk[:4] in (b"RIFF", b"RIFX", b"RF64") and chunk[8:] == b"WAVE":
            return at
        after = at + 8 + struct.unpack_from(order + "I", chunk, 4)[0]
        is_chunk = re.match(rb"[A-Za-z0-9 _]{4}", chunk) is not None
        # Quiet A-law reads like the name of a chunk, whose size then leads far beyond the end.
        if not is_chunk or (after > size_bytes and chunk[:4] not in _OFTEN_LAST):
            return None if chunk.startswith(_TAGS) or _is_zeros(file, at) else 0
        at = after + after % 2
    return 0


def _is_zeros(file: BinaryIO, at: int) -> bool:
    file.seek(at)
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            return False
    return True


def flac_seconds(file: BinaryIO) -> list[float | None]:
    """Seconds of each FLAC stream in a file, as their headers tell (RFC 9639, section 8.2).

    More than one where files were put behind each other.
    """
    found: list[float | None] = []
    kept, start = b"", 0
    while block := _read_at(file, start + len(kept), 1 << 20):
        text = kept + block
        for match in re.finditer(rb"fLaC[\x00\x80]\x00\x00\x22", text):
            head = text[match.start() + 8 : match.start() + 8 + 18]
            if len(head) == 18:  # else the next turn sees it whole
                (packed,) = struct.unpack_from(">Q", head, 10)
                rate, samples = packed >> 44, packed & ((1 << 36) - 1)
                found.append(samples / rate if rate and samples else None)
        kept = text[-25:]
        start += len(text) - len(kept)
    return found


def mp3_seconds(head: bytes) -> float | None:
    """Duration by the Xing/Info/VBRI header of the first MP3 frame, None without one."""
    at = 0
    if head[:3] == b"ID3" and len(head) >= 10:
        at = 10 + sum(
            (byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True)
        )
    frame = head[at : at + 256]
    found = re.search(rb"(Xing|Info)\x00\x00\x00[\x01\x03\x05\x07\x09\x0b\x0d\x0f]|VBRI", frame)
    if not re.match(rb"\xff[\xe2-\xff]", frame) or found is None:
        return None
    version, rate_index = frame[1] >> 3 & 3, frame[2] >> 2 & 3
    if rate_index == 3 or version == 1:
        return None
    sample_rate = (44100, 48000, 32000)[rate_index] >> {3: 0, 2: 1, 0: 2}[version]
    (n_frames,) = struct.unpack_from(
        ">I", frame, found.start() + (14 if found[0] == b"VBRI" else 8)
    )
    return float(n_frames * (1152 if version == 3 else 576) / sample_rate)


def ogg_seconds(file: BinaryIO) -> list[float | None]:
    """Seconds of each link of a chained Ogg file (RFC 3533, section 4), None where unknown.

    Streams that begin together are one link: they are to be played together.
    """
    links: list[float | None] = []
    rate, skipped, is_beginning = 0, 0, False
    for page in ogg_pages(file):
        if page.begins:
            if not is_beginning:
                links.append(None)
                rate, skipped = ogg_clock(page.body)
        elif rate and page.granule > skipped:
            links[-1] = (page.granule - skipped) / rate
        is_beginning = page.begins
    return links


@dataclass(frozen=True, slots=True)
class OggPage:
    """What is looked at of a page (RFC 3533, section 6).

    Attributes:
        begins: a stream does, with this page.
        granule: position of its last sample, in a unit of its codec's; -1 for none.
        body: the first bytes behind its header.
        end: byte behind it, where the next page begins.
    """

    begins: bool
    granule: int
    body: bytes
    end: int


def ogg_pages(file: BinaryIO) -> Iterator[OggPage]:
    """The pages of an Ogg file or of its head, up to where something else follows one."""
    at = 0
    while True:
        page = _read_at(file, at, 27 + 255 + 64)
        if len(page) < 27 or page[:4] != b"OggS":
            return
        body = 27 + page[26]
        at += body + sum(page[27:body])
        (granule,) = struct.unpack_from("<q", page, 6)
        yield OggPage(bool(page[5] & 2), granule, page[body:], at)


def ogg_clock(packet: bytes) -> tuple[int, int]:
    """Granules a second of a stream that begins so, and how many come before its sound.

    Opus and Vorbis only; 0 for others.
    """
    if packet[:8] == b"OpusHead" and len(packet) >= 12:
        return 48_000, struct.unpack_from("<H", packet, 10)[0]
    if packet[:7] == b"\x01vorbis" and len(packet) >= 16:
        return struct.unpack_from("<I", packet, 12)[0], 0
    return 0, 0


def ogg_is_whole(tail: bytes) -> bool:
    """Whether the last Ogg page is complete (RFC 3533, section 6), by the last `TAIL_BYTES`.

    Its end-of-stream flag is no help: browsers leave it out of complete recordings.
    """
    at = tail.rfind(b"OggS")
    if at < 0 or at + 27 > len(tail):
        return False
    n_segments = tail[at + 26]
    table = tail[at + 27 : at + 27 + n_segments]
    return len(table) == n_segments and at + 27 + n_segments + sum(table) <= len(tail)
