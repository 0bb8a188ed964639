"""Pictures of certificates: an image, the worst that its ball holds to first order, and the flow between the two."""

from flowverify.figures.cases import Arrow, Change, WorstCase, cases_of, worst_cases
from flowverify.figures.files import (
    PICTURES,
    draw_adversarial,
    draw_worst_cases,
    image_name,
    plot_certificate,
    require_matplotlib,
)

__all__ = [
    "PICTURES",
    "Arrow",
    "Change",
    "WorstCase",
    "cases_of",
    "draw_adversarial",
    "draw_worst_cases",
    "image_name",
    "plot_certificate",
    "require_matplotlib",
    "worst_cases",
]
