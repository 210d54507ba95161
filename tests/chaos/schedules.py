"""Seeded schedules of faults, and how each fault is done and undone."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.world import REPO, World, drivers, environment, send

ENGINE = "MapWorker(Map(_Recogniser))"
DECODE = "FlatMap(_decode)"
DECODES_WITHIN_S = 30.0

# A worker dies at most twice in a schedule: three in a row at one recording would be its fault.
KILLS_A_WORKER = {"kill engine", "kill decode", "stop engine"}
ENDS_THE_RUN = {"kill driver", "kill job", "kill head", "terminate driver", "interrupt driver"}
EVERYWHERE = [
    "kill engine",
    "kill decode",
    "kill watch",
    "kill node",
    "kill driver",
    "interrupt driver",
    "terminate driver",
    "kill head",
    "stop engine",
    "stop node",
    "stop driver",
    "out of memory",
    "fill store",
    "read-only OUT",
    "full disk",
]


@dataclass(frozen=True)
class Fault:
    """What is done, so many published shards after the run began, and for how long."""

    what: str
    after_shards: int
    wait_s: float
    lasts_s: float
    pick: int


def schedule(seed: int, stop_s: float, n_shards: int) -> tuple[bool, list[Fault]]:
    """Whether the run is a submitted job, and one to four faults in the order of their time."""
    draw = random.Random(seed)
    is_job = draw.random() < 0.15
    faults: list[Fault] = []
    if is_job:
        faults.append(_fault(draw, "kill job", stop_s, n_shards))
    for _ in range(draw.randint(1, 3)):
        what = draw.choice(EVERYWHERE)
        n_deaths = sum(f.what in KILLS_A_WORKER for f in faults)
        if what in KILLS_A_WORKER and n_deaths == 2:
            continue
        if what in ENDS_THE_RUN and any(f.what in ENDS_THE_RUN for f in faults):
            continue
        faults.append(_fault(draw, what, stop_s, n_shards))
    return is_job, sorted(faults, key=lambda f: (f.after_shards, f.wait_s))


def _fault(draw: random.Random, what: str, stop_s: float, n_shards: int) -> Fault:
    after_shards = draw.randrange(n_shards - 1)
    return Fault(
        what=what,
        after_shards=0 if what == "kill decode" else after_shards,
        wait_s=draw.uniform(0, 1.5),
        lasts_s=draw.uniform(0.5, 1.0) * stop_s,
        pick=draw.randrange(1000),
    )


class Hand:
    """Does what a schedule says to one run, and undoes it."""

    def __init__(self, world: World, out: Path, out_of_memory: Path) -> None:
        self.world, self.out, self.flag = world, out, out_of_memory
        self.driver: subprocess.Popen | None = None
        self.helpers: list[subprocess.Popen] = []
        self.undo: list[tuple[float, object]] = []
        self.is_job = False

    def strike(self, fault: Fault) -> str:
        """Do it; says at whom."""
        kind, _, target = fault.what.partition(" ")
        done = getattr(self, "_" + fault.what.replace(" ", "_").replace("-", "_").lower(), None)
        if done is not None:
            return done(fault)
        pid = self._target(target, fault.pick)
        if pid is None:
            return "nobody there"
        if kind == "stop":
            send(pid, signal.SIGSTOP)
            self.world.stopped.append(pid)
            self._later(fault, lambda: send(pid, signal.SIGCONT))
        else:
            number = {"kill": 9, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[kind]
            send(pid, number)
        return f"pid {pid}"

    def _target(self, target: str, pick: int) -> int | None:
        if target == "driver":
            return None if self.is_job else self.driver.pid
        if target == "job":
            found = drivers(self.out)
        elif target == "node":
            found = sorted(p for n in self.world.nodes for p in n.processes("raylet/raylet"))
        elif target == "watch":
            found = sorted(p for m in self.world.machines for p in m.processes("ray::_WatchActor"))
        else:
            found = self.world.workers({"engine": ENGINE, "decode": DECODE}[target])
        return found[pick % len(found)] if found else None

    def _kill_decode(self, fault: Fault) -> str:
        """Decoding is ahead of all else: as soon as it is there, or a little later."""
        until = time.monotonic() + DECODES_WITHIN_S
        while self._target("decode", 0) is None:
            if time.monotonic() > until:
                return "nobody there"
            time.sleep(0.01)
        time.sleep(fault.wait_s / 2)
        pid = self._target("decode", fault.pick)
        if pid is None or not send(pid, signal.SIGKILL):
            return "nobody there any more"
        return f"pid {pid}"

    def _kill_node(self, fault: Fault) -> str:
        nodes = self.world.nodes
        node = nodes[fault.pick % len(nodes)]
        node.kill()
        self.world.machines.remove(node)
        self.world.add_node()  # another one comes
        return f"session {node.starter.pid}"

    def _kill_head(self, fault: Fault) -> str:
        for machine in self.world.machines:
            if machine.is_head:
                machine.kill()
        return "head"

    def _out_of_memory(self, fault: Fault) -> str:
        self.flag.touch()
        self._later(fault, lambda: self.flag.unlink(missing_ok=True))
        return "engines"

    def _fill_store(self, fault: Fault) -> str:
        filler = [sys.executable, "-m", "tests.chaos.filler", self.world.address]
        self.helpers.append(
            subprocess.Popen(
                [*filler, str(fault.lasts_s)],
                cwd=REPO,
                env=environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return "store"

    @property
    def _has_own_disk(self) -> bool:
        return self.out.parent.is_mount()

    def _read_only_out(self, fault: Fault) -> str:
        if not self._has_own_disk:
            return "left out"
        self._remount("ro")
        self._later(fault, lambda: self._remount("rw"))
        return str(self.out)

    def _full_disk(self, fault: Fault) -> str:
        if not self._has_own_disk:
            return "left out"
        filler = self.out.parent / "filler"
        try:
            with filler.open("wb") as file:
                while True:
                    file.write(b"\0" * 65536)
                    file.flush()
        except OSError:
            pass
        self._later(fault, lambda: filler.unlink(missing_ok=True))
        return str(self.out)

    def _remount(self, how: str) -> None:
        mount = ["mount", "-o", f"remount,{how}", str(self.out.parent)]
        for _ in range(100):  # busy while a file is open for writing
            if subprocess.run(mount, capture_output=True).returncode == 0:
                return
            time.sleep(0.05)

    def _later(self, fault: Fault, undo: object) -> None:
        self.undo.append((time.monotonic() + fault.lasts_s, undo))

    def undo_due(self, is_end: bool = False) -> None:
        """Undo what has lasted long enough, or everything."""
        now = time.monotonic()
        for when, undo in list(self.undo):
            if is_end or when <= now:
                undo()
                self.undo.remove((when, undo))
        if is_end:
            for helper in self.helpers:
                helper.kill()
                helper.wait()


def published(out: Path) -> int:
    """Shards that are there."""
    folder = out / "transcripts"
    return len(list(folder.glob("*.parquet")))
