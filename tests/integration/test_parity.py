"""The Ray run and the plain loop of `pipeline.py` make the same rows."""

from __future__ import annotations

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


def plain_rows(archive, out, shard_minutes):
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
