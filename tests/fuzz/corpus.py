"""A second of synthesised sound in every container and codec that can be written here.

Made at test time, the same on every machine with the same libraries.
"""

from __future__ import annotations

import io
from functools import cache

import av
import numpy as np
import soundfile as sf

from tests.fuzz.ogg import mend_pages

# format, subtype, sample rate, channels, extension
BY_SOUNDFILE = [
    ("WAV", "PCM_16", 8000, 2, "wav"),
    ("WAV", "PCM_U8", 8000, 1, "wav"),
    ("WAV", "PCM_24", 44100, 2, "wav"),
    ("WAV", "PCM_32", 16000, 1, "wav"),
    ("WAV", "FLOAT", 16000, 2, "wav"),
    ("WAV", "DOUBLE", 16000, 1, "wav"),
    ("WAV", "ULAW", 8000, 2, "wav"),
    ("WAV", "ALAW", 8000, 1, "wav"),
    ("WAV", "GSM610", 8000, 1, "wav"),
    ("WAV", "IMA_ADPCM", 8000, 2, "wav"),
    ("WAV", "MS_ADPCM", 8000, 2, "wav"),
    ("WAV", "G721_32", 8000, 1, "wav"),
    ("WAV", "NMS_ADPCM_24", 8000, 1, "wav"),
    ("WAVEX", "PCM_16", 16000, 6, "wav"),
    ("RF64", "PCM_16", 16000, 2, "wav"),
    ("W64", "PCM_16", 16000, 2, "w64"),
    ("AIFF", "PCM_16", 16000, 2, "aiff"),
    ("AIFF", "ULAW", 8000, 1, "aifc"),
    ("AIFF", "IMA_ADPCM", 8000, 1, "aifc"),
    ("AU", "ULAW", 8000, 1, "au"),
    ("AU", "FLOAT", 16000, 1, "au"),
    ("AU", "G723_24", 8000, 1, "au"),
    ("CAF", "PCM_16", 16000, 2, "caf"),
    ("CAF", "ALAC_16", 16000, 2, "caf"),
    ("NIST", "PCM_16", 16000, 2, "sph"),
    ("NIST", "ULAW", 8000, 2, "sph"),
    ("FLAC", "PCM_16", 44100, 2, "flac"),
    ("FLAC", "PCM_24", 16000, 1, "flac"),
    ("OGG", "VORBIS", 44100, 2, "ogg"),
    ("OGG", "OPUS", 48000, 2, "opus"),
    ("MP3", "MPEG_LAYER_III", 44100, 2, "mp3"),
    ("RAW", "GSM610", 8000, 1, "gsm"),
]
# muxer, encoder, sample rate, channels, extension
BY_AV = [
    ("ipod", "aac", 44100, 2, "m4a"),
    ("mp4", "alac", 44100, 2, "m4a"),
    ("mov", "pcm_s16le", 16000, 2, "mov"),
    ("3gp", "libopencore_amrnb", 8000, 1, "3gp"),
    ("adts", "aac", 44100, 2, "aac"),
    ("webm", "libopus", 48000, 2, "webm"),
    ("matroska", "flac", 16000, 2, "mkv"),
    ("matroska", "vorbis", 44100, 2, "mka"),
    ("amr", "libopencore_amrnb", 8000, 1, "amr"),
    ("g722", "g722", 16000, 1, "g722"),
    ("wav", "g722", 16000, 1, "wav"),
    ("wav", "libmp3lame", 16000, 1, "wav"),
    ("mp2", "mp2", 44100, 2, "mp2"),
    ("wav", "g726", 8000, 1, "wav"),
    ("wav", "pcm_s64le", 16000, 2, "wav"),
    ("wav", "adpcm_yamaha", 8000, 1, "wav"),
    ("mulaw", "pcm_mulaw", 8000, 1, "ulaw"),
    ("alaw", "pcm_alaw", 8000, 1, "alaw"),
    ("asf", "wmav2", 44100, 2, "wma"),
    ("ac3", "ac3", 48000, 2, "ac3"),
    ("eac3", "eac3", 48000, 2, "eac3"),
    ("flv", "libmp3lame", 44100, 2, "flv"),
    ("flv", "nellymoser", 8000, 1, "flv"),
    ("avi", "adpcm_ms", 44100, 2, "avi"),
    ("mpegts", "aac", 44100, 2, "ts"),
    ("mpeg", "mp2", 44100, 2, "mpg"),
    ("nut", "pcm_s16le", 16000, 1, "nut"),
    ("tta", "tta", 16000, 2, "tta"),
    ("wv", "wavpack", 16000, 2, "wv"),
    ("voc", "pcm_u8", 8000, 1, "voc"),
    ("rm", "real_144", 8000, 1, "rm"),
    ("latm", "aac", 44100, 2, "latm"),
]
_EXPERIMENTAL = {"vorbis"}


@cache
def corpus() -> dict[str, bytes]:
    """Every sound, by a name such as `flac-pcm_16-44100x2.flac`."""
    made = {}
    for fmt, subtype, rate, n_channels, extension in BY_SOUNDFILE:
        name = f"{fmt}-{subtype}-{rate}x{n_channels}.{extension}".lower()
        made[name] = _by_soundfile(fmt, subtype, rate, n_channels)
    for fmt, codec, rate, n_channels, extension in BY_AV:
        name = f"{fmt}-{codec}-{rate}x{n_channels}.{extension}"
        made[name] = _by_av(fmt, codec, rate, n_channels)
    rng = np.random.default_rng(0)
    made["g729.g729"] = rng.bytes(1000)  # no encoder here; every ten bytes are a frame of sound
    made["slin.sln16"] = np.rint(sound(16_000, 1) * 9000).astype("<i2").tobytes()
    return made


def sound(sample_rate: int, n_channels: int) -> np.ndarray:
    """One second of two gliding tones, [n, n_channels] in -1..1, loud and quiet in turn."""
    t = np.arange(sample_rate) / sample_rate
    loudness = 0.4 + 0.4 * np.sin(2 * np.pi * 3 * t)
    channels = [
        loudness * (np.sin(2 * np.pi * (200 + 90 * c + 80 * t) * t) + np.sin(900 * (c + 1) * t)) / 2
        for c in range(n_channels)
    ]
    return np.stack(channels, axis=1)


def _by_soundfile(fmt: str, subtype: str, rate: int, n_channels: int) -> bytes:
    file = io.BytesIO()
    sf.write(file, sound(rate, n_channels), rate, format=fmt, subtype=subtype)
    data = bytearray(file.getvalue())
    if fmt == "OGG":  # libsndfile gives a stream a number by the clock
        mend_pages(data, serial=1)
    peak = data.find(b"PEAK", 0, 100)
    if peak > 0:  # and a WAV of floats the time
        data[peak + 12 : peak + 16] = bytes(4)
    return bytes(data)


def _by_av(fmt: str, codec: str, rate: int, n_channels: int) -> bytes:
    file = io.BytesIO()
    values = np.rint(sound(rate, n_channels) * 32767).astype(np.int16)
    layout = {1: "mono", 2: "stereo"}[n_channels]
    with av.open(file, "w", format=fmt, options={"fflags": "+bitexact"}) as out:
        options = {"strict": "experimental"} if codec in _EXPERIMENTAL else {}
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.layout = layout
        stream.bit_rate = {"libopencore_amrnb": 12_200, "g726": 32_000}.get(codec, 128_000)
        for at in range(0, len(values), 960):
            block = np.ascontiguousarray(values[at : at + 960]).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, "s16", layout)
            frame.sample_rate, frame.pts = rate, at
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()
