"""What the kinds of jobs over images share: models, images, ground costs and radii, and the names of their tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WrapValidator

from flowverify.bench import sources
from flowverify.bench.tasks import Defaults, Run, Task
from flowverify.errors import FlowverifyError
from flowverify.settings import (
    Number,
    Positive,
    PositiveNumber,
    SettingError,
    expected,
    settings,
    several,
    unexpected,
    wrong,
)
from flowverify.transport.ground import check_ground


def _ground(name: str) -> str:
    try:
        return check_ground(name)
    except FlowverifyError as error:
        raise unexpected(f"the name of a ground cost ({error})") from error


Ground = Annotated[str, AfterValidator(_ground), expected("the name of a ground cost")]
_SEVERAL_RADII = several(Number)


def _radii(value: Any, handler: Callable[[Any], list[float]]) -> list[float]:
    return [] if value == "search" else _SEVERAL_RADII.func(value, handler)  # type: ignore[call-arg, arg-type]


@settings
class ImageRun(Run):
    """Every model x way x ground cost x radius, over the same images; the kind says what ways there are."""

    models: sources.Models | None = Field(
        None, description="Shipped models, or ONNX files relative to the suite; by default the suite's."
    )
    data: sources.Data | None = Field(None, description="By default the suite's.")
    grounds: Annotated[list[Ground], several(Ground)] = Field(
        ["l1"], description="Ground costs: l1, l2, local:5, or powers such as l2^2."
    )
    radii: Annotated[
        list[Number],
        WrapValidator(_radii, json_schema_input_type=Literal["search"] | Number | list[Number]),
    ] = Field([], description="In pixels on normalised images, or search, the default: each image has its own.")
    cap: PositiveNumber | None = Field(None, description="The largest value of a pixel; none by default.")
    chunk: Positive | None = Field(None, description="Images computed together; by default the suite's.")

    def tasks(
        self, ways: Sequence[tuple[Sequence[str], Mapping[str, Any], Sequence[str]]], defaults: Defaults
    ) -> Iterator[Task]:
        """One task for each model, way, ground cost and radius.

        Args:
            ways: what the task's name has before the ground cost, its own settings, and what its name has after it.

        Raises:
            SettingError: no model or no images are given, or images that the data set does not have.
        """
        models, data = self.models or defaults.models, self.data or defaults.data
        if not models:
            raise wrong("models", [], "one or more, here or in the suite")
        if data is None:
            raise SettingError("data", "missing, expected this key here or in the suite")
        positions = sources.positions_of(data, defaults)
        radii: Sequence[float | None] = self.radii or [None]
        for model, (before, own, after), ground, radius in itertools.product(models, ways, self.grounds, radii):
            last = "search" if radius is None else f"radius {radius:g}"
            name = "/".join(filter(None, [self.label, self.kind, sources.short(model), *before, ground, *after, last]))
            settings = {
                "model": model,
                "sha256": sources.digest(model),
                "data": asdict(data),
                "ground": ground,
                "radius": radius,
                "cap": self.cap,
                **own,
            }
            yield Task(name, self.kind, settings, positions, self.chunk or defaults.chunk)
