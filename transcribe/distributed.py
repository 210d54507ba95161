"""The pipeline's steps as Ray Data tasks and actors.

The only module that imports Ray. Adds scheduling, nothing about audio: shards flow as rows
through decode tasks, a pool of engine actors and publish tasks; what comes back to the
driver is one small summary per shard.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
import ray.data
import ray.exceptions
import ray.util.metrics
from ray._private import auto_init_hook
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
from ray.autoscaler.sdk import request_resources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transcribe import pipeline, processes
from transcribe.budget import THIS_MACHINE, PaidMachine
from transcribe.config import Device, EngineName, cpu_engines
from transcribe.engines.base import Engine
from transcribe.engines.load import load_engine
from transcribe.errors import Fatal, TranscribeError
from transcribe.pipeline import DecodedPart, Job, RecognisedPart, ShardSummary
from transcribe.preflight import Node, NodeFacts, node_facts
from transcribe.recovery import SetAside
from transcribe.shards import Shard, longest_first
from transcribe.status import Progress
from transcribe.watch import Answer, Look, Stage, Watch, Work, Worker

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

_PUBLISH_CPUS = 0.01  # writing is waiting; a share of its own also keeps Ray from fusing it
_DECODE_CPUS = 1.0
_ENGINE_CPUS = 0.98  # differs from decode's, or Ray Data would fuse both into one actor
_GPU_ENGINE_CPUS = 0.5
_ENGINES_FED = 3  # by one decode task that shares their cores: decoding is 8 times as fast or so
_PROBE_S = 10.0
_NODE_ANSWER_S = 300.0  # a machine may have to fetch the weights first

_TICK_S = 0.5
_LOOK_EVERY_S = 1.0
_ANSWER_S = 10.0  # for a question to Ray
_LEAVE_S = 3.0
_HEAD_EVERY_S = 2.0
_SILENCE_S = 30.0
_LAST_WORD_S = 20.0
_STOPPED_S = 5.0  # without a tick of a thread that ticks each second
_WATCH_SILENCE_S = 120.0
_STANDSTILL_S = 300.0  # a new machine installs the job's packages first
_FILLED_UP_S = 30.0  # machines are gone, and engines fill those that are left
_LOADS_IN_VAIN = 4  # for each engine

_AGAIN = " What is published stays; run the same command again to do the rest."


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
    # An archive's machine tells nobody what it does, Ray's makers included.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address is None:
        cores = len(os.sched_getaffinity(0))
        cpus = max(cores, workers or 0) + cores + 1
        try:
            with _stderr_silenced():
                _join(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        except Exception as error:  # Ray says a slow start with no kind of its own
            raise Fatal(
                f"Ray could not be started on this machine ({_first_line(error)}); if the machine"
                " is busy, run the same command again when it is less so."
            ) from None
        return
    if "://" in address:
        raise Fatal(
            f"{address!r} is not the address of a Ray cluster's head: give its host and port,"
            " like 10.0.0.1:6379, or submit with `ray job submit` (see README)."
        )
    try:
        with _stderr_silenced():
            _probe(address)
            _join(address=address, **quiet)
    except ray.exceptions.AuthenticationError:
        raise Fatal(
            f"The Ray cluster at {address!r} asks for its token: set RAY_AUTH_MODE=token, and"
            " RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the one of ~/.ray/auth_token on its head."
        ) from None
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise Fatal(
            f"No Ray cluster answers at {address!r} ({_first_line(error)});"
            " start one with `ray start --head`, or use this machine: leave --address out, or give"
            " `preflight` the word `local`."
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
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _join(**how: Any) -> None:
    """`ray.init` in a thread: a signal's exception then ends the waiting here, not Ray's work."""
    ends: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def begin() -> None:
        try:
            ray.init(**how)
            ends.put(None)
        except Exception as error:
            ends.put(error)
        # What Ray has started dies with this thread (PR_SET_PDEATHSIG), and if that happens before
        # Ray has let go of it, Ray ends the process with 1 and no word. So the thread stays.
        threading.Event().wait()

    # A question that comes after the end must not start another Ray.
    auto_init_hook.enable_auto_connect = False
    threading.Thread(target=begin, daemon=True).start()
    while True:
        with suppress(queue.Empty):
            error = ends.get(timeout=_TICK_S / 10)
            break
        _retake_sigterm()
    _retake_sigterm()
    if error is not None:
        raise error


def _retake_sigterm() -> None:
    """Take it back from Ray's C++ part, whose handler writes a stack and aborts.

    It is set once, while Ray's core starts, and half a second of that holds the interpreter: a
    SIGTERM that comes just then aborts the process, before anything has been done.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))


