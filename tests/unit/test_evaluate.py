"""`transcribe score`: which reference belongs to which row, what is counted, what is shown."""

from __future__ import annotations

import csv
import json
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from transcribe import publish
from transcribe.cli import app
from transcribe.errors import Fatal
from transcribe.references import match
from transcribe.score import compare
from transcribe.scoreboard import CONTEXT, differing_stretches

pytest.importorskip("jiwer", reason="needs the score extra")
pytest.importorskip("whisper_normalizer", reason="needs the score extra")


def row(uri, text="", *, status="ok", language="en", duration=60.0, at=1):
    failed = status == "failed"
    return {
        "recording_id": f"{uri}#{at}",
        "uri": str(uri),
        "status": status,
        "language": None if failed else language,
        "duration": None if failed else duration,
        "text": text,
        "transcribed_at": datetime(2026, 3, at, tzinfo=UTC),
    }


@pytest.fixture
def out(tmp_path):
    """Publish rows, each in a file of its own."""

    def write(*rows):
        for i, each in enumerate(rows):
            publish.publish_shard(str(tmp_path / "out"), f"shard-{i}", [each])
        return tmp_path / "out"

    return write


@pytest.fixture
def references(tmp_path):
    def write(*entries):
        file = tmp_path / "references.jsonl"
        file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return file

    return write


def score(out, reference, *flags):
    command = ["score", str(out), "--reference", str(reference), *map(str, flags)]
    return CliRunner().invoke(app, command)


def scored(out, reference, *flags):
    """The JSON of a score that succeeds."""
    file = Path(str(reference)).parent / "score.json"
    result = score(out, reference, "--json", file, *flags)
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())


def refused(result):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def line(result, beginning):
    """Cells of the first line that begins so."""
    found = next(each for each in result.stdout.splitlines() if each.startswith(beginning))
    return re.split(r"  +", found)


# ---------------------------------------------------------------- rates


def test_rates_of_each_kind_each_language_and_all(out, references):
    rows = out(
        row("/a.wav", "the blue house is very old"),
        row("/b.wav", "come back"),
        row("/c.wav", "alt", language="de"),
    )
    file = references(
        {"uri": "/a.wav", "reference": "The red house is old.", "kind": "call"},
        {"uri": "/b.wav", "reference": "Come right back, please!", "kind": "call"},
        {"uri": "/c.wav", "reference": "alt", "kind": "read", "language": "de-AT"},
    )
    found = scored(rows, file)
    first, second, third = found["recordings"]
    assert (first["words"], first["substitutions"], first["insertions"]) == (5, 1, 1)
    assert first["wer"] == pytest.approx(2 / 5)
    # "the red house is old" -> "the blue house is very old": r>b, e>l, d>u, +e, +"very ".
    assert (first["characters"], first["character_errors"]) == (20, 9)
    assert (third["wer"], third["language"]) == (0.0, "de")
    assert (second["deletions"], second["wer"]) == (2, 1 / 2)
    call = found["kinds"]["call"]
    assert (call["recordings"], call["words"], call["wer"]) == (2, 9, 4 / 9)
    assert {name: group["wer"] for name, group in found["languages"].items()} == {
        "de": 0.0,
        "en": 4 / 9,
    }
    assert (found["total"]["words"], found["total"]["wer"]) == (10, 4 / 10)
    result = score(rows, file)
    # Characters: 9 of 20 as above, 13 of 22 for "right " and " please", 0 of 3.
    assert line(result, "total") == ["total", "3", "10", "40.0%", "48.9%", "1", "2", "1"]
    assert line(result, "kind read") == ["kind read", "1", "1", "0.0%", "0.0%", "0", "0", "0"]


def test_only_the_newest_row_of_a_recording_counts(out, references):
    rows = out(row("/a.wav", "new text", at=2), row("/a.wav", "old text", at=1))
    found = scored(rows, references({"uri": "/a.wav", "text": "new text"}))
    assert [r["wer"] for r in found["recordings"]] == [0.0]


def test_a_failed_row_deletes_every_word_and_is_said(out, references):
    rows = out(row("/a.wav", status="failed"), row("/b.wav", "well done"))
    file = references(
        {"uri": "/a.wav", "reference": "one red house", "language": "en"},
        {"uri": "/b.wav", "reference": "well done"},
    )
    found = scored(rows, file)
    assert (found["total"]["deletions"], found["total"]["wer"]) == (3, 3 / 5)
    assert found["failed"] == 1
    assert "1 recording failed: all words" in score(rows, file).stdout


