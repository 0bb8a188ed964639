"""Images on the way from one to another: mass moves along paths, and arrows say where."""

import pytest
import torch

import flowverify as fv
from flowverify.figures import Change, worst_cases
from flowverify.grid import Grid
from flowverify.transport.distance import wasserstein_distance
from flowverify.transport.references import minimal_flow


def change_of(image, other) -> Change:
    (flow,) = minimal_flow(image[None], other[None])
    return Change(image, other, flow)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("shape", [(1, 7, 7), (3, 5, 4), (2, 1, 6)])
def test_paths_carry_the_whole_flow(shape, generator):
    image = torch.rand(*shape, generator=generator, dtype=torch.float64)
    other = image.flatten(1)[:, torch.randperm(shape[1] * shape[2], generator=generator)].reshape(shape)
    change = change_of(image, other)
    right, down = torch.zeros(2, *shape, dtype=torch.float64)
    for path in change.paths():
        for (i, j), (k, m) in zip(path.pixels, path.pixels[1:], strict=False):
            assert abs(i - k) + abs(j - m) == 1
            part = right if i == k else down
            part[path.channel, min(i, k), min(j, m)] += path.amount * (m - j + k - i)
    expected = Grid.of(image).split(change.flow)
    torch.testing.assert_close(right[..., :, :-1], expected[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(down[..., :-1, :], expected[1], rtol=0, atol=1e-10)


def test_mass_that_moves_three_pixels_passes_the_two_between():
    image, other = torch.zeros(2, 1, 1, 4, dtype=torch.float64)
    image[0, 0, 0], other[0, 0, 3] = 2.0, 2.0
    frames = change_of(image, other).on_the_way([0, 1 / 3, 1 / 2, 1])
    expected = [[2, 0, 0, 0], [0, 2, 0, 0], [0, 1, 1, 0], [0, 0, 0, 2]]
    assert [frame.flatten().tolist() for frame in frames] == [pytest.approx(row) for row in expected]


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 4)])
def test_images_on_the_way_lie_at_their_share_of_the_distance(shape, generator):
    image = torch.rand(*shape, generator=generator, dtype=torch.float64)
    change = change_of(image, image.flip(-1))
    (whole,) = wasserstein_distance(image[None], image.flip(-1)[None], "l1").tolist()
    shares = [0.0, 0.3, 0.75, 1.0]
    for share, frame in zip(shares, change.on_the_way(shares), strict=True):
        assert bool((frame >= 0).all())
        torch.testing.assert_close(frame.sum((1, 2)), image.sum((1, 2)))
        (distance,) = wasserstein_distance(image[None], frame[None], "l1").tolist()
        assert distance == pytest.approx(share * whole, abs=1e-8)
    torch.testing.assert_close(frame, image.flip(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("ground", "cap"), [("l1", None), ("l2", None), ("l2^2", None), ("l1", 1.0)])
def test_all_images_on_the_way_lie_in_the_ball(ground, cap):
    data, network = fv.load_dataset("digits")[:2], fv.load_model("digits-fc3")
    for case in worst_cases(network, data.images, data.labels.tolist(), [0.6, 0.6], ground, cap):
        ball = fv.WassersteinBall(0.6, ground, cap)
        for frame in case.on_the_way([0.25, 0.5, 0.8]):
            assert bool(ball.contains(case.image[None], frame[None], 1e-7)[0])


def test_arrows_are_those_of_the_largest_flows(generator):
    image = torch.rand(1, 6, 6, generator=generator, dtype=torch.float64)
    change = change_of(image, image.flip(-1))
    amounts = [arrow.amount for arrow in change.arrows()]
    assert amounts == sorted(change.flow.abs()[change.flow.abs() > 1e-3 * change.flow.abs().max()].tolist())[::-1]
    assert change.arrows(most=3) == change.arrows()[:3]
    image, other = torch.zeros(2, 1, 2, 2, dtype=torch.float64)
    image[0, 1, 0], other[0, 0, 0] = 1.0, 1.0
    (arrow,) = change_of(image, other).arrows()
    assert (arrow.start, arrow.end, arrow.channel, arrow.amount) == ((0, 1), (0, 0), 0, 1.0)


def test_arrows_of_channels_that_flow_against_each_other_are_seen_by_channel():
    image, other = torch.zeros(2, 3, 1, 2, dtype=torch.float64)
    image[0, 0, 0], other[0, 0, 1] = 1.0, 1.0
    image[2, 0, 1], other[2, 0, 0] = 1.0, 1.0
    change = change_of(image, other)
    assert change.arrows() == []
    assert {(arrow.channel, arrow.start) for arrow in change.arrows(by_channel=True)} == {(0, (0, 0)), (2, (1, 0))}