def disconnect() -> None:
    """Leave the cluster; an embedded one ends."""
    _within(_ANSWER_S, ray.shutdown)


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
        facts = ray.get(answer, timeout=_NODE_ANSWER_S)
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
    max_workers: int | None = None,
) -> Placement:
    """Decide how many engines run where, waiting for machines if none is there yet.

    Args:
        device: `auto` takes GPUs if the cluster has any.
        workers: engines wanted; None takes one per GPU, or per core (see `_cores`).
        wait_s: how long an autoscaling cluster may take to bring up the first machine; what
            starts on this machine alone waits for none.
        say: told what is being waited for.
        can_grow: whether engines that find no room now may find it later, on machines to come.
        max_workers: engines at most, whatever there is room for.

    Raises:
        Fatal: the cluster does not offer what one engine needs within `wait_s`.
    """
    deadline = time.monotonic() + (wait_s if can_grow else 0.0)
    asked = False
    while True:
        resources = _resources()
        placement = _fit(device, workers, resources)
        if placement is not None:
            if asked:
                request_resources(bundles=[])  # or these machines would never count as idle
            if can_grow:
                placement = _grown(placement, workers, say)
            most = placement.workers if max_workers is None else max_workers
            return Placement(placement.device, min(placement.workers, most))
        if time.monotonic() >= deadline:
            request_resources(bundles=[])
            if not can_grow:
                raise Fatal(
                    "This machine has no GPU: leave --device out, or go to a cluster that has one."
                )
            raise Fatal(
                f"The cluster cannot run this job: it {_needs(device, resources)}."
                " Add a worker node, or check --device (cpu needs no GPU) and --workers."
            )
        if not asked:
            say(f"Waiting up to {wait_s:.0f} s for a worker: the job {_needs(device, resources)}.")
            # A cluster that has shrunk to nothing grows only when it is asked to.
            request_resources(bundles=_first_need(device))
            asked = True
        time.sleep(1.0)


def fits_now(placement: Placement) -> Placement:
    """As much of `placement` as there is room for; all of it if there is room for nothing."""
    resources = _within(_ANSWER_S, _resources) or {}
    return _fit(placement.device, placement.workers, resources) or placement


def _needs(device: str, resources: dict[str, float]) -> str:
    need = "2 CPUs" if device == "cpu" else "a GPU and 2 CPUs"
    has = f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
    return f"needs {need} and has {has}"


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


def _fit(device: str, workers: int | None, resources: dict[str, float]) -> Placement | None:
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
    """CPU engines by default: one a core where Ray counts more CPUs than there are, else 7 of 8."""
    if _is_oversubscribed():
        return len(os.sched_getaffinity(0))
    return cpu_engines(cpus)


def _is_oversubscribed() -> bool:
    """Whether decode tasks share the engines' cores: so it is in an embedded cluster."""
    nodes = [n for n in ray.nodes() if n["Alive"]]  # type: ignore[no-untyped-call]
    cores = len(os.sched_getaffinity(0))
    return len(nodes) == 1 and nodes[0]["Resources"].get("CPU", 0) > cores


