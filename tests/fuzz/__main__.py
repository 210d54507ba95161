"""The command `python -m tests.fuzz`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.mutate import case
from tests.fuzz.run import fuzz


def main() -> None:
    parser = argparse.ArgumentParser(description="Broken files through decoding.")
    parser.add_argument("--first", type=int, default=1, help="number of the first case")
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--save", type=Path, help="folder for the files that are breaches")
    flags = parser.parse_args()
    done = fuzz(flags.first, flags.cases)
    print(f"cases           {flags.first} to {flags.first + flags.cases - 1}")
    for kind, count in done.kinds.most_common():
        print(f"{kind:20}{count}")
    print(f"longest         {done.longest_s:.2f} s of CPU time")
    print(f"largest         {done.largest_bytes / 2**20:.0f} MiB")
    print(f"digest          {done.digest}")
    for breach in done.breaches:
        print(f"BREACH  case {breach}")
        if flags.save:
            name, data = case(int(breach.split()[0]))
            flags.save.mkdir(parents=True, exist_ok=True)
            (flags.save / f"{breach.split()[0]}-{name}").write_bytes(data)
    sys.exit(1 if done.breaches else 0)


main()
