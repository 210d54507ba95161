"""What the workers of a run under chaos are made of: slower engines, and recordings that kill.

`install` runs in every worker process as it starts (Ray's `worker_process_setup_hook`), before any
work of ours. A recording's name says what happens to the process that recognises it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from transcribe import pipeline
from transcribe.engines.base import Engine, EngineInput, Hypothesis
from transcribe.engines.fake import FakeEngine
from transcribe.pipeline import DecodedPart, Job, RecognisedPart

SERVICE_S = "CHAOS_SERVICE_S"
"""Environment: seconds that the engine takes for a window."""

_recognise = FakeEngine.recognise
_recognise_part = pipeline.recognise_part


def _slow(self: FakeEngine, windows: Sequence[EngineInput]) -> list[Hypothesis]:
    time.sleep(float(os.environ.get(SERVICE_S, "0")) * len(windows))
    return _recognise(self, windows)


def _deadly(decoded: DecodedPart, engine: Engine, job: Job) -> RecognisedPart:
    for outcome in (piece.outcome for piece in decoded.pieces if piece.outcome is not None):
        deed = Path(outcome.recording.uri).stem.partition("-")[0]
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if deed == "raise":
            raise ValueError("what a defect says")
    return _recognise_part(decoded, engine, job)


def install() -> None:
    """For Ray."""
    FakeEngine.recognise = _slow  # type: ignore[method-assign]
    pipeline.recognise_part = _deadly
