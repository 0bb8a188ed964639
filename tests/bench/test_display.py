"""What reports show is what holds: axes, curves, medians and claims of tasks that are made up here."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from typing import Any

import pytest

from flowverify import curves
from flowverify.bench import charts
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


PICTURES = (charts.accuracy_curves, charts.radius_boxes, charts.times_against_radii)
RADII = [0.1, 0.2, 0.3, 0.4]


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
        found = picture([searched("a", RADII), searched("b", RADII, **settings), attacked("c", RADII)])
        assert len(found) == 2 and "W1, l1; digits test" in found
        assert [len(drawn) for title, drawn in sorted(found.items(), key=lambda one: -len(one[1]))] == [2, 1]

    @pytest.mark.parametrize("picture", PICTURES)
    def test_other_images_of_the_same_data_share_axes(self, picture: Any) -> None:
        found = picture([searched("a", RADII), searched("b", RADII[:2], data={**DIGITS, "index": ":2"})])
        assert [len(drawn) for drawn in found.values()] == [2]

    def test_curves_of_both_ends_with_their_number_of_images(self) -> None:
        ((lower, upper, attack),) = charts.accuracy_curves(
            [searched("a", [0.1, 0.3], [0.2, 0.4]), attacked("b", RADII)]
        ).values()
        assert lower.label == "a (2 images)" and lower.radii == (0.0, 0.1, 0.3)
        assert upper.label == "a: at most (2 images)" and upper.radii == (0.0, 0.2, 0.4)
        assert attack.label == "b: at most (4 images)"

    def test_decided_radii_of_other_images_are_another_curve(self) -> None:
        tasks = [
            TaskRecords(Task(f"a/radius {radius:g}", "certify", {**searched("", []).task.settings, "radius": radius},
                             positions, 1), [{**PLAIN, "index": k, "radius": radius} for k in positions])
            for radius, positions in ((0.1, (0, 1)), (0.2, (0, 1)), (0.3, (2, 3)))
        ]  # fmt: skip
        (curves,) = charts.accuracy_curves(tasks).values()
        assert [curve.radii for curve in curves] == [(0.1, 0.2), (0.3,)]

    def test_boxes_of_both_ends(self) -> None:
        ((first, second, third),) = charts.radius_boxes(
            [searched("a", [0.1, 0.3], [0.2]), attacked("b", RADII)]
        ).values()
        assert (first.label, first.missing, first.quantiles[2]) == ("a", 0, 0.2)
        assert (second.label, second.missing, second.quantiles[2]) == ("a: at most", 1, 0.2)
        assert (third.label, third.quantiles[2]) == ("b: at most", 0.25)

    def test_times_are_those_of_images_timed_one_by_one(self) -> None:
        alone = searched("a", RADII)
        shared = TaskRecords(replace(searched("b", RADII).task, chunk=2), searched("b", RADII).records)
        assert charts.measured_alone(alone) and not charts.measured_alone(shared)
        several = [{**record, "seconds": 0.1 + k} for k, record in enumerate(shared.records)]
        nothing = {"verdict": "misclassified", "seconds": 0.0}  # of no time to speak of
        several[2:] = [{**record, **nothing} for record in several[2:]]
        assert charts.measured_alone(TaskRecords(shared.task, several))
        ((cloud,),) = charts.times_against_radii([alone, shared]).values()
        assert cloud.label == "a" and list(cloud.points) == [(radius, 0.1) for radius in RADII]


class TestCharts:
    """What is drawn lies where its numbers say."""

    def test_round_numbers(self) -> None:
        assert charts.steps(0.1133) == pytest.approx([0, 0.02, 0.04, 0.06, 0.08, 0.1])
        assert charts.steps(7) == [0, 2, 4, 6] and charts.steps(0) == [0]

    def test_steps_of_a_curve(self) -> None:
        (curves,) = charts.accuracy_curves([searched("a", [0.5, 1.0])]).values()
        chart, (read,) = charts.accuracy_chart("W1, l1; digits test", curves, 0)
        plane = charts.Plane(1.02, (0.0, 1.0))
        tree = ElementTree.fromstring(chart)
        (line,) = [one.get("d") for one in tree.iter("path") if "line" in str(one.get("class"))]
        points = [tuple(map(float, point.split())) for point in str(line)[1:].split("L")]
        corners = [(0, 1), (0.5, 1), (0.5, 0.5), (1, 0.5), (1, 0)]
        assert points == [pytest.approx((plane.x(x), plane.y(y))) for x, y in corners]
        assert read["radii"] == [0.0, 0.5, 1.0] and list(read["counts"]) == [2, 1, 0] and not read["open"]
        assert "radius (pixels; W1, l1)" in "".join(tree.itertext())

    def test_what_is_never_refuted_goes_on_to_the_end(self) -> None:
        (curves,) = charts.accuracy_curves([searched("a", [0.1, 0.2], [0.4])]).values()
        chart, (_, upper) = charts.accuracy_chart("W1, l1; digits test", curves, 0)
        assert upper["open"]
        line = [one.get("d") for one in ElementTree.fromstring(chart).iter("path") if "line" in str(one.get("class"))][
            1
        ]
        last = str(line).split("L")[-1].split()
        assert float(last[0]) == pytest.approx(charts.WIDTH - charts.RIGHT, abs=0.02)
        assert float(last[1]) == pytest.approx(charts.Plane(1, (0.0, 1.0)).y(0.5))

    def test_no_two_of_forty_lines_look_the_same(self) -> None:
        assert len({charts.look(number) for number in range(48)}) == 48

    def test_times_are_points_with_their_numbers(self) -> None:
        ((cloud,),) = charts.times_against_radii([searched("a <b>", RADII)]).values()
        tree = ElementTree.fromstring(charts.time_chart("W1, l1; digits test", [cloud]))
        assert [one.text for one in tree.iter("title")] == [f"a <b>: radius {radius:.4g}, 0.1 s" for radius in RADII]


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
