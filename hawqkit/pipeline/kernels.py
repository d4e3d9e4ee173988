"""What a runtime has kernels for, as cells that an allocation may choose from. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawqkit.allocation.problem import Booleans
from hawqkit.errors import InputError
from hawqkit.runtimes import find_runtime, refuse_formats


def kernel_cells(layers: int, formats: Sequence[str], runtime: str) -> Booleans:
    """Return (L, F): False in the columns of formats that a runtime cannot compute with.

    Args:
        layers: L.
        formats: F names.
        runtime: a profile's name.

    Raises:
        InputError: it can compute with none of them; says with which it can.
    """
    wrong = refuse_formats(runtime, formats)
    if wrong is not None:
        raise InputError(wrong)
    runs = [find_runtime(runtime).runs(name) for name in formats]
    return np.tile(np.array(runs, dtype=np.bool_), (layers, 1))


def kernel_warnings(formats: Sequence[str], runtime: str) -> tuple[str, ...]:
    """Return what to say of formats that were measured, and that the runtime cannot run."""
    runnable = find_runtime(runtime).runnable(formats)
    left = [name for name in formats if name not in runnable]
    if not left:
        return ()
    pronoun = "it" if len(left) == 1 else "one of them"
    return (f"no layer was given {pronoun}: runtime {runtime} cannot run {', '.join(left)}.",)
