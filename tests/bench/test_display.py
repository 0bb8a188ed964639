"""What reports show is what holds: axes, curves, medians and claims of tasks that are made up here."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from flowverify import curves
from flowverify.bench import plots
from flowverify.bench import report as tables
from flowverify.bench.kinds import Certify, CertifyRun
from flowverify.bench.report import to_latex
from flowverify.bench.sources import Data
from flowverify.bench.statistics import Comparison, TaskRecords, evidence
from flowverify.bench.tasks import Defaults, Task
from flowverify.certifiers.base import CLOSED

DIGITS = {"name": "digits", "split": "test", "index": ":4", "folder": None}
PLAIN = {"verdict": "certified", "seconds": 0.1}


def searched(
    name: str, radii: list[float], uppers: list[float] | None = None, kind: str = "certify", **settings: Any
) -> TaskRecords:
    """A task that searched the radii of as many images."""
    own = {"radius": None, "ground": "l1", "cap": None, "data": DIGITS, "model": "digits-fc3", **settings}
    records: list[dict[str, Any]] = [{**PLAIN, "index": k, "radius": radius} for k, radius in enumerate(radii)]
    for record, upper in zip(records, uppers or [], strict=False):
        record["upper_radius"] = upper
    return TaskRecords(Task(name, kind, own, tuple(range(len(radii))), 1), records)


def attacked(name: str, uppers: list[float], **settings: Any) -> TaskRecords:
    one = searched(name, uppers, uppers, "attack", **settings)
    return TaskRecords(one.task, [{**record, "radius": None, "verdict": "falsified"} for record in one.records])


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pictures as figures, not as SVG."""
    monkeypatch.setattr(plots, "_svg", lambda figure: figure)


PICTURES = (plots.certified_accuracy, plots.radius_boxes, plots.time_against_radius)
RADII = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.usefixtures("figure")
class TestPictures:
    @pytest.mark.parametrize("picture", PICTURES)
    @pytest.mark.parametrize(
        "settings",
        [
            {"ground": "l2"},
            {"ground": "l1^2"},
            {"cap": 1.0},
            {"data": {**DIGITS, "name": "mnist"}},
            {"data": {**DIGITS, "split": "train"}},
        ],
    )
    def test_other_threats_and_data_have_other_axes(self, picture: Any, settings: dict[str, Any]) -> None:
        figure: Any = picture([searched("a", RADII), searched("b", RADII, **settings), attacked("c", RADII)])
        first, second = figure.axes
        assert first.get_title() == "W1, l1; digits test" and second.get_title() != first.get_title()
        assert "radius (pixels; W1, l1)" in first.get_xlabel()
        assert [len(axes.get_legend_handles_labels()[1]) for axes in figure.axes] in ([2, 1], [0, 0])

    @pytest.mark.parametrize("picture", PICTURES)
    def test_other_images_of_the_same_data_share_axes(self, picture: Any) -> None:
        figure: Any = picture([searched("a", RADII), searched("b", RADII[:2], data={**DIGITS, "index": ":2"})])
        assert len(figure.axes) == 1

    @pytest.mark.parametrize("picture", [plots.certified_accuracy, plots.time_against_radius])
    def test_no_two_of_forty_curves_look_the_same(self, picture: Any) -> None:
        tasks = [searched(f"task {k}", RADII) for k in range(30)] + [attacked(f"attack {k}", RADII) for k in range(10)]
        (axes,) = (figure := picture(tasks)).axes
        looks = {(line.get_color(), str(line._unscaled_dash_pattern), line.get_marker()) for line in axes.get_lines()}
        assert len(axes.get_lines()) == len(looks) == 40
        assert len(figure.findobj(lambda artist: type(artist).__name__ == "Legend")[0].get_texts()) == 40

    def test_curves_of_both_ends_with_their_number_of_images(self) -> None:
        figure: Any = plots.certified_accuracy([searched("a", [0.1, 0.3], [0.2, 0.4]), attacked("b", RADII)])
        lower, upper, attack = figure.axes[0].get_lines()
        assert lower.get_label() == "a (2 images)" and list(lower.get_xdata()) == [0.0, 0.1, 0.3]
        assert upper.get_label() == "a: at most (2 images)" and list(upper.get_xdata()) == [0.0, 0.2, 0.4]
        assert attack.get_label() == "b: at most (4 images)"

    def test_decided_radii_of_other_images_are_another_curve(self) -> None:
        tasks = [
            TaskRecords(Task(f"a/radius {radius:g}", "certify", {**searched("", []).task.settings, "radius": radius},
                             positions, 1), [{**PLAIN, "index": k, "radius": radius} for k in positions])
            for radius, positions in ((0.1, (0, 1)), (0.2, (0, 1)), (0.3, (2, 3)))
        ]  # fmt: skip
        figure: Any = plots.certified_accuracy(tasks)
        assert [list(line.get_xdata()) for line in figure.axes[0].get_lines()] == [[0.1, 0.2], [0.3]]

    def test_boxes_of_both_ends(self) -> None:
        figure: Any = plots.radius_boxes([searched("a", [0.1, 0.3], [0.2]), attacked("b", RADII)])
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == ["b: at most", "a: at most\n(none for 1)", "a"]


