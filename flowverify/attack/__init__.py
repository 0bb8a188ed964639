"""Attacks on the 1-Wasserstein threat model: upper bounds of what can be certified, never overstated."""

from flowverify.attack.base import BaseAttack
from flowverify.attack.binarised import Binarised, binarise
from flowverify.attack.conjugate_sinkhorn import conjugate_sinkhorn
from flowverify.attack.flow_descent import FlowDescent
from flowverify.attack.frank_wolfe import FrankWolfe
from flowverify.attack.local_plans import LocalCost
from flowverify.attack.make import make_attack
from flowverify.attack.minimal import MinimalRadius
from flowverify.attack.projected_sinkhorn import ProjectedSinkhorn
from flowverify.attack.result import AttackResult
from flowverify.attack.schedule import CIFAR10, MNIST, Schedule
from flowverify.attack.sinkhorn import project_sinkhorn
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
