"""Attacks on the 1-Wasserstein threat model: upper bounds of what can be certified, never overstated."""
