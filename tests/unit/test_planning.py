"""Forecasts: from a sample to an archive, from a trial to a finish and a price."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcribe import planning
from transcribe.archive import Recording
from transcribe.errors import Fatal
from transcribe.planning import (
    Actual,
    Pace,
    compared,
    differing_settings,
    here,
    makespan,
    ratio,
    shapes,
)
from transcribe.prices import load_catalogue, price_list
from transcribe.shards import plan_shards
from transcribe.survey import Interval, Seen, Survey, spread, total_seconds, with_durations

PACE = Pace(
    device="cpu",
    workers=2,
    recordings=10,
    audio_s=300.0,
    engine_s=Interval(0.05, 0.04, 0.06),
    decode_s=0.005,
    speech_s=Interval(0.8, 0.7, 0.9),
    startup_s=8.0,
    overhead_s=3.0,
)


def recording(n: int, size: int, extension: str = ".wav") -> Recording:
    uri = f"/calls/{n:05d}{extension}"
    return Recording(f"{n:032x}", uri, "1", size, None, None, 1.0)


def archive_of(seconds: list[float], rate: float = 8_000.0) -> list[Recording]:
    return [recording(n, round(s * rate)) for n, s in enumerate(seconds)]


def survey_of(recordings, seen, audio_s) -> Survey:
    return Survey(tuple(recordings), len(recordings), 0, 0, tuple(seen), audio_s)


# ---------------------------------------------------------------- from the sample to the whole


@given(st.lists(st.floats(2, 4_000), min_size=1, max_size=60))
def test_all_headers_read_is_the_sum_and_sure(seconds: list[float]) -> None:
    recordings = archive_of(seconds)
    seen = [Seen(r, s) for r, s in zip(recordings, seconds, strict=True)]
    total = total_seconds(recordings, seen)
    assert total.value == pytest.approx(sum(seconds))
    assert (total.low, total.high) == (total.value, total.value)
    planned = with_durations(recordings, seen)
    assert [r.duration_s for r in planned] == pytest.approx([max(1.0, s) for s in seconds])


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_holds_the_truth_about_19_times_of_20(seed: int) -> None:
    rng = np.random.default_rng(seed)
    held, tries = 0, 200
    for _ in range(tries):
        seconds = rng.lognormal(4, 1, 400)
        rates = rng.choice([2_000.0, 8_000.0, 16_000.0], 400)  # one extension, several codecs
        recordings = [recording(n, round(seconds[n] * rates[n])) for n in range(400)]
        chosen = rng.choice(400, 60, replace=False)
        total = total_seconds(recordings, [Seen(recordings[i], seconds[i]) for i in chosen])
        held += total.low <= seconds.sum() <= total.high
    assert 0.86 <= held / tries <= 1.0  # ratio estimators are a little too sure of small samples


def test_each_extension_has_its_own_rate_and_the_unseen_a_wide_bound() -> None:
    wavs = [recording(n, 160_000) for n in range(10)]
    mp3s = [recording(100 + n, 160_000, ".mp3") for n in range(10)]
    raw = [replace(recording(200, 1_000, ".xyz"), duration_s=40.0)]
    seen = [Seen(r, 20.0) for r in wavs[:3]] + [Seen(r, 80.0) for r in mp3s[:3]]
    total = total_seconds([*wavs, *mp3s, *raw], seen)
    assert total.value == pytest.approx(10 * 20 + 10 * 80 + 40)
    assert total.low == pytest.approx(1040 - 1.96 * 20) and total.high > total.value
    planned = {r.uri[-4:]: r.duration_s for r in with_durations([*wavs, *mp3s, *raw], seen)}
    assert planned == {".wav": 20.0, ".mp3": 80.0, ".xyz": 40.0}


def test_what_cannot_be_decoded_holds_no_audio() -> None:
    recordings = archive_of([10.0] * 4)
    seen = [Seen(r, 10.0) for r in recordings[:2]]
    seen += [Seen(r, problem="not_audio") for r in recordings[2:]]
    assert total_seconds(recordings, seen) == Interval.exactly(20.0)


@given(st.integers(1, 300), st.integers(1, 300))
def test_a_sample_is_spread_without_repetition(n_all: int, n: int) -> None:
    recordings = [recording(i, i % 17, (".wav", ".mp3")[i % 2]) for i in range(n_all)]
    chosen = spread(recordings, n)
    assert len({r.recording_id for r in chosen}) == len(chosen) == min(n, n_all)
    if n >= 2 and n_all >= 2:
        assert {r.uri[-4:] for r in chosen} == {".wav", ".mp3"} or n_all < 4 or n < 4


# ---------------------------------------------------------------- intervals


positive = st.floats(1e-3, 1e6)


@given(positive, positive, st.floats(0, 0.9), st.floats(0, 0.9))
def test_a_product_is_at_least_as_wide_as_its_factors(a, b, width_a, width_b) -> None:
    x = Interval(a, a * (1 - width_a), a * (1 + width_a))
    y = Interval(b, b * (1 - width_b), b * (1 + width_b))
    product = x.times(y)
    assert product.value == pytest.approx(a * b)
    assert 0 <= product.low <= product.value * (1 - max(width_a, width_b)) * (1 + 1e-9)
    assert product.high >= product.value * (1 + max(width_a, width_b)) * (1 - 1e-9)


def test_a_ratio_is_sum_over_sum_and_as_sure_as_its_pairs_agree() -> None:
    sure = ratio([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert sure.value == sure.low == sure.high == pytest.approx(0.1)
    unsure = ratio([1.0, 2.0, 6.0], [10.0, 20.0, 30.0])
    assert unsure.low < unsure.value < unsure.high
    assert ratio([2.0], [10.0]) == Interval(0.2, 0.1, 0.4)


# ---------------------------------------------------------------- this machine


@given(st.lists(st.floats(0, 1_000), max_size=50), st.integers(1, 12))
def test_no_work_is_lost_and_no_worker_waits(seconds: list[float], workers: int) -> None:
    ends = makespan(seconds, workers)
    assert ends >= sum(seconds) / workers * (1 - 1e-9)
    assert ends >= max(seconds, default=0.0)
    assert ends <= sum(seconds) / workers + max(seconds, default=0.0) + 1e-6


def test_a_forecast_is_start_up_and_the_busiest_worker() -> None:
    recordings = [replace(r, duration_s=120.0) for r in archive_of([120.0] * 5)]
    shards = plan_shards(recordings, 2.0)
    forecast = here(Interval.exactly(600.0), shards, PACE, 1.8)
    # Five shards of 6 engine seconds on 2 engines: three rounds.
    assert forecast.processing_s.value == pytest.approx(18 + 3 + 120 * 0.005)
    assert forecast.total_s.value == pytest.approx(forecast.processing_s.value + 8)
    # A fifth less by the pace, and a twentieth by the machine.
    assert forecast.processing_s.low == pytest.approx(18 * (1 - math.hypot(0.2, 0.05 / 1.05)) + 3.6)
    assert forecast.usd is not None
    assert forecast.usd.value == pytest.approx(forecast.total_s.value * 1.8 / 3600)


def test_nothing_to_do_takes_only_the_start() -> None:
    forecast = here(Interval.exactly(0.0), [], PACE, None)
    assert forecast.processing_s == Interval(3.0, 3.0, 3.0) and forecast.usd is None


# ---------------------------------------------------------------- rented machines


def catalogue():
    return load_catalogue()


def forecasts(
    hours: float, deadline: float, pace: Pace | None = PACE, model="openai/whisper-large-v3"
):
    seen = [Seen(r, 10.0, "pcm_mulaw", 2) for r in archive_of([10.0])]
    found = survey_of(archive_of([10.0]), seen, Interval(hours * 3600, hours * 3000, hours * 4000))
    return shapes(found, catalogue(), "openai/whisper-large-v3", pace, 10_000, deadline)


def test_cost_is_machines_times_hours_times_price() -> None:
    by_kind = {shape.kind: shape for shape in forecasts(1_000, 24)}
    spot = by_kind["g2-standard-4:spot"]
    assert spot.rtfx.value == pytest.approx(128 / 0.8)
    assert spot.machine_hours.value == pytest.approx(1_000 / 160)
    paid = spot.machine_hours.value + spot.machines * planning.BOOT_HOURS
    assert spot.usd.value == pytest.approx(paid * spot.price.usd)
    assert spot.usd.low < spot.usd.value < spot.usd.high
    assert by_kind["g2-standard-4"].usd.value > spot.usd.value
    assert by_kind["t2d-standard-16:spot"].basis == "estimated"
    assert "n1-standard-4-t4" not in by_kind  # nobody measured this model there


@given(st.floats(1, 1e6), st.floats(0.5, 1_000))
@settings(max_examples=50)
def test_the_first_shape_is_the_cheapest_that_meets_the_deadline(hours, deadline) -> None:
    rented = forecasts(hours, deadline)
    for shape in rented:
        assert shape.meets_deadline == (shape.finish_hours.high <= deadline)
        if shape.meets_deadline and shape.machines > 1:  # one fewer would not be sure to
            fewer = shape.machine_hours.high / (shape.machines - 1) + planning.BOOT_HOURS
            assert fewer > deadline * (1 - 1e-9)
    in_time = [shape.usd.value for shape in rented if shape.meets_deadline]
    assert in_time == sorted(in_time)
    assert all(shape.meets_deadline for shape in rented[: len(in_time)])


def test_decoding_bounds_a_fast_gpu() -> None:
    slow = replace(PACE, decode_s=0.1)
    h100 = next(s for s in forecasts(100, 24, slow) if s.kind == "a3-highgpu-1g")
    assert h100.rtfx.value == pytest.approx(25.5 / 0.1)


def test_without_a_pilot_the_bounds_are_wider() -> None:
    def width(pace):
        shape = next(s for s in forecasts(100, 24, pace) if s.kind == "g2-standard-4")
        return shape.usd.high / shape.usd.low

    assert width(None) > width(PACE)
    assert not any(shape.kind.startswith("t2d") for shape in forecasts(100, 24, None))


# ---------------------------------------------------------------- prices


def test_every_figure_of_the_catalogue_has_a_date_and_a_source() -> None:
    for kind, (machine, price) in catalogue().kinds().items():
        assert price.source and price.date.year >= 2025, kind
        assert machine.spot is None or machine.spot.usd < machine.on_demand.usd, kind
        assert (machine.gpu is None) == (machine.gpus == 0), kind
    gpus = {machine.gpu for machine in catalogue().machines}
    assert gpus >= {"L4", "T4", "A100", "H100"}


def test_prices_can_be_overridden(tmp_path) -> None:
    changed = load_catalogue(overrides=["g2-standard-4:spot=0.2", "a3-highgpu-1g=9"])
    assert changed.usd_per_hour("g2-standard-4:spot") == 0.2
    assert changed.usd_per_hour("a3-highgpu-1g") == 9
    assert changed.usd_per_hour("g2-standard-4") == catalogue().usd_per_hour("g2-standard-4")
    own = tmp_path / "own.yaml"
    own.write_text(
        "machines:\n- {name: box, gpus: 0, cpus: 4, region: cellar,"
        " on_demand: {usd: 0.1, date: 2026-01-01, source: the bill}}\n"
    )
    assert list(load_catalogue(str(own)).kinds()) == ["box"]


@pytest.mark.parametrize(
    ("content", "overrides", "named"),
    [
        (None, ["g2-standard-4"], "KIND=USD"),
        (None, ["g2-standard-4=-1"], "KIND=USD"),
        (None, ["gtx=1"], "no machine 'gtx'"),
        ("- 1", [], "not a mapping"),
        ("machines: [{name: x}]", [], "machines.0"),
        ("machines: {", [], "not a price catalogue"),
        ("machines: []\nmachine: 1", [], "machine: Extra"),
    ],
)
def test_what_is_no_catalogue_is_refused(tmp_path, content, overrides, named) -> None:
    file = None
    if content is not None:
        file = str(tmp_path / "prices.yaml")
        (tmp_path / "prices.yaml").write_text(content)
    with pytest.raises(Fatal, match=named):
        load_catalogue(file, overrides)


def test_a_missing_catalogue_is_named(tmp_path) -> None:
    with pytest.raises(Fatal, match="no such file"):
        load_catalogue(str(tmp_path / "none.yaml"))


def test_the_price_of_a_machine_is_the_flag_the_catalogue_or_unknown() -> None:
    assert price_list(2.5, None)("anything") == 2.5
    assert price_list(None, None)("g2-standard-4") == pytest.approx(0.70683)
    assert price_list(None, None)("this machine") is None
    assert price_list(None, "g2-standard-4:spot")("this machine") == pytest.approx(0.36122)
    with pytest.raises(Fatal, match="--machine-type 'x9' is not in the price catalogue"):
        price_list(None, "x9")


# ---------------------------------------------------------------- predicted against actual

PLAN = {
    "settings": {"model_revision": "r"},
    "recordings": 9,
    "repeated": 1,
    "audio_seconds": {"value": 110.0},
    "here": {
        "workers": 2,
        "device": "cpu",
        "processing_s": {"value": 45.0},
        "usd": {"value": 2.0},
    },
}
ACTUAL = Actual({"model_revision": "r"}, 10, 2, "cpu", 100.0, 50.0, 2.5)


def test_a_forecast_is_compared_with_what_came_true() -> None:
    assert compared(PLAN, ACTUAL) == {
        "audio_seconds": 110.0,
        "processing_seconds": 45.0,
        "usd": 2.0,
        "audio_seconds_error": pytest.approx(0.1),
        "processing_seconds_error": pytest.approx(-0.1),
        "usd_error": pytest.approx(-0.2),
    }


def test_settings_that_tell_a_forecast_from_a_run_are_named() -> None:
    assert differing_settings(PLAN, ACTUAL) == []
    other = replace(ACTUAL, settings={**ACTUAL.settings, "words": "x"})
    assert differing_settings(PLAN, other) == ["words"]
    assert differing_settings(PLAN, replace(other, recordings=ACTUAL.recordings + 1)) == []
    assert differing_settings(None, other) == []


@pytest.mark.parametrize(
    ("plan", "actual", "known"),
    [
        (None, ACTUAL, set()),
        (PLAN, replace(ACTUAL, settings={"model_revision": "s"}), set()),
        (PLAN, replace(ACTUAL, recordings=11), set()),
        (PLAN, replace(ACTUAL, workers=3), {"audio_seconds", "audio_seconds_error"}),
        ({**PLAN, "here": None}, ACTUAL, {"audio_seconds", "audio_seconds_error"}),
    ],
)
def test_what_was_not_planned_is_not_compared(plan, actual, known) -> None:
    made = compared(plan, actual)
    assert {name for name, value in made.items() if value is not None} == known
