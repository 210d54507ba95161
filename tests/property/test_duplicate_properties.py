"""Any archive, in any two runs: one row each, each content recognised once."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from transcribe import duplicates, isolation, listen, pipeline, publish
from transcribe.archive import list_archive
from transcribe.config import RunConfig
from transcribe.engines.fake import FakeEngine
from transcribe.shards import plan_shards

N_CONTENTS = 4  # of these 0 is not audio, 1 empty, and all sounds are of one size


class CountingEngine(FakeEngine):
    """Remembers how often it heard each window."""

    def __init__(self):
        super().__init__()
        self.heard = Counter()

    def recognise(self, windows):
        self.heard.update(w.samples.tobytes() for w in windows)
        return super().recognise(windows)


class HearsEverything:
    """A judge to whom all is speech."""

    def __init__(self, detector):
        self.n_samples = 0

    def push(self, samples):
        self.n_samples += len(samples)
        return np.zeros(0, np.float32)

    def finish(self):
        return np.ones(-(-self.n_samples // 512), np.float32)


@pytest.fixture(autouse=True, scope="module")
def no_vad():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listen, "FrameJudge", HearsEverything)
        # In this process, where the judge is replaced.
        patch.setattr(isolation, "results", lambda function, args, limits, load: function(*args))
        yield


def write(path, content):
    if content < 2:
        path.write_bytes(b"no audio at all" * (1 - content))
    else:
        samples = np.random.default_rng(content).uniform(-0.5, 0.5, 3_200)
        soundfile.write(path, samples, 16_000)


def one_run(archive, out, engine):
    """What `run.py` does, without Ray."""
    config = RunConfig(archive=str(archive), out=str(out), model="fake")
    job = pipeline.Job(config, "run", "fake", "fake", "f", "cpu")
    published = publish.read_published(config.out)
    done = set(published.recording_ids.to_pylist())
    remaining = [r for r in list_archive(config.archive) if r.recording_id not in done]
    repeated = duplicates.find(
        remaining, published.contents(np.array([r.size_bytes for r in remaining]))
    )
    shared = {d.recording.recording_id for d in repeated}
    shards = plan_shards([r for r in remaining if r.recording_id not in shared], 0.01)
    list(pipeline.run_shards(shards, job, engine))
    assert duplicates.publish_duplicates(repeated, config.out, "run")[1] == []


contents = st.lists(st.integers(0, N_CONTENTS - 1), max_size=8)


@settings(max_examples=25, deadline=None)
@given(contents.filter(bool), contents)
def test_every_recording_has_one_row_and_every_content_is_heard_once(first, more):
    with tempfile.TemporaryDirectory() as folder:
        archive, out = Path(folder, "archive"), Path(folder, "out")
        archive.mkdir()
        engine = CountingEngine()
        for n, content in enumerate(first):
            write(archive / f"{n:02d}.wav", content)
        one_run(archive, out, engine)
        for n, content in enumerate(more):
            write(archive / f"{n:02d}-more.wav", content)
        one_run(archive, out, engine)

        content_of = {f"{n:02d}": c for n, c in enumerate(first)}
        content_of |= {f"{n:02d}-more": c for n, c in enumerate(more)}
        ids = publish.read_published(str(out)).table["recording_id"].to_pylist()
        rows = {r["recording_id"]: r for r in publish.read_whole_rows(str(out), set(ids))}
        assert sorted(Path(r["uri"]).stem for r in rows.values()) == sorted(content_of)
        assert len(ids) == len(content_of)
        contents = set(content_of.values())
        assert sorted(engine.heard.values()) == [1] * len(contents - {0, 1})
        recognised = Counter()
        for row in rows.values():
            own = content_of[Path(row["uri"]).stem]
            if row["duplicate_of"] is None:
                recognised[own] += 1
            else:
                original = rows[row["duplicate_of"]]
                assert content_of[Path(original["uri"]).stem] == own
                assert original["duplicate_of"] is None
                for column in ("text", "segments", "status", "error_kind", "content_md5"):
                    assert row[column] == original[column]
        assert all(n == 1 for content, n in recognised.items() if content != 1)
