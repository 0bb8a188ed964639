"""The canonical form of a network: a directed acyclic graph of canonical operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.grid import Grid
from flowverify.network.operations import check_operation, is_affine, operation_name, output_shape
from flowverify.notebook import by, counted, html_table

LISTED = 12  # operations on one line
INPUT = "input"


@dataclass(frozen=True)
class Node:
    """One operation of a graph: its unique name, what it reads, and its output shape for one sample."""

    name: str
    operation: nn.Module
    inputs: tuple[str, ...]
    shape: tuple[int, ...]


class Graph(nn.Module):
    """Operations in topological order; the input is called ``input`` and the last node is the output.

    The graph owns the operations it is given: they lose ``requires_grad`` (turn it on again with
    ``requires_grad_(True)``) and stay in evaluation mode. Without nodes it is the identity.

    An operation may carry constants in float64 that the graph's precision cannot hold, as a dictionary ``exact`` of
    tensors by name. A conversion to another precision starts from them, unless they have been changed since.

    Raises:
        UnsupportedOperationError: an operation is not canonical.
        InvalidInputError: a name is used twice, a node reads a value that is not there yet, a value is
            never read, shapes do not match, a weight is NaN or infinite, weights have several
            precisions, values overflow, or the value of one sample depends on another sample of the batch.
    """

    def __init__(self, input_shape: Sequence[int], nodes: Sequence[Node]) -> None:
        super().__init__()
        self.input_shape: tuple[int, ...] = tuple(int(size) for size in input_shape)
        self.nodes: tuple[Node, ...] = tuple(nodes)
        if not self.input_shape or min(self.input_shape) < 1:
            raise InvalidInputError(f"input shape: given {self.input_shape}, expected positive sizes")
        self.operations = nn.ModuleList(node.operation for node in self.nodes)
        self._check_structure()
        self._check_weights()
        self.requires_grad_(False)
        self.train(False)
        self._check_batch()

    def _check_structure(self) -> None:
        shapes = {INPUT: self.input_shape}
        for node in self.nodes:
            what = f"node {node.name!r}"
            if node.name in shapes:
                raise InvalidInputError(f"{what}: given a name that is already taken, expected a unique one")
            missing = [name for name in node.inputs if name not in shapes]
            if missing:
                raise InvalidInputError(f"{what}: given inputs {missing}, expected names of earlier nodes")
            try:
                shape = output_shape(node.operation, [shapes[name] for name in node.inputs])
            except (InvalidInputError, UnsupportedOperationError) as error:
                raise type(error)(f"{what}: {error}") from None
            if shape != node.shape:
                raise InvalidInputError(f"{what}: given shape {node.shape}, expected {shape}")
            shapes[node.name] = shape
        read = {name for node in self.nodes for name in node.inputs}
        unread = [name for name in shapes if name not in read and name != self.output]
        if unread:
            raise InvalidInputError(f"given values {unread} that nothing reads, expected only the output")

    def _check_weights(self) -> None:
        precisions = set()
        for node in self.nodes:
            for name, tensor in [*node.operation.named_parameters(), *node.operation.named_buffers()]:
                if not tensor.is_floating_point():
                    continue
                precisions.add(tensor.dtype)
                if not bool(torch.isfinite(tensor).all()):
                    raise InvalidInputError(
                        f"node {node.name!r} ({operation_name(node.operation)}): given a {name} with NaN or "
                        "infinite entries, expected finite numbers"
                    )
        if len(precisions) > 1 or not precisions <= {torch.float32, torch.float64}:
            raise InvalidInputError(
                f"given weights of type {sorted(map(str, precisions))}, expected all float32 or all float64"
            )

    def _check_batch(self) -> None:
        """Compares a batch of two samples with the two samples alone."""
        generator = torch.Generator().manual_seed(0)
        batch = torch.rand(2, *self.input_shape, generator=generator, dtype=torch.float64).to(self._like())
        with torch.no_grad():
            together, alone = self.values(batch), [self.values(batch[k : k + 1]) for k in range(2)]
        for name, value in together.items():
            if not bool(torch.isfinite(value).all()):
                raise InvalidInputError(
                    f"node {name!r}: given weights with which values of images in [0, 1] overflow, expected finite ones"
                )
            separate = torch.cat([values[name] for values in alone])
            scale = float(value.abs().max())
            same = separate.shape == value.shape
            if not same or not (
                torch.allclose(separate, value, rtol=0, atol=1e-4 * scale + 1e-30)
                or self._within_rounding(name, separate - value, batch)
            ):
                raise InvalidInputError(
                    f"node {name!r}: the value of a sample depends on the rest of its batch, expected "
                    "dimension 0 to be the batch only"
                )

    def _within_rounding(self, name: str, difference: Tensor, batch: Tensor) -> bool:
        """Whether rounding may make as much of a difference, where large terms cancel."""
        from flowverify.network.rounding import is_steep, rounding_of_value

        if is_steep(self):
            return False
        allowed = rounding_of_value(self, name, batch)
        return bool((difference.abs() <= allowed).all())

    def __repr__(self) -> str:
        names = [operation_name(operation) for operation in self.operations]
        shown = names if len(names) <= LISTED else [*names[: LISTED - 1], f"... {len(names) - LISTED} more", names[-1]]
        return (
            f"{type(self).__name__}({by(self.input_shape)} -> {by(self.output_shape)}; "
            f"{counted(sum(one.numel() for one in self.parameters()), 'parameter')}; {', '.join(shown) or 'nothing'})"
        )

    def _repr_html_(self) -> str:
        rows = []
        for node in self.nodes:
            numbers = sum(one.numel() for one in node.operation.parameters())
            rows.append((node.name, operation_name(node.operation), by(node.shape), f"{numbers:,}"))
        return html_table(repr(self), rows, ("value", "operation", "shape", "parameters"))

    @property
    def output(self) -> str:
        """The name of the output: the last node, or ``input`` if there is none."""
        return self.nodes[-1].name if self.nodes else INPUT

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.nodes[-1].shape if self.nodes else self.input_shape

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value, for one sample."""
        return self.input_shape if name == INPUT else self.node(name).shape

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights (float32 if there are none)."""
        return self._like().dtype

    def _like(self, default: Tensor | None = None) -> Tensor:
        """A tensor of the weights' precision and device, or the default if there are no weights."""
        tensors = (t for t in [*self.parameters(), *self.buffers()] if t.is_floating_point())
        return next(tensors, torch.zeros((), dtype=torch.float32) if default is None else default)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to, .double and .cuda do; constants that are still as they were rounded are rounded afresh."""
        unchanged = [
            (operation, name, value)
            for operation in self.operations
            for name, value in exact_constants(operation).items()
            if _is_rounding_of(getattr(operation, name), value)
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for operation, name, value in unchanged:
                getattr(operation, name).copy_(value)
        return self

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a graph is always in evaluation mode."""
        return super().train(False)

    def values(self, images: Tensor) -> dict[str, Tensor]:
        """The value of the input and of every node for a batch (B, *input_shape)."""
        values = {INPUT: images}
        for node, operation in zip(self.nodes, self.operations, strict=True):
            values[node.name] = operation(*(values[name] for name in node.inputs))
        return values

    def forward(self, images: Tensor) -> Tensor:
        """(B, *input_shape) -> (B, *output_shape).

        Raises:
            InvalidInputError: the batch has another shape or precision.
        """
        tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not tracing and tuple(images.shape[1:]) != self.input_shape:
            raise InvalidInputError(
                f"network input of shape {tuple(images.shape)}: expected "
                f"(batch, {', '.join(map(str, self.input_shape))})"
            )
        if images.dtype != self._like(images).dtype:
            raise InvalidInputError(f"network input of type {images.dtype}: expected {self.dtype}")
        return self.values(images)[self.output]

    def node(self, name: str) -> Node:
        """The node of this name.

        Raises:
            InvalidInputError: there is none.
        """
        for node in self.nodes:
            if node.name == name:
                return node
        raise InvalidInputError(f"node {name!r}: expected one of {[node.name for node in self.nodes]}")

    def consumers(self, name: str) -> list[Node]:
        """The nodes that read the value of this name, in topological order."""
        return [node for node in self.nodes if name in node.inputs]

    @property
    def activations(self) -> list[Node]:
        """The nodes that are not affine in their inputs, in topological order."""
        return [node for node in self.nodes if not is_affine(node.operation)]

    def affine_of_input(self) -> set[str]:
        """The names (``input`` among them) of the values that are affine functions of the input."""
        names = {INPUT}
        for node in self.nodes:
            if is_affine(node.operation) and names.issuperset(node.inputs):
                names.add(node.name)
        return names

    @property
    def is_affine(self) -> bool:
        """Whether the whole network is an affine function of its input."""
        return self.output in self.affine_of_input()

    @property
    def is_sequential(self) -> bool:
        """Whether the graph is a chain: every node reads exactly the one before it."""
        names = [INPUT, *(node.name for node in self.nodes)]
        return all(node.inputs == (name,) for node, name in zip(self.nodes, names, strict=False))

    def before(self, name: str) -> Graph:
        """A copy of the part that computes the value ``name``, which becomes the output."""
        kept = self._ancestors(name)
        return Graph(self.input_shape, copy.deepcopy([node for node in self.nodes if node.name in kept]))

    def after(self, name: str) -> Graph:
        """A copy of the part that computes the output from the value ``name``, which becomes the input.

        Raises:
            InvalidInputError: the output also depends on the input in another way.
        """
        done = self._ancestors(name)
        rest = [node for node in self.nodes if node.name not in done]
        renamed = [
            replace(node, inputs=tuple(INPUT if read == name else read for read in node.inputs)) for node in rest
        ]
        if any(read in done and read != name for node in rest for read in node.inputs):
            raise InvalidInputError(f"value {name!r}: expected one that the output depends on alone")
        shape = self.shape(name)
        return Graph(shape, copy.deepcopy(renamed))

    def _ancestors(self, name: str) -> set[str]:
        names = {name, INPUT}
        for node in reversed(self.nodes):
            if node.name in names:
                names.update(node.inputs)
        return names


