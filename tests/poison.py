"""`pipeline.listen` for an archive in which a recording's name says what it does to its process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.deeds import DEEDS
from transcribe import pipeline
from transcribe.isolation import Limits

real_listen = pipeline.listen


def listen(content: object, name: str, *settings: object) -> Iterator[object]:
    """Like `pipeline.listen`, but `segfault.wav` segfaults, `spin-2.wav` spins, and so on."""
    deed = DEEDS.get(Path(name).stem.partition("-")[0])
    if deed is not None:
        deed()
    yield from real_listen(content, name, *settings)


def install() -> None:
    """For Ray: run in every worker process as it starts."""
    pipeline.listen = listen
    pipeline.decoding_limits = lambda n_bytes: Limits(60.0, 1 << 30)
