"""After any sequence of faults the same command ends with the rows of an undisturbed run.

`make test` runs one schedule, `make chaos` as many as CHAOS_SCHEDULES says, from seed
CHAOS_SEED on, with processes stopped for up to CHAOS_STOP_S seconds. OUT lies on a small tmpfs that
is made read-only and filled up for real; where nobody may mount one, these two faults are left out.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from tests.chaos.schedules import EVERYWHERE, Hand, published, schedule
from tests.chaos.world import RAY, REPO, World, drivers, environment, send
from transcribe.schema import PROVENANCE_ONLY

N_SCHEDULES = int(os.environ.get("CHAOS_SCHEDULES", "1"))
FIRST_SEED = int(os.environ.get("CHAOS_SEED", "112"))  # all its three faults strike
STOP_S = float(os.environ.get("CHAOS_STOP_S", "3"))
N_RECORDINGS, SECONDS = 24, 6
N_SHARDS = 8
LONGEST_S = 300
RUN_MAY_TAKE_S = 240

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Noise that no two recordings share, one of them silent, one no audio, one twice."""
    folder = tmp_path_factory.mktemp("chaos") / "calls"
    folder.mkdir()
    draw = np.random.default_rng(7)
    for n in range(N_RECORDINGS - 3):
        samples = draw.integers(-9000, 9000, SECONDS * 16_000).astype(np.int16)
        soundfile.write(folder / f"call-{n:02d}.wav", samples, 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(SECONDS * 16_000, np.int16), 16_000)
    (folder / "broken.wav").write_bytes(b"no audio" * 2000)
    shutil.copy(folder / "call-03.wav", folder / "twice.wav")
    return folder


@pytest.fixture(scope="module")
def world():
    world = World(n_nodes=2, with_dashboard=True)
    try:
        world.start()
        yield world
    finally:
        world.close()


@pytest.fixture
def out(tmp_path):
    """OUT on a small file system of its own, where that may be made."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True
    )
    try:
        yield disk / "out"
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture(scope="module")
def undisturbed(archive, tmp_path_factory):
    """The rows of a run without a cluster, in plain Python, and nothing that hurts."""
    from tests.chaos import stage
    from transcribe import isolation, listen, pipeline, run
    from transcribe.config import RunConfig
    from transcribe.duplicates import publish_duplicates
    from transcribe.engines.fake import FakeEngine

    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listen, "FrameJudge", stage.HearsEverything)
        patch.setattr(listen, "_detector", lambda: None)
        patch.setattr(isolation, "results", stage.results)
        config = RunConfig(str(archive), str(out), model="fake")
        plan = run.prepare(config, print)
        job = pipeline.Job(config, plan.run_id, "fake", "fake", plan.config_fingerprint, "cpu")
        list(pipeline.run_shards(plan.shards, job, FakeEngine()))
        publish_duplicates(plan.duplicates, str(out), plan.run_id)
    rows = rows_of(out)
    counts = Counter(row["error_kind"] or row["status"] for row in rows)
    assert counts == {"ok": N_RECORDINGS - 2, "empty": 1, "not_audio": 1}
    return rows


def rows_of(out):
    rows = pq.read_table(out / "transcripts").sort_by("uri").to_pylist()
    return [{k: v for k, v in row.items() if k not in PROVENANCE_ONLY} for row in rows]


def arguments(world, archive, out):
    flags = ["--model", "fake", "--workers", "2", "--shard-minutes", "0.3", "--max-failed", "0.1"]
    return [str(archive), str(out), *flags, "--wait-for-workers", "60"]


class Run:
    """The command under chaos, once: what it says, and its end."""

    def __init__(self, world, archive, out, flag, is_job=False):
        self.log = out.parent.with_name(f"log-{secrets.token_hex(3)}.txt")
        command = [sys.executable, "-m", "tests.chaos.driver", *arguments(world, archive, out)]
        env = {
            "CHAOS_DECODE_S": "0.3",
            **environment(),
            "CHAOS_SERVICE_S": "0.15",
            "CHAOS_OUT_OF_MEMORY": str(flag),
        }
        if is_job:
            exported = [f"{k}={v}" for k, v in env.items() if k.startswith("CHAOS")]
            submit = [RAY, "job", "submit", "--address", world.dashboard, "--"]
            command = [*submit, "env", f"PYTHONPATH={REPO}", *exported, *command]
        else:
            command += ["--address", world.address]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=REPO, env=env, stdout=log, stderr=log)

    @property
    def said(self):
        return self.log.read_text(errors="replace")

    def wait(self, seconds):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def disturbed(run, hand, faults, out):
    """The faults, each at its time; then the end of the run, which it must find by itself."""
    began = time.monotonic()
    story = []
    todo = list(faults)
    while run.process.poll() is None and time.monotonic() - began < LONGEST_S:
        hand.undo_due()
        if todo and published(out) >= todo[0].after_shards and (out / "settings.json").exists():
            fault = todo.pop(0)
            time.sleep(fault.wait_s)
            if run.process.poll() is None:
                told = hand.strike(fault)
                story.append(f"{fault.what} ({told}, {time.monotonic() - began:.0f} s)")
        time.sleep(0.05)
    hand.undo_due(is_end=True)
    ended = run.wait(0.1)
    story.append(f"ended with {ended} after {time.monotonic() - began:.0f} s")
    return story, ended


@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + N_SCHEDULES))
def test_the_same_rows_after_any_faults(seed, world, archive, out, undisturbed, tmp_path):
    is_job, faults = schedule(seed, STOP_S, N_SHARDS)
    flag = tmp_path / "out-of-memory"
    world.start()
    hand = Hand(world, out, flag)
    hand.is_job = is_job
    run = Run(world, archive, out, flag, is_job)
    hand.driver = run.process
    story = [f"seed {seed}{', a job' if is_job else ''}"]
    try:
        told, ended = disturbed(run, hand, faults, out)
        story += told
    finally:
        hand.undo_due(is_end=True)
        run.process.kill()
        run.process.wait()
        for pid in drivers(out):  # a job's outlives `ray job submit`
            send(pid, 9)
    assert ended is not None, f"{story}: does not end\n{run.said[-3000:]}"
    assert "Traceback" not in run.said or is_job, f"{story}\n{run.said[-5000:]}"
    if ended == 2:
        sentences = [s for s in run.said.splitlines() if s.startswith("Error: ")]
        assert len(sentences) == 1, f"{story}\n{run.said[-3000:]}"
    world.heal()
    again = Run(world, archive, out, flag)
    try:
        code = again.wait(RUN_MAY_TAKE_S)
    finally:
        again.process.kill()
    print(f"\n{'; '.join(story)}; rerun ended with {code}", flush=True)
    assert code == 0, f"{story}\n{run.said[-3000:]}\nrerun:\n{again.said[-3000:]}"
    assert rows_of(out) == undisturbed, f"{story}\n{run.said[-3000:]}"
    assert stray(out) == [], story


def stray(out):
    """Files in OUT that no undisturbed run leaves: temporary ones, claims, odd transcripts."""
    return [
        str(path)
        for path in out.rglob("*")
        if path.is_file()
        and (
            path.name.startswith((".", "alive-"))
            or path.suffix == ".tmp"
            or (path.parent.name == "transcripts" and len(path.stem) != 16)
        )
    ]


def test_schedules_hold_every_fault():
    seen = {f.what for seed in range(200) for f in schedule(seed, 3.0, N_SHARDS)[1]}
    assert seen == {*EVERYWHERE, "kill job"}
