"""Complete certification of ReLU networks: branch and bound over phases, and mixed-integer programming.

For a network of affine layers and ReLUs, an image mu of label y and a radius, the question is the sign of

    min over t != y  min over nu in the ball  f_y(nu) - f_t(nu)

On the polytope of images (``complete``) the answer is exact, on the L1 ball of flows (``vanilla-complete``) it is
exact for that larger set: framework paper (2021), Section 3.2 and Table 1.

From below: the network as matrices (``affine_maps``) and the ball (``balls``); bounds by a Lagrangian dual
(``relaxation``), raised by steps (``ascent``) along their ``gradients`` on a small copy of the problem (``sketch``); of
many neurons at once where the budget is small (``joint``, ``joint_search``); the branches of a tree (``nodes``,
``branching``, ``neuron_bounds``, ``leaf``, ``tree``) and the threads that grow it (``workers``); counterexamples
(``hunt``); the radius of one image (``schedule``, ``budget``, ``radius_search``) and certificates (``certifier``,
``references``). ``program``, ``program_values``, ``dual_proof`` and ``milp`` are the second method, which shares the
replay of counterexamples and none of the bounds.
"""
