"""``flowverify attack``: looks for adversarial images, the nearest ones or within a radius."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.common import (
    Cap,
    DataDir,
    DatasetName,
    Device,
    Ground,
    Index,
    InputShape,
    Json,
    Layout,
    Mean,
    Model,
    Options,
    Output,
    Save,
    Source,
    Split,
    Std,
    Target,
    Weights,
    completing,
    user_errors,
)
from flowverify.cli.job import Job, Radii
from flowverify.errors import InvalidInputError
from flowverify.registry import ATTACKS, parsed

if TYPE_CHECKING:
    from flowverify.attack import AttackResult
    from flowverify.data import Dataset


@user_errors
def attack(
    model: Model,
    method: Annotated[
        str, typer.Option("--attack", help=f"{ATTACKS.listing()}.", autocompletion=completing(ATTACKS))
    ] = "minimal",
    ground: Ground = "l1",
    radius: Annotated[
        str | None,
        typer.Option(
            help="Look within this radius (pixels), or that of each image in this file of lines INDEX,RADIUS or of "
            "records; without it, for the nearest adversarial image.",
            metavar="RADIUS|FILE",
        ),
    ] = None,
    cap: Cap = None,
    target: Target = None,
    binarise: Annotated[
        float | None, typer.Option(help="Put a threshold at this pixel value before the network, as a defence.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that an attack may take an image; what it found until then counts.")
    ] = None,
    option: Options = None,
    dataset: DatasetName = None,
    index: Index = None,
    split: Split = "test",
    data_dir: DataDir = None,
    layout: Layout = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    output: Output = None,
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images attacked together.")] = 100,
    seed: Annotated[int, typer.Option(help="Of what is random in an attack.")] = 0,
    device: Device = "cpu",
    json: Json = False,
    save: Save = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder for the images that are found: an .npz and a picture (.png) of each.")
    ] = None,
) -> None:
    """Attack images with Wasserstein perturbations.

    Every radius printed is the exact distance of an image that was found and checked: an upper bound of what can be
    certified. Radii are W1 of normalised images for the ground cost, in pixels (for a power P, W_P). Exit code 2: bad
    input.
    """
    from flowverify.api import attack_on
    from flowverify.attack import Binarised
    from flowverify.ball import Threat, WassersteinBall

    ATTACKS.check(method)
    radii, threat = Radii(radius), Threat(ground, cap)
    if images is not None:
        _prepare_folder(images)
    options = {**({} if timeout is None else {"timeout": timeout}), **parsed(option)}
    source = Source(model, layout, input_shape, mean, std, output, weights)
    job = Job(source, dataset, index, split, data_dir, device, save, json=json, target=target)
    radii.check(job.positions)
    attacked = job.network if binarise is None else Binarised(job.network, binarise, steepness=10.0)
    search = attack_on(attacked, method, target, **{"batch_size": batch_size, "seed": seed, **options})
    # What is wrong with any image comes out before the first is attacked.
    search.check(job.chosen.images, job.chosen.labels, threat)

    def work(data: Dataset, positions: list[int], advance: Callable[[int], None]) -> Sequence[Mapping[str, Any]]:
        records: dict[int, dict[str, Any]] = {}
        for asked, rows in radii.groups(positions).items():
            part = data[rows]
            if asked is None:
                found = search.minimise(part.images, part.labels, threat.ground, cap)
            else:
                found = search.run(part.images, part.labels, WassersteinBall(asked, ground, cap))
            if images is not None:
                _save(part, [positions[row] for row in rows], found, images, model)
            advance(len(found))
            records.update({row: found.to_json(number) for number, row in enumerate(rows)})
        return [records[row] for row in range(len(positions))]

    settings = {"attack": method, "ground": threat.ground, "cap": cap, "asked": radii.asked, "binarise": binarise}
    records = job.run(work, {**settings, "seed": seed, "options": options}, at_once=batch_size)
    if not json:
        name = threat.name
        columns = ("image", "label", "predicted", "outcome", f"radius (pixels)\n{name}", "ms")
        job.print_table(records, columns, lambda r: (
            str(r["index"]), str(r["label"]), str(r["prediction"]), r["outcome"],
            "" if r["radius"] is None else f"{r['radius']:.4f}", f"{1000 * r['seconds']:.1f}",
        ))  # fmt: skip
        job.finish(_summary(records, name))
    job.end()


def _prepare_folder(path: Path) -> None:
    from flowverify.figures import require_matplotlib

    require_matplotlib()
    if path.exists() and not path.is_dir():
        raise InvalidInputError(f"images {path}: is a file, expected a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"images {path}: {error.strerror}, expected a folder that can be written to") from error


def _save(data: Dataset, positions: list[int], found: AttackResult, folder: Path, model: str) -> None:
    import numpy as np

    from flowverify.ball import distance_name
    from flowverify.figures import draw_adversarial, image_name

    rows = [row for row in range(len(positions)) if found.outcome[row] == "found"]
    if not rows:
        return
    names = [folder / f"{positions[row]:05d}" for row in rows]
    titles = [
        f"{image_name(model, data.name, data.split, positions[row])}: label {int(found.label[row])}, "
        f"now {int(found.prediction[row])}\n"
        f"{distance_name(found.ground)} = {float(found.radius[row]):.4f} pixels ({found.attack})"
        for row in rows
    ]
    exact = found.images[rows].cpu()
    for name, row, image in zip(names, rows, exact, strict=True):
        label = found.label[row : row + 1].cpu().numpy()
        np.savez(name.with_suffix(".npz"), images=image[None].numpy(), labels=label)
    draw_adversarial(data.images[rows].double(), exact, titles, [name.with_suffix(".png") for name in names])


def _summary(records: Sequence[Mapping[str, Any]], name: str) -> str:
    outcomes = Counter(record["outcome"] for record in records)
    if not records:
        return "no image was finished"
    right = [inf if one["radius"] is None else one["radius"] for one in records if one["outcome"] != "misclassified"]
    parts = [f"{outcomes['found']} of {len(records)} found"]
    parts += [f"{count} {word}" for word, count in sorted(outcomes.items()) if word != "found"]
    if right and isfinite(middle := median(right)):
        parts.append(f"median radius {middle:.4f} pixels ({name}) over images classified right")
    elif right:
        parts.append("no median radius: nothing found for half of the images classified right, or more")
    return "; ".join(parts)
