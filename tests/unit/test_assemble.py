"""Hypotheses become one transcript: absolute times, one order, flags, a proof of coverage."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from transcribe.assemble import Word, assemble, coverage, coverage_breach, hypothesis_flags
from transcribe.engines.base import Hypothesis, HypothesisSegment, HypothesisWord
from transcribe.speech import Span, Window, WindowPacker

SECOND = 16_000


def pack_windows(spans: list[Span], channel: int) -> list[Window]:
    packer = WindowPacker(channel)
    return packer.push(spans, 0) + packer.finish()


def window(channel: int, start_s: float, end_s: float) -> Window:
    return Window(channel, round(start_s * SECOND), round(end_s * SECOND))


def heard(*segments: tuple[float, float, str], **facts: float | str) -> Hypothesis:
    return Hypothesis(tuple(HypothesisSegment(*s) for s in segments), **facts)  # type: ignore[arg-type]


def test_times_are_those_of_the_recording() -> None:
    made = assemble([window(0, 10.5, 20)], [heard((0.0, 1.25, "one"), (1.25, 9.5, "two"))])
    assert [(s.start, s.end) for s in made.segments] == [(10.5, 11.75), (11.75, 20.0)]


def test_channels_are_interleaved_by_start() -> None:
    windows = [window(0, 0, 5), window(0, 10, 15), window(1, 4, 9)]
    hypotheses = [
        heard((0, 2, "hello"), (3, 5, "who is it")),
        heard((0, 4, "goodbye")),
        heard((0, 4, "it is me")),
    ]
    made = assemble(windows, hypotheses)
    assert made.text == "hello who is it it is me goodbye"
    assert [s.channel for s in made.segments] == [0, 0, 1, 0]


def test_segments_that_start_together_stand_in_order_of_channel() -> None:
    made = assemble([window(1, 0, 5), window(0, 0, 5)], [heard((0, 1, "b")), heard((0, 2, "a"))])
    assert made.text == "a b"


@pytest.mark.parametrize(
    ("facts", "flags", "is_text"),
    [
        ({"avg_logprob": -0.2}, (), True),
        ({"avg_logprob": -0.2, "no_speech_prob": 0.99}, (), True),
        ({"avg_logprob": -1.1}, ("low_confidence",), True),
        ({"avg_logprob": -1.1, "no_speech_prob": 0.7}, ("no_speech", "low_confidence"), False),
        ({"avg_logprob": -0.2, "compression_ratio": 2.5}, ("loop",), False),
        # Whisper's limits themselves are still good.
        ({"avg_logprob": -1.0, "no_speech_prob": 0.6, "compression_ratio": 2.4}, (), True),
    ],
)
def test_flags_keep_a_segment_and_may_keep_it_out_of_the_text(
    facts: dict[str, float], flags: tuple[str, ...], is_text: bool
) -> None:
    said, doubtful = heard((0, 1, "said"), avg_logprob=-0.1), heard((0, 1, "doubtful"), **facts)
    assert hypothesis_flags(doubtful, 1.0) == flags
    made = assemble([window(0, 0, 1), window(0, 3, 4)], [said, doubtful])
    assert [s.text for s in made.segments] == ["said", "doubtful"]
    assert [s.flags for s in made.segments] == [(), flags]
    assert made.text == ("said doubtful" if is_text else "said")


@pytest.mark.parametrize(
    ("text", "language", "seconds", "is_too_fast"),
    [
        ("x" * 60, "en", 2.0, False),
        ("x" * 61, "en", 2.0, True),
        ("x" * 30, "en", 0.1, False),  # a clipped word is not judged by its length
        ("字" * 31, "zh", 2.0, True),  # as many characters as nobody says, though 60 letters pass
        ("字" * 30, "zh", 2.0, False),
    ],
)
def test_more_text_than_can_be_said_is_flagged(text, language, seconds, is_too_fast) -> None:
    said = heard((0, seconds, text), language=language)
    assert ("too_fast" in hypothesis_flags(said, seconds)) is is_too_fast
    assert assemble([window(0, 0, seconds)], [said]).text == ("" if is_too_fast else text)


@pytest.mark.parametrize(
    ("text", "facts", "is_invented"),
    [
        ("Thanks for watching!", {"language": "en"}, True),
        ("Thank you for watching.", {"language": "de"}, True),  # English credits come everywhere
        ("Untertitel der Amara.org-Community", {"language": "de"}, True),
        ("ご視聴ありがとうございました。", {"language": "ja"}, True),
        ("Thanks for watching the house.", {"language": "en"}, False),
        ("Thank you.", {"language": "en", "avg_logprob": -0.3}, False),  # callers do say this
        ("Thank you.", {"language": "en", "avg_logprob": -0.9}, True),
        ("Thank you.", {"language": "en", "no_speech_prob": 0.5}, True),
        ("Thank you, that is all.", {"language": "en", "no_speech_prob": 0.5}, False),
        ("Thanks for watching!", {}, False),  # CTC models write what they hear
    ],
)
def test_sentences_known_to_be_made_up_are_flagged(text, facts, is_invented) -> None:
    (segment,) = assemble([window(0, 0, 5)], [heard((0, 2, text), **facts)]).segments
    assert ("known_hallucination" in segment.flags) is is_invented


def test_a_made_up_sentence_does_not_cost_its_neighbours() -> None:
    both = heard((0, 2, "Goodbye."), (2, 4, "Thanks for watching!"), language="en")
    made = assemble([window(0, 0, 5)], [both])
    assert made.text == "Goodbye."
    assert [s.text for s in made.segments] == ["Goodbye.", "Thanks for watching!"]


def test_what_is_written_behind_the_window_is_kept_out_of_the_text() -> None:
    """As the engine gives it: times beyond the window are drawn to its end."""
    said = heard((0, 5, "Good day."), (5, 5, "You"), (5, 5, "You"), language="en")
    made = assemble([window(0, 7, 12)], [said])
    assert made.text == "Good day."
    assert [s.flags for s in made.segments] == [(), ("after_end",), ("after_end",)]


def test_words_get_the_times_of_the_recording() -> None:
    word = HypothesisWord("one", 0.25, 0.5, 0.9)
    spoken = Hypothesis((HypothesisSegment(0.0, 1.0, "one", (word,)),))
    (segment,) = assemble([window(0, 10, 12)], [spoken]).segments
    assert segment.words == (Word("one", 10.25, 10.5, 0.9),)


def test_a_segment_carries_what_the_engine_measured() -> None:
    facts = {
        "avg_logprob": -0.5,
        "compression_ratio": 1.5,
        "no_speech_prob": 0.25,
        "temperature": 0.2,
    }
    (segment,) = assemble([window(1, 0, 1)], [heard((0, 1, "x"), **facts)]).segments
    assert {name: getattr(segment, name) for name in facts} == facts


def test_the_language_is_that_of_the_longest_window_with_text() -> None:
    windows = [window(0, 0, 5), window(0, 10, 19), window(0, 20, 50)]
    hypotheses = [
        heard((0, 1, "yes"), language="en", language_probability=0.9),
        heard((0, 9, "ja"), language="de", language_probability=0.6),
        heard(language="fr", language_probability=0.99),
    ]
    made = assemble(windows, hypotheses)
    assert (made.language, made.language_probability) == ("de", 0.6)


def test_nothing_heard_is_no_text_and_no_language() -> None:
    for made in (assemble([], []), assemble([window(0, 0, 5)], [heard(language="en")])):
        assert (made.text, made.segments) == ("", ())
        assert (made.language, made.language_probability) == (None, None)


def test_a_lost_hypothesis_is_an_error() -> None:
    with pytest.raises(ValueError):
        assemble([window(0, 0, 5)], [])


cuts = st.lists(st.integers(0, 100 * SECOND), max_size=40, unique=True).map(sorted)
spans_of_a_channel = cuts.map(
    lambda at: [Span(a, min(b, a + 30 * SECOND)) for a, b in zip(at[::2], at[1::2], strict=False)]
)


@given(st.lists(spans_of_a_channel, min_size=1, max_size=3))
def test_every_segment_is_kept_in_order_and_in_its_window(channels: list[list[Span]]) -> None:
    windows = [w for c, spans in enumerate(channels) for w in pack_windows(spans, c)]
    hypotheses = [
        heard((0.0, w.n_samples / SECOND / 2, f"{i}a"), (0.0, w.n_samples / SECOND, f"{i}b"))
        for i, w in enumerate(windows)
    ]
    made = assemble(windows, hypotheses)
    assert sorted(made.text.split()) == sorted(f"{i}{x}" for i in range(len(windows)) for x in "ab")
    starts = [s.start for s in made.segments]
    assert starts == sorted(starts)
    for segment in made.segments:
        source = windows[int(segment.text[:-1])]
        assert segment.channel == source.channel
        # Published times are rounded to the millisecond.
        assert segment.start == pytest.approx(source.start / SECOND, abs=0.000_51)
        assert segment.start <= segment.end <= source.end / SECOND + 0.000_51


@given(spans_of_a_channel, st.integers(0, SECOND))
def test_coverage_adds_up_to_the_channel(spans: list[Span], rest: int) -> None:
    n_samples = (spans[-1].end if spans else 0) + rest
    covered = coverage(2, n_samples, spans)
    assert covered.channel == 2 and covered.skipped == 0
    assert covered.speech == pytest.approx(sum(s.n_samples for s in spans) / SECOND)
    assert covered.speech + covered.silence == pytest.approx(n_samples / SECOND)
    assert covered.silence >= 0


@given(spans_of_a_channel)
def test_packed_windows_pass_the_proof(spans: list[Span]) -> None:
    n_samples = spans[-1].end if spans else 0
    assert coverage_breach(n_samples, spans, pack_windows(spans, 0)) is None


@given(spans_of_a_channel, st.data())
def test_the_proof_finds_what_is_lost_doubled_or_cut(
    spans: list[Span], data: st.DataObject
) -> None:
    assume(spans)
    n_samples = spans[-1].end
    windows = pack_windows(spans, 0)
    at = data.draw(st.integers(0, len(windows) - 1))
    hurt = windows[at]
    lost = [*windows[:at], *windows[at + 1 :]]
    doubled = [*windows[: at + 1], *windows[at:]]
    cut = [*windows[:at], Window(0, hurt.start + 1, hurt.end), *windows[at + 1 :]]
    for wrong in (lost, doubled, cut):
        assert coverage_breach(n_samples, spans, wrong) is not None
    assert coverage_breach(n_samples - 1, spans, windows) is not None
    assert coverage_breach(n_samples, [spans[0], *spans], windows) is not None
