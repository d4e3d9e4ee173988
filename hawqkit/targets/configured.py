"""The functions of a target that writes names and settings, made from what is its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hawqkit.errors import Unsupported
from hawqkit.records import Allocation, Integers, Layer, ModelFacts
from hawqkit.targets.configuration import (
    Consumer,
    problems_of,
    range_problems,
    sharing_problems,
    write_all,
)
from hawqkit.targets.contract import Capabilities, require

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

Mix = Mapping[str, str]


def no_problems(mix: Mix, layers: Sequence[Layer], facts: ModelFacts) -> list[str]:
    """Return nothing: the capabilities say all."""
    return []


@dataclass(frozen=True, slots=True)
class Configured:
    """What `contract.Target` asks of a target whose export is the four files of `configuration`.

    A module hands these functions on under their own names:

        _TARGET = Configured(NAME, CONSUMER, capabilities, configuration)
        problems, size_table, size = _TARGET.problems, _TARGET.size_table, _TARGET.size
        write, write_from_facts = _TARGET.write, _TARGET.write_from_facts

    Attributes:
        name: of the target.
        consumer: the words of the note.
        capabilities: what the target holds, whatever the model.
        configuration: (mix, layers, facts) -> file name -> text in the consumer's syntax, matched
            again with the consumer's rule; called with a mix that has no problems.
        own_problems: (mix, layers, facts) -> what `capabilities` cannot say.
    """

    name: str
    consumer: Consumer
    capabilities: Callable[[], Capabilities]
    configuration: Callable[[Mix, Sequence[Layer], ModelFacts], Mapping[str, str]]
    own_problems: Callable[[Mix, Sequence[Layer], ModelFacts], list[str]] = no_problems

    def problems(
        self, mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts
    ) -> list[str]:
        """Return everything that the target cannot hold, each with the layer and what would fit."""
        found = problems_of(mix, layers, facts, self.capabilities())
        return found + self.own_problems(mix, layers, facts)

    def size_table(
        self, layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
    ) -> tuple[Integers, int]:
        """Refuse: the files hold names, no weights.

        Raises:
            Unsupported: always.
        """
        raise self._no_size()

    def size(self, mix: Mapping[str, str], layers: Sequence[Layer], facts: ModelFacts) -> int:
        """Refuse: the files hold names, no weights.

        Raises:
            Unsupported: always.
        """
        raise self._no_size()

    def write(self, allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
        """Write configuration, script and note; see `contract.Target.write`."""
        return self.write_from_facts(allocation, folder, model.layers, model.facts)

    def write_from_facts(
        self, allocation: Allocation, folder: Path, layers: Sequence[Layer], facts: ModelFacts
    ) -> list[Path]:
        """Write configuration, script and note where the model itself is not loaded.

        Raises:
            Unsupported: the target cannot hold the mix; nothing is written.
            InputError: the folder holds something else; nothing is changed.
        """
        mix = allocation.layers
        found = self.problems(mix, layers, facts) + range_problems(allocation)
        require(self.name, found or sharing_problems(mix, allocation.runtime))
        files = self.configuration(mix, layers, facts)
        return write_all(self.name, self.consumer, allocation, folder, layers, facts, files)

    def _no_size(self) -> Unsupported:
        return Unsupported(
            f"target {self.name!r} writes names of formats and no weights, so it has no size: "
            "count the bytes of 'compressed-tensors', or use the budget bits_per_weight."
        )
