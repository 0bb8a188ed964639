"""Image classifiers that other people have published: are they read, do they agree with onnxruntime, what is certified?

    python -m benchmarks.published_networks --repositories FOLDER [--only PART ...] [--seconds 60]

FOLDER holds clones of the repositories as OWNER+NAME/repo, OWNER/NAME or NAME, bare or not; files are taken from the
commits that are named here. Networks whose files are not there are named with the reason, and nothing is downloaded.

One row a network: how its input was read; the largest difference between its outputs and those of onnxruntime (of the
module itself, where it is one) on 8 test images; how many of the first test images it classifies right; what margins
are lowered by for rounding, as a share of the margin at the image, the median of those (nothing can be certified
where it is 1 or more, and no bound is tried); the seconds of reading; the median certified radius of the first ones
that it classifies right, by the first of the bounds that gives a positive median within the time limit, and the
processor's seconds of its search for each image, without starting the process; the median radius of the nearest
adversarial images that the attack finds for the same ones. Each question is asked in a process of its own, and ended
at the time limit. Refusals are listed below the table.

FACTORIES RUN CODE of the repository that they are from; --no-factories leaves them out.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowverify as fv
from benchmarks.common import header
from flowverify.attack import make_attack
from flowverify.network.graph import Network
from flowverify.network.load import load_network, make_module
from flowverify.network.reading import ORDER_KEPT, Reading
from flowverify.network.rounding import SumsOfTerms, is_steep

BOUNDS = ("ibp", "crown-ibp", "best")
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Repository:
    """A repository of GitHub at one commit."""

    name: str
    commit: str


@dataclass(frozen=True)
class Published:
    """One network: its file in a repository, and the images that it is for.

    Attributes:
        path: an ONNX file, or PATH.py:FACTORY, which gets ``reading.weights`` of the same repository.
        code: the repository of the factory, where it is another one.
    """

    name: str
    repository: Repository
    path: str
    data: str
    reading: Reading = field(default_factory=Reading)
    code: Repository | None = None

    @property
    def files(self) -> list[tuple[Repository, str]]:
        weights = self.reading.weights
        own = [] if weights is None else [(self.repository, weights)]
        return [(self.code or self.repository, self.path.partition(":")[0]), *own]


MARABOU = Repository("NeuralNetworkVerification/Marabou", "def57140fd516fef2ec551032ed52dd1a3f3cdf1")
VNN_2020 = Repository("verivital/vnn-comp", "5d146cb1c0179a97fc75a3521883d6765142f092")
VNN_2021 = Repository("stanleybak/vnncomp2021", "90419aadcf06cf543ce5c1706cae1059dc9fa6cf")
VNN_2022 = Repository("ChristopherBrix/vnncomp2022_benchmarks", "324ce3443917dfcbe765f1832c0d8a0bb1a9ca44")
VNN_2023 = Repository("ChristopherBrix/vnncomp2023_benchmarks", "d9e7b2feeaf534dcc557729ee7c920bd5b97099c")
ONNX_MODELS = Repository("onnx/models", "b1eeaa1ac722dcc1cd1a8284bde34393dab61c3d")
STATEFUL_CNN = Repository("EMCLab-Sinica/Stateful-CNN", "23c1a21c83d0c82cf992ebe4a261946f95f63e2c")
CONVEX = Repository("locuslab/convex_adversarial", "2cd8149249b9e90383af10fc7e9b9fe90166813e")
ABCROWN = Repository("Verified-Intelligence/alpha-beta-CROWN", "8250d5fbd530c76e5e3243db28b3cad5fbaef740")

# What each benchmark subtracts and divides by before its networks, where that is not a part of them.
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
OVAL = Reading(mean=(0.485, 0.456, 0.406), std=(0.225,))
RESNET = Reading(mean=_CIFAR_MEAN, std=(0.2471, 0.2435, 0.2616))
SDP = Reading(mean=(0.4914, 0.4824, 0.4467), std=(0.2471, 0.2435, 0.2616))
ETH_CIFAR = Reading(mean=_CIFAR_MEAN, std=(0.2023, 0.1994, 0.2010))
ETH_MNIST = Reading(mean=(0.1307,), std=(0.3081,))
GREY_LEVELS = Reading(std=(1 / 255,))  # of networks that take 0 to 255
AS_THEY_ARE = Reading()


def _files(
    repository: Repository, prefix: str, folder: str, data: str, names: str, reading: Reading = AS_THEY_ARE
) -> Iterator[Published]:
    for name in names.split():
        path = Path(name)
        yield Published(f"{prefix} {path.name.split('.onnx')[0]}", repository, f"{folder}/{name}", data, reading)


def _made(factory: str, weights: str, data: str, reading: Reading = AS_THEY_ARE) -> Published:
    folder = "complete_verifier"
    made = replace(reading, weights=f"{folder}/models/{weights}")
    return Published(f"abcrown {Path(weights).stem}", ABCROWN, f"{folder}/model_defs.py:{factory}", data, made)


NETWORKS = (
    *_files(
        MARABOU, "marabou", "resources/onnx", "mnist",
        "mnist2x10.onnx mnist2x5_sigmoid.onnx mnist5x20_leaky_relu.onnx softmax-last-layer.onnx test_dropout.onnx "
        "fc2.onnx yizhak_net.onnx robust_model_sigmoid_linear.onnx cnn_max_mninst2.onnx cnn_max_mninst3.onnx "
        "self-attention-mnist-pgd-medium-sim.onnx",
    ),
    *_files(
        MARABOU, "marabou", "resources/onnx/cifar10", "cifar10-sample",
        "cifar_base_kw.onnx cifar_deep_kw.onnx cifar_wide_kw.onnx cifar_base_kw_simp.onnx cifar_deep_kw_simp.onnx "
        "cifar_wide_kw_simp.onnx",
        OVAL,
    ),
    *_files(
        VNN_2020, "vnn20", "2020/CNN/benchmark/mnist/eth", "mnist", "mnist_0.1.onnx mnist_0.3.onnx", ETH_MNIST
    ),
    *_files(
        VNN_2020, "vnn20", "2020/CNN/nnenum/nnenum/cnn/eth/data", "mnist", "mnist_0.1_noscale.onnx"
    ),
    *_files(
        VNN_2020, "vnn20", "2020/CNN/benchmark/cifar/eth", "cifar10-sample", "cifar10_2_255.onnx cifar10_8_255.onnx",
        ETH_CIFAR,
    ),
    *_files(
        VNN_2020, "vnn20", "2020/CNN/nnenum/nnenum/cnn/oval/data", "cifar10-sample", "cifar_base_kw_noscale.onnx"
    ),
    *_files(
        VNN_2020, "vnn20", "2020/NLN/benchmark/mnist", "mnist",
        "sigmoid/logsig_100_100_30_20_onnx.onnx sigmoid/logsig_1024_50_onnx.onnx sigmoid/logsig_1024_onnx.onnx "
        "sigmoid/logsig_200_100_50_onnx.onnx sigmoid/logsig_200_50_onnx.onnx sigmoid/logsig_256_100_50_onnx.onnx "
        "sigmoid/logsig_256_100_onnx.onnx tanh/tansig_200_100_50_onnx.onnx tanh/tansig_200_50_onnx.onnx "
        "tanh/tansig_256_100_50_onnx.onnx tanh/tansig_256_50_onnx.onnx tanh/tansig_256_onnx.onnx",
        GREY_LEVELS,
    ),
    *_files(
        VNN_2021, "vnn21", "benchmarks/mnistfc", "mnist",
        "mnist-net_256x2.onnx mnist-net_256x4.onnx mnist-net_256x6.onnx",
    ),
    *_files(
        VNN_2021, "vnn21", "benchmarks/eran/nets", "mnist", "ffnnSIGMOID__Point_6x200.onnx mnist_relu_9_200.onnx"
    ),
    *_files(VNN_2021, "vnn21", "benchmarks/verivital", "mnist", "Convnet_avgpool.onnx Convnet_maxpool.onnx"),
    *_files(
        VNN_2021, "vnn21", "benchmarks/oval21/nets", "cifar10-sample",
        "cifar_base_kw.onnx cifar_deep_kw.onnx cifar_wide_kw.onnx",
        OVAL,
    ),
    *_files(
        VNN_2021, "vnn21", "benchmarks/cifar2020/nets", "cifar10-sample",
        "cifar10_2_255.onnx cifar10_2_255_simplified.onnx cifar10_8_255.onnx cifar10_8_255_simplified.onnx "
        "convBigRELU__PGD.onnx",
    ),
    *_files(
        VNN_2021, "vnn21", "benchmarks/marabou-cifar10/nets", "cifar10-sample",
        "cifar10_small.onnx cifar10_medium.onnx cifar10_large.onnx",
    ),
    *_files(
        VNN_2021, "vnn21", "benchmarks/cifar10_resnet/onnx", "cifar10-sample", "resnet_2b.onnx resnet_4b.onnx", RESNET
    ),
    *_files(
        VNN_2022, "vnn22", "benchmarks", "cifar10-sample",
        "sri_resnet_a/onnx/resnet_3b2_bn_mixup_adv_4.0_bs128_lr-1.onnx.gz "
        "sri_resnet_b/onnx/resnet_3b2_bn_mixup_ssadv_4.0_bs128_lr-1_v2.onnx.gz",
        ETH_CIFAR,
    ),
    *_files(
        VNN_2023, "vnn23", "benchmarks/vit/onnx", "cifar10-sample", "pgd_2_3_16.onnx.gz ibp_3_3_8.onnx.gz", ETH_CIFAR
    ),
    *_files(
        ONNX_MODELS, "onnx", "validated/vision/classification/mnist/model", "mnist", "mnist-8.onnx mnist-12.onnx"
    ),
    *_files(STATEFUL_CNN, "stateful-cnn", "models", "mnist", "mnist-8.onnx"),
    *_files(STATEFUL_CNN, "stateful-cnn", "models", "cifar10-sample", "squeezenet_cifar10.onnx"),
    Published(
        "convex mnist", CONVEX, "complete_verifier/model_defs.py:mnist_cnn_4layer", "mnist",
        Reading(weights="models/mnist.pth"), ABCROWN,
    ),
    _made("mnist_tiny_mlp", "toy/mnist_2_20.pth", "mnist"),
    _made("mnist_6_100", "eran/mnist_6_100_nat.pth", "mnist"),
    _made("mnist_6_200", "eran/mnist_6_200_nat.pth", "mnist"),
    _made("mnist_9_100", "eran/mnist_9_100_nat.pth", "mnist"),
    _made("mnist_9_200", "eran/mnist_9_200_nat.pth", "mnist"),
    _made("mnist_conv_small", "eran/mnist_conv_small_nat.pth", "mnist", ETH_MNIST),
    _made("mnist_conv_big", "eran/mnist_conv_big_diffai.pth", "mnist", ETH_MNIST),
    _made("mnist_cnn_4layer", "sdp/mnist_cnn_a_adv.model", "mnist"),
    _made("MadryCNN_no_maxpool_tiny", "bab_attack/MadryCNN_no_maxpool_tiny.pt", "mnist"),
    _made("cifar_conv_small", "eran/cifar_conv_small_pgd.pth", "cifar10-sample", ETH_CIFAR),
    _made("cifar_conv_small_sigmoid", "non_relu/cifar_conv_small_sigmoid.pth", "cifar10-sample", ETH_CIFAR),
    _made("cnn_4layer_adv", "sdp/cifar_cnn_a_adv.model", "cifar10-sample", SDP),
    _made("cnn_4layer_adv", "sdp/cifar_cnn_a_adv_alt.model", "cifar10-sample", SDP),
    _made("cnn_4layer_adv4", "sdp/cifar_cnn_a_adv4.model", "cifar10-sample", SDP),
    _made("cnn_4layer", "sdp/cifar_cnn_a_mix.model", "cifar10-sample", SDP),
    _made("cnn_4layer_mix4", "sdp/cifar_cnn_a_mix4.model", "cifar10-sample", SDP),
    _made("cnn_4layer_b", "sdp/cifar_cnn_b_adv.model", "cifar10-sample", SDP),
    _made("resnet2b", "cifar10_resnet/resnet2b.pth", "cifar10-sample", RESNET),
    _made("resnet4b", "cifar10_resnet/resnet4b.pth", "cifar10-sample", RESNET),
)  # fmt: skip


class AbsentError(Exception):
    """A file is not there; the message says why."""


def stored(folder: Path, repository: Repository, path: str) -> bytes:
    """A file of a clone.

    Raises:
        AbsentError: there is no such clone, or the clone does not hold the file.
    """
    owner, _, name = repository.name.partition("/")
    clones = [folder / f"{owner}+{name}" / "repo", folder / owner / name, folder / name]
    clone = next((one for one in clones if one.is_dir()), None)
    if clone is None:
        raise AbsentError(f"no clone of {repository.name}")
    surroundings = {**os.environ, "GIT_NO_LAZY_FETCH": "1"}  # a clone without large files is not completed
    command = ["git", "-C", str(clone), "show", f"{repository.commit}:{path}"]
    found = subprocess.run(command, capture_output=True, env=surroundings, check=False)
    if found.returncode != 0:
        raise AbsentError(f"{path} is not in the clone of {repository.name}")
    if found.stdout.startswith(POINTER):
        raise AbsentError(f"{path} is a pointer of Git LFS in {repository.name}")
    return gzip.decompress(found.stdout) if path.endswith(".gz") else found.stdout


@dataclass(frozen=True)
class Question:
    """What a process of its own is asked about a network whose files lie in a folder."""

    published: Published
    folder: Path

    @property
    def source(self) -> str:
        path, _, factory = self.published.path.partition(":")
        here = str(self.folder / Path(path).name.removesuffix(".gz"))
        return f"{here}:{factory}" if factory else here

    @property
    def reading(self) -> Reading:
        weights = self.published.reading.weights
        return replace(
            self.published.reading, weights=None if weights is None else str(self.folder / Path(weights).name)
        )

    def network(self, images: Tensor) -> Network:
        channels, height, width = images.shape[1:]
        return load_network(self.source, (channels, height, width), self.reading)


def read(question: Question, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Reads, compares, classifies."""
    start = time.perf_counter()
    network = question.network(images)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        logits = network(images)
    right = logits.argmax(1) == labels
    best = logits.double().topk(2).values
    precise = copy.deepcopy(network).double()
    allowance = torch.zeros_like(best[:, 0]) if is_steep(precise) else SumsOfTerms(precise).at(images)
    return {
        "layout": "; ".join(network.notes) or "module",
        "difference": _difference(question, network, images[:8]),
        "right": right.nonzero().flatten().tolist(),
        "rounding": (allowance / (best[:, 0] - best[:, 1])).tolist(),
        "seconds": seconds,
    }


