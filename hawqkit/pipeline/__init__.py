"""Where the stages meet: check, probe, allocate, validate, export, report, run. Resolved on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.pipeline.checking import CheckResult, check, print_check
    from hawqkit.pipeline.choosing import allocate_run, choose
    from hawqkit.pipeline.reporting import report_run, show_run
    from hawqkit.pipeline.running import export_run, run, run_probe, validate_run

_HOMES = {
    "CheckResult": "checking",
    "check": "checking",
    "print_check": "checking",
    "allocate_run": "choosing",
    "choose": "choosing",
    "report_run": "reporting",
    "show_run": "reporting",
    "export_run": "running",
    "run": "running",
    "run_probe": "running",
    "validate_run": "running",
}

__all__ = [
    "CheckResult",
    "allocate_run",
    "check",
    "choose",
    "export_run",
    "print_check",
    "report_run",
    "run",
    "run_probe",
    "show_run",
    "validate_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
