"""From nothing and back: Ray's own autoscaler with its fake provider of machines.

The provider starts real raylets on this machine when the autoscaler asks for a machine, and stops
them when it has been idle. Their GPUs are only counted, not there: the engine is the fake one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import free_port

REPO = Path(__file__).parents[2]
HEAD_NODE = "f" * 51 + "00000"
WORKERS = 2
CALLS = 24
IDLE_S = 15.0


@dataclass(frozen=True)
class Growing:
    """A cluster whose head has no CPUs and whose machines come on demand."""

    address: str
    env: dict[str, str]

    def machines(self) -> list[int]:
        """Process ids of the raylets of the machines that are there now, the head's not."""
        return sorted(pid for pid in _raylets(self.address) if not _is_head(pid))


def _raylets(address: str) -> Iterator[int]:
    """Raylets of the cluster whose head listens on the port of `address`."""
    port = address.rpartition(":")[2]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            gcs = [w for w in words if w.startswith((b"--gcs-address=", b"--gcs_address="))]
            if words[0].endswith(b"/raylet") and gcs and gcs[0].endswith(f":{port}".encode()):
                yield int(entry.name)


def _is_head(raylet: int) -> bool:
    return b"--head" in Path(f"/proc/{raylet}/cmdline").read_bytes().split(b"\0")


@pytest.fixture
def growing_cluster() -> Iterator[Growing]:
    folder = Path(tempfile.mkdtemp(prefix="grow-"))
    address = f"127.0.0.1:{free_port()}"
    config = folder / "cluster.json"
    config.write_text(json.dumps(_cluster_config(address)))
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
    }
    start = [Path(sys.executable).parent / "ray", "start", "--head", "--block", "--num-cpus=0"]
    start += [f"--port={address.partition(':')[2]}", f"--autoscaling-config={config}"]
    start += [f"--temp-dir={folder}/ray", "--include-dashboard=false", "--disable-usage-stats"]
    start += ["--object-store-memory=100000000", f"--ray-client-server-port={free_port()}"]
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(start, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        _until(lambda: bool(list(_raylets(address))), 60)
        joining = {"RAY_AUTH_MODE": "disabled", "PATH": os.environ["PATH"], "PYTHONPATH": str(REPO)}
        yield Growing(address, {**os.environ, **joining})
    finally:
        for raylet in _raylets(address):
            os.kill(raylet, signal.SIGKILL)
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


# `ray start` completes nothing, unlike `ray up`.
_LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


def _cluster_config(address: str) -> dict[str, object]:
    worker = {"CPU": 2, "GPU": 1, "object_store_memory": 100_000_000}
    return {
        "cluster_name": "growing",
        "max_workers": WORKERS,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": HEAD_NODE,
            "launch_multiple": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": worker,
                "node_config": {},
                "min_workers": 0,
                "max_workers": WORKERS,
            },
        },
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in _LISTS},
    }


def _until(true: Callable[[], bool], within_s: float) -> float:
    """Wait until something is true; returns the seconds it took."""
    started = time.monotonic()
    while not true():
        waited = time.monotonic() - started
        assert waited < within_s, f"not within {within_s:.0f} s"
        time.sleep(0.2)
    return time.monotonic() - started


@pytest.mark.long
def test_machines_come_with_the_job_are_replaced_and_go_after_it(
    growing_cluster, write_call, tmp_path, record_property
):
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for n in range(CALLS):
        write_call(archive / f"call-{n:02d}.wav", n)
    assert growing_cluster.machines() == []

    line = [sys.executable, "-m", "jobs.transcribe", archive, out]
    line += ["--address", growing_cluster.address, "--model", "fake@4"]
    line += ["--workers", str(WORKERS), "--shard-minutes", "0.2", "--wait-for-workers", "120"]
    job = subprocess.Popen(
        line, env=growing_cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        came = _until(lambda: bool(growing_cluster.machines()) or job.poll() is not None, 90)
        assert job.poll() is None
        _until(lambda: len(growing_cluster.machines()) == WORKERS, 90)
        _until(lambda: bool(list(out.glob("transcripts/*.parquet"))), 90)
        lost = growing_cluster.machines()[0]
        os.kill(lost, signal.SIGKILL)  # spot: no warning
        replaced = _until(
            lambda: (
                lost not in growing_cluster.machines()
                and len(growing_cluster.machines()) == WORKERS
            ),
            90,
        )
        assert job.wait(timeout=200) == 0
    finally:
        job.kill()
        print(job.communicate()[0])  # what pytest shows of a failure
    rows = pq.read_table(out / "transcripts").to_pylist()
    assert sorted(Path(row["uri"]).name for row in rows) == sorted(
        path.name for path in archive.iterdir()
    )
    assert {row["status"] for row in rows} == {"ok"}
    gone = _until(lambda: growing_cluster.machines() == [], 90)
    record_property("seconds", {"first worker": came, "replaced": replaced, "to zero": gone})
