"""A bucket that fails: what is tried again, what is not, and nothing is lost or taken twice."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.faulty_bucket import DONE_BUT_UNSAID, PASSING, FaultyBucket
from transcribe import archive, retries, storage
from transcribe.errors import BadAudio, Fatal, Transient

CONTENT = random.Random(0).randbytes(200_000)


@pytest.fixture
def faulty(
    gcs_bucket: str, gcs_emulator: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyBucket]:
    """A proxy between `storage` and the bucket; it breaks nothing until it is told to."""
    with FaultyBucket(gcs_emulator).serving() as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.address)
        monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
        monkeypatch.setattr(storage, "_SILENCE_S", 0.3)  # the drips of "slow" are further apart
        yield proxy


Use = Callable[[str], object]

USES: dict[str, Use] = {
    "list": lambda url: [o.size_bytes for o in storage.list_objects(f"{url}/calls/")],
    "info": lambda url: (found := storage.info(f"{url}/calls/a.wav")) and found.size_bytes,
    "read": lambda url: storage.read(f"{url}/calls/a.wav"),
    "range": lambda url: storage.read_range(f"{url}/calls/a.wav", 1000, 50_000),
    "write": lambda url: storage.put(f"{url}/calls/a.wav", CONTENT),
    "delete": lambda url: storage.delete(f"{url}/calls/a.wav"),
}
EXPECTED = {
    "list": [len(CONTENT)],
    "info": len(CONTENT),
    "read": CONTENT,
    "range": CONTENT[1000:51_000],
    "write": None,
    "delete": None,
}
# An answer without a body that anybody reads cannot be cut short.
FAULTS = [
    (operation, fault)
    for operation in USES
    for fault in PASSING + (DONE_BUT_UNSAID if operation in ("write", "delete") else ())
    if operation != "delete" or fault not in ("cut", "short", "slow")
]


@pytest.mark.parametrize(("operation", "fault"), FAULTS)
def test_what_may_pass_is_tried_again(
    gcs_bucket: str, faulty: FaultyBucket, operation: str, fault: str
) -> None:
    storage.put(f"{gcs_bucket}/calls/a.wav", CONTENT)
    faulty.seen.clear()
    faulty.due[operation] = deque([fault, fault])
    assert USES[operation](gcs_bucket) == EXPECTED[operation]
    assert faulty.injected[operation, fault] == 2
    assert faulty.seen[operation] == 3
    there = {o.uri: o.md5 for o in storage.list_objects(gcs_bucket)}
    whole = hashlib.md5(CONTENT).hexdigest()
    assert there == ({} if operation == "delete" else {f"{gcs_bucket}/calls/a.wav": whole})


@pytest.mark.parametrize("operation", USES)
@pytest.mark.parametrize("fault", ["400", "403"])
def test_what_will_not_pass_is_asked_once(
    gcs_bucket: str, faulty: FaultyBucket, operation: str, fault: str
) -> None:
    storage.put(f"{gcs_bucket}/calls/a.wav", CONTENT)
    faulty.seen.clear()
    faulty.due[operation] = deque([fault])
    if operation == "info":  # "may not be seen"
        assert USES[operation](gcs_bucket) is None
    else:
        with pytest.raises(BadAudio if operation in ("read", "range") else Fatal):
            USES[operation](gcs_bucket)
    assert faulty.seen[operation] == 1


# ---------------------------------------------------------------- what stays broken


def test_a_store_that_is_down_is_an_error_within_the_budget(
    gcs_bucket: str, faulty: FaultyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.put(f"{gcs_bucket}/calls/a.wav", CONTENT)
    monkeypatch.setattr(retries, "IMPATIENT_S", 0.5)
    monkeypatch.setattr(retries, "PATIENCE_S", 1.5)
    for breaking in ("down", "refusing"):
        faulty.is_down, faulty.is_refusing = breaking == "down", 503
        for use in USES.values():
            with pytest.raises(Transient, match=r"\(tried for [01] s\)"):
                use(gcs_bucket)
    started = time.monotonic()
    with retries.patient(), pytest.raises(Transient, match=r"\(tried for [12] s\)"):
        storage.read(f"{gcs_bucket}/calls/a.wav")
    assert time.monotonic() - started > 0.5  # waited longer than at the start of a run


def test_one_object_that_never_comes_whole_is_a_row(
    gcs_bucket: str, faulty: FaultyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.wav", "b.wav"):
        storage.put(f"{gcs_bucket}/calls/{name}", CONTENT)
    monkeypatch.setattr(retries, "IMPATIENT_S", 0.3)
    for fault, said in {"short": "100,000 of 200,000 bytes", "500": "HTTP status 500"}.items():
        faulty.due["read"] = deque([fault] * 1000)
        with pytest.raises(BadAudio, match=f"a.wav: {said}.*while its store answers") as caught:
            storage.read(f"{gcs_bucket}/calls/a.wav")
        assert caught.value.kind == "unreadable"
    faulty.due.clear()
    assert storage.read(f"{gcs_bucket}/calls/b.wav") == CONTENT


def test_bytes_that_changed_on_their_way_are_not_taken(
    gcs_bucket: str, faulty: FaultyBucket
) -> None:
    storage.put(f"{gcs_bucket}/calls/a.wav", CONTENT)
    faulty.due["read"] = deque(["flip", "flip"])
    assert storage.read(f"{gcs_bucket}/calls/a.wav") == CONTENT
    assert faulty.seen["read"] == 3


# ---------------------------------------------------------------- a world that does not stand still


def test_a_listing_that_changes_while_it_is_read(gcs_bucket: str, faulty: FaultyBucket) -> None:
    """What is there all the time is listed once; what goes or comes may or may not be."""
    for n in range(20):
        storage.put(f"{gcs_bucket}/calls/{n:02}.wav", b"sound")
    faulty.page_size = 4
    changes = iter([("delete", "01"), ("put", "02b"), ("delete", "19"), ("put", "18b")])

    def change() -> None:
        what, name = next(changes)
        method = {"delete": "DELETE", "put": "POST"}[what]
        bucket = gcs_bucket.removeprefix("gs://")
        path = f"/storage/v1/b/{bucket}/o/calls%2F{name}.wav"
        if what == "put":
            path = f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name=calls/{name}.wav"
        assert faulty.upstream(method, path, b"sound")[0] in (200, 204)

    faulty.between_pages = change
    faulty.due["list"] = deque(["cut", "503"])
    found = [r.uri.removeprefix(f"{gcs_bucket}/calls/") for r in archive.list_archive(gcs_bucket)]
    steady = [f"{n:02}.wav" for n in range(20) if n not in (1, 19)]
    assert found == sorted({*steady, "01.wav", "18b.wav"})  # "19" went before, "02b" came behind


def test_ranges_of_an_object_that_is_replaced_are_not_mixed(
    gcs_bucket: str, faulty: FaultyBucket
) -> None:
    uri = f"{gcs_bucket}/calls/a.wav"
    storage.put(uri, CONTENT)
    listed = storage.info(uri)
    assert storage.read_range(uri, 0, 10, listed.version) == CONTENT[:10]
    storage.put(uri, CONTENT[::-1])
    with pytest.raises(BadAudio) as caught:
        storage.read_range(uri, 10, 10, listed.version)
    assert caught.value.kind == "missing"
    assert storage.read_range(uri, 10, 10) == CONTENT[::-1][10:20]


def test_a_condition_decides_who_writes(gcs_bucket: str, faulty: FaultyBucket) -> None:
    uri = f"{gcs_bucket}/out/claim"
    faulty.due["write"] = deque(["lost", "after"])  # stored, and not known to be
    first = storage.put_if(uri, b"mine", None)
    assert first is not None
    assert storage.put_if(uri, b"theirs", None) is None
    second = storage.put_if(uri, b"mine again", first)
    assert second not in (None, first)
    assert storage.put_if(uri, b"late", first) is None
    assert not storage.delete_if(uri, first)
    assert storage.read(uri) == b"mine again"
    faulty.due["delete"] = deque(["lost"])
    assert storage.delete_if(uri, second)
    assert not storage.exists(uri)


# ---------------------------------------------------------------- whole runs


def _command(archive: str, out: str) -> list[str]:
    flags = ["--model", "fake", "--shard-minutes", "0.05", "--max-failed", "0.5"]
    return [sys.executable, "-m", "jobs.transcribe", archive, out, *flags]


def _start(archive: str, out: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(archive, out),
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _rows(out: Path) -> list[dict]:
    return pq.read_table(out / "transcripts").sort_by("uri").to_pylist()


def _texts(rows: list[dict]) -> list[tuple]:
    return [(r["uri"].rpartition("/")[2], r["status"], r["error_kind"], r["text"]) for r in rows]


def test_of_two_runs_started_at_once_one_is_refused(tmp_path: Path, write_archive) -> None:
    calls, out = write_archive(tmp_path / "calls", 4), tmp_path / "out"
    runs = [_start(str(calls), str(out)) for _ in range(2)]
    said = [run.communicate(timeout=200) for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 2], said
    refusal = said[codes.index(2)][1]
    other = runs[codes.index(0)]
    assert f"Error: Another run of {calls} (process {other.pid} of " in refusal
    assert refusal.count("\n") == 1
    rows = _rows(out)
    assert [row["uri"] for row in rows] == [str(p) for p in sorted(calls.iterdir())]
    assert len({row["run_id"] for row in rows}) == 1
    assert list((out / "runs").glob("alive-*")) == []


def test_two_runs_of_overlapping_archives_share_one_out(tmp_path: Path, write_archive) -> None:
    calls, out = write_archive(tmp_path / "calls", 4), tmp_path / "out"
    more = write_archive(calls / "more", 2)
    runs = [_start(str(calls), str(out)), _start(str(more), str(out))]
    said = [run.communicate(timeout=200) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    rows = _rows(out)
    assert [row["uri"] for row in rows] == sorted(str(p) for p in calls.rglob("*.wav"))
    assert list((out / "runs").glob("alive-*")) == []
