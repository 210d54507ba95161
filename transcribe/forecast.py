"""`transcribe plan`: the survey, the trial, the prices, put together; and `plan.json`.

Owns the order of the steps and where a forecast is kept for the run that it is about.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from transcribe import planboard, planning, storage
from transcribe.config import RunConfig
from transcribe.errors import BadAudio
from transcribe.pilot import pilot
from transcribe.planning import Here, Pace, Shape
from transcribe.prices import Catalogue
from transcribe.printable import redacted
from transcribe.shards import plan_shards
from transcribe.survey import Survey, survey

PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `transcribe plan` found out."""

    settings: dict[str, Any]
    found: Survey
    pace: Pace | None
    here: Here | None
    rented: list[Shape]
    deadline_hours: float

    def lines(self, n_shown: int) -> Iterator[str]:
        """The forecast in words, with so many kinds of machines."""
        return planboard.lines(
            self.found, self.pace, self.here, self.rented, self.deadline_hours, n_shown
        )

    def keep(self, out: str | None, file: str | None) -> None:
        """Write it as JSON: into OUT, for the run's report, and wherever else it is wanted."""
        content = planning.as_json(self.found, self.settings, self.pace, self.here, self.rented)
        data = json.dumps(content, indent=2, sort_keys=True).encode()
        if out is not None:
            storage.put(storage.join(storage.absolute(out), PLAN_FILE), data)
        if file is not None:
            storage.put(storage.absolute(file), data)


def forecast(
    config: RunConfig,
    *,
    out: str | None,
    n_sampled: int | None,
    try_here: bool,
    catalogue: Catalogue,
    deadline_hours: float,
    say: Callable[[str], None],
) -> Forecast:
    """Look at the archive, try some of it, and reckon.

    Args:
        config: settings of the run to come.
        out: its OUT; None counts everything as still to be done.
        n_sampled: headers to read; None reads all.
        try_here: whether some minutes of it are transcribed on this machine.
        catalogue: rented machines.
        deadline_hours: when it has to be ready.
        say: told what is going on.

    Raises:
        Fatal: the archive, the model or the trial cannot be.
        Transient: a store does not answer, after retries.
    """
    from transcribe import run

    config = replace(config, archive=storage.absolute(config.archive))
    settings = comparable(*run.model_facts(config), config)
    say("Reading headers ...")
    found = survey(
        config.archive,
        storage.absolute(out) if out is not None else None,
        n_sampled,
        config.headerless_format,
    )
    pace = None
    if try_here and found.recordings:
        say("Trying some of it on this machine ...")
        pace = pilot(found, config)
    shards = plan_shards(found.recordings, config.shard_minutes)
    return Forecast(
        settings=settings,
        found=found,
        pace=pace,
        here=planning.here(found.audio_s, shards, pace, config.price_per_hour) if pace else None,
        rented=planning.shapes(found, catalogue, config.model, pace, len(shards), deadline_hours),
        deadline_hours=deadline_hours,
    )


def comparable(model_revision: str, engine: str, config: RunConfig) -> dict[str, Any]:
    """The settings that a run must share with a forecast for the two to be compared."""
    return {
        "archive": redacted(config.archive),
        "model": config.model,
        "model_revision": model_revision,
        "engine": engine,
        "task": config.task,
        "words": config.words,
        "language": config.language,
        "channels": config.channels,
        "headerless": config.headerless,
        "shard_minutes": config.shard_minutes,
    }


def kept(out: str) -> dict[str, Any] | None:
    """The forecast that lies in OUT; None if there is none, or none that can be read."""
    url = storage.join(out, PLAN_FILE)
    try:
        content = json.loads(storage.read(url)) if storage.exists(url) else None
    except (ValueError, BadAudio):
        return None
    return content if isinstance(content, dict) else None
