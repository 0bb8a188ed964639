"""Names: every entry is there, options are checked once for everybody, and MODULE:CLASS takes the place of a name."""

import dataclasses
import json
import re

import pytest
import torch
from typer.testing import CliRunner

import flowverify as fv
from flowverify.bench.tasks import KINDS
from flowverify.certifiers.options import MarabouOptions
from flowverify.cli import app
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.registry import ATTACKS, ENGINES, METHODS, Entry, Registry, help_of, parsed

REGISTRIES = {"methods": METHODS, "engines": ENGINES, "attacks": ATTACKS, "kinds": KINDS}
ENTRIES = [(registry, name) for registry in REGISTRIES.values() for name in registry]

MINE = '''
from dataclasses import dataclass

from flowverify.attack import BaseAttack
from flowverify.ball import Threat
from flowverify.certifiers.base import BaseCertifier
from flowverify.registry import option
from flowverify.results import Verdict


@dataclass(frozen=True)
class MineOptions:
    share: float = option(0.5, "Of the radius asked about.")


class Mine(BaseCertifier):
    """Certifies nothing; it says what it was given."""

    Options = MineOptions

    def __init__(self, model, method, *, options=None, input_shape=None):
        super().__init__(model, method, "guess", input_shape)
        self.options = options or MineOptions()

    def certify(self, images, labels, ball):
        return self._all(images, labels, ball.threat, ball.radius * self.options.share)

    def search(self, images, labels, threat=None):
        return self._all(images, labels, threat or Threat(), self.options.share)

    def _all(self, images, labels, threat, radius):
        images, labels = self.check(images, labels, threat)
        predictions, _ = self.clean(images, labels)
        return [
            self.certificate(label, prediction, Verdict.UNKNOWN, threat, radius, 0.0)
            for label, prediction in zip(labels, predictions, strict=True)
        ]


class Lazy(BaseAttack):
    """Finds nothing.

    Args:
        effort: is lost on it.
    """

    name = "lazy"

    def __init__(self, model, *, effort: int = 1, batch_size: int = 100, seed: int = 0):
        super().__init__(model, batch_size=batch_size, seed=seed)

    def search(self, batch):
        return batch.images


NUMBER = 3
'''
SUITE = """
name: mine
data: {name: digits, index: "0:2"}
models: [digits-fc3]
runs:
  - {methods: [mypackage:Mine], radii: 0.02, options: {share: 0.25}}
  - {kind: attack, attacks: mypackage:Lazy, radii: 0.02}
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of somebody else's, on the path."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "mypackage.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", f"{folder}", prepend=":")
        yield folder


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    network = fv.Network.sequential((1, 4, 4), [torch.nn.Flatten(), torch.nn.Linear(16, 3)])
    images = torch.rand(2, 1, 4, 4)
    return network, images, network(images).argmax(1).detach()


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=[f"{r.kind} {n}" for r, n in ENTRIES])
def test_every_entry_can_be_found_and_its_options_have_help(registry, name):
    assert callable(registry.find(name))
    for field in dataclasses.fields(registry.options_type(name)):
        if field.metadata.get("help") is not None:
            assert field.default is not dataclasses.MISSING


class TestOptions:
    @pytest.mark.parametrize(
        ("registry", "name", "given", "message"),
        [
            (METHODS, "fine-tuned", {"tolerance": 2}, "tolerance 2: expected a number between 0 and 1"),
            (METHODS, "fine-tuned", {"tolerance": "much"}, "given 'much', expected float"),
            (METHODS, "fine-tuned", {"batch_size": 1.5}, "given 1.5, expected int"),
            (METHODS, "fine-tuned", {"batch_size": True}, "given True, expected int"),
            (METHODS, "fine-tuned", {"timeout": 1}, "'timeout' of method fine-tuned: unknown, expected one of bound,"),
            (METHODS, "linear", {"tolerance": 0.1}, "'tolerance' of method linear: unknown, expected none"),
            (METHODS, "complete", {"timeout": -1}, "timeout: given -1, expected seconds > 0"),
            (ENGINES, "marabou", {"encoding": None}, "given None, expected str"),
            (ATTACKS, "minimal", {"iterations": 3}, "'iterations' of attack minimal: unknown, expected one of effort"),
            (ATTACKS, "frank-wolfe", {"iterations": "3"}, "given '3', expected int"),
        ],
    )
    def test_what_is_wrong_is_said(self, registry, name, given, message):
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            registry.options(name, given)

    def test_given_one_by_one_as_a_mapping_or_as_their_dataclass(self, problem):
        made = [
            fv.make_certifier(problem[0], "complete", timeout=7),
            fv.make_certifier(problem[0], "complete", options={"timeout": 7}),
            fv.make_certifier(problem[0], "complete", options=METHODS.options("complete", {"timeout": 7})),
        ]
        assert [one.options.timeout for one in made] == [7, 7, 7]
        with pytest.raises(InvalidInputError, match="options of method complete: given MarabouOptions"):
            fv.make_certifier(problem[0], "complete", options=MarabouOptions())

    def test_an_adversary_is_given_by_name_everywhere(self, problem):
        network, images, labels = problem
        assert fv.make_certifier(network, "complete").options.adversary.name == "minimal"
        assert fv.make_certifier(network, "complete", adversary="frank-wolfe").options.adversary.name == "frank-wolfe"
        assert fv.make_certifier(network, "complete", adversary=None).options.adversary is None
        with pytest.raises(UnknownNameError, match="unknown attack 'luck'"):
            fv.certified_radius(network, images, labels, method="complete", adversary="luck")

    def test_of_a_command_line(self):
        assert parsed(["nodes=3", "batch-size=4", "effort=fast", "timeout=null"]) == {
            "nodes": 3,
            "batch_size": 4,
            "effort": "fast",
            "timeout": None,
        }
        for wrong in (["nodes"], ["=3"], ["nodes=1", "nodes=2"]):
            with pytest.raises(InvalidInputError, match="expected NAME=VALUE, each name once"):
                parsed(wrong)

    def test_help_of_the_command_line_is_that_of_the_options(self):
        shown = " ".join(run("verify", "--help").stdout.split())
        for path, name in (
            ("flowverify.certifiers.options:IncompleteOptions", "bound"),
            ("flowverify.certifiers.options:MarabouOptions", "encoding"),
        ):
            assert help_of(path, name) in shown
        assert METHODS.listing() in shown and ENGINES.listing() in shown


class TestOutside:
    def test_in_the_library(self, package, problem):
        network, images, labels = problem
        found = fv.certify_batch(network, images, labels, fv.WassersteinBall(0.2), "mypackage:Mine", share=0.1)
        assert [one.radius for one in found] == pytest.approx([0.02, 0.02])
        assert found[0].method == "mypackage:Mine" and found[0].bound == "guess"
        assert fv.certified_radius(network, images, labels, "mypackage:Mine").tolist() == [0.5, 0.5]
        assert (
            fv.find_adversarial(network, images, labels, method="mypackage:Lazy", effort=9).outcome
            == ("not found",) * 2
        )

    def test_on_the_command_line(self, package):
        options = ("--index", "0:2", "--json", "--radius", "0.02", "--option", "share=0.25")
        found = [
            json.loads(x)
            for x in run("verify", "digits-fc3", "--method", "mypackage:Mine", *options).stdout.split("\n")
            if x
        ]
        assert [(one["method"], one["radius"], one["verdict"]) for one in found] == [
            ("mypackage:Mine", 0.005, "unknown")
        ] * 2
        shown = run("verify", "digits-fc3", "--engine", "mypackage:Mine", *options[:3]).stdout
        assert json.loads(shown.splitlines()[0])["method"] == "fine-tuned"
        shown = run(
            "attack", "digits-fc3", "--attack", "mypackage:Lazy", "--index", "0", "--option", "effort=2", "--json"
        )
        assert json.loads(shown.stdout)["attack"] == "mypackage:Lazy"

    def test_in_a_suite(self, package, tmp_path):
        (tmp_path / "suite.yaml").write_text(SUITE)
        run("bench", tmp_path / "suite.yaml", "--out", tmp_path / "out", "--workers", 1)
        lines = [
            json.loads(line) for file in (tmp_path / "out").glob("*.jsonl") for line in file.read_text().splitlines()
        ]
        records = [line for line in lines if "verdict" in line]
        assert {one["verdict"] for one in records} == {"unknown"} and len(records) == 4
        assert {one["radius"] for one in records if one.get("method") == "mypackage:Mine"} == {0.005}

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("mypackage:Gone", "has no attribute 'Gone', expected a class MODULE:CLASS"),
            ("no_such_package:Mine", "No module named 'no_such_package', expected a class MODULE:CLASS"),
            ("mypackage:NUMBER", "method 'mypackage:NUMBER': 3, expected a class derived from BaseCertifier"),
            ("mypackage:Lazy", "expected a class derived from BaseCertifier"),
        ],
    )
    def test_what_is_no_certifier_is_refused(self, package, problem, name, message):
        with pytest.raises(InvalidInputError, match=re.escape(message)):
            fv.make_certifier(problem[0], name)
        result = run("verify", "digits-fc3", "--index", "0", "--method", name, code=2)
        assert message in result.stderr and result.stderr.count("\n") == 1

    def test_an_error_of_ones_own_family_comes_through(self):
        registry = Registry("thing", {"one": Entry("", "builtins:int")})
        assert registry.find("one") is int and registry.find("builtins:float") is float
        with pytest.raises(InvalidInputError, match="thing 'flowverify:__version__': .*expected something to call"):
            registry.find("flowverify:__version__")
        with pytest.raises(UnknownNameError, match="unknown thing 'two': expected one of MODULE:CLASS, one"):
            registry.find("two")
