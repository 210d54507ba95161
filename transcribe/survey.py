"""What is in an archive, told from the headers of a sample of it.

Owns which recordings are looked at, what is seen of them, and how far that may be from the whole.
Decodes no more than the first 64 KiB of a recording, or all of a small one that does not say
enough there. Knows nothing of engines, prices or Ray.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath

from transcribe import archive, duplicates, publish, storage
from transcribe.archive import Recording
from transcribe.errors import BadAudio, Transient
from transcribe.headerless import Headerless
from transcribe.headers import HEAD_BYTES

_THREADS = 16  # they wait for the store more than they decode
_WHOLE_BYTES = 4 << 20  # a file up to this size is read whole if its head does not say enough
_Z95 = 1.96  # standard errors to either side that hold the truth 19 times of 20
_ONE_SEEN_ERROR = 0.5  # relative standard error where a single recording stands for others


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and bounds that should hold it 19 times of 20."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Interval:
        """A figure that is known."""
        return cls(value, value, value)

    @classmethod
    def around(cls, value: float, standard_error: float) -> Interval:
        """A figure with its standard error; never below 0."""
        wide = _Z95 * standard_error
        return cls(value, max(0.0, value - wide), value + wide)

    def times(self, factor: Interval | float) -> Interval:
        """The product of two independent figures above 0, by their relative widths."""
        if not isinstance(factor, Interval):
            return Interval(self.value * factor, self.low * factor, self.high * factor)
        value = self.value * factor.value
        if value == 0:
            return Interval(0.0, 0.0, self.high * factor.high)
        down = math.hypot(1 - self.low / self.value, 1 - factor.low / factor.value)
        up = math.hypot(self.high / self.value - 1, factor.high / factor.value - 1)
        return Interval(value, value * max(0.0, 1 - down), value * (1 + up))

    def plus(self, amount: float) -> Interval:
        """All of it later or more by a known amount."""
        return Interval(self.value + amount, self.low + amount, self.high + amount)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the head of a recording says.

    Attributes:
        seconds: length; None if it does not say.
        codec: FFmpeg's name; None if it could not be told.
        channels: number of them; None likewise.
        problem: kind of the error that decoding ends in; None if it goes well as far as seen.
    """

    recording: Recording
    seconds: float | None = None
    codec: str | None = None
    channels: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """An archive, before anything is spent on it.

    Attributes:
        recordings: what is left to be transcribed and recognised, each with a duration that is
            read or estimated.
        archive_recordings: all that the archive lists.
        already_transcribed: of these with a row in OUT.
        repeated: of the rest with the bytes of another one.
        seen: the heads that were read, of `recordings`.
        audio_s: seconds of `recordings` together.
    """

    recordings: tuple[Recording, ...]
    archive_recordings: int
    already_transcribed: int
    repeated: int
    seen: tuple[Seen, ...]
    audio_s: Interval

    @property
    def is_complete(self) -> bool:
        """Whether every recording was looked at."""
        return len(self.seen) == len(self.recordings)

    def counts(self, of: Callable[[Seen], object]) -> dict[str, int]:
        """How many of the seen recordings have each value, the most frequent first."""
        found = Counter(str(value) for each in self.seen if (value := of(each)) is not None)
        return dict(found.most_common())

    @property
    def bytes(self) -> int:
        """Size of `recordings` together."""
        return sum(r.size_bytes for r in self.recordings)


def survey(
    url: str, out: str | None, n_sampled: int | None, headerless: Headerless | None
) -> Survey:
    """Look at an archive.

    Args:
        url: ARCHIVE in its absolute form.
        out: OUT, whose recordings are done already; None if nothing is.
        n_sampled: how many heads to read; None reads all.
        headerless: what files without a header hold.

    Raises:
        Fatal: there is no such archive; a file in OUT is not ours.
        Transient: the store does not answer, after retries.
    """
    everything = archive.list_archive(url)
    remaining = everything
    contents: Iterable[publish.Content] = ()
    if out is not None:
        published = publish.read_published(out)
        remaining = everything.without(published.recording_ids)
        contents = published.contents(remaining.sizes)
    copies = {d.recording.recording_id for d in duplicates.find(remaining, contents)}
    left = [r for r in remaining if r.recording_id not in copies]
    look_at = partial(_look, headerless=headerless)
    seen = archive.in_threads(look_at, spread(left, n_sampled), _THREADS)
    return Survey(
        recordings=tuple(with_durations(left, seen)),
        archive_recordings=len(everything),
        already_transcribed=len(everything) - len(remaining),
        repeated=len(copies),
        seen=tuple(seen),
        audio_s=total_seconds(left, seen),
    )


