"""The pipeline's steps as Ray Data tasks and actors.

The only module that imports Ray. Adds scheduling, nothing about audio: shards flow as rows
through decode tasks, a pool of engine actors and publish tasks; what comes back to the
driver is one small summary per shard.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.exceptions
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.autoscaler.sdk import request_resources
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transcribe import pipeline
from transcribe.config import Device, EngineName
from transcribe.engines.base import Engine
from transcribe.engines.load import load_engine
from transcribe.errors import Fatal, TranscribeError
from transcribe.pipeline import Job, ShardSummary
from transcribe.preflight import Node, NodeFacts, node_facts
from transcribe.shards import Shard

_PUBLISH_CPUS = 0.01  # writing is waiting; a share of its own also keeps Ray from fusing it
_DECODE_CPUS = 1.0
_ENGINE_CPUS = 0.98  # differs from decode's, or Ray Data would fuse both into one actor
_GPU_ENGINE_CPUS = 0.5
_PROBE_S = 10.0
_ANSWER_S = 300.0  # a machine may have to fetch the weights first


@dataclass(frozen=True, slots=True)
class Placement:
    """What the cluster will run: engine actors and where."""

    device: str
    workers: int


def connect(address: str | None, workers: int | None) -> None:
    """Join the cluster at `address`, or start an embedded one on this machine.

    The embedded one counts more CPUs than there are: engines keep the cores busy, and decode
    tasks, which are short, must never wait for an engine to end.

    Raises:
        Fatal: there is no cluster at that address, or it does not let us in.
    """
    # Ray's C++ part warns on stderr of things that are not the user's (ray-project/ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        cores = len(os.sched_getaffinity(0))
        cpus = max(cores, workers or 0) + cores + 1
        with _stderr_silenced(), _sigterm_kept():
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        return
    if "://" in address:
        raise Fatal(
            f"{address!r} is not the address of a Ray cluster's head: give its host and port,"
            " like 10.0.0.1:6379, or submit with `ray job submit` (see README)."
        )
    try:
        with _stderr_silenced():
            _probe(address)
            with _sigterm_kept():
                ray.init(address=address, **quiet)
    except ray.exceptions.AuthenticationError:
        raise Fatal(
            f"The Ray cluster at {address!r} asks for its token: set RAY_AUTH_MODE=token, and"
            " RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the one of ~/.ray/auth_token on its head."
        ) from None
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise Fatal(
            f"No Ray cluster answers at {address!r} ({_first_line(error)});"
            " start one with `ray start --head`, or leave --address out to use this machine."
        ) from None


def _probe(address: str) -> None:
    """Ask once whether a cluster is there and takes our token; `ray.init` asks for 14 minutes.

    Raises:
        OSError: nothing listens there.
        ValueError: not an address.
        ray.exceptions.RayError: what listens is no cluster, or it refuses our token.
    """
    head = canonicalize_bootstrap_address(address)
    host, _, port = (head or "").rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    if address != "auto":  # then ray.init finds out by itself whether to show a token
        GcsClient(address=head)


@contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Drop what C++ code writes to file descriptor 2: Ray does while it is starting."""
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """Give SIGTERM back to whom it belonged: `ray.init` takes it, to write a C++ stack and die."""
    if threading.current_thread() is not threading.main_thread():  # Ray leaves it alone, too
        yield
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        yield
    except SystemExit:  # by Ray's own handler, while it starts
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, before)


def disconnect() -> None:
    """Leave the cluster; an embedded one ends."""
    ray.shutdown()


def on_every_node(model: str, engine: EngineName | None) -> list[Node]:
    """Ask each living machine for its `NodeFacts`.

    The questions take no CPU of the cluster's, so that a busy one answers too.
    """
    alive = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    before = time.time()
    asked = [_ask(node, model, engine) for node in alive]
    return [_answer(node, answer, before) for node, answer in zip(alive, asked, strict=True)]


