"""What the bytes of a file say before anything is decoded: kinds, WAV chunks, MP3 and Ogg marks.

Pure but for reading from the file it is handed; knows no decoder.
"""

from __future__ import annotations

import codecs
import re
import struct
from dataclasses import dataclass
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
    """`data_bytes` is 0 when a recorder left the size open, None when no data chunk was seen."""

    sample_rate: int
    n_channels: int
    bytes_per_s: int
    data_offset: int
    data_bytes: int | None
    is_empty: bool = False


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
            empty = size == 0 and _chunks_fill(file, body, order)
            return _wav_of(fmt, body, claimed, empty)
        at = body + size + size % 2
    return _wav_of(fmt, min(at, 1 << 32), None, False) if fmt else None


def _read_at(file: BinaryIO, at: int, n: int) -> bytes:
    file.seek(at)
    return file.read(n)


def _wav_of(fmt: tuple[int, ...], offset: int, claimed: int | None, empty: bool) -> WavHeader:
    tag, n_channels, sample_rate, bytes_per_s, block_bytes, _, _, samples_per_block = fmt
    if tag in _WAV_TAGS_IN_BLOCKS and samples_per_block:
        bytes_per_s = sample_rate * block_bytes // samples_per_block
    elif tag in _WAV_TAGS_PCM or not bytes_per_s:
        bytes_per_s = sample_rate * block_bytes
    return WavHeader(sample_rate, n_channels, bytes_per_s, offset, claimed, empty)


def _chunks_fill(file: BinaryIO, at: int, order: str) -> bool:
    """Whether only well-formed chunks lie between `at` and the end: then there is no sound."""
    size_bytes = file.seek(0, 2)
    for _ in range(1000):
        if at >= size_bytes:
            return True
        chunk = _read_at(file, at, 8)
        if len(chunk) < 8 or not re.match(rb"[A-Za-z0-9 _]{4}", chunk):
            return False
        at += 8 + struct.unpack_from(order + "I", chunk, 4)[0]
        at += at % 2
    return False


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
