"""Writes exports as a folder in the layout of VNN-COMP, whole or not at all.

onnx/           networks, each shared by the instances of one reference (and label, for margins)
vnnlib/         one property for each image and radius
config/         configurations of alpha-beta-CROWN, for l1-penalty
instances.csv   onnx/NAME.onnx,vnnlib/NAME.vnnlib,timeout
manifest.json   what each instance is, with digests of its files
images.npz      images, labels and references, so that answers can be read back without the data set
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flowverify
from flowverify.errors import InvalidInputError
from flowverify.export.encodings import ENCODINGS
from flowverify.export.plan import (
    LOADER,
    LOADER_TEXT,
    VERSIONS,
    Export,
    Instance,
    Request,
    configuration,
    plan,
    write_property,
)
from flowverify.network import Network, onnx_model
from flowverify.network.subject import Subject

MANIFEST, IMAGES, INSTANCES = "manifest.json", "images.npz", "instances.csv"


@dataclass(frozen=True)
class Source:
    """Where network and images come from, for headers and the manifest."""

    model: str
    dataset: str
    split: str
    indices: tuple[int, ...]  # of the images, in the data set
    loading: Mapping[str, str] = field(default_factory=dict)  # what the model's file does not say about itself


@dataclass(frozen=True)
class Layout:
    """How to write: the VNN-LIB version, seconds for each instance, and whether to compress files with gzip.

    Raises:
        InvalidInputError: an unknown version, or a timeout that is not positive.
    """

    version: str = "1.0"
    timeout: float = 300.0
    compress: bool = False

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise InvalidInputError(f"VNN-LIB version {self.version!r}: expected one of {', '.join(VERSIONS)}")
        if not 0 < self.timeout < float("inf"):
            raise InvalidInputError(f"timeout: given {self.timeout!r}, expected seconds > 0")


def model_digest(network: Network) -> str:
    """SHA-256 of the network as ONNX: the same for the same weights and operations."""
    return hashlib.sha256(onnx_model(network).SerializeToString(deterministic=True)).hexdigest()


def check_target(folder: Path, force: bool) -> None:
    """Checks that an export can go to ``folder``.

    Raises:
        InvalidInputError: it is a file, not empty without ``force``, not empty and no export, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"folder {folder}: is a file, expected a folder or a new name")
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise InvalidInputError(f"folder {folder}: is not empty; --force replaces an earlier export")
        if not (folder / MANIFEST).is_file():
            raise InvalidInputError(f"folder {folder}: has no {MANIFEST}, expected an earlier export to replace")
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise InvalidInputError(f"folder {folder}: {parent} is not a folder, expected one that exists")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InvalidInputError(f"folder {folder}: {parent} cannot be written to, expected a writable folder")


