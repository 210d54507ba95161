"""Who takes part, what each needs, and how it may be laid out on the cores.

A table of plain data: importing it imports no contender.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Weights = Literal["ctranslate2", "transformers", "ggml"]
Side = Literal["ours", "peer"]

OURS = "transcribe"
BARE = "transcribe-bare"
ONE_WORKER = "transcribe-one-worker"


@dataclass(frozen=True, slots=True)
class Layout:
    """Processes that share the archive, and threads (or Ray workers) in each.

    Attributes:
        cores: cores that a process is bound to; None leaves it all of them.
        on_ray: whether `threads` are workers on a Ray of its own.
    """

    processes: int
    threads: int
    cores: int | None = None
    on_ray: bool = False

    def __str__(self) -> str:
        if self.on_ray:
            return f"{self.threads} worker" + ("s" if self.threads > 1 else "")
        processes = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        return f"{processes} x {self.threads} thread" + ("s" if self.threads > 1 else "")


@dataclass(frozen=True, slots=True)
class Contender:
    """One program to be measured.

    Attributes:
        name: its name on the command line and in report.json.
        title: its name for people.
        side: `ours`, or a `peer`.
        packages: distributions it needs; their versions are reported.
        weights: format of the weights it reads; None finds them by the model's name.
        settings: what is set, in words; the rest is as its makers left it.
        on_ray: whether it shares work out by itself, so that a layout is a number of workers.
    """

    name: str
    title: str
    side: Side
    packages: tuple[str, ...]
    weights: Weights | None
    settings: str
    on_ray: bool = False


CONTENDERS: tuple[Contender, ...] = (
    Contender(
        OURS,
        "transcribe",
        "ours",
        ("transcribe", "ray", "ctranslate2"),
        None,
        "the job, on Ray, as transcribe run starts it",
        on_ray=True,
    ),
    Contender(
        BARE,
        "transcribe without Ray",
        "ours",
        ("transcribe", "ctranslate2"),
        None,
        "the same pipeline in plain processes (pipeline.run_shards)",
    ),
    Contender(
        "faster-whisper-batched",
        "faster-whisper, batched",
        "peer",
        ("faster-whisper", "ctranslate2"),
        "ctranslate2",
        "BatchedInferencePipeline, batch_size=16, int8 (GPU: float16), beam_size=1",
    ),
    Contender(
        "faster-whisper",
        "faster-whisper, sequential",
        "peer",
        ("faster-whisper", "ctranslate2"),
        "ctranslate2",
        "int8 (GPU: float16), beam_size=1, vad_filter=True",
    ),
    Contender(
        "whisper-s2t",
        "WhisperS2T (reborn)",
        "peer",
        ("whisper-s2t-reborn", "ctranslate2"),
        "ctranslate2",
        "transcribe_with_vad, batch_size=8, int8 (GPU: float16)",
    ),
    Contender(
        "openai-whisper",
        "openai-whisper",
        "peer",
        ("openai-whisper", "torch"),
        "transformers",
        "greedy with its own fallbacks, float32 (GPU: float16); decoded by PyAV",
    ),
    Contender(
        "transformers",
        "transformers pipeline",
        "peer",
        ("transformers", "torch"),
        "transformers",
        "sequential long-form, num_beams=1, float32 (GPU: bfloat16); decoded by PyAV",
    ),
    Contender(
        "ray-example",
        "Ray Data example",
        "peer",
        ("ray", "transformers", "torch"),
        "transformers",
        "30 s pieces of each file, map_batches of 8 through transformers, num_beams=1",
        on_ray=True,
    ),
    Contender(
        "whisper.cpp",
        "whisper.cpp (pywhispercpp)",
        "peer",
        ("pywhispercpp",),
        "ggml",
        "q8_0, greedy; decoded by PyAV",
    ),
)

SCALING: tuple[Contender, ...] = (
    Contender(
        ONE_WORKER,
        "transcribe, one worker on one core",
        "ours",
        ("transcribe", "ray", "ctranslate2"),
        None,
        "the job with --workers 1, bound to one core",
        on_ray=True,
    ),
)


def layouts(contender: Contender, cores: int, device: str) -> Sequence[Layout]:
    """The layouts to choose from: one process of all threads, or one process a core."""
    if contender.name == ONE_WORKER:
        return [Layout(1, 1, cores=1, on_ray=True)]
    if device == "cuda":
        return [Layout(1, 1, on_ray=contender.on_ray)]
    if contender.on_ray or cores == 1:
        return [Layout(1, cores, on_ray=contender.on_ray)]
    if contender.name == BARE:  # an engine of ours has one thread
        return [Layout(cores, 1)]
    return [Layout(cores, 1), Layout(1, cores)]
