"""Certification: lower bounds on margins over a Wasserstein ball, verdicts, and certified radii."""
