"""Turn pydantic's errors into messages that say what came, why it is wrong, and what is allowed."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from hawqkit.errors import did_you_mean
from hawqkit.recipe.document import Document, Path, locate, show_path

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "finite_number": "a finite number",
    "too_short": "a list with at least one entry",
    "string_too_short": "text that is not empty",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
}

_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "true or false"),
    (int, "a number"),
    (float, "a number"),
    (str, "text"),
    (list, "a list"),
    (dict, "a mapping"),
)


def unknown_name(what: str, name: str, known: Sequence[str]) -> PydanticCustomError:
    """Return the error of a validator that looked `name` up in a table and did not find it."""
    return PydanticCustomError(
        "unknown_name", "unknown", {"what": what, "name": name, "known": list(known)}
    )


def explain(
    errors: Sequence[ErrorDetails], document: Document, schema: type[BaseModel]
) -> dict[Path, str]:
    """Return one complete message for each path of the document that has errors.

    A value that may be one of several types has an error for each of them: one message says all.
    """
    grouped: dict[Path, list[ErrorDetails]] = {}
    for error in errors:
        if error["type"] == "too_short" and error["input"]:
            continue  # its entries are all wrong, each of which is an error already
        grouped.setdefault(_real_path(error, document.data), []).append(error)
    return {p: locate(document, p, _message(p, group, schema)) for p, group in grouped.items()}


def _real_path(error: ErrorDetails, data: Any) -> Path:
    """Drop from a location what names a type of a union and is no key of the document."""
    path: list[str | int] = []
    here = data
    for step in error["loc"]:
        inside = isinstance(here, dict) and step in here
        if inside or (isinstance(here, list) and isinstance(step, int) and step < len(here)):
            here = here[step]
        elif error["type"] != "missing" or step != error["loc"][-1]:
            continue
        path.append(step)
    return tuple(path)


def _message(path: Path, errors: Sequence[ErrorDetails], schema: type[BaseModel]) -> str:
    error = errors[0]
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, schema)
    if kind == "missing":
        known = _field_at(schema, path)
        about = known.description if known is not None else "it has no default"
        return f"is missing, and a recipe needs it: {about}."
    if kind == "unknown_name":
        known_names = context["known"]
        return (
            f"unknown {context['what']} {context['name']!r}; known: {', '.join(known_names)}."
            + did_you_mean(context["name"], known_names)
        )
    if kind == "value_error":
        return str(context["error"])
    return _not_allowed(error["input"], errors)


def _unknown_key(path: Path, schema: type[BaseModel]) -> str:
    model = _model_at(schema, path[:-1])
    known = [] if model is None else [name for name, _ in _fields(model)]
    key = str(path[-1])
    hint = did_you_mean(key, known)
    if not hint:
        homes = [show_path(p) for p in _all_paths(schema) if p[-1] == key]
        hint = f" Did you mean '{homes[0]}'?" if homes else ""
    return f"unknown key; known here: {', '.join(known)}.{hint}"


def _not_allowed(came: Any, errors: Sequence[ErrorDetails]) -> str:
    wanted: list[str] = []
    names: list[str] = []
    for error in errors:
        context = error.get("ctx", {})
        if error["type"] == "literal_error":
            names += re.findall(r"'([^']*)'", str(context["expected"]))
        else:
            wanted.append(_WANTED.get(error["type"], error["msg"]).format(**context))
    allowed = ", ".join(names) + (" or " if names and wanted else "") + " or ".join(wanted)
    hint = _hint(came, names, wanted)
    return f"{_shown(came)} is not allowed here; allowed: {allowed}.{hint}"


def _hint(came: Any, names: Sequence[str], wanted: Sequence[str]) -> str:
    """Say the nearest name, or whether quotes are missing or too many."""
    if isinstance(came, str):
        number = any("number" in w for w in wanted) and re.fullmatch(r"[\d.]+", came)
        return " Write it without quotes." if number else did_you_mean(came, names)
    plain = came is not None and not isinstance(came, list | dict)
    return " Write it in quotes." if plain and wanted == ["text"] and not names else ""


def _shown(came: Any) -> str:
    """Write a value as YAML would, with its kind where the value does not say it."""
    if came is None:
        return "an empty value"
    kind = next((name for type_, name in _KINDS if isinstance(came, type_)), type(came).__name__)
    if isinstance(came, bool):
        return f"{str(came).lower()} ({kind})"
    if isinstance(came, list | dict):
        return f"an empty {kind[2:]}" if not came else kind
    text = repr(came) if isinstance(came, str) else str(came)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({kind})"


def _fields(model: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        yield info.alias or name, info


def _field_at(schema: type[BaseModel], path: Path) -> FieldInfo | None:
    model = _model_at(schema, path[:-1])
    return None if model is None else dict(_fields(model)).get(str(path[-1]))


def _model_at(schema: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """Return the model that describes the mapping at `path`."""
    here: Any = schema
    for step in path:
        if isinstance(here, type) and issubclass(here, BaseModel):
            info: Mapping[str, FieldInfo] = dict(_fields(here))
            here = _section_of(info[str(step)].annotation) if step in info else None
        else:  # dict[str, Model]: the step is a name that the user chose
            here = typing.get_args(here)[-1] if typing.get_origin(here) is dict else None
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def _section_of(annotation: Any) -> Any:
    """Return the section of a key that may be left out, `Section | None`."""
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    return parts[0] if isinstance(annotation, types.UnionType) and len(parts) == 1 else annotation


def _all_paths(schema: type[BaseModel]) -> Iterator[Path]:
    for name, info in _fields(schema):
        yield (name,)
        inner = _section_of(info.annotation)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from ((name, *rest) for rest in _all_paths(inner))
