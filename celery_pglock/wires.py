"""How a statement goes to the server, and its rows come back, with little in between."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import error_from_result
from psycopg.generators import execute
from psycopg.pq import Escaping, ExecStatus
from psycopg.pq.abc import PGresult

# What the server keeps for one session: some forty bytes for each character of the text, plans and all.
MOST_PREPARED: Final = 32
LONGEST_PREPARED: Final = 8000

MOST_NUMBERED: Final = 128


class Wire:
    """A connection of psycopg's on which one thread at a time asks; raises psycopg's errors.

    Its cursors would look for placeholders in a text that is never the same, as its label is not. And what
    they prepare by the protocol would be shown without its label.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._adapted = Transformer(connection)
        # The names of the statements that the server has, by their texts.
        self._prepared: dict[str, str] = {}

    def ask(self, sql: str, parameters: Sequence[object], label: str) -> list[tuple[Any, ...]]:
        """The rows of the statement, before which the label stands."""
        values = self._adapted.dump_sequence(parameters, [PyFormat.TEXT] * len(parameters))
        text = (label + _numbered(sql)).encode()
        self._connection.pgconn.send_query_params(text, values, self._adapted.types)
        return self._rows(self._results()[-1])

    def ask_again(self, sql: str, parameters: Sequence[int | str], label: str) -> list[tuple[Any, ...]]:
        """As ``ask()`` for a statement with parameters that is asked often: the server plans it once."""
        name = self._prepared.get(sql)
        if name is not None:
            results = self._exchange(f"{label}EXECUTE {name}", parameters)
        elif len(self._prepared) == MOST_PREPARED or len(sql) > LONGEST_PREPARED:
            return self.ask(sql, parameters, label)
        else:
            name = f"pglock_{len(self._prepared) + 1}"
            results = self._exchange(f"{label}PREPARE {name} AS {_numbered(sql)}; EXECUTE {name}", parameters)
            # An error of what follows does not undo PREPARE, which may itself have met one.
            if results[0].status == ExecStatus.COMMAND_OK:
                self._prepared[sql] = name
        return self._rows(results[-1])

    def _exchange(self, beginning: str, parameters: Sequence[int | str]) -> list[PGresult]:
        literals = ", ".join([self._literal(value) for value in parameters])
        self._connection.pgconn.send_query(f"{beginning}({literals})".encode())
        return self._results()

    def _results(self) -> list[PGresult]:
        return self._connection.wait(execute(self._connection.pgconn))

    def _rows(self, result: PGresult) -> list[tuple[Any, ...]]:
        if result.status != ExecStatus.TUPLES_OK:
            raise error_from_result(result, encoding=self._connection.info.encoding)
        self._adapted.set_pgresult(result)
        return self._adapted.load_rows(0, result.ntuples, tuple)

    def _literal(self, value: int | str) -> str:
        if isinstance(value, str):
            return Escaping(self._connection.pgconn).escape_literal(value.encode()).decode()
        return str(int(value))


@lru_cache(MOST_NUMBERED)
def _numbered(sql: str) -> str:
    """The text with libpq's placeholders."""
    first, *others = sql.split("%s")
    numbered = [f"${number}{text}" for number, text in enumerate(others, 1)]
    return "".join([first, *numbered]).replace("%%", "%")
