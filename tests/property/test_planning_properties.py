"""Batches and shards hold everything exactly once, and do not depend on order."""

from hypothesis import given
from hypothesis import strategies as st

from transcribe.archive import Recording
from transcribe.batching import plan_batches
from transcribe.shards import plan_shards


@given(st.lists(st.sampled_from([32_000, 64_000, 480_000]), max_size=60), st.integers(1, 2_000_000))
def test_batches_hold_each_window_once_within_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len({lengths[i] for i in batch}) == 1
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget


def recording(index: int, seconds: float) -> Recording:
    return Recording(
        recording_id=f"{index:032x}",
        uri=f"/archive/{index:06d}.wav",
        generation="1",
        size_bytes=1,
        content_md5=None,
        metadata=None,
        duration_s=seconds,
    )


archives = st.lists(st.floats(0.1, 4_000), max_size=80).map(
    lambda lengths: [recording(i, s) for i, s in enumerate(lengths)]
)


@given(archives, st.one_of(st.none(), st.floats(0.5, 100)), st.randoms(use_true_random=False))
def test_shards_hold_each_recording_once_and_ignore_order(archive, minutes, random):
    shards = plan_shards(archive, minutes)
    assert sorted(r.uri for s in shards for r in s.recordings) == [r.uri for r in archive]
    assert len({s.shard_id for s in shards}) == len(shards)
    shuffled = list(archive)
    random.shuffle(shuffled)
    assert [s.shard_id for s in plan_shards(shuffled, minutes)] == [s.shard_id for s in shards]


@given(archives, st.floats(0.5, 100))
def test_only_a_single_recording_makes_a_shard_too_long(archive, minutes):
    for shard in plan_shards(archive, minutes):
        assert shard.duration_s <= minutes * 60 + 1e-6 or len(shard.recordings) == 1


def test_an_archive_of_any_size_is_cut_into_a_workable_number_of_shards():
    small = plan_shards([recording(i, 60) for i in range(10)])
    large = plan_shards([recording(i, 360) for i in range(10_000)])
    assert 4 <= len(small) <= 10
    assert max(s.duration_s for s in large) <= 3_600
