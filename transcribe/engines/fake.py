"""An engine without a model, for tests of everything around the engines.

Its text is a checksum of what it was given, so that a lost, doubled or shifted window
shows in the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from transcribe.engines.base import EngineInput, EngineWork, Hypothesis, HypothesisSegment
from transcribe.engines.fitting import Fitting


class FakeEngine:
    """Says `w<checksum>` for each window, over the window's whole length."""

    name = "fake"
    device = "cpu"

    def __init__(self) -> None:
        self.fitting = Fitting(8)
        self.work = EngineWork()

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
        return [self._hear(window) for window in batch]

    def _hear(self, window: EngineInput) -> Hypothesis:
        self.work.heard_samples += len(window.samples)
        self.work.padded_samples += len(window.samples)
        word = f"w{zlib.crc32(window.samples.tobytes()):08x}"
        segment = HypothesisSegment(0.0, len(window.samples) / 16_000, word)
        return Hypothesis(segments=(segment,), language="en", avg_logprob=-0.1)
