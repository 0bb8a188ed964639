"""Zonotopes: affine forms of the image and of what is not known, through every operation, products included.

Each entry of a value is, on the whole ball, c + R . (nu - mu) + S . xi + e: its value at the image, a row over the
pixels, a row over *symbols* xi in [-1, 1], one for each linearisation, which all values share, so that what is not
known of one cancels where it meets itself; and an e, |e| <= slack, for rounding. Affine operations act on c, R and S; a
function of one number is replaced by a line with a new symbol for how far it departs from it; of a product what is not
linear becomes a symbol. At the image all symbols vanish (theory, section 23).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowverify.ball import Threat
from flowverify.bounds.engine import Batch, EngineOptions
from flowverify.bounds.intervals import Interval, intersect, propagate
from flowverify.bounds.relaxations import chord_and_departure
from flowverify.errors import BoundError, UnsupportedOperationError
from flowverify.network import INPUT, Network, Node, is_affine, operation_name
from flowverify.network.affine import linear_part
from flowverify.network.curves import FUNCTIONS, Power
from flowverify.network.lowering import pooling_windows
from flowverify.network.operations import MatrixProduct, Multiply, Softmax, Standardise
from flowverify.network.rounding import FEW, INFLATED, TINY, UNIT, fan_in, rounding_of_operation, sum_of_terms
from flowverify.transport.dilation import lipschitz_constant

LARGEST = 1 << 27  # numbers of one form of a batch; beyond, what is not known becomes slack


@dataclass(frozen=True, eq=False)
class Form:
    """A value on the ball.

    Attributes:
        centre: (B, *shape).
        rows: over the pixels, (B, pixels, *shape).
        symbols: over the symbols that there were, (B, symbols, *shape).
        slack: (B, *shape).
    """

    centre: Tensor
    rows: Tensor
    symbols: Tensor
    slack: Tensor


class ZonotopeEngine:
    """Neurons and margins by affine forms.

    Raises:
        UnsupportedOperationError: an operation without a rule, named.
        BoundError: the rows of one image take too many numbers.
    """

    def __init__(self, network: Network, threat: Threat, dtype: torch.dtype, options: EngineOptions) -> None:
        self.network, self.threat, self.notes = network, threat, list[str]()
        for node in network.nodes:
            kinds = (nn.MaxPool2d, Multiply, MatrixProduct, Softmax, Standardise, *FUNCTIONS)
            if not is_affine(node.operation) and not isinstance(node.operation, kinds):
                raise UnsupportedOperationError(
                    f"node {node.name!r}: zonotopes have no rule for {operation_name(node.operation)}"
                )
        widest = max([math.prod(network.input_shape), *(math.prod(node.shape) for node in network.nodes)])
        if widest * math.prod(network.input_shape) > LARGEST:
            raise BoundError(f"zonotopes of {widest:,} entries over {math.prod(network.input_shape):,} pixels")
        self.widest = widest
        self.linear = {node.name: linear_part(node.operation) for node in network.nodes if is_affine(node.operation)}

    def start(self, batch: Batch) -> ZonotopeRun:
        return ZonotopeRun(self, batch)


class ZonotopeRun:
    """One batch, in parts whose forms are not too large."""

    def __init__(self, engine: ZonotopeEngine, batch: Batch) -> None:
        size = max(1, LARGEST // (8 * engine.widest * math.prod(engine.network.input_shape)))
        starts = range(0, len(batch.ball), size)
        self.parts = [_Forms(engine, batch, slice(start, start + size)) for start in starts]

    def tighten(self, name: str, wanted: Tensor | None = None) -> Interval:
        with torch.no_grad():
            found = [part.bounds(name) for part in self.parts]
            return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])

    def margins(self, specification: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([part.margins(specification[part.part]) for part in self.parts])


class _Forms:
    """The forms of the values computed so far, by name, of a part of a batch."""

    def __init__(self, engine: ZonotopeEngine, batch: Batch, part: slice) -> None:
        self.engine, self.batch, self.part, self.count = engine, batch, part, 0
        self.ball = batch.ball[part]
        images = self.ball.images
        pixels = images[0].numel()
        unit = torch.eye(pixels, dtype=images.dtype, device=images.device).reshape(1, pixels, *images.shape[1:])
        self.forms = {INPUT: Form(images, unit, images.new_zeros(1, 0, *images.shape[1:]), torch.zeros_like(images))}

    def bounds(self, name: str) -> Interval:
        """Of a value, given what is known of those below it."""
        self._follow(name)
        return self._interval(name)

    def margins(self, specification: Tensor) -> Tensor:
        """Lower bounds (B, S) of linear functions (B, S, classes) of the output."""
        self._follow(self.engine.network.output)
        form = self.forms[self.engine.network.output]
        centre = (specification @ form.centre[..., None]).squeeze(-1)
        rows, symbols = (specification @ part.transpose(1, 2) for part in (form.rows, form.symbols))
        size = self._size(form)
        rounding = (size.shape[1] + FEW) * UNIT * INFLATED * (specification.abs() @ size[..., None]).squeeze(-1)
        slack = (specification.abs() @ form.slack[..., None]).squeeze(-1) + rounding
        return centre - self._gains(-rows) - symbols.abs().sum(2) * INFLATED - slack

    def _follow(self, name: str) -> None:
        """Computes forms up to that of a value."""
        for node in self.engine.network.nodes:
            if name in self.forms:
                return
            if node.name not in self.forms:
                self.forms[node.name] = self._through(node)

    # What is known of a form.

    def _gains(self, rows: Tensor) -> Tensor:
        """Upper bounds of rows . (nu - mu) over the ball, (B, S, pixels) -> (B, S)."""
        ball, shape = self.ball, self.engine.network.input_shape
        grids = rows.expand(len(ball), *rows.shape[1:]).reshape(len(ball), rows.shape[1], *shape)
        budget = ball.budget.to(rows)[:, None]
        found = budget * lipschitz_constant(grids, self.engine.threat.ground) * (1 + FEW * UNIT)
        if self.engine.threat.positive:
            largest = grids.abs().amax((2, 3, 4))
            count = 4 * math.prod(shape) + 4 * sum(shape[1:]) + 2 * FEW
            off = 8 * count * UNIT * largest * (ball.mass + ball.budget).to(rows)[:, None]
            found = torch.minimum(found, ball.support(grids).excess.clamp(min=0) + off)
        return found

    def _interval(self, name: str) -> Interval:
        """Bounds of a value: those of its form, and what is known of it already."""
        form = self.forms[name]
        flat = form.rows.flatten(2).transpose(1, 2)
        rest = (form.symbols.abs().sum(1) * INFLATED + form.slack).flatten(1)
        centre = form.centre.flatten(1)
        rise, fall = self._gains(flat) + rest, self._gains(-flat) + rest
        room = FEW * UNIT * (centre.abs() + rise + fall)
        shape = (-1, *form.centre.shape[1:])
        found = ((centre - fall - room).reshape(shape), (centre + rise + room).reshape(shape))
        known = self.batch.intervals.get(name)
        return found if known is None else intersect(found, (known[0][self.part], known[1][self.part]))

    def _size(self, form: Form) -> Tensor:
        """No less than the size of the value anywhere in the ball, nor than the sum of the sizes of its parts."""
        moved = 2 * self.ball.budget.to(form.centre).reshape(-1, *[1] * (form.centre.ndim - 1))
        symbols = form.symbols.abs().sum(1)
        return (form.centre.abs() + moved * form.rows.abs().amax(1) + symbols + form.slack) * INFLATED

    # Operations.

    def _through(self, node: Node) -> Form:
        operation, inputs = node.operation, self._together([self.forms[read] for read in node.inputs])
        if is_affine(operation):
            return self._affine(operation, self.engine.linear[node.name], inputs)
        if type(operation) in FUNCTIONS:
            return self._function(operation, inputs[0], self._interval(node.inputs[0]))
        intervals = [self._interval(read) for read in node.inputs]
        if isinstance(operation, Multiply | MatrixProduct):
            found, off = self._product(operation, inputs, intervals)
        elif isinstance(operation, Softmax):
            found, off = self._softmax(operation, inputs[0], intervals[0])
        elif isinstance(operation, Standardise):
            return self._standardise(operation, inputs[0])
        else:
            assert isinstance(operation, nn.MaxPool2d)
            found, off = self._pool(operation, inputs[0], intervals[0])
        return self._unknown(found, off)

    def _together(self, forms: Sequence[Form]) -> list[Form]:
        """Forms over the same symbols."""
        most = max(form.symbols.shape[1] for form in forms)
        result = []
        for form in forms:
            missing = most - form.symbols.shape[1]
            symbols = form.symbols
            if missing:
                symbols = torch.cat([symbols, symbols.new_zeros(len(symbols), missing, *symbols.shape[2:])], 1)
            result.append(Form(form.centre, form.rows, symbols, form.slack))
        return result

    def _affine(self, operation: nn.Module, linear: nn.Module, inputs: Sequence[Form]) -> Form:
        def on(parts: Sequence[Tensor]) -> Tensor:
            batch, count = max(len(part) for part in parts), parts[0].shape[1]
            if not count:
                shape = linear(*(part.new_zeros(1, *part.shape[2:]) for part in parts)).shape[1:]
                return parts[0].new_zeros(batch, 0, *shape)
            found = linear(*(part.expand(batch, *part.shape[1:]).flatten(0, 1) for part in parts))
            return found.reshape(batch, count, *found.shape[1:])  # type: ignore[no-any-return]

        slack = sum_of_terms(operation, [form.slack for form in inputs], biased=False)
        terms = sum_of_terms(operation, [self._size(form) for form in inputs], biased=True)
        rounding = (fan_in(operation) + FEW) * UNIT * INFLATED * terms + TINY
        return Form(
            operation(*(form.centre for form in inputs)),
            on([form.rows for form in inputs]),
            on([form.symbols for form in inputs]),
            slack * INFLATED + rounding,
        )

    def _function(self, operation: nn.Module, form: Form, interval: Interval) -> Form:
        """A line, and a symbol for how far the function departs from it on the interval."""
        lower, upper = torch.minimum(interval[0], form.centre), torch.maximum(interval[1], form.centre)
        slope, least, most, steepest = chord_and_departure(operation, (lower, upper))
        known = torch.isfinite(slope) & torch.isfinite(least) & torch.isfinite(most)
        slope, least, most = (torch.where(known, one, 0.0) for one in (slope, least, most))
        values = operation(lower).abs() + operation(upper).abs()
        terms = (
            values
            + least.abs()
            + most.abs()
            + (slope.abs() + steepest) * (self._size(form) + lower.abs() + upper.abs())
        )
        slack = slope.abs() * form.slack * INFLATED + FEW * UNIT * terms + TINY
        middle = (least + most) / 2
        found = Form(
            slope * form.centre + middle,
            form.rows * slope[:, None],
            form.symbols * slope[:, None],
            torch.where(known, slack, torch.inf),
        )
        return self._unknown(found, (most - least) / 2)

    def _product(
        self, operation: nn.Module, inputs: Sequence[Form], intervals: Sequence[Interval]
    ) -> tuple[Form, Tensor]:
        """x y = x0 y0 + x0 dy + dx y0 + dx dy, and the last of these is a symbol."""
        first, second = inputs
        away, other_away = (
            torch.maximum(interval[1] - form.centre, form.centre - interval[0]).clamp(min=0)
            for form, interval in zip(inputs, intervals, strict=True)
        )
        times: Callable[[Tensor, Tensor], Tensor] = operation
        shared = (first.centre[:, None], second.centre[:, None])
        inner = first.centre.shape[-1] if isinstance(operation, MatrixProduct) else 1
        sizes = times(self._size(first), self._size(second))
        slack = times(first.centre.abs(), second.slack) + times(first.slack, second.centre.abs())
        found = Form(
            times(first.centre, second.centre),
            times(shared[0], second.rows) + times(first.rows, shared[1]),
            times(shared[0], second.symbols) + times(first.symbols, shared[1]),
            slack * INFLATED + (inner + FEW) * UNIT * INFLATED * 4 * sizes + TINY,
        )
        return self._within(operation, intervals, found, times(away, other_away) * INFLATED)

    def _softmax(self, operation: Softmax, form: Form, interval: Interval) -> tuple[Form, Tensor]:
        """The derivative at the centre; along a direction d of span D, a second one is at most s_i D^2 in size."""
        dim = operation.dim + 1
        share: Tensor = operation(form.centre)

        def derivative(parts: Tensor) -> Tensor:
            own = share[:, None] * parts
            return own - share[:, None] * own.sum(dim + 1, keepdim=True)

        span = (interval[1] - form.centre).clamp(min=0).amax(dim, keepdim=True)
        span = span + (form.centre - interval[0]).clamp(min=0).amax(dim, keepdim=True)
        most = propagate(operation, [interval])[1].clamp(max=1)
        count = share.shape[dim] + FEW
        slack = share * (form.slack + (share * form.slack).sum(dim, keepdim=True))
        largest = self._size(form).amax(dim, keepdim=True)
        rounding = (count + 4 * largest) * UNIT * INFLATED * 4 * (1 + largest)
        found = Form(share, derivative(form.rows), derivative(form.symbols), slack * INFLATED + rounding)
        return self._within(operation, [interval], found, most * span.square() / 2 * INFLATED)

    def _standardise(self, operation: Standardise, form: Form) -> Form:
        """c / sqrt(mean(c^2) + epsilon), of a square, an inverse root, and a product."""
        size = form.centre.shape[-1]

        def mean(value: Tensor) -> Tensor:
            average: Tensor = value.mean(-1, keepdim=True)
            return average

        def centre(value: Tensor) -> Tensor:
            return value - mean(value)

        def mapped(form: Form, on: Callable[[Tensor], Tensor], sizes: Callable[[Tensor], Tensor]) -> Form:
            """A linear function, and what it makes of sizes."""
            rounding = (size + FEW) * UNIT * INFLATED * sizes(self._size(form)) + TINY
            slack = sizes(form.slack) * INFLATED + rounding
            return Form(on(form.centre), on(form.rows), on(form.symbols), slack)

        centred = mapped(form, centre, lambda sizes: sizes + mean(sizes)) if operation.centred else form
        squares = self._function(Power(2.0), centred, self._own(centred))
        average = mapped(squares, mean, mean)
        above = Form(
            average.centre + operation.epsilon, average.rows, average.symbols, average.slack + UNIT * average.centre
        )
        lower, upper = self._own(above)
        positive = (lower.clamp(min=operation.epsilon * (1 - FEW * UNIT)), upper)
        inverse = self._function(Power(-0.5), above, positive)
        pair = self._together([centred, inverse])
        found, off = self._product(Multiply(), pair, [self._own(one) for one in pair])
        return self._unknown(found, off)

    def _own(self, form: Form) -> Interval:
        """The interval of a form by itself."""
        self.forms[""] = form
        interval = self._interval("")
        del self.forms[""]
        return interval

    def _pool(self, operation: nn.MaxPool2d, form: Form, interval: Interval) -> tuple[Form, Tensor]:
        """The largest member at the centre, and a symbol for by how much another one may be larger."""
        height, width = form.centre.shape[-2:]
        windows = pooling_windows(operation, height, width).to(form.centre.device)  # (members, windows)
        best = form.centre.flatten(2)[..., windows].argmax(2)
        pixel = windows.T[torch.arange(windows.shape[1], device=windows.device), best]
        shape = propagate(operation, [interval])[0].shape[-2:]

        def picked(values: Tensor) -> Tensor:
            """(B, ..., channels, height, width) at the largest members."""
            flat = values.flatten(-2).expand(len(pixel), *values.shape[1:-2], height * width)
            index = pixel.reshape(len(pixel), *[1] * (flat.ndim - 3), *pixel.shape[1:])
            chosen = flat.gather(-1, index.expand(*flat.shape[:-1], pixel.shape[-1]))
            return chosen.reshape(*chosen.shape[:-1], *shape)

        others = interval[1].flatten(2)[..., windows].masked_fill(windows == pixel[:, :, None], -torch.inf).amax(2)
        over = (others.reshape(*others.shape[:2], *shape) - picked(interval[0])).clamp(min=0)
        centre = picked(form.centre)
        slack = picked(form.slack) + FEW * UNIT * (centre.abs() + over)
        return Form(centre + over / 2, picked(form.rows), picked(form.symbols), slack), over / 2 * INFLATED

    def _within(
        self, operation: nn.Module, intervals: Sequence[Interval], found: Form, off: Tensor
    ) -> tuple[Form, Tensor]:
        """The form, or where its symbol is larger than half of the interval, the middle of that alone."""
        lower, upper = propagate(operation, list(intervals))
        middle, half = (lower + upper) / 2, (upper - lower) / 2
        worse = (off > half) & torch.isfinite(half)
        sizes = [torch.maximum(low.abs(), high.abs()) for low, high in intervals]
        rounding = rounding_of_operation(operation, sizes, torch.maximum(lower.abs(), upper.abs()))
        return (
            Form(
                torch.where(worse, middle, found.centre),
                found.rows.masked_fill(worse[:, None], 0.0),
                found.symbols.masked_fill(worse[:, None], 0.0),
                torch.where(worse, rounding, found.slack),
            ),
            torch.where(worse, half, off),
        )

    def _unknown(self, form: Form, off: Tensor) -> Form:
        """The form with a new symbol for each entry that is off by something; too many of them become slack."""
        flat = off.flatten(1)
        places = (flat > 0).any(0).nonzero().flatten()
        batch, entries = flat.shape
        if not len(places):
            return form
        if batch * entries * (self.count + len(places)) > LARGEST:
            return Form(form.centre, form.rows, form.symbols, form.slack + off * INFLATED)
        padded = self.count - form.symbols.shape[1]
        # Slack of these entries is as unknown, and as a symbol it may cancel.
        new, slack = flat.new_zeros(batch, padded + len(places), entries), form.slack.flatten(1).clone()
        new[:, padded + torch.arange(len(places)), places] = (flat + slack)[:, places] * INFLATED
        slack[:, places] = 0.0
        symbols = form.symbols.expand(batch, *form.symbols.shape[1:])
        self.count += len(places)
        symbols = torch.cat([symbols, new.reshape(batch, -1, *off.shape[1:])], 1)
        return Form(form.centre, form.rows, symbols, slack.reshape(off.shape))
