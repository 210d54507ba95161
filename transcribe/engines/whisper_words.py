"""When each word was said: token alignments -> words inside their phrases.

Owns the arithmetic from cross-attention to word times. Pure; knows no model runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt

from transcribe.engines.base import HypothesisSegment, HypothesisWord
from transcribe.engines.whisper_tokens import Phrase, WhisperTokens
from transcribe.engines.word_edges import sharpened

_MEDIAN_FILTER_FRAMES = 7


@dataclass(frozen=True, slots=True)
class Alignment:
    """Where the tokens of one window's text lie.

    Attributes:
        starts_s: when each token begins, and last when the text ends: `[n_tokens + 1]`
            seconds, ascending.
        probabilities: of each token, given those before it: `[n_tokens]`.
    """

    starts_s: Sequence[float]
    probabilities: Sequence[float]


def timed_segments(
    tokens: WhisperTokens,
    phrases: Sequence[Phrase],
    alignment: Alignment,
    language: str,
    samples: npt.NDArray[np.int16],
) -> tuple[HypothesisSegment, ...]:
    """Phrases with their words' times.

    Args:
        tokens: the checkpoint's token language.
        phrases: what was said.
        alignment: of all tokens of all phrases.
        language: code, which tells where words end.
        samples: int16 mono at 16 kHz, shape `[n_samples]`: the window.

    Returns:
        A segment for each phrase. A word lasts from its first token to the next word's, less
        the silence between them, and never leaves its phrase; its probability is the mean of
        its tokens'.
    """
    said: list[HypothesisWord] = []
    counts: list[int] = []
    first = 0
    for phrase in phrases:
        before = len(said)
        for word, count in tokens.words(phrase.ids, language):
            start, end = alignment.starts_s[first], alignment.starts_s[first + count]
            probability = float(np.mean(alignment.probabilities[first : first + count]))
            if word:
                said.append(HypothesisWord(word, start, end, probability))
            first += count
        counts.append(len(said) - before)
    words = iter(sharpened(said, samples))
    return tuple(
        _segment(tokens, phrase, list(islice(words, count)))
        for phrase, count in zip(phrases, counts, strict=True)
    )


def _segment(
    tokens: WhisperTokens, phrase: Phrase, words: Sequence[HypothesisWord]
) -> HypothesisSegment:
    def inside(time: float) -> float:
        return min(max(time, phrase.start_s), phrase.end_s)

    kept = tuple(replace(w, start_s=inside(w.start_s), end_s=inside(w.end_s)) for w in words)
    return HypothesisSegment(phrase.start_s, phrase.end_s, tokens.text(phrase.ids), kept)


def token_starts(path: Sequence[tuple[int, int]], n_tokens: int, frame_s: float) -> list[float]:
    """First frame of each token along a path of (token, frame) pairs, in seconds.

    Returns:
        `[n_tokens]`, ascending; a token that the path leaves out starts with the next one.
    """
    starts: list[float] = []
    for token, frame in path:
        while len(starts) <= token:
            starts.append(frame * frame_s)
    last = path[-1][1] * frame_s if path else 0.0
    return (starts + [last] * n_tokens)[:n_tokens]


def attention_path(weights: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """Where tokens look: attention normalised over tokens, smoothed over frames, averaged, warped.

    As in Whisper's word timestamps.

    Args:
        weights: attention of the alignment heads, `[n_heads, n_tokens, n_frames]`.

    Returns:
        (token, frame) pairs; see `time_warping_path`.
    """
    mean = weights.mean(axis=-2, keepdims=True)
    std = weights.std(axis=-2, keepdims=True)
    normal = (weights - mean) / np.maximum(std, 1e-6)
    return time_warping_path(_median_filter(normal).mean(axis=0))


def _median_filter(weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Running median over the last axis, edges mirrored; short inputs stay as they are."""
    half = _MEDIAN_FILTER_FRAMES // 2
    if weights.shape[-1] <= half:
        return weights
    edges = [(0, 0)] * (weights.ndim - 1) + [(half, half)]
    padded = np.pad(weights, edges, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, _MEDIAN_FILTER_FRAMES, axis=-1)
    filtered: npt.NDArray[np.float32] = np.partition(windows, half, axis=-1)[..., half]
    return filtered


def time_warping_path(scores: npt.NDArray[np.float32]) -> list[tuple[int, int]]:
    """The monotonic path through `scores` with the greatest sum (dynamic time warping).

    Sakoe & Chiba 1978, with steps right, down and diagonal, as Whisper aligns its tokens. One
    antidiagonal at a time, since its cells do not depend on one another.

    Args:
        scores: `[n_tokens, n_frames]`.

    Returns:
        (token, frame) pairs from (0, 0) to the last of both.
    """
    n, m = scores.shape
    best = np.full((n + 1, m + 1), -np.inf)
    best[0, 0] = 0.0
    came = np.zeros((n, m), dtype=np.int8)
    for diagonal in range(n + m - 1):
        i = np.arange(max(0, diagonal - m + 1), min(n, diagonal + 1))
        j = diagonal - i
        before = np.stack([best[i, j], best[i, j + 1], best[i + 1, j]])  # diagonal, down, right
        choice = before.argmax(axis=0)
        came[i, j] = choice
        best[i + 1, j + 1] = before.max(axis=0) + scores[i, j]
    path = []
    at, frame = n - 1, m - 1
    while at >= 0 and frame >= 0:
        path.append((at, frame))
        step = came[at, frame]
        at -= step != 2
        frame -= step != 1
    return [(int(a), int(f)) for a, f in reversed(path)]
