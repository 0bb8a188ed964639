"""Bounds in the coordinates in which the budget is spent: flows along and against each edge (theory, section 21)."""
