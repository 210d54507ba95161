"""Error rates: what counts as a word, an error, and nothing at all."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe.errors import Fatal
from transcribe.score import score_by_kind, score_texts

pytest.importorskip("jiwer", reason="needs the demo extra")
pytest.importorskip("whisper_normalizer", reason="needs the demo extra")

WORDS = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta"]), max_size=8).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)


def test_each_kind_of_error_is_counted():
    score = score_texts(["the red house is old"], ["the blue house is very old"], ["en"])
    assert (score.words, score.substitutions, score.insertions, score.deletions) == (5, 1, 1, 0)
    assert score.wer == pytest.approx(2 / 5)
    assert score_texts(["the red house"], ["the house"], ["en"]).deletions == 1


def test_english_spelling_numbers_and_punctuation_are_not_errors():
    said = "Colour, please: thirty five dollars!"
    assert score_texts([said], ["color please $35"], ["en-US"]).errors == 0


def test_rates_are_pooled_over_words_not_averaged_over_recordings():
    score = score_texts(["one", "a b c d e f g h i"], ["two", "a b c d e f g h i"], ["de", "de"])
    assert score.wer == pytest.approx(1 / 10)
    assert score.n_recordings == 2


def test_words_for_an_empty_reference_are_insertions():
    alone = score_texts(["..."], ["you you"], ["de"])
    assert (alone.words, alone.insertions) == (0, 2)
    assert math.isnan(alone.wer)
    beside = score_texts(["", "alpha beta"], ["you", "alpha beta"], ["en", "en"])
    assert (beside.words, beside.errors, beside.wer) == (2, 1, 0.5)


def test_an_empty_hypothesis_deletes_every_word():
    score = score_texts(["alpha beta gamma"], [""], [None])
    assert (score.deletions, score.wer) == (3, 1.0)


def test_nothing_to_score():
    score = score_texts([], [], [])
    assert (score.n_recordings, score.words, score.errors) == (0, 0, 0)
    assert math.isnan(score.wer)


@pytest.mark.parametrize(
    ("language", "reference", "hypothesis", "n_characters"),
    [("zh", "今天天气很好。", "今天天汽很好", 6), ("ja-JP", "ありがとう", "ありがとお", 5)],
)
def test_languages_without_spaces_count_characters(language, reference, hypothesis, n_characters):
    score = score_texts([reference], [hypothesis], [language])
    assert (score.words, score.errors) == (n_characters, 1)


def test_vowel_signs_do_not_break_words():
    assert score_texts(["हिन्दी भाषा"], ["हिन्दी भाषा"], ["hi"]).words == 2


@given(PAIRS)
def test_error_counts_account_for_every_word(pairs):
    references, hypotheses = zip(*pairs, strict=True)
    score = score_texts(references, hypotheses, ["de"] * len(pairs))
    written = sum(len(hypothesis.split()) for hypothesis in hypotheses)
    assert score.words == sum(len(reference.split()) for reference in references)
    assert score.words - score.deletions + score.insertions == written
    assert score_texts(references, references, ["de"] * len(pairs)).errors == 0


@given(PAIRS, st.data())
def test_kinds_add_up_to_the_whole(pairs, data):
    references, hypotheses = zip(*pairs, strict=True)
    languages = ["de"] * len(pairs)
    kinds = [data.draw(st.sampled_from(["call", "noise"])) for _ in pairs]
    whole = score_texts(references, hypotheses, languages)
    parts = score_by_kind(references, hypotheses, languages, kinds)
    assert list(parts) == list(dict.fromkeys(kinds))
    assert sum(part.errors for part in parts.values()) == whole.errors
    assert sum(part.words for part in parts.values()) == whole.words
    assert sum(part.n_recordings for part in parts.values()) == whole.n_recordings


def test_sequences_of_different_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        score_texts(["alpha", "beta"], ["alpha"], ["en", "en"])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(Fatal, match=r"transcribe\[demo\]"):
        score_texts(["alpha"], ["alpha"], ["en"])
