"""Measure what each layer of a model loses in fewer bits, and decide who gets how many.

The public names are resolved on first use: `import hawqkit` imports neither torch nor numpy, and the
parts that need no torch never import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.errors import HawqkitError as HawqkitError
    from hawqkit.errors import InputError as InputError

__version__ = "0.1.0"

# Public name -> module that defines it. A name must not be that of a room: after the first import of
# the room, `hawqkit.<name>` would be the module.
_NAMES = {
    "load_model": "hawqkit.models.loading",
    "wrap_model": "hawqkit.models.loading",
    "load_batches": "hawqkit.models.batches",
    "probe": "hawqkit.sensitivity.probing",
    "allocate": "hawqkit.pipeline",
    "validate": "hawqkit.pipeline",
    "export": "hawqkit.pipeline",
    "write_report": "hawqkit.report.html",
    **dict.fromkeys(("HawqkitError", "InputError"), "hawqkit.errors"),
    **dict.fromkeys(
        ("Allocation", "Frontier", "Layer", "Provenance", "Sensitivities", "Validation"),
        "hawqkit.records",
    ),
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name, on first use."""
    if name not in _NAMES:
        raise AttributeError(f"module 'hawqkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, resolved or not."""
    return sorted({*globals(), *_NAMES})
