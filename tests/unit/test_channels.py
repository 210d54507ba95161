"""Which channels are recognised, and how the others are accounted for."""

import numpy as np
import pytest

from transcribe import listen
from transcribe.listen import heard_channels

RNG = np.random.default_rng(7)


def noise(scale: float = 3_000.0) -> np.ndarray:
    return (RNG.standard_normal(64_000) * scale).astype(np.int16)


def distinct_channels(samples: np.ndarray) -> list[int]:
    return heard_channels(samples.astype(float) @ samples.T.astype(float), "auto")


def test_two_sides_of_a_call_are_both_heard():
    assert distinct_channels(np.stack([noise(), noise()])) == [0, 1]


@pytest.mark.parametrize("gain", [1.0, 0.3, 2.5])
def test_dual_mono_is_heard_once_whatever_the_levels(gain):
    one = noise()
    other = (one * gain + noise(30)).astype(np.int16)
    assert distinct_channels(np.stack([one, other])) == [0]


def test_crosstalk_does_not_make_two_sides_one():
    agent, customer = noise(), noise()
    leaking = (customer + 0.3 * agent).astype(np.int16)
    assert distinct_channels(np.stack([agent, leaking])) == [0, 1]


def test_silent_channels_are_left_out_unless_all_are():
    silent = np.zeros(64_000, dtype=np.int16)
    assert distinct_channels(np.stack([silent, noise(), silent])) == [1]
    assert distinct_channels(np.stack([silent, silent])) == [0]


def test_six_channels_of_one_room_are_heard_once():
    room = noise()
    assert distinct_channels(
        np.stack([(room * g).astype(np.int16) for g in (1, 0.9, 0.5, 0.7, 1, 1)])
    ) == [0]


def test_the_channel_modes():
    call, room = np.eye(2), np.ones((2, 2))
    assert heard_channels(call, "split") == heard_channels(room, "split") == [0, 1]
    assert heard_channels(call, "auto") == [0, 1]
    assert heard_channels(room, "auto") == [0]
    assert heard_channels(call, "mix") == [0]
    assert [heard_channels(np.ones((1, 1)), mode) for mode in ("auto", "split", "mix")] == [[0]] * 3


def test_a_mix_is_the_mean_rounded():
    samples = np.stack([noise(), noise()])
    expected = (samples[0].astype(int) + samples[1]) / 2
    mixed = listen._mix(samples)
    assert mixed.dtype == np.int16
    assert np.abs(mixed - expected).max() <= 0.5
