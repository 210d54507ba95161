"""Rounds -> medians, spreads, error rates and ratios: the arithmetic of the benchmark.

Pure: it runs nothing and knows no contender but by its name.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.benchmark.archives import Clip
from jobs.benchmark.contenders import BARE, ONE_WORKER, OURS, Contender, Layout
from jobs.benchmark.processes import Measured
from transcribe.score import score_texts


@dataclass(frozen=True, slots=True)
class Round:
    """What one contender did with some clips, once."""

    clips: tuple[Clip, ...]
    measured: Measured

    @property
    def audio_s(self) -> float:
        """Seconds of audio."""
        return sum(clip.duration_s for clip in self.clips)

    @property
    def rtfx(self) -> float:
        """Audio seconds per wall second."""
        return self.audio_s / self.measured.seconds


@dataclass(slots=True)
class Entry:
    """A contender's part in the benchmark.

    Attributes:
        layout: the one it was measured in; None if it took no part.
        trials: RTFx of each layout that was tried before, by its name.
        rounds: in their order.
        not_run: why it took no part, or no longer.
    """

    contender: Contender
    layout: Layout | None = None
    trials: dict[str, float] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    not_run: str | None = None

    @property
    def rtfx(self) -> float | None:
        """Median over the rounds."""
        return statistics.median(r.rtfx for r in self.rounds) if self.rounds else None


def word_error_rate(done: Round) -> tuple[float | None, int]:
    """Errors per word of the references, and these words; what failed counts as no text.

    Raises:
        Fatal: the `score` extra is not installed.
    """
    known = [clip for clip in done.clips if clip.reference is not None]
    if not known:
        return None, 0
    score = score_texts(
        [clip.reference or "" for clip in known],
        [done.measured.texts[clip.path] or "" for clip in known],
        [clip.language for clip in known],
    )
    return (score.wer if score.words else None), score.words


def as_row(entry: Entry, ours: float | None, price_per_hour: float | None) -> dict[str, Any]:
    """One line of the table (`contenders[]` of report.json).

    Args:
        entry: with its rounds.
        ours: our RTFx; what it is over this contender's is the line's `ratio`.
        price_per_hour: of the machine.
    """
    row: dict[str, Any] = {
        "name": entry.contender.name,
        "title": entry.contender.title,
        "side": entry.contender.side,
        "settings": entry.contender.settings,
        "not_run": entry.not_run,
        "layout": str(entry.layout) if entry.layout else None,
        "trials": entry.trials,
    }
    if not entry.rounds:
        return row
    last, rates = entry.rounds[-1], [r.rtfx for r in entry.rounds]
    rtfx = statistics.median(rates)
    wer, words = word_error_rate(last)
    return row | {
        "recordings": len(last.clips),
        "audio_seconds": last.audio_s,
        "rounds": [
            {
                "seconds": r.measured.seconds,
                "elapsed_seconds": r.measured.elapsed_s,
                "cpu_seconds": r.measured.cpu_seconds,
                "rtfx": r.rtfx,
            }
            for r in entry.rounds
        ],
        "rtfx": rtfx,
        "rtfx_min": min(rates),
        "rtfx_max": max(rates),
        "spread": (max(rates) - min(rates)) / rtfx,
        "cpu_seconds_per_audio_hour": statistics.median(
            3600 * r.measured.cpu_seconds / r.audio_s for r in entry.rounds
        ),
        "peak_bytes": max(r.measured.peak_bytes for r in entry.rounds),
        "failed": sum(text is None for text in last.measured.texts.values()),
        "wer": wer,
        "words": words,
        "ratio": ours / rtfx if ours else None,
        "cost_per_1000_hours": 1000 * price_per_hour / rtfx if price_per_hour else None,
    }


def ratios(entries: Sequence[Entry]) -> dict[str, Any]:
    """What the benchmark is for, each within this run; None where a side is missing."""
    speed = {entry.contender.name: entry.rtfx for entry in entries}
    ours = speed.get(OURS)
    peers = [e for e in entries if e.contender.side == "peer" and e.rtfx]
    best = max(peers, key=lambda e: e.rtfx or 0.0, default=None)
    best_wer = word_error_rate(best.rounds[-1])[0] if best else None
    done = [e.rounds[-1] for e in entries if e.contender.name == OURS and e.rounds]
    our_wer = word_error_rate(done[0])[0] if done else None
    return {
        "best_peer": best.contender.name if best else None,
        "ratio_to_best_peer": _over(ours, best.rtfx if best else None),
        "wer_above_best_peer": (
            our_wer - best_wer if our_wer is not None and best_wer is not None else None
        ),
        "ratio_to_bare_pipeline": _over(ours, speed.get(BARE)),
        "ratio_to_one_worker": _over(ours, speed.get(ONE_WORKER)),
    }


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def is_slow(entry: Entry, entries: Sequence[Entry]) -> bool:
    """Whether a peer's best trial is below half of the best peer's: it gets fewer files."""
    best = max((max(e.trials.values(), default=0.0) for e in entries), default=0.0)
    own = max(entry.trials.values(), default=0.0)
    return entry.contender.side == "peer" and 0 < own < best / 2
