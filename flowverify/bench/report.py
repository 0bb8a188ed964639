"""A folder of results as one HTML page that needs nothing else, as CSV, and as LaTeX tables."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from flowverify.bench import plots, sources, tables
from flowverify.bench.statistics import TaskRecords, by_task
from flowverify.bench.store import read_folder
from flowverify.errors import DataError, FlowverifyError, InvalidInputError
from flowverify.figures import require_matplotlib

_LOADER = PackageLoader("flowverify.bench")
_HTML = Environment(loader=_LOADER, autoescape=True, trim_blocks=True)
_LATEX_LETTERS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip
_LATEX = Environment(
    loader=_LOADER,
    undefined=StrictUndefined,
    variable_start_string="<<",
    variable_end_string=">>",
    block_start_string="<%",
    block_end_string="%>",
    trim_blocks=True,
    keep_trailing_newline=True,
    finalize=lambda text: "".join(_LATEX_LETTERS.get(letter, letter) for letter in text),
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
    drawn = (
        ("Certified accuracy", plots.certified_accuracy(tasks)),
        ("Radii", plots.radius_boxes(tasks)),
        ("Time against radius", plots.time_against_radius(tasks)),
    )
    page = _HTML.get_template("report.html.jinja").render(
        suite=suite,
        records=records,
        log=log,
        tables=listed,
        pictures=[(title, _inline(content, "svg+xml")) for title, content in drawn if content is not None],
        galleries=_galleries(tasks),
        tasks=tasks,
        machines=tables.environments(records),
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
        "tables.tex": to_latex(listed),
    }
    for name, content in written.items():
        (target / name).write_text(content, encoding="utf-8")
    return [target / name for name in written]


def to_latex(listed: Sequence[tables.Table]) -> str:
    """Tables in the manner of booktabs, with every letter that LaTeX reads as its own escaped."""
    return _LATEX.get_template("tables.tex.jinja").render(tables=listed)


def _galleries(tasks: Sequence[TaskRecords]) -> Iterator[tuple[str, str, str, str]]:
    """Worst cases to first order for each model: of the last of its tasks that has any, searching ones first.

    Yields a title, what it shows, and the picture or the reason why there is none.
    """
    chosen: dict[str, TaskRecords] = {}
    for one in sorted(tasks, key=lambda one: one.searched):
        if plots.pictured(one):
            chosen[one.task.settings["model"]] = one
    for model, one in chosen.items():
        source = failure = ""
        try:
            source = _inline(plots.gallery(one), "png")
        except FlowverifyError as error:  # the records may have come from elsewhere, without model and data
            failure = str(error)
        title = f"Worst cases to first order of {sources.short(model)}"
        yield title, f"{one.task.name} ({one.distance})", source, failure


def _inline(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
