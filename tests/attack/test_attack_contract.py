"""What holds for every attack: its claims are true, and they do not depend on how the images are batched."""

import pytest
import torch
from problems import assert_claims_hold, colour_problem, digits
from torch import nn

import flowverify as fv
from flowverify.attack import ATTACKS, BaseAttack, Schedule, make_attack
from flowverify.errors import InvalidInputError, UnknownNameError

FAST = {
    "flow-pgd": {"iterations": 10},
    "sinkhorn": {"schedule": Schedule(0.05, 1.3, 3, 45), "projection_iterations": 50},
    "frank-wolfe": {"iterations": 8},
    "minimal": {"effort": "fast"},
}
names = pytest.mark.parametrize("name", sorted(ATTACKS))


def test_every_attack_is_here():
    assert set(FAST) == set(ATTACKS)


@names
class TestClaims:
    @pytest.mark.parametrize(("ground", "cap"), [("l1", None), ("l2", None), ("l2", 1.0)])
    def test_nearest(self, name, ground, cap):
        network, images, labels = digits(6)
        result = make_attack(name, network, **FAST[name]).minimise(images, labels, ground, cap)
        assert_claims_hold(result, network, images, labels)
        assert result.outcome.count("found") == 6 and float(result.radius.max()) < 1.5

    def test_ends_when_its_time_is_over(self, name):
        network, images, labels = digits(3)
        late = make_attack(name, network, **FAST[name], timeout=1e-12)
        for result in (late.minimise(images, labels), late.run(images, labels, fv.WassersteinBall(0.3))):
            assert_claims_hold(result, network, images, labels)
            for outcome, note in zip(result.outcome, result.note, strict=True):
                assert outcome == "found" or note.endswith(" within 1e-12 s an image")
        assert name == "minimal" or "found" not in result.outcome
        early = make_attack(name, network, **FAST[name], timeout=3600.0).minimise(images, labels)
        assert torch.equal(early.radius, make_attack(name, network, **FAST[name]).minimise(images, labels).radius)
        with pytest.raises(InvalidInputError, match="timeout 0: expected a number of seconds > 0"):
            make_attack(name, network, timeout=0)

    @pytest.mark.parametrize(("ground", "radius", "cap"), [("l1", 0.3, None), ("l2", 0.3, 1.0), ("l1", 0.06, None)])
    def test_within_a_radius(self, name, ground, radius, cap):
        network, images, labels = digits(6)
        ball = fv.WassersteinBall(radius, ground, cap)
        result = make_attack(name, network, **FAST[name]).run(images, labels, ball)
        assert_claims_hold(result, network, images, labels, radius)
        assert bool(ball.contains(images.double()[result.found], result.images[result.found]).all())
        if radius == 0.3:
            assert int(result.found.sum()) >= 4

    @pytest.mark.parametrize("ground", ["l2^2", "l1^1.5", "local:5", "local:3:l1"])
    def test_every_ground_cost(self, name, ground):
        """What is claimed holds, no claim is below a certificate, and the direct search finds something."""
        network, images, labels = digits(4)
        result = make_attack(name, network, **FAST[name]).minimise(images, labels, ground)
        assert_claims_hold(result, network, images, labels)
        certified = fv.certified_radius(network, images, labels, bound="crown-ibp", ground=ground)
        assert bool((result.radius >= certified).all()) and bool((certified > 0).any())
        if name in ("minimal", "frank-wolfe"):
            assert result.outcome.count("found") == 4

    def test_colour(self, name):
        network, images, labels = colour_problem()
        result = make_attack(name, network, **FAST[name]).minimise(images, labels, "l2")
        assert_claims_hold(result, network, images, labels)
        assert result.outcome.count("found") >= 3

    def test_batches_change_nothing(self, name):
        network, images, labels = digits(3)
        together, apart = (
            make_attack(name, network, batch_size=size, **FAST[name]).minimise(images, labels) for size in (3, 2)
        )
        torch.testing.assert_close(apart.radius, together.radius, rtol=1e-5, atol=0)
        assert apart.outcome == together.outcome

    def test_never_below_a_certificate(self, name):
        network, images, labels = digits(7)
        certified = fv.certified_radius(network, images, labels, bound="crown")
        found = make_attack(name, network, **FAST[name]).minimise(images, labels)
        assert bool((found.radius >= certified).all()) and bool((certified > 0).any())
        ball = fv.WassersteinBall(float(certified[certified > 0].min()) * 0.999)
        inside = make_attack(name, network, **FAST[name]).run(images[certified > 0], labels[certified > 0], ball)
        assert "found" not in inside.outcome

    def test_misclassified_images_have_radius_zero(self, name):
        network, images, labels = digits(2)
        attack = make_attack(name, network, **FAST[name])
        for result in (attack.minimise(images, labels + 1), attack.run(images, labels + 1, fv.WassersteinBall(0.1))):
            assert result.outcome == ("misclassified", "misclassified")
            assert result.radius.tolist() == [0, 0] and bool(result.found.all())

    def test_a_constant_network_is_not_fooled(self, name):
        _, images, _ = digits(2)
        constant = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        with torch.no_grad():
            constant[1].weight.zero_()
            constant[1].bias.copy_(torch.tensor([1.0, 0.0, 0.5]))
        attack = make_attack(name, constant, **FAST[name])
        labels = torch.zeros(2, dtype=torch.int64)
        for result in (attack.minimise(images, labels), attack.run(images, labels, fv.WassersteinBall(0.5))):
            assert result.outcome == ("not found", "not found")
            assert torch.equal(result.images, images.double()) and result.note[0] == "the search found none"
            assert result.to_json(0)["radius"] is None

    def test_an_image_that_cannot_change(self, name):
        """All pixels at the cap: no other image has this mass."""
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        images = torch.ones(1, 1, 4, 4)
        labels = network(images).argmax(1)
        result = make_attack(name, network, **FAST[name]).minimise(images, labels, "l1", cap=1.0)
        assert result.outcome == ("not found",)

    def test_float64_and_single_images(self, name):
        network, images, labels = digits(1)
        result = make_attack(name, network.double(), **FAST[name]).minimise(images[0], labels[0])
        assert_claims_hold(result, network, images, labels)
        assert result.images.shape == (1, 1, 8, 8) and result.images.dtype == torch.float64

    def test_the_user_network_stays_as_it_is(self, name):
        network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)).train()
        _, images, labels = digits(2)
        make_attack(name, network, **FAST[name]).run(images, labels, fv.WassersteinBall(0.01))
        assert network.training and all(p.requires_grad and p.grad is None for p in network.parameters())


