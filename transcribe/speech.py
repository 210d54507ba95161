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

# A pause inside a window longer than this is shortened to it: recognisers spend time on
# silence, and invent text in it.
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
class Piece:
    """Part of a window: source samples `start` to `end` placed at `offset` in the window."""

    start: int
    end: int
    offset: int


@dataclass(frozen=True, slots=True)
class Window:
    """What an engine hears: up to 30 s of one channel, in time order."""

    channel: int
    pieces: tuple[Piece, ...]

    @property
    def n_samples(self) -> int:
        """Length in samples, without padding."""
        last = self.pieces[-1]
        return last.offset + last.end - last.start

    @property
    def start(self) -> int:
        """First source sample."""
        return self.pieces[0].start

    @property
    def end(self) -> int:
        """Source sample after the last one."""
        return self.pieces[-1].end

    def cut(self, channel_samples: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        """The window's own samples, shape `[n_samples]`, cut from its whole channel."""
        return np.concatenate([channel_samples[p.start : p.end] for p in self.pieces])

    def source_sample(self, position: int, *, is_end: bool = False) -> int:
        """Source sample that stands at `position` samples into the window.

        Where two pieces meet, a segment's end belongs to the piece before and a start to
        the piece after. Positions outside the window are moved to its nearest edge.
        """
        for piece in self.pieces:
            piece_end = piece.offset + piece.end - piece.start
            if position < piece_end or (is_end and position == piece_end):
                return piece.start + max(0, position - piece.offset)
        return self.end


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

    Every speech sample lands in exactly one window. A pause of up to `max_pause` between
    two spans of a window stays as it is; a longer one is shortened to `max_pause`, half of
    it taken from either side.
    """
    windows: list[Window] = []
    pieces: list[Piece] = []
    for span in spans:
        extended = _extend(pieces, span, max_pause)
        if extended is None or _length(extended) > max_samples:
            if pieces:
                windows.append(Window(channel, tuple(pieces)))
            extended = [Piece(span.start, span.end, 0)]
        pieces = extended
    if pieces:
        windows.append(Window(channel, tuple(pieces)))
    return windows


def _extend(pieces: list[Piece], span: Span, max_pause: int) -> list[Piece] | None:
    """`pieces` with `span` appended; None when there is nothing to append to."""
    if not pieces:
        return None
    last = pieces[-1]
    pause = span.start - last.end
    if pause <= max_pause:
        return [*pieces[:-1], Piece(last.start, span.end, last.offset)]
    before, after = max_pause // 2, max_pause - max_pause // 2
    longer = Piece(last.start, last.end + before, last.offset)
    offset = longer.offset + longer.end - longer.start
    return [*pieces[:-1], longer, Piece(span.start - after, span.end, offset)]


def _length(pieces: Sequence[Piece]) -> int:
    last = pieces[-1]
    return last.offset + last.end - last.start


def is_dual_mono(samples: npt.NDArray[np.int16], correlation: float = 0.9) -> bool:
    """Whether all channels carry the same signal, so that one of them says everything.

    Args:
        samples: int16, shape `[n_channels, n_samples]`.
        correlation: Pearson correlation with the first channel from which another counts
            as the same: a stereo recording of one room is above it (0.99 and more), the two
            sides of a call are near 0, whatever their levels.
    """
    first = samples[0]
    return all(_correlation(first, other) >= correlation for other in samples[1:])


def _correlation(a: npt.NDArray[np.int16], b: npt.NDArray[np.int16]) -> float:
    """Correlation of two channels, minute by minute to bound memory; 1 if both are silent."""
    block = 60 * SAMPLE_RATE
    product = energy_a = energy_b = 0.0
    for start in range(0, len(a), block):
        x = a[start : start + block].astype(np.float32)
        y = b[start : start + block].astype(np.float32)
        product += float(np.dot(x, y))
        energy_a += float(np.dot(x, x))
        energy_b += float(np.dot(y, y))
    if not energy_a and not energy_b:
        return 1.0
    return product / max((energy_a * energy_b) ** 0.5, 1e-9)
