"""A few hundred of the broken files that `make fuzz` tries by the thousand, and what it found."""

from __future__ import annotations

from tests.fuzz.mutate import case
from tests.fuzz.run import fuzz


def test_broken_files_end_as_rows():
    done = fuzz(first=1, n_cases=200)
    print(f"cases 1 to 200, digest {done.digest}: {dict(done.kinds)}")
    assert done.breaches == []
    assert done.kinds["ok"] and done.kinds["truncated"] and done.kinds["corrupt"]


def test_a_number_is_always_the_same_file():
    assert [case(seed) for seed in (1, 77, 4000)] == [case(seed) for seed in (1, 77, 4000)]
    assert len({case(seed)[1] for seed in range(50)}) == 50


def test_a_breach_is_noticed(monkeypatch):
    monkeypatch.setattr("tests.fuzz.run.BYTES", -1)
    assert "took" in fuzz(first=1, n_cases=1).breaches[0]
