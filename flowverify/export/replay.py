"""A counterexample counts only after it was replayed: on the exported file, then on the original network.

Verifiers return points on the boundary of what they were asked, up to tolerances of their own. So the witness is
first made a valid image (no negative pixel, the image's mass, within the radius), and then moved on inside the ball
by a few steps of Frank-Wolfe, whose oracle is exact; from all of these the nearest counterexample is hunted. Only what
the replayed image shows is ever claimed, by the rule of :mod:`flowverify.network.subject`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowverify.ball import INSIDE, WassersteinBall
from flowverify.certifiers.base import BaseCertifier
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.errors import DependencyError, SolverError
from flowverify.export.encodings import Encoding
from flowverify.export.inputs import FlowInputs
from flowverify.export.rounding import FloatArray
from flowverify.network.subject import surplus

STEPS = 12
NEIGHBOURS = 4
SHARES = (1e-4, 1e-3, 0.01, 0.05, 0.25, 1.0)
SCALES = (1.0, 1.25, 1.5)  # of the ball: what is found a little outside of it is pulled to the boundary, perhaps inside
TOLERANCE = 1e-3  # of the largest output: verifiers round; the original network decides


@dataclass(frozen=True, eq=False)
class Replay:
    """``falsified`` with the image that shows it, or the reason why the witness shows nothing."""

    falsified: bool
    image: Tensor | None = None  # (C, H, W), float64
    distance: float | None = None  # of normalised images, in pixels
    reason: str = ""


def replay(
    certifier: BaseCertifier,
    image: Tensor,  # (C, H, W)
    label: int,
    ball: WassersteinBall,
    values: FloatArray,
    inputs: FlowInputs,
    encoding: Encoding,
    onnx: Path,
) -> Replay:
    """Whether the input vector that a verifier returned leads to a misclassified image of the ball.

    Args:
        certifier: the original network, in its own precision and in float64.
        values: X, (inputs.size,).
        onnx: the exported file that the verifier was given.

    Raises:
        DependencyError: onnxruntime is not installed.
    """
    outputs = run_onnx(onnx, values)
    exported = _exported_margin(outputs, label, encoding, certifier.network.num_classes)
    if not exported <= TOLERANCE * (1 + float(np.abs(outputs).max())):
        return Replay(False, reason=f"replay: the exported network does not confirm it, margin {exported:.3g}")
    try:
        return falsify(certifier, inputs.image(values), image, label, ball)
    except SolverError as error:
        return Replay(False, reason=f"replay: the distance of the witness could not be computed ({error})")


def falsify(
    certifier: BaseCertifier,
    point: Tensor,  # (C, H, W)
    image: Tensor,  # (C, H, W)
    label: int,
    ball: WassersteinBall,
    scales: Sequence[float] = SCALES,
) -> Replay:
    """A counterexample of the ball on the original network, looked for near a point that need not lie in the ball.

    Args:
        scales: how much larger the balls are that it is looked for in; what is outside of the ball does not count.

    Raises:
        SolverError: an exact distance could not be computed.
    """
    centre, point = image.detach().cpu().double(), point.detach().cpu().double()
    nearest = NearestCounterexample(certifier.subject, centre.to(certifier.device), label, ball.threat)
    margins = []
    for scale in scales:
        larger = ball.with_radius(scale * ball.radius)
        start = repaired(point, centre, larger)
        best, margin = descend(certifier, start, centre, label, larger)
        margins.append(margin)
        nearest.offer(torch.stack([point, start, best]).to(certifier.device), descend=True)
        if nearest.witness is not None and nearest.radius <= ball.radius:
            return Replay(True, nearest.witness.cpu(), nearest.radius)
    return Replay(False, reason=f"replay: the original network keeps the label, margin {margins[0]:.3g}")


def run_onnx(path: Path, values: FloatArray) -> FloatArray:
    """The outputs of an ONNX file for one input vector, by onnxruntime on the CPU.

    Raises:
        DependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError("replaying witnesses needs onnxruntime: pip install 'flowverify[runtime]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    outputs = session.run(None, {name: values.astype(np.float32)[None]})[0][0]
    return np.asarray(outputs, dtype=np.float64)


def repaired(point: Tensor, image: Tensor, ball: WassersteinBall) -> Tensor:
    """An image of the ball near a point, both (C, H, W) in float64.

    Where no plan of the ground cost leads to the point, it is the one that goes farthest in its direction.

    Raises:
        SolverError: an exact distance could not be computed.
    """
    around = ball.around(image)
    valid, centre = ball.threat.repair(around.images, point[None]), around.images
    if not bool(torch.isfinite(ball.threat.price(centre, valid))):
        return around.with_budget(around.budget * INSIDE).best_moves(valid - centre).image[0]
    return around.pull_back(valid)[0]


def _exported_margin(outputs: FloatArray, label: int, encoding: Encoding, classes: int) -> float:
    if encoding.penalised:
        return float(outputs.min())
    logits = outputs[:classes]
    return float(logits[label] - np.delete(logits, label).max())


def descend(
    certifier: BaseCertifier, start: Tensor, image: Tensor, label: int, ball: WassersteinBall
) -> tuple[Tensor, float]:
    """The image of least margin f_label - max f_t met on the way, and that margin in float64.

    Frank-Wolfe over the ball: the cost of the cheapest plan is convex for every ground cost, so that mixtures of images
    of the ball stay inside.
    """
    network, device = certifier.precise, certifier.device  # weights need no gradient
    inside = ball.around(image)[[0] * NEIGHBOURS]
    inside = inside.with_budget(inside.budget * INSIDE)

    def margins(candidates: Tensor) -> Tensor:
        labels = torch.full((len(candidates),), label, device=device)
        return -surplus(network(candidates.to(device)), labels).cpu()

    generator = torch.Generator().manual_seed(0)
    best, least = start, float(margins(start[None]))
    for step in range(STEPS):
        # The witness often lies on a kink, where one gradient tells little: those of points nearby do.
        noise = torch.randn(NEIGHBOURS, *image.shape, generator=generator, dtype=torch.float64)
        noise[0] = 0
        points = (best + float(image.max()) * 10.0 ** -(2 + step % 4) * noise).requires_grad_(True)
        slopes = torch.autograd.grad(margins(points).sum(), points)[0].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        vertices = inside.best_moves(-slopes).image
        trials = torch.stack([best + share * (vertex - best) for vertex in vertices for share in SHARES])
        with torch.no_grad():
            values = margins(trials)
        at = int(values.argmin())
        if values[at] < least:
            least, best = float(values[at]), trials[at]
    return best.clamp(min=0), least
