"""The way of the data, in plain Python: the reference for the Ray run.

    list the archive -> subtract what is done -> cut the rest into shards
    -> decode each shard -> find the speech -> pack windows -> recognise them
    -> assemble per recording -> publish one Parquet file per shard

Owns the order of the steps and their timing. Knows nothing of Ray: `distributed.py` calls
the same `decode_shard`, `recognise_shard` and `publish_shard` in tasks and actors.
"""

from __future__ import annotations

import logging
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from transcribe import isolation, retries, rows
from transcribe.archive import Recording
from transcribe.assemble import Coverage, assemble
from transcribe.config import RunConfig
from transcribe.decode import SAMPLE_RATE
from transcribe.engines.base import (
    VOTERS_PER_CHANNEL,
    Engine,
    EngineInput,
    EngineWork,
    Hypothesis,
    recognise_checked,
)
from transcribe.errors import BadAudio, Fatal
from transcribe.fetch import Fetched, fetch
from transcribe.listen import PIECE_SAMPLES, Piece, Spent, Whole, listen, load
from transcribe.publish import publish_shard as write_shard
from transcribe.shards import Shard, shard_id
from transcribe.speech import Window

_LOG = logging.getLogger(__name__)

# Windows that an engine gets at once. An ordinary shard, an hour in two channels, holds less.
PART_SAMPLES = 5400 * SAMPLE_RATE  # an hour and a half: 173 MB
_DECODE_MEMORY_BYTES = 2 << 30  # of a process that decodes; it needs half (docs/reliability.md)


@dataclass(frozen=True, slots=True)
class Job:
    """The recipe of a run, small enough to send to every worker."""

    config: RunConfig
    run_id: str
    model_revision: str
    engine: str
    config_fingerprint: str
    device: str
    part_samples: int = PART_SAMPLES


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a recording once it was decoded to its end; no facts: it failed."""

    recording: Recording
    facts: rows.AudioFacts | None = None
    coverage: tuple[Coverage, ...] = ()
    problem: BadAudio | None = None


@dataclass(frozen=True, slots=True)
class DecodedPiece:
    """Some of a recording's windows with their samples.

    Attributes:
        index: of the recording in its shard.
        windows: what is to be recognised.
        samples: of each window.
        is_first: whether it is the recording's first piece, which decides on its language.
        outcome: with the recording's last piece.
        spent: what it took to decode.
    """

    index: int
    windows: tuple[Window, ...]
    samples: tuple[npt.NDArray[np.int16], ...]
    is_first: bool
    outcome: Outcome | None
    spent: Spent

    @property
    def n_samples(self) -> int:
        """Samples of all windows."""
        return sum(len(samples) for samples in self.samples)


@dataclass(frozen=True, slots=True)
class RecognisedPiece:
    """Some of a recording's windows and what was heard in them."""

    index: int
    windows: tuple[Window, ...]
    hypotheses: tuple[Hypothesis, ...]
    outcome: Outcome | None
    decode_seconds: float
    recognise_seconds: float


@dataclass(slots=True)
class StageSeconds:
    """Wall seconds that a shard spent in each stage, on one worker's clock.

    `features`, `encoder` and `decoder` are parts of `recognise`. `decode_cpu` and
    `recognise_cpu` are CPU seconds of the processes, all their threads, over the stages up to
    `speech_detection` (those of the child included) and over `recognise` and `assemble`.
    """

    read: float = 0.0
    decode: float = 0.0
    resample: float = 0.0
    speech_detection: float = 0.0
    recognise: float = 0.0
    features: float = 0.0
    encoder: float = 0.0
    decoder: float = 0.0
    assemble: float = 0.0
    publish: float = 0.0
    decode_queue: float = 0.0
    publish_queue: float = 0.0
    decode_cpu: float = 0.0
    recognise_cpu: float = 0.0


