"""Where the speech is: samples -> spans -> windows of up to 30 s.

Owns the voice activity model (Silero VAD, its ONNX "sequence" form: one call per 16 s of
audio) and the arithmetic that packs spans into windows. Knows nothing of files, engines or
rows. All positions are sample indices at 16 kHz, so that nothing is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from transcribe.decode import SAMPLE_RATE

FRAME_SAMPLES = 512  # Silero VAD judges 32 ms at a time
MAX_WINDOW_SAMPLES = 30 * SAMPLE_RATE  # what Whisper was trained to hear at once

# Speech on both sides of a longer pause is recognised apart. Whisper tends to stop at a long
# pause and drop what follows, and turns of a call stay in order only if they stay apart
# (docs/decisions.md has the figures).
MAX_PAUSE_SAMPLES = SAMPLE_RATE

_THRESHOLD = 0.5
_MIN_SPEECH_MS = 100  # a "no" on the telephone lasts 150 ms; Silero's own default drops it
_MIN_SILENCE_MS = 300
_PAD_MS = 200  # consonants at the edges are quieter than the detector's threshold


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of speech in one channel, `start` to `end` in samples (end excluded)."""

    start: int
    end: int

    @property
    def n_samples(self) -> int:
        """Length in samples."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Window:
    """What an engine hears: up to 30 s of one channel, `start` to `end` in samples."""

    channel: int
    start: int
    end: int

    @property
    def n_samples(self) -> int:
        """Length in samples, without padding."""
        return self.end - self.start


class SpeechDetector:
    """Speech probabilities by Silero VAD (https://github.com/snakers4/silero-vad)."""

    def __init__(self) -> None:
        from silero_vad import load_silero_vad

        self._model: Any = load_silero_vad(sequence=True)

    def probabilities(self, samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        """Speech probability of each 32 ms frame, shape `[ceil(n_samples / 512)]`."""
        block = self._model.max_frames * FRAME_SAMPLES
        if not len(samples):
            return np.zeros(0, dtype=np.float32)
        as_float = np.empty(len(samples), dtype=np.float32)
        for first in range(0, len(samples), block):
            np.multiply(
                samples[first : first + block], 1 / 32768, out=as_float[first : first + block]
            )
        result: npt.NDArray[np.float32] = self._model.audio_forward(as_float)
        return result

    def spans(self, samples: npt.NDArray[np.int16]) -> list[Span]:
        """Stretches of speech in one channel (`samples`: shape `[n_samples]`, 16 kHz).

        Sorted, not overlapping, none longer than a window; a long one is cut at its
        weakest moment.
        """
        from silero_vad import get_speech_timestamps_from_probs

        probabilities = self.probabilities(samples)
        found = get_speech_timestamps_from_probs(
            probabilities.tolist(),
            sampling_rate=SAMPLE_RATE,
            threshold=_THRESHOLD,
            min_speech_duration_ms=_MIN_SPEECH_MS,
            min_silence_duration_ms=_MIN_SILENCE_MS,
            speech_pad_ms=_PAD_MS,
            audio_length_samples=len(samples),
        )
        spans = [Span(int(f["start"]), int(f["end"])) for f in found if f["end"] > f["start"]]
        return [part for span in spans for part in split_span(span, probabilities)]


def split_span(
    span: Span,
    probabilities: npt.NDArray[np.float32],
    max_samples: int = MAX_WINDOW_SAMPLES,
) -> list[Span]:
    """Cut a span into parts of at most `max_samples`, at pauses where there are any.

    The cut falls on the frame with the lowest speech probability (smoothed over five
    frames) in the second half of what fits: a pause between words if there is one.
    """
    parts = []
    start = span.start
    smoothed = np.convolve(probabilities, np.full(5, 0.2, dtype=np.float32), mode="same")
    while span.end - start > max_samples:
        first = (start + max_samples // 2) // FRAME_SAMPLES + 1
        last = (start + max_samples) // FRAME_SAMPLES
        candidates = smoothed[first:last]
        frame = first + int(candidates.argmin()) if len(candidates) else last
        cut = min(frame * FRAME_SAMPLES, start + max_samples)
        parts.append(Span(start, cut))
        start = cut
    return [*parts, Span(start, span.end)]


def pack_windows(
    spans: Sequence[Span],
    channel: int,
    max_samples: int = MAX_WINDOW_SAMPLES,
    max_pause: int = MAX_PAUSE_SAMPLES,
) -> list[Window]:
    """Put neighbouring spans of one channel together into windows of at most `max_samples`.

    Spans share a window only if the pause between them is at most `max_pause`; it stays in
    the window as it is. Every speech sample lands in exactly one window.
    """
    windows: list[Window] = []
    for span in spans:
        last = windows[-1] if windows else None
        if last and span.start - last.end <= max_pause and span.end - last.start <= max_samples:
            windows[-1] = Window(channel, last.start, span.end)
        else:
            windows.append(Window(channel, span.start, span.end))
    return windows


def distinct_channels(samples: npt.NDArray[np.int16], correlation: float = 0.9) -> list[int]:
    """The channels that say something of their own; the others repeat one of these.

    Args:
        samples: int16, shape `[n_channels, n_samples]`.
        correlation: Pearson correlation from which two channels count as the same: two
            channels of one room are above it (0.99 and more), the two sides of a call are
            near 0, whatever their levels.

    Returns:
        Indices of channels, ascending, never empty. Silent channels are left out when
        another one is not silent.
    """
    sounding = [i for i in range(len(samples)) if samples[i].any()]
    distinct: list[int] = []
    for channel in sounding:
        if all(_correlation(samples[channel], samples[i]) < correlation for i in distinct):
            distinct.append(channel)
    return distinct or [0]


def _correlation(a: npt.NDArray[np.int16], b: npt.NDArray[np.int16]) -> float:
    """Correlation of two channels, taken minute by minute to bound memory; 0 with silence."""
    block = 60 * SAMPLE_RATE
    product = energy_a = energy_b = 0.0
    for start in range(0, len(a), block):
        x = a[start : start + block].astype(np.float32)
        y = b[start : start + block].astype(np.float32)
        product += float(np.dot(x, y))
        energy_a += float(np.dot(x, x))
        energy_b += float(np.dot(y, y))
    scale = max((energy_a * energy_b) ** 0.5, 1e-9)
    return product / float(scale)
