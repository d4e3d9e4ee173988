"""Where the stages meet, from check to report and run; each is imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.pipeline.checking import CheckResult, check, print_check
    from hawqkit.pipeline.choosing import allocate_run, choose
    from hawqkit.pipeline.exporting import export_run
    from hawqkit.pipeline.reporting import report_run, show_run
    from hawqkit.pipeline.running import run, run_probe, validate_run
    from hawqkit.pipeline.spectral import run_spectrum
    from hawqkit.pipeline.tabled import allocate_csv
    from hawqkit.pipeline.tuning import tune_run

_HOMES = {
    "CheckResult": "checking",
    "check": "checking",
    "print_check": "checking",
    "allocate_csv": "tabled",
    "allocate_run": "choosing",
    "choose": "choosing",
    "report_run": "reporting",
    "show_run": "reporting",
    "export_run": "exporting",
    "run": "running",
    "run_probe": "running",
    "run_spectrum": "spectral",
    "tune_run": "tuning",
    "validate_run": "running",
}

__all__ = [
    "CheckResult",
    "allocate_csv",
    "allocate_run",
    "check",
    "choose",
    "export_run",
    "print_check",
    "report_run",
    "run",
    "run_probe",
    "run_spectrum",
    "show_run",
    "tune_run",
    "validate_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
