"""Tasks have titles that people read, each another one."""

import pytest

from flowverify.bench.sources import title_of, titles
from flowverify.bench.tasks import Task


def task(name, kind="certify", **settings):
    own = {"model": "folder/net.onnx", "ground": "l1", "radius": None, "cap": None, **settings}
    return Task(name, kind, own, (0,), 1)


@pytest.mark.parametrize(
    ("one", "title", "short"),
    [
        (
            task("certify/net/fine-tuned/crown/l1/search"),
            "net: fine-tuned, crown (W1, l1), largest radius",
            "net: fine-tuned, crown (W1, l1)",
        ),
        (
            task("mine/certify/net/linear/exact/l2^2/references 3/cap 1/radius 0.1", ground="l2^2", cap=1.0),
            "mine, net: linear, exact, references 3 (W2, l2^2, cap 1), radius 0.1",
            "mine, net: linear, exact, references 3 (W2, l2^2, cap 1)",
        ),
        (
            task("attack/net/minimal/l1/effort fast/search", "attack"),
            "net: attack minimal, effort fast (W1, l1), nearest image",
            "net: attack minimal, effort fast (W1, l1)",
        ),
        (Task("script/talk/3", "script", {}, (0,), 1), "script, talk, 3", "script, talk"),
        (task("somebody's own"), "somebody's own", "somebody's own"),
    ],
)
def test_titles(one, title, short):
    assert title_of(one) == title
    assert title_of(one, radius=False) == short


def test_names_that_share_a_title_are_told_apart():
    first, second = task("certify/net/a/l1/search"), task("certify/net/a/l1/search", model="other/net.onnx")
    other = Task("certify/net/l1/a/search", "certify", second.settings, (0,), 1)
    assert titles([first, other]) == {
        "certify/net/a/l1/search": "net: a (W1, l1), largest radius [certify/net/a/l1/search]",
        "certify/net/l1/a/search": "net: a (W1, l1), largest radius [certify/net/l1/a/search]",
    }
