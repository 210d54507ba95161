"""What the workers of a run under chaos are made of: slow stages, light detection, deadly names.

`install` runs in every worker process as it starts (Ray's `worker_process_setup_hook`). The name of
a recording says what happens to the process that recognises it.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from transcribe import isolation, listen, pipeline
from transcribe.engines.fake import FakeEngine
from transcribe.speech import FRAME_SAMPLES

SERVICE_S = float(os.environ.get("CHAOS_SERVICE_S", "0"))
"""Seconds that an engine takes for a window."""

DECODE_S = float(os.environ.get("CHAOS_DECODE_S", "0"))
"""Seconds that decoding takes for a channel."""

OUT_OF_MEMORY = Path(os.environ.get("CHAOS_OUT_OF_MEMORY", "/nonexistent"))
"""While this file is there, an engine has memory for one window."""

real_recognise_part = pipeline.recognise_part
real_hear = FakeEngine.hear


class HearsEverything:
    """To whom all is speech that is no silence: the real model takes a worker seconds to load."""

    def __init__(self, detector):
        time.sleep(DECODE_S)
        self.left = np.zeros(0, np.int16)

    def push(self, samples):
        self.left = np.concatenate([self.left, samples])
        n_frames = len(self.left) // FRAME_SAMPLES
        frames, self.left = np.split(self.left, [n_frames * FRAME_SAMPLES])
        return frames.reshape(-1, FRAME_SAMPLES).any(axis=1).astype(np.float32)

    def finish(self):
        return np.full(1 if len(self.left) else 0, float(self.left.any()), np.float32)


def hear(self, batch):
    time.sleep(SERVICE_S * len(batch))
    if len(batch) > 1 and OUT_OF_MEMORY.exists():
        raise MemoryError
    return real_hear(self, batch)


def recognise_part(decoded, engine, job):
    for outcome in (piece.outcome for piece in decoded.pieces if piece.outcome is not None):
        deed = Path(outcome.recording.uri).stem.partition("-")[0]
        if deed == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if deed == "raise":
            raise ValueError("what a defect says")
    return real_recognise_part(decoded, engine, job)


def results(function, args, limits, *anything):
    """In this process: whole children are `tests/integration/test_poison.py`'s matter."""
    return function(*args)


def install():
    FakeEngine.hear = hear
    pipeline.recognise_part = recognise_part
    listen.FrameJudge = HearsEverything
    listen._detector = lambda: None
    isolation.results = results
