"""The types of single values in a recipe: names that stand in tables, sizes, numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, StrictStr, WithJsonSchema

from hawqkit.errors import InputError
from hawqkit.formats import format_names, parse_format
from hawqkit.recipe.problems import unknown_name
from hawqkit.runtimes import RUNTIMES
from hawqkit.sensitivity.scores import score_names
from hawqkit.targets import TARGETS

HELD_OUT = "held-out"  # the name of the held-out text among those that validation measures on
# Targets that write weights; the others have no size worth a budget.
SIZED_TARGETS = ("compressed-tensors",)

_UNITS = {"B": 1, **{p + "B": 1000 ** (i + 1) for i, p in enumerate(("k", "M", "G", "T"))}}
_UNITS |= {"KB": 1000, **{p + "iB": 1024 ** (i + 1) for i, p in enumerate(("K", "M", "G", "T"))}}


def parse_bytes(size: int | str) -> int:
    """Read a size: whole bytes, or a number with a unit; part of a byte is dropped.

    >>> parse_bytes("80MB"), parse_bytes("0.5GiB"), parse_bytes(1234)
    (80000000, 536870912, 1234)

    Raises:
        ValueError: it is neither.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    allowed = f"allowed: whole bytes, or a number with one of {', '.join(_UNITS)}, like 80MB or 0.5GiB."
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size) if isinstance(size, str) else None
    if match is None:
        shown = f"{size!r} (a part of a byte)" if isinstance(size, float) else repr(size)
        raise ValueError(f"{shown} is not a size; {allowed}")
    number, unit = match.groups()
    if unit not in _UNITS:
        near = [u for u in _UNITS if u.lower() == unit.lower()]
        hint = f" Did you mean '{number}{near[0]}'?" if near else ""
        raise ValueError(f"{size!r} has the unknown unit {unit!r}; {allowed}{hint}")
    return int(Decimal(number) * _UNITS[unit])


def _known(what: str, names: Sequence[str]) -> tuple[Any, Any]:
    """Return the validator of a name that stands in a table, and its JSON schema."""

    def check(name: str) -> str:
        if name not in names:
            raise unknown_name(what, name, names)
        return name

    return AfterValidator(check), WithJsonSchema({"type": "string", "enum": list(names)})


def _format(name: str) -> str:
    try:
        return parse_format(name).name
    except InputError as error:
        raise ValueError(str(error)) from None


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands more than once; name each once.")
    return names


def _text_name(name: str) -> str:
    if name == HELD_OUT or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(
            f"{name!r} cannot name a text; allowed: letters, digits, '.', '_' and '-', and not "
            f"'{HELD_OUT}', which is the text of held_out."
        )
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|[a-z]+(:\d+)?", name):
        raise ValueError(f"{name!r} is not a device; allowed: auto, cpu, cuda, cuda:0, mps and the like.")
    return name


NonEmpty = Annotated[StrictStr, Field(min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
FormatName = Annotated[
    StrictStr,
    AfterValidator(_format),
    WithJsonSchema({"type": "string", "enum": list(format_names())}),
]
_SCORE = _known("score", score_names())
_RUNTIME = _known("runtime", tuple(RUNTIMES))
_TARGET = _known("target", tuple(TARGETS))
_SIZED = _known("target with a size", tuple(n for n in TARGETS if n in SIZED_TARGETS))
ScoreName = Annotated[StrictStr, _SCORE[0], _SCORE[1]]
RuntimeName = Annotated[StrictStr, _RUNTIME[0], _RUNTIME[1]]
TargetName = Annotated[StrictStr, _TARGET[0], _TARGET[1]]
SizedTargetName = Annotated[StrictStr, _SIZED[0], _SIZED[1]]
Size = Annotated[
    int, Field(gt=0), BeforeValidator(parse_bytes, json_schema_input_type=int | str)
]