def machines(placement: Placement, address: str | None) -> list[PaidMachine]:
    """The machines that are up and paid for.

    A machine is told by its label `machine-type` and, for spot, `ray.io/market-type: spot`; without
    them it is of the kind `L4 machine` or `CPU machine`. One that offers nothing to the job and has
    no label, such as a head, is left out.

    Returns:
        Machines with the number of this run's engines that they can hold; none if Ray does not
        answer.
    """
    try:
        nodes = [n for n in ray.nodes() if n.get("Alive")]  # type: ignore[no-untyped-call]
    except ray.exceptions.RayError:
        return []
    cpus = sum(n["Resources"].get("CPU", 0.0) for n in nodes)
    found = []
    for node in nodes:
        has, labels = node["Resources"], node.get("Labels", {})
        if not has.get("CPU") and not has.get("GPU") and "machine-type" not in labels:
            continue
        share = has.get("CPU", 0.0) / cpus if cpus else 0.0
        engines = has.get("GPU", 0.0) if placement.device == "cuda" else placement.workers * share
        kind = THIS_MACHINE if address is None else _kind(has, labels)
        found.append(PaidMachine(node["NodeManagerHostname"], kind, engines))
    return found


def _kind(has: dict[str, float], labels: dict[str, str]) -> str:
    if "machine-type" in labels:
        is_spot = labels.get("ray.io/market-type") == "spot"
        return labels["machine-type"] + (":spot" if is_spot else "")
    gpus = [name.partition(":")[2] for name in has if name.startswith("accelerator_type:")]
    return f"{gpus[0] if gpus else 'CPU'} machine"


# What a run shows on Ray's dashboard and to Prometheus, there with `ray_` in front and, for
# counters, `_total` behind. cluster/grafana/transcribe.json draws them.
_COUNTERS = {
    "transcribe_audio_seconds": "Seconds of audio transcribed.",
    "transcribe_shards": "Shards published.",
    "transcribe_recordings": "Recordings with a row, by status.",
    "transcribe_failures": "Failed recordings, by error kind.",
}
_GAUGES = {
    "transcribe_planned_audio_seconds": "Seconds of audio that the run is to do, estimated.",
    "transcribe_rtfx": "Seconds of audio a second, since the run began.",
    "transcribe_seconds_left": "Seconds until the end, estimated.",
    "transcribe_machines": "Machines that are up.",
    "transcribe_spent_usd": "US dollars spent so far.",
    "transcribe_usd_per_hour": "US dollars an hour that the machines cost now.",
}


class Metrics:
    """The state of a run as metrics of the cluster; call it with every new state."""

    def __init__(self, run_id: str) -> None:
        tags = {
            "transcribe_recordings": ("run_id", "status"),
            "transcribe_failures": ("run_id", "error_kind"),
        }
        self._counters = {
            name: ray.util.metrics.Counter(name, about, tags.get(name, ("run_id",)))
            for name, about in _COUNTERS.items()
        }
        self._gauges = {
            name: ray.util.metrics.Gauge(name, about, ("run_id",))
            for name, about in _GAUGES.items()
        }
        self._run = {"run_id": run_id}
        self._counted: dict[tuple[str, str], float] = {}

    def __call__(self, progress: Progress) -> None:
        """Count what is new in `progress`, and set the rest."""
        self._count("transcribe_audio_seconds", progress.audio_seconds)
        self._count("transcribe_shards", progress.shards)
        for status in ("ok", "empty", "failed"):
            self._count("transcribe_recordings", getattr(progress, status), status=status)
        for kind, count in dict(progress.failures).items():
            self._count("transcribe_failures", count, error_kind=kind)
        now = {
            "transcribe_planned_audio_seconds": progress.planned_seconds,
            "transcribe_rtfx": progress.rtfx,
            "transcribe_seconds_left": progress.seconds_left,
            "transcribe_machines": progress.machines,
            "transcribe_spent_usd": progress.usd,
            "transcribe_usd_per_hour": progress.usd_per_hour,
        }
        for name, value in now.items():
            if value is not None:
                self._gauges[name].set(value, self._run)

    def _count(self, name: str, total: float, **tags: str) -> None:
        key = (name, "".join(tags.values()))
        new = total - self._counted.get(key, 0.0)
        if new > 0:
            self._counters[name].inc(new, {**self._run, **tags})
            self._counted[key] = total


