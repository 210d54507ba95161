"""The Ray run and the plain loop of `pipeline.py` make the same rows."""

from __future__ import annotations

import functools
import shutil

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from transcribe import pipeline, run
from transcribe.cli import app
from transcribe.config import RunConfig
from transcribe.engines.fake import FakeEngine
from transcribe.schema import PROVENANCE_ONLY, TRANSCRIPT

CALLS = 4


@pytest.fixture(scope="module")
def archive(tmp_path_factory, write_archive):
    return write_archive(tmp_path_factory.mktemp("parity") / "archive", CALLS)


def rows_of(out):
    """All that says what, and not when, where and how fast, in order of URI."""
    table = pq.read_table(out / "transcripts", schema=TRANSCRIPT).sort_by("uri")
    return table.drop_columns(sorted(PROVENANCE_ONLY)).to_pylist()


def plain_rows(archive, out, shard_minutes, part_samples=pipeline.PART_SAMPLES):
    config = RunConfig(
        archive=str(archive), out=str(out), model="fake", shard_minutes=shard_minutes
    )
    plan = run.prepare(config, print)
    job = pipeline.Job(
        config=config,
        run_id=plan.run_id,
        model_revision=plan.model_revision,
        engine=plan.engine,
        config_fingerprint=plan.config_fingerprint,
        device="cpu",
        part_samples=part_samples,
    )
    summaries = list(pipeline.run_shards(plan.shards, job, FakeEngine()))
    assert len(summaries) == len(plan.shards)
    return rows_of(out)


def ray_rows(archive, out, *flags):
    command = ["run", str(archive), str(out), "--model", "fake", "--max-failed", "1", *flags]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return rows_of(out)


def test_plain_and_ray_runs_are_equal_however_cut_and_shared_out(archive, tmp_path, shared_ray):
    expected = plain_rows(archive, tmp_path / "plain", None)
    assert len(expected) == CALLS + 2
    spoken = [row for row in expected if row["status"] == "ok"]
    assert len({row["text"] for row in spoken}) == CALLS  # the fake engine tells them apart
    assert all({s["channel"] for s in row["segments"]} == {0, 1} for row in spoken)

    assert plain_rows(archive, tmp_path / "plain-cut", 0.05) == expected
    assert ray_rows(archive, tmp_path / "whole", "--workers", "1") == expected
    cut = ["--workers", "2", "--shard-minutes", "0.05"]
    assert ray_rows(archive, tmp_path / "cut", *cut) == expected
    assert len(list((tmp_path / "cut" / "transcripts").iterdir())) > 2


def test_recordings_in_many_parts_are_joined_to_the_same_rows(
    archive, write_long_call, tmp_path, shared_ray, monkeypatch
):
    """Ten seconds of speech at once, where the longest recording has more than a minute."""
    calls = shutil.copytree(archive, tmp_path / "calls")
    write_long_call(calls / "long.wav", turns=8)
    cut = (calls / "long.wav").read_bytes()
    (calls / "middle-cut.wav").write_bytes(cut[: len(cut) * 2 // 3])

    expected = plain_rows(calls, tmp_path / "plain", 60)
    long = next(row for row in expected if row["uri"].endswith("long.wav"))
    assert len(long["segments"]) == 16
    assert sum(c["speech"] for c in long["coverage"]) > 60
    ten_seconds = 10 * 16_000
    for n, part_samples in enumerate((ten_seconds, 1)):
        assert plain_rows(calls, tmp_path / f"plain-{n}", 60, part_samples) == expected

    monkeypatch.setattr(run, "Job", functools.partial(pipeline.Job, part_samples=ten_seconds))
    for n, minutes in enumerate(("60", "0.05")):
        out = tmp_path / f"ray-{n}"
        rows = ray_rows(calls, out, "--workers", "2", "--shard-minutes", minutes)
        assert rows == expected
        (metrics,) = (out / "runs").glob("*/metrics.parquet")
        windows = pq.read_table(metrics)["windows"].to_pylist()
        assert sum(windows) == sum(len(row["segments"]) for row in expected)
