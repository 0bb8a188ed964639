"""A classifier in two precisions: its answers, its checks, and what it counts as misclassified."""

import copy

import pytest
import torch
from torch import nn

from flowverify.ball import Threat
from flowverify.errors import InvalidInputError
from flowverify.network import Network
from flowverify.network.subject import Subject, surplus

IMAGE = torch.full((1, 1, 4, 4), 1 / 16)


def constant(*logits):
    """A network that always answers these."""
    linear = nn.Linear(16, len(logits))
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.tensor(logits))
    return Network.sequential((1, 4, 4), [nn.Flatten(), linear])


def random_module(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alone", [True, False])
def test_logits_in_both_precisions(dtype, alone):
    module = random_module(dtype).train()
    subject, images = Subject(module), torch.rand(7, 1, 4, 4)
    assert subject.dtype == dtype and subject.device == torch.device("cpu") and module.training
    expected, precise = module.eval(), copy.deepcopy(module).double().eval()
    own, exact = subject.logits(images, alone=alone), subject.exact_logits(images, alone=alone)
    assert own.dtype == exact.dtype == torch.float64 and not own.requires_grad and not exact.requires_grad
    torch.testing.assert_close(own, expected(images.to(dtype)).double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact, precise(images.double()), rtol=1e-12, atol=1e-12)


def test_a_module_is_copied():
    module = random_module().train()
    subject = Subject(module)
    before = subject.logits(IMAGE)
    with torch.no_grad():
        module[1].weight.zero_()
    assert torch.equal(subject.logits(IMAGE), before)
    assert not any(parameter.requires_grad for parameter in subject.own.parameters())
    network = constant(0.0, 1.0)
    assert Subject(network).own is network


@pytest.mark.parametrize("alone", [True, False])
def test_gradients_pass_through_a_call(alone):
    subject = Subject(random_module(torch.float64))
    images = torch.rand(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    logits = subject.call(subject.own, images, alone)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), images)
    expected = subject.own[4].weight[0] * (subject.own[1](images.flatten(1)) > 0)
    torch.testing.assert_close(gradient.flatten(1), expected @ subject.own[1].weight)


def test_surplus():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [torch.nan, 0.0, 0.0]])
    found = surplus(logits, torch.tensor([1, 0, 1]))
    assert found[:2].tolist() == [-1.0, 2.0] and bool(found[2].isnan())


def test_nothing_is_right_or_fooled_where_a_logit_is_nan():
    class Broken(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :3] * torch.tensor([1.0, torch.nan, 1.0], dtype=images.dtype)

    subject, labels = Subject(Broken()), torch.tensor([0])
    assert not bool(subject.clean(IMAGE, labels)[1]) and not bool(subject.fooled(IMAGE, labels))


def test_both_precisions_have_to_agree():
    zero, one = constant(1.0, 0.0, 0.0), constant(0.0, 1.0, 0.0)
    for own, precise in ((zero, one), (one, zero)):
        subject = Subject(own, copy.deepcopy(precise).double())
        for label in (0, 1):
            prediction, right = subject.clean(IMAGE, torch.tensor([label]))
            assert not bool(right) and int(prediction) == 1 - label
            assert not bool(subject.fooled(IMAGE, torch.tensor([label])))


def test_answers_do_not_depend_on_the_batch():
    """Logits within a few units of a tie, image by image, in batches of every size."""
    torch.manual_seed(0)
    network = Network.sequential((1, 4, 4), [nn.Flatten(), nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 2)])
    last = network.nodes[-1].operation
    with torch.no_grad():
        last.weight[1] = last.weight[0] + 2e-8 * torch.randn(400)
        last.bias[1] = last.bias[0]
    subject = Subject(network)
    images = torch.rand(60, 1, 4, 4, dtype=torch.float64)
    labels = torch.zeros(60, dtype=torch.int64)
    alone = [(*subject.clean(image[None], labels[:1]), subject.fooled(image[None], labels[:1])) for image in images]
    kinds = {(bool(right), bool(wrong)) for _, right, wrong in alone}
    assert {(True, False), (False, True)} <= kinds and (True, True) not in kinds
    for size in (2, 7, 60):
        for start in range(0, 60, size):
            part = slice(start, start + size)
            together = (*subject.clean(images[part], labels[part]), subject.fooled(images[part], labels[part]))
            for k, row in enumerate(zip(*together, strict=True)):
                assert [value.tolist() for value in row] == [value.tolist()[0] for value in alone[start + k]]


