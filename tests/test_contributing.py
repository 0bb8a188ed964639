"""Everything that CONTRIBUTING.md says can be added is added here, by a package that is not this one."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flowverify as fv
from flowverify.certifiers.linear import LinearCertifier
from flowverify.cli import app
from flowverify.network.curves import CURVES, FUNCTIONS
from flowverify.network.operations import ADDED, RECORDS
from flowverify.registry import imported
from flowverify.training.losses import build_loss
from flowverify.transport import ground as grounds
from flowverify.zoo import load_model

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

CERTIFIER = '''
"""A method of one's own: Lipschitz constants by one backward pass, for networks of affine layers."""

from flowverify.ball import Threat
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.linear import half_spaces
from flowverify.results import Verdict


class Steepest(BaseCertifier):
    """Certified where the budget times the steepest move does not use up the margin.

    Args:
        share: of the margin that may be used up.
    """

    def __init__(self, model, method, *, share: float = 1.0, input_shape=None):
        super().__init__(model, method, "steepest", input_shape)
        self.share = share

    def certify(self, images, labels, ball):
        images, labels = self.check(images, labels, ball.threat)
        return self._found(images, labels, ball.threat, ball.radius)

    def search(self, images, labels, threat=None):
        images, labels = self.check(images, labels, threat)
        return self._found(images, labels, threat or Threat(), None)

    def _found(self, images, labels, threat, asked):
        predictions, right = self.clean(images, labels)
        spaces = half_spaces(self.network, images, labels)
        steepest = Threat(threat.ground, positive=False).ball(spaces.images, 1.0).support(spaces.normals).excess
        margins = self.share * (spaces.margins - self.allowance(images)[:, None])
        radii = threat.radius((margins / steepest).amin(1).clamp(min=0), spaces.images)
        result = []
        for k, radius in enumerate(radii.tolist()):
            at = 0.999 * radius if asked is None else asked
            verdict = Verdict.CERTIFIED if at < radius else Verdict.UNKNOWN
            if not right[k]:
                verdict, at = Verdict.MISCLASSIFIED, asked or 0.0
            result.append(self.certificate(labels[k], predictions[k], verdict, threat, at, 0.0))
        return result
'''
ATTACK = '''
"""An attack of one's own: the whole budget along the steepest move, in the image domain."""

from flowverify.attack import BaseAttack


class OneMove(BaseAttack):
    """Moves mass where the logit of the label falls fastest.

    Args:
        greed: how much of the budget is spent.
    """

    name = "one-move"

    def __init__(self, model, *, greed: float = 1.0, batch_size: int = 100, seed: int = 0):
        super().__init__(model, batch_size=batch_size, seed=seed)
        self.greed = greed

    def search(self, batch):
        images = batch.ball.images.double()
        best = images.clone()
        for target in range(self.model.logits(images[:1]).shape[1]):
            labels = batch.labels
            _, gradient = self.model.gradients(images, labels, labels.new_full(labels.shape, target))
            moved = batch.ball.with_budget(self.greed * batch.ball.budget).best_moves(gradient).image
            worse = self.model.margins(moved, labels) > self.model.margins(best, labels)
            best[worse] = moved[worse]
        return best
'''
DATA = '''
"""A data set of one's own."""

import torch

from flowverify.data import Dataset


def stripes(split, data_dir=None):
    """8x8 images of one bright row each; the label is the row."""
    images = torch.full((8, 1, 8, 8), 0.01)
    images[torch.arange(8), 0, torch.arange(8)] = 1.0
    return Dataset(images, torch.arange(8), "stripes", split)


def nonsense(split, data_dir=None):
    return [split]
'''
LOSS = '''
"""A loss of one's own."""

from torch import nn

from flowverify.training import BatchOutcome


class Smoothed:
    """Cross-entropy with smoothed labels."""

    def __init__(self, smoothing: float = 0.1):
        self.loss = nn.CrossEntropyLoss(label_smoothing=smoothing)

    def __call__(self, model, images, labels, context):
        logits = model(images)
        return BatchOutcome(self.loss(logits, labels), logits)
'''
KIND = '''
"""A kind of job of one's own."""

from pydantic import Field

from flowverify.bench.tasks import Kind, Prepared, Run, Task
from flowverify.settings import Natural, settings


