"""One wrong class: certificates and attacks against enumeration, and what is no target."""

import json

import pytest
from contracts import exact_margins, random_network, sparse_images
from torch import nn
from typer.testing import CliRunner

import flowverify as fv
from flowverify.cli import app
from flowverify.errors import InvalidInputError

LAYERS = [nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 3)]


def cases(count):
    """Tiny networks, images that they classify right, and another class of each."""
    for seed in range(count):
        network = random_network((1, 3, 3), LAYERS, seed)
        images = sparse_images((1, 3, 3), 1, seed)
        labels = network(images).argmax(1)
        for target in {0, 1, 2} - {int(labels)}:
            yield network, images, labels, target


def least_margin(network, image, label, target, radius):
    margins = exact_margins(network, image[0], int(label), radius * float(image.sum()))
    return margins[target - (target > int(label))]


def test_the_exact_radius_is_where_the_target_overtakes_the_label():
    smaller = 0
    for network, image, label, target in cases(3):
        options = {"method": "complete", "nodes": 500, "timeout": None}
        found = fv.certify(network, image, label, fv.WassersteinBall(0.2), target=target, **options)
        least = least_margin(network, image, label, target, 0.2)
        assert str(found.verdict) == ("certified" if least > 0 else "falsified")
        assert (found.label, found.prediction) == (int(label), int(label))
        radius = float(fv.certified_radius(network, image, label, bound="crown", target=target)[0])
        if radius > 0:
            assert least_margin(network, image, label, target, radius) > 0
        every = float(fv.certified_radius(network, image, label, bound="crown")[0])
        assert radius >= 0.98 * every
        smaller += radius > 1.02 * every
    assert smaller


def test_attacks_reach_the_target_and_no_nearer_than_certificates():
    reached = 0
    for network, image, label, target in cases(3):
        found = fv.find_adversarial(network, image, label, target=target)
        if found.outcome != ("found",):
            continue
        logits = network(found.images)[0]
        assert logits[target] > logits[int(label)] and int(found.prediction[0]) == target
        radius = float(fv.certified_radius(network, image, label, bound="crown", target=target)[0])
        assert radius <= float(found.radius[0])
        reached += 1
    assert reached > 1


def test_batches_keep_their_order_and_misclassified_images_stay_so():
    model, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:11]
    options = {"bound": "crown", "target": 3}
    ball = fv.WassersteinBall(0.05)
    together = fv.certify_batch(model, data.images, data.labels, ball, **options)
    alone = [fv.certify(model, data.images[row], data.labels[row], ball, **options) for row in range(3)]
    assert [str(one.verdict) for one in together[:3]] == [str(one.verdict) for one in alone]
    assert [one.label for one in together] == data.labels.tolist()
    found = fv.find_adversarial(model, data.images, data.labels, ball, target=3)
    assert found.label.tolist() == data.labels.tolist()
    for row, one in enumerate(together):
        wrong = one.verdict == "misclassified"
        assert wrong == (found.outcome[row] == "misclassified")
        assert one.prediction == (int(model(data.images[row : row + 1]).argmax()) if wrong else one.label)
        assert not (one.verdict == "certified" and found.outcome[row] == "found")


@pytest.mark.parametrize(
    ("target", "message"), [(10, "target 10: expected a class, 0 to 9"), (0, "target 0: is the label of image 0")]
)
def test_what_is_no_target(target, message):
    model, data = fv.load_model("digits-fc3"), fv.load_dataset("digits")[:2]
    with pytest.raises(InvalidInputError, match=message):
        fv.certify_batch(model, data.images, data.labels, fv.WassersteinBall(0.1), bound="ibp", target=target)
    with pytest.raises(InvalidInputError, match=message):
        fv.find_adversarial(model, data.images, data.labels, target=target)


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == code, (done.output, done.exception)
    return done


def test_commands_leave_out_images_of_the_target():
    done = run("verify", "digits-fc3", "--index", "9:12", "--target", 3, "--bound", "ibp", "--json")
    assert "1 of 3 images have the label 3: left out" in done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["index"] for line in lines] == [9, 10] and {line["target"] for line in lines} == {3}
    done = run("attack", "digits-fc3", "--index", "11", "--target", 3, code=2)
    assert done.stderr == "error: target 3: is the label of every image chosen, expected another class\n"


class TestRadiusOfEachImage:
    def test_is_asked_about(self, tmp_path):
        path = tmp_path / "radii.csv"
        path.write_text("index,radius\n2,0.01\n0, 0.3\n\n1 0.01\n")
        for command in (("verify", "digits-fc3", "--bound", "crown"), ("attack", "digits-fc3")):
            done = run(*command, "--index", "0:3", "--radius", path, "--json")
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            assert [line["index"] for line in lines] == [0, 1, 2]
            if command[0] == "verify":
                assert [line["radius"] for line in lines] == [0.3, 0.01, 0.01]
                assert [line["verdict"] for line in lines] == ["unknown", "certified", "certified"]
            else:
                assert [line["outcome"] for line in lines] == ["found", "not found", "not found"]

    def test_may_be_what_a_command_saved(self, tmp_path):
        path = tmp_path / "saved.jsonl"
        options = ("verify", "digits-fc3", "--bound", "ibp", "--index", "0:3")
        run(*options, "--save", path)
        lines = [json.loads(line) for line in run(*options, "--radius", path, "--json").stdout.splitlines()]
        assert [line["verdict"] for line in lines] == ["certified"] * 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("0,0.1\n", "has none for image 1, expected one for each"),
            ("0,0.1\n1,x\n", "line 2 is '1,x', expected INDEX,RADIUS"),
            ("0,0.1\n1,-1\n", "line 2 is '1,-1', expected INDEX,RADIUS"),
            ("0,0.1\n0,0.2\n", "line 2 is the second of image 0, expected one"),
        ],
    )
    def test_bad_files(self, text, message, tmp_path):
        path = tmp_path / "radii.csv"
        path.write_text(text)
        done = run("verify", "digits-fc3", "--index", "0:2", "--radius", path, code=2)
        assert done.stderr.startswith(f"error: radius {path}: ") and message in done.stderr

    def test_neither_a_number_nor_a_file(self):
        done = run("verify", "digits-fc3", "--radius", "absent.csv", code=2)
        assert "expected a number or a file of radii" in done.stderr
