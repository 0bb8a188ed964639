"""One rule for what is classified right and what a counterexample is, whoever is asked; the way back into the ball."""

import copy

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flowverify as fv
from flowverify.attack import BaseAttack, Schedule, make_attack
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.certifiers.linear_certifier import LinearCertifier
from flowverify.errors import InvalidInputError
from flowverify.export import marabou
from flowverify.export.folder import PlainCertifier, Source, write_folder
from flowverify.export.plan import Request, plan
from flowverify.export.replay import replay as replay_export
from flowverify.network import Network, write_onnx
from flowverify.smoothing import Noise, SmoothedClassifier, SplitClassifier, Splitting
from flowverify.smoothing.attack import attack_smoothed
from flowverify.transport.ground import ground_cost, parse_ground
from flowverify.witness import TwoPrecisions, clean, fooled, in_threat_model, pull_back, repair, replay

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


def in_both(network):
    return TwoPrecisions(network, copy.deepcopy(network).double())


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

    def _at_radius(self, batch, radius):
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
        nearest = NearestCounterexample(
            CompleteCertifier(network, method), IMAGE[0].double(), label, method == "complete"
        )
        nearest.offer(MOVED.double())
        return nearest.radius <= 1.0

    return ask


def replayed_export(network, label, folder):
    (made,) = plan(network, IMAGE, torch.tensor([label]), Request("linear", (1.0,)))
    write_onnx(made.network.graph, folder / "network.onnx")
    values = made.instances[0].centre.copy()
    values[3 + 1] += 1.0  # the flow from (1, 1) to (1, 2), rightward flows first
    return replay_export(
        PlainCertifier(network, "fine-tuned", "outside"), IMAGE[0], label, fv.WassersteinBall(1.0), values,
        made.network.inputs, made.network.encoding, folder / "network.onnx",
    ).falsified  # fmt: skip


FOOLED = {
    "attack": lambda network, label, folder: (
        Offer(network).run(IMAGE, [label], fv.WassersteinBall(1.0)).outcome[0] == "found"
    ),
    "complete": pulled("complete"),
    "vanilla-complete": pulled("vanilla-complete"),
    "linear": lambda network, label, folder: bool(
        LinearCertifier(network).witness(IMAGE, torch.tensor([label]), torch.tensor([1.0]))[1]
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


GROUNDS = ("l1", "l2", "l2^2", "l1^1.5", "local:3", "local:3:l1^2")


def plan_cost(source, target, ground):
    """Of the cheapest plan, for each unit of mass, by POT with full cost matrices; infinite if there is none."""
    costs = ground_cost(source.shape[-2:], ground).numpy()
    far = 1e5
    total = 0.0
    for mu, nu in zip(source.flatten(1).numpy(), target.flatten(1).numpy(), strict=True):
        value = ot.emd2(mu / mu.sum(), nu / nu.sum(), np.where(np.isfinite(costs), costs, far), numItermax=1_000_000)
        total += mu.sum() * value
    cost = total / float(source.sum())
    return cost if cost < 100 else np.inf


def random_images(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 2, 3, 4, generator=generator, dtype=torch.float64)
    others = torch.rand(count, 2, 3, 4, generator=generator, dtype=torch.float64) ** 3
    return images, others * (images.sum((-1, -2)) / others.sum((-1, -2)))[..., None, None]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(GROUNDS), st.integers(0, 10**6), st.floats(0.01, 0.4))
def test_what_is_pulled_back_lies_in_the_ball_and_goes_far(ground, seed, radius):
    images, others = random_images(seed)
    limit = torch.full((3,), radius, dtype=torch.float64)
    found = pull_back(images, others, ground, limit)
    power = parse_ground(ground).power
    assert bool(in_threat_model(images, found, None).all())
    for image, other, back in zip(images, others, found, strict=True):
        before, after = plan_cost(image, other, ground), plan_cost(image, back, ground)
        assert after <= radius**power * (1 + 1e-7)
        if before <= radius**power * (1 - 1e-9):
            assert torch.equal(back, other)
        elif np.isinf(before):
            assert torch.equal(back, image)
        elif power == 1 and not ground.startswith("local"):
            assert after >= radius * (1 - 1e-6)  # all of the way that there is


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 1.0, 1.3]), st.floats(0.01, 3.0))
def test_what_is_repaired_is_an_image_of_the_threat_model(seed, cap, noise):
    images, _ = random_images(seed)
    candidates = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).double()
    candidates[0, 0, 0, 0] = torch.nan
    found = repair(images, candidates, cap)
    assert bool(in_threat_model(images, found, cap).all()) and torch.equal(found[0], images[0])


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
    subject, label, one = in_both(network), torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    image, moved = IMAGE.double(), MOVED.double()
    assert replay(subject, image, label, moved, "l1", 1.0, one).tolist() == [1.0]
    assert replay(subject, image, label, moved, "l1", 0.9, one).tolist() == [torch.inf]  # above the cap
    assert replay(subject, image, label, moved, "l1", None, 0.99 * one).tolist() == [torch.inf]  # too far
    assert replay(subject, image, label, spoil(moved), "l1", None, one).tolist() == [torch.inf]


def test_both_precisions_have_to_agree():
    zero, one = (small(values) for values in (([1.0, 0.0], [0.0] * 2, [0.0] * 2), ([0.0] * 2, [1.0, 0.0], [0.0] * 2)))
    for own, precise in ((zero, one), (one, zero)):
        subject = TwoPrecisions(own, copy.deepcopy(precise).double())
        for label in (0, 1):
            prediction, right = clean(subject, IMAGE, torch.tensor([label]))
            assert not bool(right) and int(prediction) == 1 - label
            assert not bool(fooled(subject, IMAGE, torch.tensor([label])))


def test_answers_do_not_depend_on_the_batch():
    """Logits within a few units of a tie, image by image, in batches of every size."""
    torch.manual_seed(0)
    network = Network.sequential((1, 4, 4), [nn.Flatten(), nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 2)])
    last = network.nodes[-1].operation
    with torch.no_grad():
        last.weight[1] = last.weight[0] + 2e-8 * torch.randn(400)
        last.bias[1] = last.bias[0]
    subject = in_both(network)
    images = torch.rand(60, 1, 4, 4, dtype=torch.float64)
    labels = torch.zeros(60, dtype=torch.int64)
    alone = [(*clean(subject, image[None], labels[:1]), fooled(subject, image[None], labels[:1])) for image in images]
    kinds = {(bool(right), bool(wrong)) for _, right, wrong in alone}
    assert {(True, False), (False, True)} <= kinds and (True, True) not in kinds
    for size in (2, 7, 60):
        for start in range(0, 60, size):
            part = slice(start, start + size)
            together = (*clean(subject, images[part], labels[part]), fooled(subject, images[part], labels[part]))
            for k, row in enumerate(zip(*together, strict=True)):
                assert [value.tolist() for value in row] == [value.tolist()[0] for value in alone[start + k]]
