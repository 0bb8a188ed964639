"""``flowverify attack``: looks for adversarial images, the nearest ones or within a radius."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack, closing
from math import isfinite
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.options import (
    Cap,
    DataDir,
    DatasetName,
    Device,
    Ground,
    Index,
    Json,
    Model,
    Split,
    check_device,
)
from flowverify.cli.records import Records
from flowverify.cli.report import INTERRUPTED, output, print_error, progress_bar, table, user_errors
from flowverify.errors import InvalidInputError

if TYPE_CHECKING:
    from flowverify.attack import AttackResult, BaseAttack
    from flowverify.data import Dataset

SHORT_TABLE = 20
DEFAULT_COUNT = 100
RECORDS = "attack.jsonl"


@user_errors
def attack(
    model: Model,
    method: Annotated[str, typer.Option("--attack", help="flow-pgd, sinkhorn, frank-wolfe or minimal.")] = "minimal",
    ground: Ground = "l1",
    radius: Annotated[
        float | None,
        typer.Option(help="Look within this radius (pixels); without it, for the nearest adversarial image."),
    ] = None,
    cap: Cap = None,
    binarise: Annotated[
        float | None, typer.Option(help="Put a threshold at this pixel value before the network, as a defence.")
    ] = None,
    dataset: DatasetName = None,
    index: Index = None,
    split: Split = "test",
    data_dir: DataDir = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images attacked together.")] = 100,
    seed: Annotated[int, typer.Option(help="Of what is random in an attack.")] = 0,
    device: Device = "cpu",
    json: Json = False,
    save: Annotated[
        Path | None, typer.Option(help=f"Folder for {RECORDS}, the images (.npz) and a picture (.png) of each.")
    ] = None,
) -> None:
    """Attack images with Wasserstein perturbations.

    Every radius printed is the exact distance of an image that was found and checked: an upper bound of what can be
    certified. Radii are W1 of normalised images for the ground cost, in pixels (for a power P, W_P). Exit code 2: bad
    input.
    """
    from flowverify.attack import Binarised, make_attack
    from flowverify.attack.make import check_attack
    from flowverify.ball import WassersteinBall, distance_name
    from flowverify.data import parse_index

    check_attack(method)
    ball = WassersteinBall(0.0 if radius is None else radius, ground, cap)
    target = check_device(device)
    if save is not None:
        _prepare_folder(save)
    from flowverify.cli.verify import load_inputs

    network, data = load_inputs(model, dataset, split, data_dir)
    network = network.to(target)
    attacked = network if binarise is None else Binarised(network, binarise, steepness=10.0)
    search = make_attack(method, attacked, batch_size=batch_size, seed=seed)
    positions = parse_index(f":{min(DEFAULT_COUNT, len(data))}" if index is None else index, len(data))
    chosen = data[list(positions)]
    # What is wrong with any image comes out before the first is attacked.
    search.check(chosen.images, chosen.labels, ball.threat)

    results: list[tuple[list[int], AttackResult]] = []
    interrupted, start = False, perf_counter()
    with ExitStack() as stack:
        file = stack.enter_context(closing(Records(None if save is None else save / RECORDS, {}, fresh=True)))
        bar = stack.enter_context(progress_bar(quiet=json and output().is_terminal))
        task = bar.add_task(f"{method} on {model}", total=len(positions))
        try:
            for first in range(0, len(positions), batch_size):
                part = list(positions[first : first + batch_size])
                found = _attack(search, data, part, ball, searching=radius is None)
                results.append((part, found))
                _emit(part, found, json, file)
                if save is not None:
                    _save(data, part, found, save)
                bar.advance(task, len(part))
        except KeyboardInterrupt:
            interrupted = True
    if not json:
        name = distance_name(ball.ground, ball.cap)
        _print_table(results, name)
        typer.echo(_summary(results, perf_counter() - start, name))
    if interrupted:
        done = sum(len(part) for part, _ in results)
        print_error(f"interrupted after {done} of {len(positions)} images")
        raise typer.Exit(INTERRUPTED)


def _prepare_folder(path: Path) -> None:
    from flowverify.figures import require_matplotlib

    require_matplotlib()
    if path.exists() and not path.is_dir():
        raise InvalidInputError(f"save {path}: is a file, expected a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"save {path}: {error.strerror}, expected a folder that can be written to") from error


def _attack(search: BaseAttack, data: Dataset, positions: list[int], ball: Any, *, searching: bool) -> AttackResult:
    chosen = data[positions]
    if searching:
        return search.minimise(chosen.images, chosen.labels, ball.ground, ball.cap)
    return search.run(chosen.images, chosen.labels, ball)


def _emit(positions: list[int], found: AttackResult, json: bool, file: Records) -> None:
    """Writes one line an image at once, so that whoever reads along or comes after a crash has it."""
    for row, position in enumerate(positions):
        line = file.add(position, found.to_json(row))
        if json:
            typer.echo(line)
    sys.stdout.flush()


def _save(data: Dataset, positions: list[int], found: AttackResult, folder: Path) -> None:
    import numpy as np

    from flowverify.ball import distance_name
    from flowverify.figures import draw_adversarial

    rows = [row for row in range(len(positions)) if found.outcome[row] == "found"]
    if not rows:
        return
    clean = data[[positions[row] for row in rows]].images
    names = [folder / f"{positions[row]:05d}" for row in rows]
    titles = [
        f"image {positions[row]}, label {int(found.label[row])}, now {int(found.prediction[row])}: "
        f"{distance_name(found.ground)} = {float(found.radius[row]):.4f} pixels ({found.attack})"
        for row in rows
    ]
    exact = found.images[rows].cpu()
    for name, row, image in zip(names, rows, exact, strict=True):
        label = found.label[row : row + 1].cpu().numpy()
        np.savez(name.with_suffix(".npz"), images=image[None].numpy(), labels=label)
    draw_adversarial(clean.double(), exact, titles, [name.with_suffix(".png") for name in names])


def _print_table(results: list[tuple[list[int], AttackResult]], name: str) -> None:
    rows = table("image", "label", "predicted", "outcome", f"radius (pixels)\n{name}", "ms", left=("outcome",))
    lines = [
        (
            str(position),
            str(int(found.label[row])),
            str(int(found.prediction[row])),
            found.outcome[row],
            f"{float(found.radius[row]):.4f}" if found.found[row] else "",
            f"{1000 * found.seconds / len(found):.1f}",
        )
        for positions, found in results
        for row, position in enumerate(positions)
    ]
    for line in lines[:SHORT_TABLE]:
        rows.add_row(*line)
    output().print(rows)
    if len(lines) > SHORT_TABLE:
        typer.echo(f"{len(lines) - SHORT_TABLE} more images; --json or --save gives all")


def _summary(results: list[tuple[list[int], AttackResult]], seconds: float, name: str) -> str:
    outcomes = Counter(word for _, found in results for word in found.outcome)
    total = sum(outcomes.values())
    if not total:
        return "no image was finished"
    radii = [radius for _, found in results for radius in found.radius.tolist()]
    right = [radius for radius in radii if radius > 0]
    parts = [f"{outcomes['found']} of {total} found"]
    parts += [f"{count} {word}" for word, count in sorted(outcomes.items()) if word != "found"]
    if right and isfinite(middle := median(right)):
        parts.append(f"median radius {middle:.4f} pixels ({name}) over images classified right")
    elif right:
        parts.append("no median radius: nothing found for half of the images classified right, or more")
    parts.append(f"{seconds:.1f} s, {1000 * seconds / total:.1f} ms an image")
    return "; ".join(parts)
