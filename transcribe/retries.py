"""How long a store that does not answer is waited for, and when an object itself is to blame.

Owns budgets and waits. Knows nothing of file systems or HTTP: `storage.py` says which failures
pass (`Transient`) and whether the store still answers.

Outside of `patient` the answer is wanted soon: a wrong address, or a network that is not there,
should not look like a run that hangs. Inside, hours of work are at stake, and an outage of some
minutes is waited out.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from transcribe.errors import TranscribeError, Transient

log = logging.getLogger(__name__)

T = TypeVar("T")

IMPATIENT_S = 20.0
PATIENCE_S = 600.0
"""The longest outage of a store that a run at work survives. A deadline on a stage must allow
for it: inside `patient`, one call may wait this long, and for one last answer (`storage`)."""

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 20.0
_SAY_AFTER_S = 10.0
_SAY_EVERY_S = 60.0


class _Patience:
    """How many `patient` blocks are open in this process, whichever thread opened them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_open = 0
        self._said_at = -_SAY_EVERY_S

    @property
    def seconds(self) -> float:
        return PATIENCE_S if self._n_open else IMPATIENT_S

    def enter(self, n: int) -> None:
        with self._lock:
            self._n_open += n

    def is_time_to_say(self) -> bool:
        """True once a minute, whatever number of threads ask."""
        with self._lock:
            due = time.monotonic() - self._said_at >= _SAY_EVERY_S
            if due:
                self._said_at = time.monotonic()
            return due


_patience = _Patience()


@contextmanager
def patient() -> Iterator[None]:
    """While open, calls to stores from any thread of this process wait up to `PATIENCE_S`."""
    _patience.enter(1)
    try:
        yield
    finally:
        _patience.enter(-1)


def attempt(
    operation: Callable[[], T],
    translated: Callable[[Exception], TranscribeError | None],
    blame: Callable[[Transient], TranscribeError],
) -> T:
    """Run `operation`, again after a passing failure, until it succeeds or patience ends.

    Waits grow from half a second, doubled each time up to `LONGEST_WAIT_S`, each drawn between
    nothing and the whole (full jitter: a thousand workers must not come back at once).

    Args:
        operation: one try, without retries of its own.
        translated: the consequence of what it raised; None for a defect of ours, which is
            raised as it is. Only `Transient` is tried again.
        blame: asked at the end of patience whether it was the store or the one object.

    Raises:
        TranscribeError: what `translated` or `blame` made of the failure.
    """
    started = time.monotonic()
    longest = FIRST_WAIT_S
    while True:
        try:
            return operation()
        except TranscribeError:
            raise
        except Exception as error:
            failure = translated(error)
            if failure is None:
                raise
            if not isinstance(failure, Transient):
                raise failure from error
            wait_s = random.uniform(0, longest)
            spent, limit = time.monotonic() - started, _patience.seconds
            if spent + wait_s > limit:
                raise _final(
                    blame(Transient(f"{failure} (tried for {_minutes(spent)})"))
                ) from error
            if spent > _SAY_AFTER_S and _patience.is_time_to_say():
                log.warning("%s; trying again for up to %s", failure, _minutes(limit))
        time.sleep(wait_s)
        longest = min(2 * longest, LONGEST_WAIT_S)


def _final(failure: TranscribeError) -> TranscribeError:
    if isinstance(failure, Transient):
        return Transient(f"{failure}; run the same command again when it answers")
    return failure


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
