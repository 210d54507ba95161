"""Bytes of one audio object -> channels of 16 kHz int16 samples.

Owns: telling formats apart by content, libsndfile and FFmpeg (through soundfile and PyAV),
resampling, and turning whatever those libraries raise into `BadAudio`. libsndfile reads what it
reads fastest (WAV with G.711, GSM or ADPCM inside, FLAC, Ogg, AIFF, AU, SPHERE); FFmpeg reads
the rest, and MP3, because libsndfile's MP3 decoder writes to stderr when a file is damaged.

Must not know: storage, speech detection, engines, Ray. Content decides the format; the name is
looked at only for headerless telephone audio (`.gsm`, `.ulaw`, `.g722` ...), which nothing else
can tell; what `.raw` and `.pcm` hold not even that tells, but `--headerless`.

Sound is decoded, resampled and rounded in blocks, so memory stays near the size of the result,
and what is allocated follows from samples that were really decoded, never from a header.
"""

from __future__ import annotations

import codecs
import io
import math
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
import soundfile as sf
import torch
from av.audio.codeccontext import AudioCodecContext
from av.audio.stream import AudioStream
from av.container import InputContainer
from torchaudio.transforms import Resample

from transcribe.errors import BadAudio
from transcribe.headerless import EXTENSIONS, Headerless

SAMPLE_RATE = 16_000
HEAD_BYTES = 65_536

MIN_SOURCE_HZ, MAX_SOURCE_HZ = 1_000, 768_000
MAX_CHANNELS = 32
MAX_CHANNEL_HOURS = 48  # 5.5 GB of int16: a compressed file of a few MB can hold far more

