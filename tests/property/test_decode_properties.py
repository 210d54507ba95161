"""Resampling in blocks is resampling whole; hostile bytes never raise anything but `BadAudio`."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchaudio.functional import resample

from transcribe import decode as module
from transcribe.decode import SAMPLE_RATE, decode
from transcribe.errors import BadAudio
from transcribe.headerless import Headerless
from transcribe.headers import HEAD_BYTES
from transcribe.probe import probe_seconds

COMMON = [8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 96000]


def wav_of(sound: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    sf.write(file, sound.T, rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


@given(
    rate=st.sampled_from([*COMMON, 7999, 44056, 16001]),
    n=st.integers(1, 60_000),
    n_channels=st.integers(1, 3),
    seed=st.integers(0, 99),
    block_values=st.sampled_from([1000, 7001, 1 << 21]),
)
@settings(max_examples=40, deadline=None)
def test_blocks_do_not_change_the_sound(rate, n, n_channels, seed, block_values):
    sound = np.random.default_rng(seed).uniform(-0.5, 0.5, (n_channels, n)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK_VALUES", block_values)
        in_blocks = decode(wav_of(sound, rate), "a.wav").samples
    whole = decode(wav_of(sound, rate), "a.wav").samples
    assert in_blocks.shape == (n_channels, -(-n * SAMPLE_RATE // rate))
    assert np.abs(in_blocks.astype(int) - whole.astype(int)).max() <= 1


@given(rate=st.sampled_from([*COMMON, 44056]), n=st.integers(1, 30_000), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_resampling_is_that_of_torchaudio(rate, n, seed):
    sound = np.random.default_rng(seed).uniform(-0.4, 0.4, (2, n)).astype(np.float32)
    got = decode(wav_of(sound, rate), "a.wav").samples
    # In float64, because torchaudio computes its filter in the precision of the samples.
    want = resample(torch.from_numpy(sound.astype(np.float64)), rate, SAMPLE_RATE).numpy()
    assert got.shape == want.shape
    assert np.abs(got - want * 32768).max() < 1.5


SEEDS = [
    wav_of(np.zeros((2, 4000), np.float32), 8000),
    *(
        (lambda f: (sf.write(f, np.random.default_rng(0).uniform(-0.5, 0.5, (9000, 2)), 16000,
                             format=fmt), f.getvalue())[1])(io.BytesIO())
        for fmt in ("FLAC", "OGG", "MP3", "AIFF", "AU", "CAF", "W64", "RF64")
    ),
    b"#!AMR\n" + b"\x3c" + bytes(31),
    b"\0\0\0\x20ftypM4A \0\0\0\0isom" + bytes(40),
    b"\x1aE\xdf\xa3\x01\0\0\0\0\0\0\x1f",
    b"0&\xb2u\x8ef\xcf\x11\xa6\xd9\0\xaa\0b\xcel",
    b"\x0bw" + bytes(60),
    b"\xff\xf1\x50\x80",
    b"",
]  # fmt: skip


@given(
    start=st.sampled_from(SEEDS),
    keep=st.floats(0, 1),
    tail=st.binary(max_size=300),
    flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=8),
    extension=st.sampled_from(
        ["wav", "mp3", "gsm", "ulaw", "g722", "g729", "sln", "raw", "m4a", ""]
    ),
    told=st.sampled_from([None, Headerless("s24le", 8000, 3), Headerless("mulaw", 44_100, 1)]),
)
@settings(max_examples=300, deadline=None)
def test_any_bytes_end_as_audio_or_bad_audio(start, keep, tail, flips, extension, told):
    data = bytearray(start[: int(len(start) * keep)] + tail)
    for at, value in flips:
        if data:
            data[at % len(data)] = value
    name = f"x.{extension}"
    try:
        audio = decode(bytes(data), name, told)
    except BadAudio as error:
        assert error.message
    else:
        assert audio.samples.dtype == np.int16 and audio.samples.shape[1] > 0
    seconds = probe_seconds(bytes(data[:HEAD_BYTES]), len(data), name, told)
    assert seconds is None or seconds > 0
