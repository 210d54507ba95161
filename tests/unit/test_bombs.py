"""What is far longer than it is large: decided while it streams, in bounded memory."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import soundfile

from tests.flac_bomb import silent_flac
from transcribe import decode
from transcribe.errors import BadAudio
from transcribe.listen import listen

HOUR = 16_000 * 3600
MIB = 1 << 20


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that Python and numpy held at once."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_bomb_is_what_it_says():
    bomb = silent_flac(0.1, 8_000)
    sound, rate = soundfile.read(io.BytesIO(bomb))
    assert (rate, len(sound)) == (8_000, round(0.1 * 3600 * 8_000 / 65_535) * 65_535)
    assert not sound.any()
    assert len(silent_flac(100, 8_000)) < MIB


def test_a_bomb_is_too_long_before_it_is_large(monkeypatch):
    monkeypatch.setattr(decode, "MAX_CHANNEL_HOURS_OF_ANY_SIZE", 2)
    bomb = silent_flac(3)

    def refuse() -> None:
        with pytest.raises(BadAudio) as caught:
            decode.decode(bomb, "a.flac")
        assert caught.value.kind == "too_long"
        assert "longer than 2 hours" in caught.value.message

    # Held is at most an hour, 115 MB; two hours would be 230.
    assert peak_of(refuse) < 115.2e6 + 60 * MIB


@pytest.mark.parametrize("claimed", [0, 1, (1 << 36) - 1])
def test_what_a_header_claims_is_not_allocated(claimed):
    lying = silent_flac(0.02, 16_000, claimed_samples=claimed)

    def read() -> None:
        try:
            assert decode.decode(lying, "a.flac").n_samples <= 0.021 * HOUR
        except BadAudio as error:
            assert error.kind in ("no_samples", "corrupt")

    assert peak_of(read) < 60 * MIB


def test_what_has_the_size_of_speech_may_be_long(monkeypatch):
    monkeypatch.setattr(decode, "MAX_CHANNEL_HOURS_OF_ANY_SIZE", 0.001)
    file = io.BytesIO()
    soundfile.write(file, np.zeros(10 * 8_000), 8_000, format="WAV", subtype="ULAW")
    assert decode.decode(file.getvalue(), "a.wav").duration_s == 10
    monkeypatch.setattr(decode, "MAX_CHANNEL_HOURS", 0.002)
    with pytest.raises(BadAudio) as caught:
        decode.decode(file.getvalue(), "a.wav")
    assert caught.value.kind == "too_long"


def test_what_is_not_held_is_decoded_again_and_found_alike(monkeypatch, tmp_path):
    rng = np.random.default_rng(3)
    loud = np.repeat(rng.uniform(0, 0.5, 60), 8_000)[:, None] * rng.uniform(-1, 1, (480_000, 2))
    path = tmp_path / "noise.flac"
    soundfile.write(path, loud, 16_000)
    held = list(listen(path.read_bytes(), "noise.flac", "auto", None, 5 * 16_000))
    monkeypatch.setattr(decode, "HELD_VALUES", 100_000)
    again = list(listen(path, "noise.flac", "auto", None, 5 * 16_000))
    assert [piece.windows for piece in again] == [piece.windows for piece in held]
    for mine, theirs in zip(again, held, strict=True):
        assert all(map(np.array_equal, mine.samples, theirs.samples))
        assert mine.whole == theirs.whole
    audio = decode.decode(path, "noise.flac")
    soundfile.write(path, loud[:100_000], 16_000)
    with pytest.raises(BadAudio, match="changed while"):
        list(audio.blocks())