Floats = npt.NDArray[np.float32]
Int16s = npt.NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Audio:
    """One decoded recording.

    Attributes:
        samples: int16, shape [n_channels, n_samples], 16 kHz, C-contiguous.
        container: lower-case name, the same whichever library decoded it (`wav`, `mp4`, `mkv`).
        codec: FFmpeg's codec name (`pcm_mulaw`, `gsm_ms`, `opus`); `g722` for G.722.
        sample_rate: of the source, Hz.
        duration_s: n_samples / 16000.
        problem: kind `truncated` when only part could be decoded; `samples` holds that part.
        resample_seconds: how much of the time was spent on resampling and rounding.
    """

    samples: Int16s
    container: str
    codec: str
    sample_rate: int
    duration_s: float
    problem: BadAudio | None
    resample_seconds: float = 0.0


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
_FOREIGN = (
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


def decode(data: bytes, name: str, headerless: Headerless | None = None) -> Audio:
    """Decode one audio object; a video gives its first audio stream.

    Args:
        data: the whole object.
        name: its path or uri; only the extension is used, and only for headerless formats.
        headerless: what files hold that have no header and an extension such as `.raw`.

    Raises:
        BadAudio: kind is one of
            `empty_file` no bytes; `not_audio` not a format known here; `no_audio_stream` a
            video or picture without sound; `corrupt` a known format, nothing decodable;
            `no_samples` well-formed but zero seconds; `bad_sample_rate` outside 1 to 768 kHz;
            `too_many_channels` more than 32; `too_long` more than 48 channel-hours.
    """
    if not data:
        raise BadAudio("empty_file", "The file is empty (0 bytes).")
    wav = _wav_header(data)
    if wav is not None:
        _check_shape(wav.sample_rate, wav.n_channels)
        if wav.is_empty:
            raise _no_samples()
    first = None
    # FFmpeg reads a WAV whose recorder never filled in the size; libsndfile finds 0 samples.
    if _MAGIC_OF_SOUNDFILE.match(data) and not (wav and wav.data_bytes == 0):
        first = _read(_open_soundfile(data, wav))
        if first is not None and not first.damaged:
            return _finish(first, data)
    try:
        second = _read(_open_av(data, _headerless_format(data, name, headerless)))
    except BadAudio:
        if first is None or not first.n_samples:
            raise
        second = None
    readings = [r for r in (first, second) if r is not None]
    best = max(readings, key=lambda r: (r.n_samples, not r.damaged))
    return _finish(best, data)


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
    except (*_FOREIGN, BadAudio, struct.error):
        return None
    # A header that tells more than a second a byte is lying.
    return seconds if seconds is not None and 0 < seconds < size_bytes else None


# --- reading a source in blocks -------------------------------------------------------------

_BLOCK_VALUES = 1 << 21  # samples times channels resampled at once: 8 MB of float32


@dataclass(frozen=True, slots=True)
class _Reading:
    """What came out of one decoder."""

    source: _Source
    parts: list[Int16s]
    n_samples: int
    damaged: bool
    resample_seconds: float


def _read(source: _Source | None) -> _Reading | None:
    """Decode everything a source gives, as 16 kHz int16 parts [n_channels, n]."""
    if source is None:
        return None
    _check_shape(source.sample_rate, source.n_channels)
    resampler = _Resampler(source.sample_rate)
    parts: list[Int16s] = []
    n_samples, damaged, resample_seconds = 0, False, 0.0
    limit = MAX_CHANNEL_HOURS * 3600 * SAMPLE_RATE // source.n_channels

    def keep(block: Floats) -> None:
        nonlocal n_samples
        parts.append(_to_int16(block))
        n_samples += block.shape[1]
        if n_samples > limit:
            hours = f"{MAX_CHANNEL_HOURS / source.n_channels:.0f} hours"
            raise BadAudio("too_long", f"The recording is longer than {hours}; split it first.")

    try:
        for block in _rechunk(source.blocks, max(1, _BLOCK_VALUES // source.n_channels)):
            started = time.perf_counter()
            keep(resampler.push(_clean(block)))
            resample_seconds += time.perf_counter() - started
    except _Damaged:
        damaged = True
    if resampler.started:
        started = time.perf_counter()
        keep(resampler.finish())
        resample_seconds += time.perf_counter() - started
    return _Reading(source, parts, n_samples, damaged, resample_seconds)


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
    return rounded


def _finish(reading: _Reading, data: bytes) -> Audio:
    """Join the parts and say what is missing."""
    source, n_samples = reading.source, reading.n_samples
    if n_samples == 0:
        raise _corrupt() if reading.damaged else _no_samples()
    samples = np.empty((source.n_channels, n_samples), np.int16)
    at = 0
    reading.parts.reverse()
    while reading.parts:  # freed one by one: the peak stays at one copy of the result
        part = reading.parts.pop()
        samples[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    got_s = n_samples / SAMPLE_RATE
    problem = _problem(source, got_s, reading.damaged, data)
    return Audio(
        samples,
        source.container,
        source.codec,
        source.sample_rate,
        got_s,
        problem,
        reading.resample_seconds,
    )


def _problem(source: _Source, got_s: float, damaged: bool, data: bytes) -> BadAudio | None:
    claimed_s = source.claimed_s
    # Encoder padding and rounding of header times stay below this.
    tolerance_s = 0.25 if source.container not in ("wav", "flac", "aiff", "au", "sph") else 0.01
    if claimed_s is not None and claimed_s - got_s > max(tolerance_s, 0.001 * claimed_s):
        return BadAudio(
            "truncated",
            f"The file is cut short or damaged: {got_s:.1f} s of the {claimed_s:.1f} s its header "
            f"tells were decoded, {claimed_s - got_s:.1f} s are missing.",
        )
    if damaged and claimed_s is None:
        return BadAudio(
            "truncated",
            f"The file is cut short or damaged: {got_s:.1f} s were decoded, some sound is missing.",
        )
    if damaged:
        return BadAudio("truncated", "Parts of the file are damaged and were left out.")
    if source.container == "ogg" and not _ogg_is_whole(data):
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


def _corrupt() -> BadAudio:
    return BadAudio("corrupt", "The file is damaged: no sound could be decoded from it.")


# --- resampling -----------------------------------------------------------------------------

_LOWPASS_WIDTH, _ROLLOFF = 6, 0.99  # torchaudio's defaults
_MAX_KERNEL_VALUES = 1 << 21


class _Resampler:
    """Resamples a stream to 16 kHz, giving the same as resampling it whole.

    Blocks are cut at multiples of the reduced source rate, where an input sample and an output
    sample coincide, and every block is resampled together with its neighbours' edges.
    """

    def __init__(self, sample_rate: int) -> None:
        divisor = math.gcd(sample_rate, SAMPLE_RATE)
        self.step_in, self.step_out = sample_rate // divisor, SAMPLE_RATE // divisor
        width = math.ceil(_LOWPASS_WIDTH * max(1.0, self.step_in / self.step_out) / _ROLLOFF) + 1
        self.context = math.ceil(width / self.step_in) * self.step_in
        self.buffer: Floats | None = None  # starts `n_left` samples before what is due
        self.n_left = 0
        self.n_in = self.n_out = 0

    @property
    def started(self) -> bool:
        """Whether anything was pushed."""
        return self.buffer is not None

    def push(self, block: Floats) -> Floats:
        """Take float32 [n_channels, n]; return the 16 kHz samples that are now certain."""
        self.n_in += block.shape[1]
        joined = [block] if self.buffer is None else [self.buffer, block]
        self.buffer = buffer = np.concatenate(joined, axis=1)
        if self.step_in == self.step_out:
            self.n_out += buffer.shape[1]
            self.buffer = buffer[:, :0]
            return buffer
        due = (buffer.shape[1] - self.n_left - self.context) // self.step_in * self.step_in
        if due <= 0:
            return buffer[:, :0]
        out = self._take(due // self.step_in * self.step_out)
        start = max(0, self.n_left + due - self.context)
        self.n_left, self.buffer = self.n_left + due - start, buffer[:, start:].copy()
        return out

    def finish(self) -> Floats:
        """The last samples: in all ceil(n * 16000 / sample_rate) for n pushed."""
        assert self.buffer is not None
        return self._take(-(-self.n_in * self.step_out // self.step_in) - self.n_out)

    def _take(self, n: int) -> Floats:
        assert self.buffer is not None
        if n == 0:
            return self.buffer[:, :0]
        skip = self.n_left // self.step_in * self.step_out
        self.n_out += n
        return _resample(self.buffer, self.step_in, self.step_out)[:, skip : skip + n]


def _resample(x: Floats, step_in: int, step_out: int) -> Floats:
    """float32 [n_channels, n] -> [n_channels, ceil(n * step_out / step_in)]."""
    if step_in * step_out > _MAX_KERNEL_VALUES:
        return _interpolate(x, step_in, step_out)
    filters, width, stride = _filters(step_in, step_out)
    n_out = -(-x.shape[1] * step_out // step_in)
    with torch.inference_mode():
        padded = torch.nn.functional.pad(torch.from_numpy(x), (width, width + stride))
        out = torch.nn.functional.conv1d(padded[:, None], filters, stride=stride)
        result: Floats = out.transpose(1, 2).reshape(x.shape[0], -1)[:, :n_out].numpy()
    return result


@lru_cache(maxsize=16)
def _filters(step_in: int, step_out: int) -> tuple[torch.Tensor, int, int]:
    """torchaudio's filters [n, 1, taps], its padding, and the stride they are applied with.

    `Resample` computes them in float64 (`functional.resample` does not). For 8, 32 or 48 kHz
    they are one or two short rows, on which conv1d is slow: they are repeated, shifted, so
    that one step gives many output samples. Same numbers, about ten times as fast.
    """
    resample = Resample(step_in, step_out, lowpass_filter_width=_LOWPASS_WIDTH, rolloff=_ROLLOFF)
    rows, width = resample.kernel[:, 0], int(resample.width)
    n_taps, repeats = rows.shape[1], max(1, 48 // step_in)
    filters = torch.zeros(repeats * step_out, (repeats - 1) * step_in + n_taps)
    for i in range(repeats):
        filters[i * step_out : (i + 1) * step_out, i * step_in : i * step_in + n_taps] = rows
    return filters[:, None], width, repeats * step_in


def _interpolate(x: Floats, step_in: int, step_out: int) -> Floats:
    """The same Hann-windowed sinc as torchaudio's, evaluated tap by tap.

    For rates such as 7999 Hz, that share no factor with 16 kHz, torchaudio's table of filters
    has step_in * step_out entries: gigabytes. Formula: J. O. Smith, "Digital Audio Resampling".
    """
    n_in = x.shape[1]
    n_out = -(-n_in * step_out // step_in)
    cutoff = min(1.0, step_out / step_in) * _ROLLOFF
    reach = math.ceil(_LOWPASS_WIDTH / cutoff)
    taps = np.arange(-reach, reach + 1)
    padded = np.pad(x, ((0, 0), (reach, reach + 1)))
    out = np.empty((x.shape[0], n_out), np.float32)
    chunk = max(1, (1 << 20) // len(taps))
    for at in range(0, n_out, chunk):
        ticks = np.arange(at, min(at + chunk, n_out), dtype=np.int64) * step_in
        whole, part = ticks // step_out, (ticks % step_out) / step_out
        t = np.clip((taps - part[:, None]) * cutoff, -_LOWPASS_WIDTH, _LOWPASS_WIDTH)
        weights = cutoff * np.sinc(t) * np.cos(t * (np.pi / 2 / _LOWPASS_WIDTH)) ** 2
        weights = weights.astype(np.float32)
        index = whole[:, None] + (taps + reach)
        for channel in range(x.shape[0]):
            out[channel, at : at + len(ticks)] = np.einsum(
                "nt,nt->n", weights, padded[channel][index]
            )
    return out


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


class _Bytes(io.BytesIO):
    """libsndfile may seek before the start of a damaged file; soundfile would print the error."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return super().seek(max(0, offset) if whence == 0 else offset, whence)


def _open_soundfile(data: bytes, wav: _WavHeader | None) -> _Source | None:
    try:
        file = sf.SoundFile(_Bytes(data))
    except _FOREIGN:
        return None
    container = _CONTAINER_OF_SOUNDFILE.get(file.format)
    if container is None:
        return None
    return _Source(
        container,
        _soundfile_codec(data, file),
        file.samplerate,
        file.channels,
        _soundfile_claim(data, file, wav),
        _soundfile_blocks(file),
    )


def _soundfile_blocks(file: sf.SoundFile) -> Iterator[Floats]:
    n = max(1, _BLOCK_VALUES // file.channels)
    while True:
        try:
            block = file.read(n, dtype="float32", always_2d=True)
        except _FOREIGN as error:
            raise _Damaged from error
        if len(block):
            yield np.ascontiguousarray(block.T)
        if len(block) < n:
            return


def _soundfile_codec(data: bytes, file: sf.SoundFile) -> str:
    if file.format == "FLAC":
        return "flac"
    width = _WIDTH_OF_SUBTYPE.get(file.subtype)
    if width is None:
        return _CODEC_OF_SUBTYPE.get(file.subtype, str(file.subtype).lower())
    if file.endian in ("LITTLE", "BIG"):
        order = "le" if file.endian == "LITTLE" else "be"
    else:
        order = "be" if data[:4] in (b"RIFX", b"FORM", b".snd", b"caff") else "le"
    return f"pcm_{width}{order}"


def _soundfile_claim(data: bytes, file: sf.SoundFile, wav: _WavHeader | None) -> float | None:
    """Seconds the header tells, or None; libsndfile quietly lowers it to what is there."""
    there_s: float = file.frames / file.samplerate
    if file.format == "FLAC":
        return there_s if file.frames < 1 << 40 else None  # 2**63 - 1: total not written
    if file.format == "NIST":
        count = re.search(rb"\nsample_count -i (\d{1,15})\s", data[:4096])
        return int(count[1]) / file.samplerate if count else None
    if wav is not None:
        there = len(data) - wav.data_offset
        claimed = wav.data_bytes
        return there_s * max(1.0, claimed / there) if claimed and there > 0 else None
    # libsndfile's log of the header, for example "SSND : 192008 (should be 95981)".
    ratio = 1.0
    for claimed_text, actual_text in re.findall(r": (\d+) \(should be (\d+)\)", file.extra_info):
        claimed, actual = int(claimed_text), int(actual_text)
        if actual > 0 and not _is_unknown_size(claimed):
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
_KNOWN_MAGIC = re.compile(
    rb"RIFF|RIFX|RF64|riff|FORM|\.snd|caff|fLaC|OggS|NIST_1A|ID3|#!AMR|\x1aE\xdf\xa3|....ftyp"
    rb"|....moov|0&\xb2u|\x0bw|FLV|wvpk|MAC |Creative",
    re.DOTALL,
)


def _headerless_format(
    data: bytes, name: str, told: Headerless | None
) -> tuple[str, dict[str, str], float] | None:
    """How to read data as the headerless format its name tells, unless the bytes say no.

    Raises:
        BadAudio: nobody can tell what such a file holds but the user.
    """
    extension = PurePosixPath(name).suffix.lower()
    found = _HEADERLESS.get(extension)
    if told is not None and extension in EXTENSIONS:
        shape = {"sample_rate": str(told.sample_rate), "ch_layout": f"{told.channels}C"}
        found = (told.encoding, shape, told.bytes_per_second)
    if _KNOWN_MAGIC.match(data) or _other_kind(data):
        return None
    if found is None and extension in EXTENSIONS:
        raise BadAudio(
            "not_audio",
            f"A {extension} file has no header; say what it holds, such as --headerless"
            " mulaw:8000:1 (encoding, sample rate, channels).",
        )
    if found is None:
        return None
    is_gsm = all(byte >> 4 == 0xD for byte in data[:3300:33])  # every GSM 06.10 frame starts so
    return None if found[0] == "gsm" and not is_gsm else found


def _open_container(
    file: io.RawIOBase | io.BytesIO, raw: tuple[str, dict[str, str], float] | None
) -> InputContainer:
    options = {"format_whitelist": _AV_FORMATS, "protocol_whitelist": "none"}
    return av.open(
        file,
        mode="r",
        format=raw[0] if raw else None,
        container_options={**options, **(raw[1] if raw else {})},
        metadata_errors="replace",  # tags in an old character set must not fail the recording
        buffer_size=1 << 17,
    )


def _open_av(data: bytes, raw: tuple[str, dict[str, str], float] | None) -> _Source:
    other = _other_kind(data)
    if other and raw is None:
        raise _not_audio(other)
    try:
        container = _open_container(io.BytesIO(data), raw)
    except _FOREIGN as error:
        raise _corrupt() if _KNOWN_MAGIC.match(data) else _not_audio() from error
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
    name = _av_container_name(container, data)
    codec = stream.codec_context.codec.canonical_name
    return _Source(
        name,
        "g722" if codec == "adpcm_g722" else codec,
        first.sample_rate,
        first.layout.nb_channels,
        _av_claim(container, stream, name, data),
        _av_blocks(first, frames),
    )


def _av_container_name(container: InputContainer, data: bytes) -> str:
    name: str = container.format.name
    if name == "matroska,webm":
        return "webm" if b"webm" in data[:64] else "mkv"
    return _CONTAINER_OF_AV.get(name, name)


def _av_frames(container: InputContainer, stream: AudioStream) -> Iterator[av.AudioFrame]:
    """Decoded frames; packets that fail are left out and reported at the end as `_Damaged`."""
    decoder = _av_decoder(stream)
    damage: Exception | None = None
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except _FOREIGN as error:
            damage = error
            break
        if packet is None:
            break
        try:
            frames = decoder.decode(packet)
        except _FOREIGN as error:
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


def _av_blocks(first: av.AudioFrame, frames: Iterator[av.AudioFrame]) -> Iterator[Floats]:
    yield _av_floats(first)
    for frame in frames:
        if (frame.sample_rate, frame.layout.nb_channels) != (
            first.sample_rate,
            first.layout.nb_channels,
        ):
            raise _Damaged  # sound that changes shape midway has no one set of channels
        yield _av_floats(frame)


def _av_floats(frame: av.AudioFrame) -> Floats:
    """One frame as float32 [n_channels, n], full scale 1."""
    values: npt.NDArray[Any] = frame.to_ndarray()
    if frame.format.is_packed:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype == np.uint8:
        values = values.astype(np.int16) - 128 << 8
    scale = 1.0 if values.dtype.kind == "f" else 1.0 / -float(np.iinfo(values.dtype).min)
    floats: Floats = np.multiply(values, scale, dtype=np.float32, casting="unsafe")
    return floats


def _av_claim(
    container: InputContainer, stream: AudioStream, name: str, data: bytes
) -> float | None:
    if name == "mp3":
        return _mp3_seconds(data[:HEAD_BYTES])
    if name not in _HEADER_TELLS_DURATION:
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration and not container.streams.video:
        return float(container.duration / 1_000_000)
    return None


# --- telling files that are not audio apart ---------------------------------------------------

_OTHER_KINDS = (
    (re.compile(rb"%PDF"), "a PDF document"),
    (re.compile(rb"PK\x03\x04|PK\x05\x06"), "a ZIP archive or office document"),
    (re.compile(rb"\x1f\x8b"), "a gzip archive"),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8"), "a picture"),
    (re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE), "an HTML or XML page"),
)


def _other_kind(data: bytes) -> str | None:
    """What a file that is surely no audio is, in words."""
    for pattern, kind in _OTHER_KINDS:
        if pattern.match(data):
            return kind
    return "a text file" if not _KNOWN_MAGIC.match(data) and _is_text(data[:1024]) else None


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    # The blank: a silent A-law file is nothing but the letter U.
    has_blank = any(char.isspace() for char in text)
    return has_blank and all(char.isprintable() or char.isspace() for char in text)


def _not_audio(kind: str | None = None) -> BadAudio:
    if kind:
        return BadAudio("not_audio", f"This is {kind}, not audio.")
    return BadAudio(
        "not_audio",
        "No known audio or video format; headerless sound needs a header, WAV for example.",
    )


# --- headers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _WavHeader:
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


def _is_unknown_size(n: int) -> bool:
    """Sizes that streaming recorders write because they cannot know: 0, 2 or 4 GiB, or nearly."""
    return n == 0 or 0x7FFF0000 <= n <= 0x80010000 or n >= 0xFFFF0000


def _wav_header(data: bytes) -> _WavHeader | None:
    """The fmt and data chunks of a WAV file or of its head; None if it has no fmt chunk."""
    if data[:4] not in (b"RIFF", b"RIFX", b"RF64") or data[8:12] != b"WAVE":
        return None
    order = ">" if data[:4] == b"RIFX" else "<"
    at, fmt, size_64 = 12, None, 0
    for _ in range(1000):
        if at + 8 > len(data):
            break
        chunk, (size,) = data[at : at + 4], struct.unpack_from(order + "I", data, at + 4)
        body = at + 8
        if chunk == b"ds64" and body + 16 <= len(data):
            (size_64,) = struct.unpack_from("<Q", data, body + 8)
        elif chunk == b"fmt " and size >= 16 and body + 16 <= len(data):
            fmt = struct.unpack_from(order + "HHIIHHHH", data[body : body + 20].ljust(20, b"\0"))
        elif chunk == b"data" and fmt:
            claimed = size_64 or (0 if _is_unknown_size(size) else size)
            empty = size == 0 and _chunks_fill(data, body, order)
            return _wav_of(fmt, body, claimed, empty)
        at = body + size + size % 2
    return _wav_of(fmt, min(at, 1 << 32), None, False) if fmt else None


def _wav_of(fmt: tuple[int, ...], offset: int, claimed: int | None, empty: bool) -> _WavHeader:
    tag, n_channels, sample_rate, bytes_per_s, block_bytes, _, _, samples_per_block = fmt
    if tag in _WAV_TAGS_IN_BLOCKS and samples_per_block:
        bytes_per_s = sample_rate * block_bytes // samples_per_block
    elif tag in _WAV_TAGS_PCM or not bytes_per_s:
        bytes_per_s = sample_rate * block_bytes
    return _WavHeader(sample_rate, n_channels, bytes_per_s, offset, claimed, empty)


def _chunks_fill(data: bytes, at: int, order: str) -> bool:
    """Whether only well-formed chunks lie between `at` and the end: then there is no sound."""
    for _ in range(1000):
        if at >= len(data):
            return True
        if at + 8 > len(data) or not re.match(rb"[A-Za-z0-9 _]{4}", data[at : at + 4]):
            return False
        at += 8 + struct.unpack_from(order + "I", data, at + 4)[0]
        at += at % 2
    return False


def _mp3_seconds(head: bytes) -> float | None:
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


def _ogg_is_whole(data: bytes) -> bool:
    """Whether the last Ogg page is complete (RFC 3533, section 6).

    Its end-of-stream flag is no help: browsers leave it out of complete recordings.
    """
    at = data.rfind(b"OggS", max(0, len(data) - 2 * 65_307))
    if at < 0 or at + 27 > len(data):
        return False
    n_segments = data[at + 26]
    table = data[at + 27 : at + 27 + n_segments]
    return len(table) == n_segments and at + 27 + n_segments + sum(table) <= len(data)


# --- durations from the head of a file --------------------------------------------------------


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
    raw = _headerless_format(head, name, headerless)
    if raw is not None:
        return size_bytes / raw[2]
    wav = _wav_header(head)
    if wav is not None:
        there = size_bytes - wav.data_offset
        n_bytes = min(there, wav.data_bytes) if wav.data_bytes else there
        return n_bytes / wav.bytes_per_s
    if head[:4] == b"OggS":
        return _ogg_seconds(head, size_bytes)
    exact = _mp3_seconds(head)
    if exact is not None or _other_kind(head):
        return exact
    with _open_container(_Head(head, size_bytes), None) as container:
        return container.duration / 1_000_000 if container.duration else None


def _ogg_seconds(head: bytes, size_bytes: int) -> float | None:
    """Seconds at the last page seen, stretched to the size of the file."""
    vorbis = head.find(b"\x01vorbis", 0, 256)
    if head.find(b"OpusHead", 0, 256) >= 0:
        rate = 48_000
    elif vorbis >= 0:
        (rate,) = struct.unpack_from("<I", head, vorbis + 12)
    else:
        return None
    at, seconds, seen = 0, None, 1
    while at + 27 <= len(head) and head[at : at + 4] == b"OggS":
        (granule,) = struct.unpack_from("<q", head, at + 6)
        at += 27 + head[at + 26] + sum(head[at + 27 : at + 27 + head[at + 26]])
        if granule > 0 and at <= len(head):
            seconds, seen = granule / rate, at
    return None if seconds is None else seconds * size_bytes / seen
