"""How a night's tasks are sent to their worker, and what that says of them."""

from __future__ import annotations

import re
from typing import Any

from tests.conftest import Worker, wait_until

QUEUE = "nights"


def send(task: Any, *arguments: object, **options: Any) -> Any:
    return task.apply_async(arguments, queue=QUEUE, **options)


def logged(worker: Worker, *texts: str) -> str:
    """The last line of the log with all of these, without its time and process, by the names of the shop."""

    def found() -> list[str]:
        return [line for line in worker.log.splitlines() if all(text in line for text in texts)]

    line = wait_until(found, f"{texts} in the log")[-1]
    return re.sub(r"^\[.*?\] ", "", line).replace("tests.night_tasks.", "shop.tasks.")
