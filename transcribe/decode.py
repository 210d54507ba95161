"""Bytes of one audio object -> a stream of 16 kHz int16 samples.

Owns: libsndfile and FFmpeg (through soundfile and PyAV), which of the two is believed, and turning
whatever those libraries raise into `BadAudio`. libsndfile reads what it reads fastest (WAV with
G.711, GSM or ADPCM inside, FLAC, Ogg, AIFF, AU, SPHERE); FFmpeg reads the rest, and MP3, because
libsndfile's MP3 decoder writes to stderr when a file is damaged.

Must not know: storage, speech detection, engines, Ray. Content decides the format; the name is
looked at only for headerless telephone audio (`.gsm`, `.ulaw`, `.g722` ...), which nothing else
can tell; what `.raw` and `.pcm` hold not even that tells, but `--headerless`.

Sound is decoded, resampled and rounded in blocks. What is allocated follows from samples that were
really decoded, never from a header, and stays below a bound: what is longer than an hour (of all
channels together) is decoded twice, first to know all about it, then to hand it out.
"""

from __future__ import annotations

import io
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import av
import numpy as np
import numpy.typing as npt
import soundfile as sf
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.container import InputContainer

from transcribe.channels import Likeness
from transcribe.errors import BadAudio
from transcribe.headerless import EXTENSIONS, Headerless
from transcribe.headers import (
    HEAD_BYTES,
    KNOWN_MAGIC,
    TAIL_BYTES,
    WavHeader,
    flac_seconds,
    is_unknown_size,
    mp3_seconds,
    ogg_is_whole,
    ogg_seconds,
    other_kind,
    wav_header,
)
from transcribe.isolation import alive
from transcribe.resampling import SAMPLE_RATE as SAMPLE_RATE
from transcribe.resampling import Floats, Resampler

MIN_SOURCE_HZ, MAX_SOURCE_HZ = 1_000, 768_000
MAX_CHANNELS = 32
# Hours of all channels together. A file of a few MB can unfold to months of silence; no codec
# says speech in less than 25 bytes a second.
MAX_CHANNEL_HOURS = 240
MAX_CHANNEL_HOURS_OF_ANY_SIZE = 48
LEAST_BYTES_PER_CHANNEL_SECOND = 25

HELD_VALUES = 3600 * SAMPLE_RATE  # samples times channels, kept from the first decoding: 115 MB

Int16s = npt.NDArray[np.int16]


