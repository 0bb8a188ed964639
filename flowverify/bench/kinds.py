"""The kinds of jobs by name."""

from __future__ import annotations

from typing import Any

from flowverify.bench.tasks import Kind
from flowverify.registry import Entry, Registry

KINDS = Registry(
    "kind",
    {
        "certify": Entry("certificates, or searched radii", "flowverify.bench.certify_kind:Certify"),
        "attack": Entry("adversarial images", "flowverify.bench.attack_kind:Attack"),
        "instances": Entry("questions of VNN-COMP", "flowverify.bench.instances_kind:Instances"),
        "script": Entry("programs of one's own", "flowverify.bench.script_kind:Script"),
    },
    base="flowverify.bench.tasks:Kind",
)


def find_kind(name: str) -> Kind[Any]:
    """The kind of this name, or of a user's class ``MODULE:CLASS``, which every worker must be able to import.

    Raises:
        UnknownNameError: no kind has this name.
        InvalidInputError: there is no such class, or it is no :class:`~flowverify.bench.tasks.Kind`.
    """
    kind: Kind[Any] = KINDS.find(name)()
    return kind
