"""What a run shows to Prometheus, scraped from a real Ray; and the dashboard that draws it."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from transcribe import distributed
from transcribe.cli import app

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "transcribe.json"


def scraped() -> dict[tuple[str, str], float]:
    """(name, status or error kind) -> value, of all that begins with `ray_transcribe_`."""
    found = {}
    for node in ray.nodes():
        address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=5) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_transcribe_"):
                    label = sample.labels.get("status") or sample.labels.get("error_kind", "")
                    found[sample.name, label] = sample.value
    return found


@pytest.fixture(scope="module")
def names() -> set[str]:
    counters = {f"ray_{name}_total" for name in distributed._COUNTERS}
    return counters | {f"ray_{name}" for name in distributed._GAUGES}


def test_a_run_is_seen_by_prometheus(tmp_path, write_archive, shared_ray, names):
    archive, out = write_archive(tmp_path / "calls", 3), tmp_path / "out"
    command = ["run", str(archive), str(out), "--model", "fake", "--max-failed", "0.5"]
    done = CliRunner().invoke(app, [*command, "--price-per-hour", "36"])
    assert done.exit_code == 0, done.output
    (report,) = [json.loads(p.read_bytes()) for p in out.glob("runs/*/report.json")]
    deadline = time.monotonic() + 60  # metrics travel every few seconds
    found = scraped()
    while missing := names - {name for name, _ in found}:
        assert time.monotonic() < deadline, missing
        time.sleep(1)
        found = scraped()
    assert found["ray_transcribe_audio_seconds_total", ""] == pytest.approx(report["audio_seconds"])
    assert found["ray_transcribe_recordings_total", "ok"] == report["ok"] == 3
    assert found["ray_transcribe_recordings_total", "failed"] == 1
    assert found["ray_transcribe_failures_total", "not_audio"] == 1
    assert found["ray_transcribe_shards_total", ""] == report["shards"]
    assert 0 < found["ray_transcribe_spent_usd", ""] <= report["cost"]["usd"]
    assert found["ray_transcribe_usd_per_hour", ""] == 36


def test_the_dashboard_draws_what_there_is(names):
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 5
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    expressions += [v["query"] for v in variables if v["type"] == "query"]
    drawn = {name for text in expressions for name in re.findall(r"\bray_\w+", text)}
    assert drawn == names
    assert {name for text in expressions for name in re.findall(r"\$(\w+)", text)} == {"run_id"}
    assert all(text.count("(") == text.count(")") for text in expressions)
    for panel in panels:
        place = panel["gridPos"]
        assert panel["title"] and place["x"] + place["w"] <= 24
