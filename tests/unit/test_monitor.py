"""What is told beside a run: heartbeats, money, limits, news; and `status`, which reads them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.unit.test_report import SUMMARY
from transcribe import status
from transcribe.budget import Limits, Meter, PaidMachine
from transcribe.claims import Claim
from transcribe.cli import app
from transcribe.errors import Fatal, Transient
from transcribe.monitor import Monitor, Surroundings
from transcribe.status import Progress

BEGUN = Progress(
    run_id="20261125T200000Z-abcd",
    archive="gs://bucket/calls",
    host="driver",
    started_at=1_000.0,
    updated_at=1_000.0,
    every_s=5.0,
    device="cpu",
    workers=2,
    archive_recordings=100,
    already_transcribed=20,
    planned_recordings=80,
    planned_shards=10,
    planned_seconds=8_000.0,
)


class Told:
    """An outbox that remembers."""

    def __init__(self) -> None:
        TOLD.clear()

    def put(self, event: str, text: str, facts: Any) -> None:
        TOLD.append((event, text))


TOLD: list[tuple[str, str]] = []


def monitor_of(put, limits=Limits(), price=3600.0, **changes) -> Monitor:  # noqa: B008
    now = time.time()
    changes = {"every_s": 60.0, **changes}
    begun = replace(BEGUN, started_at=now, updated_at=now, failures={}, **changes)
    nodes = [PaidMachine("n", "box", 2)]
    around = Surroundings(put, lambda: nodes, lambda _: None)
    return Monitor(begun, limits, Meter(lambda _: price), Told().put, around, time.monotonic())


def summary(**changes):
    return replace(SUMMARY, worker="n:7", started_at=time.time(), **changes)


def test_a_run_tells_its_state_and_its_end() -> None:
    written: list[bytes] = []
    first = threading.Event()

    def put(data: bytes) -> None:
        written.append(data)
        first.set()

    with monitor_of(put, every_s=0.01) as monitor:
        assert first.wait(5)
        assert json.loads(written[0])["state"] == "running"
        monitor.add(summary(), 800.0)
        monitor.add(summary(), 800.0)
    last = json.loads(written[-1])
    assert set(last) == {f.name for f in dataclasses.fields(Progress)}
    assert (last["state"], last["shards"], last["failures"]) == ("finished", 2, {"corrupt": 2})
    assert (last["recordings"], last["ok"], last["failed"]) == (8, 4, 2)
    assert last["planned_done_seconds"] == 1600 and last["last_failures"] == ["corrupt"] * 2
    assert last["usd"] > 0 and last["usd_per_hour"] == 3600 and last["machines"] == 1
    assert [event for event, _ in TOLD] == ["finished"]


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", ""),
        (Fatal("The bucket is gone."), "failed", "The bucket is gone."),
        (ZeroDivisionError("secret"), "failed", "unexpected ZeroDivisionError"),
    ],
)
def test_how_a_run_ends_badly(error: BaseException, state: str, reason: str) -> None:
    written: list[bytes] = []
    with pytest.raises(type(error)), monitor_of(written.append):
        raise error
    last = json.loads(written[-1])
    assert (last["state"], last["reason"]) == (state, reason)
    assert TOLD[-1][0] == state and reason in TOLD[-1][1]


def test_a_limit_stops_a_run_before_it_is_passed() -> None:
    limits = Limits(max_hours=60 / 3600)  # what is begun needs the 50 s of SUMMARY.seconds
    with monitor_of(lambda _: None, limits) as monitor:
        monitor.add(summary(), 800.0)
        assert monitor.stopped == ""
        longer = replace(SUMMARY.seconds, recognise=80.0)
        monitor.add(summary(seconds=longer), 800.0)
        assert monitor.stopped.startswith("--max-hours")
    assert TOLD[-1][0] == "stopped"


def test_a_limit_that_is_reached_with_the_last_shard_stops_nothing() -> None:
    longer = replace(SUMMARY.seconds, recognise=80.0)
    with monitor_of(lambda _: None, Limits(max_hours=60 / 3600), planned_shards=1) as monitor:
        monitor.add(summary(seconds=longer), 800.0)
        assert monitor.stopped == ""
    assert TOLD[-1][0] == "finished"


def test_each_threshold_is_told_once() -> None:
    with monitor_of(lambda _: None, Limits(max_spend=0.5), every_s=0.02) as monitor:
        deadline = time.monotonic() + 10
        while len(TOLD) < 3 and time.monotonic() < deadline:  # a dollar a second
            time.sleep(0.02)
        time.sleep(0.1)
        assert monitor.stopped == "--max-spend 0.5 is used up"
    texts = [text for event, text in TOLD if event == "budget"]
    assert [text.split(" of its budget")[0][-4:].strip() for text in texts] == [
        "50%",
        "80%",
        "100%",
    ]


def test_a_store_in_trouble_does_not_end_the_run(caplog) -> None:
    def put(_: bytes) -> None:
        raise Transient("the store is away")

    with monitor_of(put, every_s=0.01) as monitor:
        monitor.add(summary(), 800.0)
        time.sleep(0.05)
    assert "could not be written: the store is away" in caplog.text
    assert TOLD[-1][0] == "finished"


def test_without_a_price_there_is_no_cost() -> None:
    with monitor_of(lambda _: None, price=None) as monitor:
        monitor.add(summary(), 800.0)
        assert monitor.spent is None
        assert monitor.bill().as_report(600.0, {})["cost"]["usd"] is None


# ---------------------------------------------------------------- status


@pytest.fixture
def out(tmp_path):
    def write(**changes):
        progress = replace(BEGUN, **changes)
        path = tmp_path / "runs" / progress.run_id / "progress.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(progress.to_json())
        return tmp_path

    return write


def shown(out, *flags) -> dict[str, str]:
    result = CliRunner().invoke(app, ["status", str(out), *flags])
    assert result.exit_code == 0, result.output
    return {line[:12].strip(): line[12:].strip() for line in result.stdout.splitlines()}


def test_a_running_run_is_shown_with_what_remains(out) -> None:
    now = time.time()
    told = shown(
        out(
            started_at=now - 600,
            updated_at=now,
            recordings=40,
            ok=37,
            empty=1,
            failed=2,
            shards=5,
            audio_seconds=4_200.0,
            planned_done_seconds=4_000.0,
            failures={"not_audio": 1, "corrupt": 1},
            last_failures=["not_audio", "corrupt"],
            machines=3,
            usd=1.234,
            usd_per_hour=7.5,
            max_spend=50.0,
        )
    )
    assert told["state"].startswith("running for 10:00")
    assert told["recordings"].startswith("60 of 100 done (40 by this run: 37 ok, 1 empty, 2 failed")
    assert told["recordings"].endswith("40 remaining")
    assert told["RTFx"].startswith("7.0 (2 workers")
    assert told["time left"].startswith("10:00, until ")
    assert told["cost"] == "$1.23 of --max-spend 50.00, $7.50 an hour with 3 machines"
    assert told["failures"] == "corrupt 1, not_audio 1 (last: not_audio, corrupt)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "finished"}, "finished 1:00 ago after 5:00"),
        ({"state": "stopped", "reason": "--max-spend 5 is used up"}, "--max-spend 5 is used up"),
        ({"state": "interrupted"}, "interrupted 1:00 ago"),
        ({"state": "running", "every_s": 2.0}, "dead: no sign of life for 1:00."),
        ({"state": "running", "every_s": 20.0}, "running for 5:00 (told 1:00 ago)"),
    ],
)
def test_the_state_is_told_by_word_or_by_silence(out, changes, said) -> None:
    now = time.time()
    told = shown(out(started_at=now - 360, updated_at=now - 60, **changes))
    assert said in told["state"]


def test_the_newest_run_is_shown_and_older_ones_that_are_alive(out) -> None:
    now = time.time()
    out(run_id="20260101T000000Z-aaaa", state="finished", started_at=now, updated_at=now)
    # Died: the newest is its heir.
    out(run_id="20260115T000000Z-dddd", started_at=now, updated_at=now)
    out(run_id="20260201T000000Z-bbbb", started_at=now, updated_at=now, archive="/other")
    folder = out(run_id="20260301T000000Z-cccc", state="finished", started_at=now, updated_at=now)
    ids = [progress.run_id for progress in status.latest(str(folder))]
    assert ids == ["20260201T000000Z-bbbb", "20260301T000000Z-cccc"]


def test_a_run_whose_process_is_gone_is_dead_at_once(out) -> None:
    now = time.time()
    folder = out(started_at=now, updated_at=now)
    with subprocess.Popen(["sleep", "60"]) as process:
        with Claim(str(folder), BEGUN.archive, print) as claim:
            claim.take()
            left = next(folder.glob("runs/alive-*.json"))
            content = json.loads(left.read_bytes())
        assert shown(folder)["state"].startswith("running")
        content["pid"] = process.pid  # some other process than the one that began then
        left.write_text(json.dumps(content))
        process.kill()
    assert shown(folder)["state"].startswith("dead: no sign of life for 0:0")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"run_id": 1}'])
def test_what_is_no_output_is_refused_in_a_sentence(tmp_path, content: bytes) -> None:
    empty = CliRunner().invoke(app, ["status", str(tmp_path / "nothing")])
    assert empty.exit_code == 2 and "has no runs in it" in empty.stderr
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_bytes(content)
    damaged = CliRunner().invoke(app, ["status", str(tmp_path)])
    assert damaged.exit_code == 2
    assert "progress.json is damaged" in damaged.stderr and damaged.stderr.count("\n") == 1
