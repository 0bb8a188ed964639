"""``flowverify check``: is this image's class certain within this radius? One answer, and an exit code for scripts.

An attack looks for a counterexample first; then methods try to prove that there is none, complete ones last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.common import (
    REFUTED,
    UNDECIDED,
    Bound,
    Cap,
    DataDir,
    DatasetName,
    Device,
    Ground,
    InputShape,
    Json,
    Layout,
    Mean,
    Model,
    Output,
    Source,
    Split,
    Std,
    Target,
    Weights,
    check_device,
    check_picture,
    explain,
    json_line,
    one_line,
    say,
    user_errors,
    versions,
    working,
)
from flowverify.cli.job import check_radius, explain_model, load_inputs, say_brightness
from flowverify.errors import BoundError, FlowverifyError, InvalidInputError, SolverError, UnsupportedOperationError
from flowverify.registry import ATTACKS, METHODS, Registry
from flowverify.results import Certificate, Verdict

if TYPE_CHECKING:
    from torch import Tensor

    from flowverify.ball import WassersteinBall
    from flowverify.network import Network

BY_DEFAULT = ("fine-tuned", "complete")
ANSWER = "answer"  # the method of what the network's answer for the image itself decides
EXIT_CODES = {
    Verdict.CERTIFIED: 0,
    Verdict.FALSIFIED: REFUTED,
    Verdict.MISCLASSIFIED: REFUTED,
    Verdict.UNKNOWN: UNDECIDED,
    Verdict.TIMEOUT: UNDECIDED,
    Verdict.ERROR: UNDECIDED,
}
COLOURS = (1, 3)  # channels of pictures


@user_errors
def check(
    model: Model,
    radius: Annotated[float, typer.Option(help="In pixels: 0.1 moves a tenth of the mass by one pixel.")],
    image: Annotated[
        Path | None,
        typer.Option(
            help="A PNG or JPEG picture, turned into grey values or colour as the network takes it, an .npy, or an "
            ".npz. Without it, --index of a data set.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        int | None,
        typer.Option(
            min=0, help="The right class; by default that of the file or data set, else what the network predicts."
        ),
    ] = None,
    dataset: DatasetName = None,
    index: Annotated[
        int | None, typer.Option(min=0, help="Which image of the data set, or of an array.", show_default=False)
    ] = None,
    split: Split = "test",
    data_dir: DataDir = None,
    ground: Ground = "l1",
    cap: Cap = None,
    target: Target = None,
    attack: Annotated[str, typer.Option(help=f"What looks for a counterexample: {ATTACKS.listing()}.")] = "minimal",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help=f"What tries to prove that there is none: {METHODS.listing()}. Repeat it for several, which are "
            "tried in this order; by default fine-tuned, then complete where the network allows it.",
            show_default=False,
        ),
    ] = None,
    bound: Bound = "best",
    timeout: Annotated[
        float, typer.Option(help="Seconds for the attack and complete methods together; bounds are not cut short.")
    ] = 60.0,
    layout: Layout = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    output: Output = None,
    weights: Weights = None,
    device: Device = "cpu",
    json: Json = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Draw the counterexample, or where there is none the worst case to first order, as this .png."
        ),
    ] = None,
) -> None:
    """Answer whether one image keeps its class within a radius.

    An attack looks for a counterexample, which is replayed on the network and measured by an exact solver; then bounds,
    and a complete method, try to prove that there is none. Exit code 0: certified; 1: falsified, or the image itself is
    misclassified; 2: bad input; 3: neither was shown (unknown, out of time, or the computation broke down); 130:
    interrupted.
    """
    from flowverify.ball import Threat, WassersteinBall
    from flowverify.bounds.recipes import check_bound
    from flowverify.zoo import source_digest

    check_bound(bound)
    ATTACKS.check(attack)
    for name in method or ():
        METHODS.check(name)
    check_radius(radius)
    if not timeout > 0:
        raise InvalidInputError(f"timeout: given {timeout!r}, expected seconds > 0")
    Threat(ground, cap)
    if picture is not None:
        check_picture(picture)
    place = check_device(device)
    source = Source(model, layout, input_shape, mean, std, output, weights)
    begin = perf_counter()
    if image is not None:
        if dataset is not None:
            raise InvalidInputError(f"dataset {dataset}: given with --image, expected one of the two")
        chosen = _of_file(source, image, index)
    else:
        chosen = _of_dataset(source, dataset, index, split, data_dir)
    network = chosen.network.to(place)
    explain_model(source, network, device)
    explain(f"image {chosen.name}: {' x '.join(map(str, chosen.pixels.shape))}, label from {chosen.label_from}")
    with working(quiet=json) as show:
        ask = Question(network, chosen.pixels[None], label if label is not None else chosen.label, target)
        ball = WassersteinBall(radius, ground, cap)
        answer = ask.decide(ball, attack, tuple(method or ()), bound, timeout, show)
    answer = replace(answer, label_from="given" if label is not None else chosen.label_from)
    seconds = perf_counter() - begin
    if json:
        about = {"model": model, "sha256": source_digest(model, weights), "image": chosen.name, "index": index}
        more = {"seconds": round(seconds, 6), "versions": versions()}
        typer.echo(json_line(about | answer.to_json() | more))
    else:
        for line in answer.words(chosen.name, ball, seconds):
            typer.echo(line)
    if picture is not None:
        _draw(network, ask.image, answer, picture, f"{Path(model).name}, {chosen.name}")
        say(f"wrote {picture}")
    raise typer.Exit(EXIT_CODES[answer.certificate.verdict])


@dataclass(frozen=True)
class Chosen:
    """The image of one call (C, H, W), with the network that takes it; no label where nobody says one."""

    name: str
    network: Network
    pixels: Tensor
    label: int | None
    label_from: str


def _of_file(source: Source, path: Path, index: int | None) -> Chosen:
    """An image of a file, and the network, for its channels and size where the network's file does not say them."""
    from flowverify.data.files import PICTURES, read_image

    found = read_image(path, index)
    channels, height, width = found.pixels.shape
    shapes = [(channels, height, width)]
    if path.suffix.lower() in PICTURES:  # a picture is turned into what the network takes
        shapes += [(other, height, width) for other in COLOURS if other != channels]
    network = _load(source, shapes)
    if path.suffix.lower() in PICTURES and network.input_shape[0] in COLOURS:
        found = read_image(path, index, network.input_shape[0])
    if found.note:
        say(f"{path}: {found.note}")
    say_brightness(str(path), found.pixels)
    where = "the file" if found.label is not None else "the network's own prediction"
    return Chosen(str(path), network, found.pixels, found.label, where)


