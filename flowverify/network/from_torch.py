"""Converts a ``torch.nn.Module`` to canonical form.

A ``nn.Sequential`` of known layers is converted layer by layer; any other module through ``torch.export``.

Modules whose own code mixes the batch with other dimensions are given code that leaves it first.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from flowverify.errors import FlowverifyError, InvalidInputError, UnsupportedOperationError
from flowverify.network.aten import ANY_PLACE, HANDLERS, RESHAPES, Handler
from flowverify.network.builder import Builder, Value
from flowverify.network.graph import Network
from flowverify.network.operations import ADDED, first_line
from flowverify.network.reading import Ending, InputForm, Reading, module_form, softmax_over_classes
from flowverify.network.rounding import RoundingBound
from flowverify.quiet import without_warnings


class BatchFirstAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention``, which joins the batch with the heads, with the heads as a dimension of their own.

    What it does not cover (masks of padding, a batch that comes second, added biases) is left to torch.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        plain = self.batch_first and query.dim() == 3 and self._qkv_same_embed_dim and self.bias_k is None
        masked = attn_mask is not None and attn_mask.dim() != 2
        if not plain or masked or self.add_zero_attn or key_padding_mask is not None:
            given: dict[str, Any] = {
                "key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask,
                "average_attn_weights": average_attn_weights, "is_causal": is_causal,
            }  # fmt: skip
            return super().forward(query, key, value, **given)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True masks out here, and lets through below
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        shape = (self.num_heads, self.head_dim)
        heads = [
            functional.linear(one, weight, bias).reshape(*one.shape[:2], *shape).permute(0, 2, 1, 3)
            for one, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=attn_mask)
        result = self.out_proj(mixed.permute(0, 2, 1, 3).flatten(2))
        if not need_weights:
            return result, None
        scores = heads[0] @ heads[1].transpose(2, 3) * self.head_dim**-0.5
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
        if attn_mask is not None:
            scores = scores + attn_mask
        shares = scores.softmax(3)
        return result, shares.mean(1) if average_attn_weights else shares


def leave_batch_first(module: nn.Module) -> None:
    """Gives modules of a tree such code, in place; their weights and their options stay as they are."""
    for part in module.modules():
        if type(part) is nn.MultiheadAttention:
            part.__class__ = BatchFirstAttention


_SIMPLE = (
    nn.Linear, nn.Conv2d, nn.ReLU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Flatten, nn.AvgPool2d, nn.MaxPool2d,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d, nn.Identity,
)  # fmt: skip
_CASTS = ("to", "_to_copy")
_CREATIONS = ("new_zeros", "new_ones", "new_full", "zeros_like", "ones_like", "full_like")
# Of an operator: where and how its result is kept, and what acts in training alone.
_WITHOUT_EFFECT = (
    "memory_format", "layout", "device", "pin_memory", "non_blocking", "copy", "momentum", "cudnn_enabled", "p",
    "cudnn_enable", "dropout",
)  # fmt: skip
_ENDS = {
    "softmax": "Softmax", "_softmax": "Softmax", "_safe_softmax": "Softmax", "log_softmax": "LogSoftmax",
    "_log_softmax": "LogSoftmax", "sigmoid": "Sigmoid",
}  # fmt: skip
BATCH_FIRST = "an operation that mixes or moves the batch dimension is not supported"
_SYMBOLIC_SAFE = ("sym_size", "slice", "zeros", "ones", "new_zeros", "new_ones", "expand", *RESHAPES)


def from_torch(module: nn.Module, input_shape: Sequence[int], reading: Reading | None = None) -> Network:
    """The canonical form of ``module`` in evaluation mode; the module itself is left as it is.

    Args:
        module: maps images (B, C, H, W) to logits (B, classes), or to what a softmax or a sigmoid makes of them, or to
            one logit an image.
        input_shape: (C, H, W).
        reading: what the module does not say about itself.

    Raises:
        UnsupportedOperationError: the module cannot be traced, has an unknown operation (named), or its
            converted form does not compute what the module computes.
        InvalidInputError: the input shape, the output shape or a weight is not what a network can have.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise InvalidInputError(f"input shape {tuple(input_shape)}: expected (channels, height, width)")
    try:
        own = _copy(module).cpu().eval().requires_grad_(False)
    except Exception as error:  # a module may define its own copying
        raise UnsupportedOperationError(f"{_title(module)} cannot be copied: {first_line(error)}") from error
    own = own.float() if _is_half(own) else own
    reading = reading or Reading()
    channels, height, width = (int(size) for size in input_shape)
    frame = _Frame(module_form((channels, height, width), reading.layout), reading, _precision(own))
    layers = list(_layers(own))
    if layers and all(_is_simple(layer) for layer in layers):
        network = _from_layers(layers, frame)
    else:
        traced = _copy(own)
        leave_batch_first(traced)
        network = _from_export(traced, frame)
    _compare(own, network, frame)
    network.notes = (*((frame.form.note,) if reading.layout else ()), *frame.ending.notes)
    return network


