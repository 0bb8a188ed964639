"""Answers about exported properties by flowverify's own methods, as a tool of the competition VNN-COMP gives them.

A tool gets two files and says ``unsat``, ``sat`` with a counterexample, ``unknown``, ``timeout`` or ``error``. Of files
that were exported here it is known what they ask, so that the question can be put to attacks, bounds and complete
methods on images. Nothing that the manifest says is believed: network and property are built again from the original
network, and are to be those of the files, number by number (:func:`identify`).

What a property asks for is a little more than the ball: its constraints were rounded outward, and outputs are unsafe
that are near to it. ``unsat`` is answered if a certificate covers all of that (:func:`requirement`); ``sat`` only with
input values that fulfil the property to the last digit, with the outputs that the file's network computes for them.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx.reference
import torch
from torch import Tensor, nn

from flowverify.attack.base import FOUND, make_attack
from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.complete.certifier import CompleteCertifier
from flowverify.certifiers.incomplete import Certifier
from flowverify.certifiers.options import CompleteOptions
from flowverify.deadline import Deadline
from flowverify.errors import (
    BoundError,
    DependencyError,
    FlowverifyError,
    InvalidInputError,
    SolverError,
    UnsupportedOperationError,
)
from flowverify.export.encodings import (
    SLACK,
    ExportedNetwork,
    FloatArray,
    append_rows,
    decimal,
    exact_penalty_weight,
    first_and,
    largest_change,
    margin_rows,
    round_up,
    rounding_change,
    scalar_up,
    take_apart,
)
from flowverify.export.folder import MANIFEST, load_arrays, model_digest
from flowverify.export.plan import Instance, Property, Request, plan, write_property
from flowverify.export.results import descend, read_manifest, repaired, run_onnx
from flowverify.network import Network, Node, onnx_model
from flowverify.network.subject import Subject
from flowverify.results import Verdict
from flowverify.transport.references import flow_by_transport, flow_by_tree

Word = Literal["unsat", "sat", "unknown", "timeout", "error"]

ATTACK, ATTACK_SHARE = "minimal", 0.3  # and of the time, at most
STEP = 2.0**-23  # relative: from a float32 number to the next
FOLDING = 1e-12  # relative, to sums of absolute values: what folding in float64 may be off
OUTWARD = 1e-10  # relative: what sums of the constraints' numbers may be off
EVENLY = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # shares of an even image: mixed in, no rounding makes a pixel negative


class NotExportedError(InvalidInputError):
    """Files that are no instance of an export, or of one that cannot be built again here."""


@dataclass(frozen=True, eq=False)
class Question:
    """What two files ask, about which image of which network.

    Attributes:
        network: the original one; ``export`` is the one of the file, whose contents are ``onnx``.
        image: (C, H, W), of the network's own label ``instance.label``.
    """

    network: Network
    image: Tensor
    export: ExportedNetwork
    instance: Instance
    onnx: bytes


Load = Callable[[Path, dict[str, Any], tuple[int, int, int]], Network]


def identify(network_file: Path, property_file: Path, load: Load) -> Question:
    """The instance of an export that two files are, gzipped or not, below a folder with its manifest.

    Args:
        load: gives the original network for the folder, its manifest, and the shape of images.

    Raises:
        NotExportedError: no manifest two levels above the network; files of other digests than its own; another
            original network; or the export cannot be built again from that to the last digit.
        InvalidInputError: a file cannot be read.
    """
    contents, text = _read(network_file), _read(property_file)
    folder = network_file.absolute().parent.parent
    try:
        manifest = read_manifest(folder)
    except InvalidInputError as error:
        raise NotExportedError(str(error)) from error
    given = _digest(contents)
    paths = [path for path, about in manifest["networks"].items() if about["sha256"] == given]
    rows = [one for one in manifest["instances"] if one["onnx"] in paths and one["sha256"] == _digest(text)]
    if not rows:
        which = property_file.name if paths else network_file.name
        raise NotExportedError(f"{which}: expected a file with a SHA-256 that {folder / MANIFEST} has for an instance")
    try:
        arrays = load_arrays(folder)
        channels, height, width = arrays["images"].shape[1:]
        network = load(folder, manifest, (channels, height, width))
        if model_digest(network) != manifest["model_sha256"]:
            raise NotExportedError(f"folder {folder}: was exported from another network than {manifest['model']} is")
        return _built_again(folder, manifest, arrays, rows[0], network, contents, text)
    except NotExportedError:
        raise
    except FlowverifyError as error:
        raise NotExportedError(f"folder {folder}: cannot be built again from {manifest['model']} ({error})") from error


def _read(path: Path) -> bytes:
    """Of a file, or of the one beside it with the ending .gz."""
    packed = path.with_name(f"{path.name}.gz")
    path = path if path.exists() or not packed.is_file() else packed
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError) as error:
        raise InvalidInputError(f"file {path}: cannot be read ({error})") from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _built_again(
    folder: Path,
    manifest: dict[str, Any],
    arrays: dict[str, Tensor],
    row: dict[str, Any],
    network: Network,
    contents: bytes,
    text: bytes,
) -> Question:
    labels = {one["index"]: one["label"] for one in manifest["instances"] if one["onnx"] == row["onnx"]}
    places = arrays["indices"].tolist()
    indices = [index for index in dict.fromkeys(places) if index in labels]
    images = arrays["images"][[places.index(index) for index in indices]]
    request = Request(**{**manifest["request"], "radii": tuple(manifest["request"]["radii"])})
    export = next(plan(network, images, torch.tensor([labels[index] for index in indices]), request))
    place = indices.index(row["index"])
    asked = [line for line in text.decode("ascii", "replace").splitlines() if not line.startswith(";")]
    if onnx.load_model_from_string(contents).graph == onnx_model(export.network.graph).graph:
        for instance in export.instances:
            again = write_property(instance.property, [], manifest["layout"]["version"])
            if (instance.position, instance.radius) == (place, row["radius"]) and asked == again.splitlines():
                return Question(network, images[place].double(), export.network, instance, contents)
    raise NotExportedError(f"folder {folder}: built again from {manifest['model']}, the files are not the same")


@dataclass(frozen=True)
class Requirement:
    """What proves that a property has no solution: margins of more than ``margin`` in all of a ball (l1).

    Attributes:
        radius: in pixels, of normalised images.
        impossible: why no certificate can prove it; "" if one can.
    """

    radius: float
    margin: float
    impossible: str = ""


def requirement(question: Question) -> Requirement:
    """The radius and margin whose certificate shows that no input of the property is unsafe.

    Claim. Let m be the least f_y - f_t over t, and m > ``margin`` on the ball of ``radius`` around mu: of the images
    within it, or without positivity of all mu + A d with ||d||_1 within it. Then the property has no solution, in real
    arithmetic on the numbers of its files.

    Proof. Let X fulfil the property's bounds and constraints. Put c for the inputs that stand for mu, d for the flow
    that X - c stands for, and rho for the most that ||X - c||_1 >= ||d||_1 can be in the constraints (norms are over
    the flows of X): what the budget leaves beyond c, and twice what the box, rounded outward, leaves below c; for
    l1-penalty all of the box. The image of X is nu = mu + A d + h. The defect h is what the image of c, and masses that
    the box leaves room for, miss mu by; ||h||_1 <= eta. With E the bound of
    :func:`~flowverify.export.encodings.rounding_change` on the difference between the margins of the file, without its
    penalty and allowance, and those of the network at nu, within rho,

        N_t(X) >= m_t(nu) - E,        m_t(nu) >= m_t(mu + A d) - L1 eta,

    where L1 bounds the change of a margin for one of a pixel by 1.

    *Constraints.* Pixels of nu are no less than -(what rounding R up has gained), which sums to ``raised``; those of
    mu + A d fall short of 0 by raised + eta at most. As in the proof of
    :func:`~flowverify.export.encodings.exact_penalty_weight`, some d' with ||d'||_1 <= ||d||_1 <= rho leads to an image
    of the ball, mu + A d' >= 0, from which mu + A d differs by so much moved mass: m_t(mu + A d) is no less than the
    least margin of the ball - L (raised + eta). An unsafe output has N_t(X) <= gap, the allowance and its rounding.

    *Penalty.* By the same claim, at any X of the box m_t(mu + A d) + L v is no less than the least margin of the ball,
    with v = relu(||X - c||_1 - rho) + the negative mass of mu + A d. The file adds at least weight (v - raised - eta).
    Beyond rho, E grows by kappa relu(||X - c||_1 - rho) <= kappa v. So where weight >= L + kappa

        N_t(X) >= the least margin - gap - E - weight (raised + eta) - L1 eta;

    a smaller weight makes a larger set unsafe than the ball, and nothing is claimed of it.

    Both times: unsafe X need a margin of the ball <= gap + E + max(L, weight) (raised + eta) + 2 L1 eta, where the
    second L1 eta is more than enough for what rounding does to the columns of the masses.
    """
    network, encoding, instance = question.export, question.export.encoding, question.instance
    inputs, prop, mu, centre = network.inputs, instance.property, question.image, instance.centre
    flows, mass = inputs.flows, float(mu.sum())
    if inputs.form == "split":
        spent = math.fsum(centre[:flows])
        most = scalar_up((spent + instance.budget) * (1 + OUTWARD))
        reach = most - spent + 2 * math.fsum(np.maximum(centre - prop.lower, 0)[:flows]) + OUTWARD * most
    else:
        reach = math.fsum(np.maximum(prop.upper - centre, centre - prop.lower)) * (1 + OUTWARD)
    room = float((prop.upper - prop.lower)[flows:].sum()) if inputs.mass_inputs else 0.0
    defect = float((inputs.image(centre) - mu).abs().sum()) + room + OUTWARD * mass
    raised = _raised(network, prop) if network.positivity else 0.0

    parts = take_apart(question.network)
    tail = append_rows(parts.tail, margin_rows(parts.classes, instance.label))
    written = tail if encoding.per_label else append_rows(parts.tail, torch.eye(parts.classes, dtype=torch.float64))
    graph, times = first_and(parts, inputs, written), 1 if encoding.per_label else 2

    def rounding(distance: float) -> Tensor:
        found = rounding_change(graph, torch.from_numpy(centre)[None], torch.tensor([distance]).double(), flows)
        return found[0] * (times * (1 + SLACK))

    weights = parts.weight.abs()
    sizes = weights @ mu.flatten() + parts.bias.abs() + reach * weights.amax(1)
    folding = FOLDING * float(largest_change(tail, sizes.reshape(1, *tail.input_shape)).max())
    bias: Any = written.nodes[-1].operation
    gap = network.allowance + STEP * (float(bias.bias.abs().max()) + network.allowance)
    moved = exact_penalty_weight(parts, inputs, tail)  # L
    pixel = float(largest_change(tail, weights.amax(1).reshape(1, *tail.input_shape)).max()) * (1 + SLACK)  # L1
    steepest, impossible = moved, ""
    if encoding.penalised and network.penalty_weight is not None:
        steepest = max(moved, network.penalty_weight)
        least = moved / (1 + SLACK) * (1 + SLACK / 2) + float((rounding(reach + 1) - rounding(reach)).max())
        if network.penalty_weight < least:
            impossible = (
                f"the penalty's weight {network.penalty_weight:g} is less than {least:g}, from which it is exact"
            )
    margin = gap + float(rounding(reach).max()) + folding + steepest * (raised + defect) + 2 * pixel * defect
    return Requirement(reach / mass * (1 + OUTWARD), margin * (1 + SLACK), impossible)


def _raised(network: ExportedNetwork, prop: Property) -> float:
    """By how much all pixels together may be less than 0 in the constraints, as R was rounded up."""
    inputs = network.inputs
    if network.encoding.name == "linear":
        least = prop.lower.copy()
        least[: inputs.flows] = 0
        bounds = np.array([-one.bound for one in prop.constraints[1:]])
        return float(np.maximum(bounds - inputs.image(least).flatten().numpy(), 0).sum())
    reference = inputs.reference.numpy()
    gained = round_up(reference) - reference
    if inputs.mass_inputs:
        gained *= prop.upper[inputs.flows :][: inputs.grid.channels, None, None]
    return float(gained.sum())


def lowered(network: Network, label: int, margin: float) -> Network:
    """The network in float64 with the label's logit less by at least ``margin``: certified, its margins are larger."""
    nodes = list(copy.deepcopy(network).double().nodes)
    last, size = nodes[-1].operation if nodes else None, network.num_classes
    if isinstance(last, nn.Linear):
        node, weight, known = nodes.pop(), last.weight.data, last.bias
    else:
        node = Node(f"{network.output}_lowered", nn.Identity(), (network.output,), network.output_shape)
        weight, known = torch.eye(size, dtype=torch.float64), None
    bias = torch.zeros(size, dtype=torch.float64) if known is None else known.data.clone()
    bias[label] = np.nextafter(float(bias[label]) - margin, -math.inf)
    layer = nn.Linear(weight.shape[1], size, dtype=torch.float64)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return Network(network.input_shape, [*nodes, replace(node, operation=layer)])


