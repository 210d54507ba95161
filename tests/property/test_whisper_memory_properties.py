"""What a batch listens to and has said stays with its rows, whatever goes and whatever moves."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from transcribe.engines.whisper_layers import Cache, Memory, _Heard

N_LAYERS, N_HEADS, CAPACITY, D = 2, 2, 6, 3


def marked(first: int, n: int, length: int) -> torch.Tensor:
    """A row for each window, full of its number: `[n, N_HEADS, length, D]`."""
    return torch.arange(first, first + n)[:, None, None, None].repeat(1, N_HEADS, length, D).float()


def marks(tensors: list[torch.Tensor], length: int) -> list[int]:
    """The number that each row is full of, the same in every layer."""
    (found,) = {tuple(t[:, :, :length].flatten(1).unique(dim=1)[:, 0].tolist()) for t in tensors}
    return [int(n) for n in found]


@given(st.data())
def test_windows_that_go_on_are_kept_and_stand_as_is_said(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    parts, first = [], 0
    for length, n in enumerate(sizes, start=1):
        own = [[marked(first, n, length) for _ in range(N_LAYERS)] for _ in "kv"]
        parts.append(_Heard(*own, weight=torch.zeros(length)))
        first += n
    memory, standing = Memory(parts), list(range(first))
    for _ in range(3):
        places = range(len(standing))
        kept = [place for place in places if data.draw(st.booleans())]
        order = memory.keep(kept)
        assert sorted(order) == kept
        standing = [standing[place] for place in order]
        told = [n for part in memory.parts for n in marks(part.keys + part.values, 1)]
        assert told == standing


@given(st.data())
def test_rows_that_are_taken_have_said_what_they_had_said(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    cache = Cache(*[[marked(0, n, CAPACITY) for _ in range(N_LAYERS)] for _ in "kv"], length=4)
    said = list(range(n))
    for _ in range(4):
        rows = data.draw(st.lists(st.integers(0, len(said) - 1), min_size=1, max_size=9))
        cache.take(torch.tensor(rows))
        said = [said[row] for row in rows]
        assert marks(cache.keys + cache.values, cache.length) == said