class Round:
    """One pass over some shards on the connected cluster; a context manager.

    Ray Data works in a thread of its own, and whoever asks for outcomes watches over it: stuck
    workers are ended (Ray starts others and tries their shards again), a round that stands still
    is given up, and a cluster that is gone is noticed.

    Attributes:
        stood_still: whether it was given up for that; the next should ask for no more engines
            than `fits_now`.
    """

    def __init__(self, shards: Sequence[Shard], job: Job, workers: int) -> None:
        self._left = {shard.shard_id: shard for shard in shards}
        self._parts: dict[str, dict[int, RecognisedPart]] = {}
        self._job = job
        self._workers = min(workers, len(shards))
        self._watch = _start_watch()
        self._results: queue.SimpleQueue[bytes | BaseException | None] = queue.SimpleQueue()
        dataset = _dataset(shards, job, self._workers, self._watch)
        self._thread = threading.Thread(target=self._drain, args=(dataset,), daemon=True)
        self._is_over = self.stood_still = False
        self._room = fits_now(Placement(job.device, self._workers)).workers
        self._asked_at = 0.0
        self._changed_at = self._heard_at = time.monotonic()
        self._head = _Head()
        self._look = Look()

    def __enter__(self) -> Round:
        _LEAVING.clear()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._head.is_home_lost():  # nobody answers, and to ask might end this process
            return
        if not self._is_over:  # or engines would keep their place
            _LEAVING.set()
            self._thread.join(_LEAVE_S)
        self._head.leave()
        _within(_LEAVE_S, lambda: ray.kill(self._watch))

    def outcomes(self) -> Iterator[ShardSummary | SetAside | None]:
        """What becomes of every shard, in any order; None about twice a second in between.

        Raises:
            Fatal: a stage said that the run cannot go on, or Ray cannot.
        """
        while self._left and not self._is_over:
            outcome = self._next()
            yield self._judged(outcome) if isinstance(outcome, Shard) else outcome
            self._supervise()
        for shard in self._left.values():
            yield self._judged(shard)

    def wind_down(self, within_s: float) -> Iterator[ShardSummary]:
        """Begin nothing any more; what gets published within `within_s` all the same."""
        self._call("stop")
        until = time.monotonic() + within_s
        n_idle = 0
        # What has just been written may not have been told yet: idle twice is idle.
        while self._left and not self._is_over and n_idle < 2 and time.monotonic() < until:
            outcome = self._next()
            if isinstance(outcome, ShardSummary):
                yield outcome
            elif outcome is None and self._supervise():
                n_idle = 0 if self._look.unpublished else n_idle + 1

    def _drain(self, dataset: ray.data.Dataset) -> None:
        """In a thread: hand over the outcomes as Ray Data gives them, then None or why it ended."""
        try:
            batch: Any  # a table of pyarrow
            # Not `iter_rows`, which keeps each row back until the next one is there.
            for batch in dataset.iter_batches(
                batch_size=None, batch_format="pyarrow", prefetch_batches=0
            ):
                for outcome in batch["outcome"].to_pylist():
                    self._results.put(outcome)
            self._results.put(None)
        except BaseException as error:  # whatever ends it is for the other thread to say
            self._results.put(error)

    def _next(self) -> ShardSummary | Shard | None:
        """The next shard's summary, or the shard if it was not done; None after half a second."""
        try:
            result = self._results.get(timeout=_TICK_S)
        except queue.Empty:
            return None
        if result is None:
            self._is_over = True
            return None
        if isinstance(result, BaseException):
            self._is_over = True
            raise Fatal(f"Ray gave up on the run: {_first_line(result)}." + _AGAIN) from result
        outcome = pickle.loads(result)
        if isinstance(outcome, _Stop):
            raise Fatal(outcome.sentence)
        if outcome.shard_id not in self._left:  # a part of a shard that is set aside already
            return None
        if isinstance(outcome, RecognisedPart):
            joined = self._joined(outcome)
            if joined is None:
                return None
            outcome = joined
        self._parts.pop(outcome.shard_id, None)
        shard = self._left.pop(outcome.shard_id)
        return outcome if isinstance(outcome, ShardSummary) else shard

    def _joined(self, part: RecognisedPart) -> ShardSummary | None:
        """Keep a part of a shard that had to be cut; publish the shard once no part is missing.

        Raises:
            Fatal: it cannot be published.
        """
        parts = self._parts.setdefault(part.shard_id, {})
        parts[part.number] = part
        ordered = [parts[number] for number in sorted(parts)]
        if not ordered[-1].is_last or len(ordered) != ordered[-1].number + 1:
            return None
        try:
            joined = pipeline.join_parts(ordered, self._job)
            return pipeline.publish_shard(joined, self._job.config.out)
        except TranscribeError as error:
            raise Fatal(str(error)) from error

    def _judged(self, shard: Shard) -> SetAside:
        """Whose fault it was: a machine that is gone takes its workers with it."""
        died, reason = self._call("deaths", shard.shard_id) or ((), "")
        if died:
            alive = _within(_ANSWER_S, _living_nodes) or set()
            died = [worker for worker in died if worker.node_id in alive]
        return SetAside(shard, len(died), reason)

    # ---- supervision ----------------------------------------------------------------

    def _supervise(self) -> bool:
        """Look after the workers, once a second; says whether it did.

        Raises:
            Fatal: Ray is gone, or nothing can run on it.
        """
        now = time.monotonic()
        if now - self._asked_at < _LOOK_EVERY_S:
            return False
        self._asked_at = now
        self._head.check()
        look: Look | None = self._call("look")
        if look is None:
            if now - self._heard_at > _WATCH_SILENCE_S:
                raise Fatal("The process that watches over the workers is stuck." + _AGAIN)
            return False
        self._heard_at = now
        # What a machine had in hand when it was lost is never said to have ended.
        at_work = [work for work in look.at_work if self._head.has(work.worker.node_id)]
        if look.events != self._look.events or at_work:
            self._changed_at = now
        self._look = look
        if look.loads_in_vain > _LOADS_IN_VAIN * self._workers:
            raise Fatal(
                f"Engines end while they load the model, {look.loads_in_vain} of them so far, and"
                f" none gets ready{f' ({look.last_words})' if look.last_words else ''}."
                " Check that a worker has the memory that the model needs."
            )
        for work in look.overdue:
            if not self._head.has(work.worker.node_id):
                continue
            _LOG.warning("%s of shard %s is stuck; its worker is ended", work.stage, work.shard_id)
            _end_process(work.worker)
        self._is_moving(now)
        return True

    def _is_moving(self, now: float) -> None:
        """Give a round up in which nobody works: Ray waits for ever for an actor it cannot place.

        Raises:
            Fatal: the cluster has no room for the job any more.
        """
        still_s = now - self._changed_at
        if still_s < _LOOK_EVERY_S * 5:
            return
        resources = _within(_ANSWER_S, _resources)
        if resources is None:
            return
        placement = _fit(self._job.device, self._workers, resources)
        if placement is not None:
            has_shrunk = placement.workers < self._room
            if still_s > (_STANDSTILL_S if not has_shrunk or _can_decode() else _FILLED_UP_S):
                _LOG.warning("nothing has moved for %.0f s; what is left is planned anew", still_s)
                _LEAVING.set()
                self._thread.join(_ANSWER_S)
                self._is_over = self.stood_still = True
        elif still_s > self._job.config.wait_for_workers_s:
            needs = _needs(self._job.device, resources)
            raise Fatal(f"The cluster cannot go on with this job: it {needs}." + _AGAIN)

    def _call(self, name: str, *arguments: object) -> Any:
        """The watch's answer; None if there is none."""
        call = getattr(self._watch, name).remote
        try:
            return ray.get(call(*arguments), timeout=_ANSWER_S)
        except ray.exceptions.RayError:
            return None


