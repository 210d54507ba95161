"""The order of a benchmark: who runs when, on which files, in which layout.

One layout runs at a time, alone, loaded and warm. First every layout of a peer tries a small part
of the archive; the faster one is the peer's. Then come the rounds, each contender once in each:
A B C, A B C, A B C, so that what disturbs the machine for a while disturbs all.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.benchmark import processes
from jobs.benchmark.archives import Clip, middling, shares, subset
from jobs.benchmark.contenders import Contender, Layout, Weights, layouts
from jobs.benchmark.processes import Measured, NotRun
from jobs.benchmark.results import Entry, Round, is_slow
from jobs.benchmark.worker import Setup

_TRIAL_CLIPS = 2  # for each process of the layout that has most
_SLOW_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured, and on what.

    Attributes:
        clips: the archive.
        model: `--model`, for ours.
        weights: the same weights in each format, or why there are none.
        language: code of all speech; None has it detected.
        device: `cpu` or `cuda`.
        cores: cores to share out.
        rounds: of each contender.
        whole: whether slow peers get all files too.
        folder: where logs go.
    """

    clips: Sequence[Clip]
    model: str
    weights: dict[Weights, Path | str]
    language: str | None
    device: str
    cores: int
    rounds: int
    whole: bool
    folder: Path


def measure(plan: Plan, contenders: Sequence[Contender], say: Callable[[str], None]) -> list[Entry]:
    """Run everything; a contender that breaks down is left out, and why is told.

    Args:
        plan: on what.
        contenders: who, in the order of each round.
        say: told what is being done.
    """
    entries = [Entry(contender) for contender in contenders]
    for entry in entries:
        _try_layouts(plan, entry, say)
    clips_of = {
        entry.contender.name: (
            subset(plan.clips, _SLOW_SHARE * sum(c.duration_s for c in plan.clips))
            if not plan.whole and is_slow(entry, entries)
            else list(plan.clips)
        )
        for entry in entries
    }
    for number in range(1, plan.rounds + 1):
        for entry in entries:
            if entry.layout is None or entry.not_run is not None:
                continue
            clips = clips_of[entry.contender.name]
            try:
                measured = _run(plan, entry.contender, entry.layout, clips)
            except NotRun as reason:
                entry.not_run = str(reason)
                say(f"round {number}: {entry.contender.title} {reason}")
                continue
            entry.rounds.append(Round(tuple(clips), measured))
            say(f"round {number}: {entry.contender.title}: RTFx {entry.rounds[-1].rtfx:.1f}")
    return entries


def _try_layouts(plan: Plan, entry: Entry, say: Callable[[str], None]) -> None:
    """Find the contender's best layout; note if it cannot run at all."""
    contender = entry.contender
    choices = layouts(contender, plan.cores, plan.device)
    if contender.side == "ours":
        entry.layout = choices[0]
        return
    reason = plan.weights.get(contender.weights) if contender.weights else None
    if isinstance(reason, str):
        entry.not_run = reason
        return
    clips = middling(plan.clips, _TRIAL_CLIPS * max(layout.processes for layout in choices))
    try:
        for layout in choices:
            tried = Round(tuple(clips), _run(plan, contender, layout, clips))
            entry.trials[str(layout)] = tried.rtfx
            say(f"trial: {contender.title}, {layout}: RTFx {tried.rtfx:.1f}")
    except NotRun as told:
        entry.not_run = str(told)
        say(f"{contender.title}: {told}")
        return
    entry.layout = max(choices, key=lambda layout: entry.trials[str(layout)])


def _run(plan: Plan, contender: Contender, layout: Layout, clips: Sequence[Clip]) -> Measured:
    """Start it, warm it up, give each process its share, and measure."""
    parts = shares(clips, layout.processes)
    log = plan.folder / "logs" / f"{contender.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with _scratch() as scratch:
        setup = replace(_setup(plan, contender), scratch=str(scratch))
        with processes.started(setup, layout, log) as group:
            return group.transcribe([[clip.path for clip in part] for part in parts])


def _setup(plan: Plan, contender: Contender) -> Setup:
    weights = plan.weights.get(contender.weights) if contender.weights else ""
    shortest = min(plan.clips, key=lambda clip: clip.duration_s)
    return Setup(
        contender=contender.name,
        model=plan.model,
        weights=str(weights),
        threads=1,
        device=plan.device,
        language=plan.language,
        # A run on Ray loads its engines anew, whatever was before.
        warm_up="" if contender.on_ray else shortest.path,
        scratch="",
    )


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
