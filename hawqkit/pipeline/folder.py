"""A run folder: the names of its files, and reading them back. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hawqkit.errors import InputError
from hawqkit.recipe import Recipe, load_recipe
from hawqkit.records import Allocation, Frontier, Provenance, Sensitivities, Validation
from hawqkit.store import read_record, read_samples, write_record, write_samples


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @classmethod
    def at(cls, path: str | Path) -> RunFolder:
        """Return the run folder at a path."""
        return cls(Path(path))

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def journal(self) -> Path:
        """Folder of the probe's journal."""
        return self.path / "probe"

    @property
    def sensitivities(self) -> Path:
        """The table of scores."""
        return self.path / "sensitivities.json"

    @property
    def samples(self) -> Path:
        """The arrays behind the table."""
        return self.path / "samples.safetensors"

    @property
    def allocation(self) -> Path:
        """The bit configuration."""
        return self.path / "allocation.json"

    @property
    def frontier(self) -> Path:
        """Size against predicted loss."""
        return self.path / "frontier.json"

    @property
    def validation(self) -> Path:
        """What was measured."""
        return self.path / "validation.json"

    @property
    def provenance(self) -> Path:
        """What may differ between equal runs."""
        return self.path / "provenance.json"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"

    def export(self, target: str) -> Path:
        """Folder of one target's files."""
        return self.path / "exports" / target

    def read_recipe(self) -> Recipe:
        """Read the resolved recipe.

        Raises:
            InputError: the folder holds no run.
        """
        if not self.recipe.is_file():
            raise InputError(
                f"{self.path}: no run folder (it has no recipe.yaml); give the folder that "
                "`hawqkit run` or `hawqkit probe` wrote."
            )
        return load_recipe(self.recipe, [])

    def read_sensitivities(self) -> Sensitivities:
        """Read the table with its samples.

        Raises:
            InputError, StateMismatch: they are missing or damaged.
        """
        table = read_record(self.sensitivities, Sensitivities)
        return replace(table, samples=read_samples(self.samples, table.fingerprint))

    def write_sensitivities(self, table: Sensitivities) -> None:
        """Write the samples first, so that a table on disk always has them."""
        write_samples(self.samples, table.samples, table.fingerprint)
        write_record(self.sensitivities, table)

    def read_allocation(self) -> Allocation:
        """Read the bit configuration."""
        return read_record(self.allocation, Allocation)

    def read_frontier(self) -> Frontier | None:
        """Read the frontier, None if there is none."""
        return read_record(self.frontier, Frontier) if self.frontier.exists() else None

    def read_validation(self) -> Validation | None:
        """Read what was measured, None if nothing was."""
        return read_record(self.validation, Validation) if self.validation.exists() else None

    def read_provenance(self) -> Provenance | None:
        """Read the provenance, None if there is none."""
        return read_record(self.provenance, Provenance) if self.provenance.exists() else None