def test_words_invented_in_silence_are_apart_from_the_rate(out, references):
    rows = out(
        row("/music.wav", "thank you", duration=90.0),
        row("/noise.wav", "", duration=30.0),
        row("/broken.wav", status="failed"),
        row("/call.wav", "hello"),
    )
    file = references(
        {"uri": "/music.wav", "reference": "", "kind": "music"},
        {"uri": "/noise.wav", "reference": "[static]", "kind": "noise"},
        {"uri": "/broken.wav", "reference": "", "kind": "noise"},
        {"uri": "/call.wav", "reference": "hello", "kind": "call"},
    )
    total = scored(rows, file)["total"]
    assert (total["recordings"], total["wer"], total["insertions"]) == (1, 0.0, 0)
    assert (total["silent_recordings"], total["silent_seconds"]) == (3, 120.0)
    assert (total["invented_words"], total["invented_words_per_minute"]) == (2, 1.0)
    result = score(rows, file)
    assert line(result, "kind music") == ["kind music", "1", "1.5", "2", "1.33"]
    assert line(result, "kind noise") == ["kind noise", "2", "0.5", "0", "0.00"]


def test_without_any_speech_there_is_no_rate(out, references):
    rows = out(row("/a.wav", "thank you"))
    file = references({"uri": "/a.wav", "reference": ""})
    assert scored(rows, file)["total"]["wer"] is None
    assert line(score(rows, file), "total")[1:4] == ["0", "-", "-"]


def test_chinese_counts_characters_and_the_rows_language_serves(out, references):
    rows = out(row("/a.wav", "今天天汽很好", language="zh"))
    file = references({"uri": "/a.wav", "reference": "今天天气很好。"})
    total = scored(rows, file)["languages"]["zh"]
    assert (total["words"], total["substitutions"], total["wer"]) == (6, 1, 1 / 6)
    assert (total["characters"], total["cer"]) == (6, 1 / 6)


def test_combining_marks_stay_in_their_words(out, references):
    rows = out(row("/a.wav", "हिन्दी भाषा", language="hi"))
    total = scored(rows, references({"uri": "/a.wav", "reference": "हिन्दी भाषा।"}))["total"]
    assert (total["words"], total["wer"]) == (2, 0.0)


# ---------------------------------------------------------------- files of references


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_each_kind_of_file_with_relative_paths(out, tmp_path, kind):
    rows = out(row(tmp_path / "calls/a.wav", "hello world"), row(tmp_path / "b.wav", "hello"))
    entries = [
        {"path": "calls/a.wav", "text": "hello word", "agent": "Zoë"},
        {"path": "./b.wav", "text": "hello", "agent": ""},
    ]
    file = tmp_path / f"references.{kind}"
    if kind == "csv":
        with file.open("w", encoding="utf-8", newline="") as opened:
            writer = csv.DictWriter(opened, entries[0])
            writer.writeheader()
            writer.writerows(entries)
    elif kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, entries)))
    else:
        pq.write_table(pa.Table.from_pylist(entries), file)
    found = scored(rows, file)
    assert (found["total"]["recordings"], found["total"]["wer"]) == (2, 1 / 3)
    assert found["matched_by_ending"] == 0
    assert found["kinds"].keys() == {"all"}


def test_what_has_no_counterpart_is_counted_and_said(out, references):
    rows = out(row("/a.wav", "hello"), row("/b.wav", "x"), row("/c.wav", "x"), row("/d.wav", "x"))
    file = references(
        {"uri": "/a.wav", "reference": "hello"},
        {"uri": "/a.wav", "reference": "something else"},
        {"uri": "/b.wav", "reference": None},
        {"uri": "/gone-1.wav", "reference": "hello"},
        {"uri": "/gone-2.wav", "reference": "hello"},
    )
    found = scored(rows, file)
    counts = "references repeated unknown without_row rows_without_reference".split()
    assert [found[name] for name in counts] == [5, 1, 1, 2, 2]
    assert [r["uri"] for r in found["recordings"]] == ["/a.wav"]
    said = score(rows, file).stdout
    assert "2 recordings with a reference, but without a row." in said
    assert "2 recordings with a row, but without a reference." in said
    assert "1 recording with null for a reference" in said


