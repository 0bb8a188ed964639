"""Medians of both ends, and what counts as a closed bracket."""

import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowverify.certifiers.base import (
    CLOSED,
    TOLERANCE,
    Ends,
    bracketed,
    count_closed,
    ends_of,
    median_certified,
    median_text,
    median_upper,
)

RADIUS = st.floats(0, 10)
ENDS = st.tuples(RADIUS, RADIUS).map(lambda pair: Ends(min(pair), max(pair)))


@given(st.lists(ENDS, min_size=1, max_size=9))
def test_the_median_of_exact_radii_lies_between(ends):
    middle = [(one.certified + one.upper) / 2 for one in ends]
    assert median_certified(ends) <= median(middle) <= median_upper(ends)


@pytest.mark.parametrize(
    ("record", "ends"),
    [
        ({"verdict": "certified", "radius": 0.1, "upper_radius": 0.2}, Ends(0.1, 0.2)),
        ({"verdict": "certified", "radius": 0.1}, Ends(0.1, math.inf)),
        ({"verdict": "timeout", "radius": 0.1, "upper_radius": 0.2}, Ends(0.0, 0.2)),
        ({"verdict": "falsified", "radius": None, "upper_radius": 0.2}, Ends(0.0, 0.2)),
        ({"verdict": "misclassified", "radius": 0.0}, Ends(0.0, 0.0)),
        ({"verdict": "done"}, Ends(0.0, math.inf)),
    ],
)
def test_ends_of_records(record, ends):
    assert ends_of(record) == ends


def test_a_bracket_is_closed_to_the_tolerance_of_the_search():
    assert f"closed to {100 * TOLERANCE:g}%" == CLOSED
    assert Ends(0.1, 0.1 * (1 + TOLERANCE)).closed and not Ends(0.1, 0.10101).closed
    assert not Ends(0.1).closed and not Ends(0.0, 0.1).closed
    assert count_closed([Ends(0.1, 0.1), Ends(0.1, 0.2), Ends(0.3)]) == "1 of 3"


def test_words():
    assert median_text([Ends(0.1), Ends(0.3)], "W1, l2") == "median radius 0.2000 pixels (W1, l2)"
    both = median_text([Ends(0.1, 0.2), Ends(0.3, 0.4)], "W1, l2")
    assert both == "median radius 0.2000 pixels certified, 0.3000 at most (W1, l2)"
    assert "no upper end for half of them or more" in median_text([Ends(0.1, 0.2), Ends(0.3)], "W1, l2")
    assert not bracketed([Ends(0.1)]) and not bracketed([Ends(0.0, 0.0)]) and bracketed([Ends(0.0, 0.1)])
