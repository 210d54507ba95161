"""What engines waited for, and the sentence about it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe.bottleneck import EngineTime, verdict
from transcribe.engines.base import EngineWork
from transcribe.pipeline import ShardSummary, StageSeconds


def shard(worker: str, decoding: float, start: float, end: float) -> ShardSummary:
    """Decoding began at `decoding`, recognition at `start`; published the moment it ended."""
    return ShardSummary(
        shard_id=f"{worker}{start}",
        recordings=1,
        ok=1,
        empty=0,
        failed=0,
        audio_seconds=1.0,
        channel_seconds=1.0,
        speech_seconds=1.0,
        windows=1,
        work=EngineWork(),
        seconds=StageSeconds(recognise=end - start - 0.5, assemble=0.5, publish=2.0),
        device="cpu",
        node="n",
        worker=worker,
        decode_peak_bytes=1,
        recognise_peak_bytes=1,
        started_at=decoding,
        finished_at=end + 2.0,
        failures={},
    )


def test_engine_time_is_split_by_what_the_engine_waited_for() -> None:
    summaries = [shard("a", 0, 10, 20), shard("a", 1, 25, 40), shard("b", 2, 12, 30)]
    assert EngineTime.of(summaries, 2) == EngineTime(
        span_s=40, busy_s=10 + 15 + 18, start_s=10 + 12, starved_s=5, tail_s=10
    )


def test_an_engine_that_got_no_shard_waited_from_the_start() -> None:
    assert EngineTime.of([shard("a", 0, 10, 20)], 2) == EngineTime(20, 10, 30, 0, 0)


spans = st.lists(
    st.tuples(st.sampled_from("abc"), st.floats(0, 50), st.floats(51, 99), st.floats(0.5, 20)),
    min_size=1,
    max_size=8,
)


@given(spans, st.integers(1, 4))
def test_the_parts_add_up(made: list[tuple[str, float, float, float]], workers: int) -> None:
    """However shards lie: more names than engines (after a crash), overlaps of skewed clocks."""
    time = EngineTime.of([shard(w, d, s, s + took) for w, d, s, took in made], workers)
    parts = (time.busy_s, time.start_s, time.starved_s, time.tail_s)
    assert min(parts) >= 0
    if time.busy_s <= workers * time.span_s:
        assert sum(parts) == pytest.approx(workers * time.span_s)


STAGES = {"read": 10.0, "decode": 100.0, "resample": 20.0, "speech_detection": 70.0}
ENGINE = {"features": 2.0, "encoder": 120.0, "decoder": 60.0}


def test_busy_engines_are_the_bottleneck() -> None:
    said = verdict(EngineTime(100, 190, 4, 3, 3), 2, STAGES, ENGINE)
    assert said.kind == "recognition"
    assert "95% of the time, 63% of that in the encoder" in said.sentence


def test_starved_engines_ask_for_decode_cores() -> None:
    # 2 engines, 100 s, half of it starved: without that, 50 s, in which decoding's 200 s need
    # 4 cores instead of 2, one more for each engine, for twice the speed.
    said = verdict(EngineTime(100, 100, 0, 100, 0), 2, STAGES, ENGINE)
    assert said.kind == "decode"
    assert "1.0 more decode cores per engine would raise RTFx by 100%" in said.sentence
    assert "kept 2.0 cores busy" in said.sentence


def test_a_slow_store_is_not_mended_by_cores() -> None:
    said = verdict(EngineTime(100, 100, 0, 100, 0), 2, {**STAGES, "read": 900.0}, ENGINE)
    assert said.kind == "store"
    assert "50% of their time" in said.sentence and "core" not in said.sentence


@pytest.mark.parametrize(
    ("time", "kind"),
    [
        (EngineTime(100, 120, 60, 10, 10), "start"),
        (EngineTime(100, 120, 10, 10, 60), "tail"),
        (EngineTime(), "nothing"),
    ],
)
def test_the_longest_wait_names_the_bottleneck(time: EngineTime, kind: str) -> None:
    assert verdict(time, 2, STAGES, ENGINE).kind == kind


def test_engines_without_parts_have_a_verdict_too() -> None:
    said = verdict(EngineTime(10, 10, 0, 0, 0), 1, STAGES, dict.fromkeys(ENGINE, 0.0))
    assert said.sentence.startswith("Recognition-bound: the engines were at work 100% of the time.")
