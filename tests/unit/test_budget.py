"""Machine time, money, limits: sums that must add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe.budget import Bill, Limits, Meter, PaidMachine

PRICES = {"big": 10.0, "small": 1.0}


def meter_of(*observations: tuple[float, list[PaidMachine]]) -> Meter:
    meter = Meter(PRICES.get)
    for at, nodes in observations:
        meter.observe(nodes, at)
    return meter


def test_machines_are_paid_from_when_they_are_seen_until_they_are_not() -> None:
    big, small = PaidMachine("a", "big", 2), PaidMachine("b", "small", 1)
    meter = meter_of((0, [big]), (1800, [big, small]), (5400, [small]), (9000, [small]))
    assert meter.kinds["big"].seconds == 5400
    assert meter.kinds["small"].seconds == 7200
    assert meter.usd == pytest.approx(1.5 * 10 + 2 * 1)
    assert meter.usd_per_hour == 1.0


def test_a_machine_without_a_price_counts_as_the_dearest_so_that_a_limit_holds() -> None:
    meter = meter_of(
        (0, [PaidMachine("a", "big", 1), PaidMachine("c", "unheard of", 1)]), (3600, [])
    )
    assert meter.usd == pytest.approx(20.0)
    assert meter.unpriced() == ["unheard of"]


@given(
    st.lists(
        st.tuples(st.floats(0, 1e5), st.lists(st.sampled_from(["big", "small"]), max_size=5)),
        min_size=1,
        max_size=20,
    ),
    st.lists(st.floats(0, 1e6), max_size=5),
)
def test_the_bill_is_the_meter_and_idle_is_a_part_of_it(steps, busy) -> None:
    at, meter = 0.0, Meter(PRICES.get)
    for passed, kinds in steps:
        at += passed
        meter.observe([PaidMachine(f"{kind}{i}", kind, 2) for i, kind in enumerate(kinds)], at)
    busy_by_host = {f"big{i}": seconds for i, seconds in enumerate(busy)}
    made = meter.bill(busy_by_host, 0.0).as_report(3600.0, {"padding": 0.25})
    cost, machines = made["cost"], made["machines"]
    assert cost["usd"] is None or cost["usd"] == pytest.approx(meter.usd)
    assert (cost["usd"] is None) == (not machines)
    for each in machines.values():
        assert each["usd"] == pytest.approx(each["hours"] * each["usd_per_hour"])
        assert each["idle_share"] is None or 0 <= each["idle_share"] <= 1
    if cost["usd"] is not None:
        assert 0 <= cost["idle_usd"] <= cost["usd"] * (1 + 1e-9)
        assert cost["padding_usd"] == pytest.approx((cost["usd"] - cost["idle_usd"]) / 4)
        assert cost["usd_per_1000_audio_hours"] == pytest.approx(1000 * cost["usd"])


def test_idle_is_what_engines_did_not_recognise() -> None:
    meter = meter_of((0, [PaidMachine("a", "big", 2)]), (3600, []))
    charge = meter.bill({"a": 1800.0}, 0.0).charges["big"]
    assert charge.idle_share == pytest.approx(0.75)
    assert charge.idle_usd == pytest.approx(7.5)


def test_nothing_is_known_without_machines() -> None:
    made = Bill().as_report(10.0, {})
    assert set(made["cost"].values()) == {None} and made["machines"] == {}


@pytest.mark.parametrize(
    ("usd", "hours", "reason"),
    [
        (4.0, 1.0, ""),
        (4.6, 1.0, "--max-spend 5 is used up"),  # what is begun costs another half
        (4.0, 2.9, "--max-hours 3 are over"),
        (9.0, 9.0, "--max-spend 5 is used up"),
    ],
)
def test_a_limit_is_reached_when_it_would_be_once_the_begun_shards_are_through(
    usd: float, hours: float, reason: str
) -> None:
    assert Limits(5, 3).reached(usd, 2.0, hours, 0.25) == reason
    assert Limits().reached(usd, 2.0, hours, 0.25) == ""


def test_the_tighter_limit_tells_how_much_is_used() -> None:
    assert Limits(10, 4).used(2, 3) == 0.75
    assert Limits(10, None).used(2, 3) == 0.2
    assert Limits().used(2, 3) == 0
