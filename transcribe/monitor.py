"""What goes on beside a run: its heartbeat, its bill, its limits and the news of it.

Owns the thread that does these while the driver waits for shards. What it needs of the cluster and
of the store comes in as functions, so that it knows neither.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType
from typing import Any

from transcribe.budget import THRESHOLDS, Bill, Limits, Meter, PaidMachine
from transcribe.errors import TranscribeError
from transcribe.pipeline import ShardSummary
from transcribe.printable import printable
from transcribe.status import Progress

_LOG = logging.getLogger(__name__)

EVERY_S = 5.0
_LAST_WORDS_S = 45.0  # for the last heartbeat, so that a dead store holds up no exit
_FAILURES_KEPT = 5


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a run is watched with.

    Attributes:
        put: stores a heartbeat.
        measure: publishes the state as metrics of the cluster.
        nodes: the machines that are up; asked of in the thread, since a dead cluster never answers.
    """

    put: Callable[[bytes], None]
    nodes: Callable[[], list[PaidMachine]]
    measure: Callable[[Progress], None]


class Monitor:
    """Context manager around the work on shards; `add` is told of every finished one.

    Args:
        begun: the state before the first shard.
        limits: when to stop.
        meter: counts what the machines cost.
        tell: delivers a message (event, text, facts) without waiting for it.
        around: cluster and store.
        paid_since: monotonic seconds since when the machines that are up count.

    Attributes:
        stopped: why the run has to stop before its end; empty while it may go on.
    """

    def __init__(
        self,
        begun: Progress,
        limits: Limits,
        meter: Meter,
        tell: Callable[[str, str, dict[str, Any]], None],
        around: Surroundings,
        paid_since: float,
    ) -> None:
        self.stopped = ""
        self._progress = begun
        self._limits = limits
        self._meter = meter
        self._tell = tell
        self._around = around
        self._nodes = around.nodes()
        self._meter.observe(self._nodes, paid_since)
        self._shard_seconds: list[float] = []
        self._busy_by_host: dict[str, float] = {}
        self._startup_usd: float | None = None
        self._told = 0  # thresholds
        self._lock = threading.Lock()  # over all of the above
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        with self._lock:
            self._account()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._progress.state, self._progress.reason = _outcome(error, self.stopped)
        self._ended.set()
        self._thread.join(timeout=_LAST_WORDS_S)

    def add(self, summary: ShardSummary, planned_s: float) -> None:
        """Count a finished shard that was planned to hold `planned_s` of audio."""
        with self._lock:
            progress = self._progress
            progress.recordings += summary.recordings
            progress.ok += summary.ok
            progress.empty += summary.empty
            progress.failed += summary.failed
            progress.shards += 1
            progress.audio_seconds += summary.audio_seconds
            progress.planned_done_seconds += planned_s
            for name, count in summary.failures.items():
                progress.failures[name] = progress.failures.get(name, 0) + count
            recent = [*progress.last_failures, *summary.failures]
            progress.last_failures = recent[-_FAILURES_KEPT:]
            host = summary.worker.rpartition(":")[0]
            busy = summary.seconds.recognise
            self._busy_by_host[host] = self._busy_by_host.get(host, 0.0) + busy
            if summary.windows:
                self._shard_seconds.append(busy)
            if self._startup_usd is None:
                since = time.time() - summary.started_at
                self._startup_usd = max(
                    0.0, self._meter.usd - self._meter.usd_per_hour * since / 3600
                )
            self._account()

    @property
    def spent(self) -> tuple[float, float] | None:
        """US dollars so far, and per hour now; None without a price."""
        with self._lock:
            usd, rate = self._progress.usd, self._progress.usd_per_hour
            return None if usd is None or rate is None else (usd, rate)

    def bill(self) -> Bill:
        """What it came to so far."""
        with self._lock:
            self._account()
            return self._meter.bill(self._busy_by_host, self._startup_usd or 0.0)

    def _account(self) -> None:
        """Bring time and money up to date; under the lock."""
        progress = self._progress
        progress.updated_at = time.time()
        self._meter.observe(self._nodes, time.monotonic())
        progress.machines = len(self._nodes)
        if len(self._meter.unpriced()) < len(self._meter.kinds):
            progress.usd, progress.usd_per_hour = self._meter.usd, self._meter.usd_per_hour
        drain_hours = fmean(self._shard_seconds) / 3600 if self._shard_seconds else 0.0
        why = self._limits.reached(
            self._meter.usd, self._meter.usd_per_hour, progress.elapsed_s / 3600, drain_hours
        )
        unfinished = progress.shards < progress.planned_shards
        if why and not self.stopped and unfinished and self._progress.state == "running":
            self.stopped = why

    def _beat_on(self) -> None:
        problem = ""  # of the last writing; said once
        while True:
            ending = self._ended.wait(self._progress.every_s)
            nodes = self._nodes if ending else self._around.nodes()
            with self._lock:
                self._nodes = nodes
                self._account()
                said = self._progress.to_json()
                news = self._news(ending)
            self._around.measure(self._progress)
            for event, text, facts in news:
                self._tell(event, text, facts)
            try:
                self._around.put(said)
                problem = ""
            except TranscribeError as error:
                if str(error) != problem:
                    _LOG.warning("the state of the run could not be written: %s", error)
                problem = str(error)
            if ending:
                return

    def _news(self, ending: bool) -> list[tuple[str, str, dict[str, Any]]]:
        """Messages that are due: event, text, facts; under the lock."""
        progress = self._progress
        facts = {
            "run_id": progress.run_id,
            "archive": progress.archive,
            "state": progress.state,
            "recordings": progress.recordings,
            "failed": progress.failed,
            "audio_hours": progress.audio_seconds / 3600,
            "hours": progress.elapsed_s / 3600,
            "usd": progress.usd,
        }
        name = f"Transcription {progress.run_id}"
        news = []
        used = self._limits.used(self._meter.usd, progress.elapsed_s / 3600)
        for share in THRESHOLDS[self._told :]:
            if used >= share:
                self._told += 1
                text = f"{name} has used {share:.0%} of its budget ({_so_far(progress)})."
                news.append(("budget", text, {**facts, "share": share}))
        if ending:
            why = f": {progress.reason}" if progress.reason else ""
            text = f"{name} {_ENDED[progress.state]}{why} ({_so_far(progress)})."
            news.append((progress.state, text, facts))
        return news


_ENDED = {
    "finished": "is finished",
    "stopped": "stopped",
    "failed": "failed",
    "interrupted": "was interrupted",
}


def _so_far(progress: Progress) -> str:
    said = f"{progress.audio_seconds / 3600:,.1f} audio hours, {progress.failed:,} failed"
    return said if progress.usd is None else f"{said}, ${progress.usd:,.2f}"


def _outcome(error: BaseException | None, stopped: str) -> tuple[str, str]:
    if error is None:
        return ("stopped", stopped) if stopped else ("finished", "")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ""
    if isinstance(error, TranscribeError):
        return "failed", printable(str(error))
    return "failed", f"unexpected {type(error).__name__}"
