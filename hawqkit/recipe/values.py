"""The types of single values in a recipe: names that stand in tables, sizes, numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, StrictStr, WithJsonSchema

from hawqkit.errors import InputError
from hawqkit.formats import (
    NAME_PATTERN,
    format_names,
    pair_names,
    parse_format,
    same_formats,
)
from hawqkit.recipe.problems import unknown_name
from hawqkit.runtimes import RUNTIMES
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES
from hawqkit.sensitivity.scores import score_names
from hawqkit.targets import TARGETS, find_target, target_names
from hawqkit.targets.plugins import PLAIN_NAME, find_plugins

BUILTIN = "builtin"  # the source that ships with the package
HELD_OUT = "held-out"  # the name of the held-out text among those that validation measures on
# Targets that write weights; the others have no size worth a budget.
SIZED_TARGETS = ("compressed-tensors", "onnx", "gguf")

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")
_SECONDS = {"s": "1", "ms": "0.001", "us": "0.000001", "µs": "0.000001", "ns": "0.000000001"}
_TIME = re.compile(r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+)\s*([A-Za-zµ]*)\s*")
_NUMBER = r"\s*(\d+\.?\d*(?:[eE]-?\d+)?|\.\d+)\s*"
_KL_LIMIT = re.compile(f"{_NUMBER}(?:@{_NUMBER})?")
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
    allowed = (
        f"allowed: whole bytes, or a number and one of {', '.join(_UNITS)}, like 80MB or 0.5GiB."
    )
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise ValueError(f"{size!r} is not a size; {allowed}")
    number, unit = match.groups()
    if unit not in _UNITS:
        near = [u for u in _UNITS if u.lower() == unit.lower()]
        hint = f" Did you mean '{number}{near[0]}'?" if near else ""
        raise ValueError(f"{size!r} has the unknown unit {unit!r}; {allowed}{hint}")
    return int(Decimal(number) * _UNITS[unit])


def parse_milliseconds(time: float | str) -> float:
    """Read a time: a number of milliseconds, or a number with a unit.

    >>> parse_milliseconds("3.1ms"), parse_milliseconds("850us"), parse_milliseconds(3.1)
    (3.1, 0.85, 3.1)

    Raises:
        ValueError: it is neither.
    """
    if isinstance(time, int | float) and not isinstance(time, bool):
        return float(time)
    allowed = "allowed: milliseconds, or a number and one of s, ms, us, ns, like 3.1ms."
    match = _TIME.fullmatch(time) if isinstance(time, str) else None
    if match is None or (match[2] and match[2] not in _SECONDS):
        raise ValueError(f"{time!r} is not a time; {allowed}")
    return float(Decimal(match[1]) * Decimal(_SECONDS[match[2] or "ms"]) * 1000)


def parse_latency(limit: object) -> object:
    """Read a limit on the latency: a time without a table, or the mapping as it is.

    >>> parse_latency("3.1ms"), parse_latency({"limit": "3.1ms", "table": "t.csv"})
    ({'limit': '3.1ms'}, {'limit': '3.1ms', 'table': 't.csv'})
    """
    plain = isinstance(limit, int | float | str) and not isinstance(limit, bool)
    return {"limit": limit} if plain else limit


def parse_kl_limit(limit: object) -> Mapping[str, object] | None:
    """Read a limit on the predicted KL: a number of nats, `0.05@0.9`, or the mapping as it is.

    >>> parse_kl_limit(0.05), parse_kl_limit("0.05@0.9")
    ({'value': 0.05}, {'value': 0.05, 'confidence': 0.9})

    Raises:
        ValueError: it is none of these.
    """
    if limit is None or isinstance(limit, Mapping):
        return limit
    if isinstance(limit, int | float) and not isinstance(limit, bool):
        return {"value": limit}
    match = _KL_LIMIT.fullmatch(limit) if isinstance(limit, str) else None
    if match is None:
        came = repr(limit) if isinstance(limit, str) else f"a {type(limit).__name__}"
        raise ValueError(
            f"{came} is no limit on the KL; allowed: a number of nats, as in 0.05, with a "
            "confidence 0.05@0.9, or {value: 0.05, confidence: 0.9}."
        )
    value, confidence = match.groups()
    return {"value": float(value), **({"confidence": float(confidence)} if confidence else {})}


def _one_of(what: str, names: Sequence[str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in names:
            raise unknown_name(what, name, names)
        return name

    return check


def _enum(names: Sequence[str]) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "enum": list(names)})


def _enum_or_plugin(names: Sequence[str]) -> WithJsonSchema:
    """Let editors complete the built-in targets, and take those of other packages."""
    choices = [{"enum": list(names)}, {"pattern": f"^{PLAIN_NAME}$"}]
    return WithJsonSchema({"type": "string", "anyOf": choices})


def _target(name: str) -> str:
    """Accept a target that is built in, or of another package and sound."""
    if name in TARGETS:
        return name
    plugins = find_plugins(TARGETS)
    if name not in {**plugins.targets, **plugins.clashes}:
        raise unknown_name("target", name, target_names())
    try:
        find_target(name)
    except InputError as error:
        raise ValueError(str(error)) from None
    return name


def is_sized(name: str) -> bool:
    """Whether a target's bytes can be limited; asks a target of another package itself."""
    return name in SIZED_TARGETS or (name not in TARGETS and find_target(name).SIZED)


