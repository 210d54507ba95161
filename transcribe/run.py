"""One run from the archive's listing to the report: the driver's side.

Owns the order of the steps that happen once a run. The work on shards is behind
`distributed.run_shards`; what a recording goes through is in `pipeline.py`.
"""

from __future__ import annotations

import io
import json
import logging
import platform
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any

import pyarrow as pa
from rich.console import Console

from transcribe import (
    distributed,
    duplicates,
    models,
    preflight,
    prices,
    publish,
    retries,
    schema,
    status,
    storage,
)
from transcribe.archive import estimate_durations, list_archive
from transcribe.budget import THIS_MACHINE, Bill, Limits, Meter
from transcribe.claims import Claim
from transcribe.config import RunConfig, fingerprint, result_settings
from transcribe.duplicates import Duplicate
from transcribe.engines.fake import fake_rtfx, is_fake
from transcribe.engines.load import model_revision, refuse_impossible
from transcribe.environment import environment
from transcribe.errors import Fatal, TranscribeError
from transcribe.forecast import comparable, kept
from transcribe.monitor import EVERY_S, Monitor, Surroundings
from transcribe.notify import Notifier, Outbox
from transcribe.page import run_page
from transcribe.pipeline import Job, ShardSummary, peak_bytes
from transcribe.planning import Actual, compared, differing_settings
from transcribe.printable import printable, redacted, without_secrets
from transcribe.report import Ended, RunFacts, Totals, metric_rows, report
from transcribe.rounds import work
from transcribe.shards import Shard, plan_shards

_LOG = logging.getLogger(__name__)

_UNFINISHED_WRITE_S = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run has to do."""

    config: RunConfig
    run_id: str
    model_revision: str
    engine: str
    settings: dict[str, Any]
    archive_recordings: int
    unlisted_folders: int
    already_transcribed: int
    published: dict[str, int]
    shards: list[Shard]
    duplicates: list[Duplicate]

    @property
    def planned_recordings(self) -> int:
        """Recordings that get a row, duplicates included."""
        return sum(len(shard.recordings) for shard in self.shards) + len(self.duplicates)

    @property
    def config_fingerprint(self) -> str:
        """Fingerprint of the settings that change results."""
        return fingerprint(self.settings)


def new_run_id() -> str:
    """Sortable by time, unique without asking anybody."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def prepare(
    config: RunConfig, say: Callable[[str], None], claim: Callable[[], None] = lambda: None
) -> Plan:
    """List the archive, subtract what is done and what is there twice, cut the rest into shards.

    What can be refused is refused here, before a worker starts and before OUT is touched,
    but for rows that an earlier run left superseded.

    Args:
        config: the settings.
        say: told what is found.
        claim: called before anything in OUT is changed.

    Raises:
        Fatal: a missing archive, an unwritable OUT, an unknown model, other settings in OUT, or
            `claim` refuses.
    """
    storage.check_writable(config.out)
    revision, engine = model_facts(config)  # before the listing, which may take minutes
    unlisted: list[str] = []
    recordings = list_archive(config.archive, unlisted)
    settings = result_settings(config, revision, engine)
    publish.check_settings(config.out, settings)
    claim()
    storage.sweep(config.out)
    settled = publish.settle(config.out)
    if settled.removed:
        say(f"Removed {settled.removed} rows that an earlier run had left superseded.")
    published = settled.published
    remaining = recordings.without(published.recording_ids)
    done = len(recordings) - len(remaining)
    if done:
        say(f"{done:,} of {len(recordings):,} recordings already transcribed.")
    contents = published.contents(remaining.sizes)
    repeated = duplicates.find(remaining, contents)
    if repeated:
        say(f"Same bytes as another recording, whose result they share: {len(repeated):,}.")
    to_recognise = remaining.without(pa.array([d.recording.recording_id for d in repeated]))
    shards = plan_shards(
        estimate_durations(to_recognise, config.headerless_format), config.shard_minutes
    )
    return Plan(
        config=config,
        run_id=new_run_id(),
        model_revision=revision,
        engine=engine,
        settings=settings,
        archive_recordings=len(recordings),
        unlisted_folders=len(unlisted),
        already_transcribed=done,
        published=published.counts,
        shards=shards,
        duplicates=repeated,
    )


def model_facts(config: RunConfig) -> tuple[str, str]:
    """Revision and engine of the model that a run takes.

    Raises:
        Fatal: there is no such model, or a setting asks what it cannot do.
    """
    if is_fake(config.model):
        fake_rtfx(config.model)
        return "fake", "fake"
    model = models.resolve(config.model, config.engine)
    refuse_impossible(model.engine, config)
    return model_revision(model, config), model.engine


