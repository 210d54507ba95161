"""How long an archive takes and what it costs, on this machine and on rented ones; pure.

Figures come with bounds that should hold them 19 times of 20, as far as sampling goes. What a
machine does that nobody measured with this program has wider ones, by rule of thumb.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transcribe.config import cpu_engines
from transcribe.prices import Catalogue, Machine, Price, Speed
from transcribe.shards import Shard, longest_first
from transcribe.survey import Interval, Survey

BOOT_HOURS = 6 / 60  # from asking for a machine until an engine works: paid, and waited for
_SAME_AGAIN = 1.05  # two runs of one kind on one machine differ by some per cent
_DECODE_RTFX = 150.0  # of one CPU core where no pilot told: decoding and speech detection
_CPU_BASIS = 1.5  # another machine's core against one of this machine's
_BASIS = {"measured": 1.15, "published": 2.0, "estimated": 3.0}
# Speech over all channels per second of a recording with one channel, where no pilot told.
_SPEECH = Interval(0.6, 0.3, 1.0)


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a trial run went; all but `speech_s` on the machine it ran on.

    Attributes:
        workers: engines at once.
        recordings: how many pieces were transcribed.
        audio_s: seconds of them.
        engine_s: seconds of one engine for a second of audio, with its share of the speech.
        decode_s: seconds of one core for a second of audio: reading, decoding, finding speech.
        speech_s: seconds of speech, over all channels, in a second of audio.
        startup_s: from the start of Ray until the first decoding.
        overhead_s: other seconds of a run, however long it is: loading engines, ending.
    """

    device: str
    workers: int
    recordings: int
    audio_s: float
    engine_s: Interval
    decode_s: float
    speech_s: Interval
    startup_s: float
    overhead_s: float


@dataclass(frozen=True, slots=True)
class Here:
    """The forecast for this machine.

    Attributes:
        processing_s: seconds from the first decoding to the report.
        total_s: with start-up.
        usd: price of `total_s`; None without one.
    """

    workers: int
    device: str
    processing_s: Interval
    total_s: Interval
    usd: Interval | None


@dataclass(frozen=True, slots=True)
class Shape:
    """The forecast for a number of rented machines of one kind.

    Attributes:
        rtfx: seconds of recordings that one machine does a second.
        basis: where its speed is from.
        machine_hours: of work, without start-up.
        machines: as many as the deadline asks for.
        finish_hours: until the end, from asking for machines.
        meets_deadline: whether also the upper bound of `finish_hours` does.
    """

    kind: str
    price: Price
    rtfx: Interval
    basis: str
    source: str
    machine_hours: Interval
    machines: int
    finish_hours: Interval
    usd: Interval
    meets_deadline: bool


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Sum over sum, with its standard error from the scatter of the pairs (ratio estimator).

    Few pairs say little of their scatter: fewer than 2 widen the bounds to half and double.
    """
    total = sum(below)
    value = sum(above) / total if total > 0 else 0.0
    n = len(below)
    if n < 2 or value == 0:
        return Interval(value, value / 2, value * 2)
    square = sum((a - value * b) ** 2 for a, b in zip(above, below, strict=True)) / (n - 1)
    return Interval.around(value, math.sqrt(square / n) / (total / n))


def makespan(seconds: Iterable[float], workers: int) -> float:
    """When the last of some pieces of work ends if every free worker takes the next one."""
    free_at = [0.0] * max(1, workers)
    for needed in seconds:
        heapq.heappush(free_at, heapq.heappop(free_at) + needed)
    return max(free_at)


def here(
    audio_s: Interval, shards: Sequence[Shard], pace: Pace, usd_per_hour: float | None
) -> Here:
    """How long the shards take on the machine of the trial run."""
    lengths = [s.duration_s for s in longest_first(shards)]
    planned_s = sum(lengths)
    engines_s = makespan((s * pace.engine_s.value for s in lengths), pace.workers)
    # The bounds: how sure the audio and the pace are, on what the shards come to.
    work = audio_s.times(pace.engine_s)
    scale = engines_s / (planned_s * pace.engine_s.value) if planned_s and engines_s else 0.0
    first_s = lengths[0] * pace.decode_s if lengths else 0.0
    again = Interval(1.0, 1 / _SAME_AGAIN, _SAME_AGAIN)
    processing = work.times(scale).times(again).plus(first_s + pace.overhead_s)
    total = processing.plus(pace.startup_s)
    usd = total.times(usd_per_hour / 3600) if usd_per_hour is not None else None
    return Here(pace.workers, pace.device, processing, total, usd)


def shapes(
    found: Survey,
    catalogue: Catalogue,
    model: str,
    pace: Pace | None,
    n_shards: int,
    deadline_hours: float,
) -> list[Shape]:
    """Every kind of machine whose speed is known, the cheapest that meets the deadline first."""
    made = []
    for kind, (machine, price) in catalogue.kinds().items():
        speed = _speed(machine, catalogue, model, pace)
        if speed is not None:
            rtfx = _machine_rtfx(machine, speed, found, pace)
            made.append(_shape(kind, price, rtfx, speed, found, n_shards, deadline_hours))
    return sorted(made, key=lambda shape: (not shape.meets_deadline, shape.usd.value))


def _speed(machine: Machine, catalogue: Catalogue, model: str, pace: Pace | None) -> Speed | None:
    """Seconds of speech a second of one of the machine's devices: a GPU, or a core."""
    if machine.gpu is not None:
        return catalogue.speed(machine.gpu, model)
    if pace is None or pace.device != "cpu":
        return catalogue.speed("cpu", model)
    return Speed(
        device="cpu",
        model=model,
        rtfx=pace.speech_s.value / pace.engine_s.value,
        basis="estimated",
        source="this machine's pilot, core for core",
    )


