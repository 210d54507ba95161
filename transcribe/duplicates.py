"""Recordings with the same bytes -> one recognition, and a row for each.

Owns: telling which recordings hold the same bytes as another one, at the cost of few reads, and
making their rows from the other's row once that is published. Must not know: decoding, engines,
Ray. It runs on the driver, after the shards: a run that ends in between leaves duplicates without
rows, which the next run finds again, beside the published row of their original.

Same bytes are: same MD5, size and extension (the name decides how headerless audio is read). The
MD5 comes from the store's listing, else from reading; and only those are read whose size another
recording or published row has too, whole only if their first and last 64 KiB are alike as well.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import PurePosixPath

import numpy as np

from transcribe import pipeline, publish, rows, storage
from transcribe.archive import in_threads
from transcribe.errors import BadAudio, Transient
from transcribe.publish import Content
from transcribe.recordings import Recording, Recordings
from transcribe.shards import Shard, shard_id

ROWS_PER_FILE = 1_000
_END_BYTES = 65_536
_STEP_BYTES = 8 << 20
_COMPARING_THREADS = 32  # waits for the store
_HASHING_THREADS = 8

# Failures that say nothing of the bytes: the same bytes elsewhere may well be transcribed.
_NOT_OF_THE_BYTES = frozenset(
    {"missing", "forbidden", "not_a_file", "unreadable", "internal_error"}
)

_Key = tuple[int, str, str]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A recording whose bytes are those of another one.

    Attributes:
        recording: with its `content_md5` known.
        original: `recording_id` of the one whose result is shared.
    """

    recording: Recording
    original: str


def find(recordings: Iterable[Recording], published: Iterable[Content]) -> list[Duplicate]:
    """The recordings that need no recognition of their own.

    Args:
        recordings: what has no row yet.
        published: contents of the rows that there are.

    Returns:
        Duplicates in order of their uri. The original is a published recording, if possible one
        that was recognised itself, else the first by uri. What is empty, missing or cannot be
        read is no duplicate.
    """
    published = list(published)
    alike = _of_a_size_that_repeats(Recordings.of(recordings), {p.size_bytes for p in published})
    ordered = sorted(alike, key=lambda r: (r.uri, r.recording_id))
    there = [r for r in ordered if r.size_bytes and r.generation != storage.MISSING]
    sizes = {r.size_bytes for r in there}
    usable = [
        p for p in published if p.size_bytes in sizes and p.error_kind not in _NOT_OF_THE_BYTES
    ]
    usable.sort(key=lambda p: (p.duplicate_of is not None, p.uri, p.recording_id))
    originals: dict[_Key, str] = {}
    for row in usable:
        originals.setdefault(_key(row, row.content_md5), row.recording_id)
    read = _checksums(there, usable)
    found = []
    for recording in there:
        md5 = recording.content_md5 or read.get(recording.recording_id)
        if md5 is None:
            continue
        original = originals.setdefault(_key(recording, md5), recording.recording_id)
        if original != recording.recording_id:
            found.append(Duplicate(replace(recording, content_md5=md5), original))
    return found


def _of_a_size_that_repeats(recordings: Recordings, published: set[int]) -> Recordings:
    """Only these can have the bytes of another one."""
    sizes, places, n_alike = np.unique(recordings.sizes, return_inverse=True, return_counts=True)
    repeats = (n_alike > 1) | np.isin(sizes, list(published))
    return recordings.take(np.flatnonzero(repeats[places]))


def _key(found: Recording | Content, md5: str) -> _Key:
    return found.size_bytes, md5, PurePosixPath(found.uri).suffix.lower()


# ---------------------------------------------------------------- looking at bytes


def _checksums(recordings: Sequence[Recording], published: Sequence[Content]) -> dict[str, str]:
    """MD5 by recording_id of those without one that may be duplicates, as far as readable."""
    rows_of: dict[int, list[Content]] = defaultdict(list)
    for row in published:
        rows_of[row.size_bytes].append(row)
    alike: dict[int, list[Recording]] = defaultdict(list)
    for recording in recordings:
        alike[recording.size_bytes].append(recording)
    compared: list[Recording | Content] = []
    whole: list[Recording] = []
    for size, group in alike.items():
        unknown = [r for r in group if r.content_md5 is None]
        others = rows_of.get(size, [])
        if not unknown or len(group) + len(others) < 2:
            continue
        if len(others) > len(group):  # fewer reads than comparing with every published one
            whole += unknown
        else:
            compared += [*group, *others]
    whole += _alike_at_both_ends(compared)
    hashed = in_threads(_md5, whole, _HASHING_THREADS)
    pairs = zip(whole, hashed, strict=True)
    return {recording.recording_id: md5 for recording, md5 in pairs if md5 is not None}