def test_references_from_another_machine_match_by_the_end_of_the_path(out, references):
    rows = out(
        row("gs://bucket/moved/en/a.wav", "hello"),
        row("gs://bucket/moved/de/a.wav", "hallo"),
        row("gs://bucket/moved/b.wav", "bye"),
    )
    file = references(
        {"uri": "/home/me/en/a.wav", "reference": "hello"},
        {"path": "de/a.wav", "reference": "hallo"},
        {"uri": "s3://other/x/b.wav", "reference": "bye"},
    )
    found = scored(rows, file)
    assert (found["total"]["recordings"], found["total"]["wer"]) == (3, 0.0)
    assert found["matched_by_ending"] == 3
    assert "3 recordings matched by the end of the path only" in score(rows, file).stdout


@pytest.mark.parametrize(
    ("references", "rows", "named"),
    [
        (["/x/a.wav"], ["/p/a.wav", "/q/a.wav"], ["/x/a.wav", "/p/a.wav", "/q/a.wav"]),
        (["/x/a.wav", "/y/a.wav"], ["/p/a.wav"], ["/x/a.wav", "/y/a.wav", "/p/a.wav"]),
    ],
)
def test_an_ambiguous_match_is_refused_by_name(references, rows, named):
    with pytest.raises(Fatal, match="not clear which recording") as caught:
        match(references, rows)
    assert all(each in str(caught.value) for each in named)


def test_the_same_uri_wins_over_an_ending():
    rows = ["/here/a.wav", "/there/a.wav"]
    assert match(["/here/a.wav", "/x/a.wav"], rows) == dict(
        zip(["/here/a.wav", "/x/a.wav"], rows, strict=True)
    )


def test_a_longer_ending_wins_and_names_are_whole():
    assert match(["/x/en/a.wav", "/x/de/a.wav"], ["/y/en/a.wav"]) == {"/x/en/a.wav": "/y/en/a.wav"}
    assert match(["/x/a.wav"], ["/y/aa.wav"]) == {}


def test_names_written_on_windows_and_on_a_mac_are_the_same_names():
    rows = {"gs://b/calls/en/a.wav", "gs://b/calls/de/a.wav", "gs://b/Zo\u00eb.wav"}
    written = {
        "/refs/C:\\calls\\en\\a.wav": "calls/en/a.wav",
        "/refs/Zoe\u0308.wav": "Zo\u00eb.wav",
    }
    expected = {uri: f"gs://b/{name}" for uri, name in written.items()}
    assert match(list(written), rows) == expected


def test_the_words_of_a_long_call_fit_into_a_field(out, tmp_path):
    said = "word " * 30_000
    (tmp_path / "said.csv").write_text(f"uri,reference\n/a.wav,{said}\n")
    found = scored(out(row("/a.wav", said)), tmp_path / "said.csv")
    assert (found["total"]["words"], found["total"]["wer"]) == (30_000, 0.0)


PATHS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4).map("/".join)


@given(st.sets(PATHS), st.sampled_from(["/old", "gs://bucket", "/"]))
def test_a_moved_archive_is_matched_as_a_whole(paths, root):
    references = {f"/here/archive/{path}": path for path in paths}
    rows = {f"{root}/archive/{path}" for path in paths}
    matched = match(references, rows)
    assert matched == {uri: f"{root}/archive/{path}" for uri, path in references.items()}


# ---------------------------------------------------------------- refused


