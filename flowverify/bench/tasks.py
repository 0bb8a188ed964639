"""What a suite is made of: tasks over many images, cut into jobs of a few images each."""

from __future__ import annotations

import base64
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from pydantic import Field

from flowverify.errors import DataError
from flowverify.records import Record as Record
from flowverify.registry import Entry, Registry
from flowverify.settings import Settings, settings

if TYPE_CHECKING:
    import numpy.typing as npt

    from flowverify.bench.sources import Data

Key = tuple[str, int]  # of a record: the name of its task, and the position of its image
WITNESS = "witness"  # of a record on its way to the store, which keeps it elsewhere: the image found, packed


def packed(image: npt.NDArray[Any]) -> str:
    """An image (C, H, W), to the last digit, as text of a length that zeros and float32 numbers add little to."""
    values = np.ascontiguousarray(image, dtype=np.float64)
    planes = np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T)  # like bytes side by side
    shape = "x".join(map(str, values.shape))
    return f"{shape}:{base64.b64encode(zlib.compress(planes.tobytes(), 9)).decode()}"


def unpacked(text: str) -> npt.NDArray[Any]:
    """The image of :func:`packed`, float64 (C, H, W).

    Raises:
        DataError: it is none.
    """
    try:
        head, _, body = text.partition(":")
        planes = np.frombuffer(zlib.decompress(base64.b64decode(body, validate=True)), dtype=np.uint8)
        return np.ascontiguousarray(planes.reshape(8, -1).T).view(np.float64).reshape(*map(int, head.split("x")))
    except (ValueError, zlib.error) as error:
        raise DataError(f"image {text[:20]!r}: is damaged ({error}), expected what a run has kept") from error


@dataclass(frozen=True)
class Context:
    """What every job of a suite shares."""

    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Task:
    """One way of treating one model, over many images.

    Attributes:
        name: unique in its suite, such as ``certify/mnist-fc3/vanilla/crown/l1/search``.
        kind: a name in :data:`flowverify.bench.tasks.KINDS`.
        settings: what the kind needs, as JSON values.
        positions: of the images in the data set, or whatever the kind counts.
        chunk: how many positions are computed together; results may depend on it in the last digits, so it is
            a part of the suite.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    positions: tuple[int, ...]
    chunk: int

    def jobs(self) -> Iterator[Job]:
        for start in range(0, len(self.positions), self.chunk):
            yield Job(self, self.positions[start : start + self.chunk])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Task:
        return Task(**{**values, "positions": tuple(values["positions"])})


@dataclass(frozen=True)
class Job:
    """What a worker computes in one go. ``deaths`` counts the workers that it has been the end of."""

    task: Task
    positions: tuple[int, ...]
    deaths: int = 0

    @property
    def keys(self) -> list[Key]:
        return [(self.task.name, position) for position in self.positions]


@dataclass(frozen=True)
class Defaults:
    """What a run of a suite takes over where it does not say otherwise."""

    models: Sequence[str]
    data: Data | None
    chunk: int
    folder: str  # of the suite file: relative paths start there
    lengths: dict[str, int] = field(default_factory=dict)  # of data sets that were loaded already


class Prepared(ABC):
    """A task that is ready to compute: its model is loaded, and what is compiled or traced once is."""

    @abstractmethod
    def run(self, positions: Sequence[int]) -> list[Record]:
        """One record for each position, in their order."""


@settings
class Run(Settings):
    """What every entry of ``runs`` has; a kind derives its own."""

    kind: str = Field(description="certify, attack, instances, script, or MODULE:CLASS of one's own.")
    label: str = Field("", description="Before the names of the tasks, where two runs would have the same.")


AnyRun = TypeVar("AnyRun", bound=Run)


class Kind(ABC, Generic[AnyRun]):
    """One kind of jobs. ``settings`` is what a run of this kind holds, a class of :mod:`flowverify.settings`."""

    name: ClassVar[str]
    settings: ClassVar[type[Run]]

    @abstractmethod
    def expand(self, run: AnyRun, defaults: Defaults) -> list[Task]:
        """The tasks that a run of a suite stands for; loads no more than it takes to find mistakes.

        Raises:
            SettingError: a value that is not valid, by its key in the run.
            FlowverifyError: anything else that a user can mend.
        """

    @abstractmethod
    def prepare(self, task: Task, context: Context) -> Prepared:
        """Whatever all jobs of the task need, built once by each worker."""


KINDS = Registry(
    "kind",
    {
        "certify": Entry("certificates, or searched radii", "flowverify.bench.kinds:Certify"),
        "attack": Entry("adversarial images", "flowverify.bench.kinds:Attack"),
        "instances": Entry("questions of VNN-COMP", "flowverify.bench.kinds:Instances"),
        "script": Entry("programs of one's own", "flowverify.bench.kinds:Script"),
    },
    base="flowverify.bench.tasks:Kind",
)


def find_kind(name: str) -> Kind[Any]:
    """The kind of this name, or of a user's class ``MODULE:CLASS``, which every worker must be able to import.

    Raises:
        UnknownNameError: no kind has this name.
        InvalidInputError: there is no such class, or it is no :class:`~flowverify.bench.tasks.Kind`.
    """
    kind: Kind[Any] = KINDS.find(name)()
    return kind
