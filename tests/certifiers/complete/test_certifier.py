"""The search as a whole: brackets, budgets, verdicts, witnesses, soundness on sampled points, Table 1."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from contracts import descend, margins_at, quick, random_network, samples, sparse_images
from test_certify_contract import images_of, network_of
from torch import Tensor, nn
from typer.testing import CliRunner

import flowverify as fv
from flowverify.api import make_certifier
from flowverify.attack import make_attack
from flowverify.ball import Threat
from flowverify.certifiers.complete import certifier as certifier_module
from flowverify.certifiers.complete import neuron_bounds as neuron_bounds_module
from flowverify.certifiers.complete import radius_search as search_module
from flowverify.certifiers.complete import tree as tree_module
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.complete.milp import MilpCertifier
from flowverify.certifiers.options import CompleteOptions, ScheduleSettings, SearchSettings
from flowverify.certifiers.references import ReferenceCompleteCertifier
from flowverify.cli import app
from flowverify.deadline import Deadline
from flowverify.errors import InvalidInputError, UnknownNameError, UnsupportedOperationError
from flowverify.results import Interrupted, Verdict

DIGITS = 3


def digits() -> tuple[fv.Network, Tensor, Tensor]:
    data = fv.load_dataset("digits")[0:DIGITS]
    return fv.load_model("digits-fc3"), data.images, data.labels


def least_margins(network: fv.Network, images: Tensor, labels: Tensor, radius: Tensor) -> Tensor:
    """The least margins at many points of the balls of these radii, (B,)."""
    budget = radius * images.flatten(1).double().sum(1)
    double = network.double()
    points = torch.cat([samples(images, budget, 300), descend(double, images, labels, budget, 6)], 1)
    return margins_at(double, points, labels).amin((1, 2)).detach()


class TestBracket:
    def test_closes_around_the_radius_with_a_witness(self) -> None:
        network, images, labels = digits()
        images, labels = images[:2], labels[:2]
        certifier = CompleteCertifier(network)
        attacked = make_attack("minimal", network).minimise(images, labels).radius
        crown = fv.search_radius(fv.Certifier(network), images, labels)
        for index, found in enumerate(certifier.search(images, labels)):
            assert found.verdict == "certified"
            assert found.upper_radius is not None and found.witness is not None
            assert found.radius < found.upper_radius <= found.radius * 1.0101
            assert found.radius <= float(attacked[index])
            assert crown[index].radius <= found.upper_radius
            assert found.radius >= crown[index].radius * 0.999
            witness = found.witness[None]
            assert int(network(witness.to(network.dtype)).argmax()) != int(labels[index])
            ball = fv.WassersteinBall(found.upper_radius)
            assert bool(ball.contains(images[index : index + 1].double(), witness, 1e-9))
            record = found.to_json()
            assert record["upper_radius"] == found.upper_radius
            assert record["method"] == "complete"

    def test_decides_on_both_sides_of_it(self) -> None:
        network, images, labels = digits()
        certifier = CompleteCertifier(network)
        found = certifier.search(images[:1], labels[:1])[0]
        assert found.upper_radius is not None
        inside, outside = (
            certifier.certify(images[:1], labels[:1], fv.WassersteinBall(radius))[0]
            for radius in (found.radius, found.upper_radius * 1.001)
        )
        assert inside.verdict == "certified" and inside.margin is not None and inside.margin > 0
        assert outside.verdict == "falsified" and outside.witness is not None
        assert outside.upper_radius is not None and outside.upper_radius <= found.upper_radius * 1.001

    def test_goes_on_with_a_larger_budget(self) -> None:
        network, images, labels = digits()
        search = CompleteCertifier(network, options=CompleteOptions(tolerance=1e-4)).start(images[2], int(labels[2]))
        gaps = []
        for nodes in (1, 4, 100_000):
            search.run(Deadline(nodes=nodes))
            gaps.append(search.upper / search.proven)
        assert not gaps[0] <= 1.0001
        assert gaps[0] >= gaps[1] >= gaps[2]
        assert search.finished
        assert gaps[2] <= 1.0001

    def test_a_tree_that_is_late_goes_on_at_a_smaller_radius(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, images, labels = digits()
        trials: list[tuple[float, float]] = []
        real = search_module.RadiusSearch._shrink

        def shrink(self, tree, budget):  # type: ignore[no-untyped-def]
            trials.append((self._trial, budget))
            real(self, tree, budget)

        monkeypatch.setattr(search_module.RadiusSearch, "_shrink", shrink)
        options = CompleteOptions(timeout=600, clock=count(step=1e-3).__next__)  # a millisecond whenever it is asked
        patient = CompleteCertifier(network, options=options).search(images[:1], labels[:1])[0]
        before = len(trials)
        schedule = ScheduleSettings(late=(1e-9, 1e-9, 1e-9), easy_nodes=1)
        options = replace(options, settings=SearchSettings(schedule=schedule))
        hasty = CompleteCertifier(network, options=options).search(images[:1], labels[:1])[0]
        assert len(trials) > before, "no tree went on at a smaller radius"
        assert all(new < old for old, new in trials)
        assert hasty.upper_radius is not None and hasty.radius < hasty.upper_radius <= hasty.radius * 1.0101
        assert hasty.radius == pytest.approx(patient.radius, rel=0.01)

    def test_out_of_budget_keeps_what_is_known(self) -> None:
        network, images, labels = digits()
        few = CompleteOptions(nodes=1, tolerance=1e-5)
        found = CompleteCertifier(network, options=few).search(images[:1], labels[:1])[0]
        assert found.verdict == "certified" and "out of budget" in found.note
        assert found.upper_radius is not None and 0 < found.radius < found.upper_radius
        tried = CompleteCertifier(network, options=few).certify(
            images[:1], labels[:1], fv.WassersteinBall(found.upper_radius * 0.99999)
        )[0]
        assert tried.verdict == "timeout"

    @pytest.mark.parametrize("slow", ["ask", "over"])
    def test_a_decision_begins_nothing_when_its_time_is_over(self, slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The adversary, or the bounds at the root, take longer than there is."""
        now, begun = [0.0], list[str]()

        def watch(owner: type, name: str) -> None:
            real = getattr(owner, name)

            def watched(self, *given, **options):  # type: ignore[no-untyped-def]
                begun.append(name)
                now[0] += 10.0 if name == slow else 0.0
                return real(self, *given, **options)

            monkeypatch.setattr(owner, name, watched)

        watch(NearestCounterexample, "ask")
        watch(neuron_bounds_module.Roots, "over")
        monkeypatch.setattr(neuron_bounds_module, "_crown", lambda *_: begun.append("crown"))
        network, images, labels = digits()
        options = CompleteOptions(timeout=5.0, clock=lambda: now[0], adversary=make_attack("minimal", network))
        (found,) = CompleteCertifier(network, options=options).certify(
            images[:1], labels[:1], fv.WassersteinBall(0.0525)
        )
        assert found.verdict == "timeout" and found.seconds == 10.0
        assert begun == ["ask", "over"][: 1 if slow == "ask" else 2]

    def test_every_tree_of_a_failing_search_stays_sound(self) -> None:
        # Deep trees: near the true radius, with few nodes in a batch.
        network, images, labels = digits()
        found = CompleteCertifier(network, options=CompleteOptions(tolerance=1e-5)).search(images[:1], labels[:1])
        for one in found:
            assert one.upper_radius is not None
            assert one.upper_radius / one.radius <= 1.00001 or "not closed" in one.note


