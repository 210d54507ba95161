"""Rounds, with a cluster that is only played."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace

from rich.console import Console

from tests.property.test_recovery_properties import recordings
from tests.unit.test_report import SUMMARY
from transcribe import distributed, rounds
from transcribe.recovery import SetAside
from transcribe.shards import plan_shards


def test_a_round_that_stood_still_is_followed_by_one_with_the_engines_that_fit(monkeypatch):
    """A machine is gone, and engines fill the other one: no room is left to decode."""
    asked = []

    class Round:
        def __init__(self, shards, job, workers) -> None:
            self.shards = shards
            self.stood_still = workers > 1
            asked.append(workers)

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None:
            pass

        def outcomes(self):
            for number, shard in enumerate(self.shards):
                if self.stood_still and number:
                    yield SetAside(shard, faults=0)
                else:
                    yield replace(SUMMARY, shard_id=shard.shard_id)

    monkeypatch.setattr(distributed, "Round", Round)
    monkeypatch.setattr(distributed, "_resources", lambda: {"CPU": 2.0})
    monitor = SimpleNamespace(stopped="", spent=None, add=lambda *told: None)
    shards, done = plan_shards(recordings(6), shard_minutes=0.1), []
    rounds.work(
        shards,
        SimpleNamespace(),
        distributed.Placement("cpu", 2),
        Console(file=io.StringIO()),
        done,
        monitor,
    )
    assert asked == [2, 1]
    assert sorted(s.shard_id for s in done) == sorted(s.shard_id for s in shards)