def transcribe(
    config: RunConfig, address: str | None, console: Console, notifier: Notifier | None = None
) -> dict[str, Any]:
    """Do one whole run.

    Args:
        config: the settings.
        address: Ray cluster to join; None starts an embedded one.
        console: where progress goes.
        notifier: where news of the run goes; None tells nobody.

    Returns:
        The content of report.json, and under `published` the rows of OUT by status.

    Raises:
        Fatal: the run cannot be done, or not finished; see `prepare` and `execute`.
        Transient: a store stayed out of reach through all retries.
    """
    config = replace(
        config, archive=storage.absolute(config.archive), out=storage.absolute(config.out)
    )
    if address is None:
        _refuse_unpriced(config, [THIS_MACHINE])
    say = _saying(console)
    with (
        _logging_to(console) as log,
        Outbox(notifier or Notifier()) as outbox,
        Claim(config.out, config.archive, say) as claim,
    ):
        plan = prepare(config, say, claim.take)
        if not plan.shards and not plan.duplicates:
            publish.claim_settings(config.out, plan.settings)  # it may have been lost
            nobody = distributed.Placement("cpu", 0)
            return _finish(plan, nobody, [], _Clock(), None, published=plan.published)
        return execute(plan, address, console, log, outbox)


def _saying(console: Console) -> Callable[[str], None]:
    """Print sentences as they are: nothing in them is markup, and no line of a log is broken."""
    show = partial(console.print, highlight=False, markup=False, emoji=False, soft_wrap=True)
    return lambda sentence: show(printable(sentence))


class _OneLine(logging.Formatter):
    """A line for each record: a name with a line break in it must not forge another one."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The record as text that may be shown."""
        return printable(super().formatMessage(record))


class _Shown(logging.Handler):
    """Warnings for the user, above the progress bar if there is one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Say one."""
        self._say(f"{record.levelname.capitalize()}: {record.getMessage()}")


@contextmanager
def _logging_to(console: Console) -> Iterator[io.StringIO]:
    """Show this package's warnings to the user; collect all of its log for `log.txt`."""
    lines = io.StringIO()
    kept = logging.StreamHandler(lines)
    kept.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
    shown = _Shown(_saying(console))
    logger = logging.getLogger("transcribe")
    before = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(kept)
    logger.addHandler(shown)
    try:
        yield lines
    finally:
        logger.removeHandler(kept)
        logger.removeHandler(shown)
        logger.level, logger.propagate = before


@dataclass(slots=True)
class _Clock:
    """When (monotonic seconds) a run began, and when its first shard did."""

    started: float = field(default_factory=time.monotonic)
    first_work: float = field(default_factory=time.monotonic)


def execute(
    plan: Plan, address: str | None, console: Console, log: io.StringIO, outbox: Outbox
) -> dict[str, Any]:
    """Run the plan on Ray and write the report.

    Args:
        plan: what is to be done.
        address: Ray cluster to join; None starts an embedded one.
        console: where progress goes.
        log: what has been logged so far; ends as the run's `log.txt`.
        outbox: where news of the run goes.

    Returns:
        The content of report.json.

    Raises:
        Fatal: no cluster, or nothing fits on it, and OUT is as it was; or a stage had to stop
            the run, or rows are gone from OUT, and what is published by then stays.
    """
    clock = _Clock()
    done: list[ShardSummary] = []
    config = plan.config
    say = _saying(console)
    say(f"Joining Ray at {address} ..." if address else "Starting Ray on this machine ...")
    distributed.connect(address, config.workers)
    try:
        placement = distributed.place(
            config.device,
            config.workers,
            config.wait_for_workers_s,
            say,
            can_grow=address is not None,
            max_workers=config.max_workers,
        )
        if address is not None:
            _refuse_unfit_nodes(config, say)
        # This machine is there from the start; a cluster's machines are paid once they are.
        since = clock.started if address is None else time.monotonic()
        monitor = _monitor(plan, placement, address, outbox, since)
        publish.claim_settings(config.out, plan.settings)
        _write(plan, "config.json", _snapshot(plan))
        with _log_stored(plan, log), retries.patient(), monitor:
            job = _job(plan, placement)
            _log_beginning(plan, placement)
            with _reported_unfinished(plan, placement, done, clock, monitor):
                work(plan.shards, job, placement, console, done, monitor)
                if not monitor.stopped:
                    _share(plan, job, placement, console, done, monitor)
            _log_end(done)
    finally:
        distributed.disconnect()
    storage.sweep(config.out)
    settled = publish.settle(config.out)
    lacking = [] if monitor.stopped else settled.published.lacking(_uris(plan))
    ended: Ended = "budget" if monitor.stopped else "stopped" if lacking else "complete"
    result = _finish(
        plan,
        placement,
        done,
        clock,
        monitor,
        superseded=settled.removed,
        ended=ended,
        published=settled.published.counts,
    )
    if lacking:
        raise Fatal(
            f"{len(lacking):,} recordings of this run have no row in {redacted(config.out)}"
            f" (the first: {redacted(lacking[0])}): their files were taken away while it was at"
            " work. Run the same command again."
        )
    return result


