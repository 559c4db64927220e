"""A worker of the app in ``TASK_APP``: ``python -m benchmarks.worker prefork|solo``.

The command `celery` would not do: it loads the commands of every library that is installed, ours among them.
"""

from __future__ import annotations

import importlib
import os
import sys


def main() -> None:
    name = os.environ["TASK_APP"]
    app = importlib.import_module(name).app
    worker = app.Worker(
        hostname=f"{app.main}@{os.getpid()}",
        pool_cls=sys.argv[1],
        concurrency=2,
        loglevel="WARNING",
        optimization="fair",
        # What a worker does now and then beside its work is not measured.
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    # What is not measured with ours must not have it around either.
    assert ("celery_pglock" in sys.modules) == ("celery_pglock" in os.environ.get("APPS", ""))
    worker.start()
    sys.exit(worker.exitcode)


if __name__ == "__main__":
    main()