def test_what_cannot_be_scored_is_one_sentence(out, references, tmp_path):
    file = references({"uri": "/a.wav", "reference": "hello"})
    assert f"no {tmp_path}/nothing;" in refused(score(tmp_path / "nothing", file))
    (tmp_path / "empty").mkdir()
    assert "no transcripts" in refused(score(tmp_path / "empty", file))
    rows = out(row("/b.wav", "hello"))
    assert "/b.wav" in refused(score(rows, file))
    assert "no such file" in refused(score(rows, tmp_path / "none.csv"))
    assert "must end in" in refused(score(rows, tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("r.csv", "team,reference\nx,hello\n", "no column `uri` or `path` (found: team, ref"),
        ("r.csv", "uri,team\n/a.wav,x\n", "no column `reference` or `text` (found: team, uri)"),
        ("r.csv", "uri,reference\n", "has no rows"),
        ("r.csv", "uri,reference,kind,kind\n", "column `kind` is there twice"),
        ("r.jsonl", '{"uri": "/a.wav", "reference": 7}\n', "`reference` of /a.wav must be text"),
        ("r.jsonl", '{"uri": "/a.wav", "text": "\\ud800"}\n', "`text` of /a.wav must be text"),
        ("r.jsonl", '{"uri": "/a.wav", "reference": null}\n', "all are null"),
        ("r.parquet", "PAR1", "not a Parquet file"),
    ],
)
def test_a_bad_file_of_references_is_named(out, tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    said = refused(score(out(row("/a.wav", "hello")), tmp_path / name))
    assert sentence in said
    assert name in said


def test_a_missing_extra_is_named(out, references, monkeypatch):
    rows, file = out(row("/a.wav", "hello")), references({"uri": "/a.wav", "reference": "hello"})
    monkeypatch.setitem(sys.modules, "jiwer", None)
    assert ".[score]" in refused(score(rows, file))


# ---------------------------------------------------------------- the worst


def test_the_worst_come_first_with_their_differences(out, references):
    rows = out(
        row("/few[1].wav", "one red house here", language="de"),
        row("/many.wav", "ein rotes haus", language="de"),
        row("/none.wav", "gut", language="de"),
    )
    file = references(
        {"uri": "/few[1].wav", "reference": "one blue house"},
        {"uri": "/many.wav", "reference": "ein haus und noch eins"},
        {"uri": "/none.wav", "reference": "gut"},
    )
    shown = score(rows, file).stdout
    assert shown.index("/many.wav: WER 80.0%, 4 errors in 5 words") < shown.index("/few[1].wav: ")
    assert "/none.wav" not in shown
    assert (
        "  REF  ein ***** haus und noch eins\n"
        "  HYP  ein rotes haus *** **** ****\n"
        "           I          D   D    D\n"
    ) in shown
    assert "  HYP  one red  house here\n           S          I\n" in shown
    assert "/few[1].wav: " not in score(rows, file, "--worst", 1).stdout
    assert "/many.wav: " not in score(rows, file, "--worst", 0).stdout


WORDS = st.lists(st.sampled_from(["alpha", "beta", "gamma"]), max_size=30).map(" ".join)


@given(WORDS, WORDS)
def test_stretches_hold_every_difference_and_little_else(reference, hypothesis):
    comparison = compare(reference, hypothesis, "de")
    stretches = differing_stretches(comparison)
    differing = [piece for piece in comparison.pieces if piece.kind != "equal"]
    assert [p for stretch in stretches for p in stretch if p.kind != "equal"] == differing
    for stretch in stretches:
        assert any(piece.kind != "equal" for piece in stretch)
        for piece in stretch:
            assert piece.kind != "equal" or len(piece.reference) <= 2 * CONTEXT
        for edge in (stretch[0], stretch[-1]):
            assert edge.kind != "equal" or len(edge.reference) <= CONTEXT


def test_a_long_text_shows_only_where_it_differs(out, references):
    said = [f"wort{chr(97 + i % 26)}{i}" for i in range(400)]
    heard = [*said[:200], "falsch", *said[201:300]]
    rows = out(row("/a.wav", " ".join(heard), language="de"))
    shown = score(rows, references({"uri": "/a.wav", "reference": " ".join(said)})).stdout
    assert said[199] in shown and said[200] in shown and "falsch" in shown
    assert said[190] not in shown and said[210] not in shown
    assert "[84 words]" in shown  # of the 100 that are missing at the end
    aligned = [each for each in shown.splitlines() if each.startswith(("  REF", "  HYP"))]
    assert max(map(len, aligned)) < 120


def test_the_json_says_where_texts_differ(out, references):
    rows = out(row("/a.wav", "the blue house is very old"))
    found = scored(rows, references({"uri": "/a.wav", "reference": "the red house is old"}))
    assert found["recordings"][0]["differences"] == [
        {"kind": "substitute", "at_word": 1, "reference": "red", "hypothesis": "blue"},
        {"kind": "insert", "at_word": 4, "reference": "", "hypothesis": "very"},
    ]


def test_the_document_names_every_field(out, references):
    document = (Path(__file__).parents[2] / "docs/output.md").read_text(encoding="utf-8")
    found = scored(out(row("/a.wav", "x")), references({"uri": "/a.wav", "reference": "x"}))

    def documented(heading):
        section = document.partition(f"\n{heading}\n")[2].partition("\n#")[0]
        return [name.partition(".")[0].removesuffix("[]") for name in _named(section)]

    assert documented("## The JSON of `transcribe score`") == list(found)
    assert documented("### A group of recordings") == list(found["total"])
    assert documented("### `recordings[]` of a score") == list(found["recordings"][0])


def _named(section):
    return re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
