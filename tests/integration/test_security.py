"""A run on an archive that means ill: names, manifests and secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console
from typer.testing import CliRunner

from transcribe import pipeline, processes, publish, run
from transcribe.cli import app
from transcribe.config import RunConfig
from transcribe.engines.load import load_engine
from transcribe.pipeline import Job

ILL = [
    "a..%2f..%2f..%2fescape.wav",
    "\x1b]0;owned\x07\x1b[2J.wav",
    "line\nERROR forged.wav",
    "\rback.wav",
    "invoice\u202egpj.wav",
    "сall.wav",
    "=HYPERLINK(1).wav",
    "$(touch owned).wav",
    "; touch owned ;.wav",
    "n" * 251 + ".wav",
    " .wav",
    "[red]markup :smile:.wav",
]
SECRET = "p1anted-5ecret"


def files_of(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def transcribed(archive: str, out: Path) -> list[dict]:
    """All of a run but Ray."""
    config = RunConfig(archive, str(out), model="fake")
    plan = run.prepare(config, print)
    job = Job(config, plan.run_id, "fake", "fake", plan.config_fingerprint, "cpu")
    list(pipeline.run_shards(plan.shards, job, load_engine(job)))
    return [r for p in (out / "transcripts").iterdir() for r in pq.read_table(p).to_pylist()]


def test_names_are_data_and_nothing_else(tmp_path: Path, write_call) -> None:
    calls, out = tmp_path / "calls", tmp_path / "out"
    calls.mkdir()
    for n, name in enumerate(ILL):
        write_call(calls / name, n)
    before = files_of(tmp_path)
    rows = transcribed(str(calls), out)
    assert sorted(row["uri"] for row in rows) == sorted(str(calls / name) for name in ILL)
    assert {row["status"] for row in rows} == {"ok"}
    new = sorted(set(files_of(tmp_path)) - set(before))
    assert new == [f"out/transcripts/{row}.parquet" for row in {r["shard_id"] for r in rows}]


def test_a_manifest_names_recordings_but_no_place_to_write(tmp_path: Path, write_call) -> None:
    (tmp_path / "lists").mkdir()
    write_call(tmp_path / "a.wav", 1)
    names = ["../a.wav", "../../../../../../etc/hostname", "/nowhere/\x1b[2J.wav", "x" * 5000]
    manifest = tmp_path / "lists" / "m.jsonl"
    lines = [json.dumps({"uri": name, "note": "\x1b[31m"}) + "\n" for name in names]
    manifest.write_text("".join(lines))
    rows = {row["uri"]: row for row in transcribed(str(manifest), tmp_path / "out")}
    assert len(rows) == len(names)
    assert rows[str(tmp_path / "a.wav")]["status"] == "ok"
    assert sum(row["status"] == "failed" for row in rows.values()) == 3
    assert all(name.startswith("out/") for name in files_of(tmp_path) if "parquet" in name)


def test_a_message_never_holds_what_was_heard_or_read(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.mkdir()
    for name in ("a.wav", "b.mp3", "c.flac", "d"):
        (calls / name).write_text(f"RIFF fLaC {SECRET} " * 500)
    rows = transcribed(str(calls), tmp_path / "out")
    assert [row["status"] for row in rows] == ["failed"] * 4
    assert SECRET not in str(rows)


def test_what_is_said_and_logged_is_one_line_without_commands(tmp_path: Path) -> None:
    shown = io.StringIO()
    with run._logging_to(Console(file=shown)) as log:
        logging.getLogger("transcribe.x").warning(
            "%s cannot be read", f"https://u:{SECRET}@h/\x1b[2J\nERROR forged?sig={SECRET}"
        )
    for text in (shown.getvalue(), log.getvalue()):
        assert text.count("\n") == 1
        assert "\x1b" not in text
        assert SECRET not in text
        assert r"h/\x1b[2J\nERROR forged" in text


@pytest.fixture
def web(tmp_path: Path, write_call) -> Iterator[str]:
    """`host:port` of a web server with one call, `a.wav`; the rest is not found."""
    folder = tmp_path / "web"
    folder.mkdir()
    write_call(folder / "a.wav", 1)

    class Quiet(SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_planted_secrets_are_nowhere(
    tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch, shared_ray: None
) -> None:
    """In addresses and in the environment: not in OUT, and not in what is printed."""
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GOOGLE_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    signed = [f"http://user:{SECRET}@{web}/{n}.wav?X-Goog-Signature={SECRET}" for n in "ab"]
    (tmp_path / "m.csv").write_text("uri\n" + "\n".join(signed) + "\n")
    out = tmp_path / "out"
    command = ["run", str(tmp_path / "m.csv"), str(out), "--model", "fake", "--max-failed", "1"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    direct = CliRunner().invoke(app, ["run", signed[1], str(tmp_path / "out2"), "--model", "fake"])
    assert direct.exit_code == 2
    assert SECRET not in result.output + direct.output
    assert f"http://{web}/b.wav" in direct.output
    rows = [r for p in (out / "transcripts").iterdir() for r in pq.read_table(p).to_pylist()]
    assert {row["uri"]: row["status"] for row in rows} == {
        f"http://{web}/a.wav": "ok",
        f"http://{web}/b.wav": "failed",
    }
    assert SECRET not in str(rows)
    for name in files_of(out):
        assert SECRET.encode() not in (out / name).read_bytes(), name


def test_ray_reports_nothing_to_its_makers(tmp_path: Path, write_archive, shared_ray) -> None:
    calls = write_archive(tmp_path / "calls", 1)
    command = ["run", str(calls), str(tmp_path / "out"), "--model", "fake", "--max-failed", "1"]
    assert CliRunner().invoke(app, command).exit_code == 0
    actors = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert "AutoscalingCoordinator" in actors  # Ray Data's actors are seen
    assert "DataUsageCollectionActor" not in actors
    raylet = processes.child_named("raylet", os.getpid())
    assert b"RAY_USAGE_STATS_ENABLED=0" in Path(f"/proc/{raylet}/environ").read_bytes().split(b"\0")


def test_a_new_signature_is_no_new_recording(tmp_path: Path, web: str) -> None:
    out = tmp_path / "out"
    for signature in ("one", "two"):
        manifest = tmp_path / "m.csv"
        manifest.write_text(f"uri\nhttp://{web}/a.wav?X-Amz-Signature={signature}\n")
        config = RunConfig(str(manifest), str(out), model="fake")
        assert len(run.prepare(config, print).shards) == (1 if signature == "one" else 0)
        if signature == "one":
            transcribed(str(manifest), out)
    assert [row["uri"] for row in publish.read_whole_rows(str(out), _ids(out))] == [
        f"http://{web}/a.wav"
    ]


def _ids(out: Path) -> set[str]:
    return publish.read_published(str(out)).recording_ids


def test_a_refused_address_keeps_its_secret(tmp_path: Path) -> None:
    address = f"nosuch://user:{SECRET}@host/calls"
    result = CliRunner().invoke(app, ["run", address, str(tmp_path / "out"), "--model", "fake"])
    assert result.exit_code == 2
    assert SECRET not in result.output
