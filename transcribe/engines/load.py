"""Recipe -> loaded engine, on the worker that will use it."""

from __future__ import annotations

from transcribe import models
from transcribe.engines.base import Engine
from transcribe.engines.fake import FakeEngine
from transcribe.engines.whisper_ct2 import WhisperCT2
from transcribe.pipeline import Job

FAKE_MODEL = "fake"


def load_engine(job: Job) -> Engine:
    """The engine that a job asks for.

    Raises:
        Fatal: its model cannot be found or loaded.
    """
    if job.config.model == FAKE_MODEL:
        return FakeEngine()
    model = models.resolve(job.config.model)
    return WhisperCT2(model, device=job.device, language=job.config.language)
