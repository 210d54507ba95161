"""`python -m tests.scale.listing`: objects listed a second, locally and from the GCS emulator.

The emulator is one Python process beside it, so its figure says what the whole path does, not what
a bucket can do.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from tests.integration.conftest import emulator, new_bucket
from transcribe import storage
from transcribe.archive import list_archive


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast an archive is listed.")
    parser.add_argument("--objects", type=int, default=10_000)
    count = parser.parse_args().objects
    names = [f"{n // 1000:06d}/call-{n:09d}.wav" for n in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x")
        told("local tree", folder, count)
    with emulator() as address:
        os.environ["STORAGE_EMULATOR_HOST"] = address
        os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
        bucket = new_bucket(address)
        for name in names:
            storage.put(f"{bucket}/{name}", b"x")
        told("emulator", bucket, count)


def told(what: str, archive: str, count: int) -> None:
    cpu, wall = time.process_time(), time.monotonic()
    assert len(list_archive(archive)) == count
    cpu, wall = time.process_time() - cpu, time.monotonic() - wall
    print(f"{what}: {count / wall:,.0f} objects/s ({count:,} in {wall:.2f} s, {cpu:.2f} CPU s)")


if __name__ == "__main__":
    main()
