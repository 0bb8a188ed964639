"""``flowverify export``: networks and properties for outside verifiers, and their answers read back.

``flowverify vnncomp`` answers such properties itself, by the contract for tools of the competition VNN-COMP.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Timer
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.common import (
    FAILED,
    DataDir,
    DatasetName,
    Ground,
    InputShape,
    Json,
    Layout,
    Mean,
    Model,
    Output,
    Source,
    Split,
    Std,
    Weights,
    check_writable,
    json_line,
    one_line,
    print_error,
    progress_bar,
    user_errors,
)
from flowverify.cli.job import load_inputs
from flowverify.errors import InvalidInputError

if TYPE_CHECKING:
    from flowverify.network import Network
    from flowverify.results import Certificate


@user_errors
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder to write, or with --collect the one that was written.")],
    dataset: DatasetName = None,
    index: Annotated[str, typer.Option(help="Which images: 0:100, :50, 5 or 3,7,9.")] = "0",
    radius: Annotated[
        list[float] | None, typer.Option(help="Radius in pixels; repeat it for several.", show_default=False)
    ] = None,
    encoding: Annotated[str, typer.Option(help="linear, outputs, penalty or l1-penalty.")] = "linear",
    vanilla: Annotated[bool, typer.Option("--vanilla", help="Leave out that pixels are nonnegative.")] = False,
    reference: Annotated[str, typer.Option(help="image, uniform, point:ROW,COLUMN or FILE.npy.")] = "image",
    ground: Ground = "l1",
    penalty_weight: Annotated[
        float | None, typer.Option(help="Weight of the penalty; by default one that is exact.", show_default=False)
    ] = None,
    vnnlib: Annotated[str, typer.Option(help="Version of VNN-LIB, 1.0 or 2.0.")] = "1.0",
    timeout: Annotated[float, typer.Option(help="Seconds for each instance, written to instances.csv.")] = 300.0,
    compress: Annotated[bool, typer.Option("--gzip", help="Compress networks and properties.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    collect: Annotated[
        Path | None, typer.Option(help="Read a results.csv of an outside verifier back as certificates.")
    ] = None,
    split: Split = "test",
    data_dir: DataDir = None,
    layout: Layout = None,
    input_shape: InputShape = None,
    mean: Mean = None,
    std: Std = None,
    output: Output = None,
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Write networks and properties that a verifier which knows nothing of Wasserstein can decide.

    linear is exact for Marabou; outputs is parsed everywhere; penalty needs boxes only; l1-penalty is for tools with an
    L1 ball of their own, such as alpha-beta-CROWN. Exit code 1: some collected verdict is "error"; 2: bad input.
    """
    given = Source(model, layout, input_shape, mean, std, output, weights)
    if collect is not None:
        _collect(given, out, collect, json=json)
        return
    if not radius:
        raise InvalidInputError("radius: given none, expected --radius R, at least once")

    from flowverify.data import parse_index
    from flowverify.export.folder import Layout as FileLayout
    from flowverify.export.folder import Source as Origin
    from flowverify.export.folder import check_target, write_folder
    from flowverify.export.plan import Request

    request = Request(encoding, tuple(radius), not vanilla, reference, ground, penalty_weight)
    file_layout = FileLayout(vnnlib, timeout, compress)
    check_target(out, force)
    network, data = load_inputs(given, dataset, split, data_dir)
    positions = list(parse_index(index, len(data)))
    chosen = data[positions]
    loading = {name: value for name, value in given.settings.items() if name != "model"}
    origin = Origin(model, data.name, split, tuple(positions), loading)
    with progress_bar(quiet=json) as bar:
        task = bar.add_task(f"{model} on {data.name}", total=len(positions) * len(radius))
        manifest = write_folder(
            out,
            network,
            chosen.images,
            chosen.labels,
            request,
            origin,
            file_layout,
            force=force,
            progress=lambda count: bar.advance(task, count),
        )
    if json:
        for instance in manifest["instances"]:
            typer.echo(json_line(instance))
        return
    wrong = manifest["misclassified"]
    typer.echo(
        f"wrote {out}: {len(manifest['instances'])} properties of {len(manifest['networks'])} networks, "
        f"encoding {encoding}" + (f"; {len(wrong)} images are misclassified and left out" if wrong else "")
    )


