"""What a person sees while a run goes on: a live bar, or a line now and then in a log.

Owns wording and formatting. Knows nothing of Ray or storage.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from transcribe.printable import printable
from transcribe.report import Totals

_LOG_EVERY_S = 10.0


class ProgressDisplay:
    """Audio hours done of those planned, RTFx, time left, failures."""

    def __init__(self, console: Console, planned_seconds: float) -> None:
        self._console = console
        self._planned = max(planned_seconds, 1e-9)
        self._started = time.monotonic()
        self._last_line = self._started
        self._live = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._live.add_task("transcribing", total=self._planned, line="starting")

    def __enter__(self) -> ProgressDisplay:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def update(
        self,
        totals: Totals,
        planned_done_seconds: float,
        spent: tuple[float, float] | None = None,
    ) -> None:
        """Show the state after one more shard.

        Args:
            totals: what is finished.
            planned_done_seconds: planned audio seconds of the finished shards; the plan may
                be an estimate, so the time left is reckoned in planned seconds.
            spent: US dollars so far, and per hour now; None without a price.
        """
        now = time.monotonic()
        elapsed = now - self._started
        left = max(0.0, self._planned - planned_done_seconds)
        eta = elapsed * left / planned_done_seconds if planned_done_seconds else None
        line = _line(totals, self._planned, elapsed, eta, spent)
        self._live.update(self._task, completed=planned_done_seconds, line=line)
        finished = left <= 0
        if not self._console.is_terminal and (finished or now - self._last_line >= _LOG_EVERY_S):
            self._console.print(line, highlight=False, soft_wrap=True)
            self._last_line = now


def _line(
    totals: Totals,
    planned_s: float,
    elapsed: float,
    eta: float | None,
    spent: tuple[float, float] | None,
) -> str:
    rate = totals.audio_seconds / elapsed if elapsed else 0.0
    left = f"{clock(eta)} left" if eta is not None else "time left unknown"
    cost = f", ${spent[0]:,.2f} at ${spent[1]:,.2f} an hour" if spent is not None else ""
    return (
        f"{hours(totals.audio_seconds)} of about {hours(planned_s)} audio hours,"
        f" RTFx {rate:.1f}, {left}, {totals.failed} failed{cost}"
    )


def hours(seconds: float) -> str:
    """Audio seconds as hours, with digits enough for small archives."""
    value = seconds / 3600
    return f"{value:.3f}" if value < 1 else f"{value:,.1f}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


_SLOWEST = 3  # stages; report.json has them all


def print_summary(console: Console, result: dict[str, object]) -> None:
    """The run's result in a few lines (`result`: content of report.json)."""
    lines = _summary_lines(result)
    width = max(len(label) for label, _ in lines) + 2
    for label, text in lines:
        line = printable(f"{label:{width}}{text}")
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def _summary_lines(result: dict[str, object]) -> list[tuple[str, str]]:
    lines = [
        ("recordings", f"{result['ok']} ok, {result['empty']} empty, {result['failed']} failed"),
        (
            "audio",
            f"{hours(_number(result['audio_seconds']))} hours,"
            f" of which speech {hours(_number(result['speech_seconds']))} (all channels)",
        ),
        (
            "time",
            f"{clock(_number(result['processing_seconds']))}, and"
            f" {clock(_number(result['startup_seconds']))} to start",
        ),
        (
            "RTFx",
            f"{_number(result['rtfx']):.1f} ({result['workers']} workers,"
            f" {result['device']}; {_number(result['rtfx_with_startup']):.1f} with start-up)",
        ),
    ]
    stages = result["stages"]
    if isinstance(stages, dict):
        timed = sorted((s["rtfx"], name) for name, s in stages.items() if s["rtfx"])[:_SLOWEST]
        each = ", ".join(f"{name.replace('_', ' ')} {rtfx:,.0f}" for rtfx, name in timed)
        if each:
            lines.append(("slowest stages", f"RTFx {each}"))
    if result["duplicates"]:
        repeated = hours(_number(result["duplicate_seconds"]))
        shared = (
            f"{result['duplicates']} share another's result ({repeated} hours, not in the rest)"
        )
        lines.insert(1, ("duplicates", shared))
    failures = result["failures"]
    if isinstance(failures, dict) and failures:
        lines.append(("failures", ", ".join(f"{kind} {count}" for kind, count in failures.items())))
    lines += _cost_lines(result["cost"], result["machines"])
    lines.append(("output", f"{result['out']}/transcripts/*.parquet"))
    lines.append(("report", f"{result['out']}/runs/{result['run_id']}/report.html"))
    return lines


def _cost_lines(cost: object, machines: object) -> list[tuple[str, str]]:
    """The bill, if there is a price."""
    if not isinstance(cost, dict) or not isinstance(machines, dict) or cost["usd"] is None:
        return []
    took = ", ".join(
        f"{each['hours']:.2f} h of {kind} at ${_number(each['usd_per_hour']):,.2f}"
        for kind, each in machines.items()
    )
    said = (
        f"${cost['usd']:,.2f}, ${_number(cost['usd_per_1000_audio_hours']):,.2f} per 1,000 audio"
        f" hours ({took}); of it ${_number(cost['idle_usd']):,.2f} idle"
    )
    return [("cost", said)]


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
