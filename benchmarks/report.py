"""Tables as a reader gets them: in the terminal, and in the docs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import machines
from benchmarks.charts import draw
from benchmarks.tables import Scale, Table, Target, cell

DOCS = Path(__file__).parent.parent / "docs" / "explanation"
TARGETS = ("target", "measured", "bound", "")

INTRODUCTION = """\
# What locks cost, measured

Written by `make bench`, which starts its own servers, lets all contenders take turns in one run, and measures
the floor beside them. **Read the ratios, not the times**: those are of this machine, and of this hour. How to
run and to read it is in `benchmarks/README.md`.
"""


def show(tables: Sequence[Table]) -> None:
    for table in tables:
        print(f"\n{table.title}\n{'=' * len(table.title)}\n")
        print("\n".join(_aligned([table.columns, *_cells(table)])))
        if table.note:
            print(f"\n{table.note}")
        if table.targets:
            print()
            print("\n".join(_aligned([TARGETS, *map(_verdict, table.targets)])), flush=True)


def write(tables: Mapping[str, Sequence[Table]], scale: Scale, docs: Path = DOCS) -> None:
    """Write ``benchmarks.md``, and its charts into the folder ``benchmarks`` beside it."""
    charts = docs / "benchmarks"
    charts.mkdir(exist_ok=True)
    parts = [INTRODUCTION, *_setting(scale)]
    for table in [table for part in tables.values() for table in part]:
        parts.append(f"## {table.title}\n")
        if table.note:
            parts.append(f"{table.note}\n")
        parts += _markdown(table.columns, _cells(table))
        if table.chart:
            draw(table, table.chart, charts / f"{table.name}.svg")
            parts.append(f"![{table.title}](benchmarks/{table.name}.svg)\n")
        if table.targets:
            parts += _markdown(TARGETS, list(map(_verdict, table.targets)))
    (docs / "benchmarks.md").write_text("\n".join(parts).rstrip() + "\n")


def _setting(scale: Scale) -> Iterator[str]:
    today = datetime.now(timezone.utc).date()
    about = {"measured": f"{today:%Y-%m-%d}"} | machines.machine() | machines.versions(scale)
    yield from _markdown(("", ""), list(about.items()))


def _cells(table: Table) -> list[list[str]]:
    return [list(map(cell, row)) for row in table.rows]


def _verdict(target: Target) -> list[str]:
    sign = "≥" if target.at_least else "≤"
    bound = f"{sign} {target.bound:.3g} {target.unit}".rstrip()
    measured = f"{cell(target.measured)} {target.unit}".rstrip()
    return [target.what, measured, bound, "met" if target.is_met else "MISSED"]


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    rules = ["---", *["---:"] * (len(columns) - 1)]
    for row in (columns, rules, *rows):
        yield f"| {' | '.join(text.replace('|', chr(92) + '|') for text in row)} |"
    yield ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rules = ["-" * width for width in widths]
    return ["  ".join(_padded(row, widths)).rstrip() for row in (rows[0], rules, *rows[1:])]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
