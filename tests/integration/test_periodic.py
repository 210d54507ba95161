"""The weekly run: what is added, changed and deleted in between, and that it is one command."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from transcribe import distributed, storage
from transcribe.cli import app

ROOT = Path(__file__).parents[2]
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")


def week(archive: str, out: str) -> str:
    command = ["run", archive, out, "--model", "fake", "--max-failed", "0.5"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done.stdout


def rows(out: str) -> dict[str, dict]:
    found = {}
    for file in storage.list_objects(f"{out}/transcripts"):
        for row in pq.read_table(io.BytesIO(storage.read(file.uri))).to_pylist():
            name = row["uri"].rpartition("/")[2]
            assert name not in found, f"{name} has two rows"
            found[name] = row
    return found


@pytest.fixture
def bucket(gcs_bucket, monkeypatch):
    """A bucket, and one embedded Ray for all runs whose workers know the way there."""
    distributed.connect(None, workers=2)
    monkeypatch.setattr(distributed, "connect", lambda address, workers: None)
    disconnect = distributed.disconnect
    monkeypatch.setattr(distributed, "disconnect", lambda: None)
    yield gcs_bucket
    disconnect()


def test_weeks_of_an_archive_that_lives(bucket, write_call, tmp_path):
    archive, out = f"{bucket}/calls", f"{bucket}/out"

    def put(name: str, number: int) -> None:
        write_call(tmp_path / "call.wav", number)
        storage.put(f"{archive}/{name}", (tmp_path / "call.wav").read_bytes())

    for number, name in enumerate(["monday.wav", "tuesday.wav", "friday.wav"]):
        put(name, number)
    week(archive, out)
    first = rows(out)
    assert set(first) == {"monday.wav", "tuesday.wav", "friday.wav"}

    put("new.wav", 7)
    put("monday.wav", 8)
    storage.delete(f"{archive}/tuesday.wav")
    put("friday-copy.wav", 2)
    said = week(archive, out)
    assert "1 of 4 recordings already transcribed" in said
    second = rows(out)
    assert set(second) == {*first, "new.wav", "friday-copy.wav"}
    assert second["tuesday.wav"] == first["tuesday.wav"]  # gone from the archive, not from here
    assert second["friday.wav"] == first["friday.wav"]
    assert second["monday.wav"]["generation"] != first["monday.wav"]["generation"]
    assert second["monday.wav"]["text"] != first["monday.wav"]["text"]
    assert second["friday-copy.wav"]["duplicate_of"] == first["friday.wav"]["recording_id"]

    before = [(o.uri, o.version) for o in storage.list_objects(out)]
    assert "Nothing left to do" in week(archive, out)
    assert rows(out) == second
    after = [(o.uri, o.version) for o in storage.list_objects(out)]
    assert {uri for uri, _ in after} == {uri for uri, _ in before}


def test_every_schedule_says_the_same_command():
    """cron, systemd, Kubernetes and `ray job submit` must not drift apart."""
    cronjob = yaml.safe_load((ROOT / "cluster" / "cronjob.yaml").read_text(encoding="utf-8"))
    assert (cronjob["apiVersion"], cronjob["kind"]) == ("batch/v1", "CronJob")
    assert cronjob["spec"]["concurrencyPolicy"] == "Forbid"
    pod = cronjob["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("Never", "OnFailure")
    (container,) = pod["containers"]
    commands = [container["command"] + container["args"]]
    documented = re.findall(r"(?:transcribe run|python -m jobs\.transcribe) (gs://.*)", OPERATIONS)
    assert len(documented) == 3
    commands += [["transcribe", "run", *shlex.split(text.split(" >>")[0])] for text in documented]
    assert all(command == commands[0] for command in commands)
    accepted = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output
    assert all(flag in accepted for flag in commands[0] if flag.startswith("--"))
    assert cronjob["spec"]["schedule"] in OPERATIONS
