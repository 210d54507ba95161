"""report.json and the rows of metrics.parquet -> report.html: one file, read by people.

Owns what is shown and in which words. Everything comes in as plain data; all text is escaped by
the template, plots by matplotlib. The page loads nothing from anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transcribe import figures
from transcribe.figures import BLUE, GREEN, GREY, ORANGE, RED, VIOLET, Bar

_ENDED = {
    "interrupted": ", interrupted before its end",
    "stopped": ", stopped before its end",
    "budget": ", ended by its budget",
}
_MOST_WORKERS = 24
_STEPS = 60
_TINY_GAP = 1 / 400  # of the run's length: not to be seen


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure of the headline."""

    value: str
    label: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a sentence on how to read it, and a plot or a table below.

    Attributes:
        svg: a plot; escaped by who drew it.
        rows: lines of a table, the first of them its header.
    """

    title: str
    note: str = ""
    svg: str = ""
    rows: Sequence[Sequence[str]] = ()


def render(
    title: str,
    subtitle: str,
    verdict: str,
    tiles: Sequence[Tile],
    sections: Sequence[Section],
    command: str,
) -> str:
    """The page."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(_TEMPLATE)
    return template.render(
        title=title,
        subtitle=subtitle,
        verdict=verdict,
        tiles=tiles,
        sections=sections,
        command=command,
    )


