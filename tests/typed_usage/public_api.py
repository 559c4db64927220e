"""Whether pyright knows the types of all that the package offers, in the environment that it runs in."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import django
from django.conf import settings

# What the documents import from; the other modules are nobody's business but the package's own.
DOORS = ("", ".bootsteps", ".models", ".schedules", ".signals", ".tasks", ".testing")


def main() -> int:
    command = ["pyright", "--verifytypes", "celery_pglock", "--ignoreexternal", "--outputjson"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    symbols = json.loads(answer.stdout)["typeCompleteness"]["symbols"]
    settings.configure(INSTALLED_APPS=["celery_pglock"])
    django.setup()
    offered = set(_offered())
    asked = [symbol for symbol in symbols if _is_part_of(symbol["name"], offered)]
    unknown = [symbol for symbol in asked if not symbol["isTypeKnown"] or symbol["isTypeAmbiguous"]]
    for symbol in unknown:
        reasons = {one["message"].splitlines()[0] for one in symbol["diagnostics"]}
        print(f"{symbol['name']}: {'; '.join(sorted(reasons))}")  # noqa: T201 - its answer
    known = len(asked) - len(unknown)
    print(f"pyright knows the types of {known} of {len(asked)} public names")  # noqa: T201 - its answer
    return 1 if unknown or not asked else 0


def _offered() -> Iterator[str]:
    """Where the public names are defined, and the bases of the classes among them."""
    for door in DOORS:
        module = importlib.import_module(f"celery_pglock{door}")
        for name in _public_names(module):
            value: Any = getattr(module, name)
            yield f"{module.__name__}.{name}"
            for one in inspect.getmro(value) if isinstance(value, type) else (value,):
                where = getattr(one, "__module__", None) or ""
                if where.startswith("celery_pglock"):
                    yield f"{where}.{getattr(one, '__qualname__', name)}"


def _public_names(module: ModuleType) -> list[str]:
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name != "logger"
        and not inspect.ismodule(value)
        and getattr(value, "__module__", module.__name__) in (module.__name__, "django.dispatch.dispatcher")
    ]


def _is_part_of(name: str, offered: set[str]) -> bool:
    return any(name == one or name.startswith(f"{one}.") for one in offered)


if __name__ == "__main__":
    sys.exit(main())
