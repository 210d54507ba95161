"""Same bytes are found with few reads, and a shared row is the original's but for its identity."""

from __future__ import annotations

import dataclasses
import hashlib
from datetime import UTC, datetime
from pathlib import Path

import pytest

from transcribe import duplicates, publish, storage
from transcribe.archive import Recording, list_archive
from transcribe.publish import Content

LONG = 400_000


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(file name, bytes asked for) of every read of a range."""
    asked: list[tuple[str, int]] = []
    really = storage.read_range

    def read_range(uri: str, start: int, length: int) -> bytes:
        asked.append((Path(uri).name, length))
        return really(uri, start, length)

    monkeypatch.setattr(storage, "read_range", read_range)
    return asked


def listed(folder: Path, **contents: bytes) -> dict[str, Recording]:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.wav").write_bytes(content)
    return {Path(r.uri).stem: r for r in list_archive(str(folder))}


def names(found: list[duplicates.Duplicate], of: dict[str, Recording]) -> dict[str, str]:
    name_of = {r.recording_id: name for name, r in of.items()}
    return {name_of[d.recording.recording_id]: name_of[d.original] for d in found}


def content(r: Recording, data: bytes, kind: str | None = None) -> Content:
    return Content(r.recording_id, r.uri, r.size_bytes, hashlib.md5(data).hexdigest(), kind, None)


def test_only_files_alike_in_size_are_read_and_only_those_alike_at_both_ends_whole(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    same = bytes(LONG)
    middle = same[: LONG // 2] + b"x" + same[LONG // 2 + 1 :]
    of = listed(
        tmp_path / "a", single=same + b"x", c=same, a=same, other=b"x" + same[1:], middle=middle
    )
    assert names(duplicates.find(of.values(), []), of) == {"c": "a"}
    read_whole = {name for name, length in reads if length > 65_536}
    assert read_whole == {"a.wav", "c.wav", "middle.wav"}
    assert {name for name, _ in reads} == read_whole | {"other.wav"}


def test_an_md5_from_the_store_needs_no_reading(
    tmp_path: Path, reads: list[tuple[str, int]]
) -> None:
    of = listed(tmp_path / "a", a=b"1234", b=b"1234", c=b"5678")
    told = [
        dataclasses.replace(r, content_md5=hashlib.md5(Path(r.uri).read_bytes()).hexdigest())
        for r in of.values()
    ]
    assert names(duplicates.find(reversed(told), []), of) == {"b": "a"}
    assert reads == []


def test_what_is_empty_missing_or_read_by_another_extension_is_no_duplicate(tmp_path: Path) -> None:
    of = listed(tmp_path / "a", a=b"", b=b"", c=b"ulaw", gone=b"ulaw")
    (tmp_path / "a" / "d.ulaw").write_bytes(b"ulaw")
    Path(of["gone"].uri).unlink()
    everything = [*of.values(), *list_archive(str(tmp_path / "a" / "d.ulaw"))]
    assert duplicates.find(everything, []) == []


@pytest.mark.parametrize("copies", [1, 3])
def test_a_published_row_is_the_original_and_few_reads_tell_so(
    tmp_path: Path, reads: list[tuple[str, int]], copies: int
) -> None:
    """With more rows of this size than new recordings, the rows' objects are left alone."""
    data = bytes(LONG)
    old = listed(tmp_path / "old", **{f"z{n}": data for n in range(copies)})
    new = listed(tmp_path / "new", a=data)
    published = [content(r, data) for r in old.values()]
    (found,) = duplicates.find(new.values(), published)
    assert found.original == old["z0"].recording_id
    assert found.recording.content_md5 == hashlib.md5(data).hexdigest()
    assert ("z0.wav" in {name for name, _ in reads}) == (copies == 1)


def test_a_row_that_was_recognised_itself_is_preferred_to_a_copy(tmp_path: Path) -> None:
    of = listed(tmp_path / "a", a=b"1234", b=b"1234", c=b"1234")
    a, b = content(of["a"], b"1234"), content(of["b"], b"1234")
    a = dataclasses.replace(a, duplicate_of=b.recording_id)
    assert names(duplicates.find([of["c"]], [a, b]), of) == {"c": "b"}
    assert names(duplicates.find([of["c"]], [a]), of) == {"c": "a"}


@pytest.mark.parametrize(("kind", "shared"), [("corrupt", True), ("forbidden", False)])
def test_a_failure_is_shared_if_it_is_in_the_bytes(tmp_path: Path, kind: str, shared: bool) -> None:
    of = listed(tmp_path / "a", a=b"1234", b=b"1234")
    assert bool(duplicates.find([of["b"]], [content(of["a"], b"1234", kind)])) == shared
    (found,) = duplicates.find(of.values(), [])
    out = str(tmp_path / "out")
    publish.publish_shard(out, "s", [row(of["a"], b"1234", kind)])
    summaries, alone = duplicates.publish_duplicates([found], out, "run2")
    assert [s.failed for s in summaries] == ([1] if shared else [])
    assert [r.uri for r in alone] == ([] if shared else [of["b"].uri])


def row(recording: Recording, data: bytes, kind: str | None = None) -> publish.Row:
    return {
        "recording_id": recording.recording_id,
        "uri": recording.uri,
        "size_bytes": recording.size_bytes,
        "content_md5": hashlib.md5(data).hexdigest(),
        "metadata": '{"agent": 1}',
        "duration": 60.0,
        "channels": 2,
        "speech_duration": 30.0,
        "status": "failed" if kind else "ok",
        "error_kind": kind,
        "text": "hello",
        "segments": [{"id": 0, "start": 0.5, "end": 1.0, "text": "hello", "flags": []}],
        "coverage": [],
        "run_id": "run1",
        "transcribed_at": datetime(2026, 3, 1, tzinfo=UTC),
        "recognise_seconds": 5.0,
    }


def test_rows_are_shared_in_files_of_limited_size_and_counted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "ROWS_PER_FILE", 2)
    of = listed(tmp_path / "a", **{name: b"1234" for name in "abcd"})
    out = str(tmp_path / "out")
    publish.publish_shard(out, "s", [row(of["a"], b"1234")])
    found = duplicates.find([of[name] for name in "bcd"], [content(of["a"], b"1234")])
    summaries, alone = duplicates.publish_duplicates(found, out, "run2")
    assert alone == []
    assert [(s.recordings, s.duplicates, s.ok) for s in summaries] == [(2, 2, 2), (1, 1, 1)]
    assert sum(s.duplicate_seconds for s in summaries) == 180.0
    assert {s.audio_seconds + s.channel_seconds + s.speech_seconds for s in summaries} == {0.0}
    ids = {r.recording_id for r in of.values()}
    made = {r["uri"]: r for r in publish.read_whole_rows(out, ids)}
    original = made.pop(of["a"].uri)
    assert set(made) == {of[name].uri for name in "bcd"}
    for shared in made.values():
        assert shared["duplicate_of"] == original["recording_id"]
        assert shared["segments"] == original["segments"] and shared["text"] == "hello"
        assert shared["metadata"] is None and shared["run_id"] == "run2"
        assert shared["recognise_seconds"] == 0.0


def test_an_original_that_was_replaced_before_it_was_read_shares_nothing(tmp_path: Path) -> None:
    of = listed(tmp_path / "a", a=b"1234", b=b"1234")
    found = duplicates.find(of.values(), [])
    out = str(tmp_path / "out")
    publish.publish_shard(out, "s", [row(of["a"], b"5678")])
    summaries, alone = duplicates.publish_duplicates(found, out, "run2")
    assert (summaries, [r.uri for r in alone]) == ([], [of["b"].uri])