def _dataset(shards: Sequence[Shard], job: Job, workers: int, watch: Any) -> ray.data.Dataset:
    """The three stages over one row, one block, for each shard."""
    _quieten_ray_data()
    return (
        ray.data.from_items(
            [{"shard": pickle.dumps(shard)} for shard in longest_first(shards)],
            override_num_blocks=max(1, len(shards)),
        )
        .flat_map(
            functools.partial(_decode, job=job, watch=watch),
            num_cpus=_DECODE_CPUS,
            concurrency=_decode_tasks(job, workers),
        )
        .map(
            _Recogniser,  # type: ignore[arg-type]  # Ray's stub knows no classes
            fn_constructor_kwargs={"job": job, "watch": watch},
            compute=ray.data.ActorPoolStrategy(
                size=workers, max_tasks_in_flight_per_actor=_shards_in_hand(job)
            ),
            num_cpus=_GPU_ENGINE_CPUS if job.device == "cuda" else _ENGINE_CPUS,
            num_gpus=1 if job.device == "cuda" else None,
        )
        # Told how many: a share this small would let Ray start any number.
        .map(
            functools.partial(_publish, job=job, watch=watch),
            num_cpus=_PUBLISH_CPUS,
            concurrency=_decode_tasks(job, workers) or workers,
        )
    )


