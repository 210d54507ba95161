"""OUT keeps its promises: whole files, one row a recording, one set of settings."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcribe import config, publish, schema, storage
from transcribe.errors import Fatal, Transient

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


def row(uri: str, version: int = 1, minute: int | None = None, status: str = "ok") -> dict:
    return {
        "recording_id": f"{uri}#{version}",
        "uri": uri,
        "status": status,
        "text": f"text of {uri} {version}",
        "segments": [{"id": 0, "start": 0.5, "end": 1.0, "text": "hm", "flags": ["loop"]}],
        "coverage": [],
        "transcribed_at": NOON + timedelta(minutes=version if minute is None else minute),
    }


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def files(out: str) -> dict[str, bytes]:
    """Everything below OUT by relative path, hidden files too."""
    found = (p for p in Path(out).rglob("*") if p.is_file())
    return {str(p.relative_to(out)): p.read_bytes() for p in found}


def published(out: str) -> list[tuple[str, str]]:
    """(recording_id, text) of every row, sorted."""
    tables = [pq.read_table(io.BytesIO(data)) for data in files(out).values()]
    rows = [r for table in tables for r in table.to_pylist()]
    return sorted((r["recording_id"], r["text"]) for r in rows)


# ---- one shard --------------------------------------------------------------------------


def test_a_shard_is_one_file_named_by_its_id(out: str) -> None:
    url = publish.publish_shard(out, "abc", [row("/a"), row("/b")])
    assert url == f"{out}/transcripts/abc.parquet"
    assert set(files(out)) == {"transcripts/abc.parquet"}
    table = pq.read_table(url)
    assert table.schema.equals(schema.TRANSCRIPT)
    first = table.to_pylist()[0]
    assert {name: first[name] for name in ("uri", "text", "transcribed_at")} == {
        "uri": "/a",
        "text": "text of /a 1",
        "transcribed_at": NOON + timedelta(minutes=1),
    }
    assert first["segments"][0]["flags"] == ["loop"] and first["segments"][0]["words"] is None


def test_a_shard_published_twice_is_there_once(out: str) -> None:
    publish.publish_shard(out, "abc", [row("/a"), row("/b")])
    before = files(out)
    publish.publish_shard(out, "abc", [row("/a"), row("/b")])
    assert files(out) == before


def test_a_shard_that_cannot_be_written_leaves_the_old_one(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.publish_shard(out, "abc", [row("/a")])
    before = files(out)

    def full_disk(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(Fatal, match=r"abc\.parquet: No space left on device"):
        publish.publish_shard(out, "abc", [row("/a", 2)])
    assert files(out) == before


# ---- what is published ------------------------------------------------------------------


def test_nothing_is_published_in_a_new_out(out: str) -> None:
    assert set(publish.read_published(out).recording_ids.to_pylist()) == set()
    assert publish.settle(out).removed == 0
    assert publish.read_published(out).counts == {"ok": 0, "empty": 0, "failed": 0}
    assert not Path(out).exists()


def test_published_ids_and_counts_are_those_of_all_files(out: str) -> None:
    publish.publish_shard(out, "one", [row("/a"), row("/b", status="failed")])
    publish.publish_shard(out, "two", [row("/c", status="empty"), row("/d")])
    Path(out, "transcripts", ".half-written.tmp").write_bytes(b"half")
    assert set(publish.read_published(out).recording_ids.to_pylist()) == {
        "/a#1",
        "/b#1",
        "/c#1",
        "/d#1",
    }
    assert publish.read_published(out).counts == {"ok": 2, "empty": 1, "failed": 1}


# ---- settle -----------------------------------------------------------------------------


def test_the_newest_row_of_a_uri_stays(out: str) -> None:
    publish.publish_shard(out, "z-old", [row("/a", 1), row("/b", 1)])
    publish.publish_shard(out, "a-new", [row("/a", 2)])
    assert publish.settle(out).removed == 1
    assert published(out) == [("/a#2", "text of /a 2"), ("/b#1", "text of /b 1")]
    assert publish.settle(out).removed == 0


def test_a_file_without_rows_left_is_deleted(out: str) -> None:
    publish.publish_shard(out, "old", [row("/a", 1), row("/b", 1)])
    publish.publish_shard(out, "new", [row("/a", 2), row("/b", 2)])
    assert publish.settle(out).removed == 2
    assert set(files(out)) == {"transcripts/new.parquet"}


def test_rows_that_stay_keep_every_value(out: str) -> None:
    publish.publish_shard(out, "old", [row("/a", 1), row("/b", 1)])
    kept = pq.read_table(Path(out, "transcripts", "old.parquet")).to_pylist()[1]
    publish.publish_shard(out, "new", [row("/a", 2)])
    publish.settle(out)
    assert pq.read_table(Path(out, "transcripts", "old.parquet")).to_pylist() == [kept]


def test_what_the_store_refused_is_tried_again_until_it_is_read(out: str) -> None:
    refused = [row("/a", status="failed"), row("/b", status="failed"), row("/c", status="failed")]
    for each, kind in zip(refused, ("forbidden", "unreadable", "not_audio"), strict=True):
        each["error_kind"] = kind
    publish.publish_shard(out, "one", [*refused, row("/d")])
    assert set(publish.read_published(out).recording_ids.to_pylist()) == {"/c#1", "/d#1"}
    publish.publish_shard(out, "two", [row("/a", minute=5)])
    assert set(publish.read_published(out).recording_ids.to_pylist()) == {"/a#1", "/c#1", "/d#1"}
    assert publish.settle(out).removed == 1
    assert dict(published(out))["/a#1"] == "text of /a 1"


def test_files_without_superseded_rows_are_not_touched(
    out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish.publish_shard(out, "one", [row("/a")])
    publish.publish_shard(out, "two", [row("/b")])
    for step in ("put", "put_if", "delete", "delete_if"):
        monkeypatch.setattr(storage, step, _refuse_after(0))
    assert publish.settle(out).removed == 0


def _refuse_after(n: int, step: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """`step`, but out of reach from its call number `n` on: the process dies there."""
    calls = []

    def refusing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > n or step is None:
            raise Transient("the store is out of reach")
        return step(*args)

    return refusing


@pytest.mark.parametrize("step", ["put_if", "delete_if"])
@pytest.mark.parametrize("done", [0, 1])
def test_settle_can_end_anywhere_and_be_done_again(
    out: str, monkeypatch: pytest.MonkeyPatch, step: str, done: int
) -> None:
    for shard in range(3):  # three files to rewrite, three to delete
        uris = [f"/{shard}/{i}" for i in range(3)]
        publish.publish_shard(out, f"rewritten-{shard}", [row(uri, 1) for uri in uris])
        publish.publish_shard(out, f"deleted-{shard}", [row(uris[0], 2)])
        publish.publish_shard(out, f"new-{shard}", [row(uri, 3) for uri in uris[:2]])
    with monkeypatch.context() as patch:
        patch.setattr(storage, step, _refuse_after(done, getattr(storage, step)))
        with pytest.raises(Transient):
            publish.settle(out)
    newest = {f"/{s}/{i}#{1 if i == 2 else 3}" for s in range(3) for i in range(3)}
    assert newest <= {recording_id for recording_id, _ in published(out)}
    assert publish.settle(out).removed > 0
    assert {recording_id for recording_id, _ in published(out)} == newest
    assert len(published(out)) == len(newest)
    assert publish.settle(out).removed == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=2, max_size=5),
    st.lists(st.integers(0, 6), min_size=1, max_size=8),
)
def test_runs_that_settle_and_publish_at_once_lose_nothing(
    tmp_path_factory: pytest.TempPathFactory, shards: list[set[int]], others: list[int]
) -> None:
    """Before every step of one settling, another run does something: settles, or a shard again."""
    out = str(tmp_path_factory.mktemp("out"))
    minutes = iter(range(1, 1000))

    def publish_again(shard: int) -> None:
        rows = [row(f"/{uri}", 1, next(minutes)) for uri in sorted(shards[shard])]
        publish.publish_shard(out, f"shard-{shard}", rows)

    for shard in range(len(shards)):
        publish_again(shard)
    left = list(others)
    is_other = False

    def interrupted(step: Callable[..., Any]) -> Callable[..., Any]:
        def first_the_other(*args: Any) -> Any:
            nonlocal is_other
            if left and not is_other:
                is_other = True
                what = left.pop()
                if what < len(shards):
                    publish_again(what)
                else:
                    publish.settle(out)
                is_other = False
            return step(*args)

        return first_the_other

    with pytest.MonkeyPatch.context() as patch:
        for step in ("put_if", "delete_if", "open_parquet_source"):
            patch.setattr(storage, step, interrupted(getattr(storage, step)))
        publish.settle(out)
    here = sorted({f"/{uri}#1" for shard in shards for uri in shard})
    assert sorted({recording_id for recording_id, _ in published(out)}) == here
    publish.settle(out)
    assert [recording_id for recording_id, _ in published(out)] == here


histories = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 9)),
    min_size=1,
    max_size=12,
    unique_by=(lambda h: (h[0], h[1]), lambda h: (h[1], h[2])),
)  # (shard, recording, minute): a shard holds a recording once, and no two rows tie


def located(index: publish.Published) -> list[dict]:
    """The rows of an index, with the names of their files."""
    return [{**row, "file": index.files[row["file"]]} for row in index.table.to_pylist()]


@settings(max_examples=25, deadline=None)
@given(histories)
def test_settle_keeps_exactly_the_newest(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[int, int, int]]
) -> None:
    out = str(tmp_path_factory.mktemp("out"))
    shards: dict[int, list[dict]] = {}
    newest: dict[int, int] = {}
    for shard, recording, minute in history:
        shards.setdefault(shard, []).append(row(f"/{recording}", minute, minute))
        newest[recording] = max(minute, newest.get(recording, 0))
    for shard, rows in shards.items():
        publish.publish_shard(out, str(shard), rows)
    settled = publish.settle(out)
    assert settled.removed == len(history) - len(newest)
    assert located(settled.published) == located(publish.read_published(out))
    assert [i for i, _ in published(out)] == sorted(f"/{r}#{m}" for r, m in newest.items())


# ---- damage -----------------------------------------------------------------------------


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


NOT_TRANSCRIPTS = {
    "empty": b"",
    "text": b"not a Parquet file at all, but long enough to be one",
    "other columns": _parquet(pa.table({"a": [1]})),
    "other types": _parquet(
        pa.table({"recording_id": [1], "uri": ["/a"], "transcribed_at": [NOON], "status": [1]})
    ),
}


@pytest.mark.parametrize("content", NOT_TRANSCRIPTS.values(), ids=NOT_TRANSCRIPTS.keys())
def test_a_file_that_is_no_transcript_stops_the_run_by_name(out: str, content: bytes) -> None:
    publish.publish_shard(out, "good", [row("/a")])
    bad = Path(out, "transcripts", "bad.parquet")
    bad.write_bytes(content)
    for look in (publish.read_published, publish.settle):
        with pytest.raises(Fatal, match=r"bad\.parquet is not a transcript file") as refused:
            look(out)
        assert "\n" not in str(refused.value) and "move it away" in str(refused.value)
    assert bad.read_bytes() == content


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = str(tmp_path_factory.mktemp("whole"))
    url = publish.publish_shard(out, "s", [row(f"/{i}") for i in range(20)])
    return Path(url).read_bytes()


@settings(max_examples=30, deadline=None, derandomize=True)  # what is on trial is pyarrow
@given(data=st.data())
def test_damaged_bytes_are_named_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(whole[: data.draw(st.sampled_from([len(whole), len(whole) // 2]))])
    places = st.integers(0, len(damaged) - 1)
    for place in data.draw(st.lists(places, min_size=1, max_size=30)):
        damaged[place] ^= data.draw(st.integers(1, 255))
    out = tmp_path_factory.mktemp("out")
    (out / "transcripts").mkdir()
    (out / "transcripts" / "bad.parquet").write_bytes(damaged)
    try:
        assert sum(publish.settle(str(out)).published.counts.values()) <= 20
    except Fatal as error:
        assert "bad.parquet" in str(error) and "\n" not in str(error)


# ---- settings ---------------------------------------------------------------------------

SETTINGS = {"format": 1, "model": "whisper-base", "language": None, "speakers": ["agent"]}


def test_the_same_settings_go_on(out: str) -> None:
    assert not publish.check_settings(out, SETTINGS)
    assert not Path(out).exists()
    publish.claim_settings(out, SETTINGS)
    before = files(out)
    publish.claim_settings(out, dict(reversed(SETTINGS.items())))
    assert publish.check_settings(out, SETTINGS)
    assert files(out) == before
    assert json.loads(before["settings.json"]) == SETTINGS


@pytest.mark.parametrize("check", [publish.claim_settings, publish.check_settings])
def test_other_settings_are_refused_by_name(out: str, check: Callable[..., Any]) -> None:
    publish.claim_settings(out, SETTINGS)
    before = files(out)
    with pytest.raises(Fatal) as refused:
        check(out, {**SETTINGS, "language": "de"})
    assert "language: None there, 'de' now" in str(refused.value)
    assert "model" not in str(refused.value) and out in str(refused.value)
    assert files(out) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_damaged_settings_are_refused_by_name_and_kept(out: str, content: bytes) -> None:
    storage.put(f"{out}/settings.json", content)
    with pytest.raises(Fatal, match=r"settings\.json is damaged"):
        publish.claim_settings(out, SETTINGS)
    assert files(out) == {"settings.json": content}


def test_lost_settings_are_told_by_the_rows(out: str) -> None:
    mine, shard = config.fingerprint(SETTINGS), publish.publish_shard(out, "abc", [])
    publish.publish_shard(out, "abc", [{**row("/a"), "config_fingerprint": mine}])
    publish.claim_settings(out, SETTINGS)
    Path(out, "settings.json").unlink()
    with pytest.raises(Fatal, match=r"has lost its settings\.json") as refused:
        publish.claim_settings(out, {**SETTINGS, "language": "de"})
    assert mine in str(refused.value) and shard in str(refused.value)
    publish.claim_settings(out, SETTINGS)
    assert publish.check_settings(out, SETTINGS)


def test_a_file_where_the_folder_of_transcripts_belongs_is_named(out: str) -> None:
    storage.put(f"{out}/transcripts", b"mine")
    with pytest.raises(Fatal, match=f"{out}/transcripts is a file"):
        publish.check_settings(out, SETTINGS)
    assert files(out) == {"transcripts": b"mine"}


def test_what_has_no_row_is_told(out: str) -> None:
    publish.publish_shard(out, "abc", [row("/a"), row("/b", status="failed")])
    there = publish.read_published(out)
    assert there.lacking(uri for uri in ("/c", "/a", "/0", "/b")) == ["/c", "/0"]
    assert there.lacking([]) == []
    assert publish.read_published(f"{out}/none").lacking(["/a"]) == ["/a"]


def test_damaged_settings_are_told_from_other_json(out: str) -> None:
    for content, said in ((b"{", "not JSON"), (b"[]", "not a JSON object")):
        storage.put(f"{out}/settings.json", content)
        with pytest.raises(Fatal, match=rf"damaged \({said}\)"):
            publish.claim_settings(out, {"model": "base"})


def test_the_sentence_on_a_damaged_file_names_the_file_and_nothing_of_pyarrow(out: str) -> None:
    url = publish.publish_shard(out, "abc", [row("/a")])
    whole = storage.read(url)
    for content in (b"", b"no", b"junk" * 100, whole[:-9]):
        storage.put(url, content)
        with pytest.raises(Fatal, match=r"not a transcript file .*\(Parquet .*; move") as caught:
            publish.read_published(out)
        assert url in str(caught.value)
        assert "Buffer" not in str(caught.value)


def test_rows_are_read_where_wanted_only(out: str) -> None:
    publish.publish_shard(out, "one", [row("/a", 1), row("/b", 1)])
    publish.publish_shard(out, "two", [row("/a", 2)])
    published = publish.read_published(out)
    storage.put(publish.publish_shard(out, "three", [row("/c")]), b"damaged since")
    found = publish.read_rows(published, {"/a", "/b", "/none"}, ["text"])
    assert [(r["uri"], r["text"]) for r in found] == [
        ("/a", "text of /a 2"),
        ("/b", "text of /b 1"),
    ]
