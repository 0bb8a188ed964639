"""What docstrings cite of docs/theory.md is there, and nothing cites a page that readers do not have."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("flowverify", "tests", "benchmarks")
FILES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py") if path != Path(__file__))
THEORY = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
SECTIONS = [int(number) for number in re.findall(r"^## (\d+)\. \S", THEORY, re.MULTILINE)]

_CITATION = re.compile(r"\btheory(?:,| \() ?sections? (\d+(?:(?:, | and )\d+)*)", re.IGNORECASE)


def words(path: Path) -> str:
    """The text of a file on one line, as a citation may go on in the next."""
    return " ".join(re.sub(r"^\s*#+ ", " ", path.read_text(encoding="utf-8"), flags=re.MULTILINE).split())


def cited(text: str) -> set[int]:
    return {int(number) for found in _CITATION.findall(text) for number in re.findall(r"\d+", found)}


def test_citations_are_found_in_every_form():
    assert cited("by duality (theory, section 5) and (theory, sections 4, 10 and 13); Theory, section 2") == {
        2,
        4,
        5,
        10,
        13,
    }


def test_sections_are_numbered_without_gaps():
    assert list(range(1, len(SECTIONS) + 1)) == SECTIONS


def test_every_section_cited_exists():
    citations = {str(path.relative_to(ROOT)): cited(words(path)) for path in FILES}
    assert sum(map(bool, citations.values())) > 30
    wrong = {name: numbers - set(SECTIONS) for name, numbers in citations.items() if numbers - set(SECTIONS)}
    assert not wrong


def test_sections_refer_to_sections_of_the_page():
    found = {int(number) for number in re.findall(r"\bsections? (\d+)\b(?!\.\d)", THEORY)}
    assert found <= set(SECTIONS)


@pytest.mark.parametrize("page", [r"\bdesign facts?\b", r"\bdesign,? section\b", r"\bfact F\d", r"\bdesign\.md\b"])
def test_nothing_cites_a_page_that_is_not_here(page):
    assert not [path for path in FILES if re.search(page, words(path), re.IGNORECASE)]


def test_modules_named_by_the_page_exist():
    named = set(re.findall(r"`([\w/]+\.py)`", THEORY))
    known = {path.relative_to(ROOT).as_posix() for path in FILES}
    missing = {name for name in named if not any(path == name or path.endswith(f"/{name}") for path in known)}
    assert len(named) > 20
    assert not missing
