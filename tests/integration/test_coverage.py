"""Nothing is skipped: the real corpus is accounted for to the second, all speech is heard once."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from transcribe import pipeline
from transcribe.archive import Recording, list_archive
from transcribe.config import RunConfig
from transcribe.decode import decode
from transcribe.engines.fake import FakeEngine
from transcribe.shards import Shard
from transcribe.speech import FrameJudge, Span, SpanFinder, Window
from transcribe.voice_activity import SpeechDetector

CORPUS = Path(__file__).resolve().parents[2] / "../shared/corpus"
pytestmark = pytest.mark.skipif(
    not (CORPUS / "manifest.jsonl").is_file(),
    reason="the speech corpus is not beside the repository",
)
KINDS = ["long-form", "conversational", "telephone", "multilingual", "music", "noise", "silence"]


@pytest.fixture(scope="module")
def detector() -> SpeechDetector:
    return SpeechDetector()


def recordings_of(kind: str) -> list[Recording]:
    lines = (CORPUS / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    # What a headerless file holds would have to be told for each.
    wanted = {e["path"] for e in entries if e["kind"] == kind and "raw" not in e}
    root = CORPUS.resolve()
    return [r for r in list_archive(str(root)) if str(Path(r.uri).relative_to(root)) in wanted]


def spans_of(detector: SpeechDetector, samples: np.ndarray) -> list[Span]:
    judge, finder = FrameJudge(detector), SpanFinder()
    spans = finder.push(judge.push(samples)) + finder.push(judge.finish())
    return spans + finder.finish(len(samples))


def once_each(n_samples: int, spans: list[Span], windows: list[Window]) -> bool:
    """Whether each sample of speech lies in one window, and no sample in two."""
    heard = np.zeros(n_samples, dtype=np.int8)
    for window in windows:
        heard[window.start : window.end] += 1
    return heard.max(initial=0) <= 1 and all((heard[s.start : s.end] == 1).all() for s in spans)


@pytest.mark.parametrize("kind", KINDS)
def test_all_speech_is_in_one_window_and_every_window_has_one_hypothesis(
    kind, detector, tmp_path
) -> None:
    config = RunConfig(archive=str(CORPUS), out=str(tmp_path), model="fake")
    job = pipeline.Job(config, "run", "fake", "fake", "0" * 16, "cpu")
    parts = list(pipeline.decode_shard(Shard("corpus", recordings_of(kind)), job))
    heard_parts = [pipeline.recognise_part(part, FakeEngine(), job) for part in parts]
    rows = pipeline.join_parts(heard_parts, job).rows
    assert rows
    pieces = [piece for part in parts for piece in part.pieces]
    for index, row in enumerate(rows):
        own = [piece for piece in pieces if piece.index == index]
        decoded = own[-1].outcome
        assert decoded is not None
        all_windows = sorted(
            (w for piece in own for w in piece.windows), key=lambda w: (w.channel, w.start)
        )
        uri = decoded.recording.uri
        assert decoded.facts is not None, uri
        assert len(decoded.coverage) == decoded.facts.channels, uri
        samples = decode(Path(uri).read_bytes(), uri).samples
        for covered in decoded.coverage:
            total = covered.speech + covered.silence + covered.skipped
            assert total == pytest.approx(samples.shape[1] / 16_000, abs=0.020), uri
            windows = [w for w in all_windows if w.channel == covered.channel]
            spans = [] if covered.skipped else spans_of(detector, samples[covered.channel])
            assert once_each(samples.shape[1], spans, windows), uri
            assert all(a.end <= b.start for a, b in pairwise(windows)), uri
            assert sum(s.n_samples for s in spans) / 16_000 == pytest.approx(covered.speech), uri

        heard = sorted((s["channel"], s["start"], s["end"]) for s in row["segments"])
        given = sorted((w.channel, w.start / 16_000, w.end / 16_000) for w in all_windows)
        assert len(heard) == len(given), uri
        assert not given or np.allclose(heard, given, rtol=0, atol=0.001), uri
