"""report.html: well-formed, whole in itself, and nothing in it is taken for markup."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.unit.test_report import FACTS, SUMMARY, totals_of
from transcribe.page import run_page
from transcribe.report import metric_rows, report

_VOID = {"meta", "br", "hr", "img", "input", "link"}
_LOADING = {"src", "href", "xlink:href", "data", "poster", "srcset", "action"}
NASTY = 'a<script>alert("x")</script>&$x_1$'


class Reader(HTMLParser):
    """Checks that tags close in order; keeps what would be loaded or run, and the text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in _VOID:
            self.open.append(tag)
        self.loaded += [v for k, v in attrs if k in _LOADING and v and not v.startswith("#")]
        self.loaded += [k for k, _ in attrs if k.startswith("on")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def content(*summaries: Any, **facts: Any) -> dict[str, Any]:
    made = report(replace(FACTS, **facts), totals_of(*summaries), summaries)
    return {**made, "environment": {"cpu": "a CPU", "command": f"transcribe run '{NASTY}' out"}}


SHARDS = [replace(SUMMARY, worker=NASTY), replace(SUMMARY, shard_id="s2", worker="n:2")]


@pytest.fixture(scope="module")
def page() -> str:
    return run_page(content(*SHARDS, archive=NASTY), metric_rows("r", SHARDS))


def test_it_is_well_formed_and_loads_nothing(page: str) -> None:
    reader = read(page)
    assert reader.loaded == []
    assert not reader.tags & {"script", "link", "img", "iframe", "object"}
    assert "url(http" not in page and "@import" not in page


def test_every_plot_is_well_formed_xml(page: str) -> None:
    plots = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    assert len(plots) == 5
    for plot in plots:
        ElementTree.fromstring(plot)


def test_names_are_text_whatever_they_hold(page: str) -> None:
    text = read(page).text
    assert text.count(NASTY) >= 3  # the archive, the command, and a worker in a plot


def test_the_figures_of_the_report_are_on_it(page: str) -> None:
    text = " ".join(read(page).text.split())
    assert "12.0 RTFx" in text
    assert "2 × cpu engines" in text
    assert content(*SHARDS)["bottleneck"]["sentence"] in text
    assert "corrupt 2" in text
    assert "75%" in text and "25%" in text  # speech and padding in the encoder's input


def test_what_it_cost_is_told_where_there_is_a_price() -> None:
    made = content(SUMMARY)
    assert "What it cost" not in read(run_page(made, metric_rows("r", [SUMMARY]))).text
    shares = {"idle_usd": 3.0, "padding_usd": 2.0, "usd_per_1000_audio_hours": 84.5}
    made["cost"] = {**made["cost"], "usd": 14.0, **shares}
    machine = {"machines": 2, "hours": 7.0, "usd_per_hour": 2.0, "usd": 14.0}
    made["machines"] = {"g2<b>": machine}
    text = " ".join(read(run_page(made, metric_rows("r", [SUMMARY]))).text.split())
    assert "$84.50 per 1,000 audio hours" in text
    assert "recognising speech" in text and "$9" in text  # 14 less 3 idle, less 2 for padding
    assert "g2<b> 2 7.000 2 14" in text


def test_a_run_that_only_copied_rows_has_a_page(page: str) -> None:
    made = content(replace(SUMMARY, seconds=replace(SUMMARY.seconds, recognise=0.0)))
    assert read(run_page(made, metric_rows("r", []))).text


def test_a_thousand_engines_stay_readable() -> None:
    shards = [replace(SUMMARY, shard_id=str(i), worker=f"node:{i}") for i in range(1_000)]
    made = content(*shards, workers=1_000)
    page = run_page(made, metric_rows("r", shards))
    assert "24 least busy of 1000" in page
    assert len(page) < 300_000


def test_the_report_it_is_made_from_stays_json() -> None:
    assert json.loads(json.dumps(content(SUMMARY), allow_nan=False))
