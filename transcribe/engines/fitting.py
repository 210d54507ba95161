"""Batches that fit into memory: what ran out of it is halved, tried again, and stays halved.

Owns what "out of memory" looks like in the libraries that compute here. Engines give it their
budget and their work; since no result depends on its batch, none changes.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from transcribe.batching import plan_batches

_LOG = logging.getLogger(__name__)

T = TypeVar("T")

# torch on a CPU, CTranslate2 and CUDA's own libraries raise a plain RuntimeError.
_SAYS_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "bad_alloc",
    "alloc_failed",
    "failed to allocate",
)


class Fitting:
    """A budget for batches that shrinks when memory runs out.

    Attributes:
        budget: padded samples, or windows, in a batch (see `plan_batches`).
        halvings: how often it was halved since the engine was loaded.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.halvings = 0

    def over(
        self, padded_lengths: Sequence[int], work: Callable[[list[int]], Sequence[T]]
    ) -> Iterator[tuple[int, T]]:
        """Do `work` on batches of indices; yields every index once, with its result.

        Raises:
            Exception: what `work` raised, unless it was for memory and the batch can be smaller.
        """
        batches = plan_batches(padded_lengths, self.budget)
        while batches:
            batch = batches.pop(0)
            try:
                made = work(batch)
            except Exception as error:
                if len(batch) == 1 or not is_out_of_memory(error):
                    raise
                self._halve(padded_lengths[batch[0]] * len(batch))
                left = [index for each in (batch, *batches) for index in each]
                planned = plan_batches([padded_lengths[index] for index in left], self.budget)
                batches = [[left[position] for position in each] for each in planned]
                continue
            yield from zip(batch, made, strict=True)

    def _halve(self, cost: int) -> None:
        """Below what was too much."""
        self.budget = max(1, cost // 2)
        self.halvings += 1
        _LOG.warning("out of memory: batches are half as large from now on")
        _release()


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the device or of the process."""
    if isinstance(error, MemoryError):
        return True
    if not isinstance(error, RuntimeError):  # torch's OutOfMemoryError is one
        return False
    text = str(error).lower()
    return any(words in text for words in _SAYS_OUT_OF_MEMORY)


def _release() -> None:
    """Give back what the failed try still holds."""
    gc.collect()
    torch = sys.modules.get("torch")  # only if the engine uses it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
