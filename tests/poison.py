"""`pipeline.heard` for an archive in which a recording's name says what it does to its process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.deeds import DEEDS
from transcribe import pipeline
from transcribe.archive import Recording
from transcribe.config import RunConfig
from transcribe.isolation import Limits

real_heard = pipeline.heard


def heard(recording: Recording, data: bytes, config: RunConfig) -> Iterator[object]:
    """Like `pipeline.heard`, but `segfault.wav` segfaults, `spin-2.wav` spins, and so on."""
    deed = DEEDS.get(Path(recording.uri).stem.partition("-")[0])
    if deed is not None:
        deed()
    yield from real_heard(recording, data, config)


def install() -> None:
    """For Ray: run in every worker process as it starts."""
    pipeline.heard = heard
    pipeline.decoding_limits = lambda n_bytes, duration_s: Limits(60.0, 1 << 30)
