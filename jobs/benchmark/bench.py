"""One benchmark from its archive to its report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from jobs.benchmark.archives import Clip, Shape, given_archive, spoken_archive
from jobs.benchmark.contenders import CONTENDERS, OURS, SCALING, Contender
from jobs.benchmark.measure import Plan, measure
from jobs.benchmark.page import benchmark_page
from jobs.benchmark.results import Entry, as_row, ratios
from jobs.benchmark.weights import prepare
from transcribe import models
from transcribe.engines.fake import FAKE_MODEL
from transcribe.environment import environment
from transcribe.errors import Fatal
from transcribe.languages import LANGUAGES

_SPOKEN_MINUTES = 10.0


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; see `transcribe bench --help`."""

    archive: str | None
    out: Path
    reference: str | None
    shape: str
    minutes: float | None
    model: str
    language: str | None
    device: str
    rounds: int
    only: Sequence[str]
    whole: bool
    scaling: bool
    price: float | None

    def __post_init__(self) -> None:
        """Reject what cannot work, naming the flag.

        Raises:
            Fatal: a value is out of range.
        """
        if self.shape not in get_args(Shape):
            raise Fatal(f"--shape must be one of {', '.join(get_args(Shape))}, not {self.shape!r}.")
        if self.device not in ("cpu", "cuda"):
            raise Fatal(f"--device must be cpu or cuda, not {self.device!r}.")
        if self.minutes is not None and not self.minutes > 0:
            raise Fatal(f"--minutes must be above 0, not {self.minutes}.")
        if self.price is not None and not self.price > 0:
            raise Fatal(f"--price must be above 0, not {self.price}.")
        if self.language is not None and self.language not in LANGUAGES:
            raise Fatal(f"--language {self.language!r} is not a Whisper language code.")
        if self.reference is not None and self.archive is None:
            raise Fatal("--reference belongs to an ARCHIVE; name it as well.")


def benchmark(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and write `report.json` and `report.html` into `options.out`.

    Returns:
        The content of report.json (docs/benchmark.md).

    Raises:
        Fatal: nothing can be measured.
    """
    contenders = _contenders(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fatal(f"--out {options.out} cannot be made ({error.strerror}).") from None
    clips, archive = _archive(options, say)
    weights = {}
    if options.model != FAKE_MODEL:
        weights = prepare(models.resolve(options.model), options.out)
    seconds = sum(clip.duration_s for clip in clips)
    say(f"{len(clips)} recordings, {seconds / 60:.1f} minutes.")
    plan = Plan(
        clips=clips,
        model=options.model,
        weights=weights,
        language=options.language,
        device=options.device,
        cores=len(os.sched_getaffinity(0)),
        rounds=options.rounds,
        whole=options.whole,
        folder=options.out,
    )
    entries = measure(plan, contenders, say)
    report = _report(options, archive, plan, entries)
    _write(options.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
    _write(options.out / "report.html", benchmark_page(report, _our_shards(entries)))
    return report


def _contenders(options: Options) -> list[Contender]:
    known = [*CONTENDERS, *(SCALING if options.scaling else ())]
    names = {contender.name for contender in known}
    for name in options.only:
        if name not in names:
            raise Fatal(f"--only {name}: there is no such contender; {', '.join(sorted(names))}.")
    return [c for c in known if not options.only or c.name in options.only]


def _archive(options: Options, say: Callable[[str], None]) -> tuple[list[Clip], str]:
    if options.archive is not None:
        clips = given_archive(options.archive, options.reference, options.minutes)
        return clips, options.archive
    minutes = options.minutes or _SPOKEN_MINUTES
    folder = options.out / "archive"
    say(f"Speaking {minutes:g} minutes of {options.shape} into {folder} ...")
    name = f"{options.shape}, {minutes:g} minutes, spoken by the synthesiser"
    return spoken_archive(folder, cast(Shape, options.shape), minutes), name


def _report(options: Options, archive: str, plan: Plan, entries: Sequence[Entry]) -> dict[str, Any]:
    ours = next((e for e in entries if e.contender.name == OURS), None)
    rows = [as_row(e, ours.rtfx if ours else None, options.price) for e in entries]
    packages = {package for e in entries for package in e.contender.packages}
    return {
        "archive": archive,
        "recordings": len(plan.clips),
        "audio_seconds": sum(clip.duration_s for clip in plan.clips),
        "model": options.model,
        "language": options.language,
        "device": options.device,
        "cores": plan.cores,
        "rounds": options.rounds,
        "price_per_hour": options.price,
        **ratios(entries),
        "contenders": rows,
        "our_run": ours.rounds[-1].measured.report if ours and ours.rounds else None,
        "environment": environment(sorted(packages)),
    }


def _our_shards(entries: Sequence[Entry]) -> Sequence[dict[str, Any]]:
    rounds = [r for e in entries if e.contender.name == OURS for r in e.rounds]
    return rounds[-1].measured.shards if rounds else ()


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def table(report: dict[str, Any]) -> list[str]:
    """The result in lines of plain text."""
    head = ("", "RTFx", "min to max", "CPU s/h", "WER", "memory", "ours / this", "layout")
    lines = [head, *(_line(row) for row in report["contenders"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines]


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    if "rtfx" not in row:
        return (row["title"], "-", "", "", "", "", "", row["not_run"] or "")
    return (
        row["title"],
        f"{row['rtfx']:.1f}",
        f"{row['rtfx_min']:.1f} to {row['rtfx_max']:.1f}",
        f"{row['cpu_seconds_per_audio_hour']:.0f}",
        f"{row['wer']:.2%}" if row["wer"] is not None else "-",
        f"{row['peak_bytes'] / 1e9:.1f} GB",
        f"{row['ratio']:.2f} times" if row["ratio"] else "",
        row["layout"],
    )