@settings
class Counting(Run):
    """Three numbers."""

    first: Natural = Field(0, description="Where it starts.")


class Count(Kind):
    """Counts, from a number on."""

    name = "count"
    settings = Counting

    def expand(self, run, defaults):
        return [Task("count", "contributed.kind:Count", {"first": run.first}, (0, 1, 2), 2)]

    def prepare(self, task, context):
        return _Counting(task.settings["first"])


class _Counting(Prepared):
    def __init__(self, first):
        self.first = first

    def run(self, positions):
        return [{"verdict": "certified", "counted": self.first + one, "seconds": 0.0} for one in positions]
'''
GROUND = '''
"""A ground cost of one's own: a king's moves."""

from dataclasses import dataclass

import numpy as np

from flowverify.transport.ground import GroundCost


@dataclass(frozen=True)
class King(GroundCost):
    """The maximum norm."""

    name = "king"
    l1_factor = 2.0

    def of_offset(self, rows, columns):
        return np.maximum(np.abs(rows), np.abs(columns))
'''
BOUND = '''
"""An engine that bounds margins, and a bound made of it and of another one."""

import torch

from flowverify.bounds.engine import nothing
from flowverify.bounds.recipes import Bound


class Centre:
    """Knows nothing of neurons; of margins, only what Lipschitz constants of the whole network would allow."""

    def __init__(self, network, threat, dtype, options):
        self.network, self.notes = network, []

    def start(self, batch):
        return _Run(self, batch)


class _Run:
    def __init__(self, engine, batch):
        self.engine, self.batch = engine, batch

    def tighten(self, name, wanted):
        return nothing(torch.zeros(wanted.shape))

    def margins(self, specification):
        logits = self.engine.network(self.batch.ball.images)
        values = (specification @ logits[..., None]).squeeze(-1)
        still = (self.batch.ball.budget == 0)[:, None]
        return torch.where(still, values, -torch.inf)


combined = Bound("intervals, and values where nothing moves", ("interval",), ("interval", "contributed.bound:Centre"))
'''
ACTIVATION = '''
"""An activation of one's own: the Gudermannian function."""

import torch

from flowverify.network.curves import Bend, Curve
from flowverify.network.operations import register_activation


class Gudermannian(torch.nn.Module):
    def forward(self, value):
        return 2 * torch.atan(torch.tanh(value / 2))


register_activation(
    Gudermannian, lambda operation: Curve(lambda x: 1 / torch.cosh(x), (), (Bend(0.0, 1.0, 1.0),), 1.0, 0.0)
)


class Wrong(Gudermannian):
    pass


