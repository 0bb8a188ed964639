"""What a suite is made of: tasks over many images, cut into jobs of a few images each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from flowverify.bench.fields import Fields

Record = dict[str, Any]  # plain JSON values
Key = tuple[str, int]  # of a record: the name of its task, and the position of its image


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
        kind: a name in :data:`flowverify.bench.kinds.KINDS`.
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

    models: list[str]
    data: Mapping[str, Any]
    chunk: int
    folder: str  # of the suite file: relative paths start there
    lengths: dict[str, int] = field(default_factory=dict)  # of data sets that were loaded already


class Prepared(ABC):
    """A task that is ready to compute: its model is loaded, and what is compiled or traced once is."""

    @abstractmethod
    def run(self, positions: Sequence[int]) -> list[Record]:
        """One record for each position, in their order."""


class Kind(ABC):
    """One kind of jobs."""

    name: ClassVar[str]

    @abstractmethod
    def expand(self, fields: Fields, defaults: Defaults) -> list[Task]:
        """The tasks that a run of a suite stands for; loads no more than it takes to find mistakes.

        Raises:
            FlowverifyError: a value that is not valid; the message names the key.
        """

    @abstractmethod
    def prepare(self, task: Task, context: Context) -> Prepared:
        """Whatever all jobs of the task need, built once by each worker."""
