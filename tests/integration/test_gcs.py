"""Storage and archive on a bucket: the emulator speaks Google's JSON API over loopback."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transcribe import archive, duplicates, publish, retries, storage
from transcribe.errors import BadAudio, Fatal, Transient
from transcribe.evaluate import evaluate, json_bytes

ODD_NAMES = [
    "with space.wav",
    "hash#1.wav",
    "q?generation=3.wav",
    "pct%20.wav",
    "[x].wav",
    "ü/ß.wav",
]


def test_an_object_is_listed_read_ranged_and_replaced(gcs_bucket: str) -> None:
    uri = storage.join(gcs_bucket, "calls", "a.wav")
    content = random.Random(0).randbytes(100_000) + b"\r\n\n"
    storage.put(uri, content)
    (first,) = storage.list_objects(gcs_bucket)
    assert (first.uri, first.size_bytes) == (uri, len(content))
    assert first.md5 == hashlib.md5(content).hexdigest()
    assert storage.read(uri) == content
    assert storage.read_range(uri, 90_000, 1_000) == content[90_000:91_000]
    assert storage.read_range(uri, 99_990, 1_000) == content[99_990:]
    assert storage.read_range(uri, 200_000, 10) == b""
    storage.put(uri, content)
    (second,) = storage.list_objects(uri)
    assert second.version != first.version
    assert second.md5 == first.md5


def test_prefix_glob_and_single_object(gcs_bucket: str) -> None:
    names = ["2026-01/a.wav", "2026-01/deep/b.wav", "2026-02/c.wav", "2026-10/d.mp3"]
    for name in names:
        storage.put(storage.join(gcs_bucket, name), b"x")

    def listed(below: str) -> list[str]:
        found = storage.list_objects(storage.join(gcs_bucket, below))
        return [o.uri.removeprefix(gcs_bucket + "/") for o in found]

    assert listed("") == names
    assert listed("2026-01/") == names[:2]
    assert listed("2026-0*") == names[:3]
    assert listed("**/*.wav") == names[:3]
    assert listed("*/[cd].*") == names[2:]
    assert listed("2026-02/c.wav") == [names[2]]
    with pytest.raises(Fatal, match="does not exist"):
        listed("2026-1")
    with pytest.raises(Fatal, match="nothing matches"):
        listed("*.ogg")


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_survive(gcs_bucket: str, name: str) -> None:
    uri = f"{gcs_bucket}/calls/{name}"
    storage.put(uri, name.encode())
    assert [o.uri for o in storage.list_objects(gcs_bucket)] == [uri]
    assert [o.uri for o in storage.list_objects(uri)] == [uri]
    assert storage.read(uri) == name.encode()


def test_exists_delete_and_check_writable(gcs_bucket: str) -> None:
    uri = storage.join(gcs_bucket, "out/a")
    assert not storage.exists(uri)
    storage.put(uri, b"")
    assert storage.exists(uri)
    assert storage.exists(storage.join(gcs_bucket, "out"))
    assert storage.read(uri) == b""
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)
    storage.check_writable(storage.join(gcs_bucket, "out"))
    assert list(storage.list_objects(gcs_bucket)) == []


def test_what_is_missing_says_so(gcs_bucket: str) -> None:
    with pytest.raises(BadAudio) as caught:
        storage.read(storage.join(gcs_bucket, "gone.wav"))
    assert caught.value.kind == "missing"
    for use in (
        lambda: list(storage.list_objects("gs://no-such-bucket/calls")),
        lambda: storage.put("gs://no-such-bucket/a", b""),
        lambda: storage.check_writable("gs://no-such-bucket/out"),
        lambda: archive.list_archive("gs://no-such-bucket"),
    ):
        with pytest.raises(Fatal, match="gs://no-such-bucket"):
            use()


def test_parquet_is_read_by_ranges(gcs_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = storage.join(gcs_bucket, "t.parquet")
    table = pa.table(
        {"id": range(1000), "blob": [random.Random(i).randbytes(9000) for i in range(1000)]}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.put(uri, buffer.getvalue())
    lengths: list[int] = []
    original = storage.read_range

    def counted(uri: str, start: int, length: int) -> bytes:
        lengths.append(length)
        return original(uri, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    with storage.open_parquet_source(uri) as source:
        assert pq.read_table(source, columns=["id"]) == table.select(["id"])
    assert sum(lengths) < len(buffer.getvalue()) / 2
    with pytest.raises(Fatal, match="does not exist"):
        storage.open_parquet_source(uri + "x")


def test_an_error_while_parquet_is_read_keeps_its_kind(
    gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = storage.join(gcs_bucket, "t.parquet")
    buffer = io.BytesIO()
    pq.write_table(pa.table({"x": [1]}), buffer)
    storage.put(uri, buffer.getvalue())

    def fails(uri: str, start: int, length: int) -> bytes:
        raise Transient("away")

    source = storage.open_parquet_source(uri)
    monkeypatch.setattr(storage, "read_range", fails)
    with pytest.raises(Transient, match="away"):
        pq.read_table(source)


def _read_in_child(uri: str, answers) -> None:
    answers.put(storage.read(uri))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_storage_works_in_a_child_process(gcs_bucket: str, method: str) -> None:
    uri = storage.join(gcs_bucket, "a.wav")
    storage.put(uri, b"content")
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(uri, answers))
    child.start()
    try:
        assert answers.get(timeout=60) == b"content"
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("extension", ["csv", "jsonl", "parquet"])
def test_a_manifest_in_the_bucket(gcs_bucket: str, extension: str) -> None:
    other = storage.join(gcs_bucket, "other/b.wav")
    rows = [{"uri": "calls/a.wav", "team": "x"}, {"uri": other, "team": "y"}]
    rows += [{"uri": "../gone.wav", "team": "z"}, {"uri": "./calls/a.wav", "team": "again"}]
    storage.put(storage.join(gcs_bucket, "lists/calls/a.wav"), b"audio")
    storage.put(other, b"more audio")
    manifest = f"{gcs_bucket}/lists/m.{extension}"
    storage.put(manifest, _manifest(rows, extension))
    found = {r.uri.removeprefix(gcs_bucket): r for r in archive.list_archive(manifest)}
    assert sorted(found) == ["/gone.wav", "/lists/calls/a.wav", "/other/b.wav"]
    assert json.loads(found["/lists/calls/a.wav"].metadata or "") == {"team": "x"}
    assert found["/other/b.wav"].content_md5 == hashlib.md5(b"more audio").hexdigest()
    assert (found["/gone.wav"].size_bytes, found["/gone.wav"].generation) == (0, "missing")


def _manifest(rows: list[dict[str, str]], extension: str) -> bytes:
    if extension == "csv":
        return ("uri,team\n" + "".join(f"{r['uri']},{r['team']}\n" for r in rows)).encode()
    if extension == "jsonl":
        return "".join(json.dumps(r) + "\n" for r in rows).encode()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def test_looking_up_by_listing_agrees_with_asking_singly(
    gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.wav", "b.wav", "c.wav", "z/z.wav"):
        storage.put(storage.join(gcs_bucket, name), name.encode())
    rows = [{"uri": name, "team": "x"} for name in ("c.wav", "a.wav", "none.wav")]
    storage.put(storage.join(gcs_bucket, "m.csv"), _manifest(rows, "csv"))
    singly = archive.list_archive(storage.join(gcs_bucket, "m.csv"))
    monkeypatch.setattr(archive, "N_LISTED_INSTEAD_OF_LOOKED_UP", 1)
    assert archive.list_archive(storage.join(gcs_bucket, "m.csv")) == singly


def test_only_a_sample_of_a_bucket_is_probed(
    gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(40):
        storage.put(f"{gcs_bucket}/{i:02}.wav", b"x" * (8000 + 400 * i))
    reads: list[str] = []
    monkeypatch.setattr(
        storage, "read_range", lambda uri, start, length: reads.append(uri) or b"head"
    )
    monkeypatch.setattr("transcribe.probe.probe_seconds", lambda head, size, name, told: size / 800)
    listed = archive.list_archive(gcs_bucket)
    assert [r.duration_s for r in listed] == [max(1, r.size_bytes / 16_000) for r in listed]
    estimated = archive.estimate_durations(listed)
    assert len(set(reads)) == len(reads) == 16
    assert [r.duration_s for r in estimated] == [r.size_bytes / 800 for r in estimated]


def test_a_store_that_is_away_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(retries, "IMPATIENT_S", 0.1)
    with pytest.raises(Transient, match=r"gs://archive/a\.wav"):
        storage.read("gs://archive/a.wav")


def test_a_score_from_bucket_to_bucket(gcs_bucket: str) -> None:
    out, file = storage.join(gcs_bucket, "out"), storage.join(gcs_bucket, "said", "sample.csv")
    row = {"recording_id": "1", "uri": storage.join(gcs_bucket, "calls/a.wav"), "status": "ok"}
    row |= {"language": "en", "duration": 2.0, "text": "hello old world"}
    publish.publish_shard(out, "abc", [row])
    storage.put(file, b"path,reference\n../calls/a.wav,Hello world!\n")
    storage.put(storage.join(out, "score.json"), json_bytes(evaluate(out, file)))
    written = json.loads(storage.read(storage.join(out, "score.json")))
    assert (written["matched_by_ending"], written["total"]["wer"]) == (0, 1 / 2)


def test_a_buckets_md5_tells_duplicates_without_reading(
    gcs_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in {"b": b"same", "a": b"same", "c": b"else"}.items():
        storage.put(storage.join(gcs_bucket, f"{name}.wav"), content)
    recordings = archive.list_archive(gcs_bucket)
    monkeypatch.delattr(storage, "read_range")
    (found,) = duplicates.find(recordings, [])
    assert (found.recording.uri, found.original) == (
        f"{gcs_bucket}/b.wav",
        recordings[0].recording_id,
    )
    assert found.recording.content_md5 == hashlib.md5(b"same").hexdigest()
