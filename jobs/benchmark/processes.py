"""The processes of one contender in one layout: started, warmed, timed and watched from outside.

CPU time and memory are those of the whole tree of processes, so that helpers, Ray and its
workers count like everything else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from jobs.benchmark.contenders import Layout
from jobs.benchmark.worker import Setup

_LOOK_EVERY_S = 1.0
_END_WITHIN_S = 60.0


class NotRun(Exception):
    """A contender that takes no part, and why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One layout over one list of files.

    Attributes:
        seconds: from the word to begin until the last process has answered; or what the
            contender told, if it knows better (see `Answer`).
        elapsed_s: the same by the clock, whatever it told.
        cpu_seconds: of all processes, likewise.
        peak_bytes: largest memory of all processes together; what they share counts once.
        texts: by file; None if it failed.
        report: report.json of a run of ours.
        shards: rows of its metrics.parquet.
    """

    seconds: float
    elapsed_s: float
    cpu_seconds: float
    peak_bytes: int
    texts: dict[str, str | None]
    report: dict[str, Any] | None = None
    shards: Sequence[dict[str, Any]] = ()


@contextmanager
def started(setup: Setup, layout: Layout, log: Path) -> Iterator[_Group]:
    """The layout's processes, loaded and warm; they end with the block.

    Raises:
        NotRun: it is not installed, or does not start.
    """
    group = _Group(setup, layout, log)
    try:
        group.wait_until_warm()
        yield group
    finally:
        group.end()


class _Group:
    """Processes that share the work of one layout."""

    def __init__(self, setup: Setup, layout: Layout, log: Path) -> None:
        self._log = log
        with log.open("ab") as stderr:
            self._processes = [
                _spawn(setup, layout, number, stderr.fileno()) for number in range(layout.processes)
            ]

    def wait_until_warm(self) -> None:
        """Wait for the model of each process, and its first recording."""
        for greeting in [self._hear(process) for process in self._processes]:
            if "missing" in greeting:
                raise NotRun(f"not installed ({greeting['missing']})")

    def transcribe(self, shares: Sequence[Sequence[str]]) -> Measured:
        """Give each process its files, if there are any for it; measure until all are done.

        Raises:
            NotRun: it broke down.
        """
        pids = [process.pid for process in self._processes]
        cpu_before = sum(_cpu_seconds(pid) for pid in pids)
        with _watching(pids) as memory:
            began = time.perf_counter()
            busy = [(p, files) for p, files in zip(self._processes, shares, strict=True) if files]
            for process, files in busy:
                assert process.stdin is not None
                process.stdin.write(json.dumps({"files": list(files)}) + "\n")
                process.stdin.flush()
            answers = [self._hear(process) for process, _ in busy]
            elapsed = time.perf_counter() - began
        cpu = sum(_cpu_seconds(pid) for pid in pids) - cpu_before
        told = [a["seconds"] for a in answers if a["seconds"] is not None]
        told_cpu = [a["cpu_seconds"] for a in answers if a["cpu_seconds"] is not None]
        texts = {
            file: text
            for (_, files), answer in zip(busy, answers, strict=True)
            for file, text in zip(files, answer["texts"], strict=True)
        }
        return Measured(
            seconds=max(told) if told else elapsed,
            elapsed_s=elapsed,
            cpu_seconds=sum(told_cpu) if told_cpu else cpu,
            peak_bytes=memory.peak_bytes,
            texts=texts,
            report=answers[0]["report"],
            shards=answers[0]["shards"],
        )

    def _hear(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise NotRun(f"ended with exit code {process.wait()}; see {self._log}")
        heard: dict[str, Any] = json.loads(line)
        if "failed" in heard:
            raise NotRun(f"failed: {heard['failed']}")
        return heard

    def end(self) -> None:
        """Close their input; who does not end by itself is killed, with all it has started."""
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(timeout=_END_WITHIN_S)
            except subprocess.TimeoutExpired:
                for each in _tree(process.pid):
                    each.kill()
                process.wait()
            process.stdout.close()  # type: ignore[union-attr]


def _spawn(setup: Setup, layout: Layout, number: int, log: int) -> subprocess.Popen[str]:
    scratch = Path(setup.scratch) / str(number)
    scratch.mkdir(parents=True)
    threads = str(1 if setup.contender.startswith("transcribe") else layout.threads)
    env = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    command = [sys.executable, "-m", "jobs.benchmark.worker"]
    cores = sorted(os.sched_getaffinity(0))[: layout.cores]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=env, text=True
    )
    if layout.cores is not None:  # inherited by all that it starts
        os.sched_setaffinity(process.pid, cores)
    assert process.stdin is not None
    told = asdict(setup) | {"threads": layout.threads, "scratch": str(scratch)}
    process.stdin.write(json.dumps(told) + "\n")
    process.stdin.flush()
    return process


# ---- watching -----------------------------------------------------------------------------


def _tree(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, as far as they still live."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _cpu_seconds(pid: int) -> float:
    """CPU time of the tree, of children that have ended and were waited for as well."""
    total = 0.0
    for process in _tree(pid):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _memory_bytes(pids: Sequence[int]) -> int:
    """Memory of the trees: what each process has for itself, and the most that one shares.

    Who shares what with whom the kernel only tells by walking all pages, which on two cores slowed
    everybody down by a sixth.
    """
    own = shared = 0
    for process in (each for pid in pids for each in _tree(pid)):
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        own += memory.rss - memory.shared
        shared = max(shared, memory.shared)
    return own + shared


class _Memory:
    """The largest memory seen."""

    peak_bytes = 0


@contextmanager
def _watching(pids: Sequence[int]) -> Iterator[_Memory]:
    """Look at the memory again and again while the block runs."""
    memory, over = _Memory(), threading.Event()

    def look() -> None:
        while True:
            memory.peak_bytes = max(memory.peak_bytes, _memory_bytes(pids))
            if over.wait(_LOOK_EVERY_S):
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        over.set()
        watcher.join()
