"""Error rates: what counts as a word, an error, and nothing at all."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe.errors import Fatal
from transcribe.score import compare, pooled, score_texts

pytest.importorskip("jiwer", reason="needs the score extra")
pytest.importorskip("whisper_normalizer", reason="needs the score extra")

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


def test_an_apostrophe_of_a_word_processor_is_no_error():
    score = score_texts(["it\u2019s beauty\u2019s, I\u02bcve"], ["It's beauty's, I've"], ["en"])
    assert (score.errors, score.words) == (0, 6)


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


@given(PAIRS, st.integers(0, 6))
def test_parts_add_up_to_the_whole(pairs, cut):
    scores = [compare(reference, hypothesis, "de").score for reference, hypothesis in pairs]
    references, hypotheses = zip(*pairs, strict=True)
    whole = score_texts(references, hypotheses, ["de"] * len(pairs))
    assert pooled([pooled(scores[:cut]), pooled(scores[cut:])]) == whole
    assert whole.n_recordings == len(pairs)


@given(PAIRS)
def test_the_pieces_make_up_both_texts(pairs):
    for reference, hypothesis in pairs:
        pieces = compare(reference, hypothesis, "de").pieces
        assert [word for piece in pieces for word in piece.reference] == reference.split()
        assert [word for piece in pieces for word in piece.hypothesis] == hypothesis.split()
        for piece in pieces:
            assert (piece.reference == piece.hypothesis) == (piece.kind == "equal")


def test_characters_count_with_the_spaces_between_words():
    score = score_texts(["ab cd"], ["abcd e"], ["de"])
    assert (score.characters, score.character_errors, score.cer) == (5, 3, 3 / 5)
    assert score_texts(["今天"], ["今"], ["zh"]).cer == 1 / 2


def test_sequences_of_different_length_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        score_texts(["alpha", "beta"], ["alpha"], ["en", "en"])


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(Fatal, match=r"\.\[score\]"):
        score_texts(["alpha"], ["alpha"], ["en"])
