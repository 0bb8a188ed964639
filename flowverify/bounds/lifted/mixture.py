"""Margins by rows, by chords, and by mixtures of both, whose shares and slopes are optimised for each class.

For an activation of two pieces whose slope rises, f(z) - f(z0) is below its row, and below the chord less f(z0); any
share of the one with the rest of the other is a bound, and so is every step of the search for the best one (theory,
section 21).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowverify.bounds.lifted.rows import Coefficients

if TYPE_CHECKING:
    from flowverify.bounds.lifted.engine import Relaxation, _Batch


@dataclass(frozen=True, eq=False)
class Chord:
    """The lines of CROWN for an activation of two pieces whose slope rises: the chord above, lines through 0 below.

    Attributes:
        bent: which entries are on both pieces within the ball, (B, *shape); the others have no use for a choice.
        slope, rise: of the chord, and its height above the activation at the centre.
        centre, value: of the activation's input, and of itself.
        flattest: the slope of the left piece; that of the right one is 1.
        usual: the slope that CROWN takes below.
    """

    bent: Tensor
    slope: Tensor
    rise: Tensor
    centre: Tensor
    value: Tensor
    flattest: float
    usual: Tensor


@dataclass(eq=False)
class Choice:
    """How rows mix both relaxations of one activation: (B, R, *shape) each.

    Attributes:
        share: of the rows of moves in what bounds it from above, in [0, 1]; the chord has the rest.
        slope: of the line through 0 below it.
    """

    share: Tensor
    slope: Tensor


def mixed(relaxation: Relaxation, choice: Choice, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What whole coefficients (B, 1, R, *shape) hand on, what takes the rows above, and the constants (B, R)."""
    chord = relaxation.chord
    assert chord is not None
    share, bent = choice.share[:, None], chord.bent[:, None, None]
    slope = torch.where(bent, choice.slope[:, None], relaxation.below[:, None, None])
    above = torch.where(bent, (1 - share) * chord.slope[:, None, None], relaxation.above[:, None, None])
    fall = torch.where(bent, chord.value[:, None, None] - slope * chord.centre[:, None, None], 0.0).clamp(min=0)
    rise = torch.where(bent, (1 - share) * chord.rise[:, None, None], 0.0)
    constant = (up * rise - down * fall).flatten(3).sum(3)[:, 0]
    return up * above + down * slope, up * share, constant


@dataclass(frozen=True, eq=False)
class _Picked:
    """Margins that are worked on, the least k of each image: (B, k) each. Those that are not active fill up."""

    index: Tensor
    active: Tensor
    rises: Tensor
    clean: Tensor
    goal: Tensor


