"""Reads what outside verifiers answered about an exported folder back as certificates.

An answer counts for the very files that were exported: their digests are compared. ``unsat`` becomes certified;
``sat`` becomes falsified only if its witness is there and survives the replay, else unknown.

The replay is on the exported file, then on the original network. Verifiers return points on the boundary of what they
were asked, up to tolerances of their own. So the witness is first made a valid image (no negative pixel, the image's
mass, within the radius), and then moved on inside the ball by a few steps of Frank-Wolfe, whose oracle is exact; from
all of these the nearest counterexample is hunted. Only what the replayed image shows is ever claimed, by the rule of
:mod:`flowverify.network.subject`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowverify.ball import INSIDE, WassersteinBall
from flowverify.certifiers.complete.counterexamples import NearestCounterexample
from flowverify.errors import DependencyError, InvalidInputError, SolverError
from flowverify.export.encodings import Encoding, FloatArray, FlowInputs, check_encoding
from flowverify.export.folder import MANIFEST, load_arrays, model_digest, read_contents
from flowverify.network import Network
from flowverify.network.subject import Subject, as_direction, surplus
from flowverify.results import Certificate, Verdict

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
    subject: Subject,
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
        subject: the original network.
        values: X, (inputs.size,).
        onnx: the exported file that the verifier was given.

    Raises:
        DependencyError: onnxruntime is not installed.
    """
    outputs = run_onnx(onnx, values)
    exported = _exported_margin(outputs, label, encoding, subject.classes(image[None]))
    if not exported <= TOLERANCE * (1 + float(np.abs(outputs).max())):
        return Replay(False, reason=f"replay: the exported network does not confirm it, margin {exported:.3g}")
    try:
        return falsify(subject, inputs.image(values), image, label, ball)
    except SolverError as error:
        return Replay(False, reason=f"replay: the distance of the witness could not be computed ({error})")