@pytest.mark.parametrize(
    ("ground", "cap"),
    quick([("l2", None), ("l1", 1.0), ("local:3", None), ("l2^2", None)], 1),
)
def test_counterexamples_of_the_covering_ball_count_where_they_lie_in_the_ball(ground: str, cap: float | None) -> None:
    """vanilla-complete searches an l1 ball of flows around the ball."""
    shown = 0
    for seed in range(12):
        network = random_network((1, 3, 4), [nn.Flatten(), nn.Linear(12, 3), nn.ReLU(), nn.Linear(3, 2)], seed)
        images = sparse_images((1, 3, 4), 1, seed, 1.0)
        labels = network(images).argmax(1)
        certifier = CompleteCertifier(network, "vanilla-complete", options=CompleteOptions(nodes=200, timeout=None))
        found = certifier.search(images, labels, Threat(ground, cap))[0]
        for one in (
            found,
            certifier.certify(images, labels, fv.WassersteinBall(4 * found.radius + 0.1, ground, cap))[0],
        ):
            assert (one.witness is None) == (one.upper_radius is None)
            if one.witness is None:
                assert one.verdict != "falsified"
                continue
            shown += 1
            assert bool(
                fv.WassersteinBall(one.upper_radius or 0.0, ground, cap).contains(images, one.witness[None], 1e-9)
            )
            if one.verdict == "falsified":
                assert one.upper_radius is not None and one.upper_radius <= one.radius
    assert shown


