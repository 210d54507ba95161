"""How long a recording is, told from its first bytes: for planning, never to be relied upon."""

from __future__ import annotations

import io
import struct

from transcribe.decode import FOREIGN, headerless_format, open_container
from transcribe.errors import BadAudio
from transcribe.headerless import Headerless
from transcribe.headers import mp3_seconds, ogg_clock, ogg_pages, other_kind, wav_header


def probe_seconds(
    head: bytes, size_bytes: int, name: str, headerless: Headerless | None = None
) -> float | None:
    """Duration in seconds told from the first bytes of a file, or None; never raises.

    Args:
        head: the first `HEAD_BYTES` of the file, or fewer.
        size_bytes: size of the whole file.
        name: its path or uri, for headerless formats.
        headerless: as for `decode`.

    Exact for WAV, FLAC, AIFF, M4A with its index in front, MP3 with a Xing header; estimated
    from the bit rate for the rest.
    """
    try:
        seconds = _probe(head, size_bytes, name, headerless)
    except (*FOREIGN, BadAudio, struct.error):
        return None
    # A header that tells more than a second a byte is lying.
    return seconds if seconds is not None and 0 < seconds < size_bytes else None


class _Head(io.RawIOBase):
    """A file of which only the first bytes are known: reads past them end, its size is true."""

    def __init__(self, head: bytes, size_bytes: int) -> None:
        self._bytes, self._size, self._at = head, size_bytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = len(self._bytes) if size < 0 else self._at + size
        part = self._bytes[self._at : end]
        self._at += len(part)
        return part


def _probe(head: bytes, size_bytes: int, name: str, headerless: Headerless | None) -> float | None:
    raw = headerless_format(head, name, headerless)
    if raw is not None:
        return size_bytes / raw[2]
    wav = wav_header(io.BytesIO(head))
    if wav is not None:
        there = size_bytes - wav.data_offset
        n_bytes = min(there, wav.data_bytes) if wav.data_bytes else there
        return n_bytes / wav.bytes_per_s
    if head[:4] == b"OggS":
        return _ogg_seconds(head, size_bytes)
    exact = mp3_seconds(head)
    if exact is not None or other_kind(head):
        return exact
    with open_container(_Head(head, size_bytes), None) as container:
        return container.duration / 1_000_000 if container.duration else None


def _ogg_seconds(head: bytes, size_bytes: int) -> float | None:
    """Seconds at the last page seen, stretched to the size of the file."""
    starts = [head.find(name, 0, 256) for name in (b"OpusHead", b"\x01vorbis")]
    rate = next((ogg_clock(head[at:])[0] for at in starts if at >= 0), 0)
    if not rate:
        return None
    seconds, seen = None, 1
    for page in ogg_pages(io.BytesIO(head)):
        if page.granule > 0 and page.end <= len(head):
            seconds, seen = page.granule / rate, page.end
    return None if seconds is None else seconds * size_bytes / seen