def _shards_in_hand(job: Job) -> int:
    """Shards that an engine has been given at once.

    A GPU is done with one in seconds and must not wait for the next to be sent. On a CPU that takes
    minutes, and a shard that waits for one engine is one that another cannot take: at the end of a
    run, or while the others load, it would stand idle.
    """
    return 2 if job.device == "cuda" else 1


def _decode_tasks(job: Job, workers: int) -> int | None:
    """Decode tasks at once on an embedded cluster's CPU; None for as many as find a place.

    There they take turns with the engines on the same cores. More than needed would decode far
    ahead, and above all delay the engines' start: each begins with imports of seconds. The same
    holds for publishing.
    """
    is_shared = job.device == "cpu" and _is_oversubscribed()
    return -(-workers // _ENGINES_FED) if is_shared else None


def _start_watch() -> Any:
    """Where whoever asks it is, for it must not go down with a worker's machine."""
    lasting = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_WatchActor)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return lasting.options(scheduling_strategy=here).remote()


class _Head:
    """The cluster's head, asked again and again in a thread: without it, questions never end.

    Ray ends a process whose head has been gone for 60 s, without a word and with exit code 1.
    """

    def __init__(self) -> None:
        self._home = ray.get_runtime_context().get_node_id()
        self._heard_at = self._ticked_at = time.monotonic()
        self._raylet = processes.child_named("raylet", os.getpid())
        self._living: set[str] | None = None
        self._is_over = threading.Event()
        for work in (self._ask, self._have_the_last_word):
            threading.Thread(target=work, daemon=True).start()

    def check(self) -> None:
        """Say that Ray is gone, while there is time to.

        Raises:
            Fatal: the head has not answered for some time, or Ray has ended on this machine.
        """
        if self._was_stopped():  # nobody here could hear an answer
            return
        if self._silent_s() > _SILENCE_S:
            atexit.unregister(ray.shutdown)  # it would wait for the head
            raise Fatal(self._sentence())
        if self.is_home_lost():
            raise Fatal("Ray has ended on this machine under the run." + _AGAIN)

    def is_home_lost(self) -> bool:
        """Whether Ray is no more on this machine.

        As soon as the head knows it, too, Ray ends this process without a word.
        """
        has_ended = self._raylet is not None and not processes.started(self._raylet)
        return has_ended or not self.has(self._home)

    def has(self, node_id: str) -> bool:
        """Whether a machine was there when last asked; also before the first answer."""
        return self._living is None or node_id in self._living

    def leave(self) -> None:
        """Ask no more. A head that is gone is still to be watched: others may wait for it."""
        if self._silent_s() <= _SILENCE_S:
            self._is_over.set()

    def _was_stopped(self) -> bool:
        """Whether this process has not been running for a while, and not yet made up for it."""
        return time.monotonic() - self._ticked_at > _STOPPED_S

    def _silent_s(self) -> float:
        return time.monotonic() - self._heard_at

    def _sentence(self) -> str:
        return f"Ray's head has not answered for {self._silent_s():.0f} s: it is gone." + _AGAIN

    def _ask(self) -> None:
        while not self._is_over.wait(_HEAD_EVERY_S):
            with suppress(Exception):  # that it does not answer is known from the time
                self._living = _living_nodes()
                self._heard_at = time.monotonic()

    def _have_the_last_word(self) -> None:
        while not self._is_over.wait(1.0):
            if self._was_stopped():  # by SIGSTOP, or with the whole machine
                self._heard_at += time.monotonic() - self._ticked_at
            self._ticked_at = time.monotonic()
            if self._silent_s() > _SILENCE_S + _LAST_WORD_S:
                print(f"Error: {self._sentence()}", file=sys.stderr, flush=True)
                os._exit(2)