def falsify(
    subject: Subject,
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
    nearest = NearestCounterexample(subject, centre.to(subject.device), label, ball.threat)
    margins = []
    for scale in scales:
        larger = ball.with_radius(scale * ball.radius)
        start = repaired(point, centre, larger)
        best, margin = descend(subject, start, centre, label, larger)
        margins.append(margin)
        nearest.offer(torch.stack([point, start, best]).to(subject.device), descend=True)
        radius = float(ball.threat.radius(centre.new_tensor([nearest.budget]), centre[None]))
        if nearest.witness is not None and radius <= ball.radius:
            return Replay(True, nearest.witness.cpu(), radius)
    return Replay(False, reason=f"replay: the original network keeps the label, margin {margins[0]:.3g}")


def run_onnx(model: Path | bytes, values: FloatArray) -> FloatArray:
    """The outputs of an ONNX file, or of its contents, for one input vector, by onnxruntime on the CPU.

    Raises:
        DependencyError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError("replaying witnesses needs onnxruntime: pip install 'flowverify[runtime]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
    )
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


def descend(subject: Subject, start: Tensor, image: Tensor, label: int, ball: WassersteinBall) -> tuple[Tensor, float]:
    """The image of least margin f_label - max f_t met on the way, and that margin in float64.

    Frank-Wolfe over the ball: the cost of the cheapest plan is convex for every ground cost, so that mixtures of images
    of the ball stay inside.
    """
    network, device = subject.precise, subject.device  # weights need no gradient
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
        slopes = as_direction(torch.autograd.grad(margins(points).sum(), points)[0])
        vertices = inside.best_moves(-slopes).image
        trials = torch.stack([best + share * (vertex - best) for vertex in vertices for share in SHARES])
        with torch.no_grad():
            values = margins(trials)
        at = int(values.argmin())
        if values[at] < least:
            least, best = float(values[at]), trials[at]
    return best.clamp(min=0), least


WORDS = {
    "unsat": "unsat", "holds": "unsat", "safe": "unsat", "verified": "unsat",
    "sat": "sat", "violated": "sat", "unsafe": "sat", "falsified": "sat",
    "unknown": "unknown", "timeout": "timeout", "error": "error",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """One row of a file of results."""

    onnx: str
    vnnlib: str
    result: str  # unsat, sat, unknown, timeout or error
    seconds: float


def read_results(path: Path) -> list[Answer]:
    """The rows of a CSV file, with or without a header, in any order of columns.

    A row names the two files, with any folders before them, and has one of the words of VNN-COMP (unsat, sat, unknown,
    timeout, error; also holds, violated, safe, unsafe, verified, falsified). The number after the word is the time.

    Raises:
        InvalidInputError: the file cannot be read, or a row names files and has none of the words.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInputError(f"results {path}: cannot be read ({error})") from error
    answers = []
    for number, row in enumerate(rows, start=1):
        onnx = next((cell for cell in row if re.search(r"\.onnx(\.gz)?$", cell)), "")
        vnnlib = next((cell for cell in row if re.search(r"\.vnnlib(\.gz)?$", cell)), "")
        if not (onnx and vnnlib):
            continue
        words = [k for k, cell in enumerate(row) if cell.lower() in WORDS]
        if len(words) != 1:
            raise InvalidInputError(
                f"results {path}, line {number}: {len(words)} verdicts, expected one of {', '.join(WORDS)}"
            )
        seconds = next((float(cell) for cell in row[words[0] + 1 :] if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", cell)), 0.0)
        answers.append(Answer(onnx, vnnlib, WORDS[row[words[0]].lower()], seconds))
    if not answers:
        raise InvalidInputError(f"results {path}: no row names an .onnx and a .vnnlib file, expected one an instance")
    return answers


def read_witness(path: Path, size: int) -> FloatArray:
    """The input vector of a counterexample file: pairs ``(X_k value)``, as VNN-COMP has them, gzipped or not.

    Raises:
        InvalidInputError: the file cannot be read, or does not give every input once.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        pairs = re.findall(r"\(\s*X_([0-9]+)\s+([^\s()]+)\s*\)", text)
        values = {int(k): float(value) for k, value in pairs}
    except (OSError, EOFError, ValueError) as error:
        raise InvalidInputError(f"witness {path}: cannot be read ({error})") from error
    if sorted(values) != list(range(size)):
        raise InvalidInputError(f"witness {path}: {len(values)} inputs, expected X_0 to X_{size - 1}")
    return np.array([values[k] for k in range(size)])


def collect(
    network: Network, folder: str | Path, results: str | Path, *, answered_only: bool = False
) -> Iterator[tuple[int, Certificate]]:
    """Certificates, with the index of each image in its data set, for every instance of an exported folder.

    An instance without an answer is unknown. Of several answers the last counts, unless they contradict each other:
    then the instance is an error. Witnesses are looked for beside the results, as ``ONNX_VNNLIB.counterexample[.gz]``
    or ``VNNLIB.counterexample[.gz]`` with the names of the two files without their endings.

    Args:
        network: the original network.
        answered_only: leave out instances without an answer, and the misclassified images that have none.

    Raises:
        InvalidInputError: no manifest, another network than the exported one, results that cannot be read or that
            name files which are not in the folder.
    """
    folder, results = Path(folder), Path(results)
    manifest = read_manifest(folder)
    if model_digest(network) != manifest["model_sha256"]:
        raise InvalidInputError(f"folder {folder}: was exported from another network ({manifest['model']})")
    answers = _by_instance(folder, manifest, read_results(results))
    arrays = load_arrays(folder)
    if answered_only:
        named = [one for one in manifest["instances"] if one["vnnlib"] in answers]
        manifest = {**manifest, "instances": named, "misclassified": []}
    yield from _certificates(network, folder, results.parent, manifest, arrays, answers)


def _certificates(
    network: Network,
    folder: Path,
    witnesses: Path,
    manifest: dict[str, Any],
    arrays: dict[str, Any],
    answers: dict[str, list[Answer]],
) -> Iterator[tuple[int, Certificate]]:
    request = manifest["request"]
    encoding = check_encoding(request["encoding"])
    method = "fine-tuned" if request["positivity"] else "vanilla"
    bound = f"export-{encoding.name}"
    subject = Subject(network)
    positions = {int(index): k for k, index in enumerate(arrays["indices"])}
    for one in manifest["misclassified"]:
        for radius in request["radii"]:
            yield one["index"], Certificate(
                Verdict.MISCLASSIFIED, one["label"], one["prediction"], method, bound, request["ground"],
                radius, None, 0.0,
            )  # fmt: skip
    for one in manifest["instances"]:
        image = arrays["images"][positions[one["index"]]]
        ball = WassersteinBall(one["radius"], request["ground"])
        given = answers.get(one["vnnlib"], [])
        verdict, note, upper = Verdict.UNKNOWN, "no answer", None
        if given:
            verdict, note, upper = _judge(folder, manifest, one, given)
        if verdict is Verdict.FALSIFIED:
            info = manifest["networks"][one["onnx"]]
            reference = arrays[f"reference:{one['onnx']}"].double()
            inputs = FlowInputs(network.grid, encoding.form, reference, info["mass_inputs"], info["budget_input"])
            verdict, note = Verdict.UNKNOWN, "sat, without a witness beside the results that could be replayed"
            path = _find_witness(witnesses, one)
            if path is not None:
                with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
                    file.write(read_contents(folder, one["onnx"]))
                    file.flush()
                    shown = replay(
                        subject, image, one["label"], ball, read_witness(path, inputs.size), inputs, encoding,
                        Path(file.name),
                    )  # fmt: skip
                note, upper = shown.reason, shown.distance
                verdict = Verdict.FALSIFIED if shown.falsified else Verdict.UNKNOWN
        seconds = given[-1].seconds if given else 0.0
        yield one["index"], Certificate(
            verdict, one["label"], one["label"], method, bound, ball.ground, ball.radius, None, seconds,
            upper, note,
        )  # fmt: skip


def _judge(
    folder: Path, manifest: dict[str, Any], one: dict[str, Any], given: list[Answer]
) -> tuple[Verdict, str, float | None]:
    """What the answers say; FALSIFIED still has to be replayed."""
    digests = {one["onnx"]: manifest["networks"][one["onnx"]]["sha256"], one["vnnlib"]: one["sha256"]}
    for path, digest in digests.items():
        if hashlib.sha256(read_contents(folder, path)).hexdigest() != digest:
            return Verdict.ERROR, f"{path} has changed since it was exported", None
    said = {answer.result for answer in given}
    if {"sat", "unsat"} <= said:
        return Verdict.ERROR, "both sat and unsat were answered", None
    result = given[-1].result
    if result == "unsat":
        return Verdict.CERTIFIED, "by an outside verifier", None
    if result == "sat":
        return Verdict.FALSIFIED, "", None
    return Verdict(result), "by an outside verifier", None


def _by_instance(folder: Path, manifest: dict[str, Any], answers: list[Answer]) -> dict[str, list[Answer]]:
    known = {(Path(one["onnx"]).name, Path(one["vnnlib"]).name): one["vnnlib"] for one in manifest["instances"]}
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        key = (_plain_name(answer.onnx), _plain_name(answer.vnnlib))
        if key not in known:
            raise InvalidInputError(f"results name {key[0]} with {key[1]}, which is no instance of {folder}")
        found.setdefault(known[key], []).append(answer)
    return found


def _plain_name(path: str) -> str:
    return re.split(r"[/\\]", path)[-1].removesuffix(".gz")


def _find_witness(folder: Path, one: dict[str, Any]) -> Path | None:
    onnx, vnnlib = Path(one["onnx"]).stem, Path(one["vnnlib"]).name.removesuffix(".vnnlib")
    names = [f"{stem}.counterexample{end}" for stem in (f"{onnx}_{vnnlib}", vnnlib) for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a folder holds, as it was exported.

    Raises:
        InvalidInputError: the folder is no export, or its manifest cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for key in ("model", "model_sha256", "request", "networks", "instances", "misclassified"):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"folder {folder}: no readable {MANIFEST}, expected an export ({error})") from error
    return manifest
