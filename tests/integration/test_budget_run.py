"""A run with a budget: it stops at a shard's end, says so, and the same command goes on."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
from typer.testing import CliRunner

from transcribe.cli import app


def transcribe(archive, out, *flags):
    command = ["run", str(archive), str(out), "--max-failed", "0.5", "--shard-minutes", "0.1"]
    return CliRunner().invoke(app, [*command, "--workers", "1", *map(str, flags)])


def reports(out):
    return [json.loads(p.read_bytes()) for p in sorted(out.glob("runs/*/report.json"))]


def test_a_budget_stops_a_run_and_the_same_command_goes_on(
    tmp_path, write_archive, shared_ray, monkeypatch
):
    archive, out = write_archive(tmp_path / "calls", 6), tmp_path / "out"
    told = tmp_path / "told"
    # A dollar a second: money for the start and some calls, of some seconds each, not for all.
    flags = ["--model", "fake@0.5", "--price-per-hour", "3600", "--max-spend", "15"]
    first = transcribe(archive, out, *flags, "--notify-command", f"tee -a {told}")
    assert first.exit_code == 3, first.output
    last = first.stdout.splitlines()[-1]
    assert last.startswith("Stopped: --max-spend 15 is used up; what is published stays.")
    assert "Run the same command again to go on." in last
    assert "cost            $" in first.stdout

    (report,) = reports(out)
    assert report["budget_reached"] == "--max-spend 15 is used up"
    done = pq.read_table(out / "transcripts").num_rows
    assert report["ended"] == "budget"
    assert 0 < done == report["recordings"] < 8
    assert report["cost"]["usd"] > 0
    assert report["cost"]["idle_usd"] <= report["cost"]["usd"]
    (machine,) = report["machines"].values()
    assert machine["usd_per_hour"] == 3600 and 0 <= machine["idle_share"] <= 1
    assert '"event": "stopped"' in told.read_text()
    status = CliRunner().invoke(app, ["status", str(out)])
    assert "stopped" in status.stdout and "$" in status.stdout

    more = transcribe(archive, out, "--model", "fake")
    assert more.exit_code == 0, more.output
    assert f"{done} of 8 recordings already transcribed" in more.stdout
    rows = pq.read_table(out / "transcripts").sort_by("uri").to_pylist()
    assert [row["uri"] for row in rows] == [str(p) for p in sorted(archive.iterdir())]
    assert reports(out)[-1]["cost"]["usd"] is None
    assert "finished" in CliRunner().invoke(app, ["status", str(out)]).stdout


def test_a_spending_limit_without_a_price_is_refused(tmp_path, write_archive, shared_ray):
    archive, out = write_archive(tmp_path / "calls", 1), tmp_path / "out"
    refused = transcribe(archive, out, "--model", "fake", "--max-spend", "5")
    assert refused.exit_code == 2
    assert "--max-spend needs a price for 'this machine'" in refused.stderr
    assert not list(out.rglob("*.*"))


def test_no_more_engines_than_allowed(tmp_path, write_archive, shared_ray):
    archive, out = write_archive(tmp_path / "calls", 6), tmp_path / "out"
    flags = ["--model", "fake", "--workers", "2", "--max-workers", "1"]  # the last of a flag counts
    assert transcribe(archive, out, *flags).exit_code == 0
    assert reports(out)[0]["workers"] == 1
    (metrics,) = out.glob("runs/*/metrics.parquet")
    workers = pq.read_table(metrics)["worker"].to_pylist()
    assert len(workers) > 1 and len(set(workers)) == 1
