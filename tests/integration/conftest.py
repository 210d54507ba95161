"""Fixtures that need another process: a bucket without Google."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[str]:
    """Address of an emulator of Google Cloud Storage in a child process; sets no environment."""
    pytest.importorskip("gcp_storage_emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["start", "--quiet", "--host=127.0.0.1", f"--port={port}", "--in-memory"]
    child = subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", *start],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_up(f"http://127.0.0.1:{port}/", child)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def gcs_bucket(gcs_emulator: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new, empty bucket (`gs://archive-...`), and the environment that leads to it."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    name = f"archive-{secrets.token_hex(4)}"
    request = urllib.request.Request(
        f"{gcs_emulator}/storage/v1/b?project=test",
        data=json.dumps({"name": name}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=10):
        return f"gs://{name}"


def _wait_until_up(address: str, child: subprocess.Popen[bytes]) -> None:
    for _ in range(150):
        assert child.poll() is None, "the emulator ended at once"
        try:
            with urllib.request.urlopen(address, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError("the emulator did not answer within 15 s")
