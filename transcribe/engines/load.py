"""Recipe -> loaded engine, on the worker that will use it."""

from __future__ import annotations

import platform
from pathlib import Path

from transcribe import models
from transcribe.checkpoint import sha256
from transcribe.config import EngineName, RunConfig
from transcribe.engines.base import Engine
from transcribe.engines.fake import FakeEngine, fake_rtfx, is_fake
from transcribe.errors import Fatal
from transcribe.models import Model
from transcribe.pipeline import Job


def load_engine(job: Job) -> Engine:
    """The engine that a job asks for.

    Raises:
        Fatal: its model cannot be found or loaded.
    """
    if is_fake(job.config.model):
        return FakeEngine(fake_rtfx(job.config.model))
    model = models.resolve(job.config.model, job.config.engine)
    if model_revision(model, job.config) != job.model_revision:
        raise Fatal(
            f"--model {model.name!r} is another one on {platform.node()} than on the driver;"
            " put the same weights on every machine, or give a gs:// prefix."
        )
    return engine_for(model, job.config, job.device)


def engine_for(model: Model, config: RunConfig, device: str) -> Engine:
    """Load `model` into the engine that its weights are made for.

    Raises:
        Fatal: it cannot be loaded, or a setting asks what it cannot do.
    """
    refuse_impossible(model.engine, config)
    if model.engine == "ctc-transformers":
        from transcribe.engines.ctc import CTC

        return CTC(
            model,
            device=device,
            words=config.words,
            language_model=config.language_model,
            language=config.language,
        )
    from transcribe.engines.whisper import load_whisper

    return load_whisper(
        model,
        device=device,
        engine=config.engine,
        language=config.language,
        task=config.task,
        words=config.words,
    )


def engine_name(model: Model, engine: EngineName | None, device: str) -> EngineName:
    """What will run `model` on this machine.

    Raises:
        Fatal: it cannot be what was asked for.
    """
    if model.engine == "ctc-transformers":
        return model.engine
    from transcribe.engines.whisper import runtime_name

    return runtime_name(model, device, engine)


def model_revision(model: Model, config: RunConfig) -> str:
    """The model's revision, and the language model's if there is one, joined by `+`.

    Raises:
        Fatal: the language model cannot be read.
    """
    if config.language_model is None:
        return model.revision
    try:
        return f"{model.revision}+{sha256(Path(config.language_model))[:16]}"
    except OSError as error:
        raise Fatal(
            f"--lm {config.language_model} cannot be read ({error.strerror});"
            " give a KenLM n-gram (.arpa or .bin)."
        ) from None


def refuse_impossible(engine: EngineName, config: RunConfig) -> None:
    """Say at once what an engine cannot do.

    Raises:
        Fatal: a flag asks for it.
    """
    if engine == "ctc-transformers" and config.task == "translate":
        raise Fatal("--task translate needs a Whisper model; CTC models only transcribe.")
    if engine != "ctc-transformers" and config.language_model is not None:
        raise Fatal("--lm works with CTC models only; Whisper has its own language model.")
