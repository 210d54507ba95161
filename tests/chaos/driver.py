"""`python -m tests.chaos.driver ARCHIVE OUT ...`: the job, with `stage.py` on its workers.

What takes minutes in earnest takes seconds here, so that a schedule of faults is a short one.
"""

from __future__ import annotations

import functools
import os

import ray

from jobs.transcribe import main
from transcribe import distributed, watch

ENVIRONMENT = ("CHAOS_SERVICE_S", "CHAOS_DECODE_S", "CHAOS_OUT_OF_MEMORY")


def shorten():
    distributed._STANDSTILL_S = 120.0
    distributed._SILENCE_S = 15.0
    grace = {**watch._GRACE_S}
    grace["recognise"] = float(os.environ.get("CHAOS_GRACE_S", grace["recognise"]))
    watch._GRACE_S = grace
    watch._UNKNOWN_PACE = {"decode": 2.0, "recognise": 0.5}


def install():
    """On the workers: deadlines are reckoned by the watch, which is one of them."""
    shorten()
    from tests.chaos import stage

    stage.install()


if __name__ == "__main__":
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    environment |= {k: v for k, v in os.environ.items() if k == "CHAOS_GRACE_S"}
    hook = {"worker_process_setup_hook": "tests.chaos.driver.install", "env_vars": environment}
    ray.init = functools.partial(ray.init, runtime_env=hook)
    shorten()
    main()
