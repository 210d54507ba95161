"""Nothing is skipped: the real corpus is accounted for to the second, all speech is heard once."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from transcribe import pipeline
from transcribe.archive import Recording, list_archive
from transcribe.assemble import Coverage
from transcribe.config import RunConfig
from transcribe.engines.fake import FakeEngine
from transcribe.shards import Shard
from transcribe.speech import Span, SpeechDetector, Window

CORPUS = Path(__file__).resolve().parents[2] / "../shared/corpus"
pytestmark = pytest.mark.skipif(
    not (CORPUS / "manifest.jsonl").is_file(),
    reason="the speech corpus is not beside the repository",
)
KINDS = ["long-form", "conversational", "telephone", "multilingual", "music", "noise", "silence"]


@pytest.fixture
def detected(monkeypatch) -> list[list[Span]]:
    """The speech found in each channel, in the order in which channels are searched."""
    found: list[list[Span]] = []
    detect = SpeechDetector.spans

    def noted(self, samples):
        found.append(detect(self, samples))
        return found[-1]

    monkeypatch.setattr(SpeechDetector, "spans", noted)
    return found


def recordings_of(kind: str) -> list[Recording]:
    lines = (CORPUS / "manifest.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    # What a headerless file holds would have to be told for each.
    wanted = {e["path"] for e in entries if e["kind"] == kind and "raw" not in e}
    root = CORPUS.resolve()
    return [r for r in list_archive(str(root)) if str(Path(r.uri).relative_to(root)) in wanted]


def once_each(n_samples: int, spans: list[Span], windows: list[Window]) -> bool:
    """Whether each sample of speech lies in one window, and no sample in two."""
    heard = np.zeros(n_samples, dtype=np.int8)
    for window in windows:
        heard[window.start : window.end] += 1
    return heard.max(initial=0) <= 1 and all((heard[s.start : s.end] == 1).all() for s in spans)


@pytest.mark.parametrize("kind", KINDS)
def test_all_speech_is_in_one_window_and_every_window_has_one_hypothesis(
    kind, detected, tmp_path
) -> None:
    config = RunConfig(archive=str(CORPUS), out=str(tmp_path), model="fake")
    job = pipeline.Job(config, "run", "fake", "fake", "0" * 16, "cpu")
    recordings = recordings_of(kind)
    assert recordings
    for recording in recordings:
        detected.clear()
        shard = pipeline.decode_shard(Shard("corpus", (recording,)), config)
        (decoded,) = shard.recordings
        assert decoded.facts is not None, recording.uri
        for covered in decoded.coverage:
            total = covered.speech + covered.silence + covered.skipped
            assert total == pytest.approx(decoded.facts.duration_s, abs=0.020), recording.uri
        assert len(decoded.coverage) == decoded.facts.channels

        n_samples = round(decoded.facts.duration_s * 16_000)
        by_channel: dict[int, list[Window]] = {}
        for window in decoded.windows:
            by_channel.setdefault(window.channel, []).append(window)
        speaking = [spans for spans in detected if spans]
        assert len(by_channel) == len(speaking), recording.uri
        for spans, windows in zip(speaking, by_channel.values(), strict=True):
            assert once_each(n_samples, spans, windows), recording.uri
            assert all(a.end <= b.start for a, b in pairwise(windows))
            assert seconds(spans) == pytest.approx(speech_of(decoded.coverage, windows))

        (row,) = pipeline.recognise_shard(shard, FakeEngine(), job).rows
        heard = sorted((s["channel"], s["start"], s["end"]) for s in row["segments"])
        given = sorted((w.channel, w.start / 16_000, w.end / 16_000) for w in decoded.windows)
        assert len(heard) == len(given), recording.uri
        assert np.allclose(heard, given, rtol=0, atol=0.001), recording.uri


def seconds(spans: list[Span]) -> float:
    return sum(span.n_samples for span in spans) / 16_000


def speech_of(coverage: tuple[Coverage, ...], windows: list[Window]) -> float:
    return coverage[windows[0].channel].speech
