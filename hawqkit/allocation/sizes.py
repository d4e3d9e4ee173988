"""What a mix takes: bits, bytes, bit operations, latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from hawqkit.allocation.problem import Problem
from hawqkit.allocation.resources import LATENCY, SizeTable, bit_operations, uncounted
from hawqkit.errors import InputError
from hawqkit.formats import parse_format
from hawqkit.records import Integers, Layer, Totals


def totals(
    layers: Sequence[Layer], mix: Mapping[str, str], size_tables: Sequence[SizeTable] = ()
) -> Totals:
    """Return what a mix takes; `size` holds the true bytes for every table.

    Bit operations are counted where every layer's multiply-accumulates are known.

    Raises:
        InputError: a layer has no format in the mix.
    """
    absent = [layer.name for layer in layers if layer.name not in mix]
    if absent:
        raise InputError(f"the mix has no format for {absent[0]!r}: it must name every layer.")
    codes = stored = operations = 0
    for layer in layers:
        form = parse_format(mix[layer.name])
        codes += layer.numel * form.code_bits(layer.dtype_bits)
        stored += form.total_bits(layer.rows, layer.columns, layer.dtype_bits)
        operations += bit_operations(layer, form)
    entries = sum(layer.numel for layer in layers)
    sizes = {table.target: int(table.exact(mix)) for table in size_tables}
    bops = None if uncounted(layers) else operations
    return Totals(codes / entries, stored / entries, sizes, bops)


def mix_totals(problem: Problem, choice: Integers, size_tables: Sequence[SizeTable] = ()) -> Totals:
    """Return what a choice (G,) takes: `totals`, and its latency where that is a budget."""
    found = totals(problem.layers, problem.mix(choice), size_tables)
    for resource in problem.resources:
        if resource.name == LATENCY:
            found = replace(found, latency_ms=resource.used(choice) / resource.scale)
    return found
