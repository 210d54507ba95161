"""`transcribe plan`: the forecast of a real archive, and the run that it is compared with."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from transcribe import storage
from transcribe.cli import app


def plan(archive, *flags):
    result = CliRunner().invoke(
        app, ["plan", str(archive), "--model", "fake@100", *map(str, flags)]
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_forecast_is_kept_and_compared_with_the_run(tmp_path, write_archive, shared_ray):
    archive, out = write_archive(tmp_path / "calls", 6), tmp_path / "out"
    copy = archive / "copy.wav"
    copy.write_bytes((archive / "call-03.wav").read_bytes())
    flags = ["--workers", 1, "--shard-minutes", 0.2, "--price-per-hour", 3.6]
    said = plan(archive, "--out", out, "--json", tmp_path / "plan.json", *flags)
    assert "9, " in said and "same bytes as another one's: 1; 8 to do" in said
    assert "(all headers read)" in said
    assert "pcm_mulaw 6, pcm_s16le 1" in said
    assert "1 of 8 looked at: not_audio 1" in said
    assert "this machine" in said and "Cheapest within 24 h" in said
    made = json.loads((tmp_path / "plan.json").read_text())
    assert made == json.loads((out / "plan.json").read_text())
    assert (made["channels"], made["recordings"], made["repeated"]) == ({"2": 6, "1": 1}, 8, 1)
    assert made["pilot"]["workers"] == made["here"]["workers"] == 1
    assert not (out / "transcripts").exists()

    run = ["run", archive, out, "--model", "fake@100", "--max-failed", 0.5, *flags]
    done = CliRunner().invoke(app, list(map(str, run)))
    assert done.exit_code == 0, done.output
    (report,) = [json.loads(p.read_bytes()) for p in out.glob("runs/*/report.json")]
    predicted = report["predicted"]
    assert predicted["audio_seconds"] == made["audio_seconds"]["value"]
    assert abs(predicted["audio_seconds_error"]) < 1e-3
    for name in ("processing_seconds", "usd"):
        actual = report["cost"]["usd"] if name == "usd" else report[name]
        assert predicted[f"{name}_error"] == pytest.approx(predicted[name] / actual - 1)

    again = plan(archive, "--out", out, "--no-pilot")
    assert "9 already transcribed; 0 to do" in again


def test_a_sample_of_a_bucket_without_a_pilot(gcs_bucket, write_call, tmp_path):
    for number in range(12):
        write_call(tmp_path / "call.wav", number)
        data = (tmp_path / "call.wav").read_bytes()
        storage.put(f"{gcs_bucket}/calls/{number:02d}.wav", data)
    flags = ["--no-pilot", "--sample", 4, "--deadline", 1, "--show", 2]
    said = plan(f"{gcs_bucket}/calls", *flags)
    assert "(4 headers read)" in said
    assert "12, " in said and " to " in said.split("audio")[1].splitlines()[0]
    assert "this machine" not in said


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "whisper-enormous"], "whisper-enormous"),
        (["--prices", "/no/such.yaml"], "/no/such.yaml"),
        (["--price", "x=1"], "no machine 'x'"),
        (["--price-per-hour", "-1"], "--price-per-hour"),
        (["--language", "xx"], "--language 'xx'"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(tmp_path, write_call, flags, named):
    (tmp_path / "calls").mkdir()
    write_call(tmp_path / "calls" / "a.wav", 1)
    refused = CliRunner().invoke(app, ["plan", str(tmp_path / "calls"), "--no-pilot", *flags])
    assert refused.exit_code == 2
    assert named in refused.stderr and refused.stderr.count("\n") == 1


def test_an_archive_without_audio_is_planned_all_the_same(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no audio")
    said = plan(tmp_path, "--no-pilot")
    assert "1 of 1 looked at: not_audio 1" in said
    refused = CliRunner().invoke(app, ["plan", str(tmp_path), "--model", "fake"])
    assert refused.exit_code == 2 and "Nothing in the archive can be decoded" in refused.stderr
