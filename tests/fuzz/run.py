"""Broken files by the thousand, through the whole of decoding, in the child process of production.

    python -m tests.fuzz --first 1 --cases 10000

Every case must end as a row: windows, or `BadAudio`. A breach is another exception, more than
`SECONDS` of CPU time, or more than `BYTES` of memory on top of what the child has anyway. A child
that is lost is a row too, but stands among the breaches: it is a finding.
"""

from __future__ import annotations

import hashlib
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutate import case
from transcribe.errors import BadAudio
from transcribe.headers import HEAD_BYTES
from transcribe.isolation import Limits, results
from transcribe.listen import listen, load
from transcribe.probe import probe_seconds

SECONDS = 10.0
BYTES = 512 << 20
_LIMITS = Limits(wait_s=60.0, memory_bytes=2 << 30)
_LOST = ("crashed_worker", "decode_timeout", "decode_memory")


@dataclass
class Outcomes:
    """What became of the cases.

    Attributes:
        kinds: how many cases ended as `ok` or as which kind of `BadAudio`.
        breaches: sentences that start with the number of the case.
        digest: changes if any outcome does.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    breaches: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    largest_bytes: int = 0
    digest: str = ""

    def add(self, seed: int, name: str, kind: str, seconds: float, n_bytes: int) -> None:
        self.kinds[kind] += 1
        self.longest_s = max(self.longest_s, seconds)
        self.largest_bytes = max(self.largest_bytes, n_bytes)
        self.digest = hashlib.sha256(f"{self.digest}{seed}{kind}".encode()).hexdigest()[:16]
        if kind in _LOST or kind == "internal_error" or kind.startswith("!"):
            self.breaches.append(f"{seed} ({name}) ended as {kind}")
        if seconds > SECONDS:
            self.breaches.append(f"{seed} ({name}) took {seconds:.1f} s of CPU time")
        if n_bytes > BYTES:
            self.breaches.append(f"{seed} ({name}) took {n_bytes / 2**20:.0f} MiB")


def fuzz(first: int, n_cases: int) -> Outcomes:
    """Run the cases `first`, `first + 1` ..."""
    outcomes = Outcomes()
    for seed in range(first, first + n_cases):
        name, data = case(seed)
        try:
            ((kind, seconds, n_bytes),) = results(outcome, (name, data), _LIMITS, load)
        except BadAudio as lost:
            kind, seconds, n_bytes = lost.kind, 0.0, 0
        outcomes.add(seed, name, kind, seconds, n_bytes)
    return outcomes


def outcome(name: str, data: bytes) -> Iterator[tuple[str, float, int]]:
    """How one file ends, its CPU seconds and its memory; runs in the child."""
    before = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    started = time.process_time()
    try:
        kind = _kind(name, data)
    except Exception as error:
        kind = f"!{type(error).__name__}: {error}"
    yield kind, time.process_time() - started, max(0, _peak_bytes() - before)


def _kind(name: str, data: bytes) -> str:
    seconds = probe_seconds(data[:HEAD_BYTES], len(data), name)
    assert seconds is None or seconds > 0
    try:
        pieces = list(listen(data, name, "auto"))
    except BadAudio as problem:
        assert problem.kind and problem.message.isprintable(), problem.message
        return problem.kind
    for piece in pieces:
        lengths = zip(piece.windows, piece.samples, strict=True)
        assert all(window.n_samples == len(samples) for window, samples in lengths)
    whole = pieces[-1].whole
    assert whole is not None and whole.duration_s > 0
    return whole.problem.kind if whole.problem else "ok"


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
