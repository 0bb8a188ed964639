"""Networks: reading, canonical form, folding of the flow map, writing."""

from flowverify.network.affine import FoldedNetwork, affine_rows, fold
from flowverify.network.from_onnx import read_onnx
from flowverify.network.from_torch import from_torch
from flowverify.network.graph import INPUT, Graph, Network, Node
from flowverify.network.load import load_network
from flowverify.network.operations import (
    Add,
    Concatenate,
    Index,
    Pad,
    Permute,
    Reshape,
    ScaleShift,
    Subtract,
    is_affine,
    is_elementwise_activation,
    operation_name,
)
from flowverify.network.rounding import RoundingBound
from flowverify.network.to_onnx import onnx_model, write_onnx

__all__ = [
    "INPUT",
    "Add",
    "Concatenate",
    "FoldedNetwork",
    "Graph",
    "Index",
    "Network",
    "Node",
    "Pad",
    "Permute",
    "Reshape",
    "RoundingBound",
    "ScaleShift",
    "Subtract",
    "affine_rows",
    "fold",
    "from_torch",
    "is_affine",
    "is_elementwise_activation",
    "load_network",
    "onnx_model",
    "operation_name",
    "read_onnx",
    "write_onnx",
]