@pytest.mark.parametrize("method", ["complete", "vanilla-complete"])
def test_a_single_pixel_is_certified_by_its_margin(method: str) -> None:
    """No image lies around it; with terms of 2^50 that cancel, its own class is a matter of rounding."""
    image, label = torch.full((1, 1, 1, 1), 0.75, dtype=torch.float64), torch.tensor([0])
    for bias, verdict in ((1.0, "certified"), (2.0**-40, "unknown")):
        network = fv.Network.sequential((1, 1, 1), [nn.Flatten(), nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)]).double()
        for value, name in (([[2.0**50], [2.0**50]], "weight"), ([0.0, 0.0], "bias")):
            network.nodes[1].operation.get_parameter(name).copy_(torch.tensor(value))
        size = 2.0**50 if bias < 1 else 2.0**-50
        network.nodes[3].operation.get_parameter("weight").copy_(torch.tensor([[size, -size], [0.0, 0.0]]))
        network.nodes[3].operation.get_parameter("bias").copy_(torch.tensor([bias, 0.0]))
        assert CompleteCertifier(network, method).search(image, label)[0].verdict == verdict


VARIANTS = [
    ("complete", "l1", ("linear", "mlp", "cnn", "colour", "normalised", "logits after relu", "residual")),
    ("complete", "l2", ("mlp", "cnn", "residual")),
    ("vanilla-complete", "l1", ("mlp", "cnn", "residual")),
]


@pytest.mark.parametrize(
    ("method", "ground", "kind"),
    [row for method, ground, kinds in VARIANTS for row in quick([(method, ground, kind) for kind in kinds], 2)],
)
def test_no_point_of_a_certified_ball_is_misclassified(method: str, ground: str, kind: str) -> None:
    network, (images, labels) = network_of(kind), images_of(kind)
    images, labels = images[:1], labels[:1]
    options = CompleteOptions(nodes=30, timeout=None)
    found = CompleteCertifier(network, method, options=options).search(images, labels, Threat(ground))[0]
    assert found.radius > 0
    # An l1 ball of the same number lies in the l2 ball.
    least = least_margins(network, images, labels, torch.tensor([found.radius], dtype=torch.float64))
    assert float(least) > 0
    if found.upper_radius is not None:
        assert found.radius <= found.upper_radius
    if found.witness is not None:
        ball = fv.WassersteinBall(found.upper_radius or 0.0, ground)
        assert bool(ball.contains(images, found.witness[None], 1e-9))
        assert float(margins_at(network, found.witness[None, None], labels).min()) < 0


def test_a_counterexample_overrules_a_proof() -> None:
    network, images, labels = digits()
    certifier = CompleteCertifier(network)
    search = certifier.start(images[0], int(labels[0]))
    search.run(Deadline(nodes=0))
    search.nearest.descend()
    assert math.isfinite(search.upper)
    search.proven = search.upper * 1.001
    verdict, radius, _, note = certifier_module._found(search)
    assert (verdict, radius) == (Verdict.UNKNOWN, 0.0)
    assert "a counterexample within the radius" in note