class _Lying(BaseAttack):
    """Returns whatever it is told to."""

    name = "lying"
    answer = None

    def search(self, batch):
        return self.answer(batch)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "answer",
    [
        lambda batch: batch.images * torch.nan,
        lambda batch: batch.images - 5,
        lambda batch: torch.zeros_like(batch.images),
        lambda batch: torch.full_like(batch.images, torch.inf),
        lambda batch: 3 * batch.images.flip(-1) - 0.2,
        lambda batch: torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(0)),
        lambda batch: batch.images.float().flip(-2) + 1e-3,
    ],
)
@pytest.mark.parametrize("cap", [None, 1.0])
def test_a_lying_attack_is_not_believed(answer, cap):
    network, images, labels = digits(5)
    attack = _Lying(network)
    attack.answer = answer
    for radius in (0.0, 0.05, 2.0):
        result = attack.run(images, labels, fv.WassersteinBall(radius, "l2", cap))
        assert_claims_hold(result, network, images, labels, radius)
        if radius == 0:
            assert set(result.outcome) == {"not found"}
    assert_claims_hold(attack.minimise(images, labels, "l1", cap), network, images, labels)


def test_what_is_found_and_fails_is_said():
    network, images, labels = digits(3)
    attack = _Lying(network)
    attack.answer = lambda batch: batch.images * (1 + 1e-3 * torch.rand(batch.images.shape[-3:]))
    result = attack.run(images, labels, fv.WassersteinBall(0.1))
    assert set(result.note) == {"what the search offered did not pass the check"}


