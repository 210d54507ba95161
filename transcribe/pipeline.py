"""The way of the data, in plain Python: the reference for the Ray run.

    list the archive -> subtract what is done -> cut the rest into shards
    -> decode each shard -> find the speech -> pack windows -> recognise them
    -> assemble per recording -> publish one Parquet file per shard

Owns the order of the steps and their timing. Knows nothing of Ray: `distributed.py` calls
the same `decode_shard`, `recognise_shard` and `publish_shard` in tasks and actors.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from transcribe import decode, isolation, retries, rows, storage
from transcribe.archive import Recording
from transcribe.assemble import Coverage, assemble, coverage, coverage_breach
from transcribe.config import ChannelMode, RunConfig
from transcribe.engines.base import (
    Engine,
    EngineInput,
    EngineWork,
    Hypothesis,
    recognise_checked,
)
from transcribe.errors import BadAudio, Fatal
from transcribe.publish import publish_shard as write_shard
from transcribe.shards import Shard, shard_id
from transcribe.speech import SpeechDetector, Window, distinct_channels, pack_windows

_LOG = logging.getLogger(__name__)

_READ_AHEAD = 4  # objects fetched while one is decoded: hides a bucket's latency
_DECODE_MEMORY_BYTES = 8 << 30  # a process that decodes; ten hours in one channel need 5 GiB


@dataclass(frozen=True, slots=True)
class Job:
    """The recipe of a run, small enough to send to every worker."""

    config: RunConfig
    run_id: str
    model_revision: str
    engine: str
    config_fingerprint: str
    device: str


@dataclass(frozen=True, slots=True)
class DecodedRecording:
    """A recording after decoding: its windows with their samples, or why there are none."""

    recording: Recording
    facts: rows.AudioFacts | None = None
    windows: tuple[Window, ...] = ()
    samples: tuple[npt.NDArray[np.int16], ...] = ()
    coverage: tuple[Coverage, ...] = ()
    problem: BadAudio | None = None
    decode_seconds: float = 0.0


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
class DecodedShard:
    """A shard ready for an engine."""

    shard_id: str
    recordings: tuple[DecodedRecording, ...]
    seconds: StageSeconds
    peak_bytes: int
    started_at: float
    finished_at: float = field(default_factory=time.time)

    @property
    def window_seconds(self) -> float:
        """Seconds that an engine has to hear."""
        return sum(len(s) for r in self.recordings for s in r.samples) / decode.SAMPLE_RATE


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


def run_shards(shards: Sequence[Shard], job: Job, engine: Engine) -> Iterator[ShardSummary]:
    """Transcribe and publish shard after shard in this process."""
    for shard in shards:
        decoded = decode_shard(shard, job.config)
        recognised = recognise_shard(decoded, engine, job)
        yield publish_shard(recognised, job.config.out)


# ---- decode ---------------------------------------------------------------------------


@retries.patient()
def decode_shard(shard: Shard, config: RunConfig) -> DecodedShard:
    """Fetch, decode and find the speech of every recording of a shard.

    A recording that cannot be decoded is carried on with its `problem`; nothing is dropped.

    Raises:
        Transient: the storage stayed unreachable through all retries.
        Fatal: no process can be started to decode in.
    """
    seconds = StageSeconds()
    started_at, cpu_before = time.time(), time.process_time()
    decoded = []
    for recording, fetched in _read_ahead(shard.recordings):
        started = time.perf_counter()
        data = _wait(fetched)
        seconds.read += time.perf_counter() - started
        decoded.append(_decode_recording(recording, data, config, seconds))
    seconds.decode_cpu += time.process_time() - cpu_before
    peak = max(peak_bytes(), isolation.peak_bytes())
    return DecodedShard(shard.shard_id, tuple(decoded), seconds, peak, started_at)


def _read_ahead(
    recordings: Sequence[Recording],
) -> Iterator[tuple[Recording, Future[bytes]]]:
    """Each recording with its bytes on the way, `_READ_AHEAD` of them at a time."""
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        waiting: deque[tuple[Recording, Future[bytes]]] = deque()
        for recording in recordings:
            reading = pool.submit(storage.read, recording.uri, recording.size_bytes)
            waiting.append((recording, reading))
            if len(waiting) > _READ_AHEAD:
                yield waiting.popleft()
        yield from waiting


def _wait(fetched: Future[bytes]) -> bytes | BadAudio:
    try:
        return fetched.result()
    except BadAudio as problem:
        return problem


def _decode_recording(
    recording: Recording, data: bytes | BadAudio, config: RunConfig, seconds: StageSeconds
) -> DecodedRecording:
    """One recording's windows. Whatever goes wrong in it stays its own matter: a failed row."""
    started = time.perf_counter()
    if isinstance(data, bytes):  # what was read, even if the object changed since it was listed
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        recording = replace(recording, content_md5=md5)
    apart = Apart()
    try:
        if isinstance(data, BadAudio):
            raise data
        limits = decoding_limits(len(data), recording.duration_s)
        ((decoded, apart),) = isolation.collect(heard, (recording, data, config), limits)
    except BadAudio as problem:
        decoded = DecodedRecording(recording, problem=problem)
    except Fatal:  # no process to decode in: no recording's fault
        raise
    except Exception as error:  # a defect here must not cost the shard-mates their rows
        _LOG.exception("%s: unexpected error while decoding", recording.uri)
        defect = BadAudio("internal_error", f"unexpected {type(error).__name__} while decoding")
        decoded = DecodedRecording(recording, problem=defect)
    spent = time.perf_counter() - started
    seconds.resample += apart.resample_s
    seconds.speech_detection += apart.detection_s
    seconds.decode += spent - apart.resample_s - apart.detection_s
    seconds.decode_cpu += apart.cpu_s
    return replace(decoded, decode_seconds=spent)


