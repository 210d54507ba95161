"""What is to be done with shards that did not come back: try again, smaller, and at last give up.

A recording is given up only when it was alone in its shard and worker after worker died at it,
the last of them with nothing else at work. Pure: who died is told by `distributed.py`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transcribe.archive import Recording
from transcribe.errors import Fatal
from transcribe.shards import Shard, shard_id

TRIES_ALONE = 3
_PIECES = 8  # a worker dies at each size: cutting finer than in halves costs fewer of them
_IDLE_ROUNDS = 3
_TOO_MANY_TO_GIVE_UP = 8


@dataclass(frozen=True, slots=True)
class SetAside:
    """A shard that did not come back, and why.

    Attributes:
        faults: workers that died at it on machines that live; 0 if it was nobody's fault.
        reason: a dying worker's last words, empty if there were none.
    """

    shard: Shard
    faults: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A recording that no worker survives."""

    recording: Recording
    tries: int
    reason: str


class Recovery:
    """The rounds of a run: what is left to do after each of them."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._again = list(shards)
        self._last_try: list[Shard] = []
        self._tries: Counter[str] = Counter()
        self._recordings = sum(len(s.recordings) for s in shards)
        self._came_back = 0
        self._idle_rounds = 0
        self._progress = 0
        self.given_up: list[GivenUp] = []

    def next_round(self) -> tuple[list[Shard], bool]:
        """The shards to do next, and whether each must have the cluster for itself.

        Raises:
            Fatal: rounds go by in which nothing comes back and nothing is learned.
        """
        self._idle_rounds = 0 if self._progress else self._idle_rounds + 1
        self._progress = 0
        if self._idle_rounds > _IDLE_ROUNDS:
            left = len(self._again) + len(self._last_try)
            raise Fatal(
                f"{left} shards did not come back from Ray, {_IDLE_ROUNDS} times in a row; what is"
                " published stays. Look at the cluster's nodes and memory, then run the same"
                " command again."
            )
        if self._again:
            shards, self._again = self._again, []
            return shards, False
        shards, self._last_try = self._last_try, []
        return shards, True

    def came_back(self) -> None:
        """A shard was published."""
        self._came_back += 1
        self._progress += 1

    def set_aside(self, lost: SetAside) -> None:
        """A shard was not.

        Raises:
            Fatal: workers die at everything: the fault is not the recordings'.
        """
        recordings = lost.shard.recordings
        if not lost.faults:
            self._plan(lost.shard)
            return
        self._progress += 1
        if len(recordings) > 1:
            self._again += pieces(lost.shard)
            return
        (recording,) = recordings
        self._tries[recording.recording_id] += lost.faults
        tries = self._tries[recording.recording_id]
        if tries < TRIES_ALONE:
            self._plan(lost.shard)
            return
        if not self._came_back and self._recordings > _TOO_MANY_TO_GIVE_UP:
            raise Fatal(
                "Worker after worker died, and not one shard came back"
                f"{f' ({lost.reason})' if lost.reason else ''}: the recordings are not the reason."
                " Check that a worker has the memory that the model needs."
            )
        self.given_up.append(GivenUp(recording, tries, lost.reason))

    def _plan(self, shard: Shard) -> None:
        is_last = self._tries[shard.recordings[0].recording_id] >= TRIES_ALONE - 1
        (self._last_try if is_last and len(shard.recordings) == 1 else self._again).append(shard)


def pieces(shard: Shard) -> list[Shard]:
    """The shard cut into up to 8 of about as many recordings each; their order is kept."""
    recordings = shard.recordings
    n_pieces = min(_PIECES, len(recordings))
    cuts = [i * len(recordings) // n_pieces for i in range(n_pieces + 1)]
    parts = [recordings[a:b] for a, b in itertools.pairwise(cuts)]
    return [Shard(shard_id(part), part) for part in parts]