class MarginSearch:
    """The largest lower bounds of margins that have been found for a batch.

    Args:
        rises: linear functions (B, S, classes) of the output, which rise by no more than clean - margin.
        clean: margins at the images, (B, S).
        goal: what margins need not be raised above, (B, S); infinite for no end.
        best: lower bounds that are known, (B, S).
    """

    def __init__(self, batch: _Batch, rises: Tensor, clean: Tensor, goal: Tensor, best: Tensor) -> None:
        self.batch, self.rises, self.clean, self.goal, self.best = batch, rises, clean, goal, best
        self.chords = {
            name: one.chord for name, one in batch.relaxations.items() if one.mixes and one.chord is not None
        }
        self.tolerance = batch.engine.tolerance / 10

    def by_rows(self) -> None:
        """By rows alone."""
        picked = self._pick()
        if picked is not None:
            self._raise(picked, self._evaluated(picked, {})[0])

    def by_chords(self) -> None:
        """Without rows, and with the lines below that CROWN takes: its margins over the same intervals."""
        picked = self._pick()
        if picked is None or not self.chords:
            return
        choices = {}
        for name, chord in self.chords.items():
            slope = chord.usual[:, None].to(self.clean.dtype)
            choices[name] = Choice(torch.zeros_like(slope), slope)
        self._raise(picked, self._evaluated(picked, choices)[0])

    def by_mixtures(self) -> None:
        """By steps up the gradient in shares and slopes, until all margins are at their goal.

        With a goal, an image is left as soon as one of its margins will not become positive at the present pace: its
        other margins do not matter then.
        """
        picked = self._pick()
        if picked is None or not self.chords:
            return
        engine = self.batch.engine
        choices = {name: self._start(name, picked) for name in self.chords}
        variables = [tensor.requires_grad_(True) for one in choices.values() for tensor in (one.share, one.slope)]
        ascent = _Ascent(variables)
        active, own, guess = picked.active, self.best.gather(1, picked.index), self._guess(picked)
        first = own
        for step in range(engine.steps + 1):
            with torch.enable_grad():
                margins, guess = self._evaluated(picked, choices, active, guess, gradient=True)
                found = margins.detach()
                own = torch.where(active, torch.maximum(own, found), own)
                first = found if step == 0 else first
                active = active & ~(own > picked.goal)
                if step >= engine.shortest and self.batch.effort.enough is not None:
                    reached = torch.maximum(own, found + (found - first) / step * (engine.steps - step))
                    active = active & ~(active & (reached <= 0)).any(1, keepdim=True)
                if step == engine.steps or not bool(active.any()):
                    break
                gradients = torch.autograd.grad(torch.where(active, margins, 0.0).sum(), variables, allow_unused=True)
            ascent.step(gradients, engine.rate * (1 - step / (engine.steps + 1)))
            for name, choice in choices.items():
                choice.share.data.clamp_(0, 1)
                choice.slope.data.clamp_(self.chords[name].flattest, 1)
        self._raise(picked, own)

    def _pick(self) -> _Picked | None:
        """The margins that are not at their goal, for each image the least first."""
        open_ = ~(self.best > self.goal)
        count = int(open_.sum(1).max())
        if not count:
            return None
        index = self.best.masked_fill(~open_, torch.inf).argsort(dim=1, stable=True)[:, :count]
        rises = self.rises.gather(1, index[..., None].expand(*index.shape, self.rises.shape[2]))
        active, clean, goal = (values.gather(1, index) for values in (open_, self.clean, self.goal))
        return _Picked(index, active, rises, clean, goal)

    def _raise(self, picked: _Picked, margins: Tensor) -> None:
        known = self.best.gather(1, picked.index)
        self.best = self.best.scatter(1, picked.index, torch.maximum(known, margins))

    def _evaluated(
        self,
        picked: _Picked,
        choices: Mapping[str, Choice],
        active: Tensor | None = None,
        guess: Tensor | None = None,
        *,
        gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Margins (B, k), -inf for none, and the multipliers that they were found with."""
        batch = self.batch
        rows, constant = batch.rows(batch.network.output, Coefficients(picked.rises[:, None], None), choices)
        wanted = picked.active if active is None else active
        enough = torch.where(wanted, -torch.inf, torch.inf).double()
        known = self._guess(picked) if guess is None else guess
        value, multiplier = batch.maximum(rows, enough, known, self.tolerance, gradient=gradient)
        value = value.to(self.clean.dtype)
        if self.batch.warm is not None:
            known = self.batch.warm.recall("lifted margins", self.clean.shape[1:])
            known = multiplier.new_zeros(self.clean.shape) if known is None else known
            self.batch.warm.remember("lifted margins", known.scatter(1, picked.index, multiplier), 0.0)
        return (picked.clean - constant - value).nan_to_num(nan=-torch.inf), multiplier

    def _guess(self, picked: _Picked) -> Tensor | None:
        warm = self.batch.warm
        known = None if warm is None else warm.recall("lifted margins", self.clean.shape[1:])
        return None if known is None else known.gather(1, picked.index)

    def _start(self, name: str, picked: _Picked) -> Choice:
        chord = self.chords[name]
        centre = chord.centre
        tangent = torch.where(centre >= 0, torch.ones_like(centre), chord.flattest)[:, None]
        slope = tangent.expand(-1, picked.index.shape[1], *centre.shape[1:]).clone()
        return Choice(torch.full_like(slope, self.batch.engine.first_share), slope)


class _Ascent:
    """Steps uphill in place (Adam: Kingma and Ba 2015).

    torch's own optimisers load its compiler as they start: half of the time that a first image would take.
    """

    keep, keep_square = 0.8, 0.95
    least = 1e-5  # gradients that are rounding alone do not move what they belong to

    def __init__(self, variables: Sequence[Tensor]) -> None:
        self.variables, self.taken = variables, 0
        self.means, self.squares = ([torch.zeros_like(one) for one in variables] for _ in range(2))

    def step(self, gradients: Sequence[Tensor | None], rate: float) -> None:
        self.taken += 1
        first, second = 1 - self.keep**self.taken, 1 - self.keep_square**self.taken
        for one, mean, square, gradient in zip(self.variables, self.means, self.squares, gradients, strict=True):
            if gradient is not None:
                mean.lerp_(gradient, 1 - self.keep)
                square.mul_(self.keep_square).addcmul_(gradient, gradient, value=1 - self.keep_square)
                one.data.addcdiv_(mean, (square / second).sqrt_().add_(self.least), value=rate / first)
