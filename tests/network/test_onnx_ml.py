"""Files of linear classifiers, scalers and pipelines, in the structure in which skl2onnx writes them."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from flowverify.errors import UnsupportedOperationError
from flowverify.network import Network, read_onnx
from flowverify.network.reading import Reading

SHAPE, PIXELS = (1, 4, 5), 20
GENERATOR = np.random.default_rng(0)
WEIGHT, BIAS = GENERATOR.standard_normal((3, PIXELS)).astype(np.float32), np.array([0.1, -0.4, 0.2], np.float32)
IMAGES = torch.from_numpy(GENERATOR.random((60, *SHAPE)).astype(np.float32))
ROWS = IMAGES.flatten(1).numpy()
LOGITS = ROWS @ WEIGHT.T + BIAS
ML = "ai.onnx.ml"
ONES = np.ones(1, np.float32)


def classifier(rows, post, *, source="X", result="p", first=0, **more):
    weight, bias = WEIGHT[first : first + rows], BIAS[first : first + rows]
    options = {"classlabels_ints": list(range(max(rows, 2))), "multi_class": int(rows > 2)} | more
    return helper.make_node(
        "LinearClassifier", [source], [f"label_{result}", result], domain=ML, coefficients=weight.ravel().tolist(),
        intercepts=bias.tolist(), post_transform=post, **options,
    )  # fmt: skip


def learned(kind, source, result, **options):
    return helper.make_node(kind, [source], [result], domain=ML, **options)


def write(folder, nodes, constants=(), zipmap=False, output="p"):
    nodes, scores = list(nodes), helper.make_tensor_value_info("scores", TensorProto.FLOAT, [None, None])
    if zipmap:
        nodes.append(helper.make_node("ZipMap", [output], ["scores"], domain=ML, classlabels_int64s=[0, 1, 2]))
        entries = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        scores = helper.make_value_info("scores", helper.make_sequence_type_proto(entries))
    else:
        nodes.append(helper.make_node("Identity", [output], ["scores"]))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("X", TensorProto.FLOAT, [None, PIXELS])], [scores],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in dict(constants).items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(ML, 1), helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def answers(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"X": ROWS})[0]
    return np.array([list(one.values()) for one in found]) if isinstance(found, list) else found


def check(path, expected) -> Network:
    """The logits are these, and stand in the order of what the file itself answers."""
    network = read_onnx(path, SHAPE)
    logits = network(IMAGES)
    torch.testing.assert_close(logits, torch.from_numpy(np.asarray(expected, np.float32)), rtol=1e-4, atol=1e-5)
    assert logits.argmax(1).tolist() == answers(path).argmax(1).tolist()
    return network


def named(network):
    return [type(node.operation).__name__ for node in network.nodes]


@pytest.mark.parametrize("zipmap", [True, False], ids=["dictionaries", "an array"])
@pytest.mark.parametrize("post", ["NONE", "SOFTMAX", "LOGISTIC"])
def test_linear_classifier(post, zipmap, tmp_path) -> None:
    nodes = [classifier(3, post, result="q"), learned("Normalizer", "q", "p", norm="L1")]
    network = check(write(tmp_path, nodes if post != "NONE" else [classifier(3, post)], zipmap=zipmap), LOGITS)
    assert named(network) == ["Flatten", "Linear"]
    dropped = {"SOFTMAX": "final Softmax dropped", "LOGISTIC": "final Sigmoid dropped"}
    assert post == "NONE" or network.notes[1].startswith(dropped[post])


def test_two_classes_by_one_row_or_two(tmp_path) -> None:
    logit = LOGITS[:, :1]
    check(write(tmp_path, [classifier(1, "LOGISTIC")]), np.concatenate([-logit, logit], 1))
    check(write(tmp_path, [classifier(2, "LOGISTIC")]), LOGITS[:, :2])
    words = {"classlabels_ints": None, "classlabels_strings": ["cat", "dog"]}
    check(write(tmp_path, [classifier(2, "NONE", **words)]), LOGITS[:, :2])


@pytest.mark.parametrize("size", [1, PIXELS])
def test_scaler(size, tmp_path) -> None:
    offset, scale = (GENERATOR.random(size).astype(np.float32) for _ in range(2))
    scaler = learned("Scaler", "X", "s", offset=offset.tolist(), scale=scale.tolist())
    nodes = [scaler, classifier(3, "SOFTMAX", source="s")]
    check(write(tmp_path, nodes), ((ROWS - offset) * scale) @ WEIGHT.T + BIAS)


def test_one_against_the_rest(tmp_path) -> None:
    """Several classifiers of two classes, of which the second columns are put together: their transforms stay."""
    constants = {"one": np.array([1]), "two": np.array([2])}
    nodes = []
    for k in range(3):
        nodes.append(classifier(1, "LOGISTIC", result=f"p{k}", first=k))
        nodes.append(helper.make_node("Slice", [f"p{k}", "one", "two", "one"], [f"q{k}"]))
    nodes += [
        helper.make_node("Concat", ["q0", "q1", "q2"], ["q"], axis=1),
        helper.make_node("LpNormalization", ["q"], ["p"], axis=1, p=1),
    ]
    network = check(write(tmp_path, nodes, constants), 1 / (1 + np.exp(-LOGITS)))
    assert network.notes[-1] == "final division by the L1 norm dropped: the order of classes is the claim"


def test_what_a_classifier_reads_is_no_ending(tmp_path) -> None:
    soft = helper.make_node("Softmax", ["X"], ["s"], axis=1)
    shares = torch.from_numpy(ROWS).softmax(1).numpy()
    check(write(tmp_path, [soft, classifier(3, "SOFTMAX", source="s")]), shares @ WEIGHT.T + BIAS)


MATRIX = {"w": WEIGHT.T, "b": BIAS, "axis": np.array([1]), "unity": ONES, "minus": -ONES, "n": 3 * ONES}
SCORES = [helper.make_node("MatMul", ["X", "w"], ["m"]), helper.make_node("Add", ["m", "b"], ["score"])]
SIGMOIDS = [
    helper.make_node("Mul", ["score", "minus"], ["negated"]), helper.make_node("Exp", ["negated"], ["e"]),
    helper.make_node("Add", ["e", "unity"], ["added"]), helper.make_node("Reciprocal", ["added"], ["proba"]),
]  # fmt: skip
SHARES = [
    helper.make_node("ReduceSum", ["proba", "axis"], ["sum"]),
    helper.make_node("Cast", ["sum"], ["any"], to=TensorProto.BOOL), helper.make_node("Not", ["any"], ["none"]),
    helper.make_node("Cast", ["none"], ["empty"], to=TensorProto.FLOAT),
    helper.make_node("Add", ["proba", "empty"], ["above"]), helper.make_node("Mul", ["empty", "n"], ["mask"]),
    helper.make_node("Add", ["sum", "mask"], ["below"]), helper.make_node("Div", ["above", "below"], ["p"]),
]  # fmt: skip


def test_stochastic_gradient_descent_of_several_classes(tmp_path) -> None:
    network = check(write(tmp_path, [*SCORES, *SIGMOIDS, *SHARES], MATRIX), LOGITS)
    assert "ReLU" not in named(network) and len(network.notes) == 3


def test_modified_huber_scores(tmp_path) -> None:
    clipped = [
        helper.make_node("Clip", ["score", "minus", "unity"], ["c"]), helper.make_node("Add", ["c", "unity"], ["a"]),
        helper.make_node("Div", ["a", "two"], ["proba"]),
    ]  # fmt: skip
    constants = MATRIX | {"two": 2 * ONES, "minus": np.float32(-1), "unity": np.float32(1)}
    network = read_onnx(write(tmp_path, [*SCORES, *clipped, *SHARES], constants), SHAPE)
    torch.testing.assert_close(network(IMAGES), torch.from_numpy((LOGITS.clip(-1, 1) + 1) / 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(UnsupportedOperationError, match=r"operator Cast .*change of precision"):  # it may be negative
        read_onnx(write(tmp_path, [*SCORES, *clipped, *SHARES], constants | {"minus": np.float32(-2)}), SHAPE)


BINARY = {"w": WEIGHT[:1].T, "b": BIAS[:1], "unity": ONES}
PAIR = [
    helper.make_node("Sigmoid", ["score"], ["s"]), helper.make_node("Sub", ["unity", "s"], ["rest"]),
    helper.make_node("Concat", ["rest", "s"], ["p"], axis=1),
]  # fmt: skip


def test_two_classes_by_a_sigmoid_and_what_is_left(tmp_path) -> None:
    logit = LOGITS[:, :1]
    check(write(tmp_path, [*SCORES, *PAIR], BINARY), np.concatenate([-logit, logit], 1))


def test_what_only_looks_like_a_pattern_stays(tmp_path) -> None:
    relu = helper.make_node("Relu", ["score"], ["s"])
    above = np.maximum(LOGITS[:, :1], 0)
    check(write(tmp_path, [*SCORES, relu, *PAIR[1:]], BINARY), np.concatenate([1 - above, above], 1))
    two = {"unity": 2 * ONES}
    share = 1 / (1 + np.exp(-LOGITS[:, :1]))
    check(write(tmp_path, [*SCORES, *PAIR], BINARY | two), np.concatenate([2 - share, share], 1))
    inverse = write(tmp_path, [*SCORES, *SIGMOIDS], MATRIX | two, output="proba")
    assert "Sigmoid" not in named(check(inverse, 1 / (2 + np.exp(-LOGITS))))


REFUSED = {
    "first norm": ([learned("Normalizer", "X", "s", norm="L1"), classifier(3, "NONE", source="s")], "mass"),
    "largest norm": ([classifier(3, "NONE", result="q"), learned("Normalizer", "q", "p", norm="MAX")], "norm of each"),
    "jump": ([learned("Binarizer", "X", "s", threshold=0.5), classifier(3, "NONE", source="s")], "it jumps"),
    "one row": ([classifier(1, "NONE")], "1 - s and s are in another order"),
    "transform": ([classifier(3, "PROBIT")], "post_transform 'PROBIT' is not supported"),
    "unknown": ([learned("Imputer", "X", "p")], "operator Imputer .*is not supported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path) -> None:
    nodes, message = REFUSED[name]
    with pytest.raises(UnsupportedOperationError, match=message):
        read_onnx(write(tmp_path, nodes), SHAPE)


def test_the_class_is_not_an_answer(tmp_path) -> None:
    path = write(tmp_path, [classifier(3, "NONE")])
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("label_p", TensorProto.INT64, [None]))
    onnx.save(model, path)
    with pytest.raises(UnsupportedOperationError, match="output 'label_p' is not supported"):
        read_onnx(path, SHAPE, Reading(output="label_p"))
