"""Tables drawn as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import Bars, Lines, Table, cell

WIDTH = 8.0  # inches
BAR_HEIGHT = 0.3
COLOURS = ("#336791", "#37b24d", "#f59f00", "#c92a2a")


def draw(table: Table, chart: Bars | Lines, file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    # Text stays text, and the same figures give the same file.
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 9}
    from matplotlib import pyplot

    height = max(2.5, BAR_HEIGHT * len(table.rows) * _bars(chart) + 1.0)
    figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
    axes.set_prop_cycle(color=COLOURS)
    axes.set_title(table.title)
    axes.spines[["top", "right"]].set_visible(False)
    if isinstance(chart, Bars):
        _draw_bars(axes, table, chart.values)
    else:
        _draw_lines(axes, table, chart)
    if len(chart.values) > 1:
        axes.legend(frameon=False, loc="upper right" if isinstance(chart, Bars) else "best")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    pyplot.close(figure)


def _bars(chart: Bars | Lines) -> float:
    """How many bars' height a row takes."""
    return 1 + 0.5 * (len(chart.values) - 1) if isinstance(chart, Bars) else 0


def _draw_bars(axes: Any, table: Table, columns: Sequence[str]) -> None:
    thickness = 0.8 / len(columns)
    longest = 0.0
    for number, column in enumerate(columns):
        figures = [(row, figure) for row, figure in enumerate(table.column(column)) if _is_figure(figure)]
        places = [row + (number - (len(columns) - 1) / 2) * thickness for row, _ in figures]
        bars = axes.barh(places, [figure for _, figure in figures], height=thickness * 0.9, label=column)
        axes.bar_label(bars, [cell(figure) for _, figure in figures], padding=3, fontsize=8)
        longest = max(longest, *(float(figure) for _, figure in figures), 0.0)
    axes.set_yticks(range(len(table.rows)), [str(row[0]) for row in table.rows])
    axes.invert_yaxis()
    axes.set_xlim(right=longest * 1.1)
    axes.set_xlabel(columns[0] if len(columns) == 1 else "")


def _draw_lines(axes: Any, table: Table, chart: Lines) -> None:
    for column in chart.values:
        points = [
            (over, figure)
            for over, figure in zip(table.column(chart.over), table.column(column), strict=True)
            if _is_figure(over) and _is_figure(figure)
        ]
        axes.plot(*zip(*points, strict=True), marker="o", label=column)
    if chart.logarithmic:
        axes.set_xscale("log")
        axes.set_yscale("log")
    axes.set_xlabel(chart.over)
    axes.set_ylabel(chart.values[0] if len(chart.values) == 1 else "")


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float)