def test_with_a_cap() -> None:
    network, (images, labels) = network_of("mlp"), images_of("mlp")
    options = CompleteOptions(nodes=8, timeout=None)
    capped = CompleteCertifier(network, options=options).search(images[:1], labels[:1], Threat(cap=1.01))[0]
    assert capped.radius > 0
    points = samples(images[:1], capped.radius * images[:1].flatten(1).sum(1), 3000)
    points = points[:, (points <= 1.01).flatten(2).all(2)[0]]
    assert points.shape[1] > 20
    assert (margins_at(network, points, labels[:1]) > 0).all()
    if capped.witness is not None:
        assert float(capped.witness.max()) <= 1.01


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (2, 3))])
def test_planted_ties_are_never_certified(seed: int) -> None:
    """The bias is moved so that the least margin over the ball is just below zero, or just above it."""
    network = random_network(
        (1, 4, 4), [nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)], seed
    )
    image = sparse_images((1, 4, 4), 1, seed)
    label, ball = int(network(image).argmax(1)), fv.WassersteinBall(0.3)
    exact = CompleteCertifier(network).least_margin(image[0], label, ball, 1e-8)
    last = network.nodes[-1].operation
    for shift, verdicts in ((1e-6, {"falsified"}), (0.0, {"falsified", "unknown", "timeout"}), (-1e-6, {"certified"})):
        with torch.no_grad():
            last.get_parameter("bias")[label] -= exact.upper + shift
        found = CompleteCertifier(network).certify(image, torch.tensor([label]), ball)[0]
        with torch.no_grad():
            last.get_parameter("bias")[label] += exact.upper + shift
        clean = float(margins_at(network, image[None], torch.tensor([label])).min())
        if clean - exact.upper - shift <= 1e-9:
            assert found.verdict == "misclassified"
        else:
            assert str(found.verdict) in verdicts, (shift, exact, found)


class TestBadInput:
    def test_activations_are_refused_by_name(self) -> None:
        for kind in (CompleteCertifier, MilpCertifier):
            with pytest.raises(UnsupportedOperationError, match="Tanh; expected affine layers and ReLU, LeakyReLU"):
                kind(network_of("recurrent"))

    def test_options(self) -> None:
        with pytest.raises(InvalidInputError, match="timeout: given 0, expected seconds > 0"):
            CompleteOptions(timeout=0)
        with pytest.raises(InvalidInputError, match="nodes: given 0"):
            CompleteOptions(nodes=0)
        with pytest.raises(InvalidInputError, match="tolerance: given 1"):
            CompleteOptions(tolerance=1)
        with pytest.raises(UnknownNameError, match="complete method"):
            CompleteCertifier(network_of("mlp"), "fine-tuned")
        with pytest.raises(InvalidInputError, match="expected l1 and no cap"):
            MilpCertifier(network_of("mlp")).certify(*images_of("mlp"), fv.WassersteinBall(0.1, "l2"))

    def test_misclassified_images(self) -> None:
        network, (images, labels) = network_of("mlp"), images_of("mlp")
        wrong = (labels + 1) % 3
        certifier = CompleteCertifier(network)
        found = [*certifier.search(images[:1], wrong[:1]), *certifier.certify(images, wrong, fv.WassersteinBall(0.1))]
        assert {one.verdict for one in found} == {Verdict.MISCLASSIFIED}
        with pytest.raises(InvalidInputError, match="misclassified"):
            certifier.start(images[0], int(wrong[0]))

    def test_out_of_memory_lowers_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network, images, labels = digits()
        options = CompleteOptions(settings=SearchSettings(bound="ibp"))  # so that there is a tree to grow
        real, sizes = tree_module.branch, []

        def failing(problem, nodes, enough):  # type: ignore[no-untyped-def]
            sizes.append(len(nodes))
            if len(nodes) > 1:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
            return real(problem, nodes, enough)

        expected = CompleteCertifier(network, options=options).search(images[2:], labels[2:])[0]
        monkeypatch.setattr(tree_module, "branch", failing)
        found = CompleteCertifier(network, options=options).search(images[2:], labels[2:])[0]
        assert max(sizes) > 1
        assert found.radius == pytest.approx(expected.radius, rel=0.01)

        def broken(*arguments: object) -> None:
            raise RuntimeError("something else")

        monkeypatch.setattr(tree_module, "branch", broken)
        with pytest.raises(RuntimeError, match="something else"):
            CompleteCertifier(network, options=options).search(images[2:], labels[2:])

    def test_interruption_gives_what_is_known(self) -> None:
        network, images, labels = digits()

        def interrupt(_: object) -> None:
            raise KeyboardInterrupt

        certifier = CompleteCertifier(network, options=CompleteOptions(progress=interrupt))
        with pytest.raises(Interrupted) as stopped:
            certifier.search(images, labels)
        last = stopped.value.certificates[-1]
        assert 0 < last.radius < (last.upper_radius or math.inf)
        assert len(stopped.value.certificates) <= DIGITS