def decoding_limits(n_bytes: int, duration_s: float) -> isolation.Limits:
    """What decoding a recording of that size and estimated duration may take.

    Decoding and speech detection run at several hundred times real time on an idle core: a
    deadline of a twentieth of the sound, and a minute, leaves room for a very busy machine.
    """
    return isolation.Limits(60.0 + n_bytes / 1e6 + duration_s / 20, _DECODE_MEMORY_BYTES)


@dataclass(frozen=True, slots=True)
class Apart:
    """Of a recording's decoding: wall seconds of two of its parts, CPU seconds of the child."""

    resample_s: float = 0.0
    detection_s: float = 0.0
    cpu_s: float = 0.0


def heard(
    recording: Recording, data: bytes, config: RunConfig
) -> Iterator[tuple[DecodedRecording, Apart]]:
    """The recording's windows, and what its time went to; runs in a child process.

    Raises:
        BadAudio: it cannot be decoded.
    """
    cpu_before = time.process_time()
    audio = decode.decode(data, recording.uri, config.headerless_format)
    started = time.perf_counter()
    windows, samples, covered = _find_speech(audio.samples, config.channels)
    detecting = time.perf_counter() - started
    facts = rows.AudioFacts(
        audio.container, audio.codec, audio.sample_rate, len(audio.samples), audio.duration_s
    )
    decoded = DecodedRecording(recording, facts, windows, samples, covered, audio.problem)
    yield decoded, Apart(audio.resample_seconds, detecting, time.process_time() - cpu_before)


@functools.cache
def _detector() -> SpeechDetector:
    """One speech detector a process."""
    return SpeechDetector()


def _find_speech(
    samples: npt.NDArray[np.int16], mode: ChannelMode
) -> tuple[tuple[Window, ...], tuple[npt.NDArray[np.int16], ...], tuple[Coverage, ...]]:
    """Windows of all channels (`samples`: `[n_channels, n_samples]`), cut, and coverage.

    Raises:
        BadAudio: the windows would lose or double speech: a defect, and better no row of
            text than one with a hole.
    """
    heard = select_channels(samples, mode)
    windows: list[Window] = []
    cuts: list[npt.NDArray[np.int16]] = []
    covered = {}
    for channel, channel_samples in heard.items():
        spans = _detector().spans(channel_samples)
        packed = pack_windows(spans, channel)
        if breach := coverage_breach(len(channel_samples), spans, packed):
            raise BadAudio("coverage", f"channel {channel}: {breach}")
        windows.extend(packed)
        cuts.extend(channel_samples[w.start : w.end].copy() for w in packed)
        covered[channel] = coverage(channel, len(channel_samples), spans)
    if mode != "mix":  # what needs no recognition is accounted for: silent, or a repetition
        for channel in set(range(len(samples))) - set(covered):
            covered[channel] = _unheard(channel, samples[channel])
    return tuple(windows), tuple(cuts), tuple(covered[c] for c in sorted(covered))