def write_folder(
    folder: str | Path,
    network: Network,
    images: Tensor,
    labels: Tensor,
    request: Request,
    source: Source,
    layout: Layout | None = None,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Exports a batch of images (B, C, H, W) and returns the manifest.

    Images that the network misclassifies have nothing to verify: they are listed in the manifest, and no more.

    Args:
        progress: called with the number of instances whenever some are written.

    Raises:
        InvalidInputError: as :func:`check_target`, :class:`~flowverify.export.plan.Request` and
            :func:`~flowverify.export.plan.plan`; or no image is classified right.
        FoldError, UnsupportedOperationError: the network cannot be exported.
    """
    folder, layout = Path(folder), layout or Layout()
    check_target(folder, force)
    subject = Subject(network)
    images, labels = subject.check(images, labels)
    predictions, correct = subject.clean(images, labels)
    chosen = correct.nonzero().flatten()
    if not chosen.numel():
        raise InvalidInputError(f"images: all {len(images)} are misclassified, expected one that can be certified")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    except OSError as error:
        raise InvalidInputError(f"folder {folder}: cannot be written ({error.strerror or error})") from error
    try:
        writer = _Writer(temporary, request, source, layout, [source.indices[k] for k in chosen.tolist()])
        for export in plan(network, images[chosen], labels[chosen], request):
            writer.write(export)
            if progress is not None:
                progress(len(export.instances))
        wrong = [k for k in range(len(images)) if not bool(correct[k])]
        manifest = {
            "flowverify": flowverify.__version__,
            "model": source.model,
            "loading": dict(source.loading),
            "model_sha256": model_digest(network),
            "dataset": source.dataset,
            "split": source.split,
            "request": asdict(request),
            "layout": asdict(layout),
            "networks": writer.networks,
            "instances": writer.instances,
            "misclassified": [
                {"index": source.indices[k], "label": int(labels[k]), "prediction": int(predictions[k])} for k in wrong
            ],
        }
        writer.finish(manifest, images[chosen], labels[chosen])
        os.chmod(temporary, 0o755)
        _put(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def _put(temporary: Path, folder: Path) -> None:
    """Moves the finished folder to its place; an earlier export is removed last."""
    if folder.is_dir() and any(folder.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old)
    else:
        os.replace(temporary, folder)


class _Writer:
    def __init__(self, root: Path, request: Request, source: Source, layout: Layout, indices: list[int]) -> None:
        self.root, self.request, self.source, self.layout = root, request, source, layout
        self.indices = indices
        self.networks: dict[str, Any] = {}
        self.instances: list[dict[str, Any]] = []
        self.references: dict[str, Any] = {}
        self.stem = request.encoding + ("" if request.positivity else "-vanilla")
        for name in ("onnx", "vnnlib"):
            (root / name).mkdir()

    def write(self, export: Export) -> None:
        network = export.network
        position = export.instances[0].position
        name = export.name.replace(f"image{position}", f"image{self.indices[position]}")
        path = f"onnx/{self.stem}_{name}.onnx"
        digest = self._save(path, onnx_model(network.graph).SerializeToString(deterministic=True))
        self.networks[path] = {
            "sha256": digest,
            "mass_inputs": network.inputs.mass_inputs,
            "budget_input": network.inputs.budget_input,
            "allowance": network.allowance,
            "penalty_weight": network.penalty_weight,
        }
        self.references[path] = network.inputs.reference.numpy()
        for instance in export.instances:
            self._write_instance(path, network.penalty_weight, instance)

    def _write_instance(self, onnx: str, penalty_weight: float | None, instance: Instance) -> None:
        index = self.indices[instance.position]
        name = f"{self.stem}_image{index}_radius{instance.radius:g}"
        if any(one["vnnlib"] == f"vnnlib/{name}.vnnlib" for one in self.instances[-len(self.request.radii) :]):
            name = f"{self.stem}_image{index}_radius{instance.radius!r}"
        path = f"vnnlib/{name}.vnnlib"
        text = write_property(instance.property, self._comments(index, penalty_weight, instance), self.layout.version)
        digest = self._save(path, text.encode("ascii"))
        if self.request.encoding == "l1-penalty":
            self._write_configuration(name, onnx, instance)
        self.instances.append(
            {
                "onnx": onnx,
                "vnnlib": path,
                "sha256": digest,
                "index": index,
                "label": instance.label,
                "radius": instance.radius,
            }
        )

    def _write_configuration(self, name: str, onnx: str, instance: Instance) -> None:
        config = self.root / "config"
        if not config.is_dir():
            config.mkdir()
            (config / LOADER).write_text(LOADER_TEXT, encoding="ascii")
        text = configuration(instance.property, f"../{onnx}", instance.budget, self.layout.timeout)
        (config / f"{name}.yaml").write_text(text, encoding="ascii")

    def _comments(self, index: int, penalty_weight: float | None, instance: Instance) -> list[str]:
        request, source = self.request, self.source
        kind = "with positivity" if request.positivity else "vanilla, without positivity"
        lines = [
            f"flowverify {flowverify.__version__}: a misclassified image within W1 (ground cost {request.ground}) of "
            f"{instance.radius!r} pixels?",
            f"{_ascii(source.model)}, {_ascii(source.dataset)} {source.split} image {index}, label {instance.label}, "
            f"reference {_ascii(request.reference)}. unsat: the label is certified.",
            f"Encoding {request.encoding}, {kind}: {ENCODINGS[request.encoding].reader}",
        ]
        if penalty_weight is not None:
            lines.append(f"Penalty weight {penalty_weight!r}: sound for any, exact for the default.")
        return lines

    def finish(self, manifest: dict[str, Any], images: Tensor, labels: Tensor) -> None:
        rows = [f"{one['onnx']},{one['vnnlib']},{self.layout.timeout:g}\n" for one in self.instances]
        (self.root / INSTANCES).write_text("".join(rows), encoding="ascii")
        text = json.dumps(manifest, indent=1)
        (self.root / MANIFEST).write_text(text + "\n", encoding="utf-8")
        arrays = {f"reference:{path}": array for path, array in self.references.items()}
        indices = np.array(self.indices, dtype=np.int64)
        np.savez_compressed(
            self.root / IMAGES, images=images.cpu().numpy(), labels=labels.cpu().numpy(), indices=indices, **arrays
        )

    def _save(self, path: str, data: bytes) -> str:
        """Writes a file, compressed if that is asked for, and returns the digest of its contents."""
        if self.layout.compress:
            (self.root / f"{path}.gz").write_bytes(gzip.compress(data, compresslevel=6, mtime=0))
        else:
            (self.root / path).write_bytes(data)
        return hashlib.sha256(data).hexdigest()


def _ascii(text: str) -> str:
    return " ".join(text.encode("ascii", "replace").decode().split())


def read_contents(folder: Path, path: str) -> bytes:
    """The contents of an exported file, compressed or not.

    Raises:
        InvalidInputError: there is no such file, or it cannot be read.
    """
    try:
        plain, packed = folder / path, folder / f"{path}.gz"
        return plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    except (OSError, EOFError) as error:
        raise InvalidInputError(f"file {folder / path}: cannot be read ({error})") from error


def load_arrays(folder: Path) -> dict[str, Tensor]:
    """The arrays of ``images.npz`` as tensors.

    Raises:
        InvalidInputError: the file cannot be read.
    """
    try:
        with np.load(folder / IMAGES, allow_pickle=False) as bundle:
            return {name: torch.from_numpy(bundle[name]) for name in bundle}
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInputError(f"file {folder / IMAGES}: cannot be read ({error})") from error
