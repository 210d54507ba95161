"""Sums, ratios and rows of a run's report."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe import publish, schema
from transcribe.budget import Bill, Charge
from transcribe.engines.base import EngineWork
from transcribe.pipeline import ShardSummary, StageSeconds
from transcribe.report import RunFacts, Totals, metric_rows, report

STAGES = StageSeconds(
    read=1.0,
    decode=2.0,
    resample=3.0,
    speech_detection=4.0,
    recognise=50.0,
    features=5.0,
    encoder=30.0,
    decoder=11.0,
    assemble=0.5,
    publish=0.25,
    decode_queue=8.0,
    publish_queue=16.0,
    decode_cpu=6.0,
    recognise_cpu=49.0,
)
SUMMARY = ShardSummary(
    shard_id="s1",
    recordings=4,
    ok=2,
    empty=1,
    failed=1,
    audio_seconds=600.0,
    channel_seconds=1_200.0,
    speech_seconds=400.0,
    windows=30,
    work=EngineWork(5.0, 30.0, 11.0, 10.0, 16_000 * 300, 16_000 * 400, 900, 1_000),
    seconds=STAGES,
    device="cpu",
    node="n",
    worker="n:1",
    decode_peak_bytes=1_000,
    recognise_peak_bytes=2_000,
    started_at=1_772_366_400.0,
    finished_at=1_772_366_460.5,
    failures={"corrupt": 1},
)
BILL = Bill({"big": Charge(machines=1, hours=2.0, usd_per_hour=3.0, idle_share=0.25)})
FACTS = RunFacts(
    run_id="r",
    ended="complete",
    archive="a",
    out="o",
    model="m",
    engine="e",
    device="cpu",
    workers=2,
    archive_recordings=10,
    unlisted_folders=0,
    already_transcribed=2,
    superseded=0,
    startup_seconds=10.0,
    processing_seconds=100.0,
    total_seconds=110.0,
    driver_peak_bytes=500,
)


def totals_of(*summaries: ShardSummary) -> Totals:
    totals = Totals()
    for summary in summaries:
        totals.add(summary)
    return totals


def test_shards_add_up() -> None:
    other = replace(
        SUMMARY, shard_id="s2", failures={"corrupt": 2, "missing": 1}, recognise_peak_bytes=9_000
    )
    made = report(FACTS, totals_of(SUMMARY, other), [SUMMARY, other])
    assert (made["shards"], made["recordings"], made["windows"]) == (2, 8, 60)
    assert (made["ok"], made["empty"], made["failed"]) == (4, 2, 2)
    assert made["failures"] == {"corrupt": 3, "missing": 1}
    assert (made["audio_seconds"], made["channel_seconds"]) == (1_200.0, 2_400.0)
    assert made["stages"]["recognise"] == {"seconds": 100.0, "rtfx": 12.0}
    assert made["queue_seconds"] == {"before_recognise": 16.0, "before_publish": 32.0}
    assert made["peak_bytes"] == {"driver": 500, "decode_worker": 1_000, "engine_worker": 9_000}


def test_speed_is_audio_seconds_over_wall_seconds() -> None:
    made = report(FACTS, totals_of(SUMMARY), [SUMMARY])
    assert made["rtfx"] == 6.0
    assert made["rtfx_with_startup"] == pytest.approx(600 / 110)
    assert made["worker_busy_share"] == 50.0 / (2 * 100.0)
    assert made["device_busy_share"] == 46.0 / (2 * 100.0)


def test_batches_are_as_full_as_the_work_says() -> None:
    made = report(FACTS, totals_of(SUMMARY, SUMMARY), [SUMMARY, SUMMARY])
    assert made["padding_share"] == pytest.approx(0.25)
    assert made["decoder_idle_share"] == pytest.approx(0.1)
    assert made["retries_share"] == pytest.approx(10 / 50)


def test_padding_costs_the_encoder_and_is_not_counted_in_retries_as_well() -> None:
    cost = report(FACTS, totals_of(SUMMARY), [SUMMARY], BILL)["cost"]
    busy = cost["usd"] - cost["idle_usd"]
    assert cost["retries_usd"] == pytest.approx(busy / 5)
    assert cost["padding_usd"] == pytest.approx((busy * 4 / 5) * (30 / 50) / 4)


def test_what_the_run_was_is_carried_over() -> None:
    made = report(FACTS, Totals(), [])
    assert {name: made[name] for name in dataclasses.asdict(FACTS)} == dataclasses.asdict(FACTS)


def test_a_run_that_did_nothing_has_no_ratios_and_is_json() -> None:
    idle = replace(FACTS, workers=0, startup_seconds=0.0, processing_seconds=0.0, total_seconds=0.0)
    made = report(idle, Totals(), [])
    assert made["rtfx"] is made["rtfx_with_startup"] is made["worker_busy_share"] is None
    assert {stage["rtfx"] for stage in made["stages"].values()} == {None}
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_every_stage_is_reported() -> None:
    made = report(FACTS, totals_of(SUMMARY), [SUMMARY])
    reported = {s["seconds"] for s in made["stages"].values()} | {*made["queue_seconds"].values()}
    reported |= {*made["cpu_seconds"].values()}
    assert reported == set(dataclasses.asdict(STAGES).values())


@given(st.lists(st.integers(0, 1_000), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_shards_does_not_matter(amounts: list[int], random: object) -> None:
    summaries = [
        replace(SUMMARY, shard_id=str(i), ok=n, windows=n, failures={f"kind{n % 3}": n})
        for i, n in enumerate(amounts)
    ]
    shuffled = list(summaries)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    made = report(FACTS, totals_of(*summaries), summaries)
    assert made == report(FACTS, totals_of(*shuffled), shuffled)
    assert made["ok"] == sum(amounts) == sum(made["failures"].values())


def test_metric_rows_are_exactly_the_columns_of_the_schema() -> None:
    rows = metric_rows("run", [SUMMARY, replace(SUMMARY, shard_id="s2", seconds=StageSeconds())])
    for row in rows:
        assert set(row) == set(schema.METRICS.names)
    table = pq.read_table(io.BytesIO(publish.parquet_bytes(rows, schema.METRICS)))
    assert table.schema.equals(schema.METRICS)
    assert table.to_pylist() == rows
    first, second = rows
    assert (first["run_id"], first["shard_id"], first["rtfx"]) == ("run", "s1", 12.0)
    assert second["rtfx"] is None
    assert (first["heard_seconds"], first["padded_seconds"]) == (300.0, 400.0)
    assert first["speech_detection_seconds"] == 4.0 and first["decode_queue_seconds"] == 8.0
    assert first["started_at"].isoformat() == "2026-03-01T12:00:00+00:00"
    assert (first["finished_at"] - first["started_at"]).total_seconds() == 60.5


def test_metrics_of_no_shards_are_an_empty_table() -> None:
    table = pq.read_table(io.BytesIO(publish.parquet_bytes(metric_rows("run", []), schema.METRICS)))
    assert table.num_rows == 0 and table.schema.equals(schema.METRICS)