def _difference(question: Question, network: Network, images: Tensor) -> float:
    """The largest difference of outputs, between what was read and the file or module itself."""
    given = question.reading.normalised(images).to(network.dtype)
    with torch.no_grad():
        answers = network(images.to(network.dtype)).double()
        for name, function in ORDER_KEPT.items():
            if any(f"final {name} dropped" in note for note in network.notes):
                answers = function(answers)
        if question.reading.weights is not None:
            expected = make_module(question.source, question.reading.weights).eval()(given)
        else:
            expected = _onnxruntime(question.source, network.notes[0], given)
    return float((expected.double().reshape(answers.shape) - answers).abs().max())


def _onnxruntime(path: str, layout: str, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    sizes = [size if isinstance(size, int) and size > 0 else 1 for size in entry.shape]
    ordered = images.permute(0, 2, 3, 1) if "channels last" in layout else images
    rows = [session.run(None, {entry.name: one.reshape(sizes).numpy()})[0] for one in ordered]
    return torch.from_numpy(np.stack(rows))


def radius(question: Question, images: Tensor, labels: Tensor, bound: str) -> tuple[list[float], float]:
    """Certified radii, and the processor's seconds an image."""
    network = question.network(images)
    start = time.process_time()
    radii: list[float] = fv.certified_radius(network, images, labels, bound=bound).tolist()
    return radii, (time.process_time() - start) / len(images)


def attack(question: Question, images: Tensor, labels: Tensor) -> list[float]:
    """Radii of the nearest adversarial images that are found."""
    found = make_attack("minimal", question.network(images), effort="fast").minimise(images, labels, "l1")
    radii: list[float] = found.radius.tolist()
    return radii


def _serve(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        connection.send(("", function(*arguments)))
    except Exception as error:  # whatever happens is a row of the table
        connection.send((f"{type(error).__name__}: {error}".splitlines()[0], None))


def within(seconds: float, function: Callable[..., Any], *arguments: Any) -> tuple[str, Any]:
    """A function's result in a process of its own, or the reason why there is none: one is empty."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["flowverify.bench.preload"])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else (f"stopped after {seconds:g} s", None)
    except EOFError:
        process.join()
        return f"its process ended with exit code {process.exitcode}", None
    finally:
        process.kill()
        process.join()


def _median(values: list[float]) -> float:
    return float(np.median(values)) if values else float("nan")


def row(question: Question, data: dict[str, fv.Dataset], options: argparse.Namespace) -> tuple[str, list[str]]:
    """The refusal, which is empty where there is none, and the cells of a row after the name."""
    chosen = data[question.published.data][: options.images]
    refusal, found = within(options.seconds, read, question, chosen.images, chosen.labels)
    if found is None:
        return refusal, []
    cells = [
        found["layout"], f"{found['difference']:.1g}", f"{len(found['right'])}/{options.images}",
        f"{_median([found['rounding'][k] for k in found['right']]):.1g}", f"{found['seconds']:.1f}",
    ]  # fmt: skip
    right = chosen[torch.tensor(found["right"][: options.certified], dtype=torch.long)]
    if not options.certified or not len(right):
        return "", [*cells, "", "", "", ""]
    certified, failures, seconds = "", [], ""
    beyond = _median([found["rounding"][k] for k in found["right"][: options.certified]]) >= 1
    if beyond:
        failures.append("none: rounding")
    for bound in () if beyond else options.bounds:
        reason, found = within(options.seconds, radius, question, right.images, right.labels, bound)
        if found is None or _median(found[0]) == 0:
            failures.append(f"{bound}: {reason or 'nothing'}")
        else:
            certified, seconds = f"{_median(found[0]):.2g}", f"{found[1]:.2g}"
            break
    cells += [certified, bound if certified else "; ".join(failures), seconds]
    if options.no_attack:
        return "", [*cells, ""]
    last, radii = within(options.seconds, attack, question, right.images, right.labels)
    attacked = last if radii is None else f"{_median(radii):.2g}"
    return "", [*cells, attacked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repositories", type=Path, default=Path("repositories"), help="a folder of clones")
    parser.add_argument("--only", nargs="+", default=[""], help="networks whose names contain one of these")
    parser.add_argument("--no-factories", action="store_true", help="files only: run nobody's code")
    parser.add_argument("--images", type=int, default=50, help="test images that are classified")
    parser.add_argument("--certified", type=int, default=3, help="how many of those get radii; 0 for none")
    parser.add_argument("--no-attack", action="store_true", help="radii from below only")
    parser.add_argument("--bounds", nargs="+", default=BOUNDS, help="in this order, the first that gives a radius")
    parser.add_argument("--seconds", type=float, default=60.0, help="limit of each question about a network")
    options = parser.parse_args()
    chosen = [
        one
        for one in NETWORKS
        if any(part in one.name for part in options.only) and not (options.no_factories and one.reading.weights)
    ]
    header(f"Published networks: {len(chosen)}")
    data = {name: fv.load_dataset(name) for name in {one.data for one in chosen}}
    print("\n| network | read as | difference | right | rounding | s | certified | bound | s an image | attack |")
    print("| --- " * 10 + "|")
    refused, absent, count = [], [], 0
    for published in chosen:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                for repository, path in published.files:
                    content = stored(options.repositories, repository, path)
                    (folder / Path(path).name.removesuffix(".gz")).write_bytes(content)
            except AbsentError as error:
                absent.append(f"{published.name}: {error}")
                continue
            refusal, cells = row(Question(published, folder), data, options)
        if refusal:
            refused.append(f"{published.name}: {refusal.replace(str(folder) + os.sep, '')}")
            continue
        count += 1
        print(f"| {' | '.join([published.name, *cells])} |", flush=True)
    print(f"\n{count} of {count + len(refused)} networks are read; {len(absent)} are not there.")
    for title, lines in (("Refused", refused), ("Not there", absent)):
        if lines:
            print("\n".join([f"\n{title}:\n", *(f"- {line}" for line in lines)]))


if __name__ == "__main__":
    main()
