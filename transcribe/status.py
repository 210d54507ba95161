"""How a run is doing, told from its output alone.

Owns `OUT/runs/<run_id>/progress.json`: a run writes it anew every few seconds, each time whole, and
`transcribe status` reads it from anywhere. Knows nothing of Ray.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from transcribe import claims, publish, storage
from transcribe.errors import BadAudio, Fatal
from transcribe.progress import clock, hours

PROGRESS_FILE = "progress.json"
_SILENT_BEATS = 4  # so many heartbeats missed in a row, and half a minute, are a death
_GRACE_S = 30.0
_RUNS_LOOKED_AT = 5


@dataclass(slots=True)
class Progress:
    """One heartbeat of a run: the fields are the keys of progress.json.

    Attributes:
        state: `running`, `finished`, `stopped` (by its budget), `failed` or `interrupted`; `dead`
            is told by readers, never by the run.
        reason: why it ended, unless it finished.
        host: machine of the driver.
        updated_at: when this was written, seconds since 1970; likewise `started_at`.
        every_s: seconds until the next heartbeat is due.
        planned_seconds: audio to recognise, as estimated before; `planned_done_seconds` of it is
            through.
        usd: spent so far; None without a price.
    """

    run_id: str
    archive: str
    host: str
    started_at: float
    updated_at: float
    every_s: float
    device: str
    workers: int
    archive_recordings: int
    already_transcribed: int
    planned_recordings: int
    planned_shards: int
    planned_seconds: float
    state: str = "running"
    reason: str = ""
    recordings: int = 0
    ok: int = 0
    empty: int = 0
    failed: int = 0
    shards: int = 0
    audio_seconds: float = 0.0
    planned_done_seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)
    last_failures: list[str] = field(default_factory=list)
    machines: int = 0
    usd: float | None = None
    usd_per_hour: float | None = None
    max_spend: float | None = None
    max_hours: float | None = None

    def to_json(self) -> bytes:
        """The content of progress.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True).encode()

    @property
    def elapsed_s(self) -> float:
        """Seconds from the first heartbeat to this one."""
        return max(0.0, self.updated_at - self.started_at)

    @property
    def rtfx(self) -> float | None:
        """Audio seconds per second so far; None before the first shard."""
        return self.audio_seconds / self.elapsed_s if self.shards and self.elapsed_s else None

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the planned audio that is through; None before the first shard."""
        if self.planned_done_seconds <= 0:
            return None
        left = max(0.0, self.planned_seconds - self.planned_done_seconds)
        return self.elapsed_s * left / self.planned_done_seconds

    def life(self, now: float) -> str:
        """The state, with a run that no longer writes told as `dead`."""
        silent_for = now - self.updated_at
        if self.state == "running" and silent_for > _SILENT_BEATS * self.every_s + _GRACE_S:
            return "dead"
        return self.state


def progress_url(out: str, run_id: str) -> str:
    """Where a run writes its heartbeats."""
    return publish.run_url(out, run_id, PROGRESS_FILE)


def latest(out: str) -> list[Progress]:
    """The newest run of OUT, and before it older ones of other archives that still seem alive.

    A run whose process has ended on this very machine is told as dead at once.

    Raises:
        Fatal: OUT is not there, or no run has written there.
        Transient: the store does not answer, after retries.
    """
    out = storage.absolute(out)
    folder = storage.join(out, "runs")
    if not storage.exists(folder):
        raise Fatal(f"{out} has no runs in it; name the OUT of `transcribe run`.")
    urls = [o.uri for o in storage.list_objects(folder) if o.uri.endswith(f"/{PROGRESS_FILE}")]
    latest_urls = sorted(urls)[-_RUNS_LOOKED_AT:]  # run ids begin with the time
    found = [progress for url in latest_urls for progress in _read(url)]
    if not found:
        raise Fatal(
            f"No run in {out} has told its progress; try again in a minute if one has just begun,"
            " or run the same command again if it was interrupted."
        )
    for progress in found:
        if progress.state == "running" and claims.has_died(out, progress.archive):
            progress.state = "dead"
    now, newest_of = time.time(), {p.archive: p for p in found}  # one run of an archive at a time
    running = [p for p in found if p is newest_of[p.archive] and p.life(now) == "running"]
    return [p for p in running if p is not found[-1]] + found[-1:]


def _read(url: str) -> Iterator[Progress]:
    try:
        content = json.loads(storage.read(url))
        known = {f.name for f in dataclasses.fields(Progress)}
        yield Progress(**{k: v for k, v in content.items() if k in known})
    except (ValueError, TypeError, AttributeError):
        raise Fatal(f"{url} is damaged; another program wrote it, or another version.") from None
    except BadAudio:  # gone since it was listed
        return


def lines(progress: Progress, now: float) -> Iterator[tuple[str, str]]:
    """What a person wants to know of a run: labels and texts."""
    yield "run", f"{progress.run_id} on {progress.host} of {progress.archive}"
    yield "state", _state(progress, now)
    everything = progress.archive_recordings
    done = progress.already_transcribed + progress.recordings
    yield (
        "recordings",
        f"{done:,} of {everything:,} done ({progress.recordings:,} by this run:"
        f" {progress.ok:,} ok, {progress.empty:,} empty, {progress.failed:,} failed),"
        f" {max(0, everything - done):,} remaining",
    )
    # Duplicates, and shards that were cut up and tried again, come on top of the plan.
    shards = min(progress.shards, progress.planned_shards)
    yield (
        "audio",
        f"{hours(progress.audio_seconds)} hours, of about {hours(progress.planned_seconds)} planned"
        f" ({shards:,} of {progress.planned_shards:,} shards)",
    )
    if progress.rtfx is not None:
        at_work = f"{progress.workers} workers, {progress.device}; with start-up"
        yield "RTFx", f"{progress.rtfx:.1f} ({at_work})"
    if progress.life(now) == "running" and (left := progress.seconds_left) is not None:
        end = datetime.fromtimestamp(progress.updated_at + left, UTC)
        yield "time left", f"{clock(left)}, until {end:%Y-%m-%d %H:%M} UTC"
    if progress.usd is not None:
        yield "cost", _cost(progress)
    if progress.failures:
        kinds = sorted(progress.failures.items(), key=lambda item: (-item[1], item[0]))
        counted = ", ".join(f"{kind} {count}" for kind, count in kinds)
        yield "failures", f"{counted} (last: {', '.join(progress.last_failures)})"


def _state(progress: Progress, now: float) -> str:
    life = progress.life(now)
    silent_for = clock(max(0.0, now - progress.updated_at))
    if life == "running":
        return f"running for {clock(progress.elapsed_s)} (told {silent_for} ago)"
    if life == "dead":
        return (
            f"dead: no sign of life for {silent_for}. What is published stays; run the same"
            " command again to go on"
        )
    said = f"{life} {silent_for} ago after {clock(progress.elapsed_s)}"
    return f"{said}: {progress.reason}" if progress.reason else said


def _cost(progress: Progress) -> str:
    limit = f" of --max-spend {progress.max_spend:,.2f}" if progress.max_spend is not None else ""
    said = f"${progress.usd or 0:,.2f}{limit}"
    if progress.usd_per_hour:
        said += f", ${progress.usd_per_hour:,.2f} an hour with {progress.machines} machines"
    return said
