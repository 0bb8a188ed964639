"""A folder of results as one HTML page that needs nothing else, as CSV, and as LaTeX tables."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from flowverify.bench import plots, sources, tables
from flowverify.bench.statistics import TaskRecords, by_task
from flowverify.bench.store import read_folder
from flowverify.errors import DataError, FlowverifyError, InvalidInputError
from flowverify.figures import require_matplotlib

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 2rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; display: block;
  overflow-x: auto; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
th { border-bottom: 2px solid #555; font-weight: 600; }
.left { text-align: left; } .right { text-align: right; }
img { max-width: 100%; height: auto; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .8rem; }
.note { color: #555; max-width: 52rem; }
"""
RADII = (
    "Radii are distances of normalised images in pixels, each for the distance that it is shown with: W1 with the "
    "ground cost that follows, where 0.1 moves a tenth of the mass by one pixel, or W_p for a power. Medians and "
    "quartiles are over the images that are classified right; an image without a certificate counts as 0, and one "
    "without an upper end, or that an attack finds nothing for, as infinite (inf). The exact radius lies between the "
    "certified one and the one at most; quartiles are those of certified radii, of attacks those of the radii found. "
    "For vanilla methods the upper end is that of the L1 ball of flows, whose images may have negative pixels. "
    "Certified accuracy counts all images. The time of an image is its share of the chunk that it was computed in, "
    "without preparation."
)
WORST = (
    "From left to right: the image; the image in its certified ball that lowers the margin most to first order, which "
    "need not be the worst in the ball; their difference under the shortest flow between them. Images of the smallest, "
    "the median and the largest radius."
)


def write_report(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Writes report.html, records.csv, summary.csv and tables.tex into ``out``, by default the folder itself.

    Raises:
        InvalidInputError: the folder does not hold results, or no record yet.
        DataError: a file in it is damaged, or ``out`` cannot be made.
        DependencyError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    suite, records, log = read_folder(folder)
    if not records:
        raise InvalidInputError(f"{folder}: holds no record yet, expected at least one")
    require_matplotlib()
    tasks = by_task(suite.tasks, records)
    listed = [tables.summary(tasks)]
    if suite.comparisons:
        listed.append(tables.claims(suite.comparisons, tasks))
    failed = tables.failures(tasks)
    if failed.rows:
        listed.append(failed)
    machines = tables.environments(records)
    finished = max(record["finished"] for record in records)
    parts = [
        f"<h1>{html.escape(suite.name)}</h1>",
        f'<p class="note">{html.escape(suite.description)}</p>' if suite.description else "",
        f"<p>{len(records)} of {suite.size} records; the last of {html.escape(finished)}; seed {suite.context.seed}. "
        f"{html.escape(_time_spent(log))}</p>",
        *(table.to_html() for table in listed),
        f'<p class="note">{RADII}</p>',
        *_pictures(tasks),
        *_galleries(tasks),
        *_outputs(tasks),
        machines.to_html(),
    ]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(suite.name)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    )
    target = Path(folder if out is None else out)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror}), expected a folder or a new name") from error
    written = {
        "report.html": page,
        "records.csv": tables.records_csv(records),
        "summary.csv": listed[0].to_csv(),
        "tables.tex": "\n".join(table.to_latex() for table in listed),
    }
    for name, content in written.items():
        (target / name).write_text(content, encoding="utf-8")
    return [target / name for name in written]


def _time_spent(log: Sequence[dict[str, object]]) -> str:
    if not log:
        return ""
    seconds = sum(float(str(entry["seconds"])) for entry in log)
    computing = sum(float(str(entry["computing"])) for entry in log)
    present = sum(float(str(entry["present"])) for entry in log)
    share = f", overhead of the runner {present / computing - 1:.1%}" if computing else ""
    runs = "1 run" if len(log) == 1 else f"{len(log)} runs"
    return f"{runs}, {seconds:.0f} s, {computing:.0f} s of it by jobs in all workers{share}."


def _pictures(tasks: Sequence[TaskRecords]) -> list[str]:
    drawn = (
        ("Certified accuracy", plots.certified_accuracy(tasks)),
        ("Radii", plots.radius_boxes(tasks)),
        ("Time against radius", plots.time_against_radius(tasks)),
    )
    return [f"<h2>{title}</h2>\n{_image(content, 'svg+xml', title)}" for title, content in drawn if content is not None]


def _galleries(tasks: Sequence[TaskRecords]) -> list[str]:
    """Worst cases to first order for each model: of the last of its tasks that has any, searching ones first."""
    chosen: dict[str, TaskRecords] = {}
    for one in sorted(tasks, key=lambda one: one.searched):
        if plots.pictured(one):
            chosen[one.task.settings["model"]] = one
    parts = []
    for model, one in chosen.items():
        title = f"Worst cases to first order of {sources.short(model)}"
        try:
            content = _image(plots.gallery(one), "png", title)
        except FlowverifyError as error:  # the records may have come from elsewhere, without model and data
            content = f"<p>not drawn: {html.escape(str(error))}</p>"
        caption = f"{html.escape(f'{one.task.name} ({one.distance})')}. {WORST}"
        parts.append(f'<h2>{html.escape(title)}</h2>\n<p class="note">{caption}</p>\n{content}')
    return parts


def _outputs(tasks: Sequence[TaskRecords]) -> list[str]:
    return [
        f"<h2>{html.escape(one.task.name)}</h2>\n<pre>{html.escape(record['output'])}</pre>"
        for one in tasks
        for record in one.records
        if record.get("output")
    ]


def _image(content: bytes, kind: str, title: str) -> str:
    encoded = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/{kind};base64,{encoded}">'
