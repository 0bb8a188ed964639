"""Pages of the site that are made of what exists elsewhere, so that they cannot go stale: a hook of mkdocs.

README.md, CONTRIBUTING.md, CHANGELOG.md and benchmarks/README.md become pages with their links turned; the reference of
the command line and the lists of names come from the program itself.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from flowverify.cli import app
from flowverify.cli.lists import LISTS

ROOT = Path(__file__).parents[1]
COPIES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "LICENSE": "license.md",
}
PICTURES = "benchmarks/figures"
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
_ROLE = re.compile(r":(?:func|class|meth|mod|data):<code>(~?)([\w.]+)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in the folder."""
    for source, page in COPIES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        turned = _LINK.sub(lambda found, at=source: _turned(found[1], at), text)
        content = turned if source.endswith(".md") else f"# {source.capitalize()}\n\n```text\n{text}```\n"
        files.append(File.generated(config, page, content=content))
    for picture in sorted((ROOT / PICTURES).iterdir()):
        files.append(File.generated(config, f"figures/{picture.name}", abs_src_path=str(picture)))
    files.append(File.generated(config, "reference/command-line.md", content="\n".join(command_line())))
    return files


def on_page_content(html: str, **_: object) -> str:
    """Names that docstrings mark by roles of Sphinx, without the roles."""
    return _ROLE.sub(lambda found: f"<code>{found[2].rpartition('.')[2] if found[1] else found[2]}</code>", html)


def _turned(link: str, source: str) -> str:
    """Where a link of a file of the repository leads on the site; what is not on it fails the strict build."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if target in COPIES:
        return COPIES[target]
    if target.startswith(PICTURES):
        return "figures/" + posixpath.basename(target)
    return target.removeprefix("docs/")


def command_line() -> Iterator[str]:
    """The lines of the reference of all commands, with what goes by a name."""
    yield from ("# Command line", "", "What `--help` says, of every command.", "")
    yield from _command(typer.main.get_command(app), "flowverify", None)
    yield from ("## Names and their options", "")
    for name, (about, items) in LISTS.items():
        yield from (f"### `flowverify {name}`", "", about, "", "| name | what it is |", "| --- | --- |")
        for item in items():
            options = "".join(
                f"<br>{_code(one if value is None else f'{one}={value}')} {_cell(text)}"
                for one, value, text in item.options
            )
            yield f"| {_code(item.name)} | {_cell(item.description)}{options} |"
        yield ""


def _command(command: Any, name: str, parent: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=name, parent=parent, **command.context_settings)
    path = context.command_path
    yield from (f"{'##' if path.count(' ') < 2 else '###'} `{path}`", "")
    yield from (*(line.strip() for line in (command.help or "").splitlines()), "")
    yield from ("```text", f"{path} {' '.join(command.collect_usage_pieces(context))}", "```", "")
    rows = [record for one in command.get_params(context) if (record := one.get_help_record(context)) is not None]
    yield from ("| | |", "| --- | --- |", *(f"| {_code(names)} | {_cell(text)} |" for names, text in rows), "")
    for below, one in getattr(command, "commands", {}).items():
        if below not in LISTS and not one.hidden:
            yield from _command(one, below, context)


def _code(text: str) -> str:
    return f"<code>{_escaped(text)}</code>"


def _cell(text: str) -> str:
    parts = re.split(r"`+([^`]+)`+", " ".join(text.split()))
    return "".join(_code(part) if number % 2 else _escaped(part) for number, part in enumerate(parts))


def _escaped(text: str) -> str:
    """As html that neither a table nor markdown takes for anything of its own."""
    return re.sub(r"[|*_\[\]`]", lambda found: f"&#{ord(found[0])};", html.escape(text))