@dataclass(frozen=True, slots=True)
class DecodedPart:
    """What an engine gets at once: a shard, or if that is too much, a part of it.

    Attributes:
        number: 0, 1, ... within the shard.
        is_last: whether no other part follows.
        pieces: of its recordings, in order; one may go on in the next part.
        voters: windows of parts before this one, heard again to tell the language of what goes on
            here.
    """

    shard_id: str
    number: int
    is_last: bool
    pieces: tuple[DecodedPiece, ...]
    voters: tuple[EngineInput, ...]
    seconds: StageSeconds
    peak_bytes: int
    started_at: float
    finished_at: float = field(default_factory=time.time)

    @property
    def is_whole_shard(self) -> bool:
        """Whether the shard has no other part."""
        return self.number == 0 and self.is_last

    @property
    def window_seconds(self) -> float:
        """Seconds that an engine has to hear."""
        return sum(piece.n_samples for piece in self.pieces) / SAMPLE_RATE


@dataclass(frozen=True, slots=True)
class RecognisedPart:
    """What was heard in a part, without samples."""

    shard_id: str
    number: int
    is_last: bool
    pieces: tuple[RecognisedPiece, ...]
    seconds: StageSeconds
    work: EngineWork
    engine: str
    device: str
    worker: str
    decode_peak_bytes: int
    recognise_peak_bytes: int
    batch_limit: int
    batch_halvings: int
    started_at: float
    finished_at: float = field(default_factory=time.time)

    @property
    def is_whole_shard(self) -> bool:
        """Whether the shard has no other part."""
        return self.number == 0 and self.is_last


@dataclass(frozen=True, slots=True)
class RecognisedShard:
    """A shard's finished rows, and what they cost."""

    shard_id: str
    rows: list[rows.Row]
    windows: int
    seconds: StageSeconds
    device: str
    worker: str
    decode_peak_bytes: int
    recognise_peak_bytes: int
    started_at: float
    work: EngineWork = field(default_factory=EngineWork)
    finished_at: float = field(default_factory=time.time)
    batch_limit: int | None = None
    batch_halvings: int = 0


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What the driver learns of a published shard: counts and times, no text."""

    shard_id: str
    recordings: int
    ok: int
    empty: int
    failed: int
    audio_seconds: float
    channel_seconds: float
    speech_seconds: float
    windows: int
    work: EngineWork
    seconds: StageSeconds
    device: str
    node: str
    worker: str
    decode_peak_bytes: int
    recognise_peak_bytes: int
    started_at: float
    finished_at: float
    failures: dict[str, int]
    duplicates: int = 0
    duplicate_seconds: float = 0.0
    batch_limit: int | None = None
    batch_halvings: int = 0
    engine: str = ""


def run_shards(shards: Sequence[Shard], job: Job, engine: Engine) -> Iterator[ShardSummary]:
    """Transcribe and publish shard after shard in this process."""
    for shard in shards:
        parts = [recognise_part(part, engine, job) for part in decode_shard(shard, job)]
        yield publish_shard(join_parts(parts, job), job.config.out)


# ---- decode ---------------------------------------------------------------------------


def decode_shard(shard: Shard, job: Job) -> Iterator[DecodedPart]:
    """Fetch, decode and find the speech of every recording of a shard.

    A recording that cannot be decoded is carried on with its problem; nothing is dropped.

    Yields:
        One part, or several if there is more than `job.part_samples` of speech. No more is held
        than the part that is growing, and what decoding one recording needs.

    Raises:
        Transient: the storage stayed unreachable through all retries.
        Fatal: there is no room for a large object on this machine, or no process to decode in.
    """
    with retries.patient():
        part = _GrowingPart(shard.shard_id)
        waiting_since = time.perf_counter()
        for index, (recording, fetched) in enumerate(fetch(shard.recordings)):
            part.seconds.read += time.perf_counter() - waiting_since
            voters: tuple[EngineInput, ...] = ()
            for piece in _pieces(index, recording, fetched, job):
                if part.n_samples and part.n_samples + piece.n_samples > job.part_samples:
                    yield part.finished(is_last=False)
                    part = _GrowingPart(shard.shard_id, part.number + 1, voters)
                part.add(piece)
                if piece.is_first and piece.outcome is None and job.config.language is None:
                    voters = _voters(piece)
            waiting_since = time.perf_counter()
        yield part.finished(is_last=True)


class _GrowingPart:
    """A part that is being filled."""

    def __init__(
        self, shard_id: str, number: int = 0, voters: tuple[EngineInput, ...] = ()
    ) -> None:
        self.number = number
        self.n_samples = 0
        self.seconds = StageSeconds()
        self._shard_id = shard_id
        self._voters = voters
        self._pieces: list[DecodedPiece] = []
        self._started_at = time.time()
        self._cpu_before = time.process_time()

    def add(self, piece: DecodedPiece) -> None:
        """Put one more piece in."""
        self.n_samples += piece.n_samples
        self.seconds.decode += piece.spent.decode
        self.seconds.resample += piece.spent.resample
        self.seconds.speech_detection += piece.spent.speech_detection
        self.seconds.decode_cpu += piece.spent.cpu
        self._pieces.append(piece)

    def finished(self, is_last: bool) -> DecodedPart:
        """All that was put in, which is then let go of."""
        pieces, self._pieces = tuple(self._pieces), []
        self.seconds.decode_cpu += time.process_time() - self._cpu_before
        return DecodedPart(
            shard_id=self._shard_id,
            number=self.number,
            is_last=is_last,
            pieces=pieces,
            voters=self._voters,
            seconds=self.seconds,
            peak_bytes=max(peak_bytes(), isolation.peak_bytes()),
            started_at=self._started_at,
        )


def _voters(first: DecodedPiece) -> tuple[EngineInput, ...]:
    """The windows of a recording's first piece that an engine would ask for its language."""
    longest: dict[int, list[npt.NDArray[np.int16]]] = {}
    for window, samples in zip(first.windows, first.samples, strict=True):
        longest.setdefault(window.channel, []).append(samples)
    return tuple(
        EngineInput(samples, first.index, channel, votes=True, is_wanted=False)
        for channel, of_channel in longest.items()
        for samples in sorted(of_channel, key=lambda s: -len(s))[:VOTERS_PER_CHANNEL]
    )


