"""The arithmetic between speech and engines loses nothing, whatever the audio."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from silero_vad import load_silero_vad
from silero_vad.utils_vad import get_speech_timestamps_from_probs

from transcribe.assemble import coverage, coverage_breach
from transcribe.speech import (
    FRAME_SAMPLES,
    MAX_PAUSE_SAMPLES,
    MAX_WINDOW_SAMPLES,
    FrameJudge,
    Span,
    SpanFinder,
    Window,
    WindowPacker,
)
from transcribe.voice_activity import SpeechDetector

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


def pack_windows(
    spans: list[Span],
    channel: int,
    max_samples: int = MAX_WINDOW_SAMPLES,
    max_pause: int = MAX_PAUSE_SAMPLES,
) -> list[Window]:
    packer = WindowPacker(channel, max_samples, max_pause)
    return packer.push(spans, 0) + packer.finish()


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


@given(spans_of_a_channel(), st.integers(0, 400), st.data())
def test_windows_do_not_depend_on_when_their_spans_come(channel, max_pause, data):
    spans, n_samples = channel
    packer = WindowPacker(0, MAX, max_pause)
    windows: list[Window] = []
    left = list(spans)
    while left:
        n = data.draw(st.integers(1, len(left)))
        come, left = left[:n], left[n:]
        nothing_before = data.draw(st.integers(come[-1].end, left[0].start if left else n_samples))
        windows += packer.push(come, nothing_before)
        first_to_come = packer.settled(nothing_before)
        assert all(w.end <= first_to_come for w in windows)
    assert windows + packer.finish() == pack_windows(spans, 0, MAX, max_pause)


def whole_spans(
    probabilities: np.ndarray, n_samples: int, max_samples: int = MAX_WINDOW_SAMPLES
) -> list[Span]:
    """What Silero's own function finds in all of a channel at once, cut where it is too long."""
    found = get_speech_timestamps_from_probs(
        probabilities.tolist(),
        threshold=0.5,
        min_speech_duration_ms=100,
        min_silence_duration_ms=300,
        speech_pad_ms=200,
        audio_length_samples=n_samples,
    )
    smoothed = np.convolve(probabilities, np.full(5, 0.2, dtype=np.float32), mode="same")
    parts = []
    for speech in found:
        start, end = speech["start"], speech["end"]
        while end - start > max_samples:
            first = (start + max_samples // 2) // FRAME_SAMPLES + 1
            last = (start + max_samples) // FRAME_SAMPLES
            frame = first + int(smoothed[first:last].argmin()) if first < last else last
            cut = min(frame * FRAME_SAMPLES, start + max_samples)
            parts.append(Span(start, cut))
            start = cut
        if end > start:
            parts.append(Span(start, end))
    return parts


def streamed_spans(
    probabilities: np.ndarray, n_samples: int, cuts: list[int], max_samples: int
) -> list[Span]:
    finder = SpanFinder(max_samples)
    spans: list[Span] = []
    for some in np.split(probabilities, sorted(cuts)):
        spans += finder.push(some)
        assert all(span.end <= finder.settled for span in spans)
        still_to_come = finder.settled
        assert still_to_come <= len(probabilities) * FRAME_SAMPLES
    return spans + finder.finish(n_samples)


@st.composite
def channel_of_probabilities(draw):
    """Runs of speech, doubt and silence of a few frames to some seconds, and single frames."""
    runs = draw(
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.1, 0.36, 0.49, 0.51, 0.9]), st.integers(1, 90)),
            min_size=1,
            max_size=25,
        )
    )
    levels = np.repeat([level for level, _ in runs], [n for _, n in runs])
    seed = draw(st.integers(0, 2**32 - 1))
    noise = np.random.default_rng(seed).uniform(-0.09, 0.09, len(levels))
    probabilities = np.clip(levels + noise, 0, 1).astype(np.float32)
    missing = draw(st.integers(0, FRAME_SAMPLES - 1))  # of the last frame
    return probabilities, len(probabilities) * FRAME_SAMPLES - missing


@given(channel_of_probabilities(), st.lists(st.integers(0, 2_000), max_size=8), st.data())
@settings(max_examples=300)
def test_spans_of_a_stream_are_those_of_the_whole(channel, cuts, data):
    probabilities, n_samples = channel
    max_samples = data.draw(st.sampled_from([20 * FRAME_SAMPLES, 10_001, MAX_WINDOW_SAMPLES]))
    streamed = streamed_spans(probabilities, n_samples, cuts, max_samples)
    assert streamed == whole_spans(probabilities, n_samples, max_samples)


@given(st.integers(0, 2**32 - 1))
def test_look_back_is_bounded_while_somebody_speaks_without_a_pause(seed):
    probabilities = np.random.default_rng(seed).uniform(0.4, 1.0, 6_000).astype(np.float32)
    finder = SpanFinder()
    for at in range(0, len(probabilities), 500):
        finder.push(probabilities[at : at + 500])
        assert (at + 500) * FRAME_SAMPLES - finder.settled <= MAX_WINDOW_SAMPLES + 32_000


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 600_000), max_size=6))
@settings(max_examples=10, deadline=None)
def test_frames_are_judged_alike_however_the_samples_come(detector, seed, cuts):
    samples = (np.random.default_rng(seed).standard_normal(600_000) * 2_000).astype(np.int16)
    samples[200_000:300_000] = 0
    judge = FrameJudge(detector)
    pushed = [judge.push(some) for some in np.split(samples, sorted(cuts))]
    judged = np.concatenate([*pushed, judge.finish()])
    whole = FrameJudge(detector)
    assert np.array_equal(judged, np.concatenate([whole.push(samples), whole.finish()]))
    silero = load_silero_vad(sequence=True).audio_forward(samples.astype(np.float32) / 32768)
    assert np.allclose(judged, silero, atol=1e-4)


@pytest.fixture(scope="module")
def detector() -> SpeechDetector:
    return SpeechDetector()


def test_a_long_span_is_cut_in_its_pause():
    probabilities = np.ones(1_500, dtype=np.float32)
    probabilities[700:715] = 0.4  # a hesitation 22.4 s into 48 s of speech
    finder = SpanFinder()
    first, second = finder.push(probabilities) + finder.finish(1_500 * FRAME_SAMPLES)
    assert 700 * FRAME_SAMPLES <= first.end <= 715 * FRAME_SAMPLES
    assert second.n_samples <= MAX_WINDOW_SAMPLES
    assert (first.start, first.end, second.end) == (0, second.start, 1_500 * FRAME_SAMPLES)


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
