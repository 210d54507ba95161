"""How each peer is called: its public interface, its fastest greedy settings, our weights.

Each loader imports its own package, so that a missing one is missed by nobody else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from jobs.benchmark.worker import Answer, Setup, Transcriber, one_by_one

_RATE = 16_000


def read_audio(file: str) -> npt.NDArray[np.float32]:
    """A file as 16 kHz mono, for peers that would start an ffmpeg program for it."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=_RATE)
    parts = []
    with av.open(file) as container:
        for frame in (*container.decode(audio=0), None):
            parts += [made.to_ndarray()[0] for made in resampler.resample(frame)]
    return np.concatenate(parts)


def _compute_type(setup: Setup) -> str:
    return "int8" if setup.device == "cpu" else "float16"


def _faster_whisper(setup: Setup) -> Any:
    from faster_whisper import WhisperModel

    return WhisperModel(
        setup.weights,
        device=setup.device,
        compute_type=_compute_type(setup),
        cpu_threads=setup.threads,
        local_files_only=True,
    )


def load_faster_whisper(setup: Setup) -> Transcriber:
    """faster-whisper as it is, one file after the other."""
    model = _faster_whisper(setup)

    def transcribe(file: str) -> str:
        segments, _ = model.transcribe(file, language=setup.language, beam_size=1, vad_filter=True)
        return "".join(segment.text for segment in segments)

    return one_by_one(transcribe)


def load_faster_whisper_batched(setup: Setup) -> Transcriber:
    """faster-whisper with the windows of a file in batches."""
    from faster_whisper import BatchedInferencePipeline

    pipeline = BatchedInferencePipeline(_faster_whisper(setup))

    def transcribe(file: str) -> str:
        segments, _ = pipeline.transcribe(file, language=setup.language, beam_size=1, batch_size=16)
        return " ".join(segment.text.strip() for segment in segments)

    return one_by_one(transcribe)


def load_whisper_s2t(setup: Setup) -> Transcriber:
    """WhisperS2T takes all files at once and batches their pieces together."""
    import whisper_s2t

    model = whisper_s2t.load_model(
        setup.weights,
        device=setup.device,
        compute_type=_compute_type(setup),
        cpu_threads=setup.threads,
    )

    def transcribe(files: Sequence[str]) -> Answer:
        spoken = model.transcribe_with_vad(
            list(files),
            lang_codes=[setup.language or "en"] * len(files),
            tasks=["transcribe"] * len(files),
            initial_prompts=[None] * len(files),
            batch_size=8,
        )
        return Answer([" ".join(piece["text"].strip() for piece in file) for file in spoken])

    return transcribe


def load_openai_whisper(setup: Setup) -> Transcriber:
    """OpenAI's own code; its model is filled from safetensors, as its files are pickles."""
    import torch
    import whisper

    from jobs.benchmark.weights import openai_dimensions, openai_state

    torch.set_num_threads(setup.threads)
    folder = Path(setup.weights)
    model = whisper.model.Whisper(whisper.model.ModelDimensions(**openai_dimensions(folder)))
    model.load_state_dict(openai_state(folder))
    model.to(setup.device).eval()
    on_gpu = setup.device == "cuda"

    def transcribe(file: str) -> str:
        heard = whisper.transcribe(
            model, read_audio(file), language=setup.language, fp16=on_gpu, verbose=None
        )
        return str(heard["text"])

    return one_by_one(transcribe)


def load_transformers(setup: Setup) -> Transcriber:
    """The pipeline of transformers, in the long-form mode that loses no text."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(setup.threads)
    recogniser: Any = pipeline(
        "automatic-speech-recognition",
        model=setup.weights,
        dtype=torch.float32 if setup.device == "cpu" else torch.bfloat16,
        device=setup.device,
    )
    options: dict[str, Any] = {"num_beams": 1, "task": "transcribe"}
    if setup.language is not None:
        options["language"] = setup.language

    def transcribe(file: str) -> str:
        audio = {"raw": read_audio(file), "sampling_rate": _RATE}
        heard = recogniser(audio, return_timestamps=True, generate_kwargs=options)
        return str(heard["text"])

    return one_by_one(transcribe)


def load_whisper_cpp(setup: Setup) -> Transcriber:
    """whisper.cpp through its binding."""
    from pywhispercpp.model import Model

    model = Model(
        setup.weights,
        n_threads=setup.threads,
        language=setup.language or "auto",
        print_progress=False,
        print_realtime=False,
        redirect_whispercpp_logs_to=None,
    )

    def transcribe(file: str) -> str:
        return " ".join(segment.text.strip() for segment in model.transcribe(read_audio(file)))

    return one_by_one(transcribe)