def _copy(module: nn.Module) -> nn.Module:
    with without_warnings():  # torch has some about how its own exported programs are copied
        return copy.deepcopy(module)


class _Frame:
    """What is around a module: how images come in, and what is taken off its end."""

    def __init__(self, form: InputForm, reading: Reading, dtype: torch.dtype) -> None:
        self.form, self.reading, self.dtype, self.ending = form, reading, dtype, Ending()

    def builder(self) -> tuple[Builder, Value]:
        """A builder, and what the module reads of it."""
        builder = Builder(self.form.shape, self.dtype)
        return builder, self.form.enter(builder, self.reading.normalise(builder, builder.input))

    def finish(self, builder: Builder, value: Value) -> Network:
        return builder.finish(self.ending.logits(builder, value))

    def answer(self, module: nn.Module, images: Tensor) -> Any:
        """What the module answers for images (B, C, H, W)."""
        given = self.form.arrange(self.reading.normalised(images).to(images.dtype))
        answer = module(given)
        return answer if isinstance(answer, Tensor) else self.chosen(answer)

    def chosen(self, outputs: Any) -> Any:
        """One of several outputs.

        Raises:
            UnsupportedOperationError: the reading names none of them.
        """
        wanted, outputs = self.reading.output, list(outputs)
        if len(outputs) == 1 and wanted is None:
            return outputs[0]
        if wanted is None or not wanted.isdigit() or int(wanted) >= len(outputs):
            raise UnsupportedOperationError(
                f"output {wanted!r} of a module that returns {len(outputs)} values: expected output= a position, 0 to "
                f"{len(outputs) - 1}"
            )
        return outputs[int(wanted)]


def _title(module: nn.Module) -> str:
    return f"module {type(module).__name__}"


