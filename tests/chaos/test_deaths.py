"""Recordings that are the end of every engine, memory that runs out, and a Ray that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from tests.chaos.world import REPO, environment

pytestmark = pytest.mark.timeout(600)


def archive_of(folder, names):
    folder.mkdir()
    draw = np.random.default_rng(3)
    for name in names:
        samples = draw.integers(-9000, 9000, 4 * 16_000).astype(np.int16)
        soundfile.write(folder / f"{name}.wav", samples, 16_000)
    return folder


def start(archive, out, **chaos):
    command = [sys.executable, "-m", "tests.chaos.driver", str(archive), str(out)]
    command += ["--model", "fake", "--workers", "2", "--max-failed", "1", "--shard-minutes", "0.5"]
    return subprocess.Popen(
        command,
        cwd=REPO,
        env={**environment(), **{f"CHAOS_{k.upper()}": str(v) for k, v in chaos.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def report_of(out):
    (report,) = (out / "runs").glob("*/report.json")
    return json.loads(report.read_text())


def test_a_recording_that_kills_its_engine_fails_alone(tmp_path):
    rows_beside(["kill-1"], tmp_path)


@pytest.mark.long
def test_recordings_that_end_their_engines_fail_alone(tmp_path):
    """One kills it, one makes it hang, at one it raises what nobody expected."""
    rows = rows_beside(["kill-1", "raise-1", "stop-1"], tmp_path)
    assert "recognise raised ValueError at stage.py" in rows["raise-1"]["error_message"]


def rows_beside(deadly, folder):
    """Rows by name after a run in which all but the deadly recordings came out well."""
    mates = [f"call-{n}" for n in range(10)]
    archive, out = archive_of(folder / "calls", [*mates, *deadly]), folder / "out"
    run = start(archive, out, grace_s=5)
    stdout, stderr = run.communicate(timeout=500)
    assert run.returncode == 0, stdout + stderr
    rows = {Path(r["uri"]).stem: r for r in pq.read_table(out / "transcripts").to_pylist()}
    assert len(rows) == len(mates) + len(deadly) == report_of(out)["recordings"]
    assert {name for name, row in rows.items() if row["status"] == "ok"} == set(mates)
    for name in deadly:
        assert rows[name]["error_kind"] == "crashed_worker"
        assert "workers died" in rows[name]["error_message"]
        assert "what a defect says" not in stdout + stderr + rows[name]["error_message"]
    return rows


@pytest.mark.long
def test_an_engine_without_memory_hears_less_at_once(tmp_path):
    archive, out = archive_of(tmp_path / "calls", [f"call-{n}" for n in range(8)]), tmp_path / "out"
    flag = tmp_path / "out-of-memory"
    flag.touch()
    run = start(archive, out, out_of_memory=flag)
    stdout, stderr = run.communicate(timeout=300)
    assert run.returncode == 0, stdout + stderr
    report = report_of(out)
    assert (report["ok"], report["smallest_batch_limit"]) == (8, 1)
    assert report["batch_halvings"] >= 2


@pytest.mark.long
@pytest.mark.parametrize("what", ["gcs_server", "raylet/raylet"])
def test_a_run_whose_ray_dies_says_so(tmp_path, what):
    """Ray by itself ends the process after 60 s, without a word, when its head is gone."""
    names = [f"call-{n:02d}" for n in range(40)]
    archive, out = archive_of(tmp_path / "calls", names), tmp_path / "out"
    run = start(archive, out, service_s=1)
    try:
        while run.poll() is None and not knows_of_rows(out):
            time.sleep(0.05)
        assert run.poll() is None, run.communicate()
        (victim,) = children_of(run.pid, what)
        os.kill(victim, signal.SIGKILL)
        stdout, stderr = run.communicate(timeout=100)
    finally:
        run.kill()
    assert run.returncode == 2, (run.returncode, stdout, stderr)
    (sentence,) = [line for line in stderr.splitlines() if line.startswith("Error: ")]
    assert "run the same command again" in sentence
    assert "Traceback" not in stdout + stderr
    report = report_of(out)
    assert report["ended"] == "stopped" and 0 < report["recordings"] < len(names)
    assert pq.read_table(out / "transcripts").num_rows >= report["recordings"]


def knows_of_rows(out):
    """Whether the driver, too, has heard of a shard that is published."""
    return any(json.loads(p.read_text())["ok"] for p in out.glob("runs/*/progress.json"))


def children_of(pid, title):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == pid and title in (entry / "cmdline").read_bytes().decode():
                    found.append(int(entry.name))
            except (OSError, ProcessLookupError):
                continue
    return found
