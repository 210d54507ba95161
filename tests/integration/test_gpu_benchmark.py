"""The GPU benchmark's whole path, with tiny models on a CPU."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from jobs.gpu_benchmark import GOALS, gpu_benchmark


def test_every_contender_hears_the_same_and_is_reported(tmp_path) -> None:
    app = typer.Typer()
    app.command()(gpu_benchmark)
    flags = "--tiny --device cpu --windows 3 --tokens 7 --rounds 1".split()
    result = CliRunner().invoke(app, [*flags, "--model", "large-v3-turbo", "--model",
                                      "wav2vec2-base", "--out", str(tmp_path)])  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    whisper, ctc = report["models"]
    assert {row["name"] for row in whisper["contenders"]} == {
        "ours", "transformers generate", "CTranslate2",
    }  # fmt: skip
    for row in whisper["contenders"]:
        assert row["tokens_per_window"] == 7, row
    for row in (*whisper["contenders"], *ctc["contenders"]):
        assert 0 < row["rtfx_min"] <= row["rtfx"] <= row["rtfx_max"], row
    for found in report["models"]:
        assert found["goal_rtfx_h100"] == GOALS[found["model"]]
        assert found["rtfx_from_flac"] > 0, found
    assert "7 tokens a window" in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path) -> None:
    app = typer.Typer()
    app.command()(gpu_benchmark)
    result = CliRunner().invoke(app, ["--device", "cuda", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "no GPU" in result.output
