"""Archive -> recordings: what counts, ids, manifests, durations."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcribe import archive, storage
from transcribe.archive import Recording, estimate_durations, list_archive
from transcribe.errors import Fatal


def _wav(seconds: float) -> bytes:
    """G.711 mu-law, 8 kHz, one channel."""
    n = int(8000 * seconds)
    fmt = struct.pack("<HHIIHHH", 7, 1, 8000, 8000, 1, 8, 0)
    body = (
        b"fmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", n) + b"\xff" * n
    )
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def _fill(folder: Path, *names: str, content: bytes = b"x") -> None:
    for name in names:
        storage.put(f"{folder}/{name}", content)


def _names(url: object, root: Path) -> list[str]:
    return [r.uri.removeprefix(f"{root}/") for r in list_archive(str(url))]


def test_a_folder_leaves_out_hidden_files_and_sidecars_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ["a.WAV", "b", "c.unknown", "d/e.mp3", "f.zip"]
    _fill(tmp_path, *kept, ".x.wav", ".cache/y.wav", "d/e.JSON", "d/f.json", "notes.txt")
    with caplog.at_level(logging.WARNING):
        assert _names(tmp_path, tmp_path) == sorted(kept)
    (line,) = caplog.messages
    assert "(5 in all)" in line
    assert ".json 2, .txt 1, hidden 2" in line


def test_what_the_user_spells_out_is_not_hidden(tmp_path: Path) -> None:
    _fill(tmp_path, ".audio/a.wav", ".audio/.b.wav", "c/.audio/d.wav", "odd.txt")
    assert _names(tmp_path / ".audio", tmp_path) == [".audio/a.wav"]
    assert _names(tmp_path / ".audio/*.wav", tmp_path) == [".audio/a.wav"]
    assert _names(tmp_path / "c/.a*", tmp_path) == ["c/.audio/d.wav"]
    assert _names(tmp_path / "odd.txt", tmp_path) == ["odd.txt"]


def test_nothing_to_transcribe_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"no recordings in .*it is empty"):
        list_archive(str(tmp_path))
    _fill(tmp_path, "a.json", "b.json")
    with pytest.raises(Fatal, match=r"no recordings in .*\.json 2"):
        list_archive(str(tmp_path))
    with pytest.raises(Fatal, match=r"a\.json is neither audio nor a manifest"):
        list_archive(str(tmp_path / "a.json"))
    with pytest.raises(Fatal, match="does not exist"):
        list_archive(f"{tmp_path}/none")


def test_a_folder_that_cannot_be_listed_is_counted(tmp_path: Path, monkeypatch) -> None:
    _fill(tmp_path, "a.wav", "locked/b.wav")
    real = os.scandir

    def scandir(folder: str):  # for root, every folder can be listed
        if folder.endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    unlisted: list[str] = []
    assert len(list_archive(str(tmp_path), unlisted)) == 1
    assert unlisted == [f"{tmp_path}/locked"]


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    st.text(max_size=20),
    st.integers(0, 2**40),
)
def test_the_id_is_stable_and_changes_with_each_part(uri: str, version: str, size: int) -> None:
    def id_of(uri: str, version: str, size: int) -> str:
        info = storage.ObjectInfo(uri, size, version, None)
        return archive._recording(info, None).recording_id

    same = id_of(uri, version, size)
    assert same == id_of(uri, version, size)
    assert len(same) == 32
    assert set(same) <= set("0123456789abcdef")
    others = [(uri + "x", version, size), (uri, version + "x", size), (uri, version, size + 1)]
    others += [(uri + version, "", size), (uri, f"{version}{size}", size)]
    assert all(id_of(*o) != same for o in others if o != (uri, version, size))


def test_the_id_follows_the_content_not_the_listing(tmp_path: Path) -> None:
    _fill(tmp_path, "a.wav", "b.wav")
    before = {r.uri: r.recording_id for r in list_archive(str(tmp_path))}
    _fill(tmp_path, "0.wav")
    _fill(tmp_path, "b.wav", content=b"longer")
    after = {r.uri: r.recording_id for r in list_archive(f"{tmp_path}/*.wav")}
    assert after[f"{tmp_path}/a.wav"] == before[f"{tmp_path}/a.wav"]
    assert after[f"{tmp_path}/b.wav"] != before[f"{tmp_path}/b.wav"]


# ---------------------------------------------------------------- manifests


def test_extra_columns_travel_as_sorted_json(tmp_path: Path) -> None:
    _fill(tmp_path, "a.wav", "b.wav")
    manifest = tmp_path / "m.csv"
    text = '\ufeffteam,uri,agent\r\n"x, ""y""",a.wav,Zoë\r\n\r\n,b.wav,\r\n'
    manifest.write_text(text, encoding="utf-8", newline="")
    first, second = list_archive(str(manifest))
    assert first.metadata == '{"agent": "Zoë", "team": "x, \\"y\\""}'
    assert second.metadata == '{"agent": "", "team": ""}'
    plain = list_archive(str(tmp_path / "*.wav"))
    assert [r.recording_id for r in plain] == [first.recording_id, second.recording_id]
    assert plain[0].metadata is None


def test_parquet_and_jsonl_values_become_plain_json(tmp_path: Path) -> None:
    import datetime

    _fill(tmp_path, "a.wav")
    row = {
        "uri": "a.wav",
        "when": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "score": float("nan"),
        "tags": ["x", None],
        "blob": b"\x00\xff",
        "n": 3,
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "m.parquet")
    (found,) = list_archive(str(tmp_path / "m.parquet"))
    assert json.loads(found.metadata or "") == {
        "when": "2026-01-02T03:04:05", "score": None, "tags": ["x", None], "blob": "00ff", "n": 3,
    }  # fmt: skip
    (tmp_path / "m.jsonl").write_text('{"uri": "a.wav", "v": NaN, "half": "\\ud800"}\n\n')
    (found,) = list_archive(str(tmp_path / "m.jsonl"))
    assert found.metadata == '{"half": "\\ud800", "v": null}'