def _is_half(module: nn.Module) -> bool:
    """Whether all weights are float16 or bfloat16, which float32 holds exactly."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found = {tensor.dtype for _, tensor in tensors if tensor.is_floating_point()}
    return bool(found) and found <= {torch.float16, torch.bfloat16}


def _precision(module: nn.Module) -> torch.dtype:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    found = {tensor.dtype for _, tensor in tensors if tensor.is_floating_point()}
    if len(found) > 1 or not found <= {torch.float32, torch.float64}:
        raise InvalidInputError(
            f"{_title(module)} with weights of type {sorted(map(str, found))}: expected all float32 or all float64"
        )
    return found.pop() if found else torch.float32


def _is_simple(layer: nn.Module) -> bool:
    return (type(layer) in _SIMPLE or type(layer) in ADDED) and not _is_modified(layer)


def _is_modified(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential and not _is_modified(module):
        for child in module:
            yield from _layers(child)
    else:
        yield module


def _from_layers(layers: Sequence[nn.Module], frame: _Frame) -> Network:
    builder, value = frame.builder()
    if len(layers) > 1 and isinstance(layers[-1], nn.Sigmoid):
        layers = layers[:-1]
        frame.ending.drop("Sigmoid")
    for position, layer in enumerate(layers):
        label = f"{position}_{type(layer).__name__}"
        try:
            value = _from_layer(builder, layer, value, label)
        except (InvalidInputError, UnsupportedOperationError) as error:
            raise type(error)(f"layer {position} ({type(layer).__name__}): {error}") from None
    return frame.finish(builder, value)


def _from_layer(builder: Builder, layer: nn.Module, value: Value, label: str) -> Value:
    match layer:
        case nn.Linear():
            return builder.linear(value, layer.weight, layer.bias, label)
        case nn.Conv2d():
            if layer.padding_mode != "zeros":
                raise UnsupportedOperationError(f"Conv2d with padding_mode={layer.padding_mode!r} is not supported")
            arguments = {key: getattr(layer, key) for key in ("weight", "bias", "stride", "dilation", "groups")}
            return _value(HANDLERS["conv2d"](builder, arguments | {"input": value, "padding": layer.padding}, label))
        case nn.AvgPool2d() | nn.MaxPool2d():
            if getattr(layer, "return_indices", False):
                raise UnsupportedOperationError("MaxPool2d with return_indices is not supported")
            name = "avg_pool2d" if isinstance(layer, nn.AvgPool2d) else "max_pool2d"
            return _value(HANDLERS[name](builder, {"self": value, **vars(layer)}, label))
        case nn.BatchNorm1d() | nn.BatchNorm2d():
            parameters = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
            return builder.batch_norm(value, parameters, layer.eps, label)
        case nn.Dropout() | nn.Dropout2d() | nn.Identity():
            return value
        case nn.LeakyReLU():
            return builder.add(nn.LeakyReLU(layer.negative_slope), [value], label)
        case _ if type(layer) in ADDED:
            return builder.add(copy.deepcopy(layer), [value], label)
        case nn.ReLU() | nn.Sigmoid() | nn.Tanh():
            return builder.add(type(layer)(), [value], label)
        case nn.Flatten():
            # flatten() of one sample, whose dimensions count from 1 when they are positive
            meta = torch.empty(2, *value.shape, device="meta")
            flat = meta.flatten(layer.start_dim, layer.end_dim)
            if flat.shape[0] != 2:
                raise UnsupportedOperationError("Flatten of the batch dimension is not supported")
            return builder.reshape(value, flat.shape[1:], label)
    raise UnsupportedOperationError(f"layer {type(layer).__name__} is not supported")


def _value(result: Any) -> Value:
    if not isinstance(result, Value):
        raise UnsupportedOperationError("an operation with a constant or with several results is not supported here")
    return result


def _from_export(module: nn.Module, frame: _Frame) -> Network:
    sample = torch.zeros(2, *frame.form.sample, dtype=frame.dtype)
    try:
        with without_warnings():  # what torch has to say about its own recurrent layers
            program = torch.export.export(
                module, (sample,), dynamic_shapes=({0: torch.export.Dim("batch")},)
            ).run_decompositions({})
    except Exception as error:  # tracing runs the caller's code, which may raise anything
        raise UnsupportedOperationError(f"{_title(module)} cannot be traced: {first_line(error)}") from error
    return _Lowering(program, frame).network()


class _Lowering:
    """Walks through an exported program; every tensor's batch dimension must come first and stay whole."""

    def __init__(self, program: torch.export.ExportedProgram, frame: _Frame) -> None:
        self.program, self.frame = program, frame
        self.builder, self.entered = frame.builder()
        self.tail: set[fx.Node] = set()
        self.known: dict[fx.Node, Any] = {}
        self.batch = ""

    def network(self) -> Network:
        signature = self.program.graph_signature
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise UnsupportedOperationError("a module that changes its own state is not supported")
        (end,) = (node for node in self.program.graph.nodes if node.op == "output")
        output = self.frame.chosen(end.args[0])
        self.tail = _tail(output)
        stored = {**self.program.constants, **self.program.state_dict}
        names = {
            **signature.inputs_to_parameters, **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }  # fmt: skip
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in names:
                    self.known[node] = stored[names[node.name]].detach()
                else:
                    self.known[node] = self.entered
                    self.batch = str(node.meta["val"].shape[0])
            elif node.op != "output" and node.users:
                self.known[node] = self._lower(node)
            if node is output:
                break  # what comes after belongs to other outputs
        return self._finish(output)

    def _finish(self, node: Any) -> Network:
        value = self.known.get(node)
        if not isinstance(value, Value) or value.batch:
            raise UnsupportedOperationError("an output that does not depend on the input is not supported")
        return self.frame.finish(self.builder, value)

    def _lower(self, node: fx.Node) -> Any:
        target = node.target
        overload = getattr(target, "_schema", None)
        name = overload.name.removeprefix("aten::") if overload else getattr(target, "__name__", str(target))
        try:
            result = self._apply(node, name)
            self._check(node, result)
            return result
        except FlowverifyError as error:
            raise type(error)(f"operation {name} ({node.name}): {error}") from None
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UnsupportedOperationError(
                f"operation {name} ({node.name}) is not supported with these arguments: {first_line(error)}"
            ) from error

    def _apply(self, node: fx.Node, name: str) -> Any:
        arguments: Any = fx.node.map_arg(node.args, self.known.__getitem__)
        keywords: Any = fx.node.map_arg(node.kwargs, self.known.__getitem__)
        given = [*node.args, *node.kwargs.values()]
        symbolic = any(isinstance(a, fx.Node) and isinstance(a.meta.get("val"), torch.SymInt) for a in given)
        if symbolic and name not in _SYMBOLIC_SAFE and node.target.__module__ != "_operator":
            raise UnsupportedOperationError("computing with the size of the batch is not supported")
        if node.target is operator.getitem:
            return arguments[0][arguments[1]]
        flat: list[Any] = []
        fx.node.map_aggregate((arguments, keywords), flat.append)
        if name == "sym_size":
            value = arguments[0]
            shape = (1, *value.shape) if isinstance(value, Value) else value.shape
            return shape[arguments[1]]
        if name in _CREATIONS and isinstance(arguments[0], Value):
            arguments = (torch.zeros(1, *arguments[0].shape, dtype=self.builder.dtype), *arguments[1:])
            return self._constant(node, name, arguments, keywords)
        if not any(isinstance(argument, Value) for argument in flat):
            return self._constant(node, name, arguments, keywords)
        if name in RESHAPES:
            return self._reshaped(node, arguments[0])
        if node in self.tail and (kept := _ENDS.get(name)) is not None:
            axis = 1 if kept == "Sigmoid" else int(arguments[1])
            if kept == "Sigmoid" or softmax_over_classes(axis, arguments[0].shape):
                self.frame.ending.drop(kept)
                return arguments[0]
        if name not in ANY_PLACE and any(isinstance(argument, Value) and argument.batch for argument in flat):
            raise UnsupportedOperationError(BATCH_FIRST)
        if name not in HANDLERS or not isinstance(node.target, torch._ops.OpOverload):
            raise UnsupportedOperationError("is not supported")
        bound = {
            parameter.name: keywords.get(parameter.name, parameter.default_value)
            for parameter in node.target._schema.arguments
        }
        bound.update(zip(bound, arguments, strict=False))
        defaults = {parameter.name: parameter.default_value for parameter in node.target._schema.arguments}
        return _handled(HANDLERS[name], self.builder, Given(bound), defaults, node.name)

    def _constant(self, node: fx.Node, name: str, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Runs an operator on constants: what the module computes in its precision, in float64.

        A change from float64 to the module's precision that the module asks for is a rounding that is meant.
        """
        single, traced = torch.float32, node.meta.get("val")
        if self.builder.dtype != single or not isinstance(traced, Tensor) or not traced.is_floating_point():
            return _constant_result(node.target, arguments, keywords)
        sources = [a.meta.get("val") for a in node.all_input_nodes]
        kinds = {source.dtype for source in sources if isinstance(source, Tensor) and source.is_floating_point()}
        if traced.dtype == single and (name not in _CASTS or kinds == {single}):
            widened: Any = fx.node.map_aggregate((arguments, keywords), _widened)
            arguments, keywords = widened
        return _constant_result(node.target, arguments, keywords)

    def _reshaped(self, node: fx.Node, value: Value) -> Value:
        """Any change of shape that leaves as many entries before the batch as there were."""
        traced = node.meta["val"]
        batch = self._batch_of(traced)
        sizes = [int(size) for position, size in enumerate(traced.shape) if position != batch]
        if math.prod(sizes[:batch]) != math.prod(value.shape[: value.batch]):
            raise UnsupportedOperationError(BATCH_FIRST)
        return replace(self.builder.reshape(value, sizes, node.name), batch=batch)

    def _check(self, node: fx.Node, result: Any) -> None:
        """The result must have the traced shape, with the batch where it was traced; constants have a batch of 1."""
        traced = node.meta.get("val")
        if isinstance(result, Tensor) and isinstance(traced, Tensor):
            sizes = tuple(1 if isinstance(size, torch.SymInt) else int(size) for size in traced.shape)
            if tuple(result.shape) != sizes:
                raise UnsupportedOperationError(f"is a constant of shape {tuple(result.shape)}, expected {sizes}")
        if isinstance(result, Value) and isinstance(traced, Tensor):
            batch = self._batch_of(traced)
            expected = tuple(int(size) for position, size in enumerate(traced.shape) if position != batch)
            if result.shape != expected or result.batch != batch:
                raise UnsupportedOperationError(f"has shape {result.shape} for one sample, expected {expected}")
            if traced.dtype != self.builder.dtype:
                raise UnsupportedOperationError(f"a result of type {traced.dtype} is not supported")

    def _batch_of(self, traced: Tensor) -> int:
        """Where the batch stands in a value: in one place, and whole."""
        places = [position for position, size in enumerate(traced.shape) if isinstance(size, torch.SymInt)]
        if len(places) != 1 or str(traced.shape[places[0]]) != self.batch:
            raise UnsupportedOperationError(BATCH_FIRST)
        return places[0]


def _tail(output: Any) -> set[fx.Node]:
    """The operations before an output that nothing else reads, and that may keep the order of its entries."""
    found: set[fx.Node] = set()
    node = output
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        schema = getattr(node.target, "_schema", None)
        name = schema.name.removeprefix("aten::") if schema else ""
        if name not in _ENDS and name not in RESHAPES:
            break
        found.add(node)
        node = node.args[0]
    return found


class Given(dict[str, Any]):
    """The arguments of an operator, which remembers those that were looked at."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return super().get(name, default)


def _handled(handler: Handler, builder: Builder, given: Given, defaults: dict[str, Any], label: str) -> Any:
    """The handler's result.

    Raises:
        UnsupportedOperationError: an argument that the handler did not look at has another value than its default.
    """
    result = handler(builder, given, label)
    for name, default in defaults.items():
        if name not in given.read and name not in _WITHOUT_EFFECT and given.get(name) != default:
            raise UnsupportedOperationError(f"the argument {name}={given.get(name)!r} is not supported")
    return result


def _constant_result(target: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
    """Runs an operator on constants.

    Raises:
        UnsupportedOperationError: it is random.
    """
    if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
        raise UnsupportedOperationError("a random operation is not supported")
    with torch.no_grad():
        result = target(*arguments, **keywords)
    return result.detach().clone() if isinstance(result, Tensor) else result


def _widened(argument: Any) -> Any:
    """An argument of an operator on constants, with float64 in the place of float32."""
    if argument is torch.float32:
        return torch.float64
    return argument.double() if isinstance(argument, Tensor) and argument.dtype == torch.float32 else argument


def _compare(module: nn.Module, network: Network, frame: _Frame) -> None:
    """Runs both on random images; a difference means an operation was converted wrongly."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, *network.input_shape, generator=generator, dtype=torch.float64).to(network.dtype)
    try:
        with torch.no_grad():
            expected = frame.answer(module, images)
    except FlowverifyError:
        raise
    except Exception as error:  # the caller's code may raise anything
        raise UnsupportedOperationError(f"{_title(module)} fails on a batch of 3: {first_line(error)}") from error
    found = network(images)
    found = frame.ending.answer(found)
    if isinstance(expected, Tensor):
        expected = expected.reshape(len(found), -1)
    close = isinstance(expected, Tensor) and expected.shape == found.shape and expected.dtype == found.dtype
    if not close or not (_agree(expected, found) or _agree_in_float64(module, network, frame, images)):
        raise UnsupportedOperationError(f"{_title(module)}: its converted form does not compute the same output")


def _agree(expected: Tensor, found: Tensor, rounding: Tensor | float = 0.0) -> bool:
    return bool(((found - expected).abs() <= 1e-4 * float(expected.abs().max()) + 1e-6 + rounding).all())


def _agree_in_float64(module: nn.Module, network: Network, frame: _Frame, images: Tensor) -> bool:
    """Whether both compute the same but for rounding, where large terms cancel: float32 has nothing to compare then."""
    precise, images = copy.deepcopy(network).double(), images.double()
    try:
        with torch.no_grad():
            expected = frame.answer(_copy(module).double(), images)
    except Exception:  # a module may insist on its precision
        return False
    rounding = RoundingBound(precise).margins(images.flatten(1).sum(1))
    found = frame.ending.answer(precise(images))
    return _agree(expected.reshape(found.shape), found, rounding[:, None])
