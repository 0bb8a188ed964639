"""Confidence bounds against their definitions and SciPy's own tests."""

import numpy as np
import pytest
import scipy.stats

from flowverify.errors import InvalidInputError
from flowverify.smoothing.noise import lower_confidence_bound, top_two_p_values, upper_bound_of_failure


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
@pytest.mark.parametrize(("successes", "samples"), [(1, 1), (3, 10), (9, 10), (990, 1000), (9999, 10_000)])
def test_bound_is_where_so_many_successes_have_probability_alpha(successes, samples, alpha):
    bound = float(lower_confidence_bound(successes, samples, alpha))
    assert scipy.stats.binom.sf(successes - 1, samples, bound) == pytest.approx(alpha, rel=1e-9)
    # As the one-sided interval of SciPy's test.
    interval = scipy.stats.binomtest(successes, samples).proportion_ci(1 - 2 * alpha, "exact")
    if alpha < 0.5:
        assert bound == pytest.approx(interval.low, rel=1e-8)


def test_certainty_and_failure():
    assert upper_bound_of_failure(1000, 1000, 0.05) == pytest.approx(1 - 0.05 ** (1 / 1000), rel=1e-10)
    assert upper_bound_of_failure(10**7, 10**7, 1e-6) == pytest.approx(-np.log(1e-6) / 10**7, rel=1e-5)
    assert upper_bound_of_failure([0, 0], 10, 0.05).tolist() == [1.0, 1.0]


def test_monotone_in_successes_and_alpha():
    counts = np.arange(101)
    bounds = upper_bound_of_failure(counts, 100, 0.05)
    assert (np.diff(bounds[1:]) < 0).all() and bounds.min() > 0 and bounds.max() <= 1
    assert (upper_bound_of_failure(counts, 100, 0.2) <= bounds).all()


@pytest.mark.parametrize(("first", "second"), [(5, 5), (60, 40), (59, 41), (100, 0), (7, 2), (5100, 4900)])
def test_top_two_is_the_binomial_test(first, second):
    assert top_two_p_values(first, second) == pytest.approx(scipy.stats.binomtest(first, first + second).pvalue)


@pytest.mark.parametrize("alpha", [0, 1, -0.1, float("nan"), True, "0.05"])
def test_alpha_is_checked(alpha):
    with pytest.raises(InvalidInputError, match="alpha: given .*, expected a number between 0 and 1"):
        upper_bound_of_failure(5, 10, alpha)


@pytest.mark.parametrize("samples", [0, -3, 2.5, True])
def test_samples_are_checked(samples):
    with pytest.raises(InvalidInputError, match="n: given .* samples, expected an integer >= 1"):
        upper_bound_of_failure(1, samples, 0.05)


def test_successes_are_checked():
    with pytest.raises(InvalidInputError, match="successes: given 11 to 11, expected 0 to 10"):
        upper_bound_of_failure(11, 10, 0.05)
