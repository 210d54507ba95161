"""What a job needs, tried before it costs anything: `transcribe preflight`, and the job itself.

Owns the questions, what counts as a good answer, and what to do about a bad one. Asks this
machine, the stores and the weights; what a cluster's machines say of themselves comes in through
`distributed.on_every_node`. Knows nothing of Ray.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from transcribe import models, storage
from transcribe.config import EngineName
from transcribe.engines.fake import is_fake
from transcribe.engines.load import engine_name
from transcribe.errors import TranscribeError

Outcome = Literal["ok", "warning", "failure"]

_READ_BYTES = 65_536
_DISK_LOW, _DISK_NEEDED = 20 << 30, 2 << 30  # weights, spilled objects and logs
_OBJECT_STORE_LOW = 1 << 30  # a few shards of int16 speech on their way
_CLOCK_TOLERANCE_S = 60.0  # beyond it, Google's signed requests begin to be refused
_GPU_PROBE_S = 120.0
_PACKAGES = ("transcribe", "ray", "torch", "transformers", "ctranslate2")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the answer.

    Attributes:
        name: what was looked at.
        found: what was seen there.
        remedy: what to do; empty when nothing needs to be done.
    """

    name: str
    outcome: Outcome
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What one machine says of itself.

    Attributes:
        versions: Python's and the packages' versions.
        model: the weights' revision there, or why there is none.
        model_found: whether there is one.
        gpu: why PyTorch cannot use the machine's GPU; None if it can or nobody asked.
        clock: its seconds since the epoch.
        free_disk: bytes free for temporary files.
    """

    versions: Mapping[str, str]
    model: str
    model_found: bool
    gpu: str | None
    clock: float
    free_disk: int


@dataclass(frozen=True, slots=True)
class Node:
    """A machine as the cluster lists it.

    Attributes:
        facts: what it says of itself, or why it does not.
        asked_at: when it was asked and when it had answered, seconds since the epoch here.
    """

    name: str
    cpus: float
    gpus: float
    object_store: float
    facts: NodeFacts | str
    asked_at: tuple[float, float]


# ---- this machine, the stores, the weights -----------------------------------------------


def local_checks(model: str, engine: EngineName | None) -> Iterator[Check]:
    """This machine: versions, weights, disk, ports."""
    facts = node_facts(model, engine, has_gpu=False)
    yield Check("versions", "ok", _listed(facts.versions))
    yield _model_check("weights", facts)
    yield _disk_check("disk", facts.free_disk)
    yield _port_check()


def archive_check(archive: str) -> Check:
    """Whether the archive can be listed, and one object of it read."""
    url = storage.absolute(archive)
    try:
        first = next(iter(storage.list_objects(url)), None)
        if first is None:
            return Check("archive", "warning", f"{archive} is empty", "check the prefix")
        n_read = len(storage.read_range(first.uri, 0, _READ_BYTES))
    except TranscribeError as error:
        return Check("archive", "failure", str(error), "check ARCHIVE and the credentials")
    return Check("archive", "ok", f"listable; read {n_read:,} bytes of {first.uri}")


def out_check(out: str) -> Check:
    """Whether an object can be put whole below OUT, and removed again."""
    try:
        storage.check_writable(out)
    except TranscribeError as error:
        return Check("out", "failure", str(error), "grant write access, or choose another OUT")
    return Check("out", "ok", f"{out} is writable (an object was put and removed)")


def _port_check() -> Check:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        return Check("ports", "failure", str(error), "free some ports: Ray opens about ten")
    return Check("ports", "ok", "loopback ports can be opened")


def _model_check(name: str, facts: NodeFacts) -> Check:
    if facts.model_found:
        return Check(name, "ok", facts.model)
    return Check(name, "failure", facts.model, "put the weights where every machine reads them")


def _disk_check(name: str, free: int) -> Check:
    found = f"{free / 2**30:.1f} GiB free for temporary files"
    if free < _DISK_NEEDED:
        return Check(name, "failure", found, "free at least 2 GiB, or set TMPDIR to another disk")
    if free < _DISK_LOW:
        return Check(name, "warning", found, "20 GiB are comfortable; set TMPDIR to another disk")
    return Check(name, "ok", found)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


# ---- every machine of a cluster ----------------------------------------------------------


def node_facts(model: str, engine: EngineName | None, has_gpu: bool) -> NodeFacts:
    """What this machine says of itself; runs on each machine of a cluster."""
    on_gpu = has_gpu and engine != "whisper-int8"
    found, revision = _revision(model, engine, "cuda" if on_gpu else "cpu")
    return NodeFacts(
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
        model=revision,
        model_found=found,
        gpu=_gpu_problem() if has_gpu and not is_fake(model) else None,
        clock=time.time(),
        free_disk=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def _revision(model: str, engine: EngineName | None, device: str) -> tuple[bool, str]:
    if is_fake(model):
        return True, "fake"
    try:
        found = models.resolve(model, engine)
        runs_it = engine_name(found, engine, device)
    except TranscribeError as error:
        return False, str(error)
    return True, f"{model}, revision {found.revision}, run by {runs_it}"


_GPU_PROBE = (
    "import torch; torch.ones(8, device='cuda').sum().item(); print(torch.cuda.get_device_name())"
)


def _gpu_problem() -> str | None:
    """Why PyTorch cannot compute on this machine's GPU, tried in a process of its own.

    A task that asked Ray for no GPU is shown none; the child is.
    """
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _GPU_PROBE],
            env=env,
            capture_output=True,
            text=True,
            timeout=_GPU_PROBE_S,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_GPU_PROBE_S:.0f} s"
    if tried.returncode == 0:
        return None
    return (tried.stderr.strip().splitlines() or ["no reason given"])[-1][:300]


def cluster_checks(nodes: list[Node]) -> Iterator[Check]:
    """Judge what the machines said, against the versions of this one."""
    workers = [node for node in nodes if node.cpus or node.gpus]
    if not workers:
        yield Check(
            "workers",
            "warning",
            "none yet",
            "they come with the job if the cluster scales by itself; else start one",
        )
    here = {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}
    for node in nodes:
        yield from _node_checks(node, here)


def _node_checks(node: Node, here: Mapping[str, str]) -> Iterator[Check]:
    if isinstance(node.facts, str):
        # A spot machine may have gone since it was listed; a job can do without it.
        yield Check(node.name, "warning", node.facts, "look at it if it is still there")
        return
    facts = node.facts
    yield _versions_check(node.name, facts.versions, here)
    yield _clock_check(node.name, facts.clock, node.asked_at)
    if not (node.cpus or node.gpus):  # a head that runs no work needs no weights
        return
    yield _model_check(f"{node.name} weights", facts)
    yield _disk_check(f"{node.name} disk", facts.free_disk)
    yield _store_check(node)
    if node.gpus:
        yield _gpu_check(node, facts)


def _versions_check(name: str, there: Mapping[str, str], here: Mapping[str, str]) -> Check:
    differing = {p: v for p, v in here.items() if there.get(p) != v}
    if not differing:
        return Check(f"{name} versions", "ok", _listed(there))
    found = ", ".join(
        f"{p} {there.get(p, 'missing')} there, {v} here" for p, v in differing.items()
    )
    fatal = {"python", "ray"} & differing.keys()
    remedy = "use one image, or one requirements.lock, on every machine"
    return Check(f"{name} versions", "failure" if fatal else "warning", found, remedy)


def _clock_check(name: str, clock: float, asked_at: tuple[float, float]) -> Check:
    before, after = asked_at
    off = max(0.0, before - clock, clock - after)
    found = f"{off:.0f} s off" if off >= 1 else "agrees"
    if off <= _CLOCK_TOLERANCE_S:
        return Check(f"{name} clock", "ok", found)
    return Check(f"{name} clock", "warning", found, "let NTP set it: signed requests will fail")


def _store_check(node: Node) -> Check:
    found = f"{node.object_store / 2**30:.1f} GiB"
    if node.object_store >= _OBJECT_STORE_LOW:
        return Check(f"{node.name} object store", "ok", found)
    return Check(
        f"{node.name} object store",
        "warning",
        found,
        "give the container a larger /dev/shm, or ray start --object-store-memory",
    )


def _gpu_check(node: Node, facts: NodeFacts) -> Check:
    if facts.gpu is None:
        return Check(f"{node.name} GPU", "ok", f"{node.gpus:g}, usable by PyTorch")
    return Check(
        f"{node.name} GPU",
        "failure",
        facts.gpu,
        "install NVIDIA's driver 580 or later; in a container, run it with --gpus all",
    )
