"""A run folder: the names of its files, and reading them back. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hawqkit.allocation import BUDGETS
from hawqkit.errors import InputError, StateMismatch
from hawqkit.recipe import Recipe, load_recipe
from hawqkit.records import (
    ActivationRanges,
    Allocation,
    DataFacts,
    Frontier,
    Provenance,
    Sensitivities,
    Spectrum,
    Tuning,
    Validation,
)
from hawqkit.sensitivity.confidence import MAX_PREDICTED_KL
from hawqkit.store import (
    read_densities,
    read_record,
    read_samples,
    write_densities,
    write_record,
    write_samples,
)

IMPORTED = "imported: "  # how the description of a mix begins that others made


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
    def curvature_journal(self) -> Path:
        """Folder of the journals of the true Hessian's scores, one folder a score."""
        return self.path / "curvature"

    @property
    def activations(self) -> Path:
        """The ranges of the layers' inputs, where a format rounds them."""
        return self.path / "activations.json"

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
    def spectrum(self) -> Path:
        """Density, top eigenvalues, rank and degeneracy."""
        return self.path / "spectrum.json"

    @property
    def tridiagonals(self) -> Path:
        """The arrays behind the spectrum."""
        return self.path / "spectrum.safetensors"

    @property
    def spectrum_journal(self) -> Path:
        """Folder of the spectrum's journal, with every block's eigenvectors."""
        return self.path / "spectrum"

    @property
    def tuning(self) -> Path:
        """Folder of the tuned model, its record and its checkpoints."""
        return self.path / "tuning"

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
        return replace(
            table,
            samples=read_samples(self.samples, table.fingerprint),
            activations=self._read_activations(table.activations_fingerprint),
        )

    def read_data(self) -> DataFacts:
        """Read what the sensitivities were measured on.

        Raises:
            InputError, StateMismatch: the table is missing or damaged.
        """
        return read_record(self.sensitivities, Sensitivities).data

    def _read_activations(self, wanted: str) -> ActivationRanges | None:
        """Read the ranges with a fingerprint, None if none are wanted.

        Raises:
            StateMismatch: they are missing, damaged or others.
        """
        if not wanted:
            return None
        if not self.activations.is_file():
            raise StateMismatch(
                f"{self.activations}: no such file, and the sensitivities were measured with its "
                "ranges; restore it, or run the probe again."
            )
        found = read_record(self.activations, ActivationRanges)
        if found.fingerprint != wanted:
            raise StateMismatch(
                f"{self.activations}: are other ranges than those that the sensitivities were "
                "measured with; restore the file or run the probe again in another folder."
            )
        return found

    def write_sensitivities(self, table: Sensitivities) -> None:
        """Write samples and ranges first, so that a table on disk always has them."""
        if table.activations is not None:
            write_record(self.activations, table.activations)
        write_samples(self.samples, table.samples, table.fingerprint)
        write_record(self.sensitivities, table)

    def read_allocation(self) -> Allocation:
        """Read the bit configuration.

        Raises:
            InputError: it is missing.
            StateMismatch: it is damaged, or not of this folder's sensitivities.
        """
        allocation = read_record(self.allocation, Allocation)
        if self.sensitivities.exists():
            table = read_record(self.sensitivities, Sensitivities)
            self._refuse_foreign(allocation, table)
            ranges = self._read_activations(table.activations_fingerprint)
            allocation = replace(allocation, activations=ranges)
        return allocation

    def _refuse_foreign(self, allocation: Allocation, table: Sensitivities) -> None:
        advice = f"restore the file, or run `hawqkit allocate {self.path}`."
        if allocation.sensitivities != table.fingerprint:
            raise StateMismatch(
                f"{self.allocation}: was chosen from other sensitivities than those beside it; "
                f"{advice}"
            )
        known = (*BUDGETS, MAX_PREDICTED_KL)
        odd = [f"{k} = {v:g}" for k, v in allocation.budgets.items() if k not in known or v <= 0]
        if odd:
            raise StateMismatch(f"{self.allocation}: has the budget {odd[0]}; {advice}")
        names = {layer.name for layer in table.layers}
        others = [baseline.layers for baseline in allocation.baselines]
        others += [allocation.other_risk.mix.layers] if allocation.other_risk else []
        foreign = [m.layers for m in allocation.baselines if m.about.startswith(IMPORTED)]
        for mix in (allocation.layers, *others):
            odd = sorted(names ^ set(mix))
            if odd:
                problem = "lacks" if odd[0] in names else "names a layer that is not measured:"
                raise StateMismatch(f"{self.allocation}: a mix {problem} {odd[0]}; {advice}")
            unknown = sorted(set(mix.values()) - set(table.formats)) if mix not in foreign else []
            if unknown:
                raise StateMismatch(
                    f"{self.allocation}: a mix has the format {unknown[0]!r}, and the "
                    f"sensitivities know {', '.join(table.formats)}; {advice}"
                )

    def read_frontier(self) -> Frontier | None:
        """Read the frontier, None if there is none."""
        return read_record(self.frontier, Frontier) if self.frontier.exists() else None

    def read_spectrum(self) -> Spectrum | None:
        """Read the spectrum with its tridiagonals, None if there is none.

        Raises:
            InputError, StateMismatch: the tridiagonals are missing, damaged, or of another run.
        """
        if not self.spectrum.exists():
            return None
        found = read_record(self.spectrum, Spectrum)
        densities = read_densities(self.tridiagonals, found.fingerprint)
        odd = {block.name for block in found.everything} ^ set(densities)
        if odd:
            raise StateMismatch(
                f"{self.tridiagonals}: does not hold the tridiagonals of the blocks of "
                f"{self.spectrum.name}: {sorted(odd)[0]!r}; run `hawqkit spectrum` again."
            )
        return replace(found, densities=densities)

    def write_spectrum(self, spectrum: Spectrum) -> None:
        """Write the tridiagonals first, so that a record on disk always has them."""
        write_densities(self.tridiagonals, spectrum.densities, spectrum.fingerprint)
        write_record(self.spectrum, spectrum)

    def read_validation(self) -> Validation | None:
        """Read what was measured, None if nothing was."""
        if not self.validation.exists():
            return None
        found = read_record(self.validation, Validation)
        texts = set(found.texts)
        names = {m.name for m in found.mixes}
        apart = any(set(c.mixes) != names for c in found.classification.values())
        odd = any(set(m.measured) != texts for m in found.mixes)
        if not names or not texts or odd or apart or not set(found.classification) <= texts:
            raise StateMismatch(
                f"{self.validation}: does not hold every mix on all data; restore the file, or "
                f"run `hawqkit validate {self.path}`."
            )
        return found

    def read_tuning(self) -> Tuning | None:
        """Read how the mix was tuned, None if it was not, or not to the end."""
        path = self.tuning / "tuning.json"
        return read_record(path, Tuning) if path.exists() else None

    def read_provenance(self) -> Provenance | None:
        """Read the provenance, None if there is none."""
        return read_record(self.provenance, Provenance) if self.provenance.exists() else None
