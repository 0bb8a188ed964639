"""Random networks, images and threat models against every method: does any certificate claim what is not so?

    python -m benchmarks.soundness_fuzz [--minutes 1] [--cases N] [--seed 0]
    python -m benchmarks.soundness_fuzz --case 17

Certificates are attacked with points of their balls (samples, single moves, Frank-Wolfe steps), counterexamples are
replayed, bounds are compared with values, radii of tiny networks with enumeration, all by oracles that share no code
with what they check (``benchmarks/soundness``). The k-th case of a seed is the same in every run, however long it is.
Prints every failure with the command that repeats its case, then what was tried; exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from benchmarks.common import header
from benchmarks.soundness.checks import run_case
from benchmarks.soundness.question import Question
from benchmarks.soundness.tally import Tally, report

CASES = 1_000_000  # of one seed


def case_seed(seed: int, number: int) -> int:
    """The seed of the case of this number, counted from 0."""
    return seed * CASES + number


def run_cases(seed: int, start: int, count: int, tally: Tally) -> None:
    """A fixed number of cases."""
    for number in range(start, start + count):
        run_case(case_seed(seed, number), tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=1.0, help="stop after this time (default: 1)")
    length.add_argument("--cases", type=int, help="stop after so many cases")
    length.add_argument("--case", type=int, help="repeat the case of this seed, as a failure prints it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the number of the first case (default: 0)")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are small
    header("Soundness")
    tally = Tally()
    if options.case is not None:
        print(Question(options.case, Tally()).describe())
        run_case(options.case, tally)
        _print_failures(tally, 0)
    else:
        end = time.monotonic() + 60 * options.minutes
        number = options.start
        while number < options.start + options.cases if options.cases is not None else time.monotonic() < end:
            known = len(tally.failures)
            run_case(case_seed(options.seed, number), tally)
            _print_failures(tally, known)
            number += 1
    print(report(tally))
    sys.exit(1 if tally.failures else 0)


def _print_failures(tally: Tally, known: int) -> None:
    for seed, text in tally.failures[known:]:
        print(f"FAILURE case {seed}: {text}\n  python -m benchmarks.soundness_fuzz --case {seed}", flush=True)


if __name__ == "__main__":
    main()
