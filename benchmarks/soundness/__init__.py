"""What the soundness fuzzer is made of: random networks, balls and their points, exact arithmetic, checks of a case.

Nothing here computes with the package's transport or bounds, except :mod:`benchmarks.soundness.checks`, which asks it.
"""