def _pieces(
    index: int, recording: Recording, fetched: Fetched | BadAudio, job: Job
) -> Iterator[DecodedPiece]:
    """One recording's windows. Whatever goes wrong in it stays its own matter: a failed row."""
    is_first = True
    lap = time.perf_counter()
    try:
        if isinstance(fetched, BadAudio):
            raise fetched
        recording = replace(recording, content_md5=fetched.md5)  # of what was read
        for piece in _heard(recording, fetched, job):
            outcome = _outcome(recording, piece.whole) if piece.whole is not None else None
            yield DecodedPiece(index, piece.windows, piece.samples, is_first, outcome, piece.spent)
            is_first = False
            lap = time.perf_counter()
        return
    except BadAudio as error:
        problem = error
    except Fatal:  # no process to decode in: no recording's fault
        raise
    except Exception as error:  # a defect here must not cost the shard-mates their rows
        _LOG.exception("%s: unexpected error while decoding", recording.uri)
        problem = BadAudio("internal_error", f"unexpected {type(error).__name__} while decoding")
    spent = Spent(decode=time.perf_counter() - lap)
    yield DecodedPiece(index, (), (), is_first, Outcome(recording, problem=problem), spent)


def _heard(recording: Recording, fetched: Fetched, job: Job) -> Iterator[Piece]:
    """`listen`, in a child process."""
    config = job.config
    limits = decoding_limits(max(recording.size_bytes, fetched.size_bytes))
    piece_samples = min(PIECE_SAMPLES, job.part_samples)
    told = config.headerless_format
    arguments = (fetched.content, recording.uri, config.channels, told, piece_samples)
    return isolation.results(listen, arguments, limits, load)


def decoding_limits(n_bytes: int) -> isolation.Limits:
    """What the process that decodes a recording of that size may take.

    It gives a sign of life with each block, of two minutes of sound at most, which takes a second
    on an idle core. Before the first one, much of a large file may be read, to find its index.
    """
    return isolation.Limits(60.0 + n_bytes / 10e6, _DECODE_MEMORY_BYTES)


def _outcome(recording: Recording, whole: Whole) -> Outcome:
    facts = rows.AudioFacts(
        whole.container, whole.codec, whole.sample_rate, whole.channels, whole.duration_s
    )
    return Outcome(recording, facts, whole.coverage, whole.problem)


# ---- recognise ------------------------------------------------------------------------