class TestBadInput:
    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (torch.full((1, 1, 8, 8), torch.nan), [0], "expected finite and >= 0"),
            (torch.full((1, 1, 8, 8), -1.0), [0], "expected finite and >= 0"),
            (torch.zeros(1, 1, 8, 8), [0], "mass 0"),
            (torch.ones(1, 1, 9, 8), [0], "on images of shape|expected"),
            (torch.ones(2, 1, 8, 8), [0], "expected 2 integers"),
            (torch.ones(1, 1, 8, 8), [10], "label 10 .image 0.: expected a class of the model, 0 to 9"),
            (torch.ones(1, 1, 8, 8), [0.5], "expected 1 integers"),
            (torch.ones(1, 1, 8, 8, dtype=torch.int64), [0], "expected a floating-point dtype"),
            (torch.full((1, 1, 8, 8), 1.5), [0], "image 0 has a pixel of 1.5: expected at most the cap, 1"),
            (torch.ones(0, 1, 8, 8), [], "given none"),
        ],
    )
    def test_images_and_labels(self, images, labels, message):
        network, _, _ = digits(1)
        attack = make_attack("minimal", network)
        dtype = None if labels else torch.int64
        with pytest.raises(InvalidInputError, match=message):
            attack.minimise(images, torch.tensor(labels, dtype=dtype), "l1", 1.0)

    def test_models(self):
        with pytest.raises(InvalidInputError, match="expected a torch.nn.Module"):
            make_attack("minimal", lambda x: x)
        with pytest.raises(InvalidInputError, match="expected all float32"):
            make_attack("minimal", nn.Linear(2, 2).half())
        with pytest.raises(InvalidInputError, match="expected logits of shape"):
            make_attack("minimal", nn.Flatten(0)).minimise(torch.ones(1, 1, 2, 2), torch.tensor([0]))

    def test_names_and_options(self):
        network, images, labels = digits(1)
        with pytest.raises(UnknownNameError, match="unknown attack 'pgd': expected one of MODULE:CLASS, flow-pgd"):
            make_attack("pgd", network)
        with pytest.raises(UnknownNameError, match="unknown ground cost"):
            make_attack("minimal", network).minimise(images, labels, "l7")
        with pytest.raises(UnknownNameError, match="unknown effort 'much'"):
            make_attack("minimal", network, effort="much")
        with pytest.raises(InvalidInputError, match="batch_size 0"):
            make_attack("minimal", network, batch_size=0)
        with pytest.raises(InvalidInputError, match="iterations 0"):
            make_attack("frank-wolfe", network, iterations=0)
        with pytest.raises(UnknownNameError, match="unknown projection"):
            make_attack("flow-pgd", network, projection="l3")
        with pytest.raises(UnknownNameError, match="unknown norm"):
            make_attack("sinkhorn", network, norm="l1")
        with pytest.raises(InvalidInputError, match="expected first > 0"):
            Schedule(0.0, 1.1, 10, 20)


class _PrecisionDependent(nn.Module):
    """In float32 only the clean image is classified as 0; in float64 all images are."""

    def __init__(self, clean):
        super().__init__()
        self.clean = clean

    def forward(self, images):
        moved = (images.double() - self.clean).abs().flatten(1).sum(1) > 1e-3
        other = torch.where(moved & (images.dtype == torch.float32), 2.0, 0.0)
        return torch.stack([torch.ones_like(other), other], 1).to(images.dtype)


def test_both_precisions_have_to_be_fooled():
    clean = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    attack = _Lying(_PrecisionDependent(clean.double()))
    attack.answer = lambda batch: batch.images.flip(-1)
    for result in (
        attack.run(clean, torch.tensor([0]), fv.WassersteinBall(3.0)),
        attack.minimise(clean, torch.tensor([0])),
    ):
        assert result.outcome == ("not found",) and torch.equal(result.images, clean.double())
