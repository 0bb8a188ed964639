"""What was tried, and what failed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """What was tried, and what failed."""

    networks: int = 0
    points: int = 0
    exact_points: int = 0
    undecided_points: int = 0
    distances: int = 0
    enumerations: int = 0
    bounds: int = 0
    certificates: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    refusals: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused_first: dict[str, int] = field(default_factory=dict)  # the case with the first refusal of a kind
    failures: list[tuple[int, str]] = field(default_factory=list)

    def refuse(self, asked: str, reason: str, seed: int) -> None:
        """Counts a refusal of what was asked."""
        self.refusals[asked, reason] += 1
        self.refused_first.setdefault(reason, seed)


def report(tally: Tally) -> str:
    """The table of what was tried."""
    lines = [
        f"networks {tally.networks:,}, certificates {sum(tally.certificates.values()):,}, points {tally.points:,}, "
        f"of them in exact arithmetic {tally.exact_points:,} (undecided {tally.undecided_points:,})",
        f"bounds of an image at a radius {tally.bounds:,}, distances by an exact solver {tally.distances:,}, "
        f"radii by enumeration {tally.enumerations:,}",
        "",
    ]
    verdicts = sorted({verdict for _, _, verdict in tally.certificates})
    lines += ["| method | bound | " + " | ".join(verdicts) + " |", "| --- | --- |" + " --- |" * len(verdicts)]
    for method, bound in sorted({key[:2] for key in tally.certificates}):
        counts = [f"{tally.certificates[method, bound, verdict]:,}" for verdict in verdicts]
        lines.append(f"| {method} | {bound} | " + " | ".join(counts) + " |")
    reasons: Counter[str] = Counter()
    asked: dict[str, set[str]] = {}
    for (what, reason), count in tally.refusals.items():
        reasons[reason] += count
        asked.setdefault(reason, set()).add(what)
    lines += [
        "",
        f"refusals {sum(reasons.values()):,}, by reason, with the first case of each and what it was asked for",
    ]
    for reason, count in reasons.most_common():
        lines.append(
            f"  {count:6,}  case {tally.refused_first[reason]}, {', '.join(sorted(asked[reason])[:4])}: {reason}"
        )
    lines += ["", f"failures {len(tally.failures)} in {len({seed for seed, _ in tally.failures})} cases"]
    return "\n".join(lines)
