"""Wasserstein balls for those who use auto_LiRPA themselves: perturbation classes for its ``BoundedTensor``.

Imported before auto_LiRPA, this makes its release 0.3 importable beside current versions of torch and numpy.
"""

from flowverify.bounds.crown.perturbation import PerturbationFlowPolytope, PerturbationWasserstein

__all__ = ["PerturbationFlowPolytope", "PerturbationWasserstein"]
