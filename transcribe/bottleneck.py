"""Shard summaries -> what the engines waited for, and in words what would make the run faster.

Pure arithmetic. An engine's time from the run's first decoding to the last recognised shard has
four parts that add up: at work, waiting for its model and its first shard, waiting for a next
shard, and without a shard at the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from transcribe.pipeline import ShardSummary

Kind = Literal["recognition", "decode", "store", "start", "tail", "nothing"]

_NOTICEABLE = 0.1  # share of the engines' time that is worth a remedy


@dataclass(frozen=True, slots=True)
class EngineTime:
    """Engine seconds, summed over all engines: `span_s` times their number is the sum of the rest.

    Attributes:
        span_s: from the first decoding to the end of the last recognition.
        busy_s: recognising, and making rows.
        start_s: before the first shard.
        starved_s: between shards.
        tail_s: after the last shard, while others were at work.
    """

    span_s: float = 0.0
    busy_s: float = 0.0
    start_s: float = 0.0
    starved_s: float = 0.0
    tail_s: float = 0.0

    @classmethod
    def of(cls, summaries: Iterable[ShardSummary], workers: int) -> EngineTime:
        """Reckoned back from when each shard was published, on the workers' clocks."""
        shards = [summary for summary in summaries if summary.seconds.recognise > 0]
        if not shards:
            return cls()
        begin = min(shard.started_at for shard in shards)
        by_worker: dict[str, list[tuple[float, float]]] = {}
        for shard in shards:
            by_worker.setdefault(shard.worker, []).append(at_work(shard))
        end = max(stop for spans in by_worker.values() for _, stop in spans)
        span = max(0.0, end - begin)
        # An engine that was replaced after a crash has two names; one that got no shard has none.
        engines = max(workers, 1)
        busy = sum(stop - start for spans in by_worker.values() for start, stop in spans)
        first = sorted(min(spans)[0] - begin for spans in by_worker.values())[:engines]
        last = sorted(end - max(stop for _, stop in s) for s in by_worker.values())[:engines]
        idle = max(0.0, engines * span - busy)
        start_s = min(idle, sum(first) + (engines - len(first)) * span)
        tail_s = min(idle - start_s, sum(last))
        return cls(span, busy, start_s, idle - start_s - tail_s, tail_s)


def at_work(shard: ShardSummary) -> tuple[float, float]:
    """When an engine began and ended a shard (seconds since the epoch)."""
    s = shard.seconds
    end = shard.finished_at - s.publish - s.publish_queue
    return end - s.recognise - s.assemble, end


@dataclass(frozen=True, slots=True)
class Verdict:
    """What holds a run back: `kind` for programs, `sentence` for people."""

    kind: Kind
    sentence: str


def verdict(
    time: EngineTime,
    workers: int,
    decode_seconds: Mapping[str, float],
    engine_seconds: Mapping[str, float],
) -> Verdict:
    """Name the bottleneck and its remedy.

    Args:
        time: the engines' time.
        workers: engines.
        decode_seconds: stages before recognition, summed over all tasks; `read` among them.
        engine_seconds: parts of recognition, summed over all engines.
    """
    whole = workers * time.span_s
    if whole <= 0 or time.busy_s <= 0:
        return Verdict("nothing", "Nothing was recognised, so nothing held the run back.")
    waits = {"start": time.start_s, "decode": time.starved_s, "tail": time.tail_s}
    longest = max(waits, key=lambda name: waits[name])
    share = waits[longest] / whole
    if share < _NOTICEABLE:
        return _recognition(time.busy_s / whole, engine_seconds, time.busy_s)
    if longest == "decode":
        return _starved(time, workers, decode_seconds)
    if longest == "start":
        return Verdict(
            "start",
            f"Start-bound: {share:.0%} of the engines' time passed before the first shard (loading"
            " the model, decoding the first shard). In a longer archive this share falls.",
        )
    return Verdict(
        "tail",
        f"Tail-bound: {share:.0%} of the engines' time passed without a shard at the end, while"
        " others were still at work. Smaller shards (--shard-minutes) or a longer archive shorten"
        " it.",
    )


def _recognition(busy: float, engine_seconds: Mapping[str, float], busy_s: float) -> Verdict:
    part = max(engine_seconds, key=lambda name: engine_seconds[name])
    most = engine_seconds[part] / busy_s
    inside = f", {most:.0%} of that in the {part}" if most > 0 else ""
    return Verdict(
        "recognition",
        f"Recognition-bound: the engines were at work {busy:.0%} of the time{inside}. Only more or"
        " faster engines would raise RTFx; more decoding would not.",
    )


def _starved(time: EngineTime, workers: int, decode_seconds: Mapping[str, float]) -> Verdict:
    """Decoding (or reading) is too slow: how much more of it would keep the engines at work."""
    spent = sum(decode_seconds.values())
    fed_span = time.span_s - time.starved_s / workers
    more = (spent / fed_span - spent / time.span_s) / workers
    gain = time.span_s / fed_span - 1
    if decode_seconds.get("read", 0.0) > spent / 2:
        return Verdict(
            "store",
            f"Store-bound: engines waited for recordings that were still being read,"
            f" {time.starved_s / (workers * time.span_s):.0%} of their time. Storage that is nearer"
            f" or faster would raise RTFx by {gain:.0%}.",
        )
    return Verdict(
        "decode",
        f"Decode-bound: {more:.1f} more decode cores per engine would raise RTFx by {gain:.0%}"
        f" (decoding kept {spent / time.span_s:.1f} cores busy).",
    )
