"""The watch: who died, who is stuck, who may begin."""

from __future__ import annotations

import pytest

from transcribe.errors import Fatal
from transcribe.recovery import Recovery, SetAside
from transcribe.shards import plan_shards
from transcribe.watch import DEATHS_IN_PLACE, Watch, Work, Worker, deadline_s

HERE, THERE = Worker("node", 1, "10"), Worker("node", 2, "20")


def work(stage="recognise", worker=HERE, shard="a", audio_s=10.0, began=0.0):
    return Work(shard, stage, audio_s, worker, began)


def test_who_begins_again_without_an_end_has_died_and_is_set_aside_in_the_end():
    watch = Watch()
    for n in range(DEATHS_IN_PLACE):
        assert watch.begin(work(worker=Worker("node", n, ""))) == "go"
    assert watch.begin(work(worker=THERE)) == "set aside"
    died, words = watch.deaths("a")
    assert [worker.pid for worker in died] == list(range(DEATHS_IN_PLACE))
    assert words == ""
    assert watch.begin(work(shard="b")) == "go"  # its mates go on


def test_a_shard_that_ends_may_be_done_again():
    """Ray does so when a machine takes a result with it."""
    watch = Watch()
    for _ in range(5):
        assert watch.begin(work()) == "go"
        watch.end(work(), 1.0)
    assert watch.deaths("a") == ((), "")


def test_a_worker_that_died_in_silence_counts_too():
    watch = Watch()
    watch.begin(work())
    watch.explain("a", "recognise raised ValueError")
    assert watch.deaths("a") == ((HERE,), "recognise raised ValueError")


def test_deadlines_come_from_the_audio_and_from_what_was_seen():
    watch = Watch()
    for stage in ("decode", "recognise"):
        watch.begin(work(stage, audio_s=3600.0))
        assert watch.look(deadline_s(stage, 3600.0, None) - 1).overdue == ()
        assert watch.look(deadline_s(stage, 3600.0, None) + 1).overdue
        watch.end(work(stage, audio_s=3600.0), 360.0)  # a tenth of real time
        watch.begin(work(stage, audio_s=60.0))
        assert deadline_s(stage, 60.0, 0.1) < deadline_s(stage, 60.0, None)
        assert watch.look(deadline_s(stage, 60.0, 0.1) + 1).overdue[0].audio_s == 60.0
        watch.end(work(stage, audio_s=60.0), 6.0)
    assert watch.look(1e9).overdue == ()


def test_a_run_that_winds_down_only_publishes():
    watch = Watch()
    watch.begin(work("recognise", shard="a"))
    watch.stop()
    assert watch.begin(work("decode", shard="b")) == "stop"
    assert watch.begin(work("recognise", shard="b")) == "stop"
    watch.end(work("recognise", shard="a"), 1.0)
    assert watch.look(1.0).unpublished == 1
    assert watch.begin(work("publish", shard="a", audio_s=0.0)) == "go"
    watch.end(work("publish", shard="a", audio_s=0.0), 2.0)
    assert watch.look(2.0).unpublished == 0


def test_engines_that_never_get_ready_are_counted():
    watch = Watch()
    for _ in range(3):
        assert watch.begin(work("load", shard="actor")) == "go"
    assert watch.look(1.0).loads_in_vain == 3
    watch.end(work("load", shard="actor"), 1.0)
    assert watch.look(1.0).loads_in_vain == 0


def test_workers_that_die_at_everything_are_nobodys_fault(recordings):
    recovery = Recovery(plan_shards(recordings(20), 60))
    with pytest.raises(Fatal, match="recordings are not the reason"):
        for _ in range(20):
            for shard in recovery.next_round()[0]:
                recovery.set_aside(SetAside(shard, faults=2))


def test_rounds_in_which_nothing_happens_come_to_an_end(recordings):
    recovery = Recovery(plan_shards(recordings(20), 60))
    with pytest.raises(Fatal, match="did not come back"):
        for _ in range(20):
            for shard in recovery.next_round()[0]:
                recovery.set_aside(SetAside(shard, faults=0))


@pytest.fixture
def recordings():
    from tests.property.test_recovery_properties import recordings

    return recordings
