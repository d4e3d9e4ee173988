"""`hawqkit targets`: what each target can hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from hawqkit.targets import Target

EDGE = 1024  # rows and columns of the example layer: every group size divides it


@click.command()
def targets() -> None:
    """List the targets, who reads them, and which formats each can hold."""
    from hawqkit.targets import TARGETS, find_target

    for name in TARGETS:
        target = find_target(name)
        readers = ", ".join(target.RUNTIMES) or "anything that reads JSON"
        sized = "can be limited by budget.size" if target.SIZED else "has no size to limit"
        click.echo(f"{name}: {target.ABOUT}")
        click.echo(f"  read by {readers}; {sized}")
        for line in held_formats(target):
            click.echo(f"  {line}")


def held_formats(target: Target) -> list[str]:
    """Return the formats that a target holds, widths with the same groups on one line."""
    from hawqkit.formats import ACTIVATION_BITS, NONE, format_names

    groups: dict[str, list[str]] = {}
    for name in format_names():
        width, _, group = name.partition("-")
        if name != NONE.name and holds(target, name):
            groups.setdefault(width, []).append(group)
    merged: dict[tuple[str, ...], list[str]] = {}
    for width, variants in groups.items():
        merged.setdefault(tuple(variants), []).append(width)
    lines = [f"{' '.join(widths)}: {' '.join(variants)}" for variants, widths in merged.items()]
    acts = [f"-a{b}" for b in ACTIVATION_BITS if holds(target, f"int8-channel-a{b}")]
    lines.append(f"inputs of layers: {' '.join(acts) or 'not quantized'}")
    return [*lines, NONE.name] if holds(target, NONE.name) else lines


def holds(target: Target, name: str) -> bool:
    """Ask the target itself, with one layer of a Llama that every group size fits."""
    from hawqkit.records import Layer, ModelFacts, Tensor

    layer = Layer("model.layers.0.mlp.down_proj", "linear", EDGE, EDGE, "bfloat16", 0)
    stored = Tensor(f"{layer.name}.weight", layer.dtype, (layer.rows, layer.columns))
    facts = ModelFacts(
        "example",
        "",
        "LlamaForCausalLM",
        layer.numel,
        layer.dtype,
        tensors=(stored,),
        config={"model_type": "llama"},
    )
    return not target.problems({layer.name: name}, [layer], facts)