def _collect(source: Source, folder: Path, results: Path, *, json: bool) -> None:
    from flowverify.ball import distance_name
    from flowverify.export.folder import load_arrays
    from flowverify.export.results import collect
    from flowverify.results import Verdict

    shape = load_arrays(folder)["images"].shape[1:]
    network = source.load((int(shape[0]), int(shape[1]), int(shape[2])))
    found: list[tuple[int, Certificate]] = []
    for index, certificate in collect(network, folder, results):
        found.append((index, certificate))
        if json:
            typer.echo(json_line({"index": index, **certificate.to_json()}))
        else:
            note = f" ({certificate.note})" if certificate.note else ""
            radius = f"radius {certificate.radius:g} pixels ({distance_name(certificate.ground, certificate.cap)})"
            typer.echo(f"image {index}, {radius}: {certificate.verdict}{note}")
        sys.stdout.flush()
    if any(certificate.verdict is Verdict.ERROR for _, certificate in found):
        raise typer.Exit(FAILED)


CONTRACT = "v1"  # of the competition's scripts
RESERVED, RESERVED_SHARE = 1.0, 0.02  # of the time, in seconds and as a share: to start with, and to end in


@user_errors
def vnncomp(
    version: Annotated[str, typer.Argument(help=f"Of the contract: {CONTRACT}.")],
    category: Annotated[str, typer.Argument(help="Of the benchmark; it makes no difference.")],
    onnx: Annotated[Path, typer.Argument(help="A network that was exported, in its folder.")],
    vnnlib: Annotated[Path, typer.Argument(help="A property of it, in its folder.")],
    results: Annotated[Path | None, typer.Argument(help="The file for the answer.", show_default=False)] = None,
    timeout: Annotated[float | None, typer.Argument(help="Seconds.", show_default=False)] = None,
) -> None:
    """Answer a property of an export, by the contract for tools of the competition VNN-COMP.

    The first line of the results file is unsat, sat (then a counterexample follows), unknown, timeout or error. Without
    a results file the instance is looked up, and what takes long to compile is compiled: what prepare_instance.sh does.
    Files that are no instance of an export are unknown. Exit code 0: there is an answer; 1: without a results file, no
    instance of an export; 2: bad input.
    """
    if version != CONTRACT:
        raise InvalidInputError(f"version {version!r}: expected {CONTRACT}")
    if results is None:
        _prepare(onnx, vnnlib)
        return
    if timeout is None or not timeout > 0:
        raise InvalidInputError(f"timeout: given {timeout!r}, expected seconds > 0 after the results file")
    check_writable(results, "results")
    results.write_text("timeout\n", encoding="ascii")  # until there is an answer
    seconds = timeout - min(RESERVED + RESERVED_SHARE * timeout, timeout / 2)
    try:
        with _ended_after(seconds):
            text, note = _answer(onnx, vnnlib, seconds)
    except BaseException:
        results.write_text("error\n", encoding="ascii")
        raise
    results.write_text(text, encoding="ascii")
    typer.echo(text.splitlines()[0] + (f" ({one_line(note)})" if note else ""))


@contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """Ends the process after so many seconds within it, exit code 0, whatever is being computed."""
    lock, done = Lock(), False

    def end() -> None:
        with lock:
            if not done:
                typer.echo("timeout")
                sys.stdout.flush()
                os._exit(0)

    timer = Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()


def _prepare(onnx: Path, vnnlib: Path) -> None:
    from flowverify.export.vnncomp import NotExportedError, identify, prepare

    try:
        question = identify(onnx, vnnlib, _original)
    except NotExportedError as error:
        print_error(one_line(error))
        raise typer.Exit(FAILED) from None
    prepare(question)
    instance, encoding = question.instance, question.export.encoding.name
    typer.echo(f"label {instance.label} within radius {instance.radius:g} pixels, encoding {encoding}")


def _answer(onnx: Path, vnnlib: Path, seconds: float) -> tuple[str, str]:
    """The contents of the results file, and what to say of it."""
    from flowverify.deadline import Deadline
    from flowverify.export.vnncomp import NotExportedError, decide, identify

    deadline = Deadline(seconds)
    try:
        answer = decide(identify(onnx, vnnlib, _original), deadline)
    except NotExportedError as error:
        print_error(one_line(error))
        return "unknown\n", ""
    return answer.text(), answer.note


def _original(folder: Path, manifest: dict[str, Any], shape: tuple[int, int, int]) -> Network:
    """The network that was exported: from where the manifest says, or else a file of that name beside the manifest."""
    name = str(manifest["model"])
    beside = folder / Path(name).name
    given = str(beside) if not Path(name).exists() and beside.is_file() else name
    return Source(given, **manifest.get("loading", {})).load(shape)
