"""Transcripts open in every Parquet reader that docs/output.md names, with the same values."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from transcribe import publish, rows, schema
from transcribe.archive import Recording
from transcribe.assemble import Assembled, Coverage, Segment, Word
from transcribe.errors import BadAudio

DOC = Path(__file__).parents[2] / "docs" / "output.md"
WHEN = datetime(2026, 3, 1, 12, 30, 15, 123456, UTC)
TEXT = 'Grüß Gott,\n«línea dos» "quoted" 電話 🎧\ttab'


def _recording(index: int) -> Recording:
    return Recording(
        recording_id=f"{index:032x}",
        uri=f"/archive/ünï {index}\n.wav",
        generation="1700000000000000",
        size_bytes=2**40 + index,
        content_md5=None,
        metadata='{"agent": "Zoë"}',
        duration_s=1.0,
    )


def _segment(channel: int, start: float, text: str, flags: tuple[str, ...] = ()) -> Segment:
    words = (Word(text, start, start + 0.5, 0.5),) if channel else None
    return Segment(channel, start, start + 0.5, text, "de", -0.25, 1.5, 0.125, 0.0, flags, words)


def _rows() -> list[dict[str, Any]]:
    facts = rows.AudioFacts("wav", "pcm_mulaw", 8_000, 2, 3.5)
    coverage = [Coverage(0, 1.0, 2.5, 0.0), Coverage(1, 0.0, 0.0, 3.5)]
    said = (_segment(0, 0.1, TEXT), _segment(1, 1.0, "uh", ("loop", "low_confidence")))
    truncated = BadAudio("truncated", "Cut short.")
    provenance = rows.Provenance(
        "whisper-base", "0" * 16, "fake", "1" * 16, "run", "shard", "node:1", "node", "cpu", WHEN
    )
    made = [
        rows.spoken_row(
            _recording(1), facts, Assembled(TEXT, "de", 0.75, said), coverage, truncated, ("agent",)
        ),
        rows.spoken_row(_recording(2), facts, Assembled("", None, None, ()), coverage, None, ()),
        rows.failed_row(_recording(3), None, BadAudio("not_audio", "This is a PDF, not audio.")),
    ]
    timings = {"decode_seconds": 0.5, "recognise_seconds": 0.25}
    return [{**row, **rows.provenance_columns(provenance), **timings} for row in made]


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """OUT is published in the current folder; gives what every reader must find in it."""
    monkeypatch.chdir(tmp_path)
    made = _rows()
    publish.publish_shard(str(tmp_path / "OUT"), "shard", made)
    for segment in (s for row in made for s in row["segments"] or ()):
        segment["words"] = list(segment["words"]) if segment["words"] else None
    return [{name: row.get(name) for name in schema.TRANSCRIPT.names} for row in made]


@pytest.fixture
def offline_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The datasets library, without network and with its cache below the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def test_the_rows_exercise_every_status(published: list[dict[str, Any]]) -> None:
    assert [row["status"] for row in published] == ["ok", "empty", "failed"]
    assert [s["speaker"] for s in published[0]["segments"]] == ["agent", None]
    assert published[0]["text"] == TEXT and published[0]["error_kind"] == "truncated"


def test_duckdb(published: list[dict[str, Any]]) -> None:
    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect()
    # Compared as text in UTC: as Python objects DuckDB's time stamps need pytz.
    found = connection.sql(
        "SELECT * REPLACE (strftime(transcribed_at AT TIME ZONE 'UTC', '%Y-%m-%dT%H:%M:%S.%f')"
        " AS transcribed_at) FROM 'OUT/transcripts/*.parquet' ORDER BY uri"
    )
    assert found.columns == schema.TRANSCRIPT.names
    when = WHEN.replace(tzinfo=None).isoformat()
    expected = [{**row, "transcribed_at": when} for row in published]
    assert [dict(zip(found.columns, row, strict=True)) for row in found.fetchall()] == expected


def test_pandas(published: list[dict[str, Any]]) -> None:
    import pandas as pd

    found = pd.read_parquet("OUT/transcripts").sort_values("uri")
    assert list(found.columns) == schema.TRANSCRIPT.names
    assert [_plain(row) for row in found.to_dict("records")] == published


def test_polars(published: list[dict[str, Any]]) -> None:
    polars = pytest.importorskip("polars")
    found = polars.read_parquet("OUT/transcripts/*.parquet").sort("uri")
    assert found.columns == schema.TRANSCRIPT.names
    assert found.to_dicts() == published


def test_hugging_face_datasets(published: list[dict[str, Any]], offline_datasets: Any) -> None:
    found = offline_datasets.load_dataset(
        "parquet", data_files="OUT/transcripts/*.parquet", split="train"
    )
    assert found.column_names == schema.TRANSCRIPT.names
    assert found.sort("uri").to_list() == published


def test_the_examples_of_the_documentation_run(
    published: list[dict[str, Any]], offline_datasets: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    del offline_datasets
    examples = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 4
    for example in examples:
        exec(compile(example, "docs/output.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "not_audio" in shown and "agent" in shown and "Grüß Gott" in shown


def _plain(value: Any) -> Any:
    """What pandas gives, as plain Python: arrays as lists, its several nothings as None."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list) or type(value).__name__ == "ndarray":
        return [_plain(each) for each in value]
    if value is None or value != value:
        return None
    return value.to_pydatetime() if hasattr(value, "to_pydatetime") else value