def _sized_target(name: str) -> str:
    if name not in target_names() or not is_sized(_target(name)):
        raise unknown_name("target of which a size is known", name, SIZED_TARGETS)
    return name


def _format(name: str) -> str:
    try:
        return parse_format(name).name
    except InputError as error:
        raise ValueError(str(error)) from None


def distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a list that names something twice."""
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands more than once; name each once.")
    return names


def distinct_formats(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse a list that names a format twice, also by its other name."""
    pairs = same_formats(distinct(names))
    if pairs:
        raise ValueError(f"{' and '.join(pairs[0])} are one format; name it once.")
    return names


def distinct_numbers(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """Refuse a list that holds a number twice, and return it with the largest first."""
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{list(numbers)} holds a number twice; give each once.")
    return tuple(sorted(numbers, reverse=True))


def _layer_choice(chosen: object) -> object:
    """Refuse a word that is neither `all` nor `top-N`: a single pattern is a list of one."""
    if isinstance(chosen, str) and not re.fullmatch(_LAYER_WORDS, chosen):
        raise ValueError(
            f"{chosen!r} is no choice of layers; allowed: all, top-N with a number N, or a list of "
            "patterns, as in ['*.v_proj']."
        )
    if not isinstance(chosen, str | list | tuple):
        raise ValueError(
            f"got {chosen!r}; allowed: all, top-N with a number N, or a list of patterns."
        )
    return chosen


def _text_name(name: str) -> str:
    if name == HELD_OUT or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise ValueError(
            f"{name!r} cannot name a text; allowed: letters, digits, '.', '_' and '-', and not "
            f"'{HELD_OUT}', which is the text of held_out."
        )
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|[a-z]+(:\d+)?", name):
        raise ValueError(
            f"{name!r} is not a device; allowed: auto, cpu, cuda, cuda:0, mps and the like."
        )
    return name


_LAYER_WORDS = r"all|top-[1-9]\d*"
_SCORES = score_names()
_RUNTIMES = tuple(RUNTIMES)
_TARGETS = tuple(TARGETS)

NonEmpty = Annotated[StrictStr, Field(min_length=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0)]
Size = Annotated[int, Field(gt=0), BeforeValidator(parse_bytes, json_schema_input_type=int | str)]
Milliseconds = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False),
    BeforeValidator(parse_milliseconds, json_schema_input_type=float | str),
]
Device = Annotated[StrictStr, AfterValidator(_device)]
TextName = Annotated[str, AfterValidator(_text_name)]
LayerChoice = Annotated[
    Annotated[StrictStr, Field(pattern=f"^({_LAYER_WORDS})$")] | tuple[NonEmpty, ...],
    BeforeValidator(_layer_choice),
]
# Editors complete the listed names; of the many with bits for the inputs, the shorter ones.
_FORMATS = {
    "type": "string",
    "anyOf": [{"enum": [*format_names(), *pair_names()]}, {"pattern": NAME_PATTERN}],
}
FormatName = Annotated[StrictStr, AfterValidator(_format), WithJsonSchema(_FORMATS)]
ScoreName = Annotated[StrictStr, AfterValidator(_one_of("score", _SCORES)), _enum(_SCORES)]
CurvatureScoreName = Annotated[
    StrictStr,
    AfterValidator(_one_of("score of the true Hessian", CURVATURE_SCORES)),
    _enum(CURVATURE_SCORES),
]
RuntimeName = Annotated[StrictStr, AfterValidator(_one_of("runtime", _RUNTIMES)), _enum(_RUNTIMES)]
TargetName = Annotated[StrictStr, AfterValidator(_target), _enum_or_plugin(_TARGETS)]
SizedTargetName = Annotated[
    StrictStr, AfterValidator(_sized_target), _enum_or_plugin(SIZED_TARGETS)
]
