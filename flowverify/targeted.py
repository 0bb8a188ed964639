"""Questions about one wrong class: may the target overtake the label?

With target t an image of label y is certified within a ball if f_y > f_t everywhere in it; other classes may be above
both. A counterexample is an image of the ball with f_t > f_y. Both are questions about the network of two answers
(f_y, f_t), one for each label, which every certifier and every attack takes as it is: the answers are logits of the
network, unchanged in either precision. An image that the whole network misclassifies is misclassified here, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from flowverify.attack.base import AttackResult, BaseAttack, join
from flowverify.ball import Threat, WassersteinBall
from flowverify.certifiers.base import BaseCertifier
from flowverify.errors import InvalidInputError
from flowverify.network import Index, Network, Node
from flowverify.results import Certificate, Interrupted, Verdict


class _TwoAnswers(nn.Module):
    """The logits of two classes of a module that is no :class:`~flowverify.network.Network`."""

    def __init__(self, module: nn.Module, classes: tuple[int, int]) -> None:
        super().__init__()
        self.module, self.classes = module, list(classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.module(images)
        return logits[:, self.classes]


def two_answers(model: nn.Module, label: int, target: int) -> nn.Module:
    """The network with the logits (f_label, f_target) of another one, of its kind."""
    if not isinstance(model, Network):
        return _TwoAnswers(model, (label, target))
    name = "answers"
    while any(node.name == name for node in model.nodes):
        name += "_"
    chosen = Node(name, Index(0, (label, target)), (model.output,), (2,))
    return Network(model.input_shape, [*model.nodes, chosen])


def check_target(target: int, labels: Tensor, classes: int) -> None:
    """A target is a class that is the label of no image.

    Raises:
        InvalidInputError: it is not a class, or the label of an image.
    """
    if not isinstance(target, int) or not 0 <= target < classes:
        raise InvalidInputError(f"target {target!r}: expected a class, 0 to {classes - 1}")
    same = (labels == target).nonzero().flatten().tolist()
    if same:
        raise InvalidInputError(
            f"target {target}: is the label of image {same[0]} of those given, expected another class"
        )


def _groups(labels: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each label, and the rows that have it."""
    for label in sorted(set(labels.tolist())):
        yield label, (labels == label).nonzero().flatten()