@dataclass(slots=True)
class Stopwatch:
    """Seconds that add up."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add what is done inside."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class Audio:
    """One recording, after it was decoded from end to end.

    Attributes:
        container: lower-case name, the same whichever library decoded it (`wav`, `mp4`, `mkv`).
        codec: FFmpeg's codec name (`pcm_mulaw`, `gsm_ms`, `opus`); `g722` for G.722.
        sample_rate: of the source, Hz.
        n_channels: 1 to 32.
        n_samples: of each channel at 16 kHz.
        likeness: what the channels have in common.
        problem: kind `truncated` when only part could be decoded.
        blocks: gives the samples, from the start with each call: int16 [n_channels, n] in C
            order, some 2 million values at a time. It decodes again what is too long to be
            kept, and raises `BadAudio` if the file has changed since.
        resampling: how much of the time so far was spent on resampling and rounding.
    """

    container: str
    codec: str
    sample_rate: int
    n_channels: int
    n_samples: int
    likeness: Likeness
    problem: BadAudio | None
    blocks: Callable[[], Iterator[Int16s]]
    resampling: Stopwatch

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.n_samples / SAMPLE_RATE

    @property
    def samples(self) -> Int16s:
        """All samples at once, [n_channels, n_samples]: for short recordings."""
        return np.concatenate(list(self.blocks()), axis=1)


@dataclass(frozen=True, slots=True)
class _Source:
    """An opened file. `blocks` yields float32 [n_channels, n]; it raises `_Damaged` to stop."""

    container: str
    codec: str
    sample_rate: int
    n_channels: int
    claimed_s: float | None
    blocks: Iterator[Floats]


class _Damaged(Exception):
    """A decoder met data it cannot use, after it may have given good blocks."""


# What soundfile, PyAV and their C libraries raise on hostile bytes.
FOREIGN = (
    sf.SoundFileError,
    av.error.FFmpegError,
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    TypeError,
    MemoryError,
    OSError,
)


def decode(content: bytes | Path, name: str, headerless: Headerless | None = None) -> Audio:
    """Decode one audio object from end to end; of several sound tracks the first, and it is said.

    Args:
        content: the whole object, or the local file that holds it.
        name: its path or uri; only the extension is used, and only for headerless formats.
        headerless: what files hold that have no header and an extension such as `.raw`.

    Raises:
        BadAudio: kind is one of
            `empty_file` no bytes; `not_audio` not a format known here; `no_audio_stream` a
            video or picture without sound; `corrupt` a known format, nothing decodable;
            `no_samples` well-formed but zero seconds; `bad_sample_rate` outside 1 to 768 kHz;
            `too_many_channels` more than 32; `too_long` more than 240 channel-hours, or more
            than 48 in fewer than 25 bytes a second.
    """
    file = _File.of(content)
    if not file.size_bytes:
        raise BadAudio("empty_file", "The file is empty (0 bytes).")
    wav = wav_header(file.open())
    if wav is not None:
        _check_shape(wav.sample_rate, wav.n_channels)
        if wav.is_empty:
            raise _no_samples()
        if wav.is_stale:
            file, wav = file.with_open_size(wav), replace(wav, data_bytes=0)
    parts = _parts(file)
    first = None
    # FFmpeg reads a WAV whose recorder never filled in the size; libsndfile finds 0 samples.
    if _MAGIC_OF_SOUNDFILE.match(file.head) and not (wav and wav.data_bytes == 0):
        first = _read(partial(_open_soundfile, file, wav), file)
        if first is not None and first.damage is None and len(parts) < 2:
            return _finish(first, file, wav, parts)
    try:
        raw = headerless_format(file.head, name, headerless)
        second = _read(partial(_open_av, file, raw), file)
    except BadAudio:
        if first is None or not first.n_samples:
            raise
        second = None
    readings = [r for r in (first, second) if r is not None]
    best = max(readings, key=lambda r: (r.n_samples, r.damage is None))
    return _finish(best, file, wav, parts)


def _parts(file: _File) -> list[float | None]:
    """Seconds of files that were put behind each other, as their headers tell, where that works.

    libsndfile reads the first only; FFmpeg goes on as long as the shape of the sound is the same.
    """
    if file.head[:4] == b"OggS":
        return ogg_seconds(file.open())
    return flac_seconds(file.open()) if file.head[:4] == b"fLaC" else []


# --- an object's bytes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    """The bytes of an object, in memory or on disk: opened anew for each reading."""

    content: bytes | Path
    size_bytes: int
    head: bytes
    tail: bytes
    patches: tuple[tuple[int, bytes], ...] = ()  # other bytes at some places, on disk

    @classmethod
    def of(cls, content: bytes | Path) -> _File:
        if isinstance(content, bytes):
            return cls(content, len(content), content[:HEAD_BYTES], content[-TAIL_BYTES:])
        with _Disk(content) as file:
            head = file.read(HEAD_BYTES)
            size_bytes = file.seek(0, 2)
            file.seek(max(0, size_bytes - TAIL_BYTES))
            return cls(content, size_bytes, head, file.read(TAIL_BYTES))

    def with_open_size(self, wav: WavHeader) -> _File:
        """The same, a WAV, whose header does not tell how much sound there is."""
        patches = [(wav.data_offset - 4, b"\xff" * 4)]
        if self.head[:4] == b"RF64":
            patches.append((28, struct.pack("<Q", self.size_bytes - wav.data_offset)))
        if isinstance(self.content, Path):
            return replace(self, patches=tuple(patches))
        patched = bytearray(self.content)
        for at, new in patches:
            patched[at : at + len(new)] = new
        return _File.of(bytes(patched))

    def open(self) -> BinaryIO:
        if isinstance(self.content, bytes):
            return _Bytes(self.content)
        return _Disk(self.content, self.patches)


# libsndfile may seek before the start of a damaged file; soundfile would print the error.
class _Bytes(io.BytesIO):
    def seek(self, offset: int, whence: int = 0, /) -> int:
        return super().seek(max(0, offset) if whence == 0 else offset, whence)


class _Disk(io.BufferedReader):
    def __init__(self, path: Path, patches: Sequence[tuple[int, bytes]] = ()) -> None:
        super().__init__(_Patched(path, patches), 1 << 16)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence == 1:
            offset, whence = self.tell() + offset, 0
        return super().seek(max(0, offset) if whence == 0 else offset, whence)


class _Patched(io.FileIO):
    """A file with other bytes at some places."""

    def __init__(self, path: Path, patches: Sequence[tuple[int, bytes]]) -> None:
        super().__init__(path)
        self._patches = patches

    def readinto(self, buffer: Any, /) -> int:
        at = self.tell()
        n = super().readinto(buffer) or 0
        for start, new in self._patches:
            first, last = max(start, at), min(start + len(new), at + n)
            if first < last:
                memoryview(buffer)[first - at : last - at] = new[first - start : last - start]
        return n


# --- reading a source in blocks -------------------------------------------------------------

_BLOCK_VALUES = 1 << 21  # samples times channels resampled at once: 8 MB of float32


@dataclass(frozen=True, slots=True)
class _Reading:
    """What came out of one decoder.

    Attributes:
        held: None where that was too much to keep.
        damage: None if all went well, else in words why sound is missing, or empty.
    """

    reopen: Callable[[], _Source | None]
    source: _Source
    held: list[Int16s] | None
    n_samples: int
    likeness: Likeness
    damage: str | None
    resampling: Stopwatch

    def blocks(self) -> Iterator[Int16s]:
        """The samples once more."""
        if self.held is not None:
            yield from self.held
            return
        source = self.reopen()
        n_samples = 0
        try:
            for block in _samples(source, self.resampling) if source is not None else ():
                n_samples += block.shape[1]
                if n_samples > self.n_samples:
                    break
                yield block
        except _Damaged:
            pass
        if n_samples != self.n_samples:
            raise BadAudio("corrupt", "The file changed while it was being read.")


def _read(reopen: Callable[[], _Source | None], file: _File) -> _Reading | None:
    """Decode everything a source gives."""
    source = reopen()
    if source is None:
        return None
    _check_shape(source.sample_rate, source.n_channels)
    held: list[Int16s] | None = []
    n_samples, resampling = 0, Stopwatch()
    damage: str | None = None
    likeness = Likeness(source.n_channels)
    limit_s = _longest_s(file.size_bytes, source.n_channels)
    try:
        for block in _samples(source, resampling):
            n_samples += block.shape[1]
            if n_samples > limit_s * SAMPLE_RATE:
                raise BadAudio(
                    "too_long",
                    f"The recording is longer than {limit_s / 3600:.0f} hours; split it first.",
                )
            likeness.push(block.astype(np.float32))
            if n_samples * source.n_channels > HELD_VALUES:
                held = None
            if held is not None:
                held.append(block)
    except _Damaged as error:
        damage = str(error)
    likeness.finish()
    return _Reading(reopen, source, held, n_samples, likeness, damage, resampling)


def _longest_s(size_bytes: int, n_channels: int) -> float:
    """Seconds after which a recording is no recording."""
    likely_s = size_bytes / LEAST_BYTES_PER_CHANNEL_SECOND
    most_s = max(MAX_CHANNEL_HOURS_OF_ANY_SIZE * 3600, min(likely_s, MAX_CHANNEL_HOURS * 3600))
    return most_s / n_channels


def _samples(source: _Source, resampling: Stopwatch) -> Iterator[Int16s]:
    """All that a source gives, as 16 kHz int16 [n_channels, n]; `_Damaged` comes after the last."""
    resampler = Resampler(source.sample_rate)
    damage: _Damaged | None = None
    n = _BLOCK_VALUES // source.n_channels
    if source.sample_rate < SAMPLE_RATE // 4:  # what comes out would be many times longer
        n = n * 4 * source.sample_rate // SAMPLE_RATE
    try:
        for block in _rechunk(source.blocks, max(1, n)):
            alive()
            with resampling.running():
                ready = _to_int16(resampler.push(_clean(block)))
            if ready.shape[1]:
                yield ready
    except _Damaged as error:
        damage = error
    if resampler.started:
        with resampling.running():
            rest = _to_int16(resampler.finish())
        if rest.shape[1]:
            yield rest
    if damage is not None:
        raise damage


def _rechunk(blocks: Iterator[Floats], n: int) -> Iterator[Floats]:
    """Join small blocks until each has at least n samples; hands out the rest before an error."""
    waiting: list[Floats] = []
    n_waiting = 0
    damage: _Damaged | None = None
    try:
        for block in blocks:
            waiting.append(block)
            n_waiting += block.shape[1]
            if n_waiting >= n:
                yield np.concatenate(waiting, axis=1)
                waiting, n_waiting = [], 0
    except _Damaged as error:
        damage = error
    if n_waiting:
        yield np.concatenate(waiting, axis=1)
    if damage is not None:
        raise damage


def _clean(block: Floats) -> Floats:
    """Unusable samples become silence and the rest is clipped, so none can spread to others."""
    return np.clip(np.nan_to_num(block, nan=0.0, posinf=0.0, neginf=0.0), -1.0, 1.0)


def _to_int16(block: Floats) -> Int16s:
    rounded: Int16s = np.clip(np.rint(block * 32768.0), -32768, 32767).astype(np.int16)
    return np.ascontiguousarray(rounded)


def _finish(
    reading: _Reading, file: _File, wav: WavHeader | None, parts: Sequence[float | None]
) -> Audio:
    """Say what was found, and what is missing."""
    source, n_samples = reading.source, reading.n_samples
    if n_samples == 0:
        raise _corrupt() if reading.damage is not None else _no_samples()
    if len(parts) > 1:
        told = [seconds for seconds in parts if seconds is not None]
        source = replace(source, claimed_s=sum(told) if told else None)
    return Audio(
        container=source.container,
        codec=source.codec,
        sample_rate=source.sample_rate,
        n_channels=source.n_channels,
        n_samples=n_samples,
        likeness=reading.likeness,
        problem=_problem(source, n_samples / SAMPLE_RATE, reading.damage, file, wav),
        blocks=reading.blocks,
        resampling=reading.resampling,
    )


def _problem(
    source: _Source, got_s: float, damage: str | None, file: _File, wav: WavHeader | None
) -> BadAudio | None:
    if damage:
        return BadAudio("truncated", damage)
    if wav is not None and wav.other_file_at:
        n_bytes = file.size_bytes - wav.other_file_at
        return BadAudio(
            "truncated",
            f"Another WAV file begins behind the first, at byte {wav.other_file_at}: its"
            f" {n_bytes} bytes were not read. Split the file there.",
        )
    claimed_s = source.claimed_s
    # Encoder padding and rounding of header times stay below this.
    tolerance_s = 0.25 if source.container not in ("wav", "flac", "aiff", "au", "sph") else 0.01
    if claimed_s is not None and claimed_s - got_s > max(tolerance_s, 0.001 * claimed_s):
        return BadAudio(
            "truncated",
            f"The file is cut short or damaged: {got_s:.3f} s of the {claimed_s:.3f} s its header "
            f"tells were decoded, {claimed_s - got_s:.3f} s are missing.",
        )
    if damage is not None and claimed_s is None:
        return BadAudio(
            "truncated",
            f"The file is cut short or damaged: {got_s:.1f} s were decoded, some sound is missing.",
        )
    if damage is not None:
        return BadAudio("truncated", "Parts of the file are damaged and were left out.")
    if source.container == "ogg" and not ogg_is_whole(file.tail):
        return BadAudio(
            "truncated",
            f"The file ends in the middle of a page, after {got_s:.1f} s: its end is missing.",
        )
    return None


def _check_shape(sample_rate: int, n_channels: int) -> None:
    if not MIN_SOURCE_HZ <= sample_rate <= MAX_SOURCE_HZ:
        raise BadAudio(
            "bad_sample_rate",
            f"The header gives a sample rate of {sample_rate} Hz; "
            f"{MIN_SOURCE_HZ} to {MAX_SOURCE_HZ} Hz can be used.",
        )
    if n_channels > MAX_CHANNELS:
        raise BadAudio(
            "too_many_channels",
            f"The file has {n_channels} channels; at most {MAX_CHANNELS} can be used.",
        )


def _no_samples() -> BadAudio:
    return BadAudio("no_samples", "The file is well formed but holds no sound (0 samples).")


_NO_INDEX = (
    "The index of this MP4 file (moov), which is mostly written last, is missing or damaged:"
    " no sound could be decoded. A repair tool may rebuild it."
)


def _corrupt() -> BadAudio:
    return BadAudio("corrupt", "The file is damaged: no sound could be decoded from it.")


# --- libsndfile -----------------------------------------------------------------------------

# What libsndfile is asked to read: other formats it guesses at from next to nothing.
_MAGIC_OF_SOUNDFILE = re.compile(
    rb"RIFF....WAVE|RIFX....WAVE|RF64....WAVE|riff\x2e\x91\xcf\x11|FORM....AIF[FC]|\.snd|caff"
    rb"|fLaC|OggS|NIST_1A",
    re.DOTALL,
)
_CONTAINER_OF_SOUNDFILE = {
    "WAV": "wav",
    "WAVEX": "wav",
    "RF64": "wav",
    "W64": "w64",
    "AIFF": "aiff",
    "AU": "au",
    "CAF": "caf",
    "FLAC": "flac",
    "OGG": "ogg",
    "NIST": "sph",
}
_CODEC_OF_SUBTYPE = {
    "PCM_S8": "pcm_s8",
    "PCM_U8": "pcm_u8",
    "ULAW": "pcm_mulaw",
    "ALAW": "pcm_alaw",
    "GSM610": "gsm_ms",
    "IMA_ADPCM": "adpcm_ima_wav",
    "MS_ADPCM": "adpcm_ms",
    "VORBIS": "vorbis",
    "OPUS": "opus",
    "ALAC_16": "alac",
    "ALAC_20": "alac",
    "ALAC_24": "alac",
    "ALAC_32": "alac",
}
_WIDTH_OF_SUBTYPE = {
    "PCM_16": "s16",
    "PCM_24": "s24",
    "PCM_32": "s32",
    "FLOAT": "f32",
    "DOUBLE": "f64",
}


def _open_soundfile(file: _File, wav: WavHeader | None) -> _Source | None:
    try:
        opened = sf.SoundFile(file.open())
    except FOREIGN:
        return None
    container = _CONTAINER_OF_SOUNDFILE.get(opened.format)
    if container is None:
        return None
    return _Source(
        container,
        _soundfile_codec(file.head, opened),
        opened.samplerate,
        opened.channels,
        _soundfile_claim(file, opened, wav),
        _soundfile_blocks(opened),
    )


def _soundfile_blocks(file: sf.SoundFile) -> Iterator[Floats]:
    n = max(1, _BLOCK_VALUES // file.channels)
    while True:
        try:
            block = file.read(n, dtype="float32", always_2d=True)
        except FOREIGN as error:
            raise _Damaged from error
        if len(block):
            yield np.ascontiguousarray(block.T)
        if len(block) < n:
            return


def _soundfile_codec(head: bytes, opened: sf.SoundFile) -> str:
    if opened.format == "FLAC":
        return "flac"
    width = _WIDTH_OF_SUBTYPE.get(opened.subtype)
    if width is None:
        return _CODEC_OF_SUBTYPE.get(opened.subtype, str(opened.subtype).lower())
    if opened.endian in ("LITTLE", "BIG"):
        order = "le" if opened.endian == "LITTLE" else "be"
    else:
        order = "be" if head[:4] in (b"RIFX", b"FORM", b".snd", b"caff") else "le"
    return f"pcm_{width}{order}"


def _soundfile_claim(file: _File, opened: sf.SoundFile, wav: WavHeader | None) -> float | None:
    """Seconds the header tells, or None; libsndfile quietly lowers it to what is there."""
    if opened.frames >= 1 << 40:  # 2**63 - 1: not known
        return None
    there_s: float = opened.frames / opened.samplerate
    if opened.format == "FLAC":
        return there_s
    if opened.format == "NIST":
        count = re.search(rb"\nsample_count -i (\d{1,15})\s", file.head[:4096])
        return int(count[1]) / opened.samplerate if count else None
    if wav is not None:
        there = file.size_bytes - wav.data_offset
        claimed = wav.data_bytes
        return there_s * max(1.0, claimed / there) if claimed and there > 0 else None
    # libsndfile's log of the header, for example "SSND : 192008 (should be 95981)".
    ratio = 1.0
    for claimed_text, actual_text in re.findall(r": (\d+) \(should be (\d+)\)", opened.extra_info):
        claimed, actual = int(claimed_text), int(actual_text)
        if actual > 0 and not is_unknown_size(claimed):
            ratio = max(ratio, claimed / actual)
    return there_s * ratio


# --- FFmpeg ---------------------------------------------------------------------------------

# Demuxers FFmpeg may choose from. Playlists (hls, concat, dash, sdp) are left out on purpose:
# they open other files and addresses.
_AV_FORMATS = (
    "wav,w64,aiff,au,caf,flac,ogg,mp3,aac,ac3,eac3,dts,mov,matroska,webm,amr,amrnb,amrwb,asf,"
    "xwma,flv,avi,mpegts,mpeg,nistsphere,voc,wv,ape,tta,tak,qcp,rm,dss,loas,latm,nut,mpc,mpc8,"
    "truehd,shn,wtv,mxf,gsm,g722,g729,mulaw,alaw,u8,s8,s16le,s16be,s24le,s32le,f32le"
)
_CONTAINER_OF_AV = {
    "mov,mp4,m4a,3gp,3g2,mj2": "mp4",
    "nistsphere": "sph",
    "mulaw": "mulaw",
    "amrnb": "amr",
    "amrwb": "amr",
    "s16le": "sln",
}
# Containers whose header holds the true duration; elsewhere FFmpeg guesses from the bit rate.
_HEADER_TELLS_DURATION = ("mp4", "mkv", "webm", "caf", "flac", "aiff", "au", "w64", "asf")
# Containers in which a recorder that pauses writes nothing and goes on with a later time.
_TIMES_TELL_GAPS = ("mkv", "webm", "mp4")

# Extension -> FFmpeg demuxer, its options, bytes per second: formats without any header.
_HEADERLESS: dict[str, tuple[str, dict[str, str], float]] = {
    ".gsm": ("gsm", {}, 1650.0),
    ".ulaw": ("mulaw", {"sample_rate": "8000"}, 8000.0),
    ".ul": ("mulaw", {"sample_rate": "8000"}, 8000.0),
    ".pcmu": ("mulaw", {"sample_rate": "8000"}, 8000.0),
    ".alaw": ("alaw", {"sample_rate": "8000"}, 8000.0),
    ".al": ("alaw", {"sample_rate": "8000"}, 8000.0),
    ".pcma": ("alaw", {"sample_rate": "8000"}, 8000.0),
    ".g722": ("g722", {}, 8000.0),
    ".g729": ("g729", {}, 1000.0),
    ".sln": ("s16le", {"sample_rate": "8000"}, 16000.0),
    ".sln16": ("s16le", {"sample_rate": "16000"}, 32000.0),
}


def headerless_format(
    head: bytes, name: str, told: Headerless | None
) -> tuple[str, dict[str, str], float] | None:
    """How to read a file as the headerless format its name tells, unless its first bytes say no.

    Raises:
        BadAudio: nobody can tell what such a file holds but the user.
    """
    extension = PurePosixPath(name).suffix.lower()
    found = _HEADERLESS.get(extension)
    if told is not None and extension in EXTENSIONS:
        shape = {"sample_rate": str(told.sample_rate), "ch_layout": f"{told.channels}C"}
        found = (told.encoding, shape, told.bytes_per_second)
    if KNOWN_MAGIC.match(head) or other_kind(head):
        return None
    if found is None and extension in EXTENSIONS:
        raise BadAudio(
            "not_audio",
            f"A {extension} file has no header; say what it holds, such as --headerless"
            " mulaw:8000:1 (encoding, sample rate, channels).",
        )
    if found is None:
        return None
    is_gsm = all(byte >> 4 == 0xD for byte in head[:3300:33])  # every GSM 06.10 frame starts so
    return None if found[0] == "gsm" and not is_gsm else found


def open_container(
    file: io.RawIOBase | BinaryIO, raw: tuple[str, dict[str, str], float] | None
) -> InputContainer:
    """Open a file in FFmpeg, as what `headerless_format` found or as what it looks like."""
    options = {"format_whitelist": _AV_FORMATS, "protocol_whitelist": "none"}
    return av.open(
        file,
        mode="r",
        format=raw[0] if raw else None,
        container_options={**options, **(raw[1] if raw else {})},
        metadata_errors="replace",  # tags in an old character set must not fail the recording
        buffer_size=1 << 17,
    )


def _open_av(file: _File, raw: tuple[str, dict[str, str], float] | None) -> _Source:
    other = other_kind(file.head)
    if other and raw is None:
        raise _not_audio(other)
    try:
        container = open_container(file.open(), raw)
    except FOREIGN as error:
        if file.head[4:8] == b"ftyp":
            raise BadAudio("corrupt", _NO_INDEX) from error
        raise _corrupt() if KNOWN_MAGIC.match(file.head) else _not_audio() from error
    if not container.streams.audio:
        raise BadAudio("no_audio_stream", "The file holds no audio stream.")
    stream = container.streams.audio[0]
    if stream.codec_context is None:
        raise BadAudio("corrupt", "The sound is in a format no decoder here can read.")
    frames = _av_frames(container, stream)
    try:
        first = next(frames, None)
    except _Damaged:
        raise _corrupt() from None
    if first is None:
        raise _no_samples()
    name = _av_container_name(container, file.head)
    codec = stream.codec_context.codec.canonical_name
    return _Source(
        name,
        "g722" if codec == "adpcm_g722" else codec,
        first.sample_rate,
        first.layout.nb_channels,
        _av_claim(container, stream, name, file.head),
        _av_blocks(first, frames, name in _TIMES_TELL_GAPS, len(container.streams.audio)),
    )


def _av_container_name(container: InputContainer, head: bytes) -> str:
    name: str = container.format.name
    if name == "matroska,webm":
        return "webm" if b"webm" in head[:64] else "mkv"
    return _CONTAINER_OF_AV.get(name, name)


def _av_frames(container: InputContainer, stream: AudioStream) -> Iterator[av.AudioFrame]:
    """Decoded frames; packets that fail are left out and reported at the end as `_Damaged`."""
    decoder = _av_decoder(stream)
    damage: Exception | None = None
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except FOREIGN as error:
            damage = error
            break
        if packet is None:
            break
        try:
            frames = decoder.decode(packet)
        except FOREIGN as error:
            damage = error
            continue
        yield from (frame for frame in frames if frame.samples)
    container.close()
    if damage is not None:
        raise _Damaged from damage


def _av_decoder(stream: AudioStream) -> AudioCodecContext:
    own = stream.codec_context
    # FFmpeg's own AMR decoders refuse the comfort-noise frames every phone sends in pauses.
    better = {"amr_nb": "libopencore_amrnb", "amr_wb": "libopencore_amrwb"}
    name = better.get(own.codec.canonical_name)
    decoder = own
    if name is not None:
        decoder = cast(AudioCodecContext, AudioCodecContext.create(name, "r"))
        decoder.sample_rate, decoder.layout = own.sample_rate, av.AudioLayout("mono")
    decoder.thread_count = 1  # one CPU per decode task
    return decoder


def _av_blocks(
    first: av.AudioFrame, frames: Iterator[av.AudioFrame], with_gaps: bool, n_tracks: int
) -> Iterator[Floats]:
    gaps = _Gaps()
    for frame in chain([first], frames):
        if (frame.sample_rate, frame.layout.nb_channels) != (
            first.sample_rate,
            first.layout.nb_channels,
        ):
            raise _Damaged(_left_out(first, frame, frames))
        if with_gaps:
            yield from gaps.before(frame)
        yield _av_floats(frame)
    if n_tracks > 1:
        raise _Damaged(
            f"The file has {n_tracks} sound tracks, and only the first was heard. Write each"
            " into a file of its own."
        )


_LEAST_GAP_S = 0.5
_MOST_GAPS_S = 3600.0  # in all: a damaged time may be any


class _Gaps:
    """The silence where a container's times leap, so that what follows keeps its time."""

    def __init__(self) -> None:
        self._end_s: float | None = None
        self._left_s = _MOST_GAPS_S

    def before(self, frame: av.AudioFrame) -> Iterator[Floats]:
        """What is missing before a frame, in pieces of a second or less."""
        if frame.pts is None or not frame.time_base:
            return
        start_s = float(frame.pts * frame.time_base)
        gap_s = 0.0 if self._end_s is None else start_s - self._end_s
        self._end_s = start_s + frame.samples / frame.sample_rate
        if not _LEAST_GAP_S <= gap_s <= self._left_s:
            return
        self._left_s -= gap_s
        n_left = round(gap_s * frame.sample_rate)
        while n_left > 0:
            n = min(n_left, frame.sample_rate)
            yield np.zeros((frame.layout.nb_channels, n), np.float32)
            n_left -= n