def _ask(node: dict[str, Any], model: str, engine: EngineName | None) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    options: Any = {"num_cpus": 0, "max_retries": 1, "scheduling_strategy": there}
    has_gpu = bool(node["Resources"].get("GPU"))
    return ray.remote(**options)(node_facts).remote(model, engine, has_gpu)


def _answer(node: dict[str, Any], answer: Any, before: float) -> Node:
    facts: NodeFacts | str
    try:
        facts = ray.get(answer, timeout=_ANSWER_S)
    except ray.exceptions.RayError as error:
        facts = f"it does not answer ({_first_line(error)})"
    has = node["Resources"]
    return Node(
        name=node["NodeManagerAddress"],
        cpus=has.get("CPU", 0.0),
        gpus=has.get("GPU", 0.0),
        object_store=has.get("object_store_memory", 0.0),
        facts=facts,
        asked_at=(before, time.time()),
    )


def place(
    device: Device,
    workers: int | None,
    wait_s: float,
    say: Callable[[str], None],
    can_grow: bool = False,
) -> Placement:
    """Decide how many engines run where, waiting for machines if none is there yet.

    Args:
        device: `auto` takes GPUs if the cluster has any.
        workers: engines wanted; None takes one per GPU, or one per CPU core.
        wait_s: how long an autoscaling cluster may take to bring up the first machine.
        say: told what is being waited for.
        can_grow: whether engines that find no room now may find it later, on machines to come.

    Raises:
        Fatal: the cluster does not offer what one engine needs within `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    asked = False
    while True:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        placement = _fit(device, workers, resources)
        if placement is not None:
            if asked:
                request_resources(bundles=[])  # or these machines would never count as idle
            return _grown(placement, workers, say) if can_grow else placement
        need = "2 CPUs" if device == "cpu" else "a GPU and 2 CPUs"
        has = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        if time.monotonic() >= deadline:
            request_resources(bundles=[])
            raise Fatal(
                f"The cluster cannot run this job: it needs {need} and has {has}."
                " Add a worker node, or check --device (cpu needs no GPU) and --workers."
            )
        if not asked:
            say(
                f"Waiting up to {wait_s:.0f} s for a worker: the job needs {need}, there are {has}."
            )
            # A cluster that has shrunk to nothing grows only when it is asked to.
            request_resources(bundles=_first_need(device))
            asked = True
        time.sleep(1.0)


def _first_need(device: Device) -> list[dict[str, float]]:
    """What one engine and one decode task take: a GPU on one machine, unless CPUs are asked for.

    With `auto`, a machine without GPU that comes first would settle it the wrong way.
    """
    if device == "cpu":
        return [{"CPU": 1.0}, {"CPU": _DECODE_CPUS}]
    return [{"CPU": _GPU_ENGINE_CPUS + _DECODE_CPUS, "GPU": 1.0}]


def _grown(placement: Placement, workers: int | None, say: Callable[[str], None]) -> Placement:
    """As many engines as were asked for: those that find no room make the cluster grow."""
    if workers is None or workers <= placement.workers:
        return placement
    say(
        f"Room for {placement.workers} of {workers} engines now;"
        " the others start as soon as the cluster has grown."
    )
    return Placement(placement.device, workers)


def _fit(device: Device, workers: int | None, resources: dict[str, float]) -> Placement | None:
    """Engines that fit now; None when not even one fits beside a decode task."""
    cpus, gpus = resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    if device == "cuda" or (device == "auto" and gpus):
        room = min(gpus, int((cpus - _DECODE_CPUS) / _GPU_ENGINE_CPUS))
        return Placement("cuda", min(workers or room, room)) if room >= 1 else None
    # One CPU stays free for decoding: Ray Data waits for ever if its actors take them all.
    room = int((cpus - _DECODE_CPUS) / _ENGINE_CPUS)
    if room < 1:
        return None
    return Placement("cpu", min(workers or _cores(cpus), room))


def _cores(cpus: float) -> int:
    """CPU engines by default: as many as real cores on one machine, else one per CPU but one."""
    nodes = [n for n in ray.nodes() if n.get("Alive")]  # type: ignore[no-untyped-call]
    if len(nodes) == 1:
        return min(len(os.sched_getaffinity(0)), max(1, int(cpus) - 1))
    return max(1, int(cpus) - 1)


def run_shards(shards: Sequence[Shard], job: Job, workers: int) -> Iterator[ShardSummary]:
    """Transcribe and publish the shards on the connected cluster, in any order.

    Raises:
        Fatal: a stage said that the run cannot go on, or Ray gave up on it.
    """
    _quieten_ray_data()
    workers = min(workers, len(shards))
    dataset = (
        ray.data.from_items(
            [{"shard": pickle.dumps(shard)} for shard in shards],
            override_num_blocks=max(1, len(shards)),
        )
        .map(functools.partial(_decode, job=job), num_cpus=_DECODE_CPUS)
        .map(
            _Recogniser,  # type: ignore[arg-type]  # Ray's stub knows no classes
            fn_constructor_kwargs={"job": job},
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=2),
            num_cpus=_GPU_ENGINE_CPUS if job.device == "cuda" else _ENGINE_CPUS,
            num_gpus=1 if job.device == "cuda" else None,
        )
        # As many as there are engines: a share this small would let Ray start any number.
        .map(functools.partial(_publish, job=job), num_cpus=_PUBLISH_CPUS, concurrency=workers)
    )
    try:
        for row in dataset.iter_rows():
            outcome = pickle.loads(row["outcome"])
            if isinstance(outcome, _Stop):
                raise Fatal(outcome.sentence)
            yield outcome
    except ray.exceptions.RayError as error:
        raise Fatal(f"Ray gave up on the run: {_first_line(error)}") from error


def _quieten_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@dataclass(frozen=True, slots=True)
class _Stop:
    """A stage's word that the whole run must stop; travels like a result."""

    sentence: str


