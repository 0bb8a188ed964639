"""One rule for what is classified right and what a counterexample is, whoever is asked."""

import pytest
import torch
from torch import nn

import flowverify as fv
from flowverify.attack import BaseAttack, Schedule, make_attack
from flowverify.ball import Threat
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.linear import LinearCertifier
from flowverify.errors import InvalidInputError
from flowverify.export import marabou
from flowverify.export.abcrown import AlphaBetaCrownCertifier
from flowverify.export.folder import Source, write_folder
from flowverify.export.plan import Request, plan
from flowverify.export.results import replay as replay_export
from flowverify.network import Network, write_onnx
from flowverify.network.subject import Subject
from flowverify.smoothing import Noise, SmoothedClassifier, SplitClassifier, Splitting
from flowverify.smoothing.attack import attack_smoothed
from flowverify.witness import replay

ULP32, ULP64 = 2.0**-23, 2.0**-52
IMAGE = torch.zeros(1, 1, 4, 4)
IMAGE[0, 0, 1, 1] = 1.0
MOVED = torch.zeros(1, 1, 4, 4)
MOVED[0, 0, 1, 2] = 1.0  # one pixel to the right: at distance 1


def small(values, at_last=None, double=False, affine=True):
    """A network of three classes: logits ``values``, and ``at_last`` more of them where all mass has moved.

    A logit is a pair (large, small) whose sum the last layer takes: float32 may round it, float64 does not.
    """
    dtype = torch.float64 if double else torch.float32
    first, last = nn.Linear(16, 6, dtype=dtype), nn.Linear(6, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        first.weight.zero_()
        first.bias.copy_(torch.tensor(values, dtype=dtype).T.flatten())
        if at_last is not None:
            first.weight[:, 6] = torch.tensor(at_last, dtype=dtype).T.flatten()
        last.weight.copy_(torch.cat([torch.eye(3), torch.eye(3)], 1))
    return Network.sequential((1, 4, 4), [nn.Flatten(), first, *([] if affine else [nn.ReLU()]), last])


# Logits, whether float64 weights, and of the labels 0 and 1: is the image classified right?
CLEAN = {
    "clear": (([2.0, 0.0], [1.0, 0.0], [0.0, 0.0]), False, (True, False)),
    "tie": (([1.0, 0.0], [1.0, 0.0], [0.0, 0.0]), False, (False, False)),
    "tie, float64": (([1.0, 0.0], [1.0, 0.0], [0.0, 0.0]), True, (False, False)),
    "one ulp": (([1.0, ULP32], [1.0, 0.0], [0.0, 0.0]), False, (True, False)),
    "one ulp the other way": (([1.0, 0.0], [1.0, ULP32], [0.0, 0.0]), False, (False, True)),
    "one ulp, float64": (([1.0, ULP64], [1.0, 0.0], [0.0, 0.0]), True, (True, False)),
    "a tie in float32 alone": (([1.0, 2.0**-30], [1.0, 0.0], [0.0, 0.0]), False, (False, False)),
    "a tie in float32 alone, other way": (([1.0, 0.0], [1.0, 2.0**-30], [0.0, 0.0]), False, (False, False)),
}


class Offer(BaseAttack):
    name, shorten = "offer", False

    def search(self, batch):
        return MOVED.double()


def certify(method):
    return lambda network, label, folder: str(
        fv.certify(network, IMAGE[0], label, fv.WassersteinBall(0.01), method).verdict
    )


def export(network, label, folder):
    images, labels = torch.cat([IMAGE, IMAGE]), torch.tensor([label, 2])
    with pytest.raises(InvalidInputError, match="all 1 are misclassified"):  # nobody gives the third class
        write(folder, network, images[1:], labels[1:])
    try:
        write(folder, network, images[:1], labels[:1])
    except InvalidInputError:
        return "misclassified"
    return "exported"


def write(folder, network, images, labels):
    write_folder(folder / "out", network, images, labels, Request("linear", (0.1,)), Source("m", "d", "test", (0,)))


def ask_marabou(network, label, folder):
    found = marabou.MarabouCertifier(network)
    return str(found.certify(IMAGE, torch.tensor([label]), fv.WassersteinBall(0.0))[0].verdict)


def ask_abcrown(network, label, folder):
    found = AlphaBetaCrownCertifier(network, engine=object())  # which is asked nothing
    return str(found.certify(IMAGE, torch.tensor([label]), fv.WassersteinBall(0.0))[0].verdict)


def smoothed(network, label, folder):
    return str(SmoothedClassifier(network, Noise(0.01)).certify(IMAGE, [label], n0=10, n=100)[0].verdict)


def predicted(network, label, folder):
    found = SmoothedClassifier(network, Noise(0.01)).predict(IMAGE, [label], n=100)[0].outcome
    return "right" if found == "correct" else "misclassified"


def split(network, label, folder):
    return str(SplitClassifier(network, Splitting(0.1, 2)).certify(IMAGE, [label])[0].verdict)


def attack_on_smoothed(network, label, folder):
    found = attack_smoothed(
        SmoothedClassifier(network, Noise(0.01)), IMAGE, [label], n=100, schedule=Schedule(0.01, 1.1, 1, 1)
    )
    return "misclassified" if found[0].scheduled == 0 else "right"


ASKED = {
    **{name: certify(name) for name in ("vanilla", "fine-tuned", "linear", "complete", "vanilla-complete", "milp")},
    "attack": lambda network, label, folder: Offer(network).run(IMAGE, [label], fv.WassersteinBall(0.01)).outcome[0],
    "attack, minimal": lambda network, label, folder: (
        make_attack("minimal", network).minimise(IMAGE, [label]).outcome[0]
    ),
    "export": export,
    "marabou": ask_marabou,
    "alpha-beta-crown": ask_abcrown,
    "smoothing": smoothed,
    "smoothing, prediction": predicted,
    "smoothing, splitting": split,
    "smoothing, attack": attack_on_smoothed,
}


@pytest.mark.parametrize("case", CLEAN)
@pytest.mark.parametrize("name", ASKED)
def test_what_is_misclassified_is_so_for_everybody(name, case, tmp_path, monkeypatch):
    monkeypatch.setattr(marabou, "MarabouProcess", lambda: type("Nothing", (), {"close": lambda self: None})())
    values, double, right = CLEAN[case]
    network = small(values, double=double, affine=name == "linear")
    for label in (0, 1):
        folder = tmp_path / str(label)
        folder.mkdir()
        found = ASKED[name](network, label, folder)
        assert (found != "misclassified") == right[label], (label, found)


# Logits of the clean image, what moving all mass adds, the label, whether float64, and: a counterexample?
MOVES = {
    "clear": (([1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]), ([0.0, 0.0], [2.0, 0.0], [0.0, 0.0]), 0, False, True),
    "tie": (([1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]), ([0.0, 0.0], [1.0, 0.0], [0.0, 0.0]), 0, False, False),
    "tie, label last": (([0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]), ([1.0, 0.0], [0.0, 0.0], [0.0, 0.0]), 1, False, False),
    "one ulp": (([1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]), ([0.0, 0.0], [1.0, ULP32], [0.0, 0.0]), 0, False, True),
    "tie, float64": (([1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]), ([0.0, 0.0], [1.0, 0.0], [0.0, 0.0]), 0, True, False),
    "a tie in float32, label first": (
        ([1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]), ([0.0, 0.0], [1.0, 2.0**-30], [0.0, 0.0]), 0, False, False
    ),
    "a tie in float32, label last": (
        ([0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]), ([1.0, 2.0**-30], [0.0, 0.0], [0.0, 0.0]), 1, False, True
    ),
}  # fmt: skip


def pulled(method):
    def ask(network, label, folder):
        subject, positive = CompleteCertifier(network, method).subject, method == "complete"
        nearest = NearestCounterexample(subject, IMAGE[0].double(), label, Threat(), positive=positive)
        nearest.offer(MOVED.double())
        return nearest.budget <= float(IMAGE[0].sum())

    return ask


def replayed_export(network, label, folder):
    (made,) = plan(network, IMAGE, torch.tensor([label]), Request("linear", (1.0,)))
    write_onnx(made.network.graph, folder / "network.onnx")
    values = made.instances[0].centre.copy()
    values[3 + 1] += 1.0  # the flow from (1, 1) to (1, 2), rightward flows first
    return replay_export(
        Subject(network), IMAGE[0], label, fv.WassersteinBall(1.0), values,
        made.network.inputs, made.network.encoding, folder / "network.onnx",
    ).falsified  # fmt: skip


FOOLED = {
    "attack": lambda network, label, folder: (
        Offer(network).run(IMAGE, [label], fv.WassersteinBall(1.0)).outcome[0] == "found"
    ),
    "complete": pulled("complete"),
    "vanilla-complete": pulled("vanilla-complete"),
    "linear": lambda network, label, folder: bool(
        LinearCertifier(network).witness(fv.WassersteinBall(1.0).around(IMAGE), torch.tensor([label]))[1]
    ),
    "export": replayed_export,
}


@pytest.mark.parametrize("case", MOVES)
@pytest.mark.parametrize("name", FOOLED)
def test_what_is_a_counterexample_is_so_for_everybody(name, case, tmp_path):
    values, moved, label, double, expected = MOVES[case]
    network = small(values, moved, double, affine=name == "linear")
    if name == "export":
        pytest.importorskip("onnxruntime")
    assert FOOLED[name](network, label, tmp_path) == expected


@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: image - 1e-15 * MOVED.flip(-1).double(),
        lambda image: image * (1 + 1e-8),
        lambda image: image.flip(-1).flip(-2),
        lambda image: 0.5 * image + 0.5 * IMAGE.double(),
    ],
)
def test_replay_believes_nothing(spoil):
    """A negative pixel, another mass, too far, not misclassified."""
    network = small(([1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]), ([0.0, 0.0], [2.0, 0.0], [0.0, 0.0]))
    subject, label, image, moved = Subject(network), torch.tensor([0]), IMAGE.double(), MOVED.double()

    def replayed(other, radius=1.0, cap=None):
        return replay(subject, fv.WassersteinBall(radius, cap=cap).around(image), label, other).tolist()

    assert replayed(moved, cap=1.0) == [1.0]
    assert replay(subject, Threat().unlimited(image), label, moved).tolist() == [1.0]
    with pytest.raises(InvalidInputError, match="image 0 has a pixel of 1: expected at most the cap, 0.9"):
        replayed(moved, cap=0.9)
    capped = Threat(cap=0.9)
    spread = torch.where(image > 0, 0.5 * image, 0.5 / 15)  # an image below the cap, unlike the one that is moved
    assert replay(subject, capped.unlimited(spread), label, moved).tolist() == [torch.inf]  # above the cap
    assert replayed(moved, 0.99) == [torch.inf]  # too far
    assert replayed(spoil(moved)) == [torch.inf]
