"""Table 1 of the framework paper: all seven combinations, median radius and time an image.

python -m benchmarks.complete_table [--model digits-fc3] [--images 100] [--seconds 60] [--references 6] [--clock wall]
"""

from __future__ import annotations

import argparse

import flowverify as fv
from benchmarks.common import CLOCKS, header
from flowverify.api import make_certifier
from flowverify.certifiers.base import CLOSED, bracketed, count_closed, ends_of, median_certified, median_upper
from flowverify.certifiers.options import CompleteOptions
from flowverify.errors import InvalidInputError
from flowverify.zoo import load_card

ROWS = (  # feasibility, references, complete certifier; the method's name
    ("no", "no", "no", "vanilla"),
    ("yes", "no", "no", "fine-tuned"),
    ("no", "yes", "no", "vanilla"),
    ("yes", "yes", "no", "fine-tuned"),
    ("no", "no", "yes", "vanilla-complete"),
    ("no", "yes", "yes", "vanilla-complete"),
    ("yes", "no", "yes", "complete"),
    ("yes", "yes", "yes", "complete"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="digits-fc3")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=60.0, help="an image")
    parser.add_argument("--references", type=int, default=6)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    options = parser.parse_args()
    network = fv.load_model(options.model)
    data = fv.load_dataset(load_card(options.model).dataset)
    images, labels = data.images[: options.images], data.labels[: options.images]
    header(
        f"Table 1: {options.model}, first {len(images)} test images, {options.references} references, "
        f"{options.seconds:g} s an image ({options.clock} time); radii: W1, l1, misclassified images count as 0"
    )
    print(
        f"| feasibility | references | complete certifier | method | median radius | at most | s an image | {CLOSED} |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    clock = CLOCKS[options.clock]
    limits = CompleteOptions(timeout=options.seconds, clock=clock)
    for feasible, referenced, complete, method in ROWS:
        start = f"| {feasible} | {referenced} | {complete} | {method} "
        try:
            certifier = make_certifier(
                network,
                method,
                "crown",
                references=options.references if referenced == "yes" else 0,
                pool=data.images,
                options=limits,
            )
        except InvalidInputError as error:
            print(f"{start}| impossible: {error} | | | |")
            continue
        certifier.prepare()
        begin = clock()
        found = certifier.search(images, labels)
        seconds = (clock() - begin) / len(found)
        every = [ends_of(one.to_json()) for one in found]
        right = [ends_of(one.to_json()) for one in found if one.verdict != "misclassified"]
        both = bracketed(right)
        upper, closed = (f"{median_upper(every):.4f}", count_closed(right)) if both else ("", "")
        print(f"{start}| {median_certified(every):.4f} | {upper} | {seconds:.3f} | {closed} |", flush=True)


if __name__ == "__main__":
    main()
