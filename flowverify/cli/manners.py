"""How commands are called: what is wrong with a call is one line, and nothing in a list of commands is cut short.

A command is a class of typer's, whose newest releases bring a click of their own: nothing of click is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from flowverify.cli.common import BAD_INPUT, INTERRUPTED, one_line, print_error

UsageError: Any = typer.BadParameter.__base__  # of typer's click, whichever it is
SHOWS_HELP = "NoArgsIsHelpError"
UNCUT = 10_000  # letters of a command's first sentence in a list


class Command(TyperCommand):
    """A command that refuses an option which is given twice and counts once, instead of taking the last."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            order = self.make_parser(ctx).parse_args(args=list(args))[2]
            for option in dict.fromkeys(order):
                once = not any(getattr(option, name, False) for name in ("multiple", "is_flag", "count"))
                if option.param_type_name == "option" and once and order.count(option) > 1:
                    name = max(option.opts, key=len)
                    raise UsageError(f"{name}: given {order.count(option)} times, expected once", ctx)
        return super().parse_args(ctx, args)


class Group(TyperGroup):
    """A program of several commands."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each command with the whole first sentence of its help."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, one.get_short_help_str(UNCUT)) for name, one in commands if one is not None and not one.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the program: what is wrong with the call is one line on standard error and exit code 2."""

        def run() -> Any:
            return super(Group, self).main(args, prog_name, complete_var, False, windows_expand_args, **extra)

        if not standalone_mode:
            return run()
        try:
            code = run()
        except UsageError as error:
            if type(error).__name__ == SHOWS_HELP:
                error.show()
            else:
                where = "" if error.ctx is None else f"; see `{error.ctx.command_path} --help`"
                print_error(one_line(error.format_message()).rstrip(".") + where)
            sys.exit(BAD_INPUT)
        except typer.Abort:
            print_error("interrupted")
            sys.exit(INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)
