"""``flowverify models``: the shipped models.

``flowverify doctor``: what is installed, what works, and what to install.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import typer

from flowverify import __version__
from flowverify.cli.common import FAILED, Json, json_line, output, table, user_errors

if TYPE_CHECKING:
    from flowverify.zoo import Card


@user_errors
def models(json: Json = False) -> None:
    """List the shipped models and what their cards say."""
    from flowverify.zoo import list_models

    cards = list_models()
    if json:
        for card in cards:
            typer.echo(json_line(dataclasses.asdict(card)))
        return
    rows = table(
        "model", "data set", "input", "weights", "clean accuracy", "median certified radius (pixels)",
        left=("model", "data set", "input"),
    )  # fmt: skip
    for card in cards:
        rows.add_row(
            card.name,
            card.dataset,
            "x".join(map(str, card.input_shape)),
            f"{card.parameters:,}",
            card.accuracy_text,
            _median(card),
        )
    output().print(rows)
    typer.echo("medians are over the first test images, so many as said, of which misclassified ones count as 0")
    for card in cards:
        typer.echo(f"{card.name}: {card.description}; made by `{card.command}`")


def _median(card: Card) -> str:
    """The median radius with its distance, and over how many images."""
    from flowverify.ball import distance_name

    found = card.certified
    if "median_radius" not in found:
        return ""
    name = distance_name(found.get("ground", "l1"))
    return f"{found['median_radius']:.3f} ({name}) of {found['images']:,} test images"


@user_errors
def doctor(json: Json = False) -> None:
    """Check the installation; exit code 1 if certification cannot work."""
    from flowverify.doctor import Status, examine

    findings = examine()
    failed = [finding for finding in findings if finding.status is Status.FAILED]
    if json:
        for finding in findings:
            typer.echo(json_line(dataclasses.asdict(finding)))
    else:
        typer.echo(f"flowverify {__version__}")
        for finding in findings:
            typer.echo(f"{finding.status:<7} {finding.name:<12} {finding.detail}")
            if finding.advice:
                typer.echo(f"{'':<20} to mend it: {finding.advice}")
        typer.echo(f"certification cannot work: {len(failed)} checks failed" if failed else "certification works")
    if failed:
        raise typer.Exit(FAILED)
