"""Whatever dies in whatever order: every recording is published or given up, once, in the end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from transcribe.archive import Recording
from transcribe.recovery import TRIES_ALONE, Recovery, SetAside, pieces
from transcribe.shards import Shard, plan_shards


def recordings(n: int) -> list[Recording]:
    return [
        Recording(
            recording_id=f"{i:032x}",
            uri=f"/calls/{i:04d}.wav",
            generation="1",
            size_bytes=100,
            content_md5=None,
            metadata=None,
            duration_s=10.0,
        )
        for i in range(n)
    ]


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 60),
    shard_minutes=st.floats(0.1, 5),
    poison=st.sets(st.integers(0, 59), max_size=3),
    bad_luck=st.randoms(use_true_random=False),
)
def test_poison_is_given_up_and_nothing_else(n, shard_minutes, poison, bad_luck):
    """Machines vanish as they like; a worker dies at each shard that holds poison."""
    archive = recordings(n)
    deadly = {archive[i].recording_id for i in poison if i < n}
    recovery = Recovery(plan_shards(archive, shard_minutes))
    published: list[str] = []
    while True:
        shards, must_be_alone = recovery.next_round()
        if not shards:
            break
        vanished = bad_luck.randrange(len(shards)) if bad_luck.random() < 0.2 else None
        for i, shard in enumerate(shards):
            ids = [r.recording_id for r in shard.recordings]
            assert not must_be_alone or len(ids) == 1
            if i == vanished and len(shards) > 1:
                recovery.set_aside(SetAside(shard, faults=0))
            elif deadly.isdisjoint(ids):
                recovery.came_back()
                published += ids
            else:
                recovery.set_aside(SetAside(shard, faults=bad_luck.choice([1, 2])))
    given_up = [g.recording.recording_id for g in recovery.given_up]
    assert sorted(published + given_up) == sorted(r.recording_id for r in archive)
    assert set(given_up) == deadly
    assert all(g.tries >= TRIES_ALONE for g in recovery.given_up)


@given(st.integers(1, 5000))
def test_pieces_hold_everything_once_in_order(n):
    whole = Shard("x", tuple(recordings(n)))
    cut = pieces(whole)
    assert [r for piece in cut for r in piece.recordings] == list(whole.recordings)
    assert all(piece.recordings for piece in cut)
    assert len({piece.shard_id for piece in cut}) == len(cut)
    assert n == 1 or max(len(piece.recordings) for piece in cut) < n
