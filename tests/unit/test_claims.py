"""One run of an archive at a time in OUT; whoever died is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transcribe import claims, processes, storage
from transcribe.claims import Claim
from transcribe.errors import Fatal


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(claims, "BEAT_S", 0.05)
    monkeypatch.setattr(claims, "DEAD_AFTER_S", 0.6)
    monkeypatch.setattr(claims, "_LOOK_EVERY_S", 0.02)
    return str(tmp_path / "out")


def _left(out: str) -> list[str]:
    return sorted(path.name for path in Path(out).rglob("*") if path.is_file())


def test_a_claim_is_there_while_it_is_held(out: str) -> None:
    with Claim(out, "/calls", print) as claim:
        assert _left(out) == []
        claim.take()
        (name,) = _left(out)
        said = json.loads(Path(out, "runs", name).read_text())
        assert (said["archive"], said["pid"]) == ("/calls", os.getpid())
    assert _left(out) == []


def test_a_living_run_is_named_and_kept(out: str) -> None:
    said: list[str] = []
    with Claim(out, "gs://user:pw@archive/calls", print) as first:
        first.take()
        with (
            Claim(out, "gs://user:pw@archive/calls", said.append) as second,
            pytest.raises(
                Fatal, match=rf"Another run of gs://archive/calls \(process {os.getpid()}"
            ),
        ):
            second.take()
        assert len(_left(out)) == 1
        with Claim(out, "gs://user:pw@archive/calls", print) as third, pytest.raises(Fatal):
            third.take()
    assert ["watching" in line for line in said] == [True]
    assert "pw" not in said[0]


def test_another_archive_may_share_out_and_is_mentioned(out: str) -> None:
    said: list[str] = []
    with (
        Claim(out, "/calls/2025", print) as first,
        Claim(out, "/calls/2026", said.append) as second,
    ):
        first.take()
        second.take()
        assert len(_left(out)) == 2
    assert ["another run of /calls/2025" in line for line in said] == [True]
    assert _left(out) == []


def _leave(out: str, **changes: object) -> None:
    """The claim of a run that ended without goodbye."""
    with Claim(out, "/calls", print) as claim:
        claim.take()
        (name,) = _left(out)
        content = json.loads(Path(out, "runs", name).read_text())
    Path(out, "runs", name).write_text(json.dumps({**content, **changes}))


def test_a_dead_run_of_this_machine_is_taken_over_at_once(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    _leave(out, pid=child.pid, process_started=processes.started(child.pid))
    child.kill()  # it stays a zombie until it is waited for
    while processes.started(child.pid):
        time.sleep(0.01)
    monkeypatch.setattr(claims, "DEAD_AFTER_S", 300.0)
    said: list[str] = []
    with Claim(out, "/calls", said.append) as claim:
        claim.take()
    child.communicate()
    _leave(out, process_started="1")  # the number belongs to another process now
    with Claim(out, "/calls", said.append) as claim:
        claim.take()
    assert said == []
    assert _left(out) == []


def test_a_silent_run_of_another_machine_is_taken_over_after_a_while(out: str) -> None:
    _leave(out, machine="another", host="worker-3")
    said: list[str] = []
    with Claim(out, "/calls", said.append) as claim:
        claim.take()
    assert ["worker-3" in line for line in said] == [True, False]
    assert said[1] == "There was none; going on from what it has published."


def test_a_run_that_ends_while_it_is_watched_is_followed(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 300.0)
    monkeypatch.setattr(claims, "DEAD_AFTER_S", 300.0)
    said: list[str] = []
    first = Claim(out, "/calls", print)
    first.take()

    def say(sentence: str) -> None:
        said.append(sentence)
        if "watching" in sentence:
            first.__exit__(None, None, None)

    with Claim(out, "/calls", say) as second:
        second.take()
        assert len(_left(out)) == 1
    assert said[1:] == ["It has ended; going on from what it has published."]


def test_a_claim_that_says_nothing_is_taken_over(out: str) -> None:
    _leave(out)
    for content in (b"", b"{}", b"[1]", b'{"token": 1, "more": 2}'):
        with Claim(out, "/calls", print) as claim:
            claim.take()
            (name,) = _left(out)
        storage.put(f"{out}/runs/{name}", content)
        with Claim(out, "/calls", print) as claim:
            claim.take()
        assert _left(out) == []


def test_who_was_taken_for_dead_says_so_and_removes_nothing(
    out: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Claim(out, "/calls", print) as first:
        first.take()
        (name,) = _left(out)
        storage.put(f"{out}/runs/{name}", b"another's")
        first._beating.join(10)
        assert "end one of the two" in caplog.text
    assert _left(out) == [name]
