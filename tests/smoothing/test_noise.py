"""Noise: its distribution, that flows are applied by Delta, and that no batching changes a sample."""

import numpy as np
import pytest
import scipy.stats
import torch

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid
from flowverify.smoothing import DISTRIBUTIONS, DOMAINS, Noise, noisy_images
from flowverify.smoothing.noise_kernel import draw_bits, to_laplace, to_uniform
from flowverify.smoothing.sampling import GAMMA, MASK, derive_key, from_integers, halves, integers, mix, words

KINDS = [(domain, distribution) for domain in DOMAINS for distribution in DISTRIBUTIONS]
SHAPES = [(1, 6, 5), (3, 4, 4), (1, 1, 7), (2, 5, 1), (1, 1, 1)]


def image_of(shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def test_counter_is_splitmix64():
    # The first outputs of the reference implementation (Vigna, splitmix64.c) for the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [mix((1234567 + (k + 1) * GAMMA) & MASK) for k in range(4)] == expected
    assert [int(word) % 2**64 for word in words(1234567, 0, 4)] == expected
    assert [int(word) % 2**64 for word in words(1234567, 2, 2)] == expected[2:]


@pytest.mark.parametrize("first", [0, 1, 6, 1001])
def test_compiled_bits_are_those_of_torch(first):
    key = derive_key(3, 1, 4)
    bits = np.empty(64, np.uint32)
    draw_bits(np.uint64(key), first - first % 2, bits)
    assert (halves(key, first, 60).numpy() % 2**32 == bits[first % 2 :][:60]).all()


def test_keys_differ():
    keys = {derive_key(seed, position, stage) for seed in range(5) for position in range(100) for stage in range(3)}
    assert len(keys) == 1500


@pytest.mark.parametrize(("distribution", "convert"), [("laplace", to_laplace), ("uniform", to_uniform)])
def test_conversion_is_exact_to_rounding(distribution, convert):
    bits = np.empty(200_000, np.uint32)
    draw_bits(np.uint64(7), 0, bits)
    bits[:6] = [0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF]  # the ends of both signs
    noise = np.empty(bits.size, np.float32)
    convert(bits, np.float32(1), noise)
    if distribution == "laplace":
        share = ((bits & np.uint32(0x7FFFFFFF)).astype(np.float64) + 1) / 2**31
        exact = -np.log(share) * np.where(bits < 2**31, 1, -1)
        law = scipy.stats.laplace()
    else:
        exact = bits.astype(np.int32) / 2**31
        law = scipy.stats.uniform(-1, 2)
    assert np.abs(noise - exact).max() < 2e-6
    torch_noise = from_integers(torch.from_numpy(bits.astype(np.int32).astype(np.int64)), distribution)
    assert np.abs(torch_noise.numpy() - exact).max() < 2e-6
    assert scipy.stats.kstest(noise[6:], law.cdf).pvalue > 1e-3


@pytest.mark.parametrize(("domain", "distribution"), KINDS)
def test_deviation_is_sigma_times_mass(domain, distribution):
    image = image_of((1, 8, 8)) * 3
    noise = Noise(0.02, domain, distribution)
    moved = (noisy_images(image, noise, 5, 0, 4000) - image).double() / float(image.sum())
    # A pixel away from the border is the sum of the noise on 4 edges, or has its own.
    expected = 0.02 * (2.0 if domain == "flow" else 1.0)
    assert float(moved[:, 0, 2:6, 2:6].std()) == pytest.approx(expected, rel=0.03)
    assert float(moved.mean()) == pytest.approx(0, abs=1e-3)
    drawn = noise.draw(Grid.of(image), 4000, torch.Generator().manual_seed(0))
    assert float(drawn[:, 0, 2:6, 2:6].std()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_flows_are_applied_by_delta(shape, distribution):
    image, noise = image_of(shape), Noise(0.1, "flow", distribution)
    grid = Grid.of(image)
    flows = from_integers(integers(noise, grid, 9, 3, 2), distribution)
    flows = flows.double() * noise.scale * float(image.double().sum())
    dense = torch.from_numpy(grid.incidence_scipy().toarray())
    expected = image.double() + (flows @ dense.T).reshape(2, *shape)
    torch.testing.assert_close(noisy_images(image, noise, 9, 3, 2).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("domain", "distribution"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_and_compiled_samples_agree(domain, distribution, shape):
    image, noise = image_of(shape), Noise(0.1, domain, distribution)
    values = from_integers(integers(noise, Grid.of(image), 2, 0, 7), distribution) * noise.scale
    values = values * float(image.double().sum())
    moved = Grid.of(image).divergence(values) if domain == "flow" else values.reshape(7, *shape)
    torch.testing.assert_close(noisy_images(image, noise, 2, 0, 7), image + moved, rtol=1e-5, atol=1e-5)


def test_every_channel_keeps_its_mass_on_flows_only():
    image = image_of((3, 6, 6))
    masses = image.double().sum(dim=(1, 2))
    flow = noisy_images(image, Noise(0.5), 1, 0, 50).double().sum(dim=(2, 3))
    torch.testing.assert_close(flow, masses.expand(50, 3), rtol=1e-4, atol=1e-4)
    pixels = noisy_images(image, Noise(0.5, "pixels"), 1, 0, 50).double().sum(dim=(2, 3))
    assert float((pixels - masses).abs().min()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("domain", "distribution"), KINDS)
def test_a_sample_depends_on_its_number_alone(domain, distribution, dtype):
    image, noise = image_of((2, 5, 4), dtype), Noise(0.1, domain, distribution)
    whole = noisy_images(image, noise, 11, 0, 300)
    assert whole.dtype == dtype
    parts = [noisy_images(image, noise, 11, start, 7) for start in range(0, 294, 7)]
    assert torch.equal(torch.cat(parts), whole[:294])
    assert not torch.equal(noisy_images(image, noise, 12, 0, 300), whole)


def test_samples_of_an_image_are_uncorrelated():
    noise = noisy_images(torch.ones(1, 4, 4), Noise(0.1, "pixels"), 3, 0, 4000).flatten(1).double().numpy()
    neighbours = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    pixels = np.corrcoef(noise.T) - np.eye(16)
    assert abs(neighbours) < 0.02 and np.abs(pixels).max() < 0.08


@pytest.mark.parametrize("sigma", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_sigma_is_checked(sigma):
    with pytest.raises(InvalidInputError, match="noise sigma: given .*, expected"):
        Noise(sigma)


def test_names_are_checked():
    with pytest.raises(UnknownNameError, match="unknown noise domain 'edges': expected one of flow, pixels"):
        Noise(0.1, "edges")
    with pytest.raises(UnknownNameError, match="unknown noise distribution 'gauss': expected one of laplace, uniform"):
        Noise(0.1, "flow", "gauss")
