"""`python -m tests.chaos.losses`: seconds that a killed worker, machine or driver costs.

The same run, undisturbed and with one kill in its middle, in turns; engines are fake ones with a
service time, and decoding is slow, so that it can be hit. What a killed run left undone, the same
command does, and its time is counted too.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from tests.chaos.schedules import Fault, Hand, published
from tests.chaos.test_chaos import Run
from tests.chaos.test_deaths import archive_of
from tests.chaos.world import World

ROUNDS = 3
N_RECORDINGS = 60  # 12 shards
STRUCK_AFTER = 3  # shards
KILLS = ["nothing", "kill engine", "kill decode", "kill node", "kill driver"]


def main() -> None:
    took: dict[str, list[float]] = {what: [] for what in KILLS}
    world = World(n_nodes=2)
    with tempfile.TemporaryDirectory() as folder:
        archive = archive_of(Path(folder, "calls"), [f"call-{n:02d}" for n in range(N_RECORDINGS)])
        try:
            for each in range(ROUNDS):
                for what in KILLS:
                    out = Path(folder, f"{what.replace(' ', '-')}-{each}", "out")
                    took[what].append(seconds(world, archive, out, what))
        finally:
            world.close()
    undisturbed = statistics.median(took["nothing"])
    print(f"undisturbed {undisturbed:.1f} s")
    for what in KILLS[1:]:
        lost = [t - undisturbed for t in took[what]]
        spread = f"{min(lost):.1f} to {max(lost):.1f}"
        print(f"{what:12} {statistics.median(lost):5.1f} s more ({spread})")


def seconds(world: World, archive: Path, out: Path, what: str) -> float:
    """From the beginning of the run to the end of the last one that was needed."""
    world.start()
    out.parent.mkdir()
    hand, begun = Hand(world, out, out.with_name("no-flag")), time.monotonic()
    run = Run(world, archive, out, hand.flag)
    hand.driver = run.process
    # The hand itself waits for a decode task, which is ahead of all else.
    after = 0 if what == "kill decode" else STRUCK_AFTER
    while published(out) < after and run.process.poll() is None:
        time.sleep(0.02)
    if what != "nothing":
        print(what, hand.strike(Fault(what, after, 0.0, 0.0, 0)), flush=True)
    if run.process.wait() == 0:
        return time.monotonic() - begun
    again = Run(world, archive, out, hand.flag)
    assert again.process.wait() == 0, again.said
    return time.monotonic() - begun


if __name__ == "__main__":
    main()