def _unheard(channel: int, samples: npt.NDArray[np.int16]) -> Coverage:
    duration = len(samples) / decode.SAMPLE_RATE
    if samples.any():
        return Coverage(channel, speech=0.0, silence=0.0, skipped=duration)
    return Coverage(channel, speech=0.0, silence=duration, skipped=0.0)


def select_channels(
    samples: npt.NDArray[np.int16], mode: ChannelMode
) -> dict[int, npt.NDArray[np.int16]]:
    """The channels to recognise by `--channels`: number -> samples, shape `[n_samples]`.

    A mix is channel 0, whatever it is mixed from.
    """
    if mode == "mix" and len(samples) > 1:
        mixed: npt.NDArray[np.float32] = np.rint(samples.mean(axis=0, dtype=np.float32))
        return {0: mixed.astype(np.int16)}
    if mode == "auto" and len(samples) > 1:
        return {channel: samples[channel] for channel in distinct_channels(samples)}
    return dict(enumerate(samples))


# ---- recognise ------------------------------------------------------------------------


def recognise_shard(decoded: DecodedShard, engine: Engine, job: Job) -> RecognisedShard:
    """Recognise the windows of all recordings of a shard together; build their rows."""
    seconds = decoded.seconds
    seconds.decode_queue = max(0.0, time.time() - decoded.finished_at)
    started, cpu_before = time.perf_counter(), time.process_time()
    work_before = replace(engine.work)
    inputs = [
        EngineInput(samples, group, window.channel)
        for group, recording in enumerate(decoded.recordings)
        for window, samples in zip(recording.windows, recording.samples, strict=True)
    ]
    halvings = engine.fitting.halvings
    hypotheses = recognise_checked(engine, inputs) if inputs else []
    between = time.perf_counter()
    seconds.recognise = between - started
    work = engine.work.since(work_before)
    seconds.features, seconds.encoder, seconds.decoder = (
        work.features_s,
        work.encoder_s,
        work.decoder_s,
    )
    made = _shard_rows(decoded, hypotheses, job, engine)
    seconds.assemble = time.perf_counter() - between
    seconds.recognise_cpu = time.process_time() - cpu_before
    return RecognisedShard(
        shard_id=decoded.shard_id,
        rows=made,
        windows=len(inputs),
        batch_limit=engine.fitting.budget,
        batch_halvings=engine.fitting.halvings - halvings,
        work=work,
        seconds=seconds,
        device=engine.device,
        worker=_worker(),
        decode_peak_bytes=decoded.peak_bytes,
        recognise_peak_bytes=peak_bytes(),
        started_at=decoded.started_at,
    )


def _shard_rows(
    decoded: DecodedShard, hypotheses: Sequence[Hypothesis], job: Job, engine: Engine
) -> list[rows.Row]:
    provenance = rows.provenance_columns(_provenance(decoded, job, engine))
    total = sum(len(s) for r in decoded.recordings for s in r.samples)
    made = []
    first = 0
    for recording in decoded.recordings:
        own = hypotheses[first : first + len(recording.windows)]
        first += len(recording.windows)
        share = sum(len(s) for s in recording.samples) / total if total else 0.0
        made.append(
            {
                **_row(recording, own, job.config),
                **provenance,
                "decode_seconds": recording.decode_seconds,
                "recognise_seconds": share * decoded.seconds.recognise,
            }
        )
    return made


def _row(
    decoded: DecodedRecording, hypotheses: Sequence[Hypothesis], config: RunConfig
) -> rows.Row:
    if decoded.facts is None:
        problem = decoded.problem or BadAudio("corrupt", "nothing could be decoded")
        return rows.failed_row(decoded.recording, None, problem)
    speakers = config.speakers if config.channels != "mix" else ()
    return rows.spoken_row(
        decoded.recording,
        decoded.facts,
        assemble(decoded.windows, hypotheses),
        decoded.coverage,
        decoded.problem,
        speakers,
    )


def _provenance(decoded: DecodedShard, job: Job, engine: Engine) -> rows.Provenance:
    return rows.Provenance(
        model=job.config.model,
        model_revision=job.model_revision,
        engine=engine.name,
        config_fingerprint=job.config_fingerprint,
        run_id=job.run_id,
        shard_id=decoded.shard_id,
        worker=_worker(),
        node=platform.node(),
        device=engine.device,
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
        node=platform.node(),
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
    )
