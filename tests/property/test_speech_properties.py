"""The arithmetic between speech and engines loses nothing, whatever the audio."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from transcribe.assemble import coverage, coverage_breach
from transcribe.speech import (
    FRAME_SAMPLES,
    MAX_WINDOW_SAMPLES,
    Span,
    Window,
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


def covered_once(spans, windows, n_samples):
    """How often each sample of the channel is heard."""
    heard = np.zeros(n_samples, dtype=int)
    for window in windows:
        for piece in window.pieces:
            heard[piece.start : piece.end] += 1
    return all((heard[s.start : s.end] == 1).all() for s in spans), heard.max(initial=0)


@given(spans_of_a_channel(), st.integers(2, 400))
def test_every_speech_sample_is_in_exactly_one_window(channel, max_pause):
    spans, n_samples = channel
    windows = pack_windows(spans, 0, max_samples=MAX, max_pause=max_pause)
    once, most = covered_once(spans, windows, n_samples)
    assert once
    assert most <= 1
    assert coverage_breach(n_samples, spans, windows) is None


@given(spans_of_a_channel(), st.integers(2, 400))
def test_windows_fit_and_their_pieces_follow_each_other(channel, max_pause):
    spans, n_samples = channel
    for window in pack_windows(spans, 0, max_samples=MAX, max_pause=max_pause):
        assert window.n_samples <= MAX
        position = 0
        for piece in window.pieces:
            assert piece.offset == position
            position += piece.end - piece.start
        assert len(window.cut(np.zeros(n_samples, dtype=np.int16))) == window.n_samples


@given(spans_of_a_channel(), st.integers(2, 400))
def test_window_times_lead_back_to_the_samples_they_came_from(channel, max_pause):
    spans, n_samples = channel
    source = np.arange(n_samples)
    for window in pack_windows(spans, 0, max_samples=MAX, max_pause=max_pause):
        cut = np.concatenate([source[p.start : p.end] for p in window.pieces])
        for position in range(0, window.n_samples, 97):
            assert window.source_sample(position) == cut[position]
        ends = [window.source_sample(p, is_end=True) for p in range(window.n_samples + 1)]
        assert ends == sorted(ends)
        assert window.source_sample(window.n_samples + 5, is_end=True) == window.end


def test_where_pieces_meet_an_end_is_before_the_pause_and_a_start_after_it():
    spans = [Span(0, 100), Span(1_000, 1_100)]
    (window,) = pack_windows(spans, 0, max_samples=MAX, max_pause=50)
    boundary = window.pieces[1].offset
    assert window.source_sample(boundary, is_end=True) == 125
    assert window.source_sample(boundary) == 975


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_long_spans_are_cut_into_parts_that_fit_and_join_up(n_frames, seed):
    probabilities = np.random.default_rng(seed).random(n_frames, dtype=np.float32)
    span = Span(0, n_frames * FRAME_SAMPLES)
    parts = split_span(span, probabilities, max_samples=20 * FRAME_SAMPLES)
    assert [parts[0].start, parts[-1].end] == [span.start, span.end]
    assert all(a.end == b.start for a, b in zip(parts, parts[1:], strict=False))
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
    windows = pack_windows(spans, 0, max_samples=MAX * 50, max_pause=100)
    assert coverage_breach(700_000, spans, windows) is None
    assert "no window" in (coverage_breach(700_000, spans, windows[:-1]) or "")
    doubled = [*windows, Window(0, windows[0].pieces)]
    assert "two" in (coverage_breach(700_000, spans, doubled) or "")