def _load(source: Source, shapes: Sequence[tuple[int, int, int]]) -> Network:
    """The network for the first of these shapes that it takes; what is wrong is said of the first."""
    if source.is_shipped:
        return source.load()
    wrong: FlowverifyError | None = None
    for shape in shapes:
        try:
            return source.load(shape)
        except FlowverifyError as error:
            wrong = wrong or error
    assert wrong is not None
    raise wrong


def _of_dataset(source: Source, dataset: str | None, index: int | None, split: str, data_dir: Path | None) -> Chosen:
    if index is None:
        raise InvalidInputError("image: none given, expected --image FILE, or --index N of a data set")
    network, data = load_inputs(source, dataset, split, data_dir)
    if index >= len(data):
        raise InvalidInputError(f"index {index}: given, expected 0 to {len(data) - 1}")
    pixels, label = data[index]
    say_brightness(data.name, pixels)
    return Chosen(f"image {index} of {data.name}", network, pixels, label, "the data set")


@dataclass(frozen=True)
class Step:
    """What one attempt to decide came to, in how many seconds."""

    name: str
    verdict: Verdict | None  # None: not tried
    seconds: float
    note: str = ""

    def __str__(self) -> str:
        if self.verdict is None:
            return f"{self.name} was not tried: {self.note}"
        said = "found nothing" if self.name.startswith("attack") and self.verdict is Verdict.UNKNOWN else self.verdict
        return f"{self.name}: {said}, {self.seconds:.2f} s" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Answer:
    """What was shown about the image, by what, and what was tried.

    Attributes:
        certificate: ``upper_radius`` is the exact distance of ``witness``, which was replayed.
        decided_by: the attempt that decided; "" for none.
        classified_as: what the counterexample is taken for, where there is one.
    """

    certificate: Certificate
    decided_by: str
    steps: tuple[Step, ...]
    label_from: str = ""
    classified_as: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The certificate's record, with what decided and what was tried."""
        tried = [
            {**dataclasses.asdict(one), "verdict": one.verdict and str(one.verdict), "seconds": round(one.seconds, 6)}
            for one in self.steps
        ]
        more = {
            "label_from": self.label_from,
            "decided_by": self.decided_by or None,
            "classified_as": self.classified_as,
            "steps": tried,
        }
        return self.certificate.to_json() | more

    def words(self, name: str, ball: WassersteinBall, seconds: float) -> list[str]:
        """The answer as lines of text."""
        one, radius = self.certificate, f"{ball.radius:g} pixels ({ball.threat.name})"
        lines = {
            Verdict.CERTIFIED: f"certified: no image within {radius} of {name} {self._otherwise}",
            Verdict.FALSIFIED: f"falsified: an image within {radius} of {name} is classified as "
            f"{self.classified_as}, at a distance of {one.upper_radius or 0.0:.6g}",
            Verdict.MISCLASSIFIED: f"misclassified: {name} itself is not classified as {one.label}, but as "
            f"{one.prediction}; there is nothing to certify",
            Verdict.UNKNOWN: f"unknown: whether an image within {radius} of {name} {self._otherwise} was not decided",
            Verdict.TIMEOUT: f"timeout: time ran out before it was decided whether an image within {radius} of {name} "
            f"{self._otherwise}",
            Verdict.ERROR: f"error: the computation broke down before it was decided whether an image within {radius} "
            f"of {name} {self._otherwise}",
        }
        found = [lines[one.verdict], f"label {one.label}, from {self.label_from}"]
        if self.label_from == "given":
            found[1] = f"label {one.label}, as given"
        if self.decided_by:
            margin = "" if one.margin is None else f", margin at least {one.margin:.4g}"
            found.append(f"decided by {self.decided_by}{margin}")
        return [*found, *map(str, self.steps), f"{seconds:.2f} s"]

    @property
    def _otherwise(self) -> str:
        return f"is classified otherwise than {self.certificate.label}"


