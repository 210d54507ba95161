"""The arithmetic between speech and engines loses nothing, whatever the audio."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from transcribe.assemble import coverage, coverage_breach
from transcribe.speech import (
    FRAME_SAMPLES,
    MAX_WINDOW_SAMPLES,
    Span,
    pack_windows,
    split_span,
)

MAX = 1_000


@st.composite
def spans_of_a_channel(draw):
    """Sorted, separate spans of at most MAX samples, and the channel's length."""
    spans, position = [], 0
    for gap, length in draw(
        st.lists(st.tuples(st.integers(0, 2_000), st.integers(1, MAX)), max_size=30)
    ):
        start = position + gap
        spans.append(Span(start, start + length))
        position = start + length
    return spans, position + draw(st.integers(0, 500))


@given(spans_of_a_channel(), st.integers(0, 400))
def test_every_speech_sample_is_in_exactly_one_window(channel, max_pause):
    spans, n_samples = channel
    windows = pack_windows(spans, 0, max_samples=MAX, max_pause=max_pause)
    heard = np.zeros(n_samples, dtype=int)
    for window in windows:
        heard[window.start : window.end] += 1
    assert all((heard[s.start : s.end] == 1).all() for s in spans)
    assert heard.max(initial=0) <= 1
    assert coverage_breach(n_samples, spans, windows) is None


@given(spans_of_a_channel(), st.integers(0, 400))
def test_windows_fit_and_hold_no_long_pause(channel, max_pause):
    spans, _ = channel
    windows = pack_windows(spans, 3, max_samples=MAX, max_pause=max_pause)
    assert all(w.n_samples <= MAX and w.channel == 3 for w in windows)
    for before, after in itertools.pairwise(spans):
        together = any(w.start <= before.start and after.end <= w.end for w in windows)
        assert not together or after.start - before.end <= max_pause


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_long_spans_are_cut_into_parts_that_fit_and_join_up(n_frames, seed):
    probabilities = np.random.default_rng(seed).random(n_frames, dtype=np.float32)
    span = Span(0, n_frames * FRAME_SAMPLES)
    parts = split_span(span, probabilities, max_samples=20 * FRAME_SAMPLES)
    assert [parts[0].start, parts[-1].end] == [span.start, span.end]
    assert all(a.end == b.start for a, b in itertools.pairwise(parts))
    assert all(0 < p.n_samples <= 20 * FRAME_SAMPLES for p in parts)


def test_a_long_span_is_cut_in_its_pause():
    probabilities = np.ones(1_500, dtype=np.float32)
    probabilities[700:715] = 0.1  # a pause 22.4 s into 48 s of speech
    first, second = split_span(Span(0, 1_500 * FRAME_SAMPLES), probabilities)
    assert 700 * FRAME_SAMPLES <= first.end <= 715 * FRAME_SAMPLES
    assert second.n_samples <= MAX_WINDOW_SAMPLES


@given(spans_of_a_channel())
def test_coverage_adds_up_to_the_duration(channel):
    spans, n_samples = channel
    covered = coverage(0, n_samples, spans)
    assert abs(covered.speech + covered.silence + covered.skipped - n_samples / 16_000) < 1e-9
    assert covered.silence >= 0


def test_a_lost_and_a_doubled_window_are_noticed():
    spans = [Span(0, 16_000), Span(600_000, 640_000)]
    windows = pack_windows(spans, 0)
    assert coverage_breach(700_000, spans, windows) is None
    assert "not in one window" in (coverage_breach(700_000, spans, windows[:-1]) or "")
    assert "overlaps" in (coverage_breach(700_000, spans, [windows[0], *windows]) or "")
    assert "leaves" in (coverage_breach(630_000, spans, windows) or "")