def spread(recordings: Sequence[Recording], n: int | None) -> list[Recording]:
    """`n` recordings at even steps through the archive sorted by extension, size and uri.

    Every extension and every size is met about as often as it occurs.
    """
    ordered = sorted(recordings, key=lambda r: (_extension(r), r.size_bytes, r.uri))
    if n is None or n >= len(ordered):
        return ordered
    return [ordered[(2 * i + 1) * len(ordered) // (2 * n)] for i in range(n)]


def _extension(recording: Recording) -> str:
    return PurePosixPath(recording.uri).suffix.lower()


def _look(recording: Recording, headerless: Headerless | None) -> Seen:
    # Here, not at the head: the command starts without the seconds that torch takes to load.
    from transcribe import decode, probe

    try:
        head = storage.read_range(recording.uri, 0, HEAD_BYTES)
    except BadAudio as error:
        return Seen(recording, problem=error.kind)
    except Transient:
        return Seen(recording)
    seconds = probe.probe_seconds(head, recording.size_bytes, recording.uri, headerless)
    try:
        audio = decode.decode(head, recording.uri, headerless)
    except BadAudio as error:
        return _look_closer(recording, headerless, error)
    return Seen(recording, seconds, audio.codec, audio.n_channels)


def _look_closer(recording: Recording, headerless: Headerless | None, error: BadAudio) -> Seen:
    """Read all of a recording whose head cannot be decoded: an M4A may have its index at the end.

    One that is too large for that is taken to be what its kind usually is.
    """
    from transcribe import decode

    if recording.size_bytes <= HEAD_BYTES:
        return Seen(recording, problem=error.kind)
    if recording.size_bytes > _WHOLE_BYTES:
        return Seen(recording)
    try:
        audio = decode.decode(storage.read(recording.uri), recording.uri, headerless)
    except BadAudio as final:
        return Seen(recording, problem=final.kind)
    except Transient:
        return Seen(recording)
    return Seen(recording, audio.duration_s, audio.codec, audio.n_channels)


# ---------------------------------------------------------------- from the sample to the whole


def total_seconds(recordings: Iterable[Recording], seen: Iterable[Seen]) -> Interval:
    """Seconds of all recordings, by the ratio of seconds to bytes in each extension's sample.

    Ratio estimator with finite population correction (Cochran, Sampling Techniques, section 6):
    for an extension with N recordings of B bytes, n of them seen, the total is r B with
    r = sum(seconds) / sum(bytes), and its variance N^2 (1 - n/N) / n times the mean square of
    seconds - r bytes. What cannot be decoded holds 0 seconds; a recording whose head does not tell
    its length counts as not seen.
    """
    sampled: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for each in seen:
        seconds = 0.0 if each.problem else each.seconds
        if seconds is not None:
            sampled[_extension(each.recording)].append((seconds, each.recording.size_bytes))
    strata: dict[str, list[Recording]] = defaultdict(list)
    for recording in recordings:
        strata[_extension(recording)].append(recording)
    value, variance = 0.0, 0.0
    for extension, group in strata.items():
        total, its_variance = _stratum(group, sampled.get(extension, []))
        value += total
        variance += its_variance
    return Interval.around(value, math.sqrt(variance))


def _stratum(group: Sequence[Recording], pairs: Sequence[tuple[float, int]]) -> tuple[float, float]:
    n_all, n_seen = len(group), len(pairs)
    if n_seen == 0:  # nobody told: what is typical of the extension
        guess = sum(r.duration_s for r in group)
        return guess, (_ONE_SEEN_ERROR * guess) ** 2
    n_bytes = sum(size for _, size in pairs)
    ratio = sum(seconds for seconds, _ in pairs) / n_bytes if n_bytes else 0.0
    total = ratio * sum(r.size_bytes for r in group)
    if n_seen == n_all:
        return sum(seconds for seconds, _ in pairs), 0.0
    if n_seen == 1:
        return total, (_ONE_SEEN_ERROR * total) ** 2
    square = sum((seconds - ratio * size) ** 2 for seconds, size in pairs) / (n_seen - 1)
    return total, n_all**2 * (1 - n_seen / n_all) * square / n_seen


def with_durations(recordings: Sequence[Recording], seen: Iterable[Seen]) -> list[Recording]:
    """The recordings with the durations that were seen, else by their extension's mean rate."""
    known: dict[str, float] = {}
    seconds_of: dict[str, float] = defaultdict(float)
    bytes_of: dict[str, int] = defaultdict(int)
    for each in seen:
        seconds = archive.SHORTEST_S if each.problem else each.seconds
        if seconds is None:
            continue
        known[each.recording.recording_id] = seconds
        seconds_of[_extension(each.recording)] += seconds
        bytes_of[_extension(each.recording)] += each.recording.size_bytes
    return [replace(r, duration_s=_duration(r, known, seconds_of, bytes_of)) for r in recordings]


def _duration(
    recording: Recording,
    known: Mapping[str, float],
    seconds_of: Mapping[str, float],
    bytes_of: Mapping[str, int],
) -> float:
    seconds = known.get(recording.recording_id)
    if seconds is None and bytes_of.get(_extension(recording)):
        rate = seconds_of[_extension(recording)] / bytes_of[_extension(recording)]
        seconds = recording.size_bytes * rate
    return max(archive.SHORTEST_S, recording.duration_s if seconds is None else seconds)
