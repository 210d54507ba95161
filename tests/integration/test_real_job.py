"""The whole job with real weights on spoken calls: the README's promise in small."""

import json

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.sample_archive import make_sample_archive
from transcribe.cli import app
from transcribe.score import score_texts

CALLS = 3


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A few calls of the sample archive, and everything in it that is not a call."""
    folder = tmp_path_factory.mktemp("sample") / "archive"
    reference = make_sample_archive(folder)
    entries = [json.loads(line) for line in reference.read_text().splitlines()]
    calls = [e for e in entries if e["kind"] == "call" and len(e["channels"]) == 2][:CALLS]
    others = [e for e in entries if e["kind"] != "call"]
    manifest = folder.parent / "calls.jsonl"
    lines = [json.dumps({"uri": e["uri"], "kind": e["kind"]}) for e in (*calls, *others)]
    manifest.write_text("\n".join(lines) + "\n")
    return manifest, {e["uri"]: e for e in (*calls, *others)}


@pytest.fixture(scope="module")
def rows(archive, tmp_path_factory):
    manifest, entries = archive
    out = tmp_path_factory.mktemp("out")
    flags = ["--speakers", "agent,customer", "--max-failed", "0.5", "--language", "en"]
    result = CliRunner().invoke(app, ["run", str(manifest), str(out), *flags])
    assert result.exit_code == 0, result.output
    found = pq.read_table(out / "transcripts").to_pylist()
    assert len(found) == len(entries)
    return {row["uri"]: row for row in found}


def test_each_recording_ends_as_it_should(archive, rows):
    expected = {uri: entry["expect"] for uri, entry in archive[1].items()}
    assert {uri: row["status"] for uri, row in rows.items()} == expected


def test_the_text_is_what_was_said(archive, rows):
    calls = [e for e in archive[1].values() if e["kind"] == "call"]
    heard = [rows[e["uri"]]["text"] for e in calls]
    score = score_texts([e["text"] for e in calls], heard, ["en"] * len(calls))
    assert score.wer < 0.25


def test_each_speaker_says_their_own_lines(archive, rows):
    """Per channel, so that a swap or a mix of channels would show as a word error rate near 1."""
    for entry in archive[1].values():
        if entry["kind"] != "call":
            continue
        for channel, speaker in enumerate(("agent", "customer")):
            segments = rows[entry["uri"]]["segments"]
            own = " ".join(s["text"] for s in segments if s["speaker"] == speaker)
            said = entry["channels"][str(channel)]
            assert score_texts([said], [own], ["en"]).wer < 0.5


def test_segments_stand_where_the_words_were_spoken(archive, rows):
    for entry in archive[1].values():
        for turn in entry["turns"]:
            segments = [
                s
                for s in rows[entry["uri"]]["segments"]
                if s["channel"] == turn["channel"]
                and s["start"] < turn["end"]
                and s["end"] > turn["start"]
            ]
            assert segments, f"nothing heard from {turn['start']} to {turn['end']}"


def test_every_second_of_every_channel_is_accounted_for(rows):
    for row in rows.values():
        for c in row["coverage"]:
            total = c["speech"] + c["silence"] + c["skipped"]
            assert total == pytest.approx(row["duration"], abs=0.02)
        if row["status"] != "failed":
            assert len(row["coverage"]) == row["channels"]


def test_a_manifest_column_is_carried_through(archive, rows):
    for uri, entry in archive[1].items():
        assert json.loads(rows[uri]["metadata"]) == {"kind": entry["kind"]}


def test_a_truncated_file_gives_what_is_left_and_says_so(archive, rows):
    (row,) = [rows[u] for u, e in archive[1].items() if e["kind"] == "truncated"]
    assert row["error_kind"] == "truncated"
    assert "missing" in row["error_message"]
