"""Tables as a reader gets them: in the terminal, in the docs, and drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.tables import Scale, Table, Target


def show(tables: Sequence[Table]) -> None:
    for table in tables:
        print(f"\n{table.title}\n{'=' * len(table.title)}\n")
        print("\n".join(_aligned([list(table.columns), *(list(map(cell, row)) for row in table.rows)])))
        if table.note:
            print(f"\n{table.note}")
        if table.targets:
            print()
            print("\n".join(_aligned([["target", "measured", "bound", ""], *map(_verdict, table.targets)])))


def write(tables: Mapping[str, Sequence[Table]], scale: Scale) -> None:
    """Write ``docs/explanation/benchmarks.md`` and its charts."""


def cell(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _verdict(target: Target) -> list[str]:
    sign = "≥" if target.at_least else "≤"
    verdict = "met" if target.is_met else "MISSED"
    return [
        target.what,
        cell(target.measured) + target.unit,
        f"{sign} {target.bound:g}{target.unit}",
        verdict,
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rules = ["-" * width for width in widths]
    return ["  ".join(_padded(row, widths)).rstrip() for row in (rows[0], rules, *rows[1:])]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    first, *others = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]
