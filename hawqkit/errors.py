"""Every exception that hawqkit raises on purpose, and the exit code that each one means."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class HawqkitError(Exception):
    """What is nobody's mistake failed: no network, no disk, a killed peer (exit code 1)."""

    exit_code = 1


class InputError(HawqkitError):
    """The input is wrong; the message says what came, why it is wrong, what to do (exit code 2)."""

    exit_code = 2


class FileError(InputError):
    """A file has problems; `problems` holds one complete message for each of them."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {p}" for p in self.problems)]))


class RecipeError(FileError):
    """A recipe has problems, or options that stand for a part of one."""


class TableError(FileError):
    """A CSV table has problems."""


class Unsupported(InputError):
    """What was asked cannot be done with this model, format or target."""


class BudgetError(InputError):
    """No allocation can meet the budget; the message says the smallest and largest there are."""


class DataError(InputError):
    """Calibration or held-out data is missing, empty, or too short."""


class NumericalError(InputError):
    """A number is not finite: weights, activations or gradients hold NaN or infinity."""


class StateMismatch(InputError):
    """A run folder belongs to another model, data set, format list, seed or schema."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest known name, or an empty string.

    >>> did_you_mean("int4-g46", ["int4-g64", "int8-g64"])
    " Did you mean 'int4-g64'?"
    """
    near = get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
