"""Curves of certified accuracy: shares at every radius, their bands, their names, and axes of one threat."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import flowverify as fv
from flowverify.attack.base import AttackResult
from flowverify.curves import Curve, Run, alike, curves_of, draw_curves, grouped, plot_curve, steps_of
from flowverify.errors import DataError, DependencyError, InvalidInputError
from flowverify.results import Certificate, Verdict

CERTIFIED, FALSIFIED, MISCLASSIFIED = Verdict.CERTIFIED, Verdict.FALSIFIED, Verdict.MISCLASSIFIED
ONE = Certificate(CERTIFIED, 1, 1, "fine-tuned", "best", "l1", 0.1, 0.5, 0.1)


def records(radii: list[float | None], **more: Any) -> list[dict[str, Any]]:
    """As --save writes them; None is an image that is misclassified."""
    plain = {"model": "net.onnx", "dataset": "mnist", "split": "test", "target": None, "asked": None, **more}
    return [
        {**replace(ONE, radius=radius or 0.0, verdict=MISCLASSIFIED if radius is None else CERTIFIED).to_json(),
         "index": index, **plain}
        for index, radius in enumerate(radii)
    ]  # fmt: skip


def attacked(radii: list[float | None], **more: Any) -> list[dict[str, Any]]:
    """None is an image for which nothing was found."""
    plain = {"attack": "minimal", "ground": "l1", "cap": None, "model": "net.onnx", "asked": None}
    outcomes = ["not found" if radius is None else "found" for radius in radii]
    verdicts = ["unknown" if radius is None else "falsified" for radius in radii]
    return [
        {**plain, "index": index, "radius": radius, "outcome": outcome, "verdict": verdict, "dataset": "mnist",
         "split": "test", **more}
        for index, (radius, outcome, verdict) in enumerate(zip(radii, outcomes, verdicts, strict=True))
    ]  # fmt: skip


def curves(*given: list[dict[str, Any]]) -> list[Curve]:
    ((_, runs),) = grouped([one for part in given for one in part]).items()
    return curves_of(runs)


class TestShares:
    def test_of_a_search(self) -> None:
        (curve,) = curves(records([0.3, None, 0.1, 0.0]))
        assert curve.radii == (0.0, 0.0, 0.1, 0.3) and curve.shares.tolist() == [0.75, 0.5, 0.25, 0.0]
        for radius, share in ((0.05, 0.5), (0.2, 0.25), (0.4, 0.0)):
            at = int(np.searchsorted(curve.radii, radius, side="right")) - 1
            assert curve.shares[at] == share

    def test_of_attacks_and_brackets_from_above(self) -> None:
        (attack,) = curves(attacked([0.2, None]))
        assert attack.at_most and attack.radii == (0.0, 0.2) and attack.shares.tolist() == [1.0, 0.5]
        lower, upper = curves([{**one, "upper_radius": 0.4} for one in records([0.3, None])])
        assert (lower.at_most, upper.at_most) == (False, True)
        assert upper.radii == (0.0, 0.4) and upper.shares.tolist() == [0.5, 0.0]

    def test_of_radii_that_were_asked_about(self) -> None:
        one, two = records([0.1, 0.1, 0.1], asked=0.1), records([0.2, 0.2, 0.2], asked=0.2)
        two[0]["verdict"], two[1]["verdict"] = "unknown", "falsified"
        lower, upper = curves(two, one)
        assert lower.radii == (0.1, 0.2) and lower.counts == (3, 1) and not lower.steps
        assert upper.at_most and upper.counts == (3, 2)
        (attack,) = curves(attacked([0.05, None], asked=0.1))
        assert attack.at_most and attack.radii == (0.1,) and attack.counts == (1,)

    def test_errors_and_timeouts_count_as_not_certified(self) -> None:
        failed = [{**one, "verdict": verdict} for one, verdict in zip(records([0.2, 0.2]), ("error", "timeout"))]  # noqa: B905
        (curve,) = curves(failed)
        assert curve.counts == (2, 1, 0) and curve.radii == (0.0, 0.0, 0.0)

    def test_the_last_record_of_an_image_counts(self) -> None:
        (curve,) = curves(records([0.1, 0.2]), records([0.3]))
        assert curve.images == 2 and curve.radii == (0.0, 0.2, 0.3)


class TestBands:
    @pytest.mark.parametrize("confidence", [0.5, 0.95])
    def test_are_clopper_and_pearsons(self, confidence: float) -> None:
        low, high = Curve("", (0.0, 1.0, 2.0), (20, 7, 0), 20).band(confidence)
        tail = (1 - confidence) / 2
        assert scipy.stats.binom.sf(7 - 1, 20, low[1]) == pytest.approx(tail)
        assert scipy.stats.binom.cdf(7, 20, high[1]) == pytest.approx(tail)
        assert low[0] == pytest.approx(tail ** (1 / 20)) and high[0] == 1
        assert low[2] == 0 and high[2] == pytest.approx(1 - tail ** (1 / 20))

    def test_hold_the_share_as_often_as_they_say(self) -> None:
        counts = scipy.stats.binom.rvs(30, 0.8, size=2000, random_state=np.random.default_rng(0))
        low, high = Curve("", tuple(map(float, range(2000))), tuple(counts.tolist()), 30).band()
        assert 0.95 <= np.mean((low <= 0.8) & (high >= 0.8)) < 1


class TestNames:
    def labels(self, *given: list[dict[str, Any]]) -> list[str]:
        return [curve.label for curve in curves(*given)]

    def test_say_what_tells_curves_apart_and_of_how_many_images(self) -> None:
        options = {"options": {"timeout": 5.0}}
        assert self.labels(records([0.1, 0.2]), records([0.1], **options), attacked([0.3])) == [
            "net.onnx, fine-tuned, best (2 images)",
            "net.onnx, fine-tuned, best, timeout 5.0 (1 image)",
            "net.onnx, attack minimal: at most (1 image)",
        ]
        assert self.labels(records([0.1]), records([0.1], sha256="0123456789"))[1].endswith("file 01234567 (1 image)")
        assert self.labels(records([0.1], model="folder/net.onnx")) == ["net.onnx, fine-tuned, best (1 image)"]

    def test_of_radii_that_were_asked_about(self) -> None:
        assert self.labels(records([0.1], asked=0.1), records([0.2], asked=0.2)) == [
            "net.onnx, fine-tuned, best, decided (1 image)"
        ]


class TestAxes:
    @pytest.mark.parametrize(
        "more", [{"ground": "l2"}, {"cap": 1.0}, {"dataset": "digits"}, {"split": "train"}, {"target": 3}]
    )
    def test_other_threats_and_data_have_titles_of_their_own(self, more: dict[str, Any]) -> None:
        first, second = grouped([*records([0.1]), *records([0.1], **more)])
        assert first == "W1, l1; mnist test" and second != first

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"index": 0, "verdict": "certified"}, "record of index, verdict: expected one of a certificate"),
            ({}, "record of nothing"),
            (3, "record of int"),
            ({"verdict": "sat", "ground": "l1", "radius": 0.1}, "verdict 'sat': expected one of certified"),
            ({"verdict": "certified", "ground": "l9", "radius": 0.1}, "unknown ground cost 'l9'"),
            ({"verdict": "certified", "ground": "l1", "radius": "far"}, "far"),
            ({"verdict": "certified", "ground": "l1", "radius": -1}, "radius -1"),
            ({"verdict": "certified", "ground": "l1", "radius": 1, "cap": 0}, "cap: given 0"),
        ],
    )
    def test_what_is_no_record_is_refused(self, record: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            grouped([record])


@pytest.fixture
def axes() -> Any:
    from matplotlib.figure import Figure

    return Figure().subplots()


class TestDrawing:
    def test_sixty_curves_differ(self, axes: Any) -> None:
        draw_curves(axes, [steps_of(str(k), [0.1], 1) for k in range(60)])
        looks = {(line.get_color(), str(line._unscaled_dash_pattern)) for line in axes.get_lines()}
        assert len(looks) == 60 and len(axes.collections) == 60

    def test_what_nothing_is_known_against_goes_on_to_the_end(self, axes: Any) -> None:
        draw_curves(axes, [steps_of("a", [0.5], 1), steps_of("b", [0.1, float("inf")], 2, at_most=True)])
        assert list(axes.get_lines()[1].get_xdata()) == [0.0, 0.1, 0.5]

    def test_curves_of_one_name_look_alike_on_all_axes_and_on_none_like_another(self, axes: Any) -> None:
        a, b, c = (steps_of(name, [0.1], 1) for name in "abc")
        found = alike({"first": [a, b, b], "second": [c, b, a]})
        assert [one.number for one in found["first"]] == [0, 1, 2]
        assert [one.number for one in found["second"]] == [3, 1, 0]
        draw_curves(axes, found["second"])
        assert [line.get_color() for line in axes.get_lines()] == ["C3", "C1", "C0"]

    def test_bands_are_left_out_on_demand(self, axes: Any) -> None:
        draw_curves(axes, [steps_of("a", [0.5], 1)], None)
        assert not axes.collections and "bands" not in axes.get_ylabel()


class TestPlotCurve:
    def test_certificates_of_the_library(self, axes: Any) -> None:
        data, model = fv.load_dataset("digits"), fv.load_model("digits-fc3")
        found = fv.make_certifier(model, bound="ibp").search(data.images[:5], data.labels[:5])
        attack = fv.find_adversarial(model, data.images[:5], data.labels[:5])
        assert isinstance(attack, AttackResult)
        assert fv.plot_curve({"proven": found, "attack": attack}, axes) is axes
        proven, above = axes.get_lines()
        assert (proven.get_label(), above.get_label()) == ("proven (5 images)", "attack: at most (5 images)")
        assert proven.get_xdata()[1:].tolist() == sorted(one.radius for one in found)
        assert above.get_xdata()[1:].tolist() == pytest.approx(sorted(attack.radius.tolist()))
        assert axes.get_xlabel() == "radius (pixels; W1, l1)" and axes.get_title() == "W1, l1"
        assert "bands: 95%, Clopper-Pearson" in axes.get_ylabel() and axes.get_legend() is not None

    def test_axes_of_pyplot_where_none_are_given(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        drawn = plot_curve([ONE], label="mine")
        assert drawn.get_lines()[0].get_label() == "mine (1 image)"
        pyplot.close(drawn.figure)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("given", "options", "message"),
        [
            ([], {}, "records: given none"),
            ([ONE, replace(ONE, ground="l2")], {}, "records of W1, l1 and of W1, l2: expected one of these"),
            ({"a": [ONE], "b": [replace(ONE, cap=1.0)]}, {}, "W1, l1, cap 1: expected one of these"),
            ([ONE], {"confidence": 1.0}, "confidence 1.0: expected a number between 0 and 1"),
        ],
    )
    def test_what_is_refused(self, given: Any, options: dict[str, Any], message: str, axes: Any) -> None:
        with pytest.raises(InvalidInputError, match=message):
            plot_curve(given, axes, **options)

    def test_without_matplotlib(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(DependencyError, match=r"pip install 'flowverify\[plot\]'"):
            plot_curve([ONE])


def test_runs_over_no_image_have_no_curve() -> None:
    assert curves_of([Run("a", [], None, False)]) == []
    assert torch.isfinite(torch.tensor(curves_of([Run("a", records([0.1]), None, False)])[0].radii)).all()
