"""Lines around activations: on their side of the curve everywhere, and touching it."""

from __future__ import annotations

import mpmath
import pytest
import torch
from torch import Tensor, nn

from flowverify.bounds.relaxations import crosses_zero, relax, relaxable
from flowverify.errors import UnsupportedOperationError
from flowverify.network.curves import CURVES, Erf, Softplus, slopes_between

ACTIVATIONS = [nn.ReLU(), *(nn.LeakyReLU(slope) for slope in (-0.4, 0.1, 1.0, 2.5)), nn.Sigmoid(), nn.Tanh()]
CURVED: list[nn.Module] = [
    nn.ELU(), nn.ELU(1.7), nn.ELU(-0.5), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(),
    nn.Softsign(), Softplus(), Erf(),
]  # fmt: skip
ENDS = [-1500.0, -30.0, -4.0, -1.0, -0.3, -1e-7, 0.0, 1e-7, 0.2, 1.0, 5.0, 40.0, 2000.0]


def intervals(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Every pair of ends, on either side of 0 and across, points among them."""
    pairs = torch.tensor([(low, high) for low in ENDS for high in ENDS if low <= high], dtype=dtype)
    return pairs[:, 0], pairs[:, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_curve_lies_between_the_lines(activation: nn.Module, dtype: torch.dtype) -> None:
    lower, upper = intervals(dtype)
    lines = relax(activation, (lower, upper))
    near_zero = torch.linspace(-6, 6, 601, dtype=dtype)
    share = torch.linspace(0, 1, 401, dtype=dtype)
    points = torch.cat([lower + share[:, None] * (upper - lower), near_zero[:, None] + 0 * lower]).clamp(lower, upper)
    values = activation(points)
    room = 4 * torch.finfo(dtype).eps * (1 + lower.abs() + upper.abs())  # of the offset
    below = values - (lines.lower_slope * points + lines.lower_offset)
    above = lines.upper_slope * points + lines.upper_offset - values
    assert (below >= -room).all() and (above >= -room).all()
    assert (below.amin(0) <= room).all() and (above.amin(0) <= room).all()


def test_every_curve_is_here() -> None:
    assert {type(curve) for curve in CURVED} == set(CURVES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curve", CURVED, ids=str)
def test_curves_lie_between_their_lines(curve: nn.Module, dtype: torch.dtype) -> None:
    lower, upper = intervals(dtype)
    lines = relax(curve, (lower, upper))
    share = torch.linspace(0, 1, 401, dtype=dtype)
    near_zero = torch.linspace(-6, 6, 601, dtype=dtype)
    points = torch.cat([lower + share[:, None] * (upper - lower), near_zero[:, None] + 0 * lower]).clamp(lower, upper)
    values = curve(points)
    room = 16 * torch.finfo(dtype).eps * (1 + lower.abs() + upper.abs())  # of the offset
    below = values - (lines.lower_slope * points + lines.lower_offset)
    above = lines.upper_slope * points + lines.upper_offset - values
    assert (below >= -room).all() and (above >= -room).all()
    short = upper - lower < 2
    assert (below.amin(0) <= room + 0.01 * (upper - lower))[short].all()
    assert (above.amin(0) <= room + 0.01 * (upper - lower))[short].all()


@pytest.mark.parametrize("curve", CURVED, ids=str)
def test_what_is_said_about_curves_holds_in_many_digits(curve: nn.Module) -> None:
    """Slopes against mpmath's derivatives of the definition; bends and the steepest slope against a fine grid."""
    functions = {
        nn.ELU: lambda x: x if x > 0 else mpmath.mpf(float(curve.alpha)) * mpmath.expm1(x),
        nn.SiLU: lambda x: x / (1 + mpmath.exp(-x)),
        nn.Mish: lambda x: x * mpmath.tanh(mpmath.log(1 + mpmath.exp(x))),
        nn.Hardswish: lambda x: x * min(max(x + 3, mpmath.mpf(0)), mpmath.mpf(6)) / 6,
        nn.Softsign: lambda x: x / (1 + abs(x)),
        Softplus: lambda x: mpmath.log(1 + mpmath.exp(x)),
        Erf: mpmath.erf,
        nn.GELU: (lambda x: x * (1 + mpmath.erf(x / mpmath.sqrt(2))) / 2)
        if getattr(curve, "approximate", "") == "none"
        else (lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)))),
    }
    function, known = functions[type(curve)], CURVES[type(curve)](curve)
    grid = torch.linspace(-8.03, 8.01, 300, dtype=torch.float64)
    with mpmath.workdps(40):
        slopes = torch.tensor([float(mpmath.diff(function, mpmath.mpf(x))) for x in grid.tolist()], dtype=torch.float64)
        values = torch.tensor([float(function(mpmath.mpf(x))) for x in grid.tolist()], dtype=torch.float64)
        turning = [
            float(mpmath.diff(function, mpmath.mpf(place))) for place in known.turns if type(curve) is not nn.ELU
        ]
    torch.testing.assert_close(known.slope(grid), slopes, rtol=0, atol=1e-13)
    torch.testing.assert_close(curve(grid), values, rtol=0, atol=1e-14)
    assert all(abs(slope) < 1e-14 for slope in turning)
    assert float(slopes.abs().max()) <= known.steepest * (1 + 1e-14)
    assert known.at_zero == float(curve(torch.zeros((), dtype=torch.float64)))
    dense = torch.linspace(-8, 8, 20001, dtype=torch.float64)
    fine = known.slope(dense)
    for begin in range(0, 20000, 1250):
        part = slice(begin, begin + 1251)
        least, largest = slopes_between(known, dense[begin], dense[begin + 1250])
        assert float(fine[part].min()) >= float(least) - 1e-13 and float(fine[part].max()) <= float(largest) + 1e-13


