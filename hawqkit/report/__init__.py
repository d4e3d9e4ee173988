"""The layer sensitivity report: one HTML file, and the same in short as terminal tables.

Names are resolved on first use: the tables need no matplotlib, and importing this package imports
neither rich nor Jinja2.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.report.html import render_report, write_report, write_spectrum_report
    from hawqkit.report.spectral_tables import spectrum_tables
    from hawqkit.report.tables import (
        agreement_tables,
        cost_table,
        layers_table,
        print_summary,
        result_tables,
        sensitivities_table,
    )
    from hawqkit.report.tuned import tuning_tables

_HOME = {
    "render_report": "html",
    "write_report": "html",
    "write_spectrum_report": "html",
    "spectrum_tables": "spectral_tables",
    "agreement_tables": "tables",
    "cost_table": "tables",
    "layers_table": "tables",
    "print_summary": "tables",
    "result_tables": "tables",
    "sensitivities_table": "tables",
    "tuning_tables": "tuned",
}

__all__ = [
    "agreement_tables",
    "cost_table",
    "layers_table",
    "print_summary",
    "render_report",
    "result_tables",
    "sensitivities_table",
    "spectrum_tables",
    "tuning_tables",
    "write_report",
    "write_spectrum_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
