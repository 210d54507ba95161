"""Hypotheses -> one transcript per recording: absolute times, flags, coverage.

Pure: knows windows, hypotheses and the output's fields, but no audio, files or Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from transcribe.decode import SAMPLE_RATE
from transcribe.engines.base import Hypothesis, HypothesisSegment
from transcribe.hallucinations import is_known_hallucination
from transcribe.languages import UNSPACED_LANGUAGES
from transcribe.speech import Span, Window

# Whisper's thresholds (Radford et al. 2022, section 4.5): what is beyond them after every
# retry is kept in `segments`, with a flag.
_NO_SPEECH_PROB = 0.6
_LOW_LOGPROB = -1.0
_LOOP_COMPRESSION_RATIO = 2.4
# Beyond what anybody says: fast readers reach 20 characters a second, 8 in Chinese or Japanese.
_CHARACTERS_PER_SECOND = 30.0
_IDEOGRAPHS_PER_SECOND = 15.0
_SHORTEST_SEGMENT_S = 0.01  # half a step of Whisper's timestamps

# Flags that say "this text was probably not spoken": left out of the transcript's `text`.
_NOT_SPOKEN = frozenset({"no_speech", "loop", "too_fast", "after_end", "known_hallucination"})


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a segment; times in seconds from the recording's start."""

    word: str
    start: float
    end: float
    probability: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A phrase of one channel; times in seconds from the recording's start.

    `words` is None where none were asked for.
    """

    channel: int
    start: float
    end: float
    text: str
    language: str | None
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    temperature: float
    flags: tuple[str, ...]
    words: tuple[Word, ...] | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Where the seconds of one channel went."""

    channel: int
    speech: float
    silence: float
    skipped: float


@dataclass(frozen=True, slots=True)
class Assembled:
    """The spoken part of a transcript row."""

    text: str
    language: str | None
    language_probability: float | None
    segments: tuple[Segment, ...]


def assemble(windows: Sequence[Window], hypotheses: Sequence[Hypothesis]) -> Assembled:
    """Join the hypotheses of one recording's windows.

    Args:
        windows: all windows of the recording.
        hypotheses: one for each window, in the same order.

    Returns:
        Segments of all channels ordered by start; `text` joins those that no flag calls
        unspoken; `language` is that of the longest-speaking hypothesis with text.
    """
    segments = [
        segment
        for window, hypothesis in zip(windows, hypotheses, strict=True)
        for segment in _segments(window, hypothesis)
    ]
    segments.sort(key=lambda s: (s.start, s.channel, s.end))
    spoken = [s.text for s in segments if not _NOT_SPOKEN & set(s.flags)]
    language = _language(windows, hypotheses)
    return Assembled(
        text=" ".join(spoken),
        language=language.language if language else None,
        language_probability=language.language_probability if language else None,
        segments=tuple(segments),
    )


def _segments(window: Window, hypothesis: Hypothesis) -> list[Segment]:
    duration_s = window.n_samples / SAMPLE_RATE
    shared = hypothesis_flags(hypothesis, duration_s)
    return [
        _segment(window, hypothesis, said, (*shared, *_own_flags(said, hypothesis, duration_s)))
        for said in hypothesis.segments
    ]


def _own_flags(
    said: HypothesisSegment, hypothesis: Hypothesis, duration_s: float
) -> tuple[str, ...]:
    """What is doubtful about one segment and no other of its window."""
    flags = {
        # Whisper hears silence behind the window, and may write into it what nobody said.
        "after_end": said.start_s > max(0.0, duration_s - _SHORTEST_SEGMENT_S),
        "known_hallucination": is_known_hallucination(said.text, hypothesis),
    }
    return tuple(name for name, raised in flags.items() if raised)


def _segment(
    window: Window, hypothesis: Hypothesis, said: HypothesisSegment, flags: tuple[str, ...]
) -> Segment:
    begin = window.start / SAMPLE_RATE
    words = None
    if said.words is not None:
        words = tuple(
            Word(w.word, round(begin + w.start_s, 3), round(begin + w.end_s, 3), w.probability)
            for w in said.words
        )
    return Segment(
        channel=window.channel,
        start=round(begin + said.start_s, 3),
        end=round(begin + said.end_s, 3),
        text=said.text,
        language=hypothesis.language,
        avg_logprob=hypothesis.avg_logprob,
        compression_ratio=hypothesis.compression_ratio,
        no_speech_prob=hypothesis.no_speech_prob,
        temperature=hypothesis.temperature,
        flags=flags,
        words=words,
    )


def hypothesis_flags(hypothesis: Hypothesis, duration_s: float) -> tuple[str, ...]:
    """What is doubtful about a whole hypothesis for a window of `duration_s` seconds.

    `no_speech`, `loop`, `low_confidence` are Whisper's own tests; `too_fast` is more text than
    can be said in the time.
    """
    unsure = hypothesis.avg_logprob < _LOW_LOGPROB
    pace = _CHARACTERS_PER_SECOND
    if hypothesis.language in UNSPACED_LANGUAGES:
        pace = _IDEOGRAPHS_PER_SECOND
    flags = {
        "no_speech": unsure and hypothesis.no_speech_prob > _NO_SPEECH_PROB,
        "loop": hypothesis.compression_ratio > _LOOP_COMPRESSION_RATIO,
        "too_fast": len(hypothesis.text) > pace * max(1.0, duration_s),
        "low_confidence": unsure,
    }
    return tuple(name for name, raised in flags.items() if raised)


def _language(windows: Sequence[Window], hypotheses: Sequence[Hypothesis]) -> Hypothesis | None:
    speaking = [(w.n_samples, h) for w, h in zip(windows, hypotheses, strict=True) if h.segments]
    return max(speaking, key=lambda pair: pair[0])[1] if speaking else None


def coverage(channel: int, n_samples: int, spans: Sequence[Span]) -> Coverage:
    """Account for one channel: what is not in a span is silence."""
    speech = sum(span.n_samples for span in spans)
    return Coverage(
        channel=channel,
        speech=speech / SAMPLE_RATE,
        silence=(n_samples - speech) / SAMPLE_RATE,
        skipped=0.0,
    )


def coverage_breach(n_samples: int, spans: Sequence[Span], windows: Sequence[Window]) -> str | None:
    """Prove that one channel's speech is recognised once and whole.

    Args:
        n_samples: the channel's length in samples.
        spans: its speech.
        windows: its windows.

    Returns:
        None when spans and windows lie in the channel in order, without overlap, and every
        span lies in one window; else a sentence that says what is wrong.
    """
    end = 0
    for span in spans:
        if span.start < end or span.end > n_samples or span.n_samples <= 0:
            return f"speech span {span.start}-{span.end} overlaps or leaves the channel"
        end = span.end
    position = 0
    remaining = deque(spans)
    for window in windows:
        if window.start < position or window.end > n_samples:
            return f"window {window.start}-{window.end} overlaps or leaves the channel"
        position = window.end
        while remaining and window.start <= remaining[0].start and remaining[0].end <= window.end:
            remaining.popleft()
    if remaining:
        return f"speech span {remaining[0].start}-{remaining[0].end} is not in one window"
    return None
