"""``flowverify train``: trains a model by its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowverify.cli.options import DataDir, Device, check_device
from flowverify.cli.report import progress_bar, user_errors

if TYPE_CHECKING:
    from flowverify.training import EpochReport


@user_errors
def train(
    recipe: Annotated[str, typer.Option(help="The name of a recipe, which is that of the model it makes.")],
    out: Annotated[Path, typer.Option(help="Folder for the ONNX file and the card.")] = Path("."),
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the recipe's seed.")] = None,
    data_dir: DataDir = None,
    device: Device = "cpu",
) -> None:
    """Train a model by its recipe; the same recipe and seed give the same file on the same machine."""
    from flowverify.training import find_recipe, train_and_save

    epochs = find_recipe(recipe).epochs
    target = check_device(device)
    with progress_bar() as bar:
        task = bar.add_task(recipe, total=epochs)

        def report(epoch: EpochReport) -> None:
            bar.update(
                task,
                completed=epoch.epoch,
                description=f"{recipe}: loss {epoch.loss:.4f}, test accuracy {epoch.test_accuracy:.2%}",
            )

        card = train_and_save(recipe, out, data_dir, seed, on_epoch=report, device=target)
    typer.echo(f"wrote {out / card.file} and {out / card.name}.json: clean accuracy {card.clean_accuracy:.2%}")
