"""A cluster of real processes that can be hurt and healed: a head without CPUs and some nodes."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

RAY = Path(sys.executable).parent / "ray"
REPO = Path(__file__).parents[2]
NODE_CPUS = 2
START_TRIES = 3
STORE_BYTES = 80_000_000  # little more than the least that Ray takes


class NotStarted(AssertionError):
    """`ray start` did not; with what it said."""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@dataclass
class Machine:
    """What one `ray start` left running, told by the session that it began."""

    starter: subprocess.Popen
    is_head: bool
    log: Path

    def processes(self, title=""):
        """Pids by the beginning of their title, which Ray sets to what a worker does."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if os.getsid(int(entry.name)) == self.starter.pid:
                    words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if words and title in words:  # a dead one has none
                        found[int(entry.name)] = words
            except (OSError, ProcessLookupError):
                continue
        return found

    def kill(self):
        # Again, for what was being started while the others were killed.
        for _ in range(20):
            pids = self.processes()
            for pid in pids:
                send(pid, signal.SIGKILL)
            if not pids:
                return
            time.sleep(0.05)


def send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def drivers(out):
    """Pids of the drivers of runs into `out`; those of jobs have sessions of their own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if words[1:3] == ["-m", "tests.chaos.driver"] and str(out) in words:
                found.append(int(entry.name))
    return sorted(found)


@dataclass
class World:
    """The cluster."""

    n_nodes: int
    with_dashboard: bool = False
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="chaos-")))
    machines: list[Machine] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)
    address: str = ""
    dashboard: str = ""

    def start(self):
        """Everything anew, or only what is missing; on a busy machine `ray start` may give up."""
        for attempt in range(START_TRIES):
            try:
                return self._start_missing()
            except NotStarted:
                if attempt == START_TRIES - 1:
                    raise

    def _start_missing(self):
        self.machines = [m for m in self.machines if m.processes("raylet")]
        if not any(m.is_head and m.processes("gcs_server") for m in self.machines):
            self.kill()
            port, dashboard_port = free_port(), free_port()
            self.address = f"127.0.0.1:{port}"
            self.dashboard = f"http://127.0.0.1:{dashboard_port}"
            flags = ["--head", f"--port={port}", "--num-cpus=0"]
            flags += [f"--ray-client-server-port={free_port()}"]
            flags += [f"--dashboard-port={dashboard_port}"]
            flags += [f"--include-dashboard={str(self.with_dashboard).lower()}"]
            self._wait([self._start(flags, is_head=True)])
        missing = self.n_nodes - len(self.nodes)
        self._wait([self.add_node() for _ in range(missing)])

    @property
    def nodes(self):
        return [m for m in self.machines if not m.is_head]

    def add_node(self):
        """A machine joins; not waited for."""
        return self._start([f"--address={self.address}", f"--num-cpus={NODE_CPUS}"])

    def _start(self, flags, is_head=False):
        folder = self.folder / secrets.token_hex(3)
        quiet = ["--disable-usage-stats", f"--object-store-memory={STORE_BYTES}"]
        with folder.with_suffix(".log").open("w") as log:
            starter = subprocess.Popen(
                [RAY, "start", f"--temp-dir={folder}", *quiet, *flags],
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        machine = Machine(starter, is_head, folder.with_suffix(".log"))
        self.machines.append(machine)
        return machine

    def _wait(self, machines):
        for machine in machines:
            if machine.starter.wait(timeout=240) != 0:
                machine.kill()
                self.machines.remove(machine)
                raise NotStarted(machine.log.read_text(errors="replace")[-2000:])

    def workers(self, title=""):
        """Pids of worker processes on all nodes, by title."""
        return sorted(pid for node in self.nodes for pid in node.processes(f"ray::{title}"))

    def heal(self):
        """Whoever was stopped goes on; what is missing comes back."""
        for pid in self.stopped:
            send(pid, signal.SIGCONT)
        self.stopped.clear()
        self.start()

    def kill(self):
        for machine in self.machines:
            machine.kill()
        self.machines.clear()

    def close(self):
        self.kill()
        time.sleep(0.2)
        shutil.rmtree(self.folder, ignore_errors=True)


def environment():
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{REPO}",
        "RAY_AUTH_MODE": "disabled",
        # A machine that is gone shall be missed sooner than after 20 s.
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "RAY_health_check_timeout_ms": "2000",
    }
