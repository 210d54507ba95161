"""Jobs on a cluster of real Ray processes with token authentication, and who is not let in."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from transcribe import storage

REPO = Path(__file__).parents[2]
CALLS = 3
STATUSES = ["failed", *["ok"] * CALLS, "empty"]  # broken, calls, silent: in order of names


@pytest.fixture(scope="module")
def archive(tmp_path_factory, write_archive):
    return write_archive(tmp_path_factory.mktemp("cluster") / "archive", CALLS)


def submit(cluster, *arguments, token=None):
    """What the README says to type, from a checkout; a cluster just started may not take it yet."""
    flags = ["--address", cluster.dashboard, "--working-dir", "."]
    job = ["python", "-m", "jobs.transcribe", *map(str, arguments), "--model", "fake"]
    ray = Path(sys.executable).parent / "ray"
    until = time.monotonic() + 120
    while True:
        done = command(cluster, [ray, "job", "submit", *flags, "--", *job], token)
        if "No available agent" not in done.stderr or time.monotonic() > until:
            return done


def join(cluster, *arguments, token=None):
    run = [sys.executable, "-m", "jobs.transcribe", "--address", cluster.address]
    return command(cluster, [*run, *map(str, arguments), "--model", "fake"], token)


def command(cluster, line, token):
    env = {**cluster.env, "RAY_AUTH_TOKEN": token} if token else cluster.env
    return subprocess.run(line, cwd=REPO, env=env, capture_output=True, text=True, timeout=200)


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_submitted_job_transcribes_on_both_nodes(ray_cluster, archive, tmp_path):
    """Each node has one CPU, too few for a decode task beside an engine: it takes both."""
    out = tmp_path / "out"
    done = submit(ray_cluster, archive, out, "--max-failed", "0.5", "--shard-minutes", "0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pq.read_table(out / "transcripts").sort_by("uri").to_pylist()
    assert [row["status"] for row in rows] == STATUSES
    assert [Path(row["uri"]).name for row in rows] == sorted(p.name for p in archive.iterdir())
    assert len({row["shard_id"] for row in rows}) > 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "core_worker" not in done.stdout  # Ray's own words in the job's log

    (uploaded,) = ray_cluster.folder.glob("head/session_2*/**/working_dir_files/_ray_pkg_*/")
    assert (uploaded / "jobs" / "transcribe.py").exists()
    assert not {".git", ".venv", ".mypy_cache"} & {path.name for path in uploaded.iterdir()}
    assert sum(path.stat().st_size for path in files_in(uploaded)) < 10_000_000


def test_from_bucket_to_bucket(ray_cluster, archive, gcs_bucket):
    for path in archive.iterdir():
        storage.put(storage.join(gcs_bucket, "calls", path.name), path.read_bytes())
    out = storage.join(gcs_bucket, "transcripts")
    calls = storage.join(gcs_bucket, "calls")
    done = submit(ray_cluster, calls, out, "--max-failed", "0.1")
    assert "--max-failed 10.0%" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1  # one of five failed, and the transcripts are kept
    files = [o.uri for o in storage.list_objects(out)]
    parquet = [uri for uri in files if uri.startswith(f"{out}/transcripts/")]
    rows = [
        row for uri in parquet for row in pq.read_table(io.BytesIO(storage.read(uri))).to_pylist()
    ]
    rows.sort(key=lambda row: row["uri"])
    assert [row["status"] for row in rows] == STATUSES
    assert [row["uri"] for row in rows] == [o.uri for o in storage.list_objects(calls)]
    assert all(row["generation"] and row["content_md5"] for row in rows)
    assert {uri.rpartition("/")[2] for uri in files} >= {"settings.json", "report.json", "log.txt"}


def test_a_wrong_token_is_refused(ray_cluster, archive, tmp_path):
    wrong = "ab" * 32
    submitted = submit(ray_cluster, archive, tmp_path / "out", token=wrong)
    assert submitted.returncode != 0
    assert "token" in submitted.stderr
    joined = join(ray_cluster, archive, tmp_path / "out", token=wrong)
    assert joined.returncode == 2
    assert joined.stderr.startswith(f"Error: The Ray cluster at '{ray_cluster.address}' asks for")
    assert joined.stderr.count("Error") == 1
    assert wrong not in joined.stdout + joined.stderr
    assert files_in(tmp_path) == []


def test_a_job_that_does_not_fit_says_what_is_missing(ray_cluster, archive, tmp_path):
    flags = ["--device", "cuda", "--wait-for-workers", "1"]
    refused = join(ray_cluster, archive, tmp_path / "out", *flags)
    assert refused.returncode == 2
    said = " ".join(refused.stderr.split())
    assert said == (
        "Error: The cluster cannot run this job: it needs a GPU and 2 CPUs and has 2 CPUs and"
        " 0 GPUs. Add a worker node, or check --device (cpu needs no GPU) and --workers."
    )
    assert files_in(tmp_path) == []


def test_preflight_asks_every_machine(ray_cluster, archive, tmp_path):
    transcribe = Path(sys.executable).parent / "transcribe"
    line = [transcribe, "preflight", ray_cluster.address, archive, tmp_path / "out"]
    asked = command(ray_cluster, [*line, "--model", "fake"], None)
    assert asked.returncode == 0, asked.stdout + asked.stderr
    lines = asked.stdout.splitlines()
    assert sum(" versions: " in line for line in lines) == 4  # here, the head and two workers
    assert sum(" weights: " in line for line in lines) == 3
    assert not any(line.startswith("failure") for line in lines)
