"""Windows -> batches, charged by what padding really costs.

Pure arithmetic; knows lengths, not audio.
"""

from __future__ import annotations

from collections.abc import Sequence


def plan_batches(padded_lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group windows of equal padded length into batches of at most `budget` samples.

    Args:
        padded_lengths: length of each window after padding, in samples. Windows share a
            batch only if these are equal, so that a window's result never depends on what
            else is in its batch.
        budget: padded samples in a batch (count x length). A single window above the
            budget still gets a batch of its own.

    Returns:
        Indices into `padded_lengths`, each exactly once; longest batches first.
    """
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(padded_lengths):
        by_length.setdefault(length, []).append(index)
    batches: list[list[int]] = []
    for length in sorted(by_length, reverse=True):
        indices = by_length[length]
        size = max(1, budget // max(1, length))
        batches.extend(indices[i : i + size] for i in range(0, len(indices), size))
    return batches
