"""Recordings -> shards: the unit of scheduling, retry and commit.

Pure: the same recordings give the same shards on any machine, with any number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from transcribe.recordings import Recording, Recordings

_MIN_MINUTES = 2.0
_MAX_MINUTES = 60.0
_SHARDS_WANTED = 64  # enough to share out evenly, to see progress, and to lose little
_MAX_RECORDINGS = 5_000  # keeps one shard of many tiny files from becoming a straggler


@dataclass(frozen=True, slots=True)
class Shard:
    """Recordings that are decoded, recognised and published together."""

    shard_id: str
    recordings: Sequence[Recording]

    @property
    def duration_s(self) -> float:
        """Planned audio seconds (estimates)."""
        return sum(r.duration_s for r in self.recordings)


def plan_shards(recordings: Iterable[Recording], shard_minutes: float | None = None) -> list[Shard]:
    """Cut the archive, in the order of its URIs, into shards of about equal audio time.

    Args:
        recordings: what is to be transcribed, each with its (estimated) duration.
        shard_minutes: audio minutes per shard; None takes 1/64 of the archive, between 2
            and 60 minutes: small enough to share out, large enough to fill batches.

    Returns:
        Shards that hold every recording exactly once. A shard is longer than wanted only
        when it is a single recording.
    """
    ordered = Recordings.of(recordings).sorted()
    seconds = ordered.durations.tolist()
    if shard_minutes is None:
        total_minutes = sum(seconds) / 60
        shard_minutes = min(_MAX_MINUTES, max(_MIN_MINUTES, total_minutes / _SHARDS_WANTED))
    groups = (ordered[start:end] for start, end in _groups(seconds, shard_minutes * 60))
    return [Shard(shard_id(group), group) for group in groups]


def longest_first(shards: Iterable[Shard]) -> list[Shard]:
    """In the order of work: at the end nobody waits long for the last one."""
    return sorted(shards, key=lambda shard: shard.duration_s, reverse=True)


def _groups(durations: Sequence[float], limit_s: float) -> Iterator[tuple[int, int]]:
    """First and behind last of what is put together."""
    start, seconds = 0, 0.0
    for i, duration in enumerate(durations):
        if i > start and (seconds + duration > limit_s or i - start >= _MAX_RECORDINGS):
            yield start, i
            start, seconds = i, 0.0
        seconds += duration
    if start < len(durations):
        yield start, len(durations)


def shard_id(recordings: Iterable[Recording]) -> str:
    """16 hex digits of SHA-256 over the sorted recording ids."""
    content = "\n".join(sorted(r.recording_id for r in recordings))
    return hashlib.sha256(content.encode()).hexdigest()[:16]