# ---- what runs on the workers -----------------------------------------------------------
# Rows carry one pickled object each: our own values between our own processes. Ray Data
# then sees one plain bytes column, whose size it can account for.

_Row = dict[str, Any]


def _decode(row: _Row, job: Job) -> _Row:
    shard: Shard = pickle.loads(row["shard"])
    return {"decoded": _guarded(lambda: pipeline.decode_shard(shard, job.config))}


class _Recogniser:
    """An engine, loaded once an actor."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._engine = _loaded(job)

    def __call__(self, row: _Row) -> _Row:
        decoded, engine = pickle.loads(row["decoded"]), self._engine
        if isinstance(decoded, _Stop):
            return {"recognised": row["decoded"]}
        if isinstance(engine, _Stop):
            return {"recognised": pickle.dumps(engine)}
        return {
            "recognised": _guarded(lambda: pipeline.recognise_shard(decoded, engine, self._job))
        }


def _loaded(job: Job) -> Engine | _Stop:
    """The engine, or why there is none; raised in an actor's making, it would be a traceback."""
    try:
        return load_engine(job)
    except TranscribeError as error:
        return _Stop(str(error))


def _publish(row: _Row, job: Job) -> _Row:
    recognised = pickle.loads(row["recognised"])
    if isinstance(recognised, _Stop):
        return {"outcome": row["recognised"]}
    return {"outcome": _guarded(lambda: pipeline.publish_shard(recognised, job.config.out))}


def _guarded(step: Callable[[], object]) -> bytes:
    """The step's pickled result, or the sentence that stops the run.

    Only our own errors are turned: anything else is a defect and keeps its traceback.
    """
    try:
        return pickle.dumps(step(), protocol=5)
    except TranscribeError as error:
        return pickle.dumps(_Stop(str(error)))