class Moody(nn.Module):
    """Ties for an image that is alone; in company the label 0 is ahead by as much as rounding may do."""

    def forward(self, images):
        logits = torch.ones(len(images), 2, dtype=images.dtype)
        logits[:, 1] -= float(len(images) > 1) * 4 * torch.finfo(images.dtype).eps
        return logits


@pytest.mark.parametrize("count", [1, 3, 4])
def test_near_a_tie_it_counts_what_is_answered_to_an_image_alone(count):
    subject, labels = Subject(Moody()), torch.zeros(count, dtype=torch.int64)
    predictions, right = subject.clean(IMAGE.expand(count, -1, -1, -1), labels)
    assert not bool(right.any()) and predictions.tolist() == [1] * count


class TestCheck:
    def test_what_is_valid_comes_as_a_batch(self):
        for subject in (Subject(constant(1.0, 0.0)), Subject(random_module())):
            images, labels = subject.check(IMAGE[0].half(), [1])
            assert images.shape == (1, 1, 4, 4) and images.dtype == torch.float16 and labels.tolist() == [1]
            assert [len(part) for part in subject.check(torch.ones(0, 1, 4, 4), torch.ones(0, dtype=torch.int64))] == [
                0,
                0,
            ]

    @pytest.mark.parametrize("module", [constant(1.0, 0.0, 0.0), random_module()], ids=["network", "module"])
    @pytest.mark.parametrize(
        ("images", "labels", "threat", "message"),
        [
            (-IMAGE, [0], Threat(), "expected finite and >= 0"),
            (torch.full_like(IMAGE, torch.inf), [0], Threat(), "expected finite and >= 0"),
            (0 * IMAGE, [0], Threat(), "image 0 has mass 0.0"),
            (IMAGE, [0, 1], Threat(), "expected 1 integers"),
            (IMAGE, [0.5], Threat(), "expected 1 integers"),
            (IMAGE, [3], Threat(), r"label 3 \(image 0\): expected a class of the model, 0 to 2"),
            (IMAGE, [-1], Threat(), "label -1"),
            (16 * IMAGE, [0], Threat(cap=0.5), "image 0 has a pixel of 1: expected at most the cap, 0.5"),
            (IMAGE, [0], Threat("local:5"), "a window of 5 pixels on images of 4 x 4"),
            (torch.ones(1, 1, 5, 5), [0], Threat(), "expected|on images of shape"),
        ],
    )
    def test_what_is_not_is_refused(self, module, images, labels, threat, message):
        with pytest.raises(InvalidInputError, match=message):
            Subject(module).check(images, labels, threat)

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            ("net", "model of type str: expected a torch.nn.Module"),
            (random_module().half(), "weights of type .*float16.*: expected all float32 or all float64"),
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Linear(4, 2).double()), "expected all float32 or all"),
        ],
    )
    def test_bad_models(self, module, message):
        with pytest.raises(InvalidInputError, match=message):
            Subject(module)

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (nn.Flatten(2), r"model output \(4, 1, 16\): expected logits"),
            (nn.Sequential(nn.Flatten(), nn.Linear(16, 1)), r"model output \(4, 1\): expected logits"),
            (nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), r"model Sequential on images of shape \(1, 4, 4\)"),
        ],
    )
    def test_models_that_return_no_logits(self, module, message):
        with pytest.raises(InvalidInputError, match=message):
            Subject(module).logits(IMAGE)
