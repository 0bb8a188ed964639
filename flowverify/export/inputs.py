"""The inputs X of an exported network, and the image that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from flowverify.errors import InvalidInputError
from flowverify.export.encodings import Form
from flowverify.export.rounding import FloatArray, round_down, round_up, scalar_up
from flowverify.grid import Grid


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
