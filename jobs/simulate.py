"""`python -m jobs.simulate`: what the driver costs by itself, without audio.

Simulated are the bucket (a made-up listing in this process: no store is asked, no header read) and
the engines' clock. Real is all that the driver does with it: comparing, estimating, cutting into
shards, pickling for Ray; and with `--tree`, listing a local folder of that many empty files.
docs/scaling.md says what follows from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar
from unittest import mock

import pyarrow as pa

from transcribe import duplicates, storage
from transcribe.archive import estimate_durations, list_archive
from transcribe.shards import plan_shards

T = TypeVar("T")

_SECONDS_EACH = 360.0
_BYTES_PER_SECOND = 16_000.0


def main() -> None:
    """Measure and print JSON: CPU seconds of each step and the driver's peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recordings", type=int, default=1_000_000)
    parser.add_argument("--done", type=float, default=0.0, help="share that has a row already")
    parser.add_argument("--tree", action="store_true", help="list a real local folder, no more")
    flags = parser.parse_args()
    measured = listing(flags.recordings) if flags.tree else planning(flags.recordings, flags.done)
    json.dump(measured, sys.stdout, indent=2)
    print()


def planning(count: int, done: float) -> dict[str, float]:
    """A plan of a bucket of `count` calls of six minutes on average, a share of them `done`."""
    clock = _Clock()
    base = clock.peak_bytes()
    with mock.patch.object(storage, "list_objects", lambda url: made_up(count)):
        found = clock.step("list", lambda: list_archive("gs://archive/calls"))
    published = pa.array([r.recording_id for r in found[: int(done * count)]], pa.string())
    left = clock.step("subtract", lambda: found.without(published))
    repeated = clock.step("compare", lambda: duplicates.find(left, ()))
    with mock.patch.object(storage, "read_range", _no_bytes):
        timed = clock.step("estimate", lambda: estimate_durations(left))
    shards = clock.step("cut", lambda: plan_shards(timed))
    pickled = clock.step("pickle", lambda: sum(len(pickle.dumps(shard)) for shard in shards))
    return {
        **clock.seconds,
        "cpu_seconds": sum(clock.seconds.values()),
        "recordings": count,
        "left": len(left),
        "hours": sum(timed.durations) / 3600,
        "duplicates": len(repeated),
        "shards": len(shards),
        "pickled_bytes": pickled,
        "base_bytes": base,
        "peak_bytes": clock.peak_bytes(),
    }


def made_up(count: int) -> Iterator[storage.ObjectInfo]:
    """A bucket's listing: URIs of 80 characters, sizes of calls, MD5s, no two alike."""
    chance = random.Random(1)
    for number in range(count):
        md5 = hashlib.md5(number.to_bytes(8), usedforsecurity=False).hexdigest()
        uri = f"gs://archive/calls/2026/{number // 10_000:04d}/{md5}-{number:013d}.wav"
        size = int(chance.lognormvariate(0.0, 0.7) * 0.78 * _SECONDS_EACH * _BYTES_PER_SECOND)
        yield storage.ObjectInfo(uri, size, f"17{number:014d}", md5)


def listing(count: int) -> dict[str, float]:
    """Listing a local tree of `count` empty files, a thousand in a folder."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            inner = Path(folder, f"{number // 1_000:06d}")
            if number % 1_000 == 0:
                inner.mkdir()
            (inner / f"{number:09d}.wav").touch()
        clock = _Clock()
        started = time.perf_counter()
        found = clock.step("list", lambda: list_archive(folder))
        wall_s = time.perf_counter() - started
    return {
        **clock.seconds,
        "wall_s": wall_s,
        "objects_per_cpu_second": len(found) / clock.seconds["list"],
    }


def _no_bytes(uri: str, start: int, length: int) -> bytes:
    return b""


class _Clock:
    """CPU seconds of this process, step by step: a busy machine changes them little."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def step(self, name: str, work: Callable[[], T]) -> T:
        """Do it and keep its time."""
        before = time.process_time()
        result = work()
        self.seconds[name] = time.process_time() - before
        return result

    @staticmethod
    def peak_bytes() -> int:
        """Largest resident memory so far."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
