"""The pixel grid, its edges, and the flow application map Delta(R, delta) = R + A delta.

Source: Levine & Feizi 2020, Definition 1 and Theorem 1; framework paper (2021), Theorem 2 (the matrix A).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from flowverify.errors import InvalidInputError


@dataclass(frozen=True)
class Grid:
    """A grid of ``height x width`` pixels in ``channels`` independent channels.

    A *flow* is a signed amount on each edge between neighbouring pixels of one channel. A flow vector
    lists, channel by channel, the rightward flows row by row, then the downward flows row by row.

    Raises:
        InvalidInputError: a size is not a positive integer.
    """

    height: int
    width: int
    channels: int = 1

    def __post_init__(self) -> None:
        for name in ("height", "width", "channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InvalidInputError(f"grid {name}: given {value!r}, expected an integer >= 1")

    @classmethod
    def of(cls, images: Tensor) -> Grid:
        """The grid of a batch of images of shape (..., C, H, W)."""
        if images.ndim < 3:
            raise InvalidInputError(f"images of shape {tuple(images.shape)}: expected (..., channels, height, width)")
        channels, height, width = images.shape[-3:]
        return cls(int(height), int(width), int(channels))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.height, self.width)

    @property
    def pixels(self) -> int:
        return self.channels * self.height * self.width

    @property
    def right_edges(self) -> int:
        """Rightward edges of one channel."""
        return self.height * (self.width - 1)

    @property
    def down_edges(self) -> int:
        """Downward edges of one channel."""
        return (self.height - 1) * self.width

    @property
    def edges(self) -> int:
        """Length of a flow vector: C * (H(W-1) + W(H-1))."""
        return self.channels * (self.right_edges + self.down_edges)

    @property
    def diameter(self) -> int:
        """The largest l1 ground distance between two pixels of one channel."""
        return self.height + self.width - 2

    def check_image(self, images: Tensor, what: str = "images") -> Tensor:
        """Returns ``images`` as (..., C, H, W) or raises InvalidInputError with both shapes."""
        if images.ndim < 3 or tuple(images.shape[-3:]) != self.image_shape:
            raise InvalidInputError(
                f"{what} of shape {tuple(images.shape)}: expected (..., {', '.join(map(str, self.image_shape))})"
            )
        return images

    def check_flow(self, flow: Tensor) -> Tensor:
        """Returns ``flow`` as (..., edges) or raises InvalidInputError with both shapes."""
        if flow.ndim < 1 or flow.shape[-1] != self.edges:
            raise InvalidInputError(
                f"flow of shape {tuple(flow.shape)}: expected (..., {self.edges}) for a "
                f"{self.channels}x{self.height}x{self.width} grid"
            )
        return flow

    def split(self, flow: Tensor) -> tuple[Tensor, Tensor]:
        """Splits (..., edges) into rightward (..., C, H, W-1) and downward (..., C, H-1, W) flows."""
        self.check_flow(flow)
        batch = flow.shape[:-1]
        per_channel = flow.reshape(*batch, self.channels, self.right_edges + self.down_edges)
        right = per_channel[..., : self.right_edges]
        down = per_channel[..., self.right_edges :]
        return (
            right.reshape(*batch, self.channels, self.height, self.width - 1),
            down.reshape(*batch, self.channels, self.height - 1, self.width),
        )

    def join(self, right: Tensor, down: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        batch = right.shape[:-3]
        return torch.cat(
            [
                right.reshape(*batch, self.channels, self.right_edges),
                down.reshape(*batch, self.channels, self.down_edges),
            ],
            dim=-1,
        ).reshape(*batch, self.edges)

    def divergence(self, flow: Tensor) -> Tensor:
        """A delta: the linear part of Delta, (..., edges) -> (..., C, H, W); no matrix is formed."""
        right, down = self.split(flow)
        image = flow.new_zeros(*flow.shape[:-1], *self.image_shape)
        image[..., :, 1:] += right
        image[..., :, :-1] -= right
        image[..., 1:, :] += down
        image[..., :-1, :] -= down
        return image

    def apply(self, reference: Tensor, flow: Tensor) -> Tensor:
        """Delta(R, delta) = R + A delta, of shape (..., C, H, W)."""
        return self.check_image(reference, "reference") + self.divergence(flow)

    def differences(self, coefficients: Tensor) -> Tensor:
        """A^T c: head minus tail of every edge, (..., C, H, W) -> (..., edges)."""
        self.check_image(coefficients, "coefficients")
        right = coefficients[..., :, 1:] - coefficients[..., :, :-1]
        down = coefficients[..., 1:, :] - coefficients[..., :-1, :]
        return self.join(right, down)

    def potential(self, flow_coefficients: Tensor) -> Tensor:
        """A potential c whose differences follow ``flow_coefficients`` along a spanning tree.

        If a = A^T c for some c, the result is that c up to one constant per channel (so A^T of it is a).
        For any other a it is some image: use it only where the bound is then evaluated with a itself
        (theory, section 6).
        """
        right, down = self.split(flow_coefficients)
        image = flow_coefficients.new_zeros(*flow_coefficients.shape[:-1], *self.image_shape)
        image[..., 1:, 0] = down[..., :, 0].cumsum(-1)
        image[..., :, 1:] = image[..., :, :1] + right.cumsum(-1)
        return image

    def is_feasible(self, reference: Tensor, flow: Tensor, tolerance: float = 0.0) -> Tensor:
        """Whether R + A delta >= -tolerance in every pixel (framework paper, Lemma 5); shape (...)."""
        return (self.apply(reference, flow) >= -tolerance).flatten(-3).all(-1)

    def incidence(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """A as a sparse CSR tensor of shape (pixels, edges); every column sums to 0."""
        matrix = self.incidence_scipy()
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int64)),
            torch.from_numpy(matrix.indices.astype(np.int64)),
            torch.from_numpy(matrix.data).to(dtype),
            size=matrix.shape,
            check_invariants=False,
        )

    def incidence_scipy(self) -> scipy.sparse.csr_array:
        """A as a SciPy CSR array (float64), for solvers."""
        return _incidence(self.height, self.width, self.channels)

    def to_planes(self, flow: Tensor) -> Tensor:
        """A flow vector as 2C image planes (..., 2C, H, W): C rightward, then C downward.

        The flow that would leave the grid (last column, last row) is zero in its plane.
        """
        right, down = self.split(flow)
        return torch.cat([torch.nn.functional.pad(right, (0, 1)), torch.nn.functional.pad(down, (0, 0, 0, 1))], dim=-3)

    def from_planes(self, planes: Tensor) -> Tensor:
        """The inverse of :meth:`to_planes`; what stands outside the grid's edges is ignored."""
        right, down = planes[..., : self.channels, :, :-1], planes[..., self.channels :, :-1, :]
        return self.join(right, down)

    def planes_mask(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """1 where a plane entry of :meth:`to_planes` is an edge of the grid, else 0; (2C, H, W)."""
        return self.to_planes(torch.ones(self.edges, dtype=dtype))


@cache
def _incidence(height: int, width: int, channels: int) -> scipy.sparse.csr_array:
    pixel = np.arange(height * width).reshape(height, width)
    tails = np.concatenate([pixel[:, :-1].ravel(), pixel[:-1, :].ravel()])
    heads = np.concatenate([pixel[:, 1:].ravel(), pixel[1:, :].ravel()])
    edges = np.arange(tails.size)
    one_channel = scipy.sparse.coo_array(
        (
            np.concatenate([np.ones(heads.size), -np.ones(tails.size)]),
            (np.concatenate([heads, tails]), np.concatenate([edges, edges])),
        ),
        shape=(height * width, tails.size),
    )
    return scipy.sparse.block_diag([one_channel] * channels, format="csr")