def test_missing_and_repeated_entries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _fill(tmp_path, "in/a.txt", "in/.hidden.wav")
    lines = ["a.txt", "gone.wav", "./a.txt", f"{tmp_path}/in/a.txt", ".hidden.wav"]
    rows = [{"uri": uri, "row": i} for i, uri in enumerate(lines)]
    manifest = tmp_path / "in/m.jsonl"
    manifest.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with caplog.at_level(logging.WARNING):
        hidden, a, gone = list_archive(str(manifest))
    assert json.loads(a.metadata or "") == {"row": 0}
    assert (gone.size_bytes, gone.generation) == (0, "missing")
    assert hidden.size_bytes == 1
    assert any("names 2 recordings again" in m for m in caplog.messages)
    assert any("1 objects that cannot be found" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("m.csv", b"path,team\na.wav,x\n", r"`uri`.*found: path, team"),
        ("m.csv", b"", r"found: none"),
        ("m.csv", b"uri,uri\na,b\n", "column `uri` is there twice"),
        ("m.csv", b"path,path\na,b\n", r"no column `uri` \(found: path, path\); add it$"),
        ("m.csv", b"uri\n", "lists no recordings"),
        ("m.csv", b"uri,x\na.wav\n", "line 2: 1 fields for 2 columns"),
        ("m.csv", b"uri,x\na.wav,\xff\xfe\n", "not CSV in UTF-8"),
        ("m.csv", b"uri,x\n,1\n", "line 2: `uri` must be"),
        ("m.csv", b'uri,x\n"a,1\n', "not CSV"),
        ("m.jsonl", b'{"path": "a.wav"}\n', r"line 1: no column `uri` \(found: path\)"),
        ("m.jsonl", b'{"uri": "a.wav"}\nnot json\n', "line 2: not a JSON object"),
        ("m.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("m.jsonl", b"[" * 100_000, "line 1: not a JSON object"),
        ("m.jsonl", b'{"uri": 7}\n', "line 1: `uri` must be"),
        ("m.jsonl", b'{"uri": "a\\u0000b"}\n', "line 1: `uri` must be"),
        ("m.jsonl", b'{"uri": "\\ud800"}\n', "line 1: `uri` must be"),
        ("m.parquet", b"PAR1 no", "not a Parquet file"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Fatal, match=sentence) as caught:
        list_archive(str(tmp_path / name))
    assert name in str(caught.value)


def test_a_parquet_manifest_without_uri_names_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": ["a.wav"]}), tmp_path / "m.parquet")
    with pytest.raises(Fatal, match="found: path"):
        list_archive(str(tmp_path / "m.parquet"))


# ---------------------------------------------------------------- durations


def test_local_recordings_are_probed_one_by_one(tmp_path: Path) -> None:
    for seconds in (2.0, 30.0, 90.0):
        storage.put(f"{tmp_path}/{seconds:04}.wav", _wav(seconds))
    storage.put(f"{tmp_path}/broken.wav", random.Random(0).randbytes(80_000))
    storage.put(f"{tmp_path}/empty.wav", b"")
    (tmp_path / "link.wav").symlink_to("nowhere")
    listed = list_archive(str(tmp_path))
    durations = [r.duration_s for r in estimate_durations(listed)]
    assert durations[:3] == pytest.approx([2.0, 30.0, 90.0], rel=0.01)
    assert durations[3] == pytest.approx(10.0, rel=0.01)  # by the rate of the others
    assert durations[4:] == [1.0, 1.0]
    assert [r.recording_id for r in estimate_durations(listed)] == [r.recording_id for r in listed]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 10**9), max_size=60), st.randoms(use_true_random=False))
def test_estimates_do_not_depend_on_order_and_stay_within_bounds(
    sizes: list[int], shuffler: random.Random
) -> None:
    recordings = [
        archive._recording(storage.ObjectInfo(f"gs://b/{i}.{ext}", size, "1", None), None)
        for i, size in enumerate(sizes)
        for ext in ("wav" if i % 2 else "mp3",)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "read_range", lambda uri, start, length: uri.encode())
        patch.setattr(
            "transcribe.probe.probe_seconds", lambda head, size, name, told: size / len(name)
        )
        estimated = estimate_durations(recordings)
        shuffled = recordings[:]
        shuffler.shuffle(shuffled)
        again = estimate_durations(shuffled)
    assert sorted(again, key=_uri) == sorted(estimated, key=_uri)
    assert [dataclasses.replace(r, duration_s=0) for r in estimated] == [
        dataclasses.replace(r, duration_s=0) for r in recordings
    ]
    for r in estimated:
        assert 1.0 <= r.duration_s <= max(1.0, r.size_bytes / archive.LEAST_BYTES_PER_SECOND)


def _uri(recording: Recording) -> str:
    return recording.uri


def test_a_damaged_parquet_manifest_is_named_wherever_the_damage_is(tmp_path):
    manifest = tmp_path / "calls.parquet"
    pq.write_table(pa.table({"uri": [f"{i}.wav" for i in range(500)]}), manifest)
    whole = manifest.read_bytes()
    for at in range(4, len(whole), 97):
        manifest.write_bytes(whole[:at] + b"\xff" * 16 + whole[at + 16 :])
        try:
            list_archive(str(manifest))
        except Fatal as error:
            assert str(manifest) in str(error)
