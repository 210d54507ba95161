"""What the workers of a simulated run are made of: recordings that nobody has, heard by nobody.

`install` runs in every worker process (Ray's `worker_process_setup_hook`). Windows are as many as
the speech of calls makes; their samples are left out, so that what is measured is the driver, Ray
and publishing, not the memory of the one machine that plays a whole cluster.
"""

from __future__ import annotations

import os
import time

import numpy as np

from transcribe import pipeline, rows
from transcribe.assemble import Coverage
from transcribe.listen import Spent
from transcribe.speech import Window

SPEECH_SHARE = 0.4
"""Of a channel of a call that is speech."""

WINDOW_S = 12.0
RATE = 16_000

SERVICE_RTFX = float(os.environ.get("SCALE_RTFX", "inf"))
"""Seconds of audio that an engine hears a second."""

real_recognise_part = pipeline.recognise_part


def decode_shard(shard, job):
    """One part: every recording with its windows, an empty array for each."""
    pieces = (piece(index, recording) for index, recording in enumerate(shard.recordings))
    now = time.time()
    yield pipeline.DecodedPart(
        shard_id=shard.shard_id,
        number=0,
        is_last=True,
        pieces=tuple(pieces),
        voters=(),
        seconds=pipeline.StageSeconds(),
        peak_bytes=pipeline.peak_bytes(),
        started_at=now,
    )


def piece(index, recording):
    step = int(WINDOW_S / SPEECH_SHARE * RATE)
    end = int(recording.duration_s * RATE)
    windows = tuple(
        Window(channel, start, min(start + int(WINDOW_S * RATE), end))
        for channel in range(2)
        for start in range(0, end, step)
    )
    facts = rows.AudioFacts("wav", "pcm_mulaw", 8_000, 2, recording.duration_s)
    coverage = tuple(coverage_of(channel, windows, recording.duration_s) for channel in range(2))
    return pipeline.DecodedPiece(
        index=index,
        windows=windows,
        samples=tuple(np.zeros(1, np.int16) for _ in windows),
        is_first=True,
        outcome=pipeline.Outcome(recording, facts, coverage),
        spent=Spent(),
    )


def coverage_of(channel, windows, seconds):
    speech = sum(w.n_samples for w in windows if w.channel == channel) / RATE
    return Coverage(channel, speech, seconds - speech, 0.0)


def recognise_part(decoded, engine, job):
    time.sleep(sum(p.outcome.facts.duration_s for p in decoded.pieces) / SERVICE_RTFX)
    return real_recognise_part(decoded, engine, job)


def install():
    pipeline.decode_shard = decode_shard
    pipeline.recognise_part = recognise_part
