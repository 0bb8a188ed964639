"""``flowverify verify``: decides a radius, or searches the largest certified one, image by image."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from flowverify.certifiers.methods import COMPLETE_METHODS
from flowverify.cli.batches import Result, certify_batches
from flowverify.cli.complete import Watch, complete_options, write_witnesses
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
    check_domain,
    check_picture,
    check_writable,
)
from flowverify.cli.records import Records
from flowverify.cli.report import FAILED, INTERRUPTED, output, print_error, progress_bar, table, user_errors
from flowverify.errors import InvalidInputError, UnknownNameError
from flowverify.results import Verdict

if TYPE_CHECKING:
    from flowverify.certifiers.base import BaseCertifier
    from flowverify.data import Dataset
    from flowverify.network import Network

SHORT_TABLE = 20
PICTURED = 4
DEFAULT_COUNT = 100
MARABOU_TIMEOUT = 300.0
ENGINES = ("flowverify", "marabou")


@user_errors
def verify(
    model: Model,
    dataset: DatasetName = None,
    index: Index = None,
    radius: Annotated[
        float | None,
        typer.Option(help="Decide this radius (pixels); without it, search the largest certified one."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="vanilla, fine-tuned, complete, vanilla-complete, milp, linear or linear-lp.")
    ] = "fine-tuned",
    bound: Annotated[str, typer.Option(help="best, ibp, crown-ibp, crown or alpha-crown.")] = "best",
    ground: Ground = "l1",
    cap: Cap = None,
    domain: Annotated[str, typer.Option(help="Where CROWN runs: auto, image or flow.")] = "auto",
    references: Annotated[
        int, typer.Option(min=0, help="The maximum over this many references: noise, points, images of the data set.")
    ] = 0,
    engine: Annotated[
        str, typer.Option(help="flowverify, or marabou: complete, slow, for vanilla and fine-tuned.")
    ] = "flowverify",
    encoding: Annotated[
        str, typer.Option(help="How marabou is asked: cuts (class by class), or by files: linear, outputs or penalty.")
    ] = "cuts",
    timeout: Annotated[
        float | None,
        typer.Option(help="Seconds for an image: 60 for complete methods; for an image and a radius: 300 for marabou."),
    ] = None,
    witnesses: Annotated[
        Path | None, typer.Option(help="Write the counterexamples that complete methods find to this .npz.")
    ] = None,
    split: Split = "test",
    data_dir: DataDir = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images certified together.")] = 50,
    device: Device = "cpu",
    json: Json = False,
    save: Annotated[Path | None, typer.Option(help="Also write the JSON lines to this file.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the first images and their worst cases, to first order, as this .png.")
    ] = None,
    all_rows: Annotated[bool, typer.Option("--all", help=f"Print every row, not {SHORT_TABLE} at most.")] = False,
) -> None:
    """Certify images against Wasserstein perturbations.

    Radii are W1 of normalised images for the ground cost, in pixels: 0.1 moves a tenth of the mass by one pixel (for
    a power P, W_P). Exit code 0: every image has a verdict, whatever it is; 1: the verdict of some image is "error";
    2: bad input.
    """
    from flowverify.ball import WassersteinBall, distance_name
    from flowverify.bounds.recipes import check_bound
    from flowverify.data import parse_index

    check_bound(bound)
    check_domain(domain)
    asked = WassersteinBall(0.0 if radius is None else radius, ground, cap)
    ball = None if radius is None else asked
    target = check_device(device)
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    if picture is not None:
        check_picture(picture)
    for path, what in ((save, "save"), (witnesses, "witnesses")):
        if path is not None:
            check_writable(path, what)
    network, data = load_inputs(model, dataset, split, data_dir)
    positions = parse_index(f":{min(DEFAULT_COUNT, len(data))}" if index is None else index, len(data))

    certifier: BaseCertifier
    watch = Watch()
    if engine == "marabou":
        from flowverify.export.marabou import MarabouCertifier

        limit = MARABOU_TIMEOUT if timeout is None else timeout
        certifier, batch_size = MarabouCertifier(network, method, encoding=encoding, timeout=limit), 1
    else:
        from flowverify.certifiers.make import make_certifier  # needs auto_LiRPA: after all that it is not needed for

        certifier = make_certifier(
            network.to(target),
            method,
            bound,
            domain=check_domain(domain),
            references=references,
            pool=data.images if references else None,
            options=complete_options(network, method, timeout, watch.show),
        )
        batch_size = 1 if method in COMPLETE_METHODS else batch_size
    results: list[Result] = []
    interrupted, start = False, perf_counter()
    with ExitStack() as stack:
        file = stack.enter_context(closing(Records(save, {}, fresh=True)))
        bar = stack.enter_context(progress_bar(quiet=json and output().is_terminal))
        task = bar.add_task(f"{model} on {data.name}", total=len(positions))
        watch.attach(bar, task)
        try:
            for batch in certify_batches(certifier, data, positions, ball, asked.ground, batch_size, cap):
                results += batch
                _emit(batch, json, file)
                bar.advance(task, len(batch))
        except KeyboardInterrupt:
            interrupted = True
    seconds = perf_counter() - start
    if not json:
        name = distance_name(asked.ground, asked.cap)
        _print_table(results, name, everything=all_rows)
        typer.echo(_summary(results, seconds, name, searched=ball is None))
    if witnesses is not None:
        write_witnesses(witnesses, results)
    if picture is not None and not interrupted:
        _draw(network, data, results, picture)
    if interrupted:
        print_error(f"interrupted after {len(results)} of {len(positions)} images")
        raise typer.Exit(INTERRUPTED)
    if any(certificate.verdict is Verdict.ERROR for _, certificate in results):
        raise typer.Exit(FAILED)


def load_inputs(model: str, dataset: str | None, split: str, data_dir: Path | None) -> tuple[Network, Dataset]:
    from flowverify.data import load_dataset
    from flowverify.zoo import load_card, load_model

    if model.endswith(".onnx"):
        if dataset is None:
            raise InvalidInputError(f"model {model}: a file does not name its data set, expected --dataset NAME")
        data = load_dataset(dataset, split, data_dir)
        return load_model(model, data.input_shape), data
    network = load_model(model)
    return network, load_dataset(dataset or load_card(model).dataset, split, data_dir)


def _emit(batch: Sequence[Result], json: bool, file: Records) -> None:
    """Writes one line an image at once, so that whoever reads along or comes after a crash has it."""
    for position, certificate in batch:
        line = file.add(position, certificate.to_json())
        if json:
            typer.echo(line)
    sys.stdout.flush()


def _print_table(results: Sequence[Result], name: str, *, everything: bool) -> None:
    upper = any(certificate.upper_radius is not None for _, certificate in results)
    last = (f"at most\n{name}", "margin", "ms") if upper else ("margin", "ms")
    rows = table("image", "label", "predicted", "verdict", f"radius (pixels)\n{name}", *last, left=("verdict",))
    shown = results if everything else results[:SHORT_TABLE]
    for position, certificate in shown:
        rows.add_row(
            str(position),
            str(certificate.label),
            str(certificate.prediction),
            str(certificate.verdict),
            f"{certificate.radius:.4f}",
            *([] if not upper else ["" if certificate.upper_radius is None else f"{certificate.upper_radius:.4f}"]),
            "" if certificate.margin is None else f"{certificate.margin:.4g}",
            f"{1000 * certificate.seconds:.1f}",
        )
    output().print(rows)
    if len(shown) < len(results):
        typer.echo(f"{len(results) - len(shown)} more images; --all prints them")


def _summary(results: Sequence[Result], seconds: float, name: str, *, searched: bool) -> str:
    from flowverify.certifiers.ends import CLOSED, bracketed, count_closed, ends_of, median_text

    if not results:
        return "no image was finished"
    counts = Counter(str(certificate.verdict) for _, certificate in results)
    parts = [f"{counts.pop('certified', 0)} of {len(results)} certified"]
    parts += [f"{count} {verdict}" for verdict, count in sorted(counts.items())]
    if searched:
        parts.append(median_text([ends_of(one.to_json()) for _, one in results], f"{name}; 0 where none is certified"))
        right = [ends_of(one.to_json()) for _, one in results if one.verdict is not Verdict.MISCLASSIFIED]
        if bracketed(right):
            parts.append(f"{CLOSED}: {count_closed(right)} classified right")
    parts.append(f"{seconds:.1f} s, {len(results) / seconds:.1f} images/s")
    notes = Counter(c.note for _, c in results if c.note and c.verdict is not Verdict.ERROR)
    return "; ".join(parts) + "".join(
        f"\nnote, {count} of {len(results)}: {note}" for note, count in sorted(notes.items())
    )


def _draw(network: Network, data: Dataset, results: Sequence[Result], picture: Path) -> None:
    from flowverify.figures import draw_worst_cases

    chosen = [
        (position, certificate)
        for position, certificate in results
        if certificate.radius > 0 and certificate.verdict in (Verdict.CERTIFIED, Verdict.UNKNOWN)
    ][:PICTURED]
    if not chosen:
        counts = Counter(str(certificate.verdict) for _, certificate in results)
        found = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
        print_error(f"no picture {picture}: no image is certified or unknown at a radius above 0 ({found})")
        return
    images = data[[position for position, _ in chosen]]
    draw_worst_cases(network, images.images, [certificate for _, certificate in chosen], picture)
    typer.echo(f"wrote {picture}: images {', '.join(str(position) for position, _ in chosen)}", err=True)
