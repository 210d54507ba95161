"""report.json of a benchmark -> report.html."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transcribe import figures
from transcribe.figures import BLUE, GREEN, GREY, Bar
from transcribe.page import Section, Tile, number, render, run_sections

_NO_FIGURE = "–"


def benchmark_page(report: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> str:
    """The page: our speed beside the peers', how sure it is, and where our time went.

    Args:
        report: content of report.json.
        shards: rows of metrics.parquet of our last round.
    """
    ran = [row for row in report["contenders"] if "rtfx" in row]
    by_speed = sorted(ran, key=lambda row: -row["rtfx"])
    sections = [
        _speeds(by_speed),
        _table(by_speed),
        _rounds(by_speed),
        _settings(report["contenders"]),
    ]
    if report["our_run"] is not None:
        sections.append(Section("Our last round", report["our_run"]["bottleneck"]["sentence"]))
        sections += run_sections(report["our_run"], shards)
    sections.append(
        Section(
            "Machine and versions",
            rows=[
                ("what", "which"),
                *((k, v) for k, v in report["environment"].items() if k != "command"),
            ],
        )
    )
    return render(
        title="Benchmark",
        subtitle=(
            f"{report['archive']}: {report['recordings']} recordings,"
            f" {report['audio_seconds'] / 60:.1f} minutes; model {report['model']},"
            f" {report['cores']} cores, {report['device']}, {report['rounds']} rounds"
        ),
        verdict=_verdict(report),
        tiles=_tiles(report),
        sections=sections,
        command=str(report["environment"].get("command", "")),
    )


def _verdict(report: Mapping[str, Any]) -> str:
    ratio = report["ratio_to_best_peer"]
    if ratio is None:
        return "Nothing to compare: either we or every peer did not run."
    best = _named(report, report["best_peer"])
    said = f"{ratio:.2f} times the speed of the best peer, {best['title']}"
    above = report["wer_above_best_peer"]
    if above is not None:
        way = "above" if above >= 0 else "below"
        said += f", at a word error rate {abs(above) * 100:.2f} points {way} its own"
    return said + "."


def _named(report: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(r for r in report["contenders"] if r["name"] == name)
    return found


def _tiles(report: Mapping[str, Any]) -> list[Tile]:
    ours: Mapping[str, Any] = next(
        (r for r in report["contenders"] if r["name"] == "transcribe"), {}
    )
    tiles = []
    if "rtfx" in ours:
        tiles.append(Tile(number(ours["rtfx"]), "RTFx: audio seconds per second"))
        tiles.append(Tile(_percent(ours["wer"]), "word error rate"))
        cpu = f"{ours['cpu_seconds_per_audio_hour']:,.0f} s"
        tiles.append(Tile(cpu, "CPU time per audio hour"))
        if ours["cost_per_1000_hours"] is not None:
            tiles.append(Tile(f"{ours['cost_per_1000_hours']:,.2f}", "cost per 1,000 audio hours"))
    for key, label in (
        ("ratio_to_best_peer", "times the best peer"),
        ("ratio_to_bare_pipeline", "of the bare pipeline's speed, on Ray"),
        ("ratio_to_one_worker", "times one worker on one core"),
    ):
        if report[key] is not None:
            tiles.append(Tile(f"{report[key]:.2f}", label))
    return tiles


def _speeds(rows: Sequence[Mapping[str, Any]]) -> Section:
    items = [
        Bar(
            row["title"],
            row["rtfx"],
            number(row["rtfx"]),
            {"ours": BLUE if row["name"] == "transcribe" else GREEN, "peer": GREY}[row["side"]],
            row["rtfx_min"],
            row["rtfx_max"],
        )
        for row in rows
    ]
    note = "Median of the rounds; the line goes from the slowest to the fastest one."
    return Section("Speed", note, figures.bars("speeds", items, "RTFx") if items else "")


def _table(rows: Sequence[Mapping[str, Any]]) -> Section:
    priced = any(row["cost_per_1000_hours"] is not None for row in rows)
    head = [
        "",
        "RTFx",
        "slowest to fastest",
        "ours / this",
        "CPU s per audio hour",
        "WER",
        "memory",
    ]
    lines = [head + (["cost per 1,000 h"] if priced else []) + ["layout", "files"]]
    for row in rows:
        line = [
            row["title"],
            number(row["rtfx"]),
            f"{number(row['rtfx_min'])} to {number(row['rtfx_max'])} ({row['spread']:.0%})",
            f"{row['ratio']:.2f} ×" if row["ratio"] else _NO_FIGURE,
            f"{row['cpu_seconds_per_audio_hour']:,.0f}",
            _percent(row["wer"]),
            f"{row['peak_bytes'] / 1e9:.2f} GB",
        ]
        if priced:
            line.append(f"{row['cost_per_1000_hours']:,.2f}")
        failed = f", {row['failed']} failed" if row["failed"] else ""
        lines.append([*line, row["layout"], f"{row['recordings']}{failed}"])
    note = (
        "Loading models is not in the time. WER after Whisper's normaliser; what failed counts as"
        " no text. Memory is the largest of all processes together. Peers below half of the best"
        " one's speed get a quarter of the files."
    )
    return Section("Contenders", note, rows=lines)


def _rounds(rows: Sequence[Mapping[str, Any]]) -> Section:
    n = max((len(row["rounds"]) for row in rows), default=0)
    lines = [["", *(f"round {i + 1}" for i in range(n)), "layouts tried before"]]
    for row in rows:
        rates = [number(r["rtfx"]) for r in row["rounds"]]
        rates += [_NO_FIGURE] * (n - len(rates))
        tried = ", ".join(f"{name}: {number(rtfx)}" for name, rtfx in row["trials"].items())
        lines.append([row["title"], *rates, tried or _NO_FIGURE])
    return Section("Rounds", "RTFx of each; all contenders in turn within a round.", rows=lines)


def _settings(rows: Sequence[Mapping[str, Any]]) -> Section:
    lines = [("", "settings", "")]
    lines += [(row["title"], row["settings"], row["not_run"] or "") for row in rows]
    return Section("What was run", "What is not named is as its makers left it.", rows=lines)


def _percent(share: float | None) -> str:
    return _NO_FIGURE if share is None else f"{share:.2%}"