@dataclass(frozen=True, eq=False)
class Answer:
    """What is said of a property; for ``sat`` with the counterexample, X and what the file's network makes of it."""

    word: Word
    note: str = ""
    inputs: FloatArray | None = None
    outputs: FloatArray | None = None

    def text(self) -> str:
        """The contents of a results file."""
        if self.inputs is None or self.outputs is None:
            return f"{self.word}\n"
        values = [("X", self.inputs), ("Y", self.outputs)]
        pairs = [f"({name}_{k} {decimal(value)})" for name, row in values for k, value in enumerate(row.tolist())]
        return f"{self.word}\n({f'{chr(10)} '.join(pairs)})\n"


def prepare(question: Question) -> None:
    """Builds and compiles what :func:`decide` needs, and computes nothing about the image."""
    threat, positivity = Threat(positive=question.export.positivity), question.export.positivity
    Certifier(question.network, "fine-tuned" if positivity else "vanilla").prepare(threat)
    with suppress(UnsupportedOperationError):
        CompleteCertifier(question.network, "complete" if positivity else "vanilla-complete").prepare(threat)


def decide(question: Question, deadline: Deadline) -> Answer:
    """The answer: by an attack, by bounds, then by a complete method until the deadline.

    Raises:
        DependencyError: auto_LiRPA cannot be used here, and bounds need it.
    """
    label, instance, positivity = question.instance.label, question.instance, question.export.positivity
    tried: list[str] = []
    mass = float(question.image.sum())
    ball = WassersteinBall(instance.budget / mass)
    labels = torch.tensor([label])
    limit = None if deadline.seconds_left == math.inf else max(ATTACK_SHARE * deadline.seconds_left, 1e-3)
    found = make_attack(ATTACK, question.network, timeout=limit).run(question.image[None], labels, ball)
    if found.outcome[0] == FOUND and (answer := _shown(question, ball, found.images[0])) is not None:
        return Answer("sat", f"by attack {ATTACK}", *answer)
    needed = requirement(question)
    if needed.impossible:
        return Answer("unknown", needed.impossible)
    larger, asked = WassersteinBall(needed.radius), lowered(question.network, label, needed.margin)
    if not bool(Subject(asked).clean(question.image[None], labels)[1]):
        return Answer("unknown", f"the image's own margin is less than {needed.margin:.3g}, which is to be proven")
    method = "fine-tuned" if positivity else "vanilla"
    try:
        (one,) = Certifier(asked, method).certify(question.image[None], labels, larger)
        if one.verdict is Verdict.CERTIFIED:
            return Answer("unsat", f"by {method} bounds")
    except (BoundError, SolverError, UnsupportedOperationError) as error:
        tried.append(f"bounds: {error}")
    if deadline.stop():
        return Answer("timeout", "; ".join(tried))
    method = "complete" if positivity else "vanilla-complete"
    try:
        certifier = CompleteCertifier(asked, method, options=CompleteOptions(timeout=None))
        search = certifier.start(question.image, label)
        proven = search.decide(search.budget(larger.radius), deadline)
    except (BoundError, SolverError, UnsupportedOperationError) as error:
        return Answer("unknown", "; ".join([*tried, f"{method}: {error}"]))
    if proven:
        return Answer("unsat", f"by {method} method")
    if search.nearest.witness is not None and (answer := _shown(question, ball, search.nearest.witness)) is not None:
        return Answer("sat", f"by {method} method", *answer)
    if proven is None and not search.exhausted:
        return Answer("timeout", "; ".join(tried))
    why = f"between the ball and what the property adds to it, or a tie: margins below {needed.margin:.3g}"
    return Answer("unknown", "; ".join([*tried, why]))


