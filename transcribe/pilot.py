"""A small job on this machine, to learn how fast it goes: a real run over a piece of the archive.

Owns which pieces are tried and what is read off the run. The rows are thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pyarrow.parquet as pq
from rich.console import Console

from transcribe import storage
from transcribe.archive import Recording
from transcribe.config import RunConfig
from transcribe.errors import BadAudio, Fatal
from transcribe.planning import Pace, makespan, ratio
from transcribe.survey import Survey, spread

_RECORDINGS = 40
_AUDIO_S = 480.0  # of all pieces together
_PIECE_S = 180.0  # of one recording, from its beginning
_SHARDS = 8
_LIMIT_S = 120.0  # of work: a slow model is judged by the shards that are through by then


def pilot(found: Survey, config: RunConfig) -> Pace:
    """Transcribe some pieces of the archive here, for about a minute, and see how long it takes.

    Args:
        found: the archive.
        config: settings of the run that is planned; its OUT is not touched.

    Raises:
        Fatal: the run cannot be done, or nothing of the pieces could be transcribed.
    """
    from transcribe import run

    bad = {seen.recording.recording_id for seen in found.seen if seen.problem}
    good = [r for r in found.recordings if r.recording_id not in bad]
    with tempfile.TemporaryDirectory(prefix="transcribe-pilot-") as folder:
        pieces, out = Path(folder) / "pieces", Path(folder) / "out"
        pieces.mkdir()
        audio_s = _fetch(_chosen(good), pieces)
        trial = replace(
            config,
            archive=str(pieces),
            out=str(out),
            shard_minutes=max(0.1, audio_s / _SHARDS / 60),
            max_hours=_LIMIT_S / 3600,
            max_spend=None,
            price_per_hour=None,
            machine_type=None,
        )
        result = run.transcribe(trial, None, Console(quiet=True))
        if not result["audio_seconds"]:
            raise Fatal("Nothing of the sample could be transcribed; plan with --no-pilot.")
        (metrics,) = out.glob("runs/*/metrics.parquet")
        shards = pq.read_table(metrics).to_pylist()
    return _pace(result, shards)


def _chosen(recordings: Sequence[Recording]) -> list[Recording]:
    """Recordings spread over the archive whose pieces come to about `_AUDIO_S`."""
    if not recordings:
        raise Fatal("Nothing in the archive can be decoded, as far as was looked at.")
    mean_s = sum(min(r.duration_s, _PIECE_S) for r in recordings) / len(recordings)
    return spread(recordings, max(1, min(_RECORDINGS, round(_AUDIO_S / mean_s))))


def _fetch(recordings: Sequence[Recording], folder: Path) -> float:
    """Write the beginning of each into `folder`; returns their seconds, as estimated."""
    seconds = 0.0
    for number, recording in enumerate(recordings):
        share = min(1.0, _PIECE_S / recording.duration_s)
        try:
            data = storage.read_range(recording.uri, 0, round(recording.size_bytes * share))
        except BadAudio:  # gone, or forbidden: the run will say so in its row
            continue
        suffix = PurePosixPath(recording.uri).suffix.lower()
        (folder / f"{number:04d}{suffix}").write_bytes(data)
        seconds += recording.duration_s * share
    return seconds


def _pace(result: dict[str, object], shards: list[dict[str, float]]) -> Pace:
    engine = [s["recognise_seconds"] for s in shards]
    audio = [s["audio_seconds"] for s in shards]
    speech = [s["speech_seconds"] for s in shards]
    before = ("read_seconds", "decode_seconds", "resample_seconds", "speech_detection_seconds")
    decoding = [sum(s.get(name, 0.0) for name in before) for s in shards]
    workers = int(str(result["workers"]))
    modelled = decoding[0] + makespan(engine, workers)
    return Pace(
        device=str(result["device"]),
        workers=workers,
        recordings=int(str(result["recordings"])),
        audio_s=sum(audio),
        engine_s=ratio(engine, audio),
        decode_s=sum(decoding) / sum(audio),
        speech_s=ratio(speech, audio),
        startup_s=float(str(result["startup_seconds"])),
        overhead_s=max(0.0, float(str(result["processing_seconds"])) - modelled),
    )