def test_styles_do_not_repeat() -> None:
    styles = [curves.style(number) for number in range(60)]
    for first, second in itertools.combinations(styles, 2):
        assert first[:2] != second[:2] and first[::2] != second[::2]


def row(table: tables.Table, number: int = 0) -> dict[str, str]:
    return dict(zip(table.columns, table.rows[number], strict=True))


class TestTables:
    def test_both_medians_and_how_many_brackets_are_closed(self) -> None:
        one = searched("a", [0.1, 0.2, 0.3], [0.1005, 0.3, 0.5], ground="l2")
        found = row(tables.summary([one]))
        assert (found["median certified radius"], found["median at most"], found[CLOSED]) == ("0.2", "0.3", "1 of 3")
        assert found["distance"] == "W1, l2" and "exact" not in " ".join(found)
        words = one.median_text()
        assert words.startswith("median radius 0.2000 pixels certified, 0.3000 at most (W1, l2;")
        assert words.endswith("closed to 1%: 1 of 3")

    def test_missing_upper_ends_are_infinite(self) -> None:
        found = row(tables.summary([searched("a", [0.1, 0.2, 0.3], [0.1005])]))
        assert (found["median at most"], found[CLOSED]) == ("inf", "1 of 3")

    def test_radii_of_attacks_are_not_certified(self) -> None:
        table = tables.summary([searched("a", [0.1]), attacked("b", [0.2])])
        assert (row(table)["median certified radius"], row(table)["median at most"]) == ("0.1", "")
        assert (row(table, 1)["median certified radius"], row(table, 1)["median at most"]) == ("", "0.2")
        assert "0.2000 at most" in attacked("b", [0.2]).median_text()

    def test_without_upper_ends_there_are_no_columns_for_them(self) -> None:
        table = tables.summary([searched("a", [0.1], ground="l2^2", cap=1.0)])
        assert "median at most" not in table.columns and CLOSED not in table.columns
        assert row(table)["distance"] == "W2, l2^2, cap 1"

    def test_csv_and_latex_have_them_too(self) -> None:
        table = tables.summary([searched("a", [0.1, 0.2, 0.3], [0.1005, 0.3, 0.5])])
        for text in (table.to_csv(), to_latex([table]).replace(r"\%", "%")):
            assert "median at most" in text and "closed to 1%" in text and "1 of 3" in text and "W1, l1" in text


class TestClaims:
    TASKS = {  # noqa: RUF012
        one.task.name: one
        for one in (
            searched("complete", [0.1, 0.2, 0.3], [0.1005, 0.3, 0.5]),
            searched("crown", [0.1, 0.1]),
            searched("other", [0.1, 0.1], ground="l2"),
            attacked("attack", [0.2, 0.4]),
        )
    }

    @pytest.mark.parametrize(
        ("measure", "of", "over", "expected"),
        [
            ("median ratio of radii", "complete", "crown", "certified, 0.3000 at most (W1, l1; over images classified "
             "right), closed to 1%: 1 of 3 over certified (W1, l1); 2 images"),
            ("median radius over number", "complete", 0.1, "closed to 1%: 1 of 3"),
            ("ratio of median radii", "crown", "other", "certified (W1, l1) over certified (W1, l2)"),
            ("ratio of mean radii", "attack", "crown", "of attacks (W1, l1) over certified (W1, l1); 2 images"),
            ("share of radii not below", "crown", "crown", "certified (W1, l1); 2 images"),
        ],
    )  # fmt: skip
    def test_what_a_number_is_about(self, measure: str, of: str, over: Any, expected: str) -> None:
        comparison = Comparison("claim", "source", "1", measure, of, over)
        assert evidence(comparison, self.TASKS).endswith(expected)
        (found,) = tables.claims([comparison], list(self.TASKS.values())).rows
        assert found[-1].endswith(expected)

    def test_measures_without_radii_say_nothing(self) -> None:
        assert evidence(Comparison("claim", "source", "1", "seconds an image", "crown"), self.TASKS) == ""


@pytest.mark.parametrize(
    ("run", "names"),
    [
        ({"methods": "complete"}, ["complete/branch-and-bound"]),
        ({"methods": "vanilla-complete"}, ["vanilla-complete/branch-and-bound"]),
        ({"methods": "milp"}, ["milp/highs"]),
        ({"methods": ["linear", "linear-lp"]}, ["linear/exact", "linear-lp/exact"]),
        ({"methods": ["linear", "linear-lp"], "grounds": "l2"}, ["linear/exact", "linear-lp/lower-bound"]),
        ({"methods": "linear", "cap": 1.0}, ["linear/lower-bound"]),
    ],
)  # fmt: skip
def test_no_task_is_named_exact_whose_certificates_may_not_be(run: dict[str, Any], names: list[str]) -> None:
    defaults = Defaults(["mnist-linear"], Data(name="digits", index="0:2"), 2, ".")
    tasks = Certify().expand(CertifyRun(**run), defaults)
    assert ["/".join(task.name.split("/")[2:4]) for task in tasks] == names
