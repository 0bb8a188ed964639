"""Joint limits of a layer's neurons: a ball of small budget cannot drive all of them to their extremes at once.

The relaxation of an unstable neuron with bounds l < 0 < u overrates its output by up to gap * (1 - max(z / u, z / l)),
gap = -l u / (u - l), whatever the others do; by nothing only at its extremes. For weights w >= 0 on m neurons,

    sum over i of w_i max(z_i / u_i, z_i / l_i) <= limit = max over sign patterns s of max over the ball of
                                                           sum over i of w_i z_i / (u_i if s_i > 0 else l_i)

holds on the ball: 2 ** m linear functions, whose maxima over the ball are exact in the first layer and bounded above
it. With w_i the gap times the coefficient of a bound, the cost of relaxing these neurons falls from sum w_i to the
limit, about half of it for eight neurons of a network on MNIST. A split leaves half of the patterns.

Relaxations of several neurons at once: k-ReLU (Singh et al. 2019), PRIMA (Mueller et al. 2022); these limits need no
hull, one multiplier each, and use what is special about a Wasserstein ball, that its budget is shared (theory,
section 17).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class JointLimits:
    """G limits for each of N nodes on one layer: sum over members i of max(up_i z_i, -down_i z_i) <= limit.

    Attributes:
        members: neurons, (N, G, m).
        up, down: nonnegative, (N, G, m).
        largest: of the sum where members have the signs of a pattern, (N, G, 2 ** m): bit j of the pattern's number
            says that member j is positive; -inf for patterns that splits have ruled out.
    """

    members: Tensor
    up: Tensor
    down: Tensor
    largest: Tensor

    @classmethod
    def none(cls, count: int, device: torch.device) -> JointLimits:
        """No limits."""
        nothing = torch.zeros(count, 0, 0, dtype=torch.float64, device=device)
        return cls(nothing.long(), nothing, nothing, nothing.new_zeros(count, 0, 1))

    @classmethod
    def join(cls, parts: Sequence[JointLimits]) -> JointLimits:
        """One after the other; all need the same G and m."""
        return cls(*(torch.cat(same) for same in zip(*(part._all for part in parts), strict=True)))

    @property
    def _all(self) -> tuple[Tensor, ...]:
        return self.members, self.up, self.down, self.largest

    def __getitem__(self, chosen: Tensor | slice) -> JointLimits:
        return JointLimits(*(value[chosen] for value in self._all))

    def to(self, kind: torch.dtype) -> JointLimits:
        """In this precision."""
        return JointLimits(self.members, self.up.to(kind), self.down.to(kind), self.largest.to(kind))

    def closed(self) -> JointLimits:
        """The same limits with one pattern only, the largest: enough where nothing more is split."""
        return JointLimits(self.members, self.up, self.down, self.limit[..., None])

    @property
    def groups(self) -> int:
        return self.members.shape[1]

    @property
    def limit(self) -> Tensor:
        """(N, G); -inf where no pattern is left, which is where no image is."""
        return self.largest.amax(-1)

    def slopes(self, theta: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """sum over groups of theta (N, G) times up, and times down, for each of ``width`` neurons: (N, width) each."""
        blank, members = theta.new_zeros(len(theta), width), self.members.flatten(1)
        weight = theta[..., None]
        return (
            blank.scatter_add(1, members, (weight * self.up).flatten(1)),
            blank.scatter_add(1, members, (weight * self.down).flatten(1)),
        )

    def restrict(self, node: Tensor, neuron: Tensor, positive: bool) -> None:
        """Rules out, in place, the patterns where ``neuron`` (K,) of ``node`` (K,) has the other sign."""
        if self.groups and len(node):
            member, group, left = self._split(node, neuron, positive)
            self.largest[node[member], group[member]] = left[member]

    def limit_after(self, node: Tensor, neuron: Tensor, positive: bool) -> Tensor:
        """What ``limit`` would be, (K, G), with ``neuron`` (K,) of ``node`` (K,) split to one side."""
        result = self.limit[node]
        if self.groups and len(node):
            member, group, left = self._split(node, neuron, positive)
            result[member.nonzero().flatten(), group[member]] = left[member].amax(-1)
        return result

    def _split(self, node: Tensor, neuron: Tensor, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Whether a neuron is a member of a group, of which, and what is left of its patterns, (K,) and (K, 2 ** m)."""
        size = self.members.shape[-1]
        place = (self.members[node] == neuron[:, None, None]).flatten(1).to(torch.uint8)
        member, first = place.max(1)
        group, own = first // size, first % size
        bit = (torch.arange(2**size, device=neuron.device) >> own[:, None]) & 1
        return member > 0, group, self.largest[node, group].masked_fill(bit == (0 if positive else 1), -torch.inf)
