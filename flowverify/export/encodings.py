"""The encodings of one question, "is there a misclassified image in the ball?", and who can answer each.

With delta = delta_mu + p - q and eps = radius * mass the question is: are there p, q >= 0 with sum(p + q) <= eps
and R + A delta >= 0 such that f_t >= f_y for some t != y? (Framework paper 2021, Theorem 6; without the second
constraint, Theorem 3.) Verifiers differ in what they take besides a box on the inputs.

What is written is rounded to float32 towards one side, so that no constraint is tighter than the one that is meant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.grid import Grid

Form = Literal["split", "delta"]


@dataclass(frozen=True)
class Encoding:
    """One way of writing the question down.

    Attributes:
        form: the inputs of the network: "split" (p, q), or "delta" for tools with an L1 ball of their own.
        per_label: whether the outputs are margins of one label, so that a file serves that label only.
        penalised: whether constraints have become a penalty on the margins.
        reader: which verifier it is for, as the header of a property says.
    """

    name: str
    form: Form
    per_label: bool
    penalised: bool
    reader: str


ENCODINGS: dict[str, Encoding] = {
    "linear": Encoding(
        "linear",
        "split",
        per_label=False,
        penalised=False,
        reader=(
            "for Marabou, which decides it exactly. It has linear constraints on several INPUTS, and other readers "
            "misread it: the package vnnlib 0.0.1 drops terms without a word, alpha-beta-CROWN stops at an assertion. "
            "For other verifiers use the encoding outputs or penalty."
        ),
    ),
    "outputs": Encoding(
        "outputs",
        "split",
        per_label=False,
        penalised=False,
        reader=(
            "a box on the inputs, and constraints on outputs only: every reader parses it. A verifier must weigh "
            "several outputs in one conjunction to decide it; Marabou does."
        ),
    ),
    "penalty": Encoding(
        "penalty",
        "split",
        per_label=True,
        penalised=True,
        reader=(
            "a box on the inputs, and a sign for each output: for verifiers that know boxes only, such as "
            "alpha-beta-CROWN."
        ),
    ),
    "l1-penalty": Encoding(
        "l1-penalty",
        "delta",
        per_label=True,
        penalised=True,
        reader=(
            "for tools with an L1 ball of their own, such as alpha-beta-CROWN with `norm: 1`; use the configuration "
            "beside it. The box of this file alone is LARGER than the ball: unsat holds for the ball, sat may not."
        ),
    ),
}


def check_encoding(name: str) -> Encoding:
    """The encoding of this name, or UnknownNameError with the valid ones."""
    if name not in ENCODINGS:
        raise UnknownNameError("encoding", name, tuple(ENCODINGS))
    return ENCODINGS[name]


FloatArray = npt.NDArray[np.float64]


def round_up(values: FloatArray) -> FloatArray:
    """The least float32 numbers that are not below the given ones, as float64."""
    nearest = np.asarray(values, dtype=np.float64).astype(np.float32)
    raised = np.nextafter(nearest, np.float32(np.inf))
    return np.where(nearest.astype(np.float64) < values, raised, nearest).astype(np.float64)


def round_down(values: FloatArray) -> FloatArray:
    """The largest float32 numbers that are not above the given ones, as float64."""
    return -round_up(-np.asarray(values, dtype=np.float64))


def tensor_up(values: Tensor) -> Tensor:
    """:func:`round_up` for a tensor; the result is float64."""
    return torch.from_numpy(round_up(values.detach().cpu().double().numpy()))


def scalar_up(value: float) -> float:
    """:func:`round_up` for one number."""
    return float(round_up(np.array(value)))


def decimal(value: float) -> str:
    """A plain decimal that reads back as the same float64: no exponent, and always a point.

    Raises:
        ValueError: the number is not finite.
    """
    if not math.isfinite(value):
        raise ValueError(f"given {value}, expected a finite number")
    return str(np.format_float_positional(value + 0.0, unique=True, trim="0"))


@dataclass(frozen=True, eq=False)
class FlowInputs:
    """image(X) = R + A delta, with delta = X_p - X_q ("split", 2d inputs) or delta = X ("delta", d inputs).

    In the split form the offset delta_mu stands in the box: X = (delta_mu+ + p, delta_mu- + q) with p, q >= 0.
    So one network serves every image of a reference, and sum(X) <= ||delta_mu||_1 + eps is the budget.

    What differs between the instances that share a network is an input that the box fixes, after the flows: the
    mass of each channel, where R = sum over c of mass_c * pattern_c; then the budget, where a penalty needs it.

    Attributes:
        reference: R, float64 (C, H, W); the pattern, of mass 1 in every channel, with ``mass_inputs``.
    """

    grid: Grid
    form: Form
    reference: Tensor
    mass_inputs: bool = False
    budget_input: bool = False

    @property
    def flows(self) -> int:
        """How many inputs are flows: d or 2d. They come first."""
        return self.grid.edges * (2 if self.form == "split" else 1)

    @property
    def size(self) -> int:
        return self.flows + (self.grid.channels if self.mass_inputs else 0) + self.budget_input

    @cached_property
    def matrix(self) -> scipy.sparse.csr_array:
        """J with image(X) = J X + offset; (pixels, size), float64."""
        incidence = self.grid.incidence_scipy()
        blocks = [incidence, -incidence] if self.form == "split" else [incidence]
        if self.mass_inputs:
            pattern = self.reference.reshape(self.grid.channels, -1).numpy()
            blocks.append(scipy.sparse.block_diag([part[:, None] for part in pattern]))
        if self.budget_input:
            blocks.append(scipy.sparse.csr_array((self.grid.pixels, 1)))
        return scipy.sparse.hstack(blocks, format="csr")

    @property
    def offset(self) -> Tensor:
        """The constant part of the image, float64 (C, H, W)."""
        return torch.zeros_like(self.reference) if self.mass_inputs else self.reference

    def rows(self, weight: Tensor) -> Tensor:
        """W J for rows W over pixels, (m, pixels) -> (m, size), without forming J."""
        images = weight.double().reshape(-1, *self.grid.image_shape)
        flows = self.grid.differences(images)
        parts = [flows, -flows] if self.form == "split" else [flows]
        if self.mass_inputs:
            parts.append((images * self.reference).sum((-1, -2)))
        if self.budget_input:
            parts.append(images.new_zeros(len(images), 1))
        return torch.cat(parts, 1)

    def image(self, values: FloatArray) -> Tensor:
        """The image (C, H, W), float64, of an input vector (size,); pixels may be negative.

        Raises:
            InvalidInputError: another length, or a value that is not finite.
        """
        if values.shape != (self.size,) or not np.isfinite(values).all():
            raise InvalidInputError(f"input vector of shape {values.shape}: expected {self.size} finite numbers")
        return torch.from_numpy(self.matrix @ values).reshape(self.grid.image_shape) + self.offset

    def centre(self, flow: Tensor, masses: Tensor, budget: float) -> FloatArray:
        """The input vector of the image itself, for its flow delta_mu (edges,), channel masses (C,), and eps."""
        flow = flow.double()
        parts = [flow.clamp(min=0), (-flow).clamp(min=0)] if self.form == "split" else [flow]
        if self.mass_inputs:
            parts.append(masses.double())
        if self.budget_input:
            parts.append(torch.tensor([self.most_flow(flow, budget)], dtype=torch.float64))
        return torch.cat(parts).numpy()

    def most_flow(self, flow: Tensor, budget: float) -> float:
        """||delta_mu||_1 + eps, the largest sum of the split inputs in the ball, rounded up to float32."""
        return scalar_up(float(flow.double().abs().sum()) + budget)

    def box(self, centre: FloatArray, budget: float) -> tuple[FloatArray, FloatArray]:
        """Lower and upper bounds of X over the ball, float32 numbers rounded outward."""
        lower, upper = centre.copy(), centre.copy()
        upper[: self.flows] += budget
        if self.form == "delta":
            lower[: self.flows] -= budget
        return round_down(lower), round_up(upper)
