"""The command that measures, prints, and writes the docs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys
import time

from benchmarks import report, servers
from benchmarks.tables import Scale, Table

# In the order in which they are told.
MEASUREMENTS = ("locks", "tasks", "handover", "waiters", "looking", "lease", "connections", "memory")

# What a change of the locks themselves can move.
QUICK = ("locks", "tasks", "handover")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)} only, under a minute; nothing is written"
    )
    parser.add_argument("--only", default="", help=f"some of {','.join(MEASUREMENTS)}; nothing is written")
    parser.add_argument("--postgresql", choices=["16", "18"], default="18")
    arguments = parser.parse_args()
    usual = QUICK if arguments.quick else MEASUREMENTS
    chosen = arguments.only.split(",") if arguments.only else list(usual)
    if unknown := sorted(set(chosen) - set(MEASUREMENTS)):
        parser.error(f"no such part: {', '.join(unknown)}")

    # An end in order, for the servers, too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    tables: dict[str, list[Table]] = {}
    with contextlib.ExitStack() as running:
        scale = Scale(
            is_quick=arguments.quick,
            postgresql=arguments.postgresql,
            database_url=running.enter_context(servers.postgresql(arguments.postgresql)),
            redis_url=running.enter_context(servers.redis()),
        )
        for name in chosen:
            print(f"\nMeasuring {name} ...", flush=True)
            measurement = importlib.import_module(f"benchmarks.{name}")
            tables[name] = measurement.measure(scale)
            report.show(tables[name])
        if not (arguments.quick or arguments.only):
            report.write(tables, scale)
    print(f"Took {time.monotonic() - started:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
