"""What a person sees of `transcribe plan`: lines of text.

Owns wording and formatting. Knows nothing of storage, audio or Ray.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from transcribe.planning import BOOT_HOURS, Here, Pace, Shape
from transcribe.progress import clock, hours
from transcribe.survey import Interval, Survey

_LABEL = 16


def lines(
    found: Survey,
    pace: Pace | None,
    forecast: Here | None,
    rented: Sequence[Shape],
    deadline_hours: float,
    n_shown: int,
) -> Iterator[str]:
    """The whole forecast, ready to be printed."""
    for label, text in [*_archive(found), *_here(pace, forecast)]:
        yield f"{label:{_LABEL}}{text}"
    yield ""
    yield from _rented(rented, deadline_hours, n_shown)


def _archive(found: Survey) -> Iterator[tuple[str, str]]:
    everything, left = found.archive_recordings, len(found.recordings)
    notes = []
    if found.already_transcribed:
        notes.append(f"{found.already_transcribed:,} already transcribed")
    if found.repeated:
        notes.append(f"same bytes as another one's: {found.repeated:,}")
    to_do = f" ({', '.join(notes)}; {left:,} to do)" if notes else ""
    yield "recordings", f"{everything:,}, {found.bytes / 1e9:,.3f} GB to read{to_do}"
    how = "all headers read" if found.is_complete else f"{len(found.seen):,} headers read"
    yield "audio", f"{_hours(found.audio_s)} hours ({how})"
    yield "codecs", _counted(found.counts(lambda s: s.codec))
    yield "channels", _counted(found.counts(lambda s: s.channels))
    problems = found.counts(lambda s: s.problem)
    yield "undecodable", _undecodable(found, problems)


def _undecodable(found: Survey, problems: Mapping[str, int]) -> str:
    n_bad, n_seen = sum(problems.values()), len(found.seen)
    if not n_bad:
        return f"none of {n_seen:,} looked at"
    return f"{n_bad:,} of {n_seen:,} looked at: {_counted(problems)}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items()) or "not told"


def _here(pace: Pace | None, forecast: Here | None) -> Iterator[tuple[str, str]]:
    if pace is None or forecast is None:
        return
    total = forecast.total_s
    cost = f", ${_money(forecast.usd)}" if forecast.usd is not None else ""
    yield (
        "this machine",
        f"{clock(total.value)} ({clock(total.low)} to {clock(total.high)}) with"
        f" {pace.workers} workers, {pace.device}{cost}",
    )
    yield (
        "pilot",
        f"{pace.recordings} pieces, {pace.audio_s / 60:.1f} minutes:"
        f" {1 / pace.engine_s.value:,.1f} RTFx a worker, {pace.speech_s.value:.2f} s of speech in"
        " a second",
    )


def _rented(rented: Sequence[Shape], deadline_hours: float, n_shown: int) -> Iterator[str]:
    if not rented:
        yield (
            "No speed of this model on a rented machine is known; measure one and give it with"
            " --prices, or run the pilot."
        )
        return
    yield (
        f"{'rented machine':22}{'$/hour':>8}{'RTFx':>8}{'hours':>9}{'count':>7}"
        f"{'ready after':>13}{'cost in $':>26}  speed"
    )
    for shape in rented[:n_shown]:
        late = "" if shape.meets_deadline else " late"
        yield (
            f"{shape.kind:22}{shape.price.usd:8.2f}{shape.rtfx.value:8,.0f}"
            f"{shape.machine_hours.value:9,.1f}{shape.machines:7,}"
            f"{shape.finish_hours.value:11,.1f} h{_money(shape.usd):>26}  {shape.basis}{late}"
        )
    best = rented[0]
    if best.meets_deadline:
        yield (
            f"Cheapest within {deadline_hours:g} h: {best.machines} x {best.kind}, ready after"
            f" {best.finish_hours.value:,.1f} h ({best.finish_hours.low:,.1f} to"
            f" {best.finish_hours.high:,.1f}), ${_money(best.usd)}."
        )
    else:
        yield f"No machine of the catalogue is sure to be ready within {deadline_hours:g} h."
    dates = sorted({shape.price.date for shape in rented})
    yield (
        f"Prices are list prices seen until {dates[-1]}, without disk, network and the head: check"
        f" them. {BOOT_HOURS * 60:.0f} minutes of start-up a machine are in. Speeds that are not"
        " measured with this program are a rough guide."
    )


def _hours(seconds: Interval) -> str:
    if seconds.low == seconds.high:
        return hours(seconds.value)
    return f"{hours(seconds.value)} ({hours(seconds.low)} to {hours(seconds.high)})"


def _money(usd: Interval) -> str:
    return f"{usd.value:,.2f} ({usd.low:,.2f} to {usd.high:,.2f})"