def _uris(plan: Plan) -> Iterator[str]:
    """The `uri` of every row that the plan will give."""
    recordings = chain.from_iterable(shard.recordings for shard in plan.shards)
    for recording in chain(recordings, (duplicate.recording for duplicate in plan.duplicates)):
        yield without_secrets(recording.uri)


def _log_beginning(plan: Plan, placement: distributed.Placement) -> None:
    _LOG.info(
        "run %s of %s into %s: %d of %d recordings, %d of them duplicates, in %d shards;"
        " %s on %d workers (%s)",
        plan.run_id,
        redacted(plan.config.archive),
        redacted(plan.config.out),
        plan.planned_recordings,
        plan.archive_recordings,
        len(plan.duplicates),
        len(plan.shards),
        plan.config.model,
        placement.workers,
        placement.device,
    )


def _log_end(done: Sequence[ShardSummary]) -> None:
    totals = Totals.of(done)
    _LOG.info("done: %d ok, %d empty, %d failed", totals.ok, totals.empty, totals.failed)


@contextmanager
def _reported_unfinished(
    plan: Plan,
    placement: distributed.Placement,
    done: list[ShardSummary],
    clock: _Clock,
    monitor: Monitor,
) -> Iterator[None]:
    """Report what was done also of a run that ends before its end."""
    try:
        yield
    except (KeyboardInterrupt, TranscribeError) as error:
        ended: Ended = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
        _soon(lambda: _finish(plan, placement, done, clock, monitor, ended=ended))
        raise


def _soon(write: Callable[[], object]) -> None:
    """Write something, but do not wait for it long, nor complain.

    For the end of a run that cannot go on: the store may be the reason, and what ended the run is
    what is to be said.
    """

    def quietly() -> None:
        with suppress(TranscribeError):
            write()

    writer = threading.Thread(target=quietly, daemon=True)
    writer.start()
    writer.join(_UNFINISHED_WRITE_S)


def _monitor(
    plan: Plan,
    placement: distributed.Placement,
    address: str | None,
    outbox: Outbox,
    paid_since: float,
) -> Monitor:
    """What watches over the run, its bill and its limits.

    Raises:
        Fatal: there is a limit to spending, and no price.
    """
    config, now = plan.config, time.time()
    begun = status.Progress(
        run_id=plan.run_id,
        archive=redacted(config.archive),
        host=platform.node(),
        started_at=now,
        updated_at=now,
        every_s=EVERY_S,
        device=placement.device,
        workers=min(placement.workers, len(plan.shards)),
        archive_recordings=plan.archive_recordings,
        already_transcribed=plan.already_transcribed,
        planned_recordings=plan.planned_recordings,
        planned_shards=len(plan.shards),
        planned_seconds=sum(s.duration_s for s in plan.shards),
        max_spend=config.max_spend,
        max_hours=config.max_hours,
    )
    url = status.progress_url(config.out, plan.run_id)
    around = Surroundings(
        put=partial(storage.put, url),
        nodes=partial(distributed.machines, placement, address),
        measure=distributed.Metrics(plan.run_id),
    )
    price = prices.price_list(config.price_per_hour, config.machine_type)
    _refuse_unpriced(config, {node.kind for node in around.nodes()})
    limits = Limits(config.max_spend, config.max_hours)
    return Monitor(begun, limits, Meter(price), outbox.put, around, paid_since)


def _refuse_unpriced(config: RunConfig, kinds: Collection[str]) -> None:
    """Refuse a limit to spending where a machine's price is not known.

    Raises:
        Fatal: so it is.
    """
    price = prices.price_list(config.price_per_hour, config.machine_type)
    unpriced = sorted(kind for kind in kinds if price(kind) is None)
    if config.max_spend is not None and unpriced:
        raise Fatal(
            f"--max-spend needs a price for {unpriced[0]!r}: give --price-per-hour, or"
            " --machine-type with a name of the price catalogue."
        )


def _refuse_unfit_nodes(config: RunConfig, say: Callable[[str], None]) -> None:
    """Ask the cluster's machines what `transcribe preflight` asks; warnings are said.

    Raises:
        Fatal: the first machine on which the job could not work.
    """
    nodes = distributed.on_every_node(config.model, config.engine)
    for check in preflight.cluster_checks(nodes):
        if check.outcome == "failure":
            raise Fatal(f"{check.name}: {check.found}; {check.remedy}.")
        if check.outcome == "warning":
            say(f"Warning: {check.name}: {check.found}; {check.remedy}.")


