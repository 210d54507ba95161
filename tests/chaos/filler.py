"""`python -m tests.chaos.filler ADDRESS SECONDS`: hold every node's object store full."""

from __future__ import annotations

import sys
import time

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
def fill(n_bytes):
    return np.zeros(n_bytes, np.uint8)


def main(address, seconds):
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    held = [
        fill.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(30_000_000)
        for node in ray.nodes()
        for _ in range(3)
    ]
    ray.wait(held, num_returns=len(held), timeout=seconds)
    time.sleep(seconds)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
