"""``flowverify smooth predict`` and ``smooth certify``: randomised smoothing, image by image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowverify.cli.common import (
    Command,
    DataDir,
    DatasetName,
    Device,
    Ground,
    Group,
    Index,
    InputShape,
    Json,
    Layout,
    Mean,
    Model,
    Output,
    Save,
    Source,
    Split,
    Std,
    Weights,
    user_errors,
)
from flowverify.cli.job import Job
from flowverify.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from flowverify.data import Dataset
    from flowverify.smoothing import Noise, Splitting

NOISES = {"wasserstein": ("flow", "laplace"), "laplace": ("pixels", "laplace"), "uniform": ("flow", "uniform")}
SPLITTING = "splitting"
TRAINED_WITH = {  # the noise for which a recipe's loss trains
    "wasserstein-noise": "wasserstein",
    "laplace-noise": "laplace",
    "uniform-noise": "uniform",
    "splitting-noise": SPLITTING,
}

smooth = typer.Typer(
    cls=Group,
    help="Randomised smoothing (Levine & Feizi 2020): predictions that may abstain, and certified radii.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NoiseName = Annotated[
    str | None,
    typer.Option(
        "--noise",
        help="wasserstein (Laplace on flows), laplace (on pixels), uniform (on flows) or splitting (certify only); by "
        "default what the shipped model was trained with, or wasserstein.",
    ),
]
Sigma = Annotated[
    float | None,
    typer.Option(help="Standard deviation, of the image's mass; by default what the shipped model was trained with."),
]
Samples = Annotated[int, typer.Option("--n", help="Samples of an image.")]
Alpha = Annotated[float, typer.Option(help="Probability of an error that is accepted, for each image.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Memory = Annotated[int, typer.Option(min=1, help="MiB for noisy images and what the network makes of them.")]


@smooth.command(cls=Command)
@user_errors
def predict(
    model: Model,
    noise: NoiseName = None,
    sigma: Sigma = None,
    n: Samples = 10_000,
    alpha: Alpha = 0.05,
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
    seed: Seed = 0,
    memory: Memory = 256,
    device: Device = "cpu",
    json: Json = False,
    save: Save = None,
) -> None:
    """Classify images by the smoothed classifier, which abstains where its samples do not settle the class."""
    from flowverify.smoothing import SmoothedClassifier, Splitting
    from flowverify.smoothing.classifier import check_predictable

    check_predictable(n, alpha)
    chosen = None if noise == SPLITTING else choose_noise(model, noise, sigma, None, None)
    if chosen is None or isinstance(chosen, Splitting):
        raise InvalidInputError("noise splitting: has no samples to predict from, expected `smooth certify`")
    settings = {"sigma": chosen.sigma, "n": n, "alpha": alpha, "seed": seed, "method": chosen.method}
    source = Source(model, layout, input_shape, mean, std, output, weights)
    job = Job(source, dataset, index, split, data_dir, device, save, json=json)
    classifier = SmoothedClassifier(job.network, chosen, seed=seed, memory=memory * 2**20)

    def work(data: Dataset, positions: list[int], on_samples: Callable[[int], None]) -> Sequence[Any]:
        found = classifier.predict(
            data.images, data.labels, n=n, alpha=alpha, positions=positions, on_samples=on_samples
        )
        return [one.to_json() for one in found]

    records = job.run(work, settings, cost=n)
    if not json:
        columns = ("image", "label", "predicted", "outcome", "top two", "base accuracy")
        job.print_table(records, columns, lambda r: (
            str(r["index"]), str(r["label"]), "" if r["prediction"] is None else str(r["prediction"]), r["outcome"],
            " ".join(map(str, r["counts"])), f"{r['base_accuracy']:.4f}",
        ))  # fmt: skip
        outcomes = Counter(record["outcome"] for record in records)
        base = sum(record["base_accuracy"] for record in records) / max(len(records), 1)
        job.finish(
            f"{outcomes['correct']} of {len(records)} correct; {outcomes['wrong']} wrong; {outcomes['abstained']} "
            f"abstained; base accuracy {base:.4f}"
        )
    job.end()


@smooth.command(cls=Command)
@user_errors
def certify(
    model: Model,
    noise: NoiseName = None,
    sigma: Sigma = None,
    step: Annotated[float | None, typer.Option(help="Of splitting, of the image's mass.")] = None,
    block: Annotated[int | None, typer.Option(help="Of splitting, in pixels.")] = None,
    n0: Annotated[int, typer.Option("--n0", help="Samples that select the class.")] = 1_000,
    n: Samples = 10_000,
    alpha: Alpha = 0.05,
    certificate: Annotated[str, typer.Option(help="tight, or paper.")] = "tight",
    ground: Ground = "l1",
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
    seed: Seed = 0,
    memory: Memory = 256,
    device: Device = "cpu",
    json: Json = False,
    save: Save = None,
) -> None:
    """Certify radii of the smoothed classifier, each right with probability 1 - alpha (with splitting, certain).

    Radii are W1 of normalised images for the ground cost, in pixels (for a power P, W_P).
    """
    from flowverify.ball import distance_name
    from flowverify.smoothing import SmoothedClassifier, SplitClassifier, Splitting
    from flowverify.smoothing.noise import check_alpha, check_certificate, check_samples
    from flowverify.transport.ground import check_ground

    check_samples("n0", n0)
    check_samples("n", n)
    check_alpha(alpha)
    check_ground(ground)
    chosen = choose_noise(model, noise, sigma, step, block)
    if not isinstance(chosen, Splitting):
        check_certificate(certificate, chosen)
    source = Source(model, layout, input_shape, mean, std, output, weights)
    job = Job(source, dataset, index, split, data_dir, device, save, json=json)
    if not isinstance(chosen, Splitting):
        settings: dict[str, Any] = {"sigma": chosen.sigma, "n0": n0, "n": n, "alpha": alpha, "seed": seed}
        settings |= {"bound": certificate, "ground": ground, "method": chosen.method}
        classifier = SmoothedClassifier(job.network, chosen, seed=seed, memory=memory * 2**20)

        def work(data: Dataset, positions: list[int], on_samples: Callable[[int], None]) -> Sequence[Any]:
            found = classifier.certify(
                data.images, data.labels, n0=n0, n=n, alpha=alpha, certificate=certificate, ground=ground,
                positions=positions, on_samples=on_samples,
            )  # fmt: skip
            return [one.to_json() for one in found]
    else:
        settings = {"step": chosen.step, "block": chosen.block, "ground": ground}
        splitter = SplitClassifier(job.network, chosen, memory=memory * 2**20)

        def work(data: Dataset, positions: list[int], on_samples: Callable[[int], None]) -> Sequence[Any]:
            found = splitter.certify(data.images, data.labels, ground=ground)
            on_samples(len(found))
            return [one.to_json() for one in found]

    records = job.run(work, settings, cost=1 if isinstance(chosen, Splitting) else n0 + n)
    if not json:
        name = distance_name(ground)
        columns = ("image", "label", "predicted", "verdict", f"radius (pixels)\n{name}", "probability")
        job.print_table(records, columns, lambda r: (
            str(r["index"]), str(r["label"]), "" if r["prediction"] is None else str(r["prediction"]), r["verdict"],
            f"{r['radius']:.4f}",
            f"{r['probability']:.4f}",
        ))  # fmt: skip
        verdicts = Counter(record["verdict"] for record in records)
        middle = median([record["radius"] for record in records]) if records else 0.0
        sure = "for certain" if isinstance(chosen, Splitting) else f"each with probability {1 - alpha:g}"
        parts = [f"{verdicts.pop('certified', 0)} of {len(records)} certified, {sure}"]
        parts += [f"{count} {verdict}" for verdict, count in sorted(verdicts.items())]
        parts.append(f"median radius {middle:.4f} pixels ({name}; 0 where none is certified)")
        job.finish("; ".join(parts))
    job.end()


def choose_noise(
    model: str, name: str | None, sigma: float | None, step: float | None, block: int | None
) -> Noise | Splitting:
    """The noise that the options name, completed by what a shipped model's card says that it was trained with.

    Raises:
        UnknownNameError: an unknown noise.
        InvalidInputError: a value out of range, one that belongs to another noise, or none where it is needed.
    """
    from flowverify.smoothing import Noise, Splitting
    from flowverify.zoo import load_card

    if name is not None and name not in (*NOISES, SPLITTING):
        raise UnknownNameError("noise", name, (*NOISES, SPLITTING))
    recipe: Mapping[str, Any] = {} if model.endswith(".onnx") else load_card(model).recipe
    trained, options = TRAINED_WITH.get(recipe.get("loss", "")), recipe.get("loss_options", {})
    kind = name or trained or "wasserstein"
    known = options if kind == trained else {}
    if kind == SPLITTING:
        if sigma is not None:
            raise InvalidInputError("sigma: splitting has none, expected --step and --block")
        length = step if step is not None else known.get("step")
        if length is None:
            raise InvalidInputError(f"step: none given, and the card of {model} has none, expected --step")
        size = block if block is not None else int(known.get("block", 4))
        return Splitting(length, size, bool(known.get("scattered", 0)))
    if step is not None or block is not None:
        raise InvalidInputError(f"step, block: given with {kind} noise, expected them with splitting only")
    deviation = sigma if sigma is not None else known.get("sigma")
    if deviation is None:
        raise InvalidInputError(f"sigma: none given, and {model} was trained with no {kind} noise, expected --sigma")
    return Noise(deviation, *NOISES[kind])