def _left_out(first: av.AudioFrame, other: av.AudioFrame, frames: Iterator[av.AudioFrame]) -> str:
    """In words, what follows a change of shape: it has not one set of channels with the rest."""
    left_s = other.samples / other.sample_rate
    with suppress(_Damaged):
        for frame in frames:
            alive()
            left_s += frame.samples / frame.sample_rate
    before, behind = (f"{f.layout.nb_channels} x {f.sample_rate} Hz" for f in (first, other))
    return (
        f"The sound changes from {before} to {behind}, as if two files had been joined:"
        f" {left_s:.1f} s behind that were left out. Split the file there."
    )


def _av_floats(frame: av.AudioFrame) -> Floats:
    """One frame as float32 [n_channels, n], full scale 1."""
    values = _av_values(frame)
    if frame.format.is_packed:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        values = values.astype(np.int16) - 128 << 8
    scale = 1.0 if values.dtype.kind == "f" else 1.0 / -float(np.iinfo(values.dtype).min)
    floats: Floats = np.multiply(values, scale, dtype=np.float32, casting="unsafe")
    return floats


def _av_values(frame: av.AudioFrame) -> npt.NDArray[Any]:
    """The frame as it is: [n_channels, n], or packed [1, n_channels * n]."""
    if frame.format.name != "s64":
        return cast(npt.NDArray[Any], frame.to_ndarray())
    # Whole numbers of 64 bits, which PyAV does not hand out.
    n_values = frame.samples * frame.layout.nb_channels
    return np.frombuffer(cast(Any, frame.planes[0]), np.int64)[None, :n_values]


def _av_claim(
    container: InputContainer, stream: AudioStream, name: str, head: bytes
) -> float | None:
    if name == "mp3":
        return mp3_seconds(head)
    if name not in _HEADER_TELLS_DURATION:
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and not container.streams.video:
        return float(container.duration / 1_000_000)
    return None


def _not_audio(kind: str | None = None) -> BadAudio:
    if kind:
        return BadAudio("not_audio", f"This is {kind}, not audio.")
    return BadAudio(
        "not_audio",
        "No known audio or video format; headerless sound needs a header, WAV for example.",
    )
