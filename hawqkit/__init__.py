"""Measure what each layer of a model loses in fewer bits, and decide who gets how many.

The public names are resolved on first use: `import hawqkit` imports neither torch nor numpy, and
the parts that need no torch never import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.errors import HawqkitError, InputError
    from hawqkit.models.batches import load_batches
    from hawqkit.models.loading import load_model
    from hawqkit.models.model import wrap_model
    from hawqkit.pipeline.surface import allocate, export, validate
    from hawqkit.records import (
        Allocation,
        Frontier,
        Layer,
        Provenance,
        Sensitivities,
        Validation,
    )
    from hawqkit.report.html import write_report
    from hawqkit.sensitivity.probing import probe

__version__ = "0.1.0"

# Public name -> module that defines it. A name must not be that of a room: after the first import
# of the room, `hawqkit.<name>` would be the module.
_HOMES = {
    "Allocation": "hawqkit.records",
    "Frontier": "hawqkit.records",
    "HawqkitError": "hawqkit.errors",
    "InputError": "hawqkit.errors",
    "Layer": "hawqkit.records",
    "Provenance": "hawqkit.records",
    "Sensitivities": "hawqkit.records",
    "Validation": "hawqkit.records",
    "allocate": "hawqkit.pipeline.surface",
    "export": "hawqkit.pipeline.surface",
    "load_batches": "hawqkit.models.batches",
    "load_model": "hawqkit.models.loading",
    "probe": "hawqkit.sensitivity.probing",
    "validate": "hawqkit.pipeline.surface",
    "wrap_model": "hawqkit.models.model",
    "write_report": "hawqkit.report.html",
}

# A literal, because type checkers and linters read it; a test keeps it equal to the table.
__all__ = [
    "Allocation",
    "Frontier",
    "HawqkitError",
    "InputError",
    "Layer",
    "Provenance",
    "Sensitivities",
    "Validation",
    "__version__",
    "allocate",
    "export",
    "load_batches",
    "load_model",
    "probe",
    "validate",
    "wrap_model",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name, on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hawqkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, resolved or not."""
    return sorted({*globals(), *_HOMES})
