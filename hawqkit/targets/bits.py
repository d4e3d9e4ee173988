"""The plain allocation: `bits.json`, for a quantizer that hawqkit does not know.

    {
      "kind": "hawqkit-bits", "schema": 1,
      "model": {"source", "hash"},           what the layers belong to
      "rounding": "searched",                how the figures were made
      "runtime": "transformers",             layers that this runtime fuses share a format
      "budgets": {"average_bits": 4.0},      as asked
      "totals": {"average_bits", "bits_per_weight", "size": {target: bytes}},
                                             "bops" and "latency_ms" where they are known
      "layers": {"model.layers.0.mlp.up_proj": "int4-g64", ...},
      "activations": {                       where a format rounds inputs: how
        "mode": "static", "observer": "mse", "percentile": null, "symmetric": false,
        "layers": {"model.layers.0.mlp.up_proj": {"bits", "low", "high", "scale", "zero"}, ...}
      }
    }

`layers` maps names of modules to names of formats, in the model's order: `int<bits>-<group>` with
group `g32`, `g64`, `g128` (columns that share a scale) or `channel` (one scale a row), `-asym` with
a zero point, and `none`, which keeps the stored dtype. A module that is not named keeps it too.
A name that ends in `-a<bits>`, or `w<bits>a<bits>` (short for `int<bits>-channel-a<bits>`), also
rounds what the module is given: to the values (code - zero) scale, codes 0 to 2^bits - 1, by the
ranges of `activations`; of mode `dynamic` each token has a range of its own features, and none is
listed. Modules that only look up have no input to round and are not listed either.
A schema may gain fields; those that exist keep their meaning.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawqkit.errors import Unsupported
from hawqkit.formats import (
    ACTIVATION_BITS,
    FLOATS,
    GGUFS,
    GROUP_SIZES,
    INTEGER_BITS,
    parse_format,
    with_activations,
)
from hawqkit.records import Allocation, Integers, Layer, ModelFacts
from hawqkit.runtimes import RUNTIMES as PROFILES
from hawqkit.store import to_json
from hawqkit.targets.contract import (
    ALL_KINDS,
    Capabilities,
    IntegerFormats,
    mix_problems,
    require,
)
from hawqkit.targets.folders import published

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

NAME = "bits"
ABOUT = "bits.json: layer name -> format name, for any other quantizer"
RUNTIMES: tuple[str, ...] = tuple(PROFILES)
SIZED = False

FILE = "bits.json"
KIND = "hawqkit-bits"
SCHEMA = 1


def capabilities() -> Capabilities:
    """Return every format: they are names."""
    integers = IntegerFormats(
        INTEGER_BITS, (*GROUP_SIZES, None), (True, False), (None, *ACTIVATION_BITS)
    )
    return Capabilities((integers,), (*FLOATS, *GGUFS), kinds=ALL_KINDS, tied=True)


def problems(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return unknown layers and formats, and formats that do not fit; names can hold all others."""
    return mix_problems(mix, layers)


def size_table(
    layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
) -> tuple[Integers, int]:
    """Refuse: the file holds names, no weights.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(_NO_SIZE)


def size(mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> int:
    """Refuse: the file holds names, no weights.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(_NO_SIZE)


_NO_SIZE = (
    f"target {NAME!r} writes names of formats and no weights, so it has no size: count the bytes "
    "of 'compressed-tensors', or use the budget bits_per_weight."
)


def document(allocation: Allocation, facts: ModelFacts) -> dict[str, Any]:
    """Return the content of `bits.json`; see the module for its fields."""
    taken = dataclasses.asdict(allocation.totals)
    rounding = with_activations(list(allocation.layers.values()))
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "model": {"source": facts.source, "hash": facts.hash},
        "rounding": allocation.rounding,
        "runtime": allocation.runtime,
        "budgets": dict(allocation.budgets),
        "totals": {k: v for k, v in taken.items() if v is not None},
        "layers": dict(allocation.layers),
        **({"activations": _activations(allocation)} if rounding else {}),
    }


def _activations(allocation: Allocation) -> dict[str, Any]:
    """Return how inputs are rounded, with the grid of every layer whose format does so."""
    ranges = allocation.activations
    if ranges is None:
        raise Unsupported(
            f"target {NAME!r}: formats of this mix round the inputs of layers, and no ranges came "
            "with the allocation; read it with its run folder, or make it from sensitivities that "
            "hold them."
        )
    layers = {}
    for name, format_name in allocation.layers.items():
        bits = parse_format(format_name).activation_bits
        if bits is None or name not in ranges.layers:
            continue
        low, high = ranges.layers[name].ranges[bits]
        grid = ranges.grid(name, bits)
        assert grid is not None  # a dynamic one lists no layers
        layers[name] = {
            "bits": bits, "low": low, "high": high, "scale": grid.scale, "zero": grid.zero,
        }  # fmt: skip
    return {
        "mode": ranges.mode,
        "observer": ranges.observer,
        "percentile": ranges.percentile,
        "symmetric": ranges.symmetric,
        "layers": layers,
    }


def write(allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
    """Write `bits.json` into the folder, and return its path; see `contract.Target.write`."""
    return write_from_facts(allocation, folder, model.layers, model.facts)


def write_from_facts(
    allocation: Allocation, folder: Path, layers: Sequence[Layer], facts: ModelFacts
) -> list[Path]:
    """Write `bits.json` where the model itself is not loaded.

    Raises:
        Unsupported: a layer or format is unknown or does not fit, or ranges of inputs are missing;
            nothing is written.
        InputError: the folder holds something else; nothing is changed.
    """
    require(NAME, problems(allocation.layers, layers, facts))
    with published(Path(folder), _is_export) as place:
        text = to_json(document(allocation, facts)) + "\n"
        (place / FILE).write_text(text, encoding="utf-8")
    return [Path(folder) / FILE]


def _is_export(folder: Path) -> bool:
    try:
        content = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND
