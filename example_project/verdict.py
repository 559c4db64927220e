"""The table at the end, and whether everything in it is as it must be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from example_project.display import BROKEN, OK, coloured, say, table
from example_project.outcomes import Outcome, outcomes
from example_project.scenes import SCENES, Scene
from example_project.shop.models import Entry
from example_project.watcher import NOTICEABLE

HEADINGS = ("scene", "sent", "done", "skipped", "failed", "retries", "waited", "checked in the data", "")


def show(*, is_complete: bool, is_cut_short: bool) -> bool:
    """Print the verdict, and answer it; a task without an end is lost, unless the run was cut short."""
    found = outcomes()
    suspects = [one for one in found if not one.is_sound and not (is_cut_short and one.end == "left")]
    rows = [row(scene, [one for one in found if one.task in scene.tasks]) for scene in SCENES]
    say()
    table([HEADINGS, *rows])
    say()
    ends = ", ".join(f"{number} {end}" for end, number in Counter(one.end for one in found).most_common())
    say(f"{len(found)} tasks sent: {ends or 'none'}; {len(suspects)} unaccounted for.")
    for one in suspects:
        say(f"  {one}")
    is_sound = (is_complete or is_cut_short) and not suspects and all(cells[-1] == OK for cells in rows)
    say(coloured("Everything held.", OK) if is_sound else coloured("Not everything held.", BROKEN))
    return is_sound


def row(scene: Scene, found: Sequence[Outcome]) -> tuple[object, ...]:
    ends = Counter(one.end for one in found)
    entries = Entry.objects.filter(task__in=scene.tasks)
    finding = scene.check(ends["done"])
    return (
        scene.name,
        len(found),
        ends["done"],
        ends["skipped"],
        ends["failed"],
        entries.filter(what="retries").count(),
        entries.filter(what="holds", seconds__gt=NOTICEABLE).count(),
        finding.says,
        OK if finding.holds else BROKEN,
    )