@contextmanager
def _log_stored(plan: Plan, log: io.StringIO) -> Iterator[None]:
    """Store the log as `log.txt` however the work ends, with the reason if it fails."""
    url = publish.run_url(plan.config.out, plan.run_id, "log.txt")
    try:
        yield
    except BaseException as error:
        if isinstance(error, TranscribeError):
            log.write(f"stopped: {printable(str(error))}\n")
        elif isinstance(error, KeyboardInterrupt):
            log.write("interrupted\n")
        _soon(lambda: storage.put(url, log.getvalue().encode()))
        raise
    with retries.patient():
        storage.put(url, log.getvalue().encode())


def _snapshot(plan: Plan) -> dict[str, Any]:
    """The settings as they may be stored."""
    told = {
        name: redacted(value) if isinstance(value, str) else value
        for name, value in plan.config.as_dict().items()
    }
    return {**told, "fingerprint": plan.config_fingerprint}


def _job(plan: Plan, placement: distributed.Placement) -> Job:
    return Job(
        config=plan.config,
        run_id=plan.run_id,
        model_revision=plan.model_revision,
        engine=plan.engine,
        config_fingerprint=plan.config_fingerprint,
        device=placement.device,
    )


def _share(
    plan: Plan,
    job: Job,
    placement: distributed.Placement,
    console: Console,
    done: list[ShardSummary],
    monitor: Monitor,
) -> None:
    """Give duplicates their rows; the few that cannot share are transcribed by themselves."""
    config = plan.config
    summaries, alone = duplicates.publish_duplicates(plan.duplicates, config.out, plan.run_id)
    done += summaries
    for summary in summaries:
        monitor.add(summary, 0.0)
    if alone:
        _LOG.warning("%d duplicates cannot share their original's result", len(alone))
        shards = plan_shards(estimate_durations(alone), config.shard_minutes)
        work(shards, job, placement, console, done, monitor)


@retries.patient()
def _finish(
    plan: Plan,
    placement: distributed.Placement,
    summaries: list[ShardSummary],
    clock: _Clock,
    monitor: Monitor | None,
    *,
    superseded: int = 0,
    ended: Ended = "complete",
    published: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Report a run; one that did not get to its end has no time to count what is in OUT."""
    if summaries:
        # Workers' clocks tell when work began: what lies before is start-up.
        first = min(summary.started_at for summary in summaries)
        clock.first_work = max(clock.started, time.monotonic() - (time.time() - first))
    totals = Totals.of(summaries)
    now = time.monotonic()
    facts = RunFacts(
        run_id=plan.run_id,
        ended=ended,
        archive=redacted(plan.config.archive),
        out=redacted(plan.config.out),
        model=plan.config.model,
        # What ran: the plan knows the files only, and the device may choose between two for them.
        engine=next((s.engine for s in summaries if s.engine), plan.engine),
        device=placement.device,
        workers=min(placement.workers, len(plan.shards)),
        archive_recordings=plan.archive_recordings,
        unlisted_folders=plan.unlisted_folders,
        already_transcribed=plan.already_transcribed,
        superseded=superseded,
        startup_seconds=clock.first_work - clock.started,
        processing_seconds=now - clock.first_work,
        total_seconds=now - clock.started,
        driver_peak_bytes=peak_bytes(),
        budget_reached=monitor.stopped if monitor else "",
    )
    result = report(facts, totals, summaries, monitor.bill() if monitor else Bill())
    result["environment"] = environment()
    if published is not None:
        result["predicted"] = _predicted(plan, result)
        result["published"] = published
    if summaries or ended != "complete":
        rows = metric_rows(plan.run_id, summaries)
        _put(plan, "metrics.parquet", publish.parquet_bytes(rows, schema.METRICS))
        _write(plan, "report.json", result)
        _put(plan, "report.html", run_page(result, rows).encode())
    return result


def _predicted(plan: Plan, result: dict[str, Any]) -> dict[str, float | None]:
    """What a forecast in OUT said of this run, and how far it was off."""
    actual = Actual(
        settings=comparable(plan.model_revision, plan.engine, plan.config),
        recordings=result["recordings"],
        workers=result["workers"],
        device=result["device"],
        audio_s=result["audio_seconds"],
        processing_s=result["processing_seconds"],
        usd=result["cost"]["usd"],
    )
    forecast = kept(plan.config.out) if result["recordings"] else None
    differing = differing_settings(forecast, actual)
    if differing:
        _LOG.warning(
            "the forecast in OUT is of other settings (%s) and is not compared with this run",
            ", ".join(differing),
        )
    return compared(forecast, actual)


def _write(plan: Plan, name: str, content: dict[str, Any]) -> None:
    _put(plan, name, json.dumps(content, indent=2, sort_keys=True).encode())


def _put(plan: Plan, name: str, content: bytes) -> None:
    storage.put(publish.run_url(plan.config.out, plan.run_id, name), content)
