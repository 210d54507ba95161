"""docs/output.md names every field, status, error kind and flag that a run writes, and no other."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from transcribe import schema
from transcribe.assemble import assemble
from transcribe.budget import Bill, Charge
from transcribe.engines.base import Hypothesis, HypothesisSegment
from transcribe.planning import Actual, compared
from transcribe.report import RunFacts, Totals, report
from transcribe.speech import Window
from transcribe.status import Progress

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")


def _table(heading: str) -> dict[str, list[str]]:
    """Rows of the first table under a heading: name in backticks -> the other cells."""
    lines = DOC.splitlines()
    start = lines.index(heading) + 1
    section = []
    for line in lines[start:]:
        if line.startswith("#"):
            break
        section.append(line)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section
        if line.startswith("| `")
    ]
    names = [cells[0].strip("`") for cells in rows]
    assert len(names) == len(set(names)), f"a name stands twice under {heading}"
    return {name: cells[1:] for name, cells in zip(names, rows, strict=True)}


def _type_name(kind: pa.DataType) -> str:
    return str(kind).split("<")[0].split("[")[0]


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("### Columns", schema.TRANSCRIPT),
        ("### `segments[]`", schema.SEGMENT),
        ("### `segments[].words[]`", schema.WORD),
        ("### `coverage[]`", schema.COVERAGE),
        ("## `metrics.parquet`", schema.METRICS),
    ],
)
def test_columns_stand_in_order_with_their_types(heading: str, fields: Iterable[pa.Field]) -> None:
    documented = _table(heading)
    assert [(name, cells[0]) for name, cells in documented.items()] == [
        (field.name, _type_name(field.type)) for field in fields
    ]
    assert all(cells[2] for cells in documented.values()), "a meaning is missing"


def test_report_keys() -> None:
    facts = RunFacts("r", "complete", "a", "o", "m", "e", "cpu", 1, 1, 0, 0, 0, 1.0, 1.0, 2.0, 1)
    totals = Totals(failures={"corrupt": 1})
    bill = Bill({"g2-standard-4:spot": Charge(1, 1.0, 0.5, 0.5)})
    written = report(facts, totals, [], bill)
    run_module = (ROOT / "transcribe" / "run.py").read_text(encoding="utf-8")
    for added in re.findall(r'result\["(\w+)"\] =', run_module):
        written[added] = _ADDED[added]
    assert set(_table("## `report.json`")) == set(_keys(written))


_ADDED = {
    "environment": 0,
    "published": {"ok": 1},
    "predicted": compared(None, Actual({}, 0, 0, "cpu", 0.0, 0.0, None)),
}


def test_progress_keys() -> None:
    assert list(_table("## `progress.json`")) == [f.name for f in dataclasses.fields(Progress)]


_KEYED_BY_DATA = {
    "failures": "<error_kind>",
    "stages": "<stage>",
    "published": "<status>",
    "machines": "<machine type>",
}


def _keys(content: dict[str, Any]) -> Iterator[str]:
    for name, value in content.items():
        if not isinstance(value, dict):
            yield name
        elif name in _KEYED_BY_DATA:
            inner = next(iter(value.values()))
            ends = [f".{key}" for key in inner] if isinstance(inner, dict) else [""]
            yield from (f"{name}.{_KEYED_BY_DATA[name]}{end}" for end in ends)
        else:
            yield from (f"{name}.{key}" for key in value)


def test_error_kinds() -> None:
    raised = set()
    for path in (ROOT / "transcribe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "BadAudio":
                assert isinstance(node.args[0], ast.Constant), f"{path.name}:{node.lineno}"
                raised.add(node.args[0].value)
    assert set(_table("### Error kinds")) == raised


def test_statuses_and_flags() -> None:
    assert set(_table("### Status")) == {"ok", "empty", "failed"}
    credit = HypothesisSegment(1, 1, "Thanks for watching!" + " " * 30)
    everything = Hypothesis((credit,), "en", avg_logprob=-9, compression_ratio=9, no_speech_prob=1)
    (segment,) = assemble([Window(0, 0, 16_000)], [everything]).segments
    assert set(_table("### Flags")) == set(segment.flags)
