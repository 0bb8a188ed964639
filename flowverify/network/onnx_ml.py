"""What the operators of the domain ``ai.onnx.ml`` become, which files of scikit-learn have beside the usual ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowverify.errors import InvalidInputError, UnsupportedOperationError
from flowverify.network import compositions as compose
from flowverify.network.builder import Builder, Value
from flowverify.network.onnx_operators import Attributes, Handler, refused

DOMAIN = "ai.onnx.ml"
TRANSFORM = "post_transform"
LOGITS = "logits"  # the name under which the handler finds whether its transform is dropped
TRANSFORMS = {b"NONE": None, b"SOFTMAX": "Softmax", b"LOGISTIC": "Sigmoid"}


def _numbers(attributes: Attributes, name: str) -> Tensor:
    """A list of numbers, which files hold in float32."""
    return torch.tensor(attributes.pop(name, []), dtype=torch.float32)


def _classified(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> list[Any]:
    """LinearClassifier: x W^T + b, then its transform; the first result, the class itself, is not computed.

    One row of weights for two classes is the logit s of the second one. With LOGISTIC the answer is 1 - sigmoid(s)
    beside sigmoid(s), the sigmoids of -s and s.
    """
    value: Value = inputs[0]
    names = attributes.pop("classlabels_ints", []) or attributes.pop("classlabels_strings", [])
    coefficients, bias = _numbers(attributes, "coefficients"), _numbers(attributes, "intercepts")
    attributes.pop("multi_class", 0)  # which of the ways to many classes made the weights
    transform, dropped = attributes.pop(TRANSFORM, b"NONE"), attributes.pop(LOGITS, False)
    rows = len(bias) or len(names)
    if value.rank != 1 or not rows or coefficients.numel() != rows * value.shape[0]:
        raise InvalidInputError(
            f"{coefficients.numel()} coefficients in {rows} rows: expected {rows} x {value.shape[-1]} for samples of "
            f"shape {value.shape}"
        )
    if transform not in TRANSFORMS:
        raise UnsupportedOperationError(
            f"{TRANSFORM} {transform.decode()!r} is not supported: expected NONE, SOFTMAX or LOGISTIC"
        )
    if len(names) != max(rows, 2):
        raise InvalidInputError(f"{rows} rows of coefficients: expected as many as classes, {len(names)}")
    weight = coefficients.reshape(rows, -1)
    if rows == 1:
        if TRANSFORMS[transform] != "Sigmoid":
            raise UnsupportedOperationError(
                f"one row of coefficients with {TRANSFORM} {transform.decode()!r} is not supported: 1 - s and s are in "
                "another order than the class, by the sign of s; expected LOGISTIC, or two rows"
            )
        weight, bias = torch.cat([-weight, weight]), torch.cat([-bias, bias])
    logits = builder.linear(value, weight, bias if len(bias) else None, label)
    return [None, _transformed(builder, logits, None if dropped else TRANSFORMS[transform], label)]


def _transformed(builder: Builder, value: Value, transform: str | None, label: str) -> Value:
    if transform == "Softmax":
        return compose.softmax(builder, value, 0, label)
    return value if transform is None else builder.add(nn.Sigmoid(), [value], label)


def _scaled(builder: Builder, inputs: list[Any], attributes: Attributes, label: str) -> Value:
    """Scaler: (x - offset) * scale, one number for all features or one each."""
    value: Value = inputs[0]
    offset, scale = (_numbers(attributes, name).double() for name in ("offset", "scale"))
    for name, given in (("offset", offset), ("scale", scale)):
        if value.rank != 1 or given.numel() not in (1, *value.shape):
            raise InvalidInputError(
                f"{name} of {given.numel()} numbers: expected one, or one for each feature of samples {value.shape}"
            )
    return builder.scale_shift(value, scale, -offset * scale, label)


HANDLERS: dict[str, Handler] = {
    "LinearClassifier": _classified,
    "Scaler": _scaled,
    "Normalizer": refused(
        "it divides by the norm of each image. The L1 norm of a nonnegative image is its mass, which is the same all "
        "over the ball but not for all images, and a network is one function of all images; divide the images instead, "
        "and leave it out of the file"
    ),
    "Binarizer": refused("it jumps; Clip of a steep line is the nearest function"),
    "TreeEnsembleClassifier": refused("trees jump; a network of Gemm and Relu is the nearest classifier"),
    "TreeEnsemble": refused("trees jump; a network of Gemm and Relu is the nearest classifier"),
    "SVMClassifier": refused("kernels; LinearClassifier is the nearest classifier"),
}
