"""The names of the exact methods of certification."""

from __future__ import annotations

LINEAR_METHODS: dict[str, str] = {
    "linear": "affine networks: the exact radius, without a solver (Lemma 8, by duality)",
    "linear-lp": "affine networks: the exact radius by linear programs (Lemma 8)",
}
COMPLETE_METHODS: dict[str, str] = {
    "complete": "ReLU networks: the exact radius, by branch and bound on the flows that lead to images",
    "vanilla-complete": "ReLU networks: exact for the L1 ball in the flow domain",
    "milp": "ReLU networks: the exact radius, by mixed-integer programs; slow, to check against",
}
