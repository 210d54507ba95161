"""`python -m tests.chaos.driver ARCHIVE OUT ...`: the job, with `stage.py` on its workers.

What takes minutes in earnest takes seconds here, so that a schedule of faults is a short one.
"""

from __future__ import annotations

import functools

import ray

from jobs.transcribe import main
from transcribe import distributed


def shorten() -> None:
    """Deadlines and patience for recordings of some seconds."""
    distributed._STANDSTILL_S = 20.0
    distributed._SILENCE_S = 10.0


if __name__ == "__main__":
    hook = {"worker_process_setup_hook": "tests.chaos.stage.install"}
    ray.init = functools.partial(ray.init, runtime_env=hook)
    shorten()
    main()
