"""Where the speech is: samples -> spans -> windows of up to 30 s, all as a stream.

Owns how a channel's samples are put to the speech detector, and the arithmetic that packs spans
into windows. Knows nothing of files, engines or rows, nor of the network. All positions are
sample indices at 16 kHz, so that nothing is lost to rounding.

Samples come in pieces of any length, and what is found does not depend on how they were cut.
Each step says how far it is `settled`: nothing that it will still find begins before that sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from transcribe.decode import SAMPLE_RATE
from transcribe.resampling import Floats

FRAME_SAMPLES = 512  # Silero VAD judges 32 ms at a time
MAX_WINDOW_SAMPLES = 30 * SAMPLE_RATE  # what Whisper was trained to hear at once

# Speech on both sides of a longer pause is recognised apart. Whisper tends to stop at a long
# pause and drop what follows, and turns of a call stay in order only if they stay apart
# (docs/decisions.md has the figures).
MAX_PAUSE_SAMPLES = SAMPLE_RATE

_THRESHOLD = 0.5
_NOT_SPEECH = _THRESHOLD - 0.15  # Silero's own distance
_MIN_SPEECH_MS = 100  # a "no" on the telephone lasts 150 ms; Silero's own default drops it
_MIN_SILENCE_MS = 300
_FIVE_FRAMES = np.full(5, 0.2, dtype=np.float32)
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


class Detector(Protocol):
    """The network that judges frames (`voice_activity.py`)."""

    block_frames: int

    def judge(self, frames: Floats, state: Any) -> tuple[Floats, Any]:
        """Frames that follow each other -> their speech probabilities, and the state after them.

        Args:
            frames: float32 `[n, 64 + 512]`, each behind the last samples of the one before.
            state: what was returned with the frames before these; None: there are none.
        """
        ...


class FrameJudge:
    """Speech probability of each 32 ms frame of one channel, as its samples come.

    The model hears each frame with the last 64 samples of the one before and keeps a state from
    block to block. Blocks always begin at the same samples, so the numbers are always the same.
    """

    _CONTEXT = 64

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._waiting: list[npt.NDArray[np.int16]] = []
        self._n_waiting = 0
        self._context = np.zeros(self._CONTEXT, np.float32)
        self._state: Any = None

    def push(self, samples: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        """Take samples, shape `[n]`; return the probabilities of the frames now judged."""
        self._waiting.append(samples)
        self._n_waiting += len(samples)
        size = self._detector.block_frames * FRAME_SAMPLES
        if self._n_waiting < size:
            return np.zeros(0, np.float32)
        joined = np.concatenate(self._waiting)
        n_whole = len(joined) // size * size
        self._waiting, self._n_waiting = [joined[n_whole:].copy()], len(joined) - n_whole
        judged = [self._judge(joined[at : at + size]) for at in range(0, n_whole, size)]
        return np.concatenate(judged)

    def finish(self) -> npt.NDArray[np.float32]:
        """The probabilities of the last frames; the very last is filled up with silence."""
        rest = np.concatenate(self._waiting) if self._waiting else np.zeros(0, np.int16)
        return self._judge(rest) if len(rest) else np.zeros(0, np.float32)

    def _judge(self, block: npt.NDArray[np.int16]) -> npt.NDArray[np.float32]:
        n_frames = -(-len(block) // FRAME_SAMPLES)
        heard = np.zeros((n_frames, FRAME_SAMPLES), np.float32)
        np.multiply(block, np.float32(1 / 32768), out=heard.reshape(-1)[: len(block)])
        frames = np.empty((n_frames, self._CONTEXT + FRAME_SAMPLES), np.float32)
        frames[:, self._CONTEXT :] = heard
        frames[0, : self._CONTEXT], frames[1:, : self._CONTEXT] = (
            self._context,
            heard[:-1, -self._CONTEXT :],
        )
        self._context = heard[-1, -self._CONTEXT :].copy()
        judged, self._state = self._detector.judge(frames, self._state)
        return judged


class SpanFinder:
    """Speech probabilities of one channel -> spans, as they come.

    The rules are those of Silero's `get_speech_timestamps_from_probs`: speech begins with a frame
    of probability 0.5 and ends before 300 ms below 0.35; what lasts 100 ms or less is dropped;
    the rest gets 200 ms on both sides, or half of the silence to its neighbour. A span longer
    than a window is cut where it is weakest.
    """

    _MIN_SPEECH = _MIN_SPEECH_MS * SAMPLE_RATE // 1000
    _MIN_SILENCE = _MIN_SILENCE_MS * SAMPLE_RATE // 1000
    _PAD = _PAD_MS * SAMPLE_RATE // 1000

    def __init__(self, max_samples: int = MAX_WINDOW_SAMPLES) -> None:
        self._max_samples = max_samples
        self._probabilities = np.zeros(0, np.float32)
        self._first_frame = 0  # of those kept
        self._at = 0  # sample at which the next frame begins
        # The speech before the current one: where what is not yet said of it begins, where it ends.
        self._before: tuple[int, int] | None = None
        self._start: int | None = None  # of the current speech, if there is one
        self._pause: int | None = None  # where in it a silence began
        self._from: int | None = None  # like the first of `_before`, once it is long enough
        self._found: list[Span] = []

    @property
    def settled(self) -> int:
        """No span that is still to come begins before this sample."""
        if self._before is not None:
            return self._before[0]
        if self._from is not None:
            return self._from
        return max(0, (self._at if self._start is None else self._start) - self._PAD)

    def push(self, probabilities: npt.NDArray[np.float32]) -> list[Span]:
        """Take the next frames' probabilities; return the spans that are now certain."""
        self._probabilities = np.concatenate((self._probabilities, probabilities))
        for probability in probabilities.tolist():
            self._hear(probability)
            self._at += FRAME_SAMPLES
        self._forget()
        return self._take()

    def finish(self, n_samples: int) -> list[Span]:
        """The last spans of a channel of `n_samples`."""
        if self._start is not None and n_samples - self._start > self._MIN_SPEECH:
            self._keep(self._start)
            assert self._from is not None
            self._before = self._from, n_samples
        if self._before is not None:
            self._close(min(n_samples, self._before[1] + self._PAD))
        return self._take()

    def _hear(self, probability: float) -> None:
        at = self._at
        if probability >= _THRESHOLD:
            self._pause = None
            if self._start is None:
                self._start = at
                return
        elif probability < _NOT_SPEECH and self._start is not None:
            self._pause = at if self._pause is None else self._pause
            if at - self._pause >= self._MIN_SILENCE:
                if self._pause - self._start > self._MIN_SPEECH:
                    self._keep(self._start)
                    assert self._from is not None
                    self._before = self._from, self._pause
                self._start = self._pause = self._from = None
        if self._start is not None:
            sure = at if self._pause is None else self._pause
            if sure - self._start > self._MIN_SPEECH:
                self._keep(self._start)
                # Two frames more, because the frames around a cut have a say in it.
                if self._from is not None and sure - self._from > (
                    self._max_samples + 2 * FRAME_SAMPLES
                ):
                    self._from = self._cut(self._from)
        elif self._before is not None and at - self._before[1] >= 2 * self._PAD:
            self._close(self._before[1] + self._PAD)

    def _keep(self, start: int) -> None:
        """The current speech is long enough: its edge and that of the one before are known."""
        if self._from is not None:
            return
        pad = self._PAD
        if self._before is not None:
            silence = start - self._before[1]
            pad = silence // 2 if silence < 2 * self._PAD else pad
            self._close(self._before[1] + pad)
        self._from = max(0, start - pad)

    def _close(self, end: int) -> None:
        assert self._before is not None
        start = self._before[0]
        while end - start > self._max_samples:
            start = self._cut(start)
        if end > start:
            self._found.append(Span(start, end))
        self._before = None

    def _cut(self, start: int) -> int:
        """Cut off the beginning of a span that is too long; returns where the rest begins.

        The cut falls on the frame with the lowest speech probability (smoothed over five
        frames) in the second half of what fits: a pause between words if there is one.
        """
        first = (start + self._max_samples // 2) // FRAME_SAMPLES + 1
        last = (start + self._max_samples) // FRAME_SAMPLES
        frame = last
        if first < last:
            around = np.zeros(last - first + 4, np.float32)
            low = max(0, first - 2)
            known = self._probabilities[low - self._first_frame : last + 2 - self._first_frame]
            around[low - (first - 2) : low - (first - 2) + len(known)] = known
            frame = first + int(np.convolve(around, _FIVE_FRAMES, mode="valid").argmin())
        cut = min(frame * FRAME_SAMPLES, start + self._max_samples)
        self._found.append(Span(start, cut))
        return cut

    def _forget(self) -> None:
        """Drop the probabilities that no cut can need any more."""
        keep_from = max(self._first_frame, self.settled // FRAME_SAMPLES - 2)
        self._probabilities = self._probabilities[keep_from - self._first_frame :]
        self._first_frame = keep_from

    def _take(self) -> list[Span]:
        found, self._found = self._found, []
        return found


class WindowPacker:
    """Spans of one channel -> windows of at most `max_samples`, as they come.

    Spans share a window only if the pause between them is at most `max_pause`; it stays in
    the window as it is. Every speech sample lands in exactly one window.
    """

    def __init__(
        self,
        channel: int,
        max_samples: int = MAX_WINDOW_SAMPLES,
        max_pause: int = MAX_PAUSE_SAMPLES,
    ) -> None:
        self._channel = channel
        self._max_samples = max_samples
        self._max_pause = max_pause
        self._open: Window | None = None

    def push(self, spans: Sequence[Span], settled: int) -> list[Window]:
        """Take the next spans; return the windows that are now certain.

        Args:
            spans: in order.
            settled: no later span begins before this sample.
        """
        windows = []
        for span in spans:
            if self._open is not None and self._fits(span.start, span.end):
                self._open = Window(self._channel, self._open.start, span.end)
                continue
            if self._open is not None:
                windows.append(self._open)
            self._open = Window(self._channel, span.start, span.end)
        if self._open is not None and not self._fits(settled, settled + 1):
            windows += self.finish()
        return windows

    def finish(self) -> list[Window]:
        """The last window."""
        last, self._open = self._open, None
        return [last] if last is not None else []

    def settled(self, spans_settled: int) -> int:
        """No window that is still to come begins before this sample."""
        return self._open.start if self._open is not None else spans_settled

    def _fits(self, start: int, end: int) -> bool:
        assert self._open is not None
        close = start - self._open.end <= self._max_pause
        return close and end - self._open.start <= self._max_samples
