"""``flowverify doctor``: what is installed, what works, and what to install."""

from __future__ import annotations

import dataclasses

import typer

from flowverify import __version__
from flowverify.cli.options import Json
from flowverify.cli.report import FAILED, json_line, user_errors


@user_errors
def doctor(json: Json = False) -> None:
    """Check the installation; exit code 1 if certification cannot work."""
    from flowverify.doctor import Status, examine

    findings = examine()
    failed = [finding for finding in findings if finding.status is Status.FAILED]
    if json:
        for finding in findings:
            typer.echo(json_line(dataclasses.asdict(finding)))
    else:
        typer.echo(f"flowverify {__version__}")
        for finding in findings:
            typer.echo(f"{finding.status:<7} {finding.name:<12} {finding.detail}")
            if finding.advice:
                typer.echo(f"{'':<20} to mend it: {finding.advice}")
        typer.echo(f"certification cannot work: {len(failed)} checks failed" if failed else "certification works")
    if failed:
        raise typer.Exit(FAILED)
