"""``flowverify train``: trains a model by its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.common import DataDir, Device, check_device, progress_bar, schema_option, user_errors

if TYPE_CHECKING:
    from flowverify.training import EpochReport


def _schema() -> dict[str, Any]:
    from flowverify.training.recipe import recipe_schema

    return recipe_schema()


@user_errors
def train(
    recipe: Annotated[str, typer.Option(help="The name of a recipe, or a file: .yaml, .yml or .json.")],
    out: Annotated[Path, typer.Option(help="Folder for the ONNX file, the card and the metrics.")] = Path("."),
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the recipe's seed.")] = None,
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

        card = train_and_save(recipe, out, data_dir, seed, on_epoch=report, on_step=step, device=target)
    typer.echo(f"wrote {out / card.file} and {out / card.name}.json: clean accuracy {card.accuracy_text}")
    if card.clean_split == HELD_OUT:
        typer.echo(f"{card.dataset} has no test split: the last fifth of every class was held out, not trained on")