def _shown(question: Question, ball: WassersteinBall, witness: Tensor) -> tuple[FloatArray, FloatArray] | None:
    """Inputs that fulfil the property, with their outputs, near an image; None if none are found."""
    witness = witness.cpu().double()
    candidates = [witness]
    try:
        if bool((witness >= 0).all()):
            start = repaired(witness, question.image, ball)
            best, _ = descend(Subject(question.network), start, question.image, question.instance.label, ball)
            candidates.insert(0, best)
        for candidate in candidates:
            for values in _inputs(question, candidate):
                outputs = _outputs(question.onnx, values)
                if question.instance.property.holds(values, outputs):
                    return values, outputs
    except SolverError:  # of distances and plans
        return None
    return None


def _inputs(question: Question, witness: Tensor) -> Iterator[FloatArray]:
    """Input vectors, in float32 numbers, that stand for images between the original and a witness (C, H, W).

    Each has a share of the image that is the same everywhere: constraints on pixels then hold after rounding.
    """
    inputs, prop, budget = question.export.inputs, question.instance.property, question.instance.budget
    mu, flows = question.image, question.export.inputs.flows
    lost, gained = (mu - witness).clamp(min=0)[None], (witness - mu).clamp(min=0)[None]
    move = torch.zeros(inputs.grid.edges, dtype=torch.float64)
    if float(lost.sum()) > 0:
        move = flow_by_transport(lost, gained, mass_tolerance=1e-6)[0]
    even = torch.zeros_like(move)
    if question.export.positivity:
        even = flow_by_tree(mu[None], mu.mean((-1, -2), keepdim=True).expand_as(mu)[None], mass_tolerance=1e-6)[0]
    for share in EVENLY:
        flow = (1 - share) * move + share * even
        scale = (1 - share) * budget / max(float(flow.abs().sum()), 1e-300)
        # Where pixels may be negative, the way goes on beyond the witness: there the class is a clearer one.
        for factor in (min(1.0, scale),) if question.export.positivity else (scale, min(1.0, scale)):
            scaled, values = factor * flow, question.instance.centre.copy()
            parts = [scaled.clamp(min=0), (-scaled).clamp(min=0)] if inputs.form == "split" else [scaled]
            values[:flows] += torch.cat(parts).numpy()
            yield values.astype(np.float32).astype(np.float64).clip(prop.lower, prop.upper)


def _outputs(model: bytes, values: FloatArray) -> FloatArray:
    """By onnxruntime, or without it by the evaluator that comes with the package onnx."""
    try:
        return run_onnx(model, values)
    except DependencyError:
        evaluator = onnx.reference.ReferenceEvaluator(onnx.load_model_from_string(model))
        (found,) = evaluator.run(None, {evaluator.input_names[0]: values.astype(np.float32)[None]})
        return np.asarray(found[0], dtype=np.float64)
