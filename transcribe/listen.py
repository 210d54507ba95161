"""One recording's bytes -> its speech, piece by piece: windows with their samples.

Owns the choice of channels, the cutting of windows out of the stream, and the account of where
each second went. Knows nothing of storage, engines or rows: it is one generator function, which
can run anywhere.

Of a long recording no more is held than the piece that is growing and the last minute or so of
every channel, which a window may still begin in.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from transcribe import resampling
from transcribe.assemble import Coverage, coverage, coverage_breach
from transcribe.channels import Likeness
from transcribe.config import ChannelMode
from transcribe.decode import SAMPLE_RATE, Audio, Int16s, Stopwatch, decode
from transcribe.errors import BadAudio
from transcribe.headerless import Headerless
from transcribe.speech import (
    MAX_PAUSE_SAMPLES,
    Detector,
    FrameJudge,
    Span,
    SpanFinder,
    Window,
    WindowPacker,
)

PIECE_SAMPLES = 600 * SAMPLE_RATE  # ten minutes of windows: 19 MB

_Cut = tuple[Window, npt.NDArray[np.int16]]


@dataclass(frozen=True, slots=True)
class Whole:
    """What is known of a recording once it was heard to its end.

    Attributes:
        container, codec, sample_rate, channels, duration_s: of the file.
        coverage: where the seconds of each channel went.
        problem: why a part of it is missing, if one is.
    """

    container: str
    codec: str
    sample_rate: int
    channels: int
    duration_s: float
    coverage: tuple[Coverage, ...]
    problem: BadAudio | None


@dataclass(slots=True)
class Spent:
    """Seconds, on the wall but for `cpu`, which counts all threads of this process."""

    decode: float = 0.0
    resample: float = 0.0
    speech_detection: float = 0.0
    cpu: float = 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Windows of a recording that follow those of the piece before.

    Attributes:
        windows: in order of their channels, then of time.
        samples: of each window, int16 `[n]`.
        spent: what it took since the piece before.
        whole: with the last piece.
    """

    windows: tuple[Window, ...]
    samples: tuple[npt.NDArray[np.int16], ...]
    spent: Spent
    whole: Whole | None


def load() -> None:
    """Load what listening needs, which the first recording would do."""
    resampling.load()
    _detector()


def listen(
    content: bytes | Path,
    name: str,
    mode: ChannelMode,
    headerless: Headerless | None = None,
    piece_samples: int = PIECE_SAMPLES,
) -> Iterator[Piece]:
    """Decode a recording and cut out its speech.

    Args:
        content: the whole object, or the local file that holds it.
        name: its path or uri.
        mode: which channels are heard.
        headerless: what files hold that have no header.
        piece_samples: a piece ends with the window that makes it as long as this.

    Yields:
        One piece or more; the last one says what is known of the whole.

    Raises:
        BadAudio: it cannot be used, which may show only after some pieces.
    """
    clock = _Clock()
    audio = decode(content, name, headerless)
    clock.decoded(audio.resampling)
    mixed = mode == "mix" and audio.n_channels > 1
    channels = [_Channel(number) for number in heard_channels(audio.likeness, mode)]
    found: list[_Cut] = []
    for block in audio.blocks():
        clock.decoded(audio.resampling)
        for channel in channels:
            found += channel.push(_mix(block) if mixed else block[channel.number])
        clock.speech_found()
        while _length(found) >= piece_samples:
            piece, found = _first(found, piece_samples)
            yield clock.piece(piece, None)
            clock.resumed()
    for channel in channels:
        found += channel.finish()
    whole = _whole(audio, channels, mixed)
    clock.speech_found()
    while _length(found) > piece_samples:
        piece, found = _first(found, piece_samples)
        yield clock.piece(piece, None)
        clock.resumed()
    yield clock.piece(found, whole)


def _whole(audio: Audio, channels: list[_Channel], mixed: bool) -> Whole:
    covered = {channel.number: channel.coverage() for channel in channels}
    if not mixed:  # what needs no recognition is accounted for: silent, or a repetition
        for number in set(range(audio.n_channels)) - set(covered):
            is_silent = audio.likeness.is_silent(number)
            silence, skipped = (audio.duration_s, 0.0) if is_silent else (0.0, audio.duration_s)
            covered[number] = Coverage(number, 0.0, silence, skipped)
    return Whole(
        container=audio.container,
        codec=audio.codec,
        sample_rate=audio.sample_rate,
        channels=audio.n_channels,
        duration_s=audio.duration_s,
        coverage=tuple(covered[number] for number in sorted(covered)),
        problem=audio.problem,
    )


