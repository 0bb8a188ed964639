"""What an attack returns for a batch of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowverify.results import Verdict

FOUND, NOT_FOUND, MISCLASSIFIED = "found", "not found", "misclassified"
VERDICTS = {FOUND: Verdict.FALSIFIED, NOT_FOUND: Verdict.UNKNOWN, MISCLASSIFIED: Verdict.MISCLASSIFIED}


@dataclass(frozen=True)
class AttackResult:
    """Adversarial images that passed every check, and what the others failed on.

    The claim, for every image with outcome "found": ``images[k]`` is nonnegative, at most the cap if there is one,
    has the mass of the clean image in every channel to a relative 1e-9, is misclassified by the model strictly, in
    float64 and in its own precision, and ``radius[k]`` is its exact W1 from the clean image, so no certificate of a
    larger radius can hold.

    Attributes:
        images: float64 (B, C, H, W); the clean image where nothing was found.
        radius: float64 (B,), in pixels, of normalised images; 0 where the clean image is misclassified already,
            infinite where nothing was found.
        label, prediction: int64 (B,); the prediction is that of ``images``.
        outcome: "found", "misclassified" (the clean image is) or "not found".
        note: why nothing was found, where there is more to say.
        attack, ground, cap: which attack, under which threat model.
        seconds: wall time of the whole batch.
    """

    images: Tensor
    radius: Tensor
    label: Tensor
    prediction: Tensor
    outcome: tuple[str, ...]
    note: tuple[str, ...]
    attack: str
    ground: str
    cap: float | None
    seconds: float

    @property
    def found(self) -> Tensor:
        """Whether an adversarial image was found (or the clean one is misclassified); bool (B,)."""
        return torch.isfinite(self.radius)

    def __len__(self) -> int:
        return len(self.outcome)

    def to_json(self, index: int) -> dict[str, Any]:
        """One image's outcome as plain JSON values; ``radius`` is null where nothing was found.

        ``verdict`` says the same in the words of certificates: of the radius asked about, or of the one found.
        """
        radius = float(self.radius[index])
        record: dict[str, Any] = {
            "label": int(self.label[index]),
            "prediction": int(self.prediction[index]),
            "attack": self.attack,
            "ground": self.ground,
            "cap": self.cap,
            "outcome": self.outcome[index],
            "verdict": str(VERDICTS[self.outcome[index]]),
            "radius": radius if self.found[index] else None,
            "seconds": round(self.seconds / len(self), 6),
        }
        if self.note[index]:
            record["note"] = self.note[index]
        return record


def join(parts: list[AttackResult]) -> AttackResult:
    """The results of consecutive batches as one."""
    first = parts[0]
    return AttackResult(
        images=torch.cat([part.images for part in parts]),
        radius=torch.cat([part.radius for part in parts]),
        label=torch.cat([part.label for part in parts]),
        prediction=torch.cat([part.prediction for part in parts]),
        outcome=tuple(word for part in parts for word in part.outcome),
        note=tuple(word for part in parts for word in part.note),
        attack=first.attack,
        ground=first.ground,
        cap=first.cap,
        seconds=sum(part.seconds for part in parts),
    )
