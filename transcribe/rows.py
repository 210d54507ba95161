"""One recording's results -> one row of the transcripts.

Owns how the columns of `schema.TRANSCRIPT` are filled. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from transcribe.archive import Recording
from transcribe.assemble import Assembled, Coverage, Segment
from transcribe.errors import BadAudio
from transcribe.printable import redacted, without_secrets

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AudioFacts:
    """What decoding found out about a recording."""

    container: str
    codec: str
    sample_rate: int
    channels: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who made a row, with what."""

    model: str
    model_revision: str
    engine: str
    config_fingerprint: str
    run_id: str
    shard_id: str
    worker: str
    node: str
    device: str
    transcribed_at: datetime


def spoken_row(
    recording: Recording,
    facts: AudioFacts,
    assembled: Assembled,
    coverage: Sequence[Coverage],
    problem: BadAudio | None,
    speakers: Sequence[str],
) -> Row:
    """Row of a recording that was decoded: `ok`, or `empty` when it holds no speech."""
    return {
        **_identity(recording),
        **_audio(facts),
        "speech_duration": sum(c.speech for c in coverage),
        "status": "ok" if assembled.text else "empty",
        "error_kind": problem.kind if problem else None,
        "error_message": redacted(problem.message) if problem else None,
        "language": assembled.language,
        "language_probability": assembled.language_probability,
        "text": assembled.text,
        "segments": [_segment(i, s, speakers) for i, s in enumerate(assembled.segments)],
        "coverage": [asdict(c) for c in coverage],
    }


def failed_row(recording: Recording, facts: AudioFacts | None, problem: BadAudio) -> Row:
    """Row of a recording that could not be transcribed."""
    return {
        **_identity(recording),
        **(_audio(facts) if facts else {}),
        "status": "failed",
        "error_kind": problem.kind,
        "error_message": redacted(problem.message),
        "text": "",
        "segments": [],
        "coverage": [],
    }


def shared_row(recording: Recording, original: Row) -> Row:
    """Row of a duplicate: the original's result, which cost nothing again, its own identity."""
    return {
        **original,
        **_identity(recording),
        "duplicate_of": original["recording_id"],
        "decode_seconds": 0.0,
        "recognise_seconds": 0.0,
    }


def provenance_columns(provenance: Provenance) -> Row:
    """The columns that every row of a shard shares."""
    return asdict(provenance)


def _identity(recording: Recording) -> Row:
    return {
        "recording_id": recording.recording_id,
        "uri": without_secrets(recording.uri),
        "generation": recording.generation,
        "size_bytes": recording.size_bytes,
        "content_md5": recording.content_md5,
        "metadata": recording.metadata,
    }


def _audio(facts: AudioFacts) -> Row:
    return {
        "container": facts.container,
        "codec": facts.codec,
        "sample_rate": facts.sample_rate,
        "channels": facts.channels,
        "duration": facts.duration_s,
    }


def _segment(index: int, segment: Segment, speakers: Sequence[str]) -> Row:
    named = segment.channel < len(speakers)
    return {
        "id": index,
        **asdict(segment),
        "flags": list(segment.flags),
        "speaker": speakers[segment.channel] if named else None,
    }