register_activation(Wrong, lambda operation: Curve(lambda x: 1 / torch.cosh(x), (), (), 1.0, 0.0))
'''
FILES = {
    "ground": GROUND,
    "bound": BOUND,
    "certifier": CERTIFIER,
    "attack": ATTACK,
    "data": DATA,
    "loss": LOSS,
    "kind": KIND,
    "activation": ACTIVATION,
}
SUITE = """
name: contributed
data: {name: "contributed.data:stripes"}
models: [digits-fc3]
runs:
  - {methods: vanilla, bounds: "contributed.bound:combined", grounds: "contributed.ground:King", radii: 0.001}
  - {kind: attack, attacks: "contributed.attack:OneMove", options: {greed: 0.5}, radii: 0.1}
  - {kind: "contributed.kind:Count", first: 5}
"""


@pytest.fixture(scope="module", autouse=True)
def contributed(tmp_path_factory):
    """The package, one file for each thing that it adds."""
    folder = tmp_path_factory.mktemp("somewhere")
    (folder / "contributed").mkdir()
    for name, text in {"__init__": '"""Somebody else\'s."""\n', **FILES}.items():
        (folder / "contributed" / f"{name}.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", f"{folder}", prepend=":")
        patch.setattr(grounds, "GROUNDS", dict(grounds.GROUNDS))
        yield folder
    for kind in list(ADDED):
        for table in (CURVES, FUNCTIONS, RECORDS, ADDED):
            table.pop(kind)
    for known in (grounds._find, grounds._outside):
        known.cache_clear()


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    network = fv.Network.sequential((1, 5, 5), [torch.nn.Flatten(), torch.nn.Linear(25, 4)])
    images = torch.rand(6, 1, 5, 5)
    return network, images, network(images).argmax(1).detach()


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def records(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


class TestGround:
    NAME = "contributed.ground:King"

    def test_radii_lie_between_those_of_l1_and_its_factor(self, problem):
        network, images, labels = problem
        king, l1 = (fv.certified_radius(network, images, labels, "linear", ground=one) for one in (self.NAME, "l1"))
        assert (
            bool((king <= l1 * (1 + 1e-9)).all())
            and bool((king >= l1 / 2 * (1 - 1e-6)).all())
            and not torch.equal(king, l1)
        )
        bounded = fv.certified_radius(network, images, labels, ground=self.NAME)
        torch.testing.assert_close(bounded, king, rtol=0.015, atol=0)
        nearest = fv.find_adversarial(network, images, labels, ground=self.NAME)
        assert bool((nearest.radius >= king).all())

    def test_on_the_command_line_and_with_a_cap(self):
        options = ("--index", "0:2", "--bound", "ibp", "--ground", self.NAME, "--cap", "1", "--json")
        found = records(run("verify", "digits-fc3", *options).stdout)
        assert {(one["ground"], one["verdict"]) for one in found} == {(self.NAME, "certified")}

    @pytest.mark.parametrize("name", ["contributed.ground:Queen", "contributed.loss:Smoothed", "nobody:King"])
    def test_what_is_none_is_said(self, name):
        result = run("verify", "digits-fc3", "--index", "0", "--ground", name, code=2)
        assert f"ground cost '{name}': " in result.stderr and result.stderr.count("\n") == 1


class TestBound:
    NAME = "contributed.bound:combined"

    def test_it_is_as_good_as_what_it_is_made_of(self, problem):
        network, images, labels = problem
        own, plain = (fv.certified_radius(network, images, labels, bound=bound) for bound in (self.NAME, "ibp"))
        assert torch.equal(own, plain)
        at_zero = fv.certify(network, images[0], labels[0], fv.WassersteinBall(0.0), bound=self.NAME)
        assert at_zero.verdict == "certified" and at_zero.bound == self.NAME

    def test_on_the_command_line(self):
        found = records(run("verify", "digits-fc3", "--index", "0", "--bound", self.NAME, "--json").stdout)
        assert found[0]["bound"] == self.NAME and found[0]["verdict"] == "certified"
        assert "expected a Bound" in run("verify", "digits-fc3", "--bound", "contributed.bound:Centre", code=2).stderr


class TestMethod:
    NAME = "contributed.certifier:Steepest"

    def test_radii_are_sound_and_those_of_lemma_7(self, problem):
        network, images, labels = problem
        found = fv.certified_radius(network, images, labels, self.NAME)
        exact = LinearCertifier(network).radii(images, labels).radius
        assert bool((found > 0).all()) and bool((found <= exact).all())
        vanilla = fv.certified_radius(network, images, labels, "vanilla", "crown", tolerance=1e-6)
        torch.testing.assert_close(found, 0.999 * vanilla, rtol=1e-4, atol=0)
        half = fv.certified_radius(network, images, labels, self.NAME, share=0.5)
        torch.testing.assert_close(half, 0.5 * found, rtol=1e-9, atol=1e-12)

    def test_as_an_engine_of_a_method(self, problem):
        network, images, labels = problem
        certifier = fv.make_certifier(network, "vanilla", engine=self.NAME)
        (found,) = certifier.certify(images[:1], labels[:1], fv.WassersteinBall(1e-4))
        assert (found.method, found.bound, found.verdict) == ("vanilla", "steepest", "certified")

    def test_it_refuses_a_network_that_it_cannot_take_in_one_line(self):
        result = run("verify", "digits-fc3", "--index", "0", "--method", self.NAME, code=1)
        assert "ReLU) is not affine" in result.stderr and result.stderr.count("\n") == 1


class TestAttack:
    NAME = "contributed.attack:OneMove"

    def test_what_it_finds_is_not_below_what_is_certified(self, problem):
        network, images, labels = problem
        found = fv.find_adversarial(network, images, labels, method=self.NAME)
        exact = LinearCertifier(network).radii(images, labels).radius
        assert bool(torch.isfinite(found.radius).all()) and bool((found.radius >= exact).all())

    def test_on_the_command_line(self):
        options = ("--index", "0:3", "--radius", "3", "--option", "greed=1.0", "--json")
        found = records(run("attack", "digits-fc3", "--attack", self.NAME, *options).stdout)
        assert {one["verdict"] for one in found} == {"falsified"}

    def test_as_the_adversary_of_a_complete_method(self, problem):
        network, images, labels = problem
        (found,) = fv.make_certifier(network, "complete", adversary=self.NAME).search(images[:1], labels[:1])
        exact = LinearCertifier(network).radii(images[:1], labels[:1]).radius
        assert found.radius <= float(exact) <= found.upper_radius


class TestDataset:
    def test_on_the_command_line(self):
        options = ("--dataset", "contributed.data:stripes", "--bound", "ibp", "--radius", "0.001", "--json")
        found = records(run("verify", "digits-fc3", *options).stdout)
        assert [one["label"] for one in found] == list(range(8))

    def test_what_is_no_data_set_is_said(self):
        options = ("--dataset", "contributed.data:nonsense", "--index", "0")
        assert "returned list, expected a Dataset" in run("verify", "digits-fc3", *options, code=2).stderr


def test_loss(tmp_path):
    recipe = {"name": "own", "dataset": "digits", "architecture": "linear", "epochs": 1, "seed": 1}
    recipe |= {"loss": "contributed.loss:Smoothed", "loss_options": {"smoothing": 0.3}}
    (tmp_path / "own.json").write_text(json.dumps(recipe))
    run("train", "--recipe", tmp_path / "own.json", "--out", tmp_path / "trained")
    assert load_model(str(tmp_path / "trained" / "own.onnx"), (1, 8, 8)).num_classes == 10
    with pytest.raises(fv.FlowverifyError, match="unknown option of the loss contributed.loss:Smoothed 'much'"):
        build_loss("contributed.loss:Smoothed", {"much": 1})


def test_suite_with_a_data_set_an_attack_and_a_kind(tmp_path):
    (tmp_path / "suite.yaml").write_text(SUITE)
    run("bench", tmp_path / "suite.yaml", "--out", tmp_path / "out", "--workers", 1)
    found = [one for file in (tmp_path / "out").glob("*.jsonl") for one in records(file.read_text())]
    assert sorted(one["counted"] for one in found if "counted" in one) == [5, 6, 7]
    assert (
        sum(one.get("attack") == "one-move" for one in found)
        == sum(one.get("method") == "vanilla" for one in found)
        == 8
    )


class TestActivation:
    @pytest.fixture(scope="class")
    def kind(self, contributed):
        return imported("contributed.activation:Gudermannian")

    def network(self, kind):
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(25, 8), kind(), torch.nn.Linear(8, 6), kind(), torch.nn.Linear(6, 4)
        )

    def test_every_bound_but_crown_takes_it(self, kind, problem):
        network, (_, images, _) = self.network(kind), problem
        labels = network(images).argmax(1)
        nearest = fv.find_adversarial(network, images, labels)
        for bound in ("ibp", "lifted", "best"):
            radii = fv.certified_radius(network, images, labels, bound=bound)
            assert bool((radii > 0).all()) and bool((radii <= nearest.radius).all())
        with pytest.raises(fv.FlowverifyError, match="Gudermannian"):
            fv.certified_radius(network, images, labels, bound="crown")

    def test_a_curve_that_is_none_is_said(self, kind, problem):
        network, images, labels = self.network(imported("contributed.activation:Wrong")), *problem[1:]
        with pytest.raises(fv.FlowverifyError, match="curve of Wrong: a place where its slope turns that is not named"):
            fv.certified_radius(network, images, labels)


def test_the_page_names_what_is_there():
    for name in re.findall(r"`(flowverify(?:\.\w+)+)`", TEXT):
        module, _, attribute = name.rpartition(".")
        assert imported(f"{module}:{attribute}") is not None, name
    for path in re.findall(r"`((?:flowverify|tests)/[\w/]+\.py)`", TEXT):
        assert (ROOT / path).is_file(), path
    for table, path in re.findall(r"`([A-Z]{4,})` in `([\w/]+)\.py`", TEXT):
        assert imported(f"{path.replace('/', '.')}:{table}"), table
