"""Networks in exact arithmetic: rational where all steps are rational, else floating-point of 600 bits.

The values of :class:`benchmarks.soundness.networks.Wired` are computed once more, step by step, from the definition
of each operation. With ``magnitudes`` the same steps bound what float64 may have rounded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from mpmath import mp, mpf
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack
from torch import Tensor, nn

from benchmarks.soundness.balls import HIGHS, Moves, Threat
from benchmarks.soundness.networks import Normalise, Wired, moves_data
from flowverify.network import Add, ScaleShift, Subtract

PRECISION = 600
AGREEMENT = 5e-6  # of the plans to a tie and to a little beyond it, relative
ROUNDINGS = 256 * 2.0**-53  # more than a network of this size rounds, relative to its magnitudes

Array = NDArray[Any]


class NotExact(Exception):  # noqa: N818 - no error: the caller then does without
    """An operation that is not written down here."""


def exact_margins(network: Wired, image: Array, label: int) -> list[Any]:
    """f_y - f_t for t != y at an image of Fractions (C, H, W), as Fractions or mpf of which the sign is sure.

    Raises:
        NotExact: an operation that is not known, or a result that 600 bits do not decide.
    """
    rational = all(_is_rational(step) for step in network.steps) and image.size <= 16
    with mp.workprec(PRECISION):
        convert: Callable[[Any], Any] = Fraction if rational else _to_mpf
        values = _evaluate(network, np.frompyfunc(convert, 1, 1)(image), convert).reshape(-1)
        margins = [values[label] - value for t, value in enumerate(values) if t != label]
        if not rational:
            largest = max(abs(value) for value in values)
            if any(abs(margin) <= largest * mpf(2) ** (-PRECISION // 2) for margin in margins):
                raise NotExact("undecided")
        return margins


def magnitudes(network: Wired, image: Tensor) -> Tensor:
    """What bounds the rounding of every output in float64: |weights| applied to |values|, all the way (Higham)."""
    with np.errstate(all="ignore"):
        return torch.from_numpy(_evaluate(network, image.double().numpy(), None).astype(np.float64).reshape(-1))


def rational_point(image: Tensor, point: Tensor, threat: Threat, radius: float) -> Array | None:
    """An image of Fractions within the radius for sure, next to a point (C, n) that float64 puts there.

    What rounding may have added to the cost of the plan is at most a share of mass times diameter.
    """
    budget = threat.budget(image, radius)
    slack = 1e-14 * float(image.sum()) * threat.diameter**threat.power * image.numel()
    if not slack < budget / 4:
        return None
    share = 1 - Fraction(2 * slack / budget)
    exact = np.frompyfunc(Fraction, 1, 1)
    centre, found = exact(image.double().numpy()), exact(point.double().numpy())
    found = centre + share * (found - centre)
    for channel in range(len(centre)):
        largest = int(np.argmax(found[channel]))
        found[channel, largest] += centre[channel].sum() - found[channel].sum()
    inside = all(value >= 0 and (threat.cap is None or value <= threat.cap) for value in found.flat)
    return found if inside else None


def _is_rational(step: nn.Module) -> bool:
    return not isinstance(step, nn.Sigmoid | nn.Tanh | nn.BatchNorm1d | nn.BatchNorm2d)


def _to_mpf(value: Any) -> Any:
    if isinstance(value, Fraction):
        return mpf(value.numerator) / mpf(value.denominator)
    return mpf(float(value)) if not isinstance(value, mpf) else value


def _evaluate(network: Wired, image: Array, convert: Callable[[Any], Any] | None) -> Array:
    values = [image]
    for step, inputs in zip(network.sequence, network.wiring, strict=True):
        values.append(_step(step, [values[k] for k in inputs], convert))
    return values[-1]


def _step(step: nn.Module, inputs: list[Array], convert: Callable[[Any], Any] | None) -> Array:
    """One operation on one sample; without ``convert`` on magnitudes, with absolute values of all constants."""
    value, absolute = inputs[0], convert is None

    def constant(tensor: Tensor | None) -> Array:
        numbers = np.zeros(()) if tensor is None else tensor.detach().double().numpy()
        return np.abs(numbers) if convert is None else np.asarray(np.frompyfunc(convert, 1, 1)(numbers), dtype=object)

    match step:
        case nn.Linear():
            return value @ constant(step.weight).T + constant(step.bias)
        case nn.Conv2d():
            return _convolution(step, value, constant)
        case nn.AvgPool2d() | nn.AdaptiveAvgPool2d():
            matrix = _on_basis(step, value.shape)
            shares = np.frompyfunc(lambda share: Fraction(float(share)).limit_denominator(10_000), 1, 1)(matrix)
            numbers = matrix if convert is None else np.frompyfunc(convert, 1, 1)(shares)
            return (numbers @ value.reshape(-1)).reshape(_shape(step, value.shape))
        case nn.MaxPool2d():
            members = _on_basis(step, value.shape) == 1
            flat = value.reshape(-1)
            return np.array([max(flat[own]) for own in members], dtype=value.dtype).reshape(_shape(step, value.shape))
        case nn.ReLU():
            return value if absolute else np.where(value > 0, value, 0 * value)
        case nn.LeakyReLU():
            slope = step.negative_slope
            return (
                value * max(1.0, abs(slope)) if convert is None else np.where(value > 0, value, value * convert(slope))
            )
        case nn.Sigmoid():
            return value + 1 if absolute else np.frompyfunc(lambda x: 1 / (1 + mp.exp(-x)), 1, 1)(value)
        case nn.Tanh():
            return value + 1 if absolute else np.frompyfunc(mp.tanh, 1, 1)(value)
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            side = (-1,) + (1,) * (value.ndim - 1)
            mean, bias = constant(step.running_mean).reshape(side), constant(step.bias).reshape(-1, *side[1:])
            weight = constant(torch.ones(1) if step.weight is None else step.weight).reshape(-1, *side[1:])
            variance = constant(step.running_var).reshape(side) + (step.eps if convert is None else convert(step.eps))
            root = np.sqrt(variance) if absolute else np.frompyfunc(mp.sqrt, 1, 1)(variance)
            return (value + mean if absolute else value - mean) / root * weight + bias
        case Normalise():
            mean = constant(step.mean)
            return (value + mean if absolute else value - mean) / constant(step.deviation)
        case ScaleShift():
            return value * constant(step.scale) + constant(step.shift)
        case nn.Dropout() | nn.Dropout2d() | nn.Identity():
            return value
        case Add():
            return sum(inputs[1:], start=value)
        case Subtract():
            return value + inputs[1] if absolute else value - inputs[1]
    if moves_data(step):
        return _moved(step, inputs)
    raise NotExact(type(step).__name__)


def _shape(step: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(step.double()(torch.zeros(1, *shape, dtype=torch.float64)).shape[1:])


def _on_basis(step: nn.Module, shape: tuple[int, ...]) -> Array:
    """The values (outputs, inputs) of an operation without weights at all images with one pixel lit."""
    size = math.prod(shape)
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return step(basis).reshape(size, -1).T.numpy()


def _convolution(step: nn.Conv2d, value: Array, constant: Callable[[Tensor | None], Array]) -> Array:
    kernel, dilation = step.weight.shape[-2:], step.dilation
    if isinstance(step.padding, str):
        spans = [d * (k - 1) if step.padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        rows, columns = ((span // 2, span - span // 2) for span in spans)
    else:
        rows, columns = ((side, side) for side in step.padding)
    padded = np.pad(value, ((0, 0), rows, columns), constant_values=0)
    height, width = (
        (padded.shape[axis + 1] - dilation[axis] * (kernel[axis] - 1) - 1) // step.stride[axis] + 1 for axis in (0, 1)
    )
    weight, bias = constant(step.weight), constant(step.bias).reshape(-1)
    outputs, own = weight.shape[:2]
    result = np.zeros((outputs, height, width), dtype=value.dtype) * value.flat[0]
    for out in range(outputs):
        first = out // (outputs // step.groups) * own
        for row, column in itertools.product(range(kernel[0]), range(kernel[1])):
            top, left = row * dilation[0], column * dilation[1]
            window = padded[
                first : first + own,
                top : top + (height - 1) * step.stride[0] + 1 : step.stride[0],
                left : left + (width - 1) * step.stride[1] + 1 : step.stride[1],
            ]
            result[out] = result[out] + (window * weight[out, :, row, column][:, None, None]).sum(0)
        result[out] = result[out] + bias[out % len(bias)]
    return result


def _moved(step: nn.Module, inputs: list[Array]) -> Array:
    """An operation that only moves entries, or puts zeros: found by what it does to their numbers, from 1."""
    numbered, start = [], 1
    for value in inputs:
        numbered.append(torch.arange(start, start + value.size, dtype=torch.float64).reshape(1, *value.shape))
        start += value.size
    places = step(*numbered)[0].long().numpy()
    flat = np.concatenate([np.zeros(1) * inputs[0].flat[0], *(value.reshape(-1) for value in inputs)])
    return flat[places]


def least_radius(network: Wired, threat: Threat, image: Tensor, label: int) -> float:
    """The exact radius at an image (C, n) of a chain of Linear and ReLU: infinite if no image of the ball is other.

    Two linear programs for each pattern of active ReLUs and each other class: the cheapest plans to an image where the
    pattern holds and the class has at least the label's value, or a little more, which no tolerance of a solver can
    feign. Plans are counted in units of the image's mass. Not a number where the two differ.
    """
    moves, mass = Moves(threat, image), float(image.sum())
    centre = image.flatten().numpy()
    limits = [vstack([moves.leaving])]
    sides = [centre / mass]
    if threat.cap is not None:
        limits.append(moves.change)
        sides.append((threat.cap - centre) / mass)
    layers = [step for step in network.sequence if isinstance(step, nn.Linear | nn.ReLU)]
    widths = [before.out_features for before, step in itertools.pairwise(layers) if isinstance(step, nn.ReLU)]
    least = sure = math.inf
    beyond = 1e-6 * _margin(network, image, label)
    for code in itertools.product((False, True), repeat=sum(widths)):
        pattern, matrix, offset = list(code), np.eye(centre.size), np.zeros(centre.size)
        rows: list[Array] = []
        bounds: list[float] = []

        def require(row: Array, limit: float, rows: list[Array] = rows, bounds: list[float] = bounds) -> None:
            """row . change <= limit, in units in which the row's largest entry is 1."""
            scale = float(np.abs(row).max())
            if scale > 0:
                rows.append(row / scale)
                bounds.append(limit / scale / mass)
            elif limit < 0:
                bounds.append(-math.inf)

        for layer in layers:
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach().double().numpy()
                bias = 0.0 if layer.bias is None else layer.bias.detach().double().numpy()
                matrix, offset = weight @ matrix, weight @ offset + bias
                continue
            active = np.array([pattern.pop(0) for _ in offset])
            for sign, row, value in zip(np.where(active, -1.0, 1.0), matrix, matrix @ centre + offset, strict=True):
                require(sign * row, -sign * value)
            matrix, offset = active[:, None] * matrix, active * offset
        at = matrix @ centre + offset
        for other in range(len(at)):
            if other == label or -math.inf in bounds:
                continue

            def cheapest(
                surplus: float, row: Array, gap: float, rows: list[Array] = rows, bounds: list[float] = bounds
            ) -> Any:
                """The plan to an image where the other class is ahead by the surplus; None if there is none."""
                own, own_bounds = list(rows), list(bounds)
                require(row, gap - surplus, own, own_bounds)
                if -math.inf in own_bounds:
                    return None
                found = linprog(
                    moves.price,
                    A_ub=vstack([*limits, *([csr_array(np.array(own) @ moves.change)] if own else [])]),
                    b_ub=np.concatenate([*sides, own_bounds]),
                    method="highs", options=HIGHS,
                )  # fmt: skip
                return found if found.status == 0 else None

            row, gap = matrix[label] - matrix[other], float(at[other] - at[label])
            found = cheapest(0.0, row, gap)
            if found is None or found.fun >= sure:
                continue
            least = min(least, max(0.0, float(found.fun)))
            found = cheapest(beyond, row, gap)
            if found is not None:
                point = image + torch.from_numpy(moves.change @ found.x * mass).reshape(image.shape)
                if _margin(network, point, label) < 0:
                    sure = min(sure, max(0.0, float(found.fun)))
    agree = sure == least or sure <= least * (1 + AGREEMENT) + AGREEMENT**2
    return sure ** (1 / threat.power) if agree else math.nan


def _margin(network: Wired, point: Tensor, label: int) -> float:
    """min over t of f_y - f_t at a point (C, n) of a chain that begins with Flatten."""
    with torch.no_grad():
        values = network(point[None, :, None])[0]
    return float(values[label] - torch.cat([values[:label], values[label + 1 :]]).max())
