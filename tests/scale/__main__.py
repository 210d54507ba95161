"""The command `python -m tests.scale`: a whole run over an archive of which only the names exist.

Real listing code (over made-up answers of a store), planning, Ray, scheduling and publishing; see
`workers.py` for what is not real. Prints what docs/scaling.md tells.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import struct
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import ray
from rich.console import Console

from tests.scale import workers
from transcribe import distributed, pipeline, run, storage
from transcribe.archive import estimate_durations, list_archive
from transcribe.config import RunConfig, fingerprint, result_settings
from transcribe.engines.fake import FakeEngine
from transcribe.pipeline import Job
from transcribe.shards import plan_shards

ARCHIVE = "gs://made-up/calls"
MEAN_S = 360.0  # 1,000,000 recordings are 100,000 hours
BYTES_PER_S = 16_000  # two channels of mu-law
HEAD = struct.pack(
    "<4sI4s4sIHHIIHH4sI",
    *(b"RIFF", 0, b"WAVE", b"fmt ", 16, 7, 2, 8_000, BYTES_PER_S, 2, 8, b"data", 0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="A run over an archive that is only names.")
    parser.add_argument("--recordings", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--shards", type=int, help="do no more than so many of those planned")
    parser.add_argument("--rtfx", type=float, help="of an engine; no time at all if left out")
    parser.add_argument("--done", type=float, default=0.0, help="share that an earlier run did")
    parser.add_argument(
        "--out", type=Path, help="a folder that may be filled; else a temporary one"
    )
    flags = parser.parse_args()
    storage.list_objects = listing(storage.list_objects, flags.recordings)
    storage.read_range = reading(storage.read_range)
    with tempfile.TemporaryDirectory() as folder:
        out = flags.out or Path(folder, "out")
        config = RunConfig(archive=ARCHIVE, out=str(out), model="fake", workers=flags.workers)
        if flags.done:
            told("an earlier run", lambda: fill(config, flags.done))
        simulate(config, flags.shards, flags.rtfx)


def simulate(config: RunConfig, n_shards: int | None, rtfx: float | None) -> None:
    """The run, as `transcribe run` does it."""
    environment = {"PYTHONPATH": str(Path.cwd())} | ({"SCALE_RTFX": str(rtfx)} if rtfx else {})
    hook = {"worker_process_setup_hook": "tests.scale.workers.install", "env_vars": environment}
    ray.init = functools.partial(ray.init, runtime_env=hook)
    run.prepare = planning(run.prepare, n_shards)
    distributed.disconnect = leaving(distributed.disconnect)
    before, started = time.process_time(), time.monotonic()
    report = run.transcribe(config, None, Console(file=sys.stderr))
    hours = report["audio_seconds"] / 3600
    spent = time.process_time() - before
    print(f"run: {report['shards']:,} shards, {report['recordings']:,} recordings, {hours:,.0f} h")
    print(
        f"    {time.monotonic() - started:.1f} s, of them {report['processing_seconds']:.1f} s work"
    )
    print(f"    driver: {spent:.1f} CPU s, planning included; {peak()} MB at most")


def planning(prepare, n_shards: int | None):
    def measured(*arguments):
        plan = told("planning", lambda: prepare(*arguments))
        print(
            f"    {len(plan.shards):,} shards, {plan.already_transcribed:,} recordings done before"
        )
        if n_shards is None:
            return plan
        return replace(plan, shards=plan.shards[:n_shards])

    return measured


def leaving(disconnect):
    """What Ray's own processes took, asked while they live."""

    def measured():
        for entry in Path("/proc").glob("[0-9]*/stat"):
            name, _, rest = entry.read_text().partition("(")[2].rpartition(")")
            fields = rest.split()  # from the third of proc_pid_stat(5) on
            if name in ("gcs_server", "raylet") and int(fields[1]) == os.getpid():
                ticks = int(fields[11]) + int(fields[12])
                print(f"    {name}: {ticks / os.sysconf('SC_CLK_TCK'):.1f} CPU s")
        disconnect()

    return measured


def told(what: str, do):
    cpu, wall = time.process_time(), time.monotonic()
    result = do()
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    print(f"{what}: {cpu:.1f} CPU s, {wall:.1f} s, {peak()} MB at most so far", flush=True)
    return result


def peak() -> str:
    return f"{pipeline.peak_bytes() / 1e6:,.0f}"


# ---- the archive ----------------------------------------------------------------------------


def listing(real, count: int):
    """A store's answer, by the thousand names a folder, as a call centre's system writes them."""

    def listed(url, unlisted=None):
        if url != ARCHIVE:
            yield from real(url, unlisted)
            return
        draw = random.Random(1)
        for number in range(count):
            seconds = draw.lognormvariate(0.0, 0.8) / 1.377 * MEAN_S
            uri = f"{ARCHIVE}/{number // 1000:06d}/call-{number:09d}.wav"
            size = 44 + int(seconds * BYTES_PER_S)
            yield storage.ObjectInfo(
                uri, size, f"{1_700_000_000_000_000 + number}", draw.randbytes(16).hex()
            )

    return listed


def reading(real):
    def read(uri, start, length, version=None):
        return HEAD if uri.startswith(ARCHIVE) else real(uri, start, length, version)

    return read


# ---- what an earlier run did ----------------------------------------------------------------


def fill(config: RunConfig, share: float) -> None:
    """Publish the first recordings' rows, as that run would have."""
    shards = plan_shards(estimate_durations(list_archive(config.archive)))
    some = shards[: int(len(shards) * share)]
    revision, engine = run.model_facts(config)
    settings = result_settings(config, revision, engine)
    job = Job(config, "earlier", revision, engine, fingerprint(settings), "cpu")
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(functools.partial(publish, job=job), some, chunksize=50):
            pass


def publish(shard, job):
    for part in workers.decode_shard(shard, job):
        recognised = pipeline.recognise_part(part, FakeEngine(), job)
        pipeline.publish_shard(pipeline.join_parts([recognised], job), job.config.out)


if __name__ == "__main__":
    main()
