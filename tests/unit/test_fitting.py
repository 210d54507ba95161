"""Batches that did not fit are halved, nothing is lost, and the smaller size stays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transcribe.engines.base import EngineInput
from transcribe.engines.fake import FakeEngine
from transcribe.engines.fitting import Fitting, is_out_of_memory


class Memory:
    """Fails for more than so much at once; remembers what was asked of it."""

    def __init__(self, lengths, capacity, error):
        self.lengths, self.capacity, self.error = lengths, capacity, error
        self.sizes = []

    def work(self, batch):
        size = sum(self.lengths[i] for i in batch)
        self.sizes.append(size)
        if size > self.capacity:
            raise self.error
        return [f"heard {i}" for i in batch]


@given(
    lengths=st.lists(st.integers(1, 9), max_size=60),
    budget=st.integers(1, 300),
    capacity=st.integers(9, 100),
)
def test_every_window_is_heard_once_whatever_fits(lengths, budget, capacity):
    memory = Memory(lengths, capacity, MemoryError())
    fitting = Fitting(budget)
    heard = list(fitting.over(lengths, memory.work))
    assert sorted(heard) == [(i, f"heard {i}") for i in range(len(lengths))]
    too_much = [size for size in memory.sizes if size > capacity]
    assert fitting.halvings == len(too_much)
    assert all(later < earlier for earlier, later in itertools.pairwise(too_much))
    before = len(memory.sizes)
    list(fitting.over(lengths, memory.work))
    assert all(size <= capacity for size in memory.sizes[before:])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA failed with error out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 9 bytes."
        ),
        RuntimeError("cuBLAS failed with status CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_every_library_s_way_to_say_it_is_understood(error):
    assert is_out_of_memory(error)
    lengths = [1] * 8
    assert len(list(Fitting(8).over(lengths, Memory(lengths, 2, error).work))) == 8


def test_torch_on_a_cpu_says_what_is_expected():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("shapes differ")])
def test_other_errors_stay_what_they_are(error):
    fitting = Fitting(8)
    with pytest.raises(type(error)):
        list(fitting.over([1] * 8, Memory([1] * 8, 2, error).work))
    assert fitting.halvings == 0


def test_one_window_that_does_not_fit_is_an_error():
    with pytest.raises(MemoryError):
        list(Fitting(8).over([5], Memory([5], 4, MemoryError()).work))


def test_results_do_not_depend_on_what_fitted(monkeypatch):
    windows = [EngineInput(np.full(100 + n, n, np.int16), n) for n in range(20)]
    plain = FakeEngine().recognise(windows)
    hear = FakeEngine.hear

    def tight(self, batch):
        if len(batch) > 3:
            raise MemoryError
        return hear(self, batch)

    monkeypatch.setattr(FakeEngine, "hear", tight)
    engine = FakeEngine()
    assert engine.recognise(windows) == plain
    assert (engine.fitting.budget, engine.fitting.halvings) == (2, 2)
