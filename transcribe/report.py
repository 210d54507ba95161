"""Shard summaries -> the run's throughput report.

Pure arithmetic and plain data: knows nothing of Ray, storage or terminals. RTFx is audio
seconds per wall second; a recording counts once, however many channels it has, and a duplicate,
which shares another one's result, counts apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, Literal

from transcribe.bottleneck import EngineTime, verdict
from transcribe.budget import Bill
from transcribe.decode import SAMPLE_RATE
from transcribe.engines.base import EngineWork
from transcribe.pipeline import ShardSummary, StageSeconds

Ended = Literal["complete", "budget", "interrupted", "stopped"]

DECODE_STAGES = ("read", "decode", "resample", "speech_detection")
ENGINE_STAGES = ("features", "encoder", "decoder")  # parts of `recognise`
_WORK_STAGES = (*DECODE_STAGES, "recognise", *ENGINE_STAGES, "assemble", "publish")


@dataclass(slots=True)
class Totals:
    """Sums over the shards that are finished so far."""

    recordings: int = 0
    ok: int = 0
    empty: int = 0
    failed: int = 0
    duplicates: int = 0
    audio_seconds: float = 0.0
    duplicate_seconds: float = 0.0
    channel_seconds: float = 0.0
    speech_seconds: float = 0.0
    windows: int = 0
    shards: int = 0
    stages: StageSeconds = field(default_factory=StageSeconds)
    work: EngineWork = field(default_factory=EngineWork)
    failures: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, summaries: Iterable[ShardSummary]) -> Totals:
        """The sums over some shards."""
        totals = cls()
        for summary in summaries:
            totals.add(summary)
        return totals

    def add(self, summary: ShardSummary) -> None:
        """Count one more shard."""
        self.shards += 1
        for name in ("recordings", "ok", "empty", "failed", "duplicates", "windows"):
            setattr(self, name, getattr(self, name) + getattr(summary, name))
        for name in ("audio_seconds", "duplicate_seconds", "channel_seconds", "speech_seconds"):
            setattr(self, name, getattr(self, name) + getattr(summary, name))
        for stage in fields(StageSeconds):
            spent = getattr(self.stages, stage.name) + getattr(summary.seconds, stage.name)
            setattr(self.stages, stage.name, spent)
        self.work.add(summary.work)
        for kind, count in summary.failures.items():
            self.failures[kind] = self.failures.get(kind, 0) + count


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What a run was, for its report."""

    run_id: str
    ended: Ended
    archive: str
    out: str
    model: str
    engine: str
    device: str
    workers: int
    archive_recordings: int
    unlisted_folders: int
    already_transcribed: int
    superseded: int
    startup_seconds: float
    processing_seconds: float
    total_seconds: float
    driver_peak_bytes: int
    budget_reached: str = ""


_NO_BILL = Bill()


def report(
    facts: RunFacts, totals: Totals, summaries: Sequence[ShardSummary], bill: Bill = _NO_BILL
) -> dict[str, Any]:
    """The content of `report.json`; keys are documented in docs/output.md."""
    engine_seconds = facts.workers * facts.processing_seconds
    time = EngineTime.of(summaries, facts.workers)
    padding = _left_over(totals.work.heard_samples, totals.work.padded_samples)
    retries = _ratio(totals.work.retries_s, totals.stages.recognise)
    return {
        **asdict(facts),
        "recordings": totals.recordings,
        "ok": totals.ok,
        "empty": totals.empty,
        "failed": totals.failed,
        "duplicates": totals.duplicates,
        "failures": dict(sorted(totals.failures.items())),
        "shards": totals.shards,
        "audio_seconds": totals.audio_seconds,
        "duplicate_seconds": totals.duplicate_seconds,
        "channel_seconds": totals.channel_seconds,
        "speech_seconds": totals.speech_seconds,
        "windows": totals.windows,
        "rtfx": _ratio(totals.audio_seconds, facts.processing_seconds),
        "rtfx_with_startup": _ratio(totals.audio_seconds, facts.total_seconds),
        "stages": {name: _stage(totals, name) for name in _WORK_STAGES},
        "queue_seconds": {
            "before_recognise": totals.stages.decode_queue,
            "before_publish": totals.stages.publish_queue,
        },
        "batch_halvings": sum(s.batch_halvings for s in summaries),
        "smallest_batch_limit": min(
            (s.batch_limit for s in summaries if s.batch_limit is not None), default=None
        ),
        "cpu_seconds": {
            "decode": totals.stages.decode_cpu,
            "recognise": totals.stages.recognise_cpu,
        },
        "worker_busy_share": _ratio(totals.stages.recognise, engine_seconds),
        "device_busy_share": _ratio(
            sum(getattr(totals.stages, stage) for stage in ENGINE_STAGES), engine_seconds
        ),
        "engine_time": asdict(time),
        "padding_share": padding,
        "retries_share": retries,
        "decoder_idle_share": _left_over(totals.work.tokens, totals.work.token_slots),
        "bottleneck": asdict(
            verdict(
                time,
                facts.workers,
                {name: getattr(totals.stages, name) for name in DECODE_STAGES},
                {name: getattr(totals.stages, name) for name in ENGINE_STAGES},
            )
        ),
        "peak_bytes": {
            "driver": facts.driver_peak_bytes,
            "decode_worker": max((s.decode_peak_bytes for s in summaries), default=0),
            "engine_worker": max((s.recognise_peak_bytes for s in summaries), default=0),
        },
        **bill.as_report(totals.audio_seconds, _avoidable(totals, padding, retries)),
    }


def _stage(totals: Totals, name: str) -> dict[str, float | None]:
    """A stage's seconds, summed over workers, and its audio seconds per second."""
    spent: float = getattr(totals.stages, name)
    return {"seconds": spent, "rtfx": _ratio(totals.audio_seconds, spent)}


def _avoidable(totals: Totals, padding: float | None, retries: float | None) -> dict[str, float]:
    """Shares of recognition that bought nothing; padding costs where the encoder works."""
    once = 1 - (retries or 0.0)
    encoding = _ratio(totals.stages.encoder, totals.stages.recognise) or 0.0
    return {"retries": retries or 0.0, "padding": once * encoding * (padding or 0.0)}


def _left_over(used: float, whole: float) -> float | None:
    # A text that loops is cut without the end token that is counted for it.
    return max(0.0, 1 - used / whole) if whole > 0 else None


def _ratio(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None


def metric_rows(run_id: str, summaries: Iterable[ShardSummary]) -> list[dict[str, Any]]:
    """Rows of `metrics.parquet` (`schema.METRICS`), one per shard."""
    return [_metric_row(run_id, summary) for summary in summaries]


def _metric_row(run_id: str, summary: ShardSummary) -> dict[str, Any]:
    row = asdict(summary)
    row.pop("failures")
    seconds = row.pop("seconds")
    row.update({f"{name}_seconds": value for name, value in seconds.items()})
    work = summary.work
    row.pop("work")
    row["heard_seconds"] = work.heard_samples / SAMPLE_RATE
    row["padded_seconds"] = work.padded_samples / SAMPLE_RATE
    row["retries_seconds"] = work.retries_s
    row["tokens"], row["token_slots"] = work.tokens, work.token_slots
    row["run_id"] = run_id
    row["rtfx"] = _ratio(summary.audio_seconds, summary.seconds.recognise)
    for name in ("started_at", "finished_at"):
        row[name] = datetime.fromtimestamp(row[name], UTC)
    return row
