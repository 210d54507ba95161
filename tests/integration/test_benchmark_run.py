"""The whole benchmark on a tiny archive with the fake engine: real processes, real Ray."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

pytest.importorskip("psutil", reason="needs the bench extra")

from tests.unit.test_page import read
from transcribe.cli import app

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def result(tmp_path_factory, write_call):
    folder = tmp_path_factory.mktemp("bench")
    archive = folder / "archive & <co>"
    archive.mkdir()
    for n in range(3):
        write_call(archive / f"call-{n}.wav", n)
    soundfile.write(archive / "unknown.wav", np.zeros(16_000, np.float32), 16_000)
    references = folder / "said.jsonl"
    rows = [{"uri": f"{archive}/call-{n}.wav", "reference": "good morning"} for n in range(3)]
    references.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--out", str(folder / "out"), "--reference", str(references), "--model", "fake"]
    flags += ["--only", "transcribe,transcribe-bare,whisper.cpp", "--rounds", "1", "--price", "2"]
    done = CliRunner().invoke(app, ["bench", str(archive), *flags])
    assert done.exit_code == 0, done.output
    return json.loads((folder / "out" / "report.json").read_text()), folder / "out", done.output


def test_both_of_ours_ran_and_a_peer_without_weights_says_so(result):
    report, _, output = result
    job, bare, peer = report["contenders"]
    assert (job["name"], bare["name"], peer["name"]) == (
        "transcribe", "transcribe-bare", "whisper.cpp",
    )  # fmt: skip
    for ours in (job, bare):
        assert ours["recordings"] == 3 and ours["failed"] == 0
        assert ours["rtfx"] > 0 and ours["cpu_seconds_per_audio_hour"] > 0
        assert ours["wer"] > 0.9  # the fake engine says checksums
        assert ours["cost_per_1000_hours"] == pytest.approx(2000 / ours["rtfx"])
    assert job["peak_bytes"] > bare["peak_bytes"] > 50e6
    assert peer["not_run"] and "rtfx" not in peer
    assert "whisper.cpp" in output
    assert report["ratio_to_bare_pipeline"] == pytest.approx(job["rtfx"] / bare["rtfx"])
    assert report["ratio_to_best_peer"] is None


def test_every_key_is_documented(result):
    report, _, _ = result
    doc = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    top, contenders = doc.split("## `report.json`")[1].split("### `contenders[]`")

    def names(text: str) -> set[str]:
        return {name.removesuffix("[]") for name in re.findall(r"^\| `([\w\[\]]+)`", text, re.M)}

    assert names(top) == set(report)
    assert names(contenders) == set(report["contenders"][0])


def test_the_page_shows_it_and_escapes_names(result):
    report, out, _ = result
    page = (out / "report.html").read_text(encoding="utf-8")
    reader = read(page)
    assert reader.loaded == [] and "script" not in reader.tags
    assert "archive & <co>" in reader.text
    assert "Where the engines' time went" in reader.text
    assert "transcribe without Ray" in reader.text
    assert report["environment"]["cpu"] in reader.text


def test_a_peer_that_is_not_known_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["bench", "--out", str(tmp_path), "--only", "siri"])
    assert done.exit_code == 2


def test_one_recording_leaves_a_process_without_work(tmp_path, write_call):
    call = tmp_path / "call.wav"
    write_call(call, 1)
    flags = ["--out", str(tmp_path / "out"), "--model", "fake", "--rounds", "1"]
    done = CliRunner().invoke(app, ["bench", str(call), *flags, "--only", "transcribe-bare"])
    assert done.exit_code == 0, done.output
    (bare,) = json.loads((tmp_path / "out" / "report.json").read_text())["contenders"]
    assert bare["not_run"] is None and bare["recordings"] == 1


def test_where_nothing_was_measured_the_exit_code_says_so(tmp_path, write_call):
    write_call(tmp_path / "call.wav", 1)
    flags = ["--out", str(tmp_path / "out"), "--model", "fake", "--rounds", "1"]
    done = CliRunner().invoke(
        app, ["bench", str(tmp_path / "call.wav"), *flags, "--only", "whisper.cpp"]
    )
    assert done.exit_code == 1
    assert "nothing could be measured" in done.stderr
