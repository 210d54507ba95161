"""Who is at work on what, since when, and what died at it: the memory of a run's workers.

Workers say when they begin and when they end; what begins anew without having ended has died in
between. Pure: the time is given by whoever asks, and what "dead" means is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from transcribe.retries import PATIENCE_S

Stage = Literal["load", "decode", "recognise", "publish"]
Answer = Literal["go", "set aside", "stop"]

DEATHS_IN_PLACE = 2
"""Workers that may die at a shard before it is set aside; the first is often a lost machine."""

# A store that is away is waited for (retries.PATIENCE_S), and so must be who waits for it.
_GRACE_S: Mapping[Stage, float] = {
    "load": 3600.0,  # weights may come from a hub first
    "decode": 2 * PATIENCE_S,
    "recognise": 300.0,
    "publish": 3 * PATIENCE_S,
}
# Seconds of work for a second of audio, as long as nothing has been measured: the largest model
# on one slow core, every window tried four times.
_UNKNOWN_PACE: Mapping[Stage, float] = {"decode": 2.0, "recognise": 20.0}
_LEAST_PACE = 0.5
_SLOWER_THAN_SEEN = 10.0


@dataclass(frozen=True, slots=True)
class Worker:
    """A process on a node; `started` tells it from a later one with the same number."""

    node_id: str
    pid: int
    started: str


@dataclass(frozen=True, slots=True)
class Work:
    """A stage of a shard in a worker's hands.

    Attributes:
        audio_s: what its deadline is reckoned from.
        part: number of the part of a shard that had to be cut; None is all of it.
    """

    shard_id: str
    stage: Stage
    audio_s: float
    worker: Worker
    began: float
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What a watch saw.

    Attributes:
        at_work: all that has begun and not ended.
        overdue: those of it that are past their deadline.
        unpublished: whole shards that are being recognised, or are and wait to be published.
        events: grows with everything that happens; standing still shows in it.
        loads_in_vain: engines that began to load since one last was ready.
        last_words: of a worker that ended by itself, if any did.
    """

    at_work: tuple[Work, ...] = ()
    overdue: tuple[Work, ...] = ()
    unpublished: int = 0
    events: int = 0
    loads_in_vain: int = 0
    last_words: str = ""


class Watch:
    """What the workers of one round said."""

    def __init__(self) -> None:
        self._at_work: dict[tuple[str, Stage, int | None], Work] = {}
        self._unpublished: set[str] = set()
        self._died: dict[str, list[Worker]] = {}
        self._words: dict[str, str] = {}
        self._last_words = ""
        self._slowest: dict[Stage, float] = {}
        self._stopping = False
        self._events = 0
        self._loads_in_vain = 0

    def begin(self, work: Work) -> Answer:
        """A worker asks to begin; whoever had begun the same before is dead."""
        self._events += 1
        before = self._at_work.pop((work.shard_id, work.stage, work.part), None)
        if work.stage == "load":
            self._loads_in_vain += 1
            self._at_work[work.shard_id, work.stage, work.part] = work
            return "go"
        if before is not None:
            self._died.setdefault(work.shard_id, []).append(before.worker)
        if self._stopping and work.stage != "publish":
            return "stop"
        if len(self._died.get(work.shard_id, ())) >= DEATHS_IN_PLACE:
            return "set aside"
        self._at_work[work.shard_id, work.stage, work.part] = work
        if work.stage == "recognise" and work.part is None:
            self._unpublished.add(work.shard_id)
        return "go"

    def end(self, work: Work, now: float) -> None:
        """A worker has done what it began."""
        self._events += 1
        key = work.shard_id, work.stage, work.part
        if self._at_work.get(key) == work:
            del self._at_work[key]
        if work.stage == "load":
            self._loads_in_vain = 0
        elif work.stage == "publish":
            self._unpublished.discard(work.shard_id)
        elif work.audio_s > 0:
            pace = (now - work.began) / work.audio_s
            self._slowest[work.stage] = max(pace, self._slowest.get(work.stage, 0.0))

    def explain(self, shard_id: str, words: str) -> None:
        """A worker's last words about a shard, before it ends by itself."""
        self._words[shard_id] = self._last_words = words

    def deaths(self, shard_id: str) -> tuple[tuple[Worker, ...], str]:
        """Workers that died at a shard, and the last words of one."""
        silent = [work.worker for (shard, *_), work in self._at_work.items() if shard == shard_id]
        return (*self._died.get(shard_id, ()), *silent), self._words.get(shard_id, "")

    def stop(self) -> None:
        """Let nothing begin any more but publishing."""
        self._stopping = True

    def look(self, now: float) -> Look:
        """What goes on, and what should have ended by now."""
        at_work = tuple(self._at_work.values())
        return Look(
            at_work=at_work,
            overdue=tuple(w for w in at_work if now - w.began > self._deadline_s(w)),
            unpublished=len(self._unpublished),
            events=self._events,
            loads_in_vain=self._loads_in_vain,
            last_words=self._last_words,
        )

    def _deadline_s(self, work: Work) -> float:
        return deadline_s(work.stage, work.audio_s, self._slowest.get(work.stage))


def deadline_s(stage: Stage, audio_s: float, slowest_pace: float | None) -> float:
    """Seconds after which a worker counts as stuck.

    Args:
        stage: what it does.
        audio_s: audio seconds that it holds.
        slowest_pace: most seconds a second of audio took in this stage so far; None if unknown.
    """
    if stage not in _UNKNOWN_PACE:
        return _GRACE_S[stage]
    pace = _UNKNOWN_PACE[stage]
    if slowest_pace is not None:
        pace = max(_LEAST_PACE, _SLOWER_THAN_SEEN * slowest_pace)
    return _GRACE_S[stage] + pace * audio_s
