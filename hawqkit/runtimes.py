"""Runtime profiles as data: which layers a consumer fuses, so that they must share one format.

A profile is one line in `RUNTIMES`. `fused` lists sets of module names that the runtime loads as
one matrix; members of a set share a format when they have the same parent module.
"""

from __future__ import annotations

from dataclasses import dataclass

from hawqkit.errors import InputError, did_you_mean


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a consumer needs from an allocation.

    Attributes:
        name: the name in a recipe.
        fused: sets of sibling module names that are stored as one matrix.
        about: one sentence for tables.
    """

    name: str
    fused: tuple[frozenset[str], ...]
    about: str


RUNTIMES: dict[str, Runtime] = {
    r.name: r
    for r in (
        Runtime("transformers", (), "every layer by itself"),
        Runtime("onnxruntime", (), "every layer by itself"),
        Runtime(
            "vllm",
            (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"})),
            "q/k/v share a format, gate/up share a format",
        ),
    )
}


def find_runtime(name: str) -> Runtime:
    """Return the profile called `name`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in RUNTIMES:
        raise InputError(
            f"unknown runtime {name!r}: known are {', '.join(sorted(RUNTIMES))}."
            + did_you_mean(name, sorted(RUNTIMES))
        )
    return RUNTIMES[name]


def group_key(layer: str, runtime: str) -> str:
    """Return the key that layers which must share a format in `runtime` have in common.

    >>> group_key("model.layers.3.self_attn.k_proj", "vllm")
    'model.layers.3.self_attn.k_proj+q_proj+v_proj'
    >>> group_key("model.layers.3.self_attn.k_proj", "transformers")
    'model.layers.3.self_attn.k_proj'
    """
    parent, _, leaf = layer.rpartition(".")
    for fused in find_runtime(runtime).fused:
        if leaf in fused:
            return ".".join(filter(None, [parent, "+".join(sorted(fused))]))
    return layer