def _alike_at_both_ends(found: Sequence[Recording | Content]) -> list[Recording]:
    """Those without an MD5 whose size, beginning and end are those of another one."""
    groups: dict[tuple[int, bytes], list[Recording | Content]] = defaultdict(list)
    for each, ends in zip(found, in_threads(_ends, found, _COMPARING_THREADS), strict=True):
        if ends is not None:
            groups[each.size_bytes, ends].append(each)
    return [
        each
        for group in groups.values()
        if len(group) > 1
        for each in group
        if isinstance(each, Recording) and each.content_md5 is None
    ]


def _ends(found: Recording | Content) -> bytes | None:
    """Digest of the first and last 64 KiB; None if they cannot be read."""
    tail = max(_END_BYTES, found.size_bytes - _END_BYTES)
    try:
        digest = hashlib.blake2b(storage.read_range(found.uri, 0, _END_BYTES), digest_size=16)
        digest.update(storage.read_range(found.uri, tail, _END_BYTES))
    except (BadAudio, Transient):
        return None
    return digest.digest()


def _md5(recording: Recording) -> str | None:
    """Hex MD5 of the whole object, read in steps; None if it is not what was listed."""
    digest = hashlib.md5(usedforsecurity=False)
    n_read = 0
    try:
        while n_read < recording.size_bytes:
            data = storage.read_range(recording.uri, n_read, _STEP_BYTES)
            if not data:
                return None
            digest.update(data)
            n_read += len(data)
    except (BadAudio, Transient):
        return None
    return digest.hexdigest() if n_read == recording.size_bytes else None


# ---------------------------------------------------------------- rows


def publish_duplicates(
    found: Iterable[Duplicate], out: str, run_id: str
) -> tuple[list[pipeline.ShardSummary], list[Recording]]:
    """Give duplicates a row each, made from the published row of their original.

    Returns:
        Summaries of the files written, at most `ROWS_PER_FILE` rows each; and the recordings
        that are left to be transcribed by themselves: their original has no row, has failed for
        a reason that is not in the bytes, or had other bytes by the time it was read.
    """
    wanted: dict[str, list[Duplicate]] = defaultdict(list)
    for duplicate in found:
        wanted[duplicate.original].append(duplicate)
    summaries: list[pipeline.ShardSummary] = []
    alone: list[Recording] = []
    batch: list[tuple[Recording, rows.Row]] = []
    for row in publish.read_whole_rows(out, set(wanted)):
        for duplicate in wanted.pop(row["recording_id"], ()):
            if not _is_shared(row, duplicate.recording):
                alone.append(duplicate.recording)
                continue
            batch.append((duplicate.recording, row))
            if len(batch) == ROWS_PER_FILE:
                summaries.append(_publish(batch, out, run_id))
                batch = []
    if batch:
        summaries.append(_publish(batch, out, run_id))
    alone += [duplicate.recording for left in wanted.values() for duplicate in left]
    return summaries, alone


def _is_shared(row: Mapping[str, object], recording: Recording) -> bool:
    same = (row["size_bytes"], row["content_md5"]) == (recording.size_bytes, recording.content_md5)
    return same and row["error_kind"] not in _NOT_OF_THE_BYTES


def _publish(
    batch: Sequence[tuple[Recording, rows.Row]], out: str, run_id: str
) -> pipeline.ShardSummary:
    started_at = time.time()
    shard = Shard(shard_id(r for r, _ in batch), tuple(r for r, _ in batch))
    made = [
        {
            **rows.shared_row(recording, row),
            "run_id": run_id,
            "shard_id": shard.shard_id,
            "transcribed_at": datetime.now(UTC),
        }
        for recording, row in batch
    ]
    shared = pipeline.RecognisedShard(
        shard_id=shard.shard_id,
        rows=made,
        windows=0,
        seconds=pipeline.StageSeconds(),
        device="cpu",
        worker=f"{platform.node()}:{os.getpid()}",
        decode_peak_bytes=0,
        recognise_peak_bytes=0,
        started_at=started_at,
    )
    return pipeline.publish_shard(shared, out)
