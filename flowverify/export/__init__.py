"""Transformed networks and properties for verifiers that know nothing of Wasserstein, and what they answer."""
