"""Plots as inline SVG, by matplotlib.

SVG because a report is one file that a browser shows without a script or a network; matplotlib
because its plots weigh some 20 KB, where a library of interactive ones brings megabytes a report.
Owns what plots look like; knows nothing of where numbers come from.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, GREEN, GREY, ORANGE, RED, VIOLET = (
    "#2f6fde", "#2f9e6e", "#c3c9d4", "#e8912d", "#d0453f", "#8659c9",
)  # fmt: skip
_INK, _FAINT = "#1d2433", "#e6e9ef"
_WIDTH_IN = 8.6
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "text.color": _INK,
    "axes.labelcolor": "#5b6475",
    "axes.edgecolor": _FAINT,
    "xtick.color": "#5b6475",
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _FAINT,
    "axes.axisbelow": True,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart: what it says on its left, how long it is, and what on its right."""

    label: str
    value: float
    text: str
    colour: str = BLUE
    low: float | None = None
    high: float | None = None


def bars(name: str, items: Sequence[Bar], unit: str) -> str:
    """Horizontal bars, the first on top; a whisker from `low` to `high` where given."""
    longest = max((item.high or item.value for item in items), default=0.0)
    with _drawn(name, 0.3 * len(items) + 0.55) as (figure, axes):
        places = range(len(items))
        axes.barh(places, [i.value for i in items], color=[i.colour for i in items], height=0.66)
        for place, item in zip(places, items, strict=True):
            if item.low is not None and item.high is not None:
                axes.plot([item.low, item.high], [place, place], color=_INK, linewidth=1.2)
            _write(axes, (item.high or item.value) + longest * 0.012, place, item.text)
        _label_rows(axes, [item.label for item in items])
        axes.set_xlim(0, (longest or 1.0) * 1.2)
        axes.set_xlabel(unit)
        return _svg(figure, name)


def waterfall(name: str, items: Sequence[Bar], unit: str) -> str:
    """Bars that begin where the one above ends, so that their end is the sum."""
    whole = sum(item.value for item in items)
    with _drawn(name, 0.3 * len(items) + 0.55) as (figure, axes):
        left = 0.0
        for place, item in enumerate(items):
            axes.barh(place, item.value, left=left, color=item.colour, height=0.66)
            left += item.value
            _write(axes, left + whole * 0.012, place, item.text)
        _label_rows(axes, [item.label for item in items])
        axes.set_xlim(0, (whole or 1.0) * 1.2)
        axes.set_xlabel(unit)
        return _svg(figure, name)


def curve(name: str, x: Sequence[float], y: Sequence[float], x_unit: str, y_unit: str) -> str:
    """A line over time, filled below; steps, as each value holds until the next."""
    with _drawn(name, 2.2) as (figure, axes):
        axes.step(x, y, where="post", color=BLUE, linewidth=1.6)
        axes.fill_between(x, y, step="post", color=BLUE, alpha=0.12, linewidth=0)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(x_unit)
        axes.set_ylabel(y_unit)
        return _svg(figure, name)


def timeline(
    name: str, rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], x_unit: str
) -> str:
    """A row for each name with the spans (start, end) in which it was at work."""
    with _drawn(name, 0.26 * len(rows) + 0.55) as (figure, axes):
        for place, (_, spans) in enumerate(rows):
            widths = [(start, end - start) for start, end in spans]
            axes.broken_barh(widths, (place - 0.33, 0.66), facecolors=GREEN, edgecolor="white",
                             linewidth=0.4)  # fmt: skip
        _label_rows(axes, [row for row, _ in rows])
        axes.set_xlim(left=0)
        axes.set_xlabel(x_unit)
        return _svg(figure, name)


def _write(axes: Axes, x: float, y: float, text: str) -> None:
    # parse_math: a name with dollar signs is no formula.
    axes.text(x, y, text, va="center", fontsize=8.5, parse_math=False)


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)


@contextmanager
def _drawn(name: str, height_in: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot, in the common style while the block runs."""
    import matplotlib
    from matplotlib.figure import Figure

    # The salt keeps ids of one page's plots apart, and the same from run to run.
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str) -> str:
    """The plot as an element of a page: no prologue, no metadata, nothing that names a URL."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", transparent=True)
    text = drawn.getvalue()
    element = text[text.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'(width|height)="[\d.]+pt" ', "", element, count=2)
    return re.sub(r'id="(figure|axes|patch|text|line2d|xtick|ytick|matplotlib\.axis)_\d+"',
                  f'class="{name}"', element)  # fmt: skip
