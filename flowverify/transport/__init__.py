"""Optimal transport on the pixel grid: distances, plans, flows, and the support function of the ball."""