def recognise_part(decoded: DecodedPart, engine: Engine, job: Job) -> RecognisedPart:
    """Recognise the windows of all recordings of a part together."""
    seconds = decoded.seconds
    seconds.decode_queue = max(0.0, time.time() - decoded.finished_at)
    started, cpu_before = time.perf_counter(), time.process_time()
    work_before = replace(engine.work)
    inputs = [
        EngineInput(samples, piece.index, window.channel, votes=piece.is_first)
        for piece in decoded.pieces
        for window, samples in zip(piece.windows, piece.samples, strict=True)
    ]
    halvings = engine.fitting.halvings
    hypotheses = recognise_checked(engine, [*inputs, *decoded.voters]) if inputs else []
    seconds.recognise = time.perf_counter() - started
    seconds.recognise_cpu = time.process_time() - cpu_before
    work = engine.work.since(work_before)
    seconds.features, seconds.encoder, seconds.decoder = (
        work.features_s,
        work.encoder_s,
        work.decoder_s,
    )
    return RecognisedPart(
        shard_id=decoded.shard_id,
        number=decoded.number,
        is_last=decoded.is_last,
        pieces=tuple(_recognised_pieces(decoded, hypotheses)),
        seconds=seconds,
        work=work,
        engine=engine.name,
        device=engine.device,
        worker=_worker(),
        decode_peak_bytes=decoded.peak_bytes,
        recognise_peak_bytes=peak_bytes(),
        batch_limit=engine.fitting.budget,
        batch_halvings=engine.fitting.halvings - halvings,
        started_at=decoded.started_at,
    )


def _recognised_pieces(
    decoded: DecodedPart, hypotheses: Sequence[Hypothesis]
) -> Iterator[RecognisedPiece]:
    total = sum(piece.n_samples for piece in decoded.pieces)
    first = 0
    for piece in decoded.pieces:
        own = hypotheses[first : first + len(piece.windows)]
        first += len(piece.windows)
        share = piece.n_samples / total if total else 0.0
        yield RecognisedPiece(
            piece.index,
            piece.windows,
            tuple(own),
            piece.outcome,
            piece.spent.decode + piece.spent.resample + piece.spent.speech_detection,
            share * decoded.seconds.recognise,
        )


# ---- join -----------------------------------------------------------------------------


def join_parts(parts: Sequence[RecognisedPart], job: Job) -> RecognisedShard:
    """The rows of a shard from all of its parts, in order: one for each recording."""
    started = time.perf_counter()
    first = parts[0]
    provenance = rows.provenance_columns(_provenance(first, job))
    pieces: dict[int, list[RecognisedPiece]] = {}
    for part in parts:
        for piece in part.pieces:
            pieces.setdefault(piece.index, []).append(piece)
    made = [{**_row(pieces[index], job.config), **provenance} for index in sorted(pieces)]
    work, seconds = EngineWork(), StageSeconds()
    for part in parts:
        work.add(part.work)
    for stage in fields(StageSeconds):
        setattr(seconds, stage.name, sum(getattr(part.seconds, stage.name) for part in parts))
    seconds.assemble = time.perf_counter() - started
    return RecognisedShard(
        shard_id=first.shard_id,
        rows=made,
        windows=sum(len(piece.windows) for part in parts for piece in part.pieces),
        seconds=seconds,
        device=first.device,
        worker=first.worker,
        decode_peak_bytes=max(part.decode_peak_bytes for part in parts),
        recognise_peak_bytes=max(part.recognise_peak_bytes for part in parts),
        started_at=first.started_at,
        work=work,
        finished_at=parts[-1].finished_at,
        batch_limit=min(part.batch_limit for part in parts),
        batch_halvings=sum(part.batch_halvings for part in parts),
    )


def _row(pieces: Sequence[RecognisedPiece], config: RunConfig) -> rows.Row:
    """The row of a recording from all of its pieces; the last one has its outcome."""
    outcome = pieces[-1].outcome
    assert outcome is not None
    return {
        **_content(outcome, pieces, config),
        "decode_seconds": sum(piece.decode_seconds for piece in pieces),
        "recognise_seconds": sum(piece.recognise_seconds for piece in pieces),
    }


