"""A bucket that fails: what is tried again, what is not, and nothing is lost or taken twice."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.integration.faulty_bucket import DONE_BUT_UNSAID, PASSING, FaultyBucket
from transcribe import archive, pipeline, publish, retries, run, storage
from transcribe.config import RunConfig
from transcribe.engines.load import load_engine
from transcribe.errors import BadAudio, Fatal, Transient
from transcribe.pipeline import Job

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


def _command(archive: str, out: str, model: str = "fake") -> list[str]:
    flags = ["--model", model, "--shard-minutes", "0.05", "--max-failed", "0.5"]
    return [sys.executable, "-m", "jobs.transcribe", archive, out, *flags]


def _start(archive: str, out: str, model: str = "fake", **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(archive, out, model),
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
    slow = "fake@0.8"  # at work for longer than two signs of life are apart
    runs = [_start(str(calls), str(out), slow) for _ in range(2)]
    said = [each.communicate(timeout=200) for each in runs]
    codes = [each.returncode for each in runs]
    assert sorted(codes) == [0, 2], said
    refusal = said[codes.index(2)][1]
    other = runs[codes.index(0)]
    assert f"Error: Another run of {calls} (process {other.pid} of " in refusal
    assert refusal.count("\n") == 1
    rows = _rows(out)
    assert [row["uri"] for row in rows] == [str(p) for p in sorted(calls.iterdir())]
    assert len({row["run_id"] for row in rows}) == 1
    assert list((out / "runs").glob("alive-*")) == []


@pytest.mark.long
def test_two_runs_of_overlapping_archives_share_one_out(tmp_path: Path, write_archive) -> None:
    calls, out = write_archive(tmp_path / "calls", 4), tmp_path / "out"
    more = write_archive(calls / "more", 2)
    runs = [_start(str(calls), str(out)), _start(str(more), str(out))]
    said = [each.communicate(timeout=200) for each in runs]
    assert [each.returncode for each in runs] == [0, 0], said
    rows = _rows(out)
    assert [row["uri"] for row in rows] == sorted(str(p) for p in calls.rglob("*.wav"))
    assert list((out / "runs").glob("alive-*")) == []


def _filled(bucket: str, calls: Path) -> str:
    url = f"{bucket}/calls"
    for path in sorted(calls.iterdir()):
        storage.put(f"{url}/{path.name}", path.read_bytes())
    return url


def _bucket_rows(out: str) -> list[dict]:
    files = [o.uri for o in storage.list_objects(f"{out}/transcripts")]
    tables = [pq.read_table(io.BytesIO(storage.read(uri))) for uri in files]
    return pa.concat_tables(tables).sort_by("uri").to_pylist()


def _run_in_this_process(archive: str, out: str) -> list[dict]:
    """All that a run does, without Ray."""
    config = RunConfig(archive, out, model="fake", shard_minutes=0.05)
    plan = run.prepare(config, print)
    job = Job(config, plan.run_id, "fake", "fake", plan.config_fingerprint, "cpu")
    list(pipeline.run_shards(plan.shards, job, load_engine(job)))
    publish.settle(out)
    return _bucket_rows(out)


@pytest.mark.parametrize("seed", [1, 2])
def test_rows_through_a_failing_bucket_are_those_of_a_sound_one(
    gcs_bucket: str, faulty: FaultyBucket, tmp_path: Path, write_archive, seed: int
) -> None:
    """A quarter of all requests fails, in every way that there is."""
    calls = _filled(gcs_bucket, write_archive(tmp_path / "calls", 6))
    sound = _run_in_this_process(calls, f"{gcs_bucket}/sound")
    faulty.random.seed(seed)
    faulty.odds = 0.25
    rows = _run_in_this_process(calls, f"{gcs_bucket}/failing")
    again = _run_in_this_process(calls, f"{gcs_bucket}/failing")
    faulty.odds = 0.0
    assert _texts(rows) == _texts(again) == _texts(sound)
    assert [row["content_md5"] for row in rows] == [row["content_md5"] for row in sound]
    assert sum(faulty.injected.values()) > 10

    def names(out: str) -> list[str]:
        return [
            o.uri.removeprefix(f"{gcs_bucket}/{out}")
            for o in storage.list_objects(f"{gcs_bucket}/{out}")
        ]

    assert names("failing") == names("sound")


# Patience is for people; a test has less.
LESS_PATIENCE = """
from transcribe import retries
retries.IMPATIENT_S, retries.PATIENCE_S, retries.LONGEST_WAIT_S = 2.0, {patience}, 0.5
"""


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("patience", "code"), [(4.0, 2), (120.0, 0)], ids=["long", "short"])
def test_an_outage_ends_a_run_in_a_sentence_or_is_waited_out(
    gcs_bucket: str, faulty: FaultyBucket, tmp_path: Path, write_archive, patience: float, code: int
) -> None:
    calls = _filled(gcs_bucket, write_archive(tmp_path / "calls", 10))
    out = f"{gcs_bucket}/out"
    (tmp_path / "sitecustomize.py").write_text(LESS_PATIENCE.format(patience=patience))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    begun = _start(calls, out, PYTHONPATH=path)
    while begun.poll() is None and not storage.exists(f"{out}/transcripts"):
        time.sleep(0.05)
    assert begun.poll() is None, begun.communicate()
    faulty.is_down = True
    if code == 0:
        time.sleep(8)
        faulty.is_down = False
    _, stderr = begun.communicate(timeout=250)
    faulty.is_down = False
    assert begun.returncode == code, stderr
    if code == 2:
        assert re.match(
            r"Error: cannot \w+ gs://\S+: \w+ \(tried for \d+ s\); run the same", stderr
        )
        assert stderr.count("\n") == 1
        published = _bucket_rows(out)
        assert 0 < len(published) < 12
        again = _start(calls, out, PYTHONPATH=path)
        assert again.wait(timeout=250) == 0, again.communicate()
        kept = {row["uri"]: row for row in _bucket_rows(out)}
        assert all(kept[row["uri"]] == row for row in published)
    uris = [row["uri"] for row in _bucket_rows(out)]
    assert uris == [o.uri for o in storage.list_objects(calls)]
