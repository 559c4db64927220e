"""Rows of attributes as an operator reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from celery_pglock.printed_texts import cut, in_json, lines, one_line, width

SEPARATOR = " | "

# On a terminal one long name must not push all other columns out of sight: as wide as a task id.
WIDEST_CELL = 36


@dataclass(frozen=True, slots=True)
class Listing:
    """What was found of these attributes.

    ``left_out`` is how many rows a limit cut off, ``has_unreadable`` whether some are of backends that this
    role may not see in full.
    """

    attributes: Sequence[str]
    rows: Sequence[Sequence[Any]]
    left_out: int
    has_unreadable: bool

    def table(self, columns: int | None) -> Iterator[str]:
        """A header and one line for each row; cut for a terminal of so many columns, if it is one."""
        table = [list(self.attributes), *([one_line(cell) for cell in row] for row in self.rows)]
        if columns is not None:
            table = [[*(cut(cell, WIDEST_CELL) for cell in row[:-1]), row[-1]] for row in table]
        widths = [max(map(width, cells)) for cells in zip(*table, strict=True)]
        for row in table:
            padded = [cell + " " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)]
            line = SEPARATOR.join(padded).rstrip()
            yield line if columns is None else cut(line, columns)

    def paragraphs(self) -> Iterator[str]:
        """One line for each attribute, a rule before each row; further lines of a value are indented."""
        wide = max(map(len, self.attributes))
        for number, row in enumerate(self.rows, start=1):
            yield f"--- {number} ---"
            for attribute, value in zip(self.attributes, row, strict=True):
                first, *more = lines(value)
                yield f"{attribute:{wide}}: {first}".rstrip()
                yield from (" " * (wide + 2) + line for line in more)

    def objects(self) -> list[dict[str, Any]]:
        """The rows as JSON knows them, by attribute."""
        return [dict(zip(self.attributes, map(in_json, row), strict=True)) for row in self.rows]
