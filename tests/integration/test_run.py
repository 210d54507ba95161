"""`transcribe run` on this machine: exit codes, refusals, reruns, and what a crash leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from transcribe import distributed, run
from transcribe.cli import app
from transcribe.config import RunConfig
from transcribe.errors import Fatal
from transcribe.pipeline import Job

CALLS = 3


def transcribe(archive, out, *flags, model="fake"):
    command = ["run", str(archive), str(out), "--model", model, *map(str, flags)]
    return CliRunner().invoke(app, command)


def rows_of(out):
    return pq.read_table(out / "transcripts").sort_by("uri").to_pylist()


def files_of(folder):
    """Content of every file below `folder`, by its path."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- refused before any work


def refused(result, out):
    """The one sentence of a run that was refused, after which there is nothing in OUT."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert "Error" not in result.stdout
    assert "ERROR" not in result.stdout  # said once, not logged to the user as well
    assert "Traceback" not in result.output
    assert result.stderr.count("\n") == 1  # not broken into lines of 80
    assert not out.is_dir() or files_of(out) == {}
    return result.stderr


@pytest.fixture
def small_archive(tmp_path):
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "broken.wav").write_bytes(b"this is no audio at all")
    return tmp_path / "calls"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--language", "xx"], "--language 'xx'"),
        (["--channels", "both"], "--channels"),
        (["--speakers", "agent,"], "--speakers"),
        (["--device", "tpu"], "--device"),
        (["--workers", "0"], "--workers"),
        (["--shard-minutes", "0"], "--shard-minutes"),
        (["--max-failed", "nan"], "--max-failed"),
        (["--wait-for-workers", "-1"], "--wait-for-workers"),
    ],
)
def test_a_flag_that_cannot_be_is_named(small_archive, tmp_path, flags, named):
    assert named in refused(transcribe(small_archive, tmp_path / "out", *flags), tmp_path / "out")


def test_a_missing_and_an_empty_archive_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for archive in (tmp_path / "missing", tmp_path / "empty"):
        assert str(archive) in refused(transcribe(archive, tmp_path / "out"), tmp_path / "out")


def test_an_out_that_is_a_file_is_refused_and_kept(small_archive, tmp_path):
    out = tmp_path / "out"
    out.write_text("mine")
    assert str(out) in refused(transcribe(small_archive, out), out)
    assert out.read_text() == "mine"


def test_an_unknown_model_is_refused(small_archive, tmp_path):
    result = transcribe(small_archive, tmp_path / "out", model="whisper-enormous")
    assert "whisper-enormous" in refused(result, tmp_path / "out")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "http://127.0.0.1:8265", "nonsense"])
def test_a_cluster_that_is_not_there_is_refused_at_once(small_archive, tmp_path, address):
    result = transcribe(small_archive, tmp_path / "out", "--address", address)
    assert repr(address) in refused(result, tmp_path / "out")


# ---------------------------------------------------------------- the life of one OUT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_this_machine_lacks_is_not_waited_for(small_archive, tmp_path, shared_ray):
    result = transcribe(small_archive, tmp_path / "out", "--device", "cuda")
    assert "This machine has no GPU: leave --device out" in refused(result, tmp_path / "out")


def test_from_first_run_to_a_changed_archive(tmp_path, write_archive, write_call, shared_ray):
    archive, out = write_archive(tmp_path / "calls", CALLS), tmp_path / "out"
    first = transcribe(archive, out)
    assert first.exit_code == 1, first.output  # 1 of 5 failed, above the 5 % allowed
    assert "1 of 5" in first.stdout
    last = first.stdout.splitlines()[-1]
    assert "--max-failed 5.0%" in last and last.endswith("see error_message.")
    assert f"output          {out}/transcripts/*.parquet" in first.stdout.splitlines()
    assert "Starting Ray on this machine ..." in first.stdout.splitlines()
    assert first.stderr == ""
    before = rows_of(out)
    assert [row["uri"] for row in before] == [str(p) for p in sorted(archive.iterdir())]
    assert [row["status"] for row in before] == ["failed", *["ok"] * CALLS, "empty"]
    (run_folder,) = (out / "runs").iterdir()
    kept = {path.name for path in run_folder.iterdir()}
    assert kept >= {"config.json", "log.txt", "metrics.parquet", "report.json"}
    metrics = pq.read_table(run_folder / "metrics.parquet").to_pylist()
    assert sum(shard["recordings"] for shard in metrics) == len(before)
    assert no_stray_files(out)

    files = files_of(out)
    again = transcribe(archive, out, "--max-failed", "0.2")
    assert again.exit_code == 0, again.output
    assert "5 of 5 recordings already transcribed" in again.stdout
    assert "Nothing left to do" in again.stdout
    assert files_of(out) == files

    other = transcribe(archive, out, "--language", "de")
    assert other.exit_code == 2
    assert "other settings (language: None there, 'de' now)" in other.stderr
    assert files_of(out) == files

    write_call(archive / "call-01.wav", 7)  # changed
    write_call(archive / "call-99.wav", 8)  # new
    more = transcribe(archive, out, "--max-failed", "0.2")
    assert more.exit_code == 0, more.output
    assert "4 of 6 recordings already transcribed" in more.stdout
    after = rows_of(out)
    assert [row["uri"] for row in after] == [str(p) for p in sorted(archive.iterdir())]
    old = {row["uri"]: row for row in before}
    done_now = [row for row in after if row != old.get(row["uri"])]
    assert [row["uri"][-11:] for row in done_now] == ["call-01.wav", "call-99.wav"]
    assert done_now[0]["text"] != old[done_now[0]["uri"]]["text"]
    assert no_stray_files(out)


def test_same_bytes_are_recognised_once_and_shared(tmp_path, write_call, shared_ray):
    archive, out = tmp_path / "calls", tmp_path / "out"
    archive.mkdir()
    write_call(archive / "b.wav", 1)
    write_call(archive / "other.wav", 2)
    for name in ("a.wav", "c.wav"):
        (archive / name).write_bytes((archive / "b.wav").read_bytes())
    first = transcribe(archive, out)
    assert first.exit_code == 0, first.output
    assert "whose result they share: 2." in " ".join(first.stdout.split())
    a, b, c, other = rows_of(out)
    assert [a["duplicate_of"], other["duplicate_of"]] == [None, None]
    assert b["duplicate_of"] == c["duplicate_of"] == a["recording_id"]
    assert len({row["recording_id"] for row in (a, b, c, other)}) == 4
    assert a["text"] == b["text"] == c["text"] != other["text"]
    assert {r["content_md5"] for r in (a, b, c)} == {md5_of(archive / "a.wav")}
    report = the_report(out)
    assert (report["recordings"], report["ok"], report["duplicates"]) == (4, 4, 2)
    assert report["audio_seconds"] == pytest.approx(a["duration"] + other["duration"])
    assert report["duplicate_seconds"] == pytest.approx(2 * a["duration"])

    # The original goes; its copies stay right, and one more copy finds one of them.
    write_call(archive / "a.wav", 3)
    (archive / "d.wav").write_bytes((archive / "b.wav").read_bytes())
    again = transcribe(archive, out)
    assert again.exit_code == 0, again.output
    now = rows_of(out)
    assert [Path(row["uri"]).stem for row in now] == ["a", "b", "c", "d", "other"]
    assert now[1:3] == [b, c]
    assert now[0]["duplicate_of"] is None and now[0]["text"] != a["text"]
    assert now[3]["duplicate_of"] in {r["recording_id"] for r in (a, b, c)}
    assert now[3]["segments"] == b["segments"]

    # Nothing but copies: no engine has anything to do.
    (archive / "e.wav").write_bytes((archive / "other.wav").read_bytes())
    last = transcribe(archive, out)
    assert last.exit_code == 0, last.output
    assert rows_of(out)[4]["duplicate_of"] == other["recording_id"]
    assert "1 share another's result" in " ".join(last.stdout.split())
    assert "Nothing left to do" in transcribe(archive, out).stdout
    assert no_stray_files(out)


def test_the_next_run_finishes_duplicates_that_a_crash_left(
    tmp_path, write_call, shared_ray, monkeypatch
):
    archive, out = tmp_path / "calls", tmp_path / "out"
    archive.mkdir()
    write_call(archive / "a.wav", 1)
    (archive / "b.wav").write_bytes((archive / "a.wav").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(run, "_share", stop_here)
        assert transcribe(archive, out).exit_code == 2
    (a,) = rows_of(out)
    assert transcribe(archive, out).exit_code == 0
    kept, b = rows_of(out)
    assert kept == a
    assert b["duplicate_of"] == a["recording_id"]


def stop_here(*anything):
    raise Fatal("stopped")


def test_duplicates_of_what_cannot_be_read_are_tried_themselves(
    tmp_path, write_call, shared_ray, monkeypatch
):
    """The original goes between the listing and the reading."""
    archive, out = tmp_path / "calls", tmp_path / "out"
    archive.mkdir()
    for name in ("a.wav", "b.wav", "c.wav"):
        write_call(archive / name, 1)
    planned = run.plan_shards

    def plan_and_delete(*arguments):
        (archive / "a.wav").unlink(missing_ok=True)
        return planned(*arguments)

    monkeypatch.setattr(run, "plan_shards", plan_and_delete)
    assert transcribe(archive, out, "--max-failed", "0.5").exit_code == 0
    a, b, c = rows_of(out)
    assert (a["status"], a["error_kind"]) == ("failed", "missing")
    assert b["text"] == c["text"] != ""
    assert [row["duplicate_of"] for row in (a, b, c)] == [None] * 3


def test_a_dual_mono_call_is_said_once_and_by_nobody_in_particular(
    tmp_path, write_call, shared_ray
):
    archive, out = tmp_path / "calls", tmp_path / "out"
    archive.mkdir()
    write_call(archive / "mono.wav", 1)
    samples, rate = soundfile.read(archive / "mono.wav", always_2d=True)
    soundfile.write(archive / "mono.wav", samples[:, :1], rate, subtype="ULAW")
    soundfile.write(archive / "dual.wav", samples[:, [0, 0]], rate, subtype="ULAW")
    write_call(archive / "apart.wav", 2)
    result = transcribe(archive, out, "--speakers", "agent,customer")
    assert result.exit_code == 0, result.output
    apart, dual, mono = rows_of(out)
    assert {s["channel"]: s["speaker"] for s in apart["segments"]} == {0: "agent", 1: "customer"}
    assert {s["speaker"] for row in (dual, mono) for s in row["segments"]} == {None}
    assert dual["text"] == mono["text"] != ""
    assert [c["skipped"] for c in dual["coverage"]] == [0.0, dual["duration"]]


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def the_report(out):
    """The report of the only run so far."""
    (report,) = (out / "runs").glob("*/report.json")
    return json.loads(report.read_text())


def no_stray_files(out):
    """Only whole Parquet files under their own names: no leftovers of writing."""
    found = list((out / "transcripts").iterdir())
    return bool(found) and all(len(p.stem) == 16 and p.suffix == ".parquet" for p in found)


def test_warnings_and_paths_are_said_as_they_are(tmp_path, shared_ray):
    archive, out = tmp_path / "calls [bold] of an archive with a rather long name", tmp_path / "out"
    archive.mkdir()
    (archive / "broken.wav").write_bytes(b"this is no audio at all")
    (archive / "notes.txt").write_text("left out")
    result = transcribe(archive, out, "--max-failed", "1")
    assert result.exit_code == 0, result.output
    said = f"Warning: left out in {archive}, as no recordings: .txt 1 (1 in all)"
    assert said in result.stdout.splitlines()


# ---------------------------------------------------------------- crashes


def test_an_engine_that_is_killed_comes_back(tmp_path, write_archive, shared_ray):
    archive, out = write_archive(tmp_path / "calls", 10), tmp_path / "out"
    config = RunConfig(str(archive), str(out), model="fake", shard_minutes=0.05)
    plan = run.prepare(config, print)
    job = Job(config, plan.run_id, "fake", "fake", plan.config_fingerprint, "cpu")
    done = []
    with distributed.Round(plan.shards, job, workers=1) as this_round:
        for summary in filter(None, this_round.outcomes()):
            if not done:
                os.kill(int(summary.worker.rpartition(":")[2]), signal.SIGKILL)
            done.append(summary.shard_id)
    assert sorted(done) == sorted(shard.shard_id for shard in plan.shards)
    assert [row["uri"] for row in rows_of(out)] == [str(p) for p in sorted(archive.iterdir())]


def test_a_run_that_is_killed_is_finished_by_the_same_command(tmp_path, write_archive, shared_ray):
    archive, out = write_archive(tmp_path / "calls", 20), tmp_path / "out"
    flags = ["--shard-minutes", "0.05", "--max-failed", "0.5"]
    command = [sys.executable, "-m", "jobs.transcribe", str(archive), str(out), "--model", "fake"]
    victim = subprocess.Popen([*command, *flags], stdout=subprocess.DEVNULL)
    try:
        while victim.poll() is None and not list(out.glob("transcripts/*.parquet")):
            time.sleep(0.02)
        assert victim.poll() is None, "ended before anything was published"
    finally:
        victim.kill()
        victim.wait()
    published = len(rows_of(out))
    assert 0 < published < 22
    again = transcribe(archive, out, *flags)
    assert again.exit_code == 0, again.output
    assert "of 22 recordings already transcribed" in again.stdout
    rows = rows_of(out)
    assert [row["uri"] for row in rows] == [str(p) for p in sorted(archive.iterdir())]
    assert len({row["run_id"] for row in rows}) == 2
    assert no_stray_files(out)


def test_transcripts_that_are_taken_away_meanwhile_are_missed(tmp_path, write_archive, shared_ray):
    archive, out = write_archive(tmp_path / "calls", 10), tmp_path / "out"
    flags = ["--shard-minutes", "0.05", "--max-failed", "1"]
    command = [sys.executable, "-m", "jobs.transcribe", str(archive), str(out)]
    with subprocess.Popen(
        [*command, "--model", "fake@12", *flags], stderr=subprocess.PIPE, text=True
    ) as victim:
        while victim.poll() is None and not list(out.glob("transcripts/*.parquet")):
            time.sleep(0.02)
        taken = next(out.glob("transcripts/*.parquet"))
        gone = len(pq.read_table(taken))
        taken.unlink()
        _, stderr = victim.communicate(timeout=120)
    assert victim.returncode == 2, stderr
    assert stderr.startswith(f"Error: {gone} recordings of this run have no row in {out}")
    assert the_report(out)["ended"] == "stopped"
    assert transcribe(archive, out, *flags, model="fake@12").exit_code == 0
    assert [row["uri"] for row in rows_of(out)] == [str(p) for p in sorted(archive.iterdir())]


@pytest.mark.parametrize("first_rows", [True, False], ids=["at work", "starting"])
def test_sigterm_ends_a_run_with_one_sentence(tmp_path, write_archive, first_rows):
    archive, out = write_archive(tmp_path / "calls", 20), tmp_path / "out"
    # So slow that there is much left to do when the signal comes, also on a busy machine.
    command = [sys.executable, "-m", "jobs.transcribe", str(archive), str(out), "--model", "fake@2"]
    command += ["--shard-minutes", "0.05"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "Starting Ray on this machine ...\n"
        while first_rows and victim.poll() is None and not list(out.glob("transcripts/*.parquet")):
            time.sleep(0.02)
        victim.terminate()
        stdout, stderr = victim.communicate(timeout=60)
    assert victim.returncode == 143, stderr
    assert stderr.startswith("Error: Told to end (SIGTERM); what is published stays.")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stdout
    if first_rows:
        report = the_report(out)
        assert report["ended"] == "interrupted"
        assert len(rows_of(out)) == report["recordings"] > 0
        (log,) = (out / "runs").glob("*/log.txt")
        assert log.read_text().endswith("interrupted\n")
