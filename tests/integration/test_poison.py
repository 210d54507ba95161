"""A run on Ray over an archive with recordings in it that crash, fill and stop their process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import soundfile
from typer.testing import CliRunner

from transcribe import distributed
from transcribe.cli import app

REPO = Path(__file__).parents[2]
CALLS = 2
POISON = {"segfault": "crashed_worker", "eat": "decode_memory", "abort": "crashed_worker"}


@pytest.fixture
def poisoned_ray(monkeypatch):
    """An embedded Ray whose workers put `tests.poison.listen` into the pipeline."""
    # The tests are not installed, so that a worker finds them by this path only.
    path = {"PYTHONPATH": str(REPO)}
    hook = {"worker_process_setup_hook": "tests.poison.install", "env_vars": path}
    ray.init(
        address="local", num_cpus=5, include_dashboard=False, log_to_driver=False, runtime_env=hook
    )
    monkeypatch.setattr(distributed, "connect", lambda address, workers: None)
    monkeypatch.setattr(distributed, "disconnect", lambda: None)
    yield
    ray.shutdown()


def test_poison_is_one_row_each_and_nothing_else_is_lost(tmp_path, write_archive, poisoned_ray):
    archive, out = write_archive(tmp_path / "calls", CALLS), tmp_path / "out"
    for n, name in enumerate(POISON, 1):  # no two alike, or they would share one row
        soundfile.write(archive / f"{name}.wav", np.full(16_000, n / 32_768), 16_000)
    (archive / "silent.wav").rename(archive / "zz.wav")
    command = ["run", str(archive), str(out), "--model", "fake", "--max-failed", "1"]
    result = CliRunner().invoke(app, [*command, "--workers", "1"])
    assert result.exit_code == 0, result.output
    rows = pq.read_table(out / "transcripts").to_pylist()
    got = {row["uri"].rpartition("/")[2]: row for row in rows}
    assert len(rows) == len(got) == CALLS + 2 + len(POISON)
    for name, kind in POISON.items():
        row = got[f"{name}.wav"]
        assert (row["status"], row["error_kind"]) == ("failed", kind)
        assert row["content_md5"]
    assert "SIGSEGV" in got["segfault.wav"]["error_message"]
    assert got["broken.wav"]["error_kind"] == "not_audio"
    assert got["zz.wav"]["status"] == "empty"
    assert sum(row["status"] == "ok" for row in rows) == CALLS
