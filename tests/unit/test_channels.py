"""Which channels are recognised, and how the others are accounted for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcribe import listen
from transcribe.channels import Likeness
from transcribe.listen import heard_channels

RNG = np.random.default_rng(7)


def noise(scale: float = 3_000.0) -> np.ndarray:
    return (RNG.standard_normal(64_000) * scale).astype(np.int16)


def likeness(samples: np.ndarray, *cuts: int) -> Likeness:
    """Of `[n_channels, n]` int16, pushed in pieces that begin at `cuts`."""
    found = Likeness(len(samples))
    for piece in np.split(samples.astype(np.float32), sorted(cuts), axis=1):
        found.push(piece)
    found.finish()
    return found


def distinct_channels(samples: np.ndarray) -> list[int]:
    return heard_channels(likeness(samples), "auto")


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
    one = noise()
    call, room = likeness(np.stack([one, noise()])), likeness(np.stack([one, one]))
    assert heard_channels(call, "split") == heard_channels(room, "split") == [0, 1]
    assert heard_channels(call, "auto") == [0, 1]
    assert heard_channels(room, "auto") == [0]
    assert heard_channels(call, "mix") == [0]
    mono = likeness(one[None])
    assert [heard_channels(mono, mode) for mode in ("auto", "split", "mix")] == [[0]] * 3


@pytest.mark.parametrize("db", [0, -20, -30])
@pytest.mark.parametrize("ms", [400, 3_000])
def test_a_caller_is_not_lost_behind_music_on_both_channels(db, ms):
    music = np.tile(noise(8_000), 10)
    agent, customer = music.copy(), music.copy()
    n, at = 16 * ms, 320_123
    for channel in (agent, customer):
        channel[at : at + n] = 0
    customer[at : at + n] = noise(3_000 * 10 ** (db / 20))[:n]
    assert distinct_channels(np.stack([agent, customer])) == [0, 1]
    assert distinct_channels(np.stack([customer, agent])) == [0]  # the agent says nothing here


def test_a_click_on_one_channel_does_not_make_it_another():
    one = noise()
    clicked = one.copy()
    clicked[[5_000, 40_000]] = 32_000
    assert distinct_channels(np.stack([one, clicked])) == [0]


def test_a_channel_turned_upside_down_is_heard_once():
    one = noise()
    assert distinct_channels(np.stack([one, -one])) == [0]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 64_000), max_size=5))
def test_how_the_samples_come_does_not_matter(cuts):
    one, own = noise(), noise()
    silent_behind = np.where(np.arange(64_000) < 59_100, one, 0)
    pair = np.stack([silent_behind, np.where(np.arange(64_000) < 59_100, one, own)])
    assert likeness(pair, *cuts).distinct() == [0, 1]
    silent_behind = np.where(np.arange(64_000) < 63_000, one, 0)
    pair = np.stack([silent_behind, np.where(np.arange(64_000) < 63_000, one, own)])
    assert likeness(pair, *cuts).distinct() == [0]


def test_a_mix_is_the_mean_rounded():
    samples = np.stack([noise(), noise()])
    expected = (samples[0].astype(int) + samples[1]) / 2
    mixed = listen._mix(samples)
    assert mixed.dtype == np.int16
    assert np.abs(mixed - expected).max() <= 0.5
