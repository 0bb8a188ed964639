"""Runs Marabou on exported files or programs, in a process of its own: it may crash, hang or fill the memory.

Run as a script, without the rest of the package. Every line on standard input is a request, every line on the file
descriptor given as the only argument an answer; both are JSON objects. Marabou itself writes to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

SLACK = 1e-9  # relative: bounds are widened by this much before Marabou gets them


def tighten(query: Any, equations: list[Any], request: dict[str, Any]) -> None:
    """Sets bounds on every value y = c . X + b that is read off the inputs directly.

    The flows are at least ``lower`` (split inputs) and their sum is at most that of ``lower`` plus ``reach``, so
    y <= c . lower + b + reach * max(0, max_k c_k), and likewise from below; for a free flow of l1 norm <= reach
    around the middle of the box, |y - c . middle - b| <= reach * max_k |c_k|. Marabou does not find these by
    itself: it sees the box only.
    """
    from maraboupy import MarabouCore

    lower, upper, flows, reach = request["lower"], request["upper"], request["flows"], request["reach"]
    inputs = {query.inputVariableByIndex(k): k for k in range(len(lower))}
    for equation in equations:
        *terms, (_, value) = equation.addendList
        if equation.EquationType != MarabouCore.Equation.EQ or any(variable not in inputs for _, variable in terms):
            continue
        low = high = -float(equation.scalar)
        largest = smallest = 0.0
        for coefficient, variable in terms:
            c, k = float(coefficient), inputs[variable]
            if k < flows:
                start = lower[k] if request["split"] else (lower[k] + upper[k]) / 2
                low, high = low + c * start, high + c * start
                largest, smallest = max(largest, c), min(smallest, c)
            else:
                low += min(c * lower[k], c * upper[k])
                high += max(c * lower[k], c * upper[k])
        if not request["split"]:
            largest = max(largest, -smallest)
            smallest = -largest
        low, high = low + reach * smallest, high + reach * largest
        slack = SLACK * (1 + abs(low) + abs(high))
        query.setLowerBound(value, max(query.getLowerBound(value), low - slack))
        query.setUpperBound(value, min(query.getUpperBound(value), high + slack))


def set_first_layer(query: Any, equations: list[Any], request: dict[str, Any]) -> None:
    """Sets given bounds on the first layer, whose equations come first; a bias that differs is another layer's."""
    for equation, (bias, low, high) in zip(equations, request["first_layer"], strict=False):
        if abs(float(equation.scalar) + bias) > 1e-5 * (1 + abs(bias)):
            raise ValueError(f"first layer: given a bias of {bias}, the file has {-float(equation.scalar)}")
        value = equation.addendList[-1][1]
        query.setLowerBound(value, max(query.getLowerBound(value), low))
        query.setUpperBound(value, min(query.getUpperBound(value), high))


def program_query(path: str) -> Any:
    """The query of a program (see ``milp.py``); its inputs are marked as such."""
    import numpy as np
    from maraboupy.MarabouNetwork import MarabouNetwork

    network = MarabouNetwork()
    with np.load(path, allow_pickle=False) as arrays:
        data = {name: arrays[name] for name in arrays}
    for low, high in zip(data["lower"].tolist(), data["upper"].tolist(), strict=True):
        variable = network.getNewVariable()
        if low > -np.inf:
            network.setLowerBound(variable, low)
        if high < np.inf:
            network.setUpperBound(variable, high)
    for kind, right, add in (
        ("equations", "right", network.addEquality),
        ("inequalities", "limits", network.addInequality),
    ):
        starts = data[f"{kind}_starts"].tolist()
        for k, constant in enumerate(data[right].tolist()):
            part = slice(starts[k], starts[k + 1])
            add(data[f"{kind}_columns"][part].tolist(), data[f"{kind}_data"][part].tolist(), constant)
    for source, result in data["relus"].tolist():
        network.addRelu(source, result)
    network.inputVars = [np.arange(int(data["inputs"]))]
    network.outputVars = [data["outputs"]]
    return network.getInputQuery()


def file_query(request: dict[str, Any]) -> Any:
    """The query of exported files, with all bounds that are known."""
    from maraboupy import Marabou, MarabouCore

    network = Marabou.read_onnx(request["onnx"])
    for equation in network.equList:  # A is sparse, but its layer is stored in full
        equation.addendList = [term for term in equation.addendList if term[0] != 0]
    query = network.getInputQuery()
    MarabouCore.loadProperty(query, request["vnnlib"])
    tighten(query, network.equList, request)
    set_first_layer(query, network.equList, request)
    return query


def answer(request: dict[str, Any]) -> dict[str, Any]:
    from maraboupy import Marabou, MarabouCore

    query = program_query(request["program"]) if "program" in request else file_query(request)
    options = Marabou.createOptions(
        verbosity=0, timeoutInSeconds=max(1, int(request["timeout"])), tighteningStrategy=request["tightening"]
    )
    start = time.perf_counter()
    result, values, statistics = MarabouCore.solve(query, options, "")
    found: dict[str, Any] = {"result": str(result).lower(), "seconds": time.perf_counter() - start}
    if statistics.hasTimedOut():
        found["result"] = "timeout"
    if found["result"] == "sat":
        found["values"] = [float(values[query.inputVariableByIndex(k)]) for k in range(query.getNumInputVariables())]
    return found


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            try:
                found = answer(json.loads(line))
            except Exception as error:  # handed to the parent, which makes it a verdict
                found = {"result": "error", "message": f"{type(error).__name__}: {error}"}
            sys.stdout.flush()
            answers.write(json.dumps(found) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
