"""Write and show what a run folder holds. No torch."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from hawqkit.pipeline.folder import RunFolder
from hawqkit.report import print_summary, result_tables, write_report, write_spectrum_report


def report_run(folder: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run folder from its records; returns where it lies."""
    run = RunFolder(Path(folder))
    place = Path(output) if output else run.report
    spectrum = run.read_spectrum()
    if spectrum is not None and not run.sensitivities.exists():
        return write_spectrum_report(place, spectrum, run.read_provenance())
    sensitivities = run.read_sensitivities()
    has_allocation = run.allocation.exists()
    exports = run.path / "exports"
    found = sorted(p.name for p in exports.iterdir() if p.is_dir()) if exports.is_dir() else []
    return write_report(
        place,
        sensitivities,
        run.read_allocation() if has_allocation else None,
        run.read_validation(),
        frontier=run.read_frontier(),
        provenance=run.read_provenance(),
        spectrum=spectrum,
        tuning=run.read_tuning(),
        exports={name: str(run.export(name)) for name in found},
    )


def show_run(folder: str | Path, full: bool, console: Console) -> None:
    """Print the tables of a run folder."""
    run = RunFolder(Path(folder))
    spectrum = run.read_spectrum()
    if spectrum is not None and not run.sensitivities.exists():
        print_summary(console, provenance=run.read_provenance(), spectrum=spectrum, full=full)
        return
    print_summary(
        console,
        run.read_sensitivities(),
        run.read_allocation() if run.allocation.exists() else None,
        run.read_validation(),
        run.read_provenance(),
        spectrum=spectrum,
        full=full,
    )


def print_end(folder: RunFolder, console: Console) -> None:
    """Print what a run ends with: the result, what it cost, where things lie, what to try next."""
    for table in result_tables(folder.read_allocation(), folder.read_validation()):
        console.print(table)
    provenance = folder.read_provenance()
    costs = provenance.costs if provenance else {}
    seconds = sum(cost.seconds for cost in costs.values())
    peak = max((cost.peak_memory_bytes for cost in costs.values()), default=0)
    guesses = [c.predicted_seconds for c in costs.values() if c.predicted_seconds is not None]
    known = [c for c in costs.values() if c.predicted_seconds is not None]
    guess_bytes = max((c.predicted_memory_bytes or 0 for c in costs.values()), default=0)
    console.print(f"all stages took {seconds:.0f} s, peak memory {peak / 2**30:.2f} GiB")
    if known:
        actual = sum(c.seconds for c in known)
        memory = f"; peak memory {guess_bytes / 2**30:.2f} GiB" if guess_bytes else ""
        console.print(
            f"of which were predicted: {sum(guesses):.1f} s for what took {actual:.1f} s (probe "
            f"and validation){memory}"
        )
    console.print(f"report:  {folder.report}")
    for path in sorted((folder.path / "exports").glob("*")):
        console.print(f"export:  {path}")
    console.print("try next:")
    console.print(f"  hawqkit show {folder.path} --full")
    console.print(
        f"  hawqkit allocate {folder.path} --budget average_bits=4.5 -o allocation-4.5.json"
    )
    checkpoint = folder.export("compressed-tensors")
    if _classifies(folder):  # the example continues a text, and not every target holds convolutions
        console.print("  hawqkit targets")
    elif checkpoint.is_dir():
        console.print(f"  python examples/load_export.py {checkpoint}")
    else:
        console.print(f"  hawqkit export {folder.path} --target compressed-tensors")


def _classifies(folder: RunFolder) -> bool:
    validation = folder.read_validation()
    return validation is not None and bool(validation.classification)
