"""An engine without a model, for tests of everything around the engines.

Its text is a checksum of what it was given, so that a lost, doubled or shifted window
shows in the output. `--model fake` takes no time; `fake@40` takes a second for 40 s of speech, and
so stands for a machine of that speed.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence

from transcribe.engines.base import EngineInput, EngineWork, Hypothesis, HypothesisSegment
from transcribe.engines.fitting import Fitting
from transcribe.errors import Fatal

FAKE_MODEL = "fake"


def is_fake(model: str) -> bool:
    """Whether `--model` means this engine."""
    return model.partition("@")[0] == FAKE_MODEL


def fake_rtfx(model: str) -> float | None:
    """Seconds of speech a second that a `fake@RTFX` recognises; None for no waiting at all.

    Raises:
        Fatal: not a speed.
    """
    _, separator, figure = model.partition("@")
    if not separator:
        return None
    try:
        rtfx = float(figure)
    except ValueError:
        rtfx = 0.0
    if not 0 < rtfx < float("inf"):
        raise Fatal(f"--model {model!r}: write the speed as a number above 0, like fake@40.")
    return rtfx


class FakeEngine:
    """Says `w<checksum>` for each window, over the window's whole length."""

    name = "fake"
    device = "cpu"

    def __init__(self, rtfx: float | None = None) -> None:
        self.fitting = Fitting(8)
        self.work = EngineWork()
        self._rtfx = rtfx

    def recognise(self, windows: Sequence[EngineInput]) -> list[Hypothesis]:
        """One segment per window; the same samples always give the same word."""
        heard = dict(
            self.fitting.over(
                [1] * len(windows), lambda batch: self.hear([windows[i] for i in batch])
            )
        )
        return [heard[i] for i in range(len(windows))]

    def hear(self, batch: Sequence[EngineInput]) -> list[Hypothesis]:
        """What is heard at once; here a test lets memory run out."""
        if self._rtfx is not None:
            time.sleep(sum(len(w.samples) for w in batch) / 16_000 / self._rtfx)
        return [self._hear(window) for window in batch]

    def _hear(self, window: EngineInput) -> Hypothesis:
        self.work.heard_samples += len(window.samples)
        self.work.padded_samples += len(window.samples)
        word = f"w{zlib.crc32(window.samples.tobytes()):08x}"
        segment = HypothesisSegment(0.0, len(window.samples) / 16_000, word)
        return Hypothesis(segments=(segment,), language="en", avg_logprob=-0.1)
