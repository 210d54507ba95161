"""What hostile bytes can do to the process that decodes them, done for real.

A module of its own, and a light one: the child process imports it by its name.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from transcribe import isolation


def do(deed: str) -> Iterator[object]:
    """Yield once, then do it."""
    yield "begun"
    DEEDS[deed]()
    yield "survived"


def own_pid() -> Iterator[int]:
    yield os.getpid()


def count_slowly(n: int) -> Iterator[int]:
    for i in range(n):
        time.sleep(0.1)
        yield i


def work_long(n: int) -> Iterator[str]:
    for _ in range(n):
        time.sleep(0.1)
        isolation.alive()
    yield "done"


def prepare_slowly() -> None:
    time.sleep(1.5)


def die_once(mark: Path) -> Iterator[int]:
    """0 to 4; the first time, ends its process after 2."""
    yield from range(3)
    if not mark.exists():
        mark.touch()
        ctypes.string_at(0)
    yield from (3, 4)


def sleep_for(seconds: float) -> Iterator[float]:
    time.sleep(seconds)
    yield seconds


def give_back(*args: object) -> Iterator[object]:
    yield args


def raise_this(error: Exception) -> Iterator[object]:
    yield 1
    raise error


def _segfault() -> None:
    ctypes.string_at(0)


def _write_everywhere() -> None:
    for descriptor in (1, 2):
        os.write(descriptor, b"words of a customer")
    os.abort()


def _eat() -> None:
    eaten = []
    while True:
        eaten.append(np.ones(8 << 20, np.uint8))


def _spin() -> None:
    while True:
        pass


def _unpicklable() -> None:
    class Local(Exception):
        pass

    raise Local("no module has this")


DEEDS: dict[str, Callable[[], object]] = {
    "segfault": _segfault,
    "abort": _write_everywhere,
    "exit": lambda: os._exit(7),
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "eat": _eat,
    "refused": lambda: np.ones(1 << 50),
    "spin": _spin,
    "sleep": lambda: time.sleep(3600),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "defect": lambda: [][0],
    "local": _unpicklable,
}
