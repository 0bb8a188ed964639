"""``flowverify verify``: decides a radius, or searches the largest certified one, image by image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.common import (
    FAILED,
    INCOMPLETE,
    Bound,
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
    check_picture,
    check_writable,
    completing,
    print_error,
    say,
    user_errors,
)
from flowverify.cli.job import Job, Radii
from flowverify.errors import UnknownNameError
from flowverify.registry import ENGINES, METHODS, OWN_ENGINE, help_of, parsed
from flowverify.results import Certificate, Interrupted, Verdict

if TYPE_CHECKING:
    from flowverify.data import Dataset

PICTURED = 4
COMPLETE = "flowverify.certifiers.options:CompleteOptions"
MARABOU = "flowverify.certifiers.options:MarabouOptions"
ABCROWN = "flowverify.certifiers.options:AlphaBetaCrownOptions"

Result = tuple[int, Certificate]  # an image's position in the data set, and what was shown about it


@user_errors
def verify(
    model: Model,
    dataset: DatasetName = None,
    index: Index = None,
    radius: Annotated[
        str | None,
        typer.Option(
            help="Decide this radius (pixels), or that of each image in this file of lines INDEX,RADIUS or of records; "
            "without it, search the largest certified one.",
            metavar="RADIUS|FILE",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help=f"{METHODS.listing()}.", autocompletion=completing(METHODS))
    ] = "fine-tuned",
    bound: Bound = "best",
    ground: Ground = "l1",
    cap: Cap = None,
    target: Target = None,
    domain: Annotated[str | None, typer.Option(help=help_of(INCOMPLETE, "domain"))] = None,
    references: Annotated[
        int, typer.Option(min=0, help="The maximum over this many references: noise, points, images of the data set.")
    ] = 0,
    engine: Annotated[
        str,
        typer.Option(
            help=f"What carries the method out: {ENGINES.listing()}. Outside engines are complete, and slow; "
            "`flowverify engines` lists their options.",
            autocompletion=completing(ENGINES),
        ),
    ] = OWN_ENGINE,
    encoding: Annotated[
        str | None, typer.Option(help=f"{help_of(MARABOU, 'encoding')} {help_of(ABCROWN, 'encoding')}")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            help=f"Of complete methods: {help_of(COMPLETE, 'timeout')} By default 60, for outside engines 300.",
            show_default=False,
        ),
    ] = None,
    option: Options = None,
    witnesses: Annotated[
        Path | None, typer.Option(help="Write the counterexamples that complete methods find to this .npz.")
    ] = None,
    split: Split = "test",
    data_dir: DataDir = None,
    layout: Layout = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    output: Output = None,
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images certified together.")] = 50,
    device: Device = "cpu",
    json: Json = False,
    save: Save = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Draw the first images and their worst cases, to first order, as this .png, or moving .gif."),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VERDICT",
            help=f"Exit with code 1 if any image has this verdict: {', '.join(Verdict)}. Repeat it for several.",
            show_default=False,
        ),
    ] = None,
    all_rows: Annotated[bool, typer.Option("--all", help="Print every row, not 20 at most.")] = False,
) -> None:
    """Certify images against Wasserstein perturbations.

    Radii are W1 of normalised images for the ground cost, in pixels: 0.1 moves a tenth of the mass by one pixel (for
    a power P, W_P). Exit code 0: every image has a verdict, whatever it is; 1: the verdict of some image is "error", or
    one that --fail-on names; 2: bad input; 130: interrupted.
    """
    from flowverify.ball import Threat, WassersteinBall
    from flowverify.bounds.recipes import check_bound

    check_bound(bound)
    METHODS.check(method)
    ENGINES.check(engine)
    for verdict in fail_on or ():
        if verdict not in list(Verdict):
            raise UnknownNameError("verdict", verdict, [str(one) for one in Verdict])
    radii, threat = Radii(radius), Threat(ground, cap)
    given = {"domain": domain, "encoding": encoding, "timeout": timeout}
    options = {**{name: value for name, value in given.items() if value is not None}, **parsed(option)}
    if picture is not None:
        check_picture(picture)
    if witnesses is not None:
        check_writable(witnesses, "witnesses")
    source = Source(model, layout, input_shape, mean, std, output, weights)
    job = Job(source, dataset, index, split, data_dir, device, save, json=json, target=target)
    radii.check(job.positions)

    from flowverify.api import make_certifier  # needs auto_LiRPA: after all that it is not needed for

    certifier = make_certifier(
        job.network,
        method,
        bound,
        engine=engine,
        references=references,
        pool=job.data.images if references else None,
        progress=lambda state: job.say(_progress(state)),
        target=target,
        **options,
    )
    # What is wrong with any image comes out before the first is certified.
    images, labels = certifier.check(job.chosen.images, job.chosen.labels, threat)
    certifier.prepare(threat)
    shown: dict[int, Certificate] = {}

    def work(data: Dataset, positions: list[int], advance: Callable[[int], None]) -> Sequence[Mapping[str, Any]]:
        for asked, rows in radii.groups(positions).items():
            places, images, labels = [positions[row] for row in rows], data.images[rows], data.labels[rows]
            try:
                if asked is None:
                    found = certifier.search(images, labels, threat)
                else:
                    found = certifier.certify(images, labels, WassersteinBall(asked, ground, cap))
            except Interrupted as stopped:
                shown.update(zip(places, stopped.certificates, strict=False))
                known = takewhile(shown.__contains__, positions)
                raise Interrupted([shown[position] for position in known]) from None
            shown.update(zip(places, found, strict=True))
            advance(len(found))
        return [shown[position].to_json() for position in positions]

    def failed(positions: list[int], seconds: float, reason: str) -> Sequence[Mapping[str, Any]]:
        rows = [job.positions.index(position) for position in positions]
        predictions, _ = certifier.clean(images[rows], labels[rows])
        return [
            certifier.certificate(
                label, prediction, Verdict.ERROR, threat, radii.of(position) or 0.0, seconds, note=reason
            ).to_json()
            for position, label, prediction in zip(positions, labels[rows], predictions, strict=True)
        ]

    settings = {
        "method": method, "bound": certifier.bound, "ground": threat.ground, "cap": cap, "engine": engine,
        "asked": radii.asked, "references": references, "options": options,
    }  # fmt: skip
    at_once = batch_size if certifier.batched else 1
    records = job.run(work, settings, at_once=at_once, failed=failed)
    results = [(record["index"], shown.get(record["index"]) or Certificate.from_json(record)) for record in records]
    if not json:
        _print(job, results, threat.name, searched=radius is None, everything=all_rows)
    if witnesses is not None:
        write_witnesses(witnesses, results)
    if picture is not None and not job.interrupted:
        _draw(job, results, picture)
    job.end()
    counts = Counter(str(certificate.verdict) for _, certificate in results)
    if failures := [verdict for verdict in dict.fromkeys(fail_on or ()) if counts[verdict]]:
        print_error(f"--fail-on: {', '.join(f'{counts[one]} of {len(results)} images {one}' for one in failures)}")
    if failures or counts[Verdict.ERROR]:
        raise typer.Exit(FAILED)


def _progress(state: Any) -> str:
    """What a complete method is at, from its bracket and the tree that is open."""
    upper = f"{state.upper_radius:.4f}" if math.isfinite(state.upper_radius) else "?"
    return f"radius {state.radius:.4f} to {upper}, {state.open_nodes} open nodes at {state.trial:.4f}"


def _print(job: Job, results: Sequence[Result], name: str, *, searched: bool, everything: bool) -> None:
    upper = any(certificate.upper_radius is not None for _, certificate in results)
    last = (f"at most\n{name}", "margin", "ms") if upper else ("margin", "ms")
    columns = ("image", "label", "predicted", "verdict", f"radius (pixels)\n{name}", *last)

    def cells(result: Result) -> tuple[str, ...]:
        position, one = result
        at_most = "" if one.upper_radius is None else f"{one.upper_radius:.4f}"
        return (
            str(position),
            str(one.label),
            str(one.prediction),
            str(one.verdict),
            f"{one.radius:.4f}",
            *((at_most,) if upper else ()),
            "" if one.margin is None else f"{one.margin:.4g}",
            f"{1000 * one.seconds:.1f}",
        )

    job.print_table(results, columns, cells, everything=everything, more="--all prints them")
    if not results:
        job.finish("no image was finished")
        return
    job.finish(_summary([certificate for _, certificate in results], name, searched=searched))
    notes = Counter(c.note for _, c in results if c.note and c.verdict is not Verdict.ERROR)
    for note, count in sorted(notes.items()):
        typer.echo(f"note, {count} of {len(results)}: {note}")


def _summary(found: Sequence[Certificate], name: str, *, searched: bool) -> str:
    from flowverify.certifiers.base import CLOSED, bracketed, count_closed, ends_of, median_text

    counts = Counter(str(certificate.verdict) for certificate in found)
    parts = [f"{counts.pop('certified', 0)} of {len(found)} certified"]
    parts += [f"{count} {verdict}" for verdict, count in sorted(counts.items())]
    if searched:
        parts.append(median_text([ends_of(one.to_json()) for one in found], f"{name}; 0 where none is certified"))
        right = [ends_of(one.to_json()) for one in found if one.verdict is not Verdict.MISCLASSIFIED]
        if bracketed(right):
            parts.append(f"{CLOSED}: {count_closed(right)} classified right")
    return "; ".join(parts)


def write_witnesses(path: Path, results: Sequence[Result]) -> None:
    """Images, their positions in the data set and their labels, as ``images``, ``index``, ``labels``."""
    import numpy as np

    found = [(position, one) for position, one in results if one.witness is not None]
    images = [one.witness.cpu().numpy() for _, one in found if one.witness is not None]
    np.savez(
        path,
        images=np.stack(images) if images else np.zeros((0, 1, 1, 1)),
        index=np.array([position for position, _ in found], dtype=np.int64),
        labels=np.array([one.label for _, one in found], dtype=np.int64),
    )


def _draw(job: Job, results: Sequence[Result], picture: Path) -> None:
    from flowverify.figures import draw_worst_cases, image_name

    chosen = [
        (position, certificate)
        for position, certificate in results
        if certificate.radius > 0
        and (certificate.verdict in (Verdict.CERTIFIED, Verdict.UNKNOWN) or certificate.witness is not None)
    ][:PICTURED]
    if not chosen:
        counts = Counter(str(certificate.verdict) for _, certificate in results)
        found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        print_error(f"no picture {picture}: no image is certified or unknown at a radius above 0 ({found})")
        return
    images = job.data[[position for position, _ in chosen]].images
    names = [image_name(job.settings["model"], job.data.name, job.data.split, position) for position, _ in chosen]
    draw_worst_cases(job.network, images, [certificate for _, certificate in chosen], picture, names)
    say(f"wrote {picture}: images {', '.join(str(position) for position, _ in chosen)}")