_LEAVING = threading.Event()


class _Left(Exception):
    """Raised inside Ray Data, which has no other way to be told to end from outside."""


class _Leaving(ExecutionCallback):
    def on_execution_step(self, executor: object) -> None:
        if _LEAVING.is_set():
            raise _Left


def _within(seconds: float, ask: Callable[[], T]) -> T | None:
    """The answer, or None if it takes too long or fails: calls to a dead head wait for ever."""
    answers: queue.SimpleQueue[T | None] = queue.SimpleQueue()

    def answer() -> None:
        try:
            answers.put(ask())
        except Exception:
            answers.put(None)

    threading.Thread(target=answer, daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return None


def _living_nodes() -> set[str]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in nodes if node["Alive"]}


def _can_decode() -> bool:
    """Whether a decode task finds a place; also if Ray does not answer."""
    free: dict[str, float] | None = _within(_ANSWER_S, ray.available_resources)
    return free is None or free.get("CPU", 0.0) >= _DECODE_CPUS


def _resources() -> dict[str, float]:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _end_process(worker: Worker) -> None:
    """SIGKILL a worker on its machine: the one way to end a process that does not listen."""
    there = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
    kill = ray.remote(num_cpus=0, max_retries=0)(_kill)
    kill.options(scheduling_strategy=there).remote(worker)


def _quieten_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Every row is a block of its own: a part goes on to an engine as soon as it is made.
    context.target_max_block_size = 1
    context.custom_execution_callback_classes = [_Leaving]
    # What ends a run is said in our own sentence; Ray Data keeps the traceback in its log file.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


@dataclass(frozen=True, slots=True)
class _Stop:
    """A stage's word that the whole run must stop; travels like a result."""

    sentence: str


@dataclass(frozen=True, slots=True)
class _Undone:
    """A shard that a stage did not do: workers die at it, or the run is winding down."""

    shard_id: str


# ---- what runs on the workers -----------------------------------------------------------
# Rows carry one pickled object each: our own values between our own processes. Ray Data
# then sees one plain bytes column, whose size it can account for.

_Row = dict[str, Any]


class _WatchActor:
    """The watch of a round, where every worker can reach it."""

    def __init__(self) -> None:
        self._watch = Watch()

    def begin(
        self, shard_id: str, stage: Stage, audio_s: float, worker: Worker, part: int | None
    ) -> tuple[Work, Answer]:
        work = Work(shard_id, stage, audio_s, worker, time.monotonic(), part)
        return work, self._watch.begin(work)

    def end(self, work: Work) -> None:
        self._watch.end(work, time.monotonic())

    def explain(self, shard_id: str, reason: str) -> None:
        self._watch.explain(shard_id, reason)

    def deaths(self, shard_id: str) -> tuple[tuple[Worker, ...], str]:
        return self._watch.deaths(shard_id)

    def stop(self) -> None:
        self._watch.stop()

    def look(self) -> Look:
        return self._watch.look(time.monotonic())


