"""``flowverify demo``: both methods on real images, as a table and a picture; needs no download."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from flowverify.cli.common import Bound, check_picture, output, table, user_errors
from flowverify.results import Verdict

if TYPE_CHECKING:
    from flowverify.results import Certificate

MODEL, DATASET = "digits-fc3", "digits"
PICTURED = 3


@user_errors
def demo(
    count: Annotated[int, typer.Option(min=1, max=500, help="How many images.")] = 24,
    bound: Bound = "best",
    picture: Annotated[Path, typer.Option(help="Where the picture goes, a .png.")] = Path("demo.png"),
) -> None:
    """Certify the first images of digits with both methods and draw their worst cases, to first order."""
    from flowverify.bounds.recipes import check_bound
    from flowverify.data import load_dataset
    from flowverify.zoo import load_card, load_model

    check_bound(bound)
    check_picture(picture)
    card, network = load_card(MODEL), load_model(MODEL)
    data = load_dataset(DATASET)[:count]

    from flowverify.api import make_certifier
    from flowverify.ball import Threat
    from flowverify.figures import draw_worst_cases

    typer.echo(
        f"{MODEL} ({card.description}; clean accuracy {card.accuracy_text}), first {len(data)} test images of "
        f"{DATASET}, bound {bound}"
    )
    found: dict[str, list[Certificate]] = {}
    seconds: dict[str, float] = {}
    for method in ("vanilla", "fine-tuned"):
        certifier = make_certifier(network, method, bound)
        certifier.search(data.images[:1], data.labels[:1])  # compiles and traces, once a process
        start = perf_counter()
        found[method] = certifier.search(data.images, data.labels)
        seconds[method] = perf_counter() - start
    name = Threat().name
    _print(found, name)
    medians: dict[str, float] = {}
    for method, certificates in found.items():
        right = [one.radius for one in certificates if one.verdict is not Verdict.MISCLASSIFIED]
        medians[method] = median(right or [0.0])
        typer.echo(
            f"{method}: median radius {medians[method]:.4f} pixels ({name}) over the {len(right)} of {len(data)} "
            f"images classified right; {seconds[method]:.2f} s"
        )
    if medians["vanilla"]:
        typer.echo(f"ratio of the medians: {medians['fine-tuned'] / medians['vanilla']:.2f}")
    best = _most_robust(found["fine-tuned"])
    if best:
        draw_worst_cases(network, data.images[best], [found["fine-tuned"][index] for index in best], picture)
        typer.echo(f"wrote {picture}: images {', '.join(map(str, best))}, the largest radii of different digits")


def _most_robust(certificates: list[Certificate]) -> list[int]:
    """The images with the largest certified radii, one of each label."""
    order = sorted(range(len(certificates)), key=lambda index: -certificates[index].radius)
    first_of_label: dict[int, int] = {}
    for index in order:
        if certificates[index].radius > 0:
            first_of_label.setdefault(certificates[index].label, index)
    return list(first_of_label.values())[:PICTURED]


def _print(found: dict[str, list[Certificate]], name: str) -> None:
    rows = table(
        "image", "label", "predicted", "verdict", f"vanilla (pixels)\n{name}", f"fine-tuned (pixels)\n{name}", "ratio",
        left=("verdict",),
    )  # fmt: skip
    for index, (vanilla, tuned) in enumerate(zip(found["vanilla"], found["fine-tuned"], strict=True)):
        right = tuned.verdict is not Verdict.MISCLASSIFIED
        rows.add_row(
            str(index),
            str(tuned.label),
            str(tuned.prediction),
            str(tuned.verdict),
            f"{vanilla.radius:.4f}" if right else "",
            f"{tuned.radius:.4f}" if right else "",
            f"{tuned.radius / vanilla.radius:.2f}" if vanilla.radius > 0 else "",
        )
    output().print(rows)