class Question:
    """Whether an image keeps its class; put to an attack, then to methods of certification.

    Args:
        network: on the device of the computation.
        image: (1, C, H, W).
        label: None for what the network predicts.
        target: the one class that counts as wrong; any other than the label without it.

    Raises:
        InvalidInputError: an image or label that the network does not take, or a target that is no class or the label.
    """

    def __init__(self, network: Network, image: Tensor, label: int | None, target: int | None) -> None:
        import torch

        from flowverify.network.subject import Subject
        from flowverify.targeted import check_target, two_answers

        self.network, self.target, self.subject = network, target, Subject(network)
        self.image, _ = self.subject.check(image, torch.zeros(1, dtype=torch.int64))
        if label is None:
            label = int(self.subject.exact_logits(self.image, alone=True).argmax())
        self.label = self.subject.check(image, torch.tensor([label]))[1]
        self._asked, self._own = self.subject, self.label
        if target is not None:
            check_target(target, self.label, network.num_classes)
            self._asked = Subject(two_answers(network, label, target))
            self._own = torch.zeros_like(self.label)

    def replayed(self, ball: WassersteinBall, witness: Tensor) -> float:
        """The exact distance of a counterexample (C, H, W) in the ball, in pixels; infinite if it is none."""
        from flowverify.witness import replay

        around = ball.around(self.image.double())
        other = witness.to(around.images.device).double()[None]
        return float(replay(self._asked, around, self._own, other))

    def decide(
        self,
        ball: WassersteinBall,
        attack: str,
        methods: Sequence[str],
        bound: str,
        timeout: float,
        show: Any,
    ) -> Answer:
        """The answer of whatever decides first.

        Args:
            methods: in the order in which they are tried; by default :data:`BY_DEFAULT`, the complete one where the
                network allows it.
            timeout: seconds for the attack and complete methods together.
            show: is told what is going on.
        """
        steps: list[Step] = []
        self.subject.check(self.image, self.label, ball.threat)
        prediction, right = self.subject.clean(self.image, self.label)
        here = Certificate(
            Verdict.MISCLASSIFIED, int(self.label), int(prediction), ANSWER, "", ball.ground, ball.radius, None, 0.0,
            cap=ball.cap,
        )  # fmt: skip
        if not bool(right):
            return Answer(here, "the network's answer for the image itself", ())
        here = replace(here, verdict=Verdict.UNKNOWN)
        show(f"attack {attack}")
        step, found = self._attack(ball, attack, timeout)
        steps.append(step)
        if found is not None:
            return Answer(found, step.name, tuple(steps), classified_as=self._class_of(found))
        left = timeout - step.seconds
        for method in methods or BY_DEFAULT:
            show(method)
            step, one = self._certify(ball, method, bound, left, optional=not methods, show=show)
            steps.append(step)
            if one is None:
                continue
            if one.verdict in (Verdict.CERTIFIED, Verdict.FALSIFIED):
                return Answer(one, step.name, tuple(steps), classified_as=self._class_of(one))
            if _takes(METHODS, method, "timeout"):
                left -= step.seconds
            here = one
        # Of several that decided nothing, the last that was tried says why.
        return Answer(here, "", tuple(steps))

    def _attack(self, ball: WassersteinBall, attack: str, timeout: float) -> tuple[Step, Certificate | None]:
        from flowverify.api import attack_on
        from flowverify.attack.base import FOUND

        limit = {"timeout": timeout} if _takes(ATTACKS, attack, "timeout") else {}
        search = attack_on(self.network, attack, self.target, **limit)
        name, begin = f"attack {attack}", perf_counter()
        try:
            found = search.run(self.image, self.label, ball)
            distance = self.replayed(ball, found.images[0]) if found.outcome[0] == FOUND else inf
        except Exception as error:
            return Step(name, Verdict.ERROR, perf_counter() - begin, _breakdown(error)), None
        seconds = perf_counter() - begin
        if distance > ball.radius:
            return Step(name, Verdict.UNKNOWN, seconds), None
        certificate = Certificate(
            Verdict.FALSIFIED, int(self.label), int(self.label), attack, "attack", ball.ground, ball.radius,
            None, seconds, distance, cap=ball.cap, witness=found.images[0],
        )  # fmt: skip
        return Step(name, Verdict.FALSIFIED, seconds), certificate

    def _certify(
        self, ball: WassersteinBall, method: str, bound: str, left: float, *, optional: bool, show: Any
    ) -> tuple[Step, Certificate | None]:
        """What a method says; None where it was not tried."""
        from flowverify.api import make_certifier

        limited = _takes(METHODS, method, "timeout")
        if limited and left <= 0:
            return Step(method, None, 0.0, "no time is left"), self._undecided(ball, method, Verdict.TIMEOUT)
        options: dict[str, Any] = {"timeout": left} if limited else {}
        if _takes(METHODS, method, "progress"):
            options["progress"] = lambda state: show(f"{method}, at most {left:.0f} s: {state.open_nodes} open nodes")
        name = f"{method} with bound {bound}" if _takes(METHODS, method, "bound") else method
        try:
            certifier = make_certifier(self.network, method, bound, target=self.target, **options)
            certifier.prepare(ball.threat)
        except UnsupportedOperationError as error:
            if not optional:
                raise
            return Step(name, None, 0.0, one_line(error)), None
        begin = perf_counter()
        try:
            (one,) = certifier.certify(self.image, self.label, ball)
            if one.verdict is Verdict.FALSIFIED:
                one = self._confirmed(ball, one)
        except Exception as error:
            one = replace(self._undecided(ball, method, Verdict.ERROR), note=_breakdown(error))
        seconds = perf_counter() - begin
        return Step(name, one.verdict, seconds, one.note), one

    def _confirmed(self, ball: WassersteinBall, one: Certificate) -> Certificate:
        """A certificate that says falsified, as far as its witness bears that out."""
        distance = inf if one.witness is None else self.replayed(ball, one.witness)
        if one.witness is None or distance > ball.radius:
            return replace(one, verdict=Verdict.UNKNOWN, note="what it offered as a counterexample was none")
        return replace(one, upper_radius=distance)

    def _class_of(self, one: Certificate) -> int | None:
        """What a certificate's counterexample is classified as; the target, where there is one."""
        if one.witness is None or self.target is not None:
            return None if one.witness is None else self.target
        return int(self.subject.clean(one.witness.to(self.image.device).double()[None], self.label)[0])

    def _undecided(self, ball: WassersteinBall, method: str, verdict: Verdict) -> Certificate:
        label = int(self.label)
        return Certificate(verdict, label, label, method, "", ball.ground, ball.radius, None, 0.0, cap=ball.cap)


def _breakdown(error: Exception) -> str:
    """What a computation died of; what a user can mend is raised.

    The others must not end the program: its exit code, 1, would say that a counterexample was found.
    """
    if isinstance(error, FlowverifyError) and not isinstance(error, SolverError | BoundError):
        raise error
    return f"{type(error).__name__}: {one_line(error)}"


def _takes(registry: Registry, name: str, option: str) -> bool:
    return option in {field.name for field in dataclasses.fields(registry.options_type(name))}


def _draw(network: Network, image: Tensor, answer: Answer, path: Path, name: str) -> None:
    from flowverify.ball import distance_name
    from flowverify.figures import draw_adversarial, draw_worst_cases

    one = answer.certificate
    if one.verdict is not Verdict.FALSIFIED or one.witness is None:
        draw_worst_cases(network, image.cpu(), [one], path, [name])
        return
    title = (
        f"{name}: label {one.label}, now {answer.classified_as}\n"
        f"{distance_name(one.ground, one.cap)} = {one.upper_radius:.4f} pixels ({answer.decided_by})"
    )
    draw_adversarial(image.double().cpu(), one.witness.double().cpu()[None], [title], [path])
