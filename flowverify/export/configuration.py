"""The configuration of alpha-beta-CROWN for an L1 ball around 0, which a VNN-LIB file cannot say.

alpha-beta-CROWN reads a box from VNN-LIB, and with ``norm: 1`` beside such a file it takes the ball for one of radius
0 and proves everything. Only data from a loader of one's own come with a radius; hence the few lines of Python.
"""

from __future__ import annotations

import json

from flowverify.export.properties import Property
from flowverify.export.rounding import decimal

LOADER = "origin.py"

LOADER_TEXT = '''"""For alpha-beta-CROWN: the data of an l1-penalty property, the origin with a radius around it."""

import torch


def origin(spec, inputs):
    """One point, 0 in every flow; the ball is {X : ||X||_1 <= epsilon}."""
    return {
        "X": torch.zeros(1, inputs),
        "labels": torch.zeros(1, dtype=torch.int64),
        "eps": float(spec["epsilon"]),
        "norm": 1.0,
    }
'''


def configuration(prop: Property, onnx: str, budget: float, timeout: float) -> str:
    """The text of a YAML file: every output is to be positive over the L1 ball of radius ``budget``.

    Args:
        onnx: the path of the network, relative to the file.
    """
    inputs = len(prop.lower)
    loader = json.dumps(f'Customized("{LOADER}", "origin", inputs={inputs})')
    return f"""\
# alpha-beta-CROWN: run `abcrown.py --config` with this file, in its own folder.
# safe: every image of the ball is classified right. Do not add the .vnnlib: its box is larger than the ball.
general:
  device: cpu
  conv_mode: matrix
model:
  onnx_path: {json.dumps(onnx)}
  input_shape: [-1, {inputs}]
data:
  dataset: {loader}
  num_outputs: {prop.outputs}
  start: 0
  end: 1
specification:
  type: lp
  norm: 1.0
  epsilon: {decimal(budget)}
  robustness_type: all-positive
attack:
  pgd_order: skip
bab:
  timeout: {timeout:g}
"""
