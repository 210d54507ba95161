"""Fixtures that need another process or real speech: a bucket, a Ray cluster, an archive."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

from jobs import sample_archive
from transcribe import distributed


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[str]:
    """Address of an emulator of Google Cloud Storage in a child process; sets no environment."""
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as address:
        yield address


@contextmanager
def emulator() -> Iterator[str]:
    """The same, outside of a test."""
    port = free_port()
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
    return new_bucket(gcs_emulator)


def new_bucket(address: str) -> str:
    """Its URL; the environment must lead to the emulator at `address`."""
    name = f"archive-{secrets.token_hex(4)}"
    request = urllib.request.Request(
        f"{address}/storage/v1/b?project=test",
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


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ---------------------------------------------------------------- speech

SPOKEN = "Good morning, thank you for calling. How can I help you today?"


@pytest.fixture(scope="session")
def write_call() -> Callable[[Path, int], None]:
    """Write call number `n`: stereo mu-law at 8 kHz, speech first on the one, then the other.

    No two numbers give the same samples.
    """
    spoken = torch.from_numpy(sample_archive.speak(SPOKEN, "en-us+m1"))
    samples = torchaudio.functional.resample(spoken, sample_archive.SYNTH_RATE, 8000).numpy()

    def write(path: Path, n: int) -> None:
        stereo = np.zeros((2 * len(samples) + 800 * n, 2), np.float32)
        stereo[: len(samples), 0] = samples
        stereo[-len(samples) :, 1] = samples / (1 + n)
        soundfile.write(path, stereo, 8000, subtype="ULAW")

    return write


@pytest.fixture(scope="session")
def write_long_call() -> Callable[[Path, int], None]:
    """Write a call of so many turns a side, each told from the others by its loudness."""
    spoken = torch.from_numpy(sample_archive.speak(SPOKEN, "en-us+m1"))
    samples = torchaudio.functional.resample(spoken, sample_archive.SYNTH_RATE, 8000).numpy()

    def write(path: Path, turns: int) -> None:
        stereo = np.zeros((2 * turns, len(samples) + 16_000, 2), np.float32)
        for turn in range(2 * turns):
            stereo[turn, : len(samples), turn % 2] = samples * (1 - turn / 4 / turns)
        soundfile.write(path, stereo.reshape(-1, 2), 8000, subtype="ULAW")

    return write


@pytest.fixture(scope="session")
def write_archive(write_call: Callable[[Path, int], None]) -> Callable[[Path, int], Path]:
    """Fill a new folder: so many calls, `silent.wav` without speech, `broken.wav` no audio."""

    def write(folder: Path, n_calls: int) -> Path:
        folder.mkdir(parents=True)
        for n in range(n_calls):
            write_call(folder / f"call-{n:02d}.wav", n)
        soundfile.write(folder / "silent.wav", np.zeros(2 * 16_000, np.float32), 16_000)
        (folder / "broken.wav").write_bytes(b"this is no audio at all")
        return folder

    return write


# ---------------------------------------------------------------- Ray


@pytest.fixture(scope="module")
def shared_ray() -> Iterator[None]:
    """One embedded Ray for all runs of a module: starting it is what takes the time."""
    distributed.connect(None, workers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "connect", lambda address, workers: None)
        patch.setattr(distributed, "disconnect", lambda: None)
        yield
    distributed.disconnect()


@dataclass(frozen=True)
class Cluster:
    """A cluster made of real processes, and the environment that lets one in.

    Attributes:
        folder: where all its files are; `head` and `node-N` below it.
    """

    address: str
    dashboard: str
    folder: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def ray_cluster(gcs_emulator: str) -> Iterator[Cluster]:
    """`ray start --head` without CPUs, as on Kubernetes, and two nodes of one CPU each.

    Token authentication is on as Ray turns it on by itself: there is a token, and
    RAY_AUTH_MODE is not set. Whoever joins at an explicit address has to set it.
    """
    # Sockets lie below it, and their paths may have 107 characters: tmp_path is too long.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "STORAGE_EMULATOR_HOST": gcs_emulator,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
    address = f"127.0.0.1:{free_port()}"
    dashboard = free_port()
    started: list[subprocess.Popen[str]] = []
    try:
        head = ["--head", f"--port={address.partition(':')[2]}", f"--dashboard-port={dashboard}"]
        head += [f"--ray-client-server-port={free_port()}", "--num-cpus=0"]
        started.append(_ray_start(folder / "head", env, *head))
        _wait_until_started(started)
        joining = {**env, "RAY_AUTH_MODE": "token"}
        for n in (1, 2):
            node = [f"--address={address}", "--num-cpus=1"]
            started.append(_ray_start(folder / f"node-{n}", joining, *node))
        _wait_until_started(started)
        yield Cluster(address, f"http://127.0.0.1:{dashboard}", folder, joining)
    finally:
        _kill_sessions({starter.pid for starter in started})
        shutil.rmtree(folder, ignore_errors=True)


def _ray_start(folder: Path, env: dict[str, str], *flags: str) -> subprocess.Popen[str]:
    """Begin `ray start`; all that it leaves running belongs to a session of its own."""
    quiet = ["--disable-usage-stats", "--object-store-memory=100000000"]
    with folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", f"--temp-dir={folder}", *quiet, *flags],
            env=env,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )


def _wait_until_started(started: list[subprocess.Popen[str]]) -> None:
    for starter in started:
        assert starter.wait(timeout=240) == 0, "ray start failed"


def _kill_sessions(sessions: set[int]) -> None:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) in sessions:
                    os.kill(int(entry.name), signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


@pytest.fixture(scope="session")
def tiny_ctc_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CTC checkpoint trained here and now: about a minute."""
    from tests.integration import tiny_ctc

    return tiny_ctc.train(tmp_path_factory.mktemp("tiny-ctc") / "checkpoint")