@pytest.mark.parametrize("slope", [0.0, 0.1, 2.5])
def test_between_pieces_one_line_is_the_chord_and_the_other_leaves_the_smaller_area(slope: float) -> None:
    ends = torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 1.0])
    lines = relax(nn.LeakyReLU(slope), ends)
    chord, piece = (lines.upper_slope, lines.lower_slope) if slope < 1 else (lines.lower_slope, lines.upper_slope)
    torch.testing.assert_close(chord, (ends[1] - slope * ends[0]) / (ends[1] - ends[0]))
    torch.testing.assert_close(piece, torch.tensor([1.0, slope]))


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *CURVED], ids=str)
def test_what_is_not_a_number_gives_no_line(activation: nn.Module) -> None:
    ends = torch.tensor([torch.nan, -1.0]), torch.tensor([1.0, torch.nan])
    lines = relax(activation, ends)
    assert torch.isnan(lines.lower_offset).all() and torch.isnan(lines.upper_offset).all()


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *CURVED], ids=str)
def test_gradients_are_those_of_differences(activation: nn.Module) -> None:
    ends = [
        torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in ((-1.0, 0.3, -2.0), (2.0, 0.9, -0.7))
    ]

    def lines(lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
        found = relax(activation, (lower, upper))
        return found.lower_slope, found.lower_offset, found.upper_slope, found.upper_offset

    assert torch.autograd.gradcheck(lines, ends, atol=1e-6)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *CURVED], ids=str)
def test_gradients_are_finite_on_points(activation: nn.Module) -> None:
    ends = [torch.tensor([-2.0, 0.0, 1e-30, 3.0], requires_grad=True) for _ in range(2)]
    lines = relax(activation, (ends[0], ends[1]))
    total = (lines.lower_slope + lines.lower_offset + lines.upper_slope + lines.upper_offset).sum()
    for gradient in torch.autograd.grad(total, ends, allow_unused=True):
        assert gradient is None or bool(torch.isfinite(gradient).all())


def test_other_operations_are_named() -> None:
    interval = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    assert not relaxable(nn.MaxPool2d(2))
    with pytest.raises(UnsupportedOperationError, match="of MaxPool2d: expected an elementwise activation"):
        relax(nn.MaxPool2d(2), interval)


def test_crossing_zero_means_both_sides() -> None:
    assert crosses_zero((torch.tensor([-1.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 0.0]))).tolist() == [
        True,
        False,
        False,
    ]
