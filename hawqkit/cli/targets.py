"""`hawqkit targets`: what each target can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hawqkit.targets import Target


@click.command()
def targets() -> None:
    """List the targets, who reads them, and which formats and layers each can hold."""
    from hawqkit.errors import InputError
    from hawqkit.targets import find_target, ignored_plugins, target_names

    for name in target_names():
        try:
            target = find_target(name)
        except InputError as error:  # of another package: the others are listed all the same
            click.echo(f"warning: {error}", err=True)
            continue
        readers = ", ".join(target.RUNTIMES) or "anything that reads JSON"
        sized = "can be limited by budget.size" if target.SIZED else "has no size to limit"
        click.echo(f"{name}: {target.ABOUT}")
        click.echo(f"  read by {readers}; {sized}")
        for line in (*held_formats(target), *held_layers(target)):
            click.echo(f"  {line}")
    for sentence in ignored_plugins():
        click.echo(f"warning: {sentence}", err=True)


def held_formats(target: Target) -> list[str]:
    """Return the formats that a target holds, widths with the same groups on one line."""
    from hawqkit.formats import INTEGER, parse_format

    can = target.capabilities()
    groups: dict[str, list[str]] = {}
    others = []
    for name in can.formats():
        format_ = parse_format(name)
        if format_.family != INTEGER:
            others.append(name)
        elif format_.quantizes:
            width, _, group = name.partition("-")
            groups.setdefault(width, []).append(group)
    merged: dict[tuple[str, ...], list[str]] = {}
    for width, variants in groups.items():
        merged.setdefault(tuple(variants), []).append(width)
    lines = [f"{' '.join(widths)}: {' '.join(variants)}" for variants, widths in merged.items()]
    acts = " ".join(f"-a{bits}" for bits in can.activations())
    lines += [" ".join(others)] if others else []
    return [*lines, f"inputs of layers: {acts or 'not quantized'}", "none"]


def held_layers(target: Target) -> list[str]:
    """Return which layers a target quantizes, and what it demands of them."""
    can = target.capabilities()
    demands = [f"layers: {', '.join(can.kinds)}{'' if can.tied else '; none that shares a weight'}"]
    for what, multiple in (("rows", can.rows_multiple), ("columns", can.columns_multiple)):
        if multiple > 1:
            demands.append(f"{what} in multiples of {multiple}")
    if not can.mixed:
        demands.append("all quantized layers in one format")
    if can.shares is not None:
        demands.append(f"layers that runtime {can.shares!r} fuses share a format")
    return ["; ".join(demands)]
