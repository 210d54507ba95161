"""An engine without a model, for tests of everything around the engines.

Its text is a checksum of what it was given, so that a lost, doubled or shifted window
shows in the output.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from transcribe.engines.base import EngineInput, Hypothesis, HypothesisSegment


class FakeEngine:
    """Says `w<checksum>` for each window, over the window's whole length."""

    name = "fake"
    device = "cpu"

    def recognise(self, windows: Sequence[EngineInput]) -> list[Hypothesis]:
        """One segment per window; the same samples always give the same word."""
        return [self._hear(w) for w in windows]

    def _hear(self, window: EngineInput) -> Hypothesis:
        word = f"w{zlib.crc32(window.samples.tobytes()):08x}"
        segment = HypothesisSegment(0.0, len(window.samples) / 16_000, word)
        return Hypothesis(segments=(segment,), language="en", avg_logprob=-0.1)
