"""Complete certification of piecewise linear networks: branch and bound over phases, and mixed-integer programming.

For a network of affine layers and ReLUs, or one that can be written so (``problem``), an image mu of label y and a
budget, the question is the sign of

    min over t != y  min over nu in the ball  f_y(nu) - f_t(nu)

On the polytope of images (``complete``) the answer is exact, on the L1 ball of flows (``vanilla-complete``) it is
exact for that larger set: framework paper (2021), Section 3.2 and Table 1.

Whose question it is, and until when: certificates (``certifier``) and the radius of one image (``radius_search``), to a
``deadline``, by settings that are passed along (:mod:`flowverify.certifiers.options`). A search has a ``problem``:
margins over one ball of the network as matrices. It starts from bounds by other engines (``neuron_bounds``).

From below, bounds: a Lagrangian dual that any multipliers make sound (``relaxation``, theory section 16), whose
multipliers Adam raises (``ascent``) along gradients that are compiled, in single precision. All neurons share one
budget: rows of moves, made at the root, bound ReLUs in every node (section 16); for ground costs other than l1 and
for caps, joint limits of several neurons take their place (section 17). What the root leaves open is a ``tree`` of
``nodes``, each with the phases of some ReLUs decided, new bounds of the others (``neuron_bounds``), and a linear
program where all are decided; threads share out the rows of a batch.

From above: the minimisers of all these bounds, and descents, as starts for the nearest counterexample
(``counterexamples``); every one is replayed exactly.

``milp`` is the second method, which shares the replay of counterexamples and none of the bounds.
"""
