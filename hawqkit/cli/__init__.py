"""The command line: one file a subcommand, loaded when it is called, so that help is instant."""

from __future__ import annotations

import click

from hawqkit import __version__
from hawqkit.cli.group import CommandGroup

COMMANDS = {
    "run": ("hawqkit.cli.run:run", "Do everything that a recipe says."),
    "check": ("hawqkit.cli.check:check", "Say what a run would do and cost; write nothing."),
    "probe": ("hawqkit.cli.probe:probe", "Measure the sensitivities of a recipe's model."),
    "spectrum": ("hawqkit.cli.spectrum:spectrum", "Measure eigenvalues, rank and degeneracy."),
    "allocate": ("hawqkit.cli.allocate:allocate", "Choose again from a run (needs no torch)."),
    "latency": ("hawqkit.cli.latency:latency", "Time a model's layers on this machine."),
    "tune": ("hawqkit.cli.tune:tune", "Train a run's model in the formats that were allocated."),
    "validate": ("hawqkit.cli.validate:validate", "Measure a run's allocation on held-out data."),
    "export": ("hawqkit.cli.export:export", "Write a run's allocation for a quantizer."),
    "import": ("hawqkit.cli.importing:import_", "Set somebody else's mix beside a run's own."),
    "report": ("hawqkit.cli.report:report", "Write a run's report (needs no torch)."),
    "show": ("hawqkit.cli.show:show", "Show a run as tables (needs no torch)."),
    "formats": ("hawqkit.cli.formats:formats", "List the number formats and what they take."),
    "targets": ("hawqkit.cli.targets:targets", "List the targets and what each can hold."),
    "recipes": ("hawqkit.cli.recipes:recipes", "List or print the shipped recipes."),
}


@click.group(
    cls=CommandGroup,
    commands_table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hawqkit")
@click.option("--debug", is_flag=True, help="Show the traceback of every error.")
def cli(debug: bool) -> None:
    """Measure what each layer of a model loses in fewer bits, and decide who gets how many.

    Begin with `hawqkit run quickstart`, or look first: `hawqkit check quickstart`.

    Exit codes: 0 done, 1 failed (no network, no disk), 2 the input is wrong, 130 interrupted.
    """


def main() -> None:
    """Run the command line and leave with its exit code."""
    cli(prog_name="hawqkit")
