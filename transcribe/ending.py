"""Told to end, by Ctrl-C or SIGTERM: in order if possible, in time whatever hangs.

Owns the two signals, the sentence that follows them and how the process goes. Must not know: what
a run is.

The first signal raises KeyboardInterrupt in the main thread, for the run to publish what is done.
It may land anywhere, also where foreign code swallows it, or in the middle of taking a lock that
is then never given back. So a thread counts the time, and ends the process when it is up.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

IN_TIME_S = 18.0
"""From the signal to the end; a spot machine is gone after 30 s, or 25 on Kubernetes."""

_WHAT = {signal.SIGINT: "Interrupted", signal.SIGTERM: "Told to end (SIGTERM)"}


@contextmanager
def process_of() -> Iterator[None]:
    """Let the body be the whole process, which ends with its exit code and nothing after it.

    Whatever is registered with `atexit` is still done; the interpreter is not taken down. Threads
    that wait for Ray outlive a run whose head or store is gone. One that wakes up in C++ while the
    interpreter goes is unwound through code that must not be, and the process aborts (CPython
    before 3.14: `PyEval_RestoreThread` calls `pthread_exit`).
    """
    code = 0

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # whoever reads has gone
                stream.flush()
        os._exit(code)

    atexit.register(end)  # the first to be registered is the last to be called
    try:
        yield
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except BaseException:
        code = 1
        raise


@contextmanager
def ending_in_time(say: Callable[[str], None], advice: str) -> Iterator[None]:
    """Let the body be ended by a signal; then say so and leave with 130 or 143.

    A second Ctrl-C ends the process at once. A signal that is ignored (SIGINT, in a job in the
    background) stays so; elsewhere than in the main thread nothing is done.

    Args:
        say: told the one sentence.
        advice: its end.

    Raises:
        SystemExit: a signal came, or KeyboardInterrupt was raised otherwise.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    clock = _Clock(say, advice)
    taken = [s for s in _WHAT if signal.getsignal(s) is not signal.SIG_IGN]
    before = {each: signal.signal(each, clock.told) for each in taken}
    is_told = False
    try:
        yield
    except KeyboardInterrupt:
        is_told = True
        clock.leave()
    finally:
        if not is_told:
            for each, handler in before.items():
                signal.signal(each, handler)
            clock.stop()


class _Clock:
    """Counts from the first signal on."""

    def __init__(self, say: Callable[[str], None], advice: str) -> None:
        self._say, self._advice = say, advice
        self._came: int = 0
        self._ears, self._mouth = os.pipe()
        self._stderr = os.dup(2)  # elsewhere it may be silenced when the time is up
        self._is_said = threading.Lock()
        threading.Thread(target=self._count, daemon=True).start()

    def told(self, signum: int, frame: FrameType | None) -> None:
        """The handler of both signals; waits for no lock, which the main thread may hold."""
        del frame
        os.write(self._mouth, bytes([signum]))
        if not self._came:
            self._came = signum
            raise KeyboardInterrupt

    def leave(self) -> None:
        """End in order. The clock goes on: also the interpreter's own end may hang."""
        self._came = self._came or signal.SIGINT
        if self._is_said.acquire(blocking=False):
            # Silenced while Ray starts: the signal may have come just where that begins or ends.
            os.dup2(self._stderr, 2)
            self._say(self._sentence())
        raise SystemExit(128 + self._came)

    def stop(self) -> None:
        """The body came to its own end."""
        os.write(self._mouth, b"\0")

    def _sentence(self) -> str:
        return f"{_WHAT[signal.Signals(self._came)]}; {self._advice}"

    def _count(self) -> None:
        if self._is_time_up():
            if self._is_said.acquire(blocking=False):
                os.write(self._stderr, f"Error: {self._sentence()}\n".encode())
            os._exit(128 + self._came)
        for each in (self._ears, self._mouth, self._stderr):
            os.close(each)

    def _is_time_up(self) -> bool:
        """Wait for the end: of the body (false), or of the time or the patience."""
        if not ord(os.read(self._ears, 1)):
            return False
        until = time.monotonic() + IN_TIME_S
        while (left := until - time.monotonic()) > 0:
            if not select.select([self._ears], [], [], left)[0]:
                return True
            then = ord(os.read(self._ears, 1))
            if then in (0, signal.SIGINT):
                return bool(then)
        return True