def _machine_rtfx(machine: Machine, speed: Speed, found: Survey, pace: Pace | None) -> Interval:
    """Seconds of recordings a second: what its devices recognise or its cores decode."""
    speech = pace.speech_s if pace is not None else _SPEECH.times(_channels(found))
    devices = machine.gpus if machine.gpu is not None else cpu_engines(machine.cpus)
    of_pilot = speed.source.startswith("this machine")
    factor = _CPU_BASIS if of_pilot else _BASIS[speed.basis]
    device = Interval(speed.rtfx, speed.rtfx / factor, speed.rtfx * factor).times(devices)
    engines = device.times(Interval(1 / speech.value, 1 / speech.high, 1 / max(speech.low, 1e-9)))
    cores = max(0.5, machine.cpus - 0.5 * machine.gpus)
    decoders = cores / pace.decode_s if pace is not None and pace.decode_s else cores * _DECODE_RTFX
    return Interval(*(min(rtfx, decoders) for rtfx in (engines.value, engines.low, engines.high)))


def _channels(found: Survey) -> float:
    """Mean number of channels of what was seen."""
    channels = [seen.channels for seen in found.seen if seen.channels]
    return sum(channels) / len(channels) if channels else 1.0


def _shape(
    kind: str,
    price: Price,
    rtfx: Interval,
    speed: Speed,
    found: Survey,
    n_shards: int,
    deadline_hours: float,
) -> Shape:
    inverse = Interval(1 / rtfx.value, 1 / rtfx.high, 1 / rtfx.low)
    hours = found.audio_s.times(inverse).times(1 / 3600)
    for_work = max(deadline_hours - BOOT_HOURS, 1e-3)
    machines = max(1, min(math.ceil(hours.high / for_work), max(1, n_shards)))
    finish = hours.times(1 / machines).plus(BOOT_HOURS)
    return Shape(
        kind=kind,
        price=price,
        rtfx=rtfx,
        basis=speed.basis,
        source=speed.source,
        machine_hours=hours,
        machines=machines,
        finish_hours=finish,
        usd=hours.plus(machines * BOOT_HOURS).times(price.usd),
        meets_deadline=finish.high <= deadline_hours,
    )


def as_json(
    found: Survey,
    settings: dict[str, Any],
    pace: Pace | None,
    forecast: Here | None,
    rented: Sequence[Shape],
) -> dict[str, Any]:
    """The content of `plan.json`; keys are documented in docs/output.md."""
    return {
        "settings": settings,
        "archive_recordings": found.archive_recordings,
        "already_transcribed": found.already_transcribed,
        "repeated": found.repeated,
        "recordings": len(found.recordings),
        "bytes": found.bytes,
        "looked_at": len(found.seen),
        "audio_seconds": asdict(found.audio_s),
        "codecs": found.counts(lambda s: s.codec),
        "channels": found.counts(lambda s: s.channels),
        "problems": found.counts(lambda s: s.problem),
        "pilot": asdict(pace) if pace else None,
        "here": asdict(forecast) if forecast else None,
        "shapes": [
            {**asdict(shape), "price": shape.price.model_dump(mode="json")} for shape in rented
        ],
    }


@dataclass(frozen=True, slots=True)
class Actual:
    """What a run came to, for comparing it with its forecast."""

    settings: dict[str, Any]
    recordings: int
    workers: int
    device: str
    audio_s: float
    processing_s: float
    usd: float | None


def compared(plan: dict[str, Any] | None, actual: Actual) -> dict[str, float | None]:
    """The key `predicted` of report.json: what `plan.json` said, and how far it was off.

    An error is predicted over actual, less 1. All is None without a plan of the same recordings,
    models and settings; time and cost are, if another number of engines or device was at work.
    """
    names = ("audio_seconds", "processing_seconds", "usd")
    predicted: dict[str, float | None] = dict.fromkeys(names)
    if plan is not None and _is_of(plan, actual):
        predicted["audio_seconds"] = plan["audio_seconds"]["value"]
        local = plan["here"]
        if local and (local["workers"], local["device"]) == (actual.workers, actual.device):
            predicted["processing_seconds"] = local["processing_s"]["value"]
            predicted["usd"] = local["usd"]["value"] if local["usd"] else None
    came_to = dict(zip(names, (actual.audio_s, actual.processing_s, actual.usd), strict=True))
    return {
        **predicted,
        **{f"{name}_error": _error(predicted[name], came_to[name]) for name in names},
    }


def differing_settings(plan: dict[str, Any] | None, actual: Actual) -> list[str]:
    """Names of the settings by which a forecast of as many recordings is not of this run."""
    if plan is None or not _is_of_as_many(plan, actual):
        return []
    theirs = plan["settings"]
    names = {*theirs, *actual.settings}
    return sorted(n for n in names if theirs.get(n) != actual.settings.get(n))


def _is_of(plan: dict[str, Any], actual: Actual) -> bool:
    same_settings: bool = plan["settings"] == actual.settings
    return same_settings and _is_of_as_many(plan, actual)


def _is_of_as_many(plan: dict[str, Any], actual: Actual) -> bool:
    as_many: bool = plan["recordings"] + plan["repeated"] == actual.recordings
    return as_many


def _error(predicted: float | None, actual: float | None) -> float | None:
    return predicted / actual - 1 if predicted is not None and actual else None
