"""Attacks on the 1-Wasserstein threat model: upper bounds of what can be certified, never overstated."""

from flowverify.attack.base import CIFAR10, MNIST, AttackResult, BaseAttack, Schedule, make_attack
from flowverify.attack.flow_descent import FlowDescent
from flowverify.attack.frank_wolfe import FrankWolfe, MinimalRadius
from flowverify.attack.sinkhorn import (
    Binarised,
    LocalCost,
    ProjectedSinkhorn,
    binarise,
    conjugate_sinkhorn,
    project_sinkhorn,
)
from flowverify.registry import ATTACKS

__all__ = [
    "ATTACKS",
    "CIFAR10",
    "MNIST",
    "AttackResult",
    "BaseAttack",
    "Binarised",
    "FlowDescent",
    "FrankWolfe",
    "LocalCost",
    "MinimalRadius",
    "ProjectedSinkhorn",
    "Schedule",
    "binarise",
    "conjugate_sinkhorn",
    "make_attack",
    "project_sinkhorn",
]