def _content(outcome: Outcome, pieces: Sequence[RecognisedPiece], config: RunConfig) -> rows.Row:
    if outcome.facts is None:
        problem = outcome.problem or BadAudio("corrupt", "nothing could be decoded")
        return rows.failed_row(outcome.recording, None, problem)
    heard = [pair for piece in pieces for pair in zip(piece.windows, piece.hypotheses, strict=True)]
    heard.sort(key=lambda pair: (pair[0].channel, pair[0].start))
    # Two voices in one channel, or the same in both: nobody knows whose turn it is.
    n_own = sum(not channel.skipped for channel in outcome.coverage)
    is_apart = config.channels != "mix" and (n_own > 1 or len(config.speakers) == 1)
    speakers = config.speakers if is_apart else ()
    return rows.spoken_row(
        outcome.recording,
        outcome.facts,
        assemble([window for window, _ in heard], [hypothesis for _, hypothesis in heard]),
        outcome.coverage,
        outcome.problem,
        speakers,
    )


def _provenance(part: RecognisedPart, job: Job) -> rows.Provenance:
    return rows.Provenance(
        model=job.config.model,
        model_revision=job.model_revision,
        engine=part.engine,
        config_fingerprint=job.config_fingerprint,
        run_id=job.run_id,
        shard_id=part.shard_id,
        worker=part.worker,
        node=part.worker.rpartition(":")[0],
        device=part.device,
        transcribed_at=datetime.now(UTC),
    )


def _worker() -> str:
    return f"{platform.node()}:{os.getpid()}"


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def given_up_shard(recording: Recording, problem: BadAudio, job: Job) -> RecognisedShard:
    """What stands for a recording that no worker survives: its failed row, made elsewhere."""
    provenance = rows.Provenance(
        model=job.config.model,
        model_revision=job.model_revision,
        engine=job.engine,
        config_fingerprint=job.config_fingerprint,
        run_id=job.run_id,
        shard_id=shard_id([recording]),
        worker=_worker(),
        node=platform.node(),
        device=job.device,
        transcribed_at=datetime.now(UTC),
    )
    row = {**rows.failed_row(recording, None, problem), **rows.provenance_columns(provenance)}
    return RecognisedShard(
        shard_id=shard_id([recording]),
        rows=[{**row, "decode_seconds": 0.0, "recognise_seconds": 0.0}],
        windows=0,
        seconds=StageSeconds(),
        device=job.device,
        worker=_worker(),
        decode_peak_bytes=0,
        recognise_peak_bytes=0,
        started_at=time.time(),
    )


# ---- publish --------------------------------------------------------------------------


@retries.patient()
def publish_shard(recognised: RecognisedShard, out: str) -> ShardSummary:
    """Write a shard's file and sum it up for the driver."""
    seconds = recognised.seconds
    seconds.publish_queue = max(0.0, time.time() - recognised.finished_at)
    started = time.perf_counter()
    write_shard(out, recognised.shard_id, recognised.rows)
    seconds.publish = time.perf_counter() - started
    return _summary(recognised)


def _summary(recognised: RecognisedShard) -> ShardSummary:
    made = recognised.rows
    statuses = [row["status"] for row in made]
    own = [row for row in made if row.get("duplicate_of") is None]
    duplicates = [row for row in made if row.get("duplicate_of") is not None]
    failures: dict[str, int] = {}
    for row in made:
        if row["status"] == "failed":
            failures[row["error_kind"]] = failures.get(row["error_kind"], 0) + 1
    return ShardSummary(
        shard_id=recognised.shard_id,
        recordings=len(made),
        ok=statuses.count("ok"),
        empty=statuses.count("empty"),
        failed=statuses.count("failed"),
        audio_seconds=sum(row.get("duration") or 0.0 for row in own),
        channel_seconds=sum((r.get("duration") or 0.0) * (r.get("channels") or 0) for r in own),
        speech_seconds=sum(row.get("speech_duration") or 0.0 for row in own),
        windows=recognised.windows,
        work=recognised.work,
        seconds=recognised.seconds,
        device=recognised.device,
        node=recognised.worker.rpartition(":")[0],
        worker=recognised.worker,
        decode_peak_bytes=recognised.decode_peak_bytes,
        recognise_peak_bytes=recognised.recognise_peak_bytes,
        started_at=recognised.started_at,
        finished_at=time.time(),
        failures=failures,
        duplicates=len(duplicates),
        duplicate_seconds=sum(row.get("duration") or 0.0 for row in duplicates),
        batch_limit=recognised.batch_limit,
        batch_halvings=recognised.batch_halvings,
        engine=next((row["engine"] for row in made), ""),
    )
