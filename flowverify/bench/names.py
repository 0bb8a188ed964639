"""What tasks are called where people read them: their names are made to be unique, and to be matched by patterns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from flowverify.bench import sources
from flowverify.bench.statistics import distance_of
from flowverify.bench.tasks import Task

LARGEST, NEAREST = "largest radius", "nearest image"  # what a search is for, of certificates and of attacks


def title_of(task: Task, *, radius: bool = True) -> str:
    """A task in words: its model, its method and bound or attack, the distance, and what was asked.

    Args:
        radius: whether the title says what was asked: a radius, or a search.
    """
    settings = task.settings
    model = sources.short(str(settings.get("model", "")))
    label, found, rest = task.name.partition(f"{task.kind}/{model}/")
    if not found or not distance_of(settings):
        name = task.name if radius else task.name.rpartition("/")[0] or task.name
        return name.replace("/", ", ")
    *parts, asked = rest.split("/")
    cap = settings.get("cap")
    parts = [part for part in parts if part not in (settings["ground"], None if cap is None else f"cap {cap:g}")]
    if asked == "search":
        asked = NEAREST if task.kind == "attack" else LARGEST
    way = f"{'attack ' if task.kind == 'attack' else ''}{', '.join(parts)} ({distance_of(settings)})"
    words = f"{label.rstrip('/') + ', ' if label else ''}{model}: {way}"
    return f"{words}, {asked}" if radius else words


def titles(tasks: Iterable[Task]) -> dict[str, str]:
    """The title of each task by its name; names that share a title keep theirs beside it."""
    found = {task.name: title_of(task) for task in tasks}
    counts = Counter(found.values())
    return {name: title if counts[title] == 1 else f"{title} [{name}]" for name, title in found.items()}
