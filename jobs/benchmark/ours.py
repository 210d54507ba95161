"""Our two contenders: the job on Ray, and the same pipeline in a plain process."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from jobs.benchmark.worker import Answer, Setup, Transcriber
from transcribe import pipeline, run
from transcribe.archive import estimate_durations, list_archive
from transcribe.config import RunConfig
from transcribe.engines.load import load_engine
from transcribe.pipeline import Job
from transcribe.shards import plan_shards

# As a large archive has many: with fewer the last shard tells the time, with more hardly any
# windows are decoded together.
_SHARDS_PER_WORKER = 4
_MIN_SHARD_MINUTES = 0.25
_MAX_SHARD_MINUTES = 10.0


def load_job(setup: Setup) -> Transcriber:
    """`transcribe run` on a Ray of its own, which every run starts and ends.

    `seconds` leaves out the start of Ray and the loading of models, as for every contender, but
    not what was decoded meanwhile (`warm_seconds`).
    """
    numbers = itertools.count()

    def transcribe(files: Sequence[str]) -> Answer:
        config = _config(setup, files, next(numbers))
        report = run.transcribe(config, address=None, console=Console(stderr=True, quiet=True))
        metrics = Path(config.out) / "runs" / report["run_id"] / "metrics.parquet"
        shards = [_with_epochs(row) for row in pq.read_table(metrics).to_pylist()]
        cpu = report["cpu_seconds"]
        return Answer(
            _texts(config.out, files),
            seconds=warm_seconds(shards, setup.threads),
            cpu_seconds=cpu["decode"] + cpu["recognise"],
            report=report,
            shards=shards,
        )

    return transcribe


def load_bare(setup: Setup) -> Transcriber:
    """Shard after shard in this process: decode, recognise, publish.

    Listing the archive is not in `seconds`, as it is not in a job's.
    """
    numbers = itertools.count()
    engine = None

    def transcribe(files: Sequence[str]) -> Answer:
        nonlocal engine
        config = _config(setup, files, next(numbers))
        plan = run.prepare(config, lambda sentence: None)
        job = Job(
            config=config,
            run_id=plan.run_id,
            model_revision=plan.model_revision,
            engine=plan.engine,
            config_fingerprint=plan.config_fingerprint,
            device=setup.device,
        )
        engine = engine or load_engine(job)
        started = time.perf_counter()
        for _ in pipeline.run_shards(plan.shards, job, engine):
            pass
        return Answer(_texts(config.out, files), seconds=time.perf_counter() - started)

    return transcribe


def _config(setup: Setup, files: Sequence[str], number: int) -> RunConfig:
    """The settings of one run over `files`, which a manifest names."""
    scratch = Path(setup.scratch)
    manifest = scratch / f"files-{number}.jsonl"
    manifest.write_text("".join(json.dumps({"uri": file}) + "\n" for file in files))
    config = RunConfig(
        archive=str(manifest),
        out=str(scratch / f"out-{number}"),
        model=setup.model,
        language=setup.language,
        device="cuda" if setup.device == "cuda" else "cpu",
        workers=setup.threads,
        max_failed=1.0,
    )
    recordings = estimate_durations(list_archive(config.archive))
    total_minutes = sum(shard.duration_s for shard in plan_shards(recordings)) / 60
    wanted = total_minutes / (setup.threads * _SHARDS_PER_WORKER)
    minutes = min(_MAX_SHARD_MINUTES, max(_MIN_SHARD_MINUTES, wanted))
    return replace(config, shard_minutes=minutes)


def _with_epochs(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.parquet with its moments as seconds since the epoch: it becomes JSON."""
    return {k: v.timestamp() if isinstance(v, datetime) else v for k, v in row.items()}


def _texts(out: str, files: Iterable[str]) -> list[str | None]:
    columns = ["uri", "status", "text"]
    rows = pq.read_table(Path(out) / "transcripts", columns=columns).to_pylist()
    heard = {row["uri"]: None if row["status"] == "failed" else row["text"] or "" for row in rows}
    return [heard.get(file) for file in files]


_BEFORE_RECOGNITION = ("read", "decode", "resample", "speech_detection")


def warm_seconds(shards: Sequence[Mapping[str, Any]], cores: int) -> float:
    """What a run would have taken with its engines loaded (rows of metrics.parquet,
    moments in seconds since the epoch).

    From the first recognition to the last published file, and what had been decoded before
    that, as if all cores had done it together.
    """
    begin = min(_recognition_began(shard) for shard in shards)
    end = max(shard["finished_at"] for shard in shards)
    ahead = sum(shard["decode_cpu_seconds"] * _share_before(shard, begin) for shard in shards)
    return float(end - begin + ahead / cores)


def _recognition_began(shard: Mapping[str, Any]) -> float:
    after = ("recognise", "assemble", "publish_queue", "publish")
    return float(shard["finished_at"] - sum(shard[f"{stage}_seconds"] for stage in after))


def _share_before(shard: Mapping[str, Any], moment: float) -> float:
    """Part of a shard's decoding that lay before `moment`."""
    took = sum(shard[f"{stage}_seconds"] for stage in _BEFORE_RECOGNITION)
    share = (moment - shard["started_at"]) / took if took > 0 else 0.0
    return float(min(1.0, max(0.0, share)))