def _kill(worker: Worker) -> None:
    if processes.started(worker.pid) == worker.started:
        os.kill(worker.pid, signal.SIGKILL)


@functools.cache
def _this_worker() -> Worker:
    pid = os.getpid()
    return Worker(ray.get_runtime_context().get_node_id(), pid, processes.started(pid))


def _decode(row: _Row, job: Job, watch: Any) -> Iterator[_Row]:
    """A row for each part; deadlines and deaths are those of one part's making."""
    shard: Shard = pickle.loads(row["shard"])
    parts = pipeline.decode_shard(shard, job)
    is_more = True

    def next_part() -> DecodedPart:
        nonlocal is_more
        part = next(parts)
        is_more = not part.is_last
        return part

    while is_more:
        is_more = False  # unless the next part says otherwise
        # Not by a name of ours, which would hold it while the next part grows.
        yield {"decoded": _watched(watch, "decode", shard.shard_id, shard.duration_s, next_part)}


class _Recogniser:
    """An engine, loaded once an actor."""

    def __init__(self, job: Job, watch: Any) -> None:
        self._job = job
        self._watch = watch
        self._engine: Engine | None = None
        actor = ray.get_runtime_context().get_actor_id() or ""
        self._refusal = _watched(watch, "load", actor, 0.0, self._load)

    def _load(self) -> None:
        self._engine = load_engine(self._job)

    def __call__(self, row: _Row) -> _Row:
        decoded = pickle.loads(row["decoded"])
        if not isinstance(decoded, DecodedPart):
            return {"recognised": row["decoded"]}
        engine = self._engine
        if engine is None:
            return {"recognised": self._refusal}
        return {
            "recognised": _watched(
                self._watch,
                "recognise",
                decoded.shard_id,
                decoded.window_seconds,
                lambda: pipeline.recognise_part(decoded, engine, self._job),
                None if decoded.is_whole_shard else decoded.number,
            )
        }


def _publish(row: _Row, job: Job, watch: Any) -> _Row:
    recognised = pickle.loads(row["recognised"])
    if not (isinstance(recognised, RecognisedPart) and recognised.is_whole_shard):
        return {"outcome": row["recognised"]}
    return {
        "outcome": _watched(
            watch,
            "publish",
            recognised.shard_id,
            0.0,
            lambda: pipeline.publish_shard(pipeline.join_parts([recognised], job), job.config.out),
        )
    }


def _watched(
    watch: Any,
    stage: Stage,
    shard_id: str,
    audio_s: float,
    step: Callable[[], object],
    part: int | None = None,
) -> bytes:
    """The step's pickled result, or what is to be done without one; the watch is told.

    An error that is not one of ours is a defect, or a device that no longer works: it ends this
    process as a crash in native code would, and the shard is tried again under the same rules.
    """
    # Waited for, so that it is known even of a worker that dies in the next moment.
    work, answer = ray.get(watch.begin.remote(shard_id, stage, audio_s, _this_worker(), part))
    if answer != "go":
        return pickle.dumps(_Undone(shard_id))
    try:
        result = step()
    except TranscribeError as error:
        result = _Stop(str(error))
    except Exception as error:
        traceback.print_exc()  # into the worker's log
        ray.get(watch.explain.remote(shard_id, _last_words(stage, error)))
        os._exit(1)
    pickled = pickle.dumps(result, protocol=5)
    watch.end.remote(work)
    return pickled


def _last_words(stage: Stage, error: Exception) -> str:
    """What was raised and where; not its text, which may quote a recording."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{stage} raised {type(error).__name__}{where}"