# ---- channels -------------------------------------------------------------------------


def heard_channels(likeness: Likeness, mode: ChannelMode) -> list[int]:
    """The channels to recognise by `--channels`; a mix is channel 0, whatever it is mixed from."""
    if mode == "mix":
        return [0]
    return likeness.distinct() if mode == "auto" else list(range(len(likeness.products)))


def _mix(block: Int16s) -> npt.NDArray[np.int16]:
    mixed: npt.NDArray[np.float32] = np.rint(block.mean(axis=0, dtype=np.float32))
    return mixed.astype(np.int16)


@functools.cache
def _detector() -> Detector:
    """One speech detector a process."""
    from transcribe.voice_activity import SpeechDetector  # loads torch: see `resampling`

    return SpeechDetector()


class _Channel:
    """One channel's samples -> its windows, cut out."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._judge = FrameJudge(_detector())
        self._finder = SpanFinder()
        self._packer = WindowPacker(number)
        self._held = np.zeros(0, np.int16)  # what a window may still begin in
        self._n_samples = 0
        self._spans: list[Span] = []
        self._windows: list[Window] = []

    def push(self, samples: npt.NDArray[np.int16]) -> list[_Cut]:
        """Take the next samples; return the windows that are now certain."""
        self._held = np.concatenate((self._held, samples))
        self._n_samples += len(samples)
        spans = self._finder.push(self._judge.push(samples))
        return self._cut(spans, self._finder.settled)

    def finish(self) -> list[_Cut]:
        """The last windows.

        Raises:
            BadAudio: the windows would lose or double speech: a defect, and better no row of
                text than one with a hole.
        """
        spans = self._finder.push(self._judge.finish()) + self._finder.finish(self._n_samples)
        cuts = self._cut(spans, self._n_samples + MAX_PAUSE_SAMPLES + 1)
        if breach := coverage_breach(self._n_samples, self._spans, self._windows):
            raise BadAudio("coverage", f"channel {self.number}: {breach}")
        return cuts

    def coverage(self) -> Coverage:
        """Where its seconds went."""
        return coverage(self.number, self._n_samples, self._spans)

    def _cut(self, spans: list[Span], settled: int) -> list[_Cut]:
        windows = self._packer.push(spans, settled)
        self._spans += spans
        self._windows += windows
        first = self._n_samples - len(self._held)
        cuts = [(w, self._held[w.start - first : w.end - first].copy()) for w in windows]
        self._held = self._held[max(0, self._packer.settled(settled) - first) :]
        return cuts


# ---- pieces ---------------------------------------------------------------------------


def _length(found: list[_Cut]) -> int:
    return sum(len(samples) for _, samples in found)


def _first(found: list[_Cut], n_samples: int) -> tuple[list[_Cut], list[_Cut]]:
    """The earliest windows that make up as much, and the rest."""
    found = sorted(found, key=lambda cut: (cut[0].start, cut[0].channel))
    n, length = 0, 0
    while length < n_samples:
        length += len(found[n][1])
        n += 1
    return found[:n], found[n:]


class _Clock:
    """Where the time of a piece went."""

    def __init__(self) -> None:
        self._spent = Spent()
        self._resampled = 0.0
        self._mark, self._cpu_mark = time.perf_counter(), time.process_time()

    def decoded(self, resampling: Stopwatch) -> None:
        """What passed was decoding, some of it resampling."""
        resampled = resampling.seconds - self._resampled
        self._resampled = resampling.seconds
        self._spent.resample += resampled
        self._spent.decode += self._lap() - resampled

    def speech_found(self) -> None:
        """What passed was looking for speech."""
        self._spent.speech_detection += self._lap()

    def resumed(self) -> None:
        """What passed was somebody else's."""
        self._mark, self._cpu_mark = time.perf_counter(), time.process_time()

    def piece(self, cuts: list[_Cut], whole: Whole | None) -> Piece:
        """A piece, with the time since the last one."""
        cuts = sorted(cuts, key=lambda cut: (cut[0].channel, cut[0].start))
        spent, self._spent = self._spent, Spent()
        return Piece(tuple(w for w, _ in cuts), tuple(s for _, s in cuts), spent, whole)

    def _lap(self) -> float:
        now, cpu = time.perf_counter(), time.process_time()
        lap = now - self._mark
        self._spent.cpu += cpu - self._cpu_mark
        self._mark, self._cpu_mark = now, cpu
        return lap
