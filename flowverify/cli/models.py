"""What comes with the package, and whether it works: commands that list, demonstrate and make shipped models.

``flowverify models``: the shipped models.

``flowverify doctor``: what is installed, what works, and what to install.

``flowverify demo``: both methods on real images, as a table and a picture; needs no download.

``flowverify train``: trains a model by its recipe.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify import __version__
from flowverify.cli.common import (
    FAILED,
    Bound,
    DataDir,
    Device,
    Json,
    check_device,
    check_picture,
    json_line,
    output,
    progress_bar,
    schema_option,
    table,
    user_errors,
)
from flowverify.results import Verdict

if TYPE_CHECKING:
    from flowverify.results import Certificate
    from flowverify.training import EpochReport
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
            typer.echo(f"{finding.status:<7} {finding.name:<16} {finding.detail}")
            if finding.advice:
                typer.echo(f"{'':<24} to mend it: {finding.advice}")
        typer.echo(f"certification cannot work: {len(failed)} checks failed" if failed else "certification works")
    if failed:
        raise typer.Exit(FAILED)


MODEL, DATASET = "digits-fc3", "digits"
PICTURED = 3


@user_errors
def demo(
    count: Annotated[int, typer.Option(min=1, max=500, help="How many images.")] = 24,
    bound: Bound = "best",
    picture: Annotated[Path, typer.Option(help="Where the picture goes, a .png, or a .gif that moves.")] = Path(
        "demo.png"
    ),
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
    from flowverify.figures import draw_worst_cases, image_name

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
        names = [image_name(MODEL, data.name, data.split, index) for index in best]
        draw_worst_cases(network, data.images[best], [found["fine-tuned"][index] for index in best], picture, names)
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


def _schema() -> dict[str, Any]:
    from flowverify.training.recipe import recipe_schema

    return recipe_schema()


@user_errors
def train(
    recipe: Annotated[str, typer.Option(help="The name of a recipe, or a file: .yaml, .yml or .json.")],
    out: Annotated[Path, typer.Option(help="Folder for the ONNX file, the card and the metrics.")] = Path("."),
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the recipe's seed.")] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="Train without the validation split, and measure the accuracy on it.")
    ] = False,
    data_dir: DataDir = None,
    device: Device = "cpu",
    schema: Annotated[bool, schema_option(_schema)] = False,
) -> None:
    """Train a model by its recipe; the same recipe and seed give the same file on the same machine.

    Interrupted, the same command goes on after the last whole epoch and ends with the same weights. Each
    epoch adds a line of JSON to NAME.metrics.jsonl. Of data without a test split, such as an .npz, the last fifth of
    every class is held out, and the accuracy is measured on it.
    """
    from flowverify.data import HELD_OUT
    from flowverify.training import read_recipe, train_and_save

    chosen = read_recipe(recipe)
    target = check_device(device)
    with progress_bar() as bar:
        task = bar.add_task(chosen.name, total=chosen.epochs)

        def step(epoch: int, done: int, steps: int) -> None:
            bar.update(task, completed=epoch - 1 + done / steps)

        def report(epoch: EpochReport) -> None:
            more = "".join(f", {name} {value:.3f}" for name, value in epoch.metrics.items())
            bar.update(
                task,
                completed=epoch.epoch,
                description=f"{chosen.name}: loss {epoch.loss:.4f}{more}, "
                f"{epoch.test_split} accuracy {epoch.test_accuracy:.2%}",
            )

        card = train_and_save(
            recipe, out, data_dir, seed, on_epoch=report, on_step=step, device=target, validation=validation
        )
    typer.echo(f"wrote {out / card.file} and {out / card.name}.json: clean accuracy {card.accuracy_text}")
    if card.clean_split == HELD_OUT:
        typer.echo(f"{card.dataset} has no test split: the last fifth of every class was held out, not trained on")
