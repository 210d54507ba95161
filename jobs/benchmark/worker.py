"""One process of a contender: loads it, warms it up, and transcribes the files it is told.

Started as `python -m jobs.benchmark.worker`; JSON lines on stdin and stdout, so that it can be
watched from outside like any program:

    <- the fields of `Setup`           -> {"ready": true} or {"failed": why} or {"missing": what}
    <- {"files": [...]}                -> {"texts": [...], ...}
    <- end of input                    the process ends
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO


@dataclass(frozen=True, slots=True)
class Setup:
    """What a contender needs to know before it starts.

    Attributes:
        contender: its name in `contenders.py`.
        model: `--model`, for ours.
        weights: directory or file of the same weights in its format; empty for ours.
        threads: threads, or workers of a contender on Ray.
        device: `cpu` or `cuda`.
        language: code of all speech; None has it detected.
        warm_up: one short recording; empty for none.
        scratch: an empty folder of its own.
    """

    contender: str
    model: str
    weights: str
    threads: int
    device: str
    language: str | None
    warm_up: str
    scratch: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a list of files.

    Attributes:
        texts: one a file, in their order; None if it failed.
        seconds: of one who knows them better than who waits for it; else None.
        cpu_seconds: likewise.
        report: report.json of a run of ours; else None.
        shards: rows of its metrics.parquet, moments in seconds since the epoch.
    """

    texts: list[str | None]
    seconds: float | None = None
    cpu_seconds: float | None = None
    report: dict[str, Any] | None = None
    shards: Sequence[dict[str, Any]] = ()


Transcriber = Callable[[Sequence[str]], Answer]

_LOADERS = {
    "transcribe": "jobs.benchmark.ours:load_job",
    "transcribe-one-worker": "jobs.benchmark.ours:load_job",
    "transcribe-bare": "jobs.benchmark.ours:load_bare",
    "faster-whisper-batched": "jobs.benchmark.peers:load_faster_whisper_batched",
    "faster-whisper": "jobs.benchmark.peers:load_faster_whisper",
    "whisper-s2t": "jobs.benchmark.peers:load_whisper_s2t",
    "openai-whisper": "jobs.benchmark.peers:load_openai_whisper",
    "transformers": "jobs.benchmark.peers:load_transformers",
    "whisper.cpp": "jobs.benchmark.peers:load_whisper_cpp",
    "ray-example": "jobs.benchmark.ray_example:load",
}


def one_by_one(transcribe: Callable[[str], str]) -> Transcriber:
    """A contender that takes one file at a time; what it cannot read is its failure alone."""

    def all_of(files: Sequence[str]) -> Answer:
        texts: list[str | None] = []
        for file in files:
            try:
                texts.append(transcribe(file))
            except Exception as error:
                print(f"{file}: {error!r}", file=sys.stderr)
                texts.append(None)
        return Answer(texts)

    return all_of


def _load(setup: Setup) -> Transcriber:
    module, _, function = _LOADERS[setup.contender].partition(":")
    load: Callable[[Setup], Transcriber] = getattr(importlib.import_module(module), function)
    return load(setup)


def _start(setup: Setup) -> tuple[dict[str, Any], Transcriber | None]:
    try:
        transcribe = _load(setup)
        if setup.warm_up:
            transcribe([setup.warm_up])
    except ImportError as error:
        return {"missing": error.name or str(error)}, None
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}, None
    return {"ready": True}, transcribe


def main(told: TextIO, answers: TextIO) -> None:
    """Serve until the input ends."""

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    greeting, transcribe = _start(Setup(**json.loads(told.readline())))
    answer(greeting)
    for line in told if transcribe else ():
        assert transcribe is not None
        try:
            given = transcribe(json.loads(line)["files"])
        except Exception as error:
            answer({"failed": f"{type(error).__name__}: {error}"[:500]})
        else:
            answer({name: getattr(given, name) for name in Answer.__slots__})


if __name__ == "__main__":
    # Libraries print to stdout as they like: answers go out by a door of their own.
    private = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, private)