def run_page(report: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> str:
    """The page of one run.

    Args:
        report: content of report.json.
        shards: rows of metrics.parquet.
    """
    own = [shard for shard in shards if shard["recognise_seconds"] > 0]
    sections = [
        *run_sections(report, own),
        *_cost(report),
        *_failures(report),
        Section("Machine and versions", rows=_pairs(report["environment"], skip=("command",))),
    ]
    return render(
        title="Transcription run",
        subtitle=f"{report['archive']} → {report['out']}, run {report['run_id']}"
        + _ENDED.get(report["ended"], ""),
        verdict=report["bottleneck"]["sentence"],
        tiles=_tiles(report),
        sections=sections,
        command=str(report["environment"].get("command", "")),
    )


def run_sections(report: Mapping[str, Any], shards: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Where a run's time went; `shards` are those that were recognised."""
    if not shards:
        return []
    return [
        _throughput(shards),
        _workers(shards),
        _engine_waterfall(report),
        _other_stages(report),
        _batches(report),
    ]


def _tiles(report: Mapping[str, Any]) -> list[Tile]:
    tiles = [
        Tile(number(report["rtfx"]), "RTFx: audio seconds per second"),
        Tile(f"{report['audio_seconds'] / 3600:,.2f} h", "audio"),
        Tile(duration(report["processing_seconds"]), "processing, after"
             f" {duration(report['startup_seconds'])} to start"),
        Tile(f"{report['ok']:,} / {report['empty']:,} / {report['failed']:,}",
             "recordings ok / empty / failed"),
        Tile(f"{report['workers']} × {report['device']}", "engines"),
        Tile(percent(report["worker_busy_share"]), "of their time engines were at work"),
    ]  # fmt: skip
    cost = report["cost"]["usd_per_1000_audio_hours"]
    return tiles if cost is None else [*tiles, Tile(f"${cost:,.2f}", "per 1,000 audio hours")]


# ---- plots of a run -----------------------------------------------------------------------


def _span(shard: Mapping[str, Any]) -> tuple[float, float]:
    """When an engine began and ended a shard (seconds since the epoch)."""
    after = shard["publish_seconds"] + shard["publish_queue_seconds"]
    end = _epoch(shard["finished_at"]) - after
    return end - shard["recognise_seconds"] - shard["assemble_seconds"], end


def _epoch(moment: datetime | float) -> float:
    return moment.timestamp() if isinstance(moment, datetime) else moment


def _begin(shards: Iterable[Mapping[str, Any]]) -> float:
    return min(_epoch(shard["started_at"]) for shard in shards)


def _throughput(shards: Sequence[Mapping[str, Any]]) -> Section:
    """A shard's audio is spread evenly over the time in which its engine worked on it."""
    begin = _begin(shards)
    spans = [(*_span(shard), shard["audio_seconds"]) for shard in shards]
    last = max(end for _, end, _ in spans)
    step = max((last - begin) / _STEPS, 1e-6)
    rates = [0.0] * (_STEPS + 1)
    for start, end, audio in spans:
        for i in range(_STEPS):
            low, high = begin + i * step, begin + (i + 1) * step
            shared = max(0.0, min(high, end) - max(low, start))
            rates[i] += audio * shared / max(end - start, 1e-9) / step
    rates[_STEPS] = rates[_STEPS - 1]
    unit, scale = time_unit(last - begin)
    x = [i * step / scale for i in range(_STEPS + 1)]
    return Section(
        "Throughput over time",
        "Audio seconds recognised per second of the clock, all engines together.",
        figures.curve("throughput", x, rates, unit, "RTFx"),
    )


def _workers(shards: Sequence[Mapping[str, Any]]) -> Section:
    begin = _begin(shards)
    by_worker: dict[str, list[tuple[float, float]]] = {}
    for shard in shards:
        by_worker.setdefault(shard["worker"], []).append(_span(shard))
    length = max(end for spans in by_worker.values() for _, end in spans) - begin
    unit, scale = time_unit(length)
    busy = {name: sum(e - s for s, e in spans) for name, spans in by_worker.items()}
    shown = sorted(busy, key=lambda name: (busy[name], name))[:_MOST_WORKERS]
    rows = [
        (
            f"{name}  {percent(busy[name] / length if length else None)}",
            [
                ((start - begin) / scale, (end - begin) / scale)
                for start, end in _merged(by_worker[name], length * _TINY_GAP)
            ],
        )
        for name in shown
    ]
    note = "When each engine was at work, and how much of the time; gaps are waiting."
    if len(busy) > len(shown):
        note += f" The {len(shown)} least busy of {len(busy)} are shown."
    return Section("Engines", note, figures.timeline("engines", rows, unit))


def _merged(spans: Iterable[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Spans in order, those with less than `gap` between them as one."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start - merged[-1][1] <= gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _engine_waterfall(report: Mapping[str, Any]) -> Section:
    time, stages = report["engine_time"], report["stages"]
    inside = {name: stages[name]["seconds"] for name in ("features", "encoder", "decoder")}
    rest = max(0.0, time["busy_s"] - sum(inside.values()))
    parts = [
        ("waiting for the model and a first shard", time["start_s"], GREY),
        ("features", inside["features"], VIOLET),
        ("encoder", inside["encoder"], BLUE),
        ("decoder", inside["decoder"], GREEN),
        ("languages, texts and rows", rest, ORANGE),
        ("waiting for a next shard", time["starved_s"], RED),
        ("no shard left", time["tail_s"], GREY),
    ]
    return Section(
        "Where the engines' time went",
        f"{report['workers']} engines from the first decoding to the last recognition: engine"
        " seconds, which add up.",
        figures.waterfall("waterfall", _bars(parts), "engine seconds"),
    )


def _other_stages(report: Mapping[str, Any]) -> Section:
    stages = report["stages"]
    parts = [
        ("reading", stages["read"]["seconds"], GREY),
        ("decoding", stages["decode"]["seconds"], BLUE),
        ("resampling", stages["resample"]["seconds"], BLUE),
        ("speech detection", stages["speech_detection"]["seconds"], VIOLET),
        ("publishing", stages["publish"]["seconds"], ORANGE),
    ]
    cpu = report["cpu_seconds"]
    return Section(
        "Before and after the engines",
        "Seconds of tasks that run beside the engines. CPU time:"
        f" {cpu['decode']:,.1f} s up to speech detection, {cpu['recognise']:,.1f} s in engines.",
        figures.bars("tasks", _bars(parts), "task seconds"),
    )


def _bars(parts: Iterable[tuple[str, float, str]]) -> list[Bar]:
    parts = list(parts)
    whole = sum(seconds for _, seconds, _ in parts) or 1.0
    return [
        Bar(name, seconds, f"{seconds:,.1f} s, {seconds / whole:.0%}", colour)
        for name, seconds, colour in parts
    ]


def _batches(report: Mapping[str, Any]) -> Section:
    padding, idle = report["padding_share"], report["decoder_idle_share"]
    items = []
    if padding is not None:
        items.append(Bar("encoder input: speech", 1 - padding, percent(1 - padding), BLUE))
        items.append(Bar("encoder input: padding", padding, percent(padding), GREY))
    if idle is not None:
        items.append(Bar("decoder slots: writing", 1 - idle, percent(1 - idle), GREEN))
        items.append(Bar("decoder slots: ended", idle, percent(idle), GREY))
    return Section(
        "How full the batches were",
        "Padding is encoder work on nothing; an ended slot waits for longer texts of its batch.",
        figures.bars("batches", items, "share") if items else "",
    )


def _cost(report: Mapping[str, Any]) -> list[Section]:
    cost = report["cost"]
    if cost["usd"] is None:
        return []
    padding, retries, idle = (cost[f"{n}_usd"] or 0.0 for n in ("padding", "retries", "idle"))
    parts = [
        ("recognising speech", max(0.0, cost["usd"] - idle - padding - retries), BLUE),
        ("trying unsure speech again", retries, GREEN),
        ("encoding padding", padding, ORANGE),
        ("engines without work", idle, GREY),
    ]
    items = [Bar(what, usd, f"${usd:,.4g}", colour) for what, usd, colour in parts]
    note = f"${cost['usd']:,.4g} for the machines while the run was at work, by what they did."
    lines = [("machine type", "most at once", "hours", "$ an hour", "$")]
    for kind, m in report["machines"].items():
        money = [f"{m[k]:,.4g}" if m[k] is not None else "–" for k in ("usd_per_hour", "usd")]
        lines.append((kind, str(m["machines"]), f"{m['hours']:,.3f}", *money))
    return [Section("What it cost", note, figures.waterfall("cost", items, "US dollars"), lines)]


def _failures(report: Mapping[str, Any]) -> list[Section]:
    if not report["failures"]:
        return []
    lines = [("error_kind", "recordings"), *((k, f"{n:,}") for k, n in report["failures"].items())]
    return [Section("Failed recordings", "Their rows tell why (error_message).", rows=lines)]


def _pairs(values: Mapping[str, Any], skip: Sequence[str] = ()) -> list[tuple[str, str]]:
    return [("what", "which"), *((k, str(v)) for k, v in values.items() if k not in skip)]


# ---- numbers in words -----------------------------------------------------------------------


def number(value: float | None) -> str:
    """Three significant digits, or a dash."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}"


def percent(share: float | None) -> str:
    """A share as whole per cents, or a dash."""
    return "–" if share is None else f"{share:.0%}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is easiest to read."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit of a time axis, and its seconds."""
    if seconds < 300:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 3 * 3600 else ("hours", 3600.0)


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f9; color: #1d2433;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.05rem; margin: 0 0 .15rem; }
.sub { color: #5b6475; margin: .2rem 0 1.4rem; overflow-wrap: anywhere; }
.verdict { background: #fff; border-left: 4px solid #2f6fde; border-radius: 6px;
  padding: .8rem 1rem; margin: 0 0 1.2rem; font-size: 1.05rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem;
  margin-bottom: 1.2rem; }
.tile { background: #fff; border-radius: 8px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.4rem; line-height: 1.25; }
.tile span { color: #5b6475; font-size: .82rem; line-height: 1.3; display: block; }
section { background: #fff; border-radius: 8px; padding: 1rem 1.2rem; margin-bottom: 1.2rem; }
.note { color: #5b6475; font-size: .88rem; margin: 0 0 .6rem; }
svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid #e6e9ef;
  vertical-align: top; }
th { color: #5b6475; font-weight: 600; }
td:first-child { white-space: nowrap; }
pre { background: #1d2433; color: #e9edf5; padding: .8rem 1rem; border-radius: 6px; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="sub">{{ subtitle }}</p>
{% if verdict %}
<p class="verdict">{{ verdict }}</p>
{% endif %}
<div class="tiles">
{% for tile in tiles %}
<div class="tile"><b>{{ tile.value }}</b><span>{{ tile.label }}</span></div>
{% endfor %}
</div>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% if section.note %}
<p class="note">{{ section.note }}</p>
{% endif %}
{% if section.svg %}
{{ section.svg | safe }}
{% endif %}
{% if section.rows %}
<div class="scroll"><table>
<tr>{% for cell in section.rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in section.rows[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
</section>
{% endfor %}
{% if command %}
<section>
<h2>The command</h2>
<p class="note">Run it with another OUT to get such figures anew.</p>
<pre>{{ command }}</pre>
</section>
{% endif %}
</main>
</body>
</html>
"""
