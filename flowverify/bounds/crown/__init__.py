"""CROWN by auto_LiRPA: the one module that imports it, its perturbation classes, and the engine on them."""