class TargetedCertifier(BaseCertifier):
    """A certifier asked about one wrong class; the claim is that of :mod:`flowverify.targeted`.

    Args:
        network: in its canonical form.
        target: the class that must not overtake the label.
        make: the certifier of a network, of the method that is asked.
    """

    def __init__(self, network: Network, target: int, make: Callable[[nn.Module], BaseCertifier]) -> None:
        self._make, self.target = make, target
        whole = make(network)
        super().__init__(network, whole.method, whole.bound)
        self.batched = whole.batched  # type: ignore[misc]  # of the method that is asked
        self._certifiers: dict[int, BaseCertifier] = {}

    def check(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> tuple[Tensor, Tensor]:
        images, labels = super().check(images, labels, threat)
        check_target(self.target, labels, self.network.num_classes)
        return images, labels

    def of_label(self, label: int) -> BaseCertifier:
        """The certifier of images of this label; it answers 0 for the label, 1 for the target."""
        if label not in self._certifiers:
            self._certifiers[label] = self._make(two_answers(self.network, label, self.target))
        return self._certifiers[label]

    def certify(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> list[Certificate]:
        def ask(certifier: BaseCertifier, images: Tensor, labels: Tensor) -> list[Certificate]:
            return certifier.certify(images, labels, ball)

        return self._ask(images, labels, ball.threat, ball.radius, ask)

    def search(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> list[Certificate]:
        threat = Threat() if threat is None else threat

        def ask(certifier: BaseCertifier, images: Tensor, labels: Tensor) -> list[Certificate]:
            return certifier.search(images, labels, threat)

        return self._ask(images, labels, threat, 0.0, ask)

    def _ask(
        self,
        images: Tensor,
        labels: Tensor,
        threat: Threat,
        radius: float,
        ask: Callable[[BaseCertifier, Tensor, Tensor], list[Certificate]],
    ) -> list[Certificate]:
        images, labels = self.check(images, labels, threat)
        found: dict[int, Certificate] = {}
        if not len(images):
            return []
        predictions, right = self.clean(images, labels)
        for row in (~right).nonzero().flatten().tolist():
            found[row] = self.certificate(labels[row], predictions[row], Verdict.MISCLASSIFIED, threat, radius, 0.0)
        for label, rows in _groups(labels[right]):
            rows = right.nonzero().flatten()[rows]
            try:
                answers = ask(self.of_label(label), images[rows], torch.zeros_like(labels[rows]))
            except Interrupted as stopped:
                done = len(stopped.certificates)
                found.update(zip(rows[:done].tolist(), self._named(stopped.certificates, label), strict=True))
                known = [found[row] for row in range(len(images)) if row in found]
                first = next((row for row in range(len(images)) if row not in found), len(images))
                raise Interrupted(known[:first]) from None
            found.update(zip(rows.tolist(), self._named(answers, label), strict=True))
        return [found[row] for row in range(len(images))]

    def _named(self, certificates: list[Certificate], label: int) -> list[Certificate]:
        """The certificates of two answers, in the classes of the whole network."""
        names = {0: label, 1: self.target, None: None}
        return [replace(one, label=label, prediction=names[one.prediction]) for one in certificates]


class TargetedAttack:
    """An attack that looks for images at which the target is above the label (:mod:`flowverify.targeted`).

    Args:
        model: a :class:`~flowverify.network.Network` or any torch module from (B, C, H, W) to logits.
        target: the class.
        make: the attack on a model, of the method that is asked.
    """

    def __init__(self, model: nn.Module, target: int, make: Callable[[nn.Module], BaseAttack]) -> None:
        self.target, self._make, self._module, self._whole = target, make, model, make(model)

    def check(self, images: Tensor, labels: Tensor, threat: Threat | None = None) -> tuple[Tensor, Tensor]:
        """Images as a valid batch in float64, and labels, none of which is the target.

        Raises:
            InvalidInputError: as :meth:`flowverify.network.subject.Subject.check`; a target that is no class, or the
                label of an image.
        """
        images, labels = self._whole.check(images, labels, threat)
        if len(images):
            check_target(self.target, labels, self._whole.model.classes(images))
        return images, labels

    def run(self, images: Tensor, labels: Tensor, ball: WassersteinBall) -> AttackResult:
        """As :meth:`flowverify.attack.base.BaseAttack.run`."""
        return self._ask(images, labels, ball.threat, lambda one, images, labels: one.run(images, labels, ball))

    def minimise(self, images: Tensor, labels: Tensor, ground: str = "l1", cap: float | None = None) -> AttackResult:
        """As :meth:`flowverify.attack.base.BaseAttack.minimise`."""
        threat = Threat(ground, cap)
        return self._ask(images, labels, threat, lambda one, images, labels: one.minimise(images, labels, ground, cap))

    def _ask(
        self,
        images: Tensor,
        labels: Tensor,
        threat: Threat,
        ask: Callable[[BaseAttack, Tensor, Tensor], AttackResult],
    ) -> AttackResult:
        images, labels = self.check(images, labels, threat)
        if not len(images):
            raise InvalidInputError("images: given none, expected at least one")
        right = self._whole.model.clean(images, labels)[1]
        wrong = (~right).nonzero().flatten()
        # The attack on the whole network says which class those are given that are misclassified, and searches nothing.
        parts = [ask(self._whole, images[wrong], labels[wrong])] if len(wrong) else []
        order = wrong.tolist()
        for label, group in _groups(labels[right]):
            rows = right.nonzero().flatten()[group]
            found = ask(self._make(two_answers(self._module, label, self.target)), images[rows], torch.zeros_like(rows))
            names = torch.tensor([label, self.target], device=rows.device)
            parts.append(replace(found, label=names[found.label], prediction=names[found.prediction]))
            order += rows.tolist()
        return _reordered(join(parts), order)


def _reordered(found: AttackResult, order: list[int]) -> AttackResult:
    """Row order[k] of the result is row k of ``found``."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return replace(
        found,
        images=found.images[back],
        radius=found.radius[back],
        label=found.label[back],
        prediction=found.prediction[back],
        outcome=tuple(found.outcome[k] for k in back),
        note=tuple(found.note[k] for k in back),
    )
