"""Shards on their way through rounds: what comes back is counted and shown, the rest tried again.

On the driver, between `recovery.py`, which says what to try, and `distributed.py`, which tries it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from rich.console import Console

from transcribe import distributed, pipeline
from transcribe.errors import BadAudio
from transcribe.monitor import Monitor
from transcribe.pipeline import Job, ShardSummary
from transcribe.progress import ProgressDisplay
from transcribe.recovery import GivenUp, Recovery, SetAside
from transcribe.report import Totals
from transcribe.shards import Shard

_LOG = logging.getLogger(__name__)

_WIND_DOWN_S = 8.0  # of the 20 s that a spot machine's notice leaves, and shutting down takes some


def work(
    shards: Sequence[Shard],
    job: Job,
    placement: distributed.Placement,
    console: Console,
    done: list[ShardSummary],
    monitor: Monitor,
) -> None:
    """Transcribe and publish the shards, round after round, until every recording has its row.

    When the budget is used up, what is being recognised is published and the rest is left.

    Args:
        shards: what is to be done.
        job: how.
        placement: how many engines to use at most.
        console: where progress goes.
        done: is added what is done, so that it is known also if this does not end well.
        monitor: is told what is done, and says when to stop.

    Raises:
        Fatal: the run cannot go on.
        KeyboardInterrupt: the user, or SIGTERM; what was recognised has been published.
    """
    if not shards:
        return
    recovery, fitting = Recovery(shards), placement
    with ProgressDisplay(console, sum(s.duration_s for s in shards)) as display:
        tally = _Tally(done, display, monitor)
        while True:
            left, must_be_alone = recovery.next_round()
            if not left or monitor.stopped:
                break
            workers = 1 if must_be_alone else fitting.workers
            stood_still = _round(left, job, workers, recovery, tally)
            fitting = distributed.fits_now(placement) if stood_still else placement
        for given_up in recovery.given_up:
            _LOG.warning("%s: %s", given_up.recording.uri, _sentence(given_up))
            row = pipeline.given_up_shard(given_up.recording, _problem(given_up), job)
            tally.add(pipeline.publish_shard(row, job.config.out), given_up.recording.duration_s)


def _round(
    shards: Sequence[Shard], job: Job, workers: int, recovery: Recovery, tally: _Tally
) -> bool:
    """One round; says whether it stood still."""
    planned_s = {shard.shard_id: shard.duration_s for shard in shards}
    with distributed.Round(shards, job, workers) as this_round:
        try:
            for outcome in this_round.outcomes():
                if outcome is None:
                    pass  # time goes by, and money
                elif isinstance(outcome, SetAside):
                    _log_set_aside(outcome)
                    recovery.set_aside(outcome)
                else:
                    recovery.came_back()
                    tally.add(outcome, planned_s[outcome.shard_id])
                if tally.is_enough:
                    for summary in this_round.wind_down(math.inf):
                        tally.add(summary, planned_s[summary.shard_id])
                    break
        except KeyboardInterrupt:
            for summary in this_round.wind_down(_WIND_DOWN_S):
                tally.add(summary, planned_s[summary.shard_id])
            raise
        return this_round.stood_still


class _Tally:
    """What is done, in figures and on the screen."""

    def __init__(
        self, done: list[ShardSummary], display: ProgressDisplay, monitor: Monitor
    ) -> None:
        self._done = done
        self._display = display
        self._monitor = monitor
        self._totals = Totals()
        self._planned_s = 0.0

    @property
    def is_enough(self) -> bool:
        """Whether the budget is used up."""
        return bool(self._monitor.stopped)

    def add(self, summary: ShardSummary, planned_s: float) -> None:
        """Count one more shard that was planned as so many seconds."""
        self._done.append(summary)
        self._totals.add(summary)
        self._planned_s += planned_s
        self._monitor.add(summary, planned_s)
        self._display.update(self._totals, self._planned_s, self._monitor.spent)
        _LOG.info(
            "shard %s: %d recordings, %d failed, %.0f s audio on %s",
            summary.shard_id,
            summary.recordings,
            summary.failed,
            summary.audio_seconds,
            summary.worker,
        )


def _log_set_aside(lost: SetAside) -> None:
    _LOG.log(
        logging.WARNING if lost.faults else logging.INFO,
        "shard %s did not come back: %d workers died at it%s; its %d recordings are tried again",
        lost.shard.shard_id,
        lost.faults,
        f" ({lost.reason})" if lost.reason else "",
        len(lost.shard.recordings),
    )


def _problem(given_up: GivenUp) -> BadAudio:
    return BadAudio("crashed_worker", _sentence(given_up))


def _sentence(given_up: GivenUp) -> str:
    words = f" ({given_up.reason})" if given_up.reason else ""
    return (
        f"{given_up.tries} workers died or had to be ended at this recording, which was alone in"
        f" their hands{words}; given up"
    )
