"""Word times, sharpened by the silence that is heard between words.

A model tells roughly where a word lies: Whisper's attention leaves no room for pauses, CTC
tokens peak inside their sound. Where the signal itself falls silent near such an edge, the edge
is moved there. Owns this arithmetic; pure, knows no model.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transcribe.decode import SAMPLE_RATE
from transcribe.engines.base import HypothesisWord

_FRAME_S = 0.01
_FRAME_SAMPLES = round(_FRAME_S * SAMPLE_RATE)
_MIN_SILENCE_FRAMES = 6  # the closure of a "t" is shorter, and is no pause
# The level that parts silence from speech: this share of the way from the quietest to the
# loudest frames, in dB. Without 15 dB between the two there is nothing to tell apart.
_SILENCE_SHARE = 0.3
_MIN_RANGE_DB = 15.0

Run = tuple[float, float]


def sharpened(
    words: Sequence[HypothesisWord], samples: npt.NDArray[np.int16]
) -> list[HypothesisWord]:
    """Move the edges of neighbouring words to the silence between their middles.

    Args:
        words: in time order, not overlapping, times in seconds from the first sample.
        samples: int16 mono at 16 kHz, shape `[n_samples]`, in which they were said.

    Returns:
        The same words, still in order, none outside `samples` that was inside before.
    """
    runs = silent_runs(samples)
    if not words or not runs:
        return list(words)
    middles = [(w.start_s + w.end_s) / 2 for w in words]
    lefts = [0.0, *middles]
    rights = [*middles, len(samples) / SAMPLE_RATE]
    starts = [w.start_s for w in words]
    ends = [w.end_s for w in words]
    for gap, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        silence = _longest_between(runs, left, right)
        if silence is None:
            continue
        if gap > 0:
            ends[gap - 1] = max(silence[0], starts[gap - 1])
        if gap < len(words):
            starts[gap] = min(max(silence[1], ends[gap - 1] if gap else 0.0), ends[gap])
    return [
        HypothesisWord(word.word, start, max(start, end), word.probability)
        for word, start, end in zip(words, starts, ends, strict=True)
    ]


def _longest_between(runs: Sequence[Run], left: float, right: float) -> Run | None:
    """The run that reaches into [left, right] and is the longest of these; runs are in order."""
    first = bisect_right(runs, left, key=lambda run: run[1])
    end = bisect_left(runs, right, key=lambda run: run[0])
    return max(runs[first:end], key=lambda run: run[1] - run[0], default=None)


def silent_runs(samples: npt.NDArray[np.int16]) -> list[Run]:
    """Stretches of at least 60 ms in which nothing is heard, in seconds, in time order."""
    n_frames = len(samples) // _FRAME_SAMPLES
    if n_frames < _MIN_SILENCE_FRAMES:
        return []
    frames = samples[: n_frames * _FRAME_SAMPLES].reshape(n_frames, -1).astype(np.float32)
    power = np.einsum("ij,ij->i", frames, frames) / _FRAME_SAMPLES  # no copy of all samples
    level = 10 * np.log10(power + 1.0)
    quiet, loud = np.percentile(level, [5, 95])
    if loud - quiet < _MIN_RANGE_DB:
        return []
    is_silent = level < quiet + _SILENCE_SHARE * (loud - quiet)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_silent, [False]]).astype(np.int8)))
    return [
        (first * _FRAME_S, end * _FRAME_S)
        for first, end in edges.reshape(-1, 2).tolist()
        if end - first >= _MIN_SILENCE_FRAMES
    ]
