"""The pages of docs/ run as pasted, name what there is, and make a site that needs no network."""

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pasted import HAS_MNIST, ROOT, blocks, commands, on_mnist, run, run_python

import flowverify as fv
from flowverify.bounds.recipes import BOUNDS
from flowverify.registry import ATTACKS, METHODS

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = {
    f"{page}-{number}": block
    for page, text in PAGES.items()
    for number, block in enumerate(blocks(text, "python"))
    if block not in blocks(README, "python") and "pyplot" not in block  # that one has a test of its own
}
COMMANDS = list(dict.fromkeys(line for text in PAGES.values() for line in commands(text)))
SLOW = ("marabou", "train", "milp", "--cap", "--domain flow")  # the same is tested elsewhere, in less time


@pytest.mark.parametrize("name", PYTHON)
def test_python_runs_as_pasted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(PYTHON[name], name)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=page, marks=[pytest.mark.slow] if marked else [])
        for page, text in PAGES.items()
        for marked in (False, True)
        if [line for line in commands(text) if any(word in line for word in SLOW) is marked]
    ],
)
def test_commands_run_as_pasted(text, request, tmp_path, monkeypatch):
    """Those of a page in one folder, as later ones may read what earlier ones wrote."""
    monkeypatch.chdir(tmp_path)
    slow = request.node.get_closest_marker("slow") is not None
    for line in commands(text):
        known = not slow and line in commands(README)
        if not known and any(word in line for word in SLOW) is slow and (HAS_MNIST or not on_mnist(line)):
            run(line)


def test_an_own_network_gets_its_curve_in_a_dozen_lines(tmp_path):
    """Imports, data, network, three lines of training, certification, and the curve."""
    (block,) = [text for text in blocks(PAGES["tutorial/verify.md"], "python") if "pyplot" in text]
    lines = [line for line in block.splitlines() if line]
    assert len(lines) <= 12
    assert len([line for line in lines if "optimiser" not in line and "loss" not in line and "for " not in line]) <= 10
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "50/50" in done.stderr and done.stdout == ""
    assert (tmp_path / "certified-accuracy.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("page", "names"), [("methods/index.md", METHODS), ("bounds.md", BOUNDS), ("attacks.md", ATTACKS)]
)
def test_tables_name_what_there_is(page, names):
    rows = set(re.findall(r"^\| \[?`([\w-]+)`(?:\]\([\w.-]+\))? \|", PAGES[page], re.MULTILINE))
    assert set(names) <= rows


def test_bounds_are_those_of_the_readme():
    """The table of results is on both pages, with the same numbers."""

    def rows(text: str) -> list[str]:
        return [
            line for line in text.splitlines() if re.match(rf"\| `({'|'.join(BOUNDS)})` \| .* \| [0-9.]+ \|$", line)
        ]

    assert len(rows(README)) == len(BOUNDS)
    assert set(rows(README)) <= set(rows(PAGES["bounds.md"]))


def test_the_reference_has_every_public_name():
    named = re.findall(r"^::: flowverify\.(\w+)$", PAGES["reference/api.md"], re.MULTILINE)
    assert sorted([*named, "__version__"]) == sorted(fv.__all__)


class Loaded(html.parser.HTMLParser):
    """What a page makes a browser load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, by a strict build: a link or a reference that leads nowhere fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        parser = Loaded()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.addresses
        assert not [address for address in parser.addresses if re.match(r"(https?:)?//", address)], page


def test_the_site_has_commands_names_and_notebooks(site):
    commands_page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    for text in ("flowverify smooth certify", "--fail-on VERDICT", "-h, --help", "RADIUS&#124;FILE", *METHODS):
        assert text in commands_page
    names_page = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in set(fv.__all__) - {"__version__"}:
        assert f'id="flowverify.{name}"' in names_page
    assert ":func:" not in names_page and ":class:" not in names_page
    assert "certified accuracy" in json.dumps((site / "notebooks" / "own-cnn.html").read_text(encoding="utf-8"))