def exact_constants(operation: nn.Module) -> dict[str, Tensor]:
    """The float64 values, by name, of constants of an operation that its precision cannot hold."""
    return getattr(operation, "exact", {})


def _is_rounding_of(present: Tensor, value: Tensor) -> bool:
    return not present.is_meta and torch.equal(present.detach().cpu(), value.to(present.dtype))


class Network(Graph):
    """An image classifier in canonical form: images (B, C, H, W) -> logits (B, classes).

    Raises:
        InvalidInputError: as :class:`Graph`; or the input is not an image, or the output not a vector of two classes
            or more: with one, no image has another class, and every radius would be certified.
    """

    input_shape: tuple[int, int, int]
    notes: tuple[str, ...] = ()  # what its reader took for granted

    def __init__(self, input_shape: Sequence[int], nodes: Sequence[Node]) -> None:
        if len(input_shape) != 3:
            raise InvalidInputError(f"input shape {tuple(input_shape)}: expected (channels, height, width)")
        super().__init__(input_shape, nodes)
        if len(self.output_shape) != 1 or self.output_shape[0] < 2:
            raise InvalidInputError(
                f"network output of shape (batch, {', '.join(map(str, self.output_shape))}): expected logits of shape "
                "(batch, classes >= 2)"
            )

    @classmethod
    def sequential(cls, input_shape: Sequence[int], modules: Sequence[nn.Module]) -> Network:
        """A chain of copies of canonical operations.

        Raises:
            UnsupportedOperationError, InvalidInputError: as the class.
        """
        nodes: list[Node] = []
        name, shape = INPUT, tuple(input_shape)
        for position, module in enumerate(modules):
            operation = copy.deepcopy(module)
            if hasattr(operation, "inplace"):
                operation.inplace = False  # type: ignore[assignment]
            check_operation(operation)
            shape = output_shape(operation, [shape])
            nodes.append(Node(f"{position}_{operation_name(operation)}", operation, (name,), shape))
            name = nodes[-1].name
        return cls(input_shape, nodes)

    @property
    def num_classes(self) -> int:
        return self.output_shape[0]

    @property
    def grid(self) -> Grid:
        """The pixel grid of the input."""
        channels, height, width = self.input_shape
        return Grid(height, width, channels)