ROWS = {
    "vanilla": ("vanilla", 0),
    "feasibility": ("fine-tuned", 0),
    "references": ("vanilla", 2),
    "feasibility, references": ("fine-tuned", 2),
    "complete certifier": ("vanilla-complete", 0),
    "complete certifier, references": ("vanilla-complete", 2),
    "feasibility, complete certifier": ("complete", 0),
}


class TestTable1:
    """The framework paper's seven combinations, by name; and the eighth, which it rules out."""

    @pytest.mark.parametrize("row", ROWS)
    def test_row(self, row: str) -> None:
        network, images, labels = digits()
        method, references = ROWS[row]
        found = make_certifier(network, method, references=references).search(images[:1], labels[:1])[0]
        assert found.verdict == "certified"
        assert found.method == method
        assert ("reference" in found.note) == (references > 0)
        complete = make_certifier(network, "complete").search(images[:1], labels[:1])[0]
        assert complete.upper_radius is not None
        assert found.radius <= complete.upper_radius
        if row == "feasibility, complete certifier":
            assert found.upper_radius is not None and found.upper_radius <= found.radius * 1.0101
            vanilla = make_certifier(network, "vanilla-complete").search(images[:1], labels[:1])[0]
            assert found.radius > 1.1 * vanilla.radius
        if method == "vanilla-complete":
            incomplete = make_certifier(network, "vanilla").search(images[:1], labels[:1])[0]
            assert found.upper_radius is not None and incomplete.radius <= found.upper_radius
            assert found.radius >= incomplete.radius / 1.0101  # lifted bounds may be as good, to the bracket's width
            assert found.witness is None and "no image" in found.note

    @pytest.mark.parametrize("method", ["complete", "milp"])
    def test_the_impossible_row(self, method: str) -> None:
        with pytest.raises(InvalidInputError, match=r"exact radius, so reference fine-tuning cannot be.*Table 1"):
            make_certifier(network_of("mlp"), method, references=2)
        with pytest.raises(InvalidInputError, match="expected at least 1"):
            ReferenceCompleteCertifier(network_of("mlp"), count=0)


class TestCommandLine:
    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, ["verify", "digits-fc3", *arguments])

    def test_json_has_both_ends(self, tmp_path: Path) -> None:
        path = tmp_path / "witnesses.npz"
        done = self.run(
            "--method", "complete", "--index", "0:2", "--timeout", "3600", "--json", "--witnesses", str(path)
        )
        assert done.exit_code == 0, done.output
        records = [json.loads(line) for line in done.stdout.splitlines()]
        assert [record["index"] for record in records] == [0, 1]
        for record in records:
            assert record["radius"] < record["upper_radius"] <= record["radius"] * 1.0101
        found = np.load(path)
        assert found["images"].shape == (2, 1, 8, 8)
        assert found["index"].tolist() == [0, 1]

    def test_bad_input_is_one_line(self) -> None:
        for arguments, words in (
            (("--method", "complete", "--references", "2"), "Table 1"),
            (("--method", "complete", "--timeout", "0"), "expected seconds > 0"),
            (("--method", "nonsense"), "vanilla-complete"),
        ):
            done = self.run("--index", "0", *arguments)
            assert done.exit_code == 2, done.output
            assert words in done.stderr and "Traceback" not in done.output

    def test_interrupted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*arguments: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(tree_module.Tree, "grow", interrupted)
        done = self.run("--method", "complete", "--index", "0:2", "--json")
        assert done.exit_code == 130
        record = json.loads(done.stdout.splitlines()[0])
        assert 0 < record["radius"] < record["upper_radius"]
        assert "out of budget" in record["note"]
        assert "interrupted" in done.stderr
