"""The group of subcommands: loaded lazily, every expected failure told in words and a code."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from hawqkit.cli.failures import INTERRUPTED, explain_failure
from hawqkit.errors import did_you_mean


class CommandGroup(click.Group):
    """Subcommands from a table: name -> ("module:attribute", line of help).

    Help is written from the table alone; a module is imported when its command is called.
    """

    def __init__(self, *args: Any, commands_table: dict[str, tuple[str, str]], **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.table = commands_table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in self.table:
            return None
        module, _, attribute = self.table[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first argument, or name the nearest one."""
        if args and not args[0].startswith("-") and args[0] not in self.table:
            ctx.fail(
                f"unknown command {args[0]!r}; known: {', '.join(self.table)}."
                + did_you_mean(args[0], list(self.table))
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in self.table.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; what is expected to fail ends in a message and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if ctx.params.get("debug"):
                raise
            click.echo(
                "\ninterrupted; the run folder keeps what is done; run the same command to go on",
                err=True,
            )
            ctx.exit(INTERRUPTED)
        except Exception as error:
            failure = None if ctx.params.get("debug") else explain_failure(error)
            if failure is None:
                raise
            message, code = failure
            click.echo(message, err=True)
            ctx.exit(code)
