"""The batched support function against HiGHS, one linear program a neuron, on a real network at 28x28.

    python -m benchmarks.support_against_highs [--images 15] [--radius 0.05] [--model mnist-fc3]

The neurons are the 100 of the first and the 100 of the second layer of mnist-fc3 (the second linearised at the
image), bounded from above over the ball around each MNIST test image: 200 neurons an image. HiGHS gets the
flow formulation. Its model is built once an image and only the objective changes from neuron to neuron, so
that it starts from the last basis: its fastest use here.
"""

from __future__ import annotations

import argparse

import highspy
import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

import flowverify as fv
from benchmarks.common import header, stopwatch
from flowverify.grid import Grid
from flowverify.transport.support import inner, support


def neurons_of(network: fv.Network, images: Tensor) -> Tensor:
    """Coefficients of both hidden layers in the image domain, (B, 200, 1, 28, 28)."""
    first, second = [node.operation for node in network.nodes if isinstance(node.operation, nn.Linear)][:2]
    active = (first(images.flatten(1)) > 0).to(images.dtype)
    through = torch.einsum("kh,bh,hp->bkp", second.weight, active, first.weight)
    both = torch.cat([first.weight.expand(len(images), -1, -1), through], dim=1)
    return both.reshape(len(images), -1, *images.shape[1:])


class FlowProgram:
    """max c . (mu + A(p - q)) over p, q >= 0, sum(p + q) <= budget, mu + A(p - q) >= 0."""

    def __init__(self, image: Tensor, budget: float) -> None:
        self.incidence = Grid.of(image).incidence_scipy()
        pixels, edges = self.incidence.shape
        matrix = scipy.sparse.vstack(
            [
                scipy.sparse.hstack([self.incidence, -self.incidence]),
                scipy.sparse.csr_array(np.ones((1, 2 * edges))),
            ]
        ).tocsc()
        program = highspy.HighsLp()
        program.num_col_, program.num_row_ = 2 * edges, pixels + 1
        program.col_cost_ = np.zeros(2 * edges)
        program.col_lower_, program.col_upper_ = np.zeros(2 * edges), np.full(2 * edges, highspy.kHighsInf)
        program.row_lower_ = np.concatenate([-image.flatten().numpy(), [-highspy.kHighsInf]])
        program.row_upper_ = np.concatenate([np.full(pixels, highspy.kHighsInf), [budget]])
        program.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        program.a_matrix_.start_, program.a_matrix_.index_ = matrix.indptr, matrix.indices
        program.a_matrix_.value_ = matrix.data
        program.sense_ = highspy.ObjSense.kMaximize
        self.solver = highspy.Highs()
        self.solver.setOptionValue("output_flag", False)
        self.solver.passModel(program)
        self.columns = np.arange(2 * edges, dtype=np.int32)

    def excess(self, coefficients: Tensor) -> float:
        gain = self.incidence.T @ coefficients.flatten().numpy()
        self.solver.changeColsCost(len(self.columns), self.columns, np.concatenate([gain, -gain]))
        self.solver.run()
        if self.solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
            raise RuntimeError(f"HiGHS: {self.solver.getModelStatus()}")
        return float(self.solver.getInfo().objective_function_value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=15)
    parser.add_argument("--radius", type=float, default=0.05)
    options = parser.parse_args()
    network = fv.load_model("mnist-fc3").double()
    images = fv.load_dataset("mnist")[0 : options.images].images.double()
    coefficients = neurons_of(network, images)
    budget = options.radius * images.flatten(1).sum(1)
    count = coefficients.shape[0] * coefficients.shape[1]
    header(f"Support function against HiGHS: {count} neurons of mnist-fc3 at 28x28, radius {options.radius}")

    results = {}
    for name, precision, backend in (
        ("compiled, float32", torch.float32, "compiled"),
        ("compiled, float64", torch.float64, "compiled"),
        ("torch, float64", torch.float64, "torch"),
    ):
        arguments = coefficients.to(precision), images.to(precision), budget.to(precision)
        support(arguments[0][:1], arguments[1][:1], arguments[2][:1], backend=backend)
        with stopwatch() as taken:
            found = support(*arguments, backend=backend)
        results[name] = found.excess.double(), taken[0]

    optimum = torch.empty(coefficients.shape[:2], dtype=torch.float64)
    with stopwatch() as taken:
        for image, rows in enumerate(coefficients):
            program = FlowProgram(images[image], float(budget[image]))
            for neuron, row in enumerate(rows):
                optimum[image, neuron] = program.excess(row)
    highs_seconds = taken[0]
    print(f"{'HiGHS':18} {highs_seconds:9.3f} s, {highs_seconds / count * 1e6:10.1f} us a neuron")
    scale = inner(coefficients.abs(), images)
    for name, (excess, seconds) in results.items():
        difference = excess - optimum
        print(
            f"{name:18} {seconds:9.3f} s, {seconds / count * 1e6:10.1f} us a neuron, {highs_seconds / seconds:8.0f} "
            f"times faster, excess off the optimum by at most "
            f"{float((difference.abs() / optimum).max()):.1e} relative, "
            f"never below it by more than {float((-difference / scale).max().clamp(min=0)):.1e} of |c|.mu"
        )


if __name__ == "__main__":
    main()
