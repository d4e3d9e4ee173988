"""A recipe as a document: strict YAML that knows on which line everything stands, and `--set`.

YAML's traps are closed: a key that stands twice, a tab, a huge nest of aliases are problems, and
`1e-3` is a number, as everywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import yaml

from hawqkit.errors import RecipeError

Path = tuple[str | int, ...]

EXAMPLE = {"--set": "budget.average_bits=4.5", "--budget": "average_bits=4.5"}
MOST_NODES = 10_000  # a recipe has some hundred; a "billion laughs" of aliases has more

_STEP = re.compile(r"(?P<key>[^.\[\]]+)|\[(?P<index>\d+)\]")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the floats of YAML 1.2: PyYAML reads `1e-3` as text."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart: text that looks like `1e-3` is written in quotes."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(  # type: ignore[no-untyped-call]
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def write_yaml(data: dict[str, Any]) -> str:
    """Write plain data as YAML that `read_document` reads back equal."""
    text: str = yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=None,
        width=100,
        allow_unicode=True,
    )
    return text


@dataclass
class Document:
    """Plain data of a recipe, and where each part of it comes from.

    Attributes:
        source: name of the file, for messages.
        data: the mapping that the file holds, with overrides applied.
        origins: path -> `line 7` or `--set`.
        problems: messages about the document itself, such as a key that stands twice.
    """

    source: str
    data: dict[str, Any]
    origins: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def origin(self, path: Path) -> str:
        """Return where the nearest part of the document stands that contains `path`."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, "")


def show_path(path: Path) -> str:
    """Write a path the way `--set` reads it.

    >>> show_path(("formats", 2)), show_path(("budget", "size"))
    ('formats[2]', 'budget.size')
    """
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.lstrip(".")


def locate(document: Document, path: Path, message: str) -> str:
    """Put path and place before a message: `budget.size (line 9): ...`."""
    origin = document.origin(path)
    return f"{show_path(path) or 'the recipe'}{f' ({origin})' if origin else ''}: {message}"


def read_document(file: File) -> Document:
    """Read a recipe file.

    Raises:
        RecipeError: there is no such file, it is not UTF-8, not YAML, or not a mapping.
    """
    source = str(file)
    try:
        text = file.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        message = "there is no such file; `hawqkit recipes` lists those that come with hawqkit."
        raise RecipeError(source, [message]) from None
    except IsADirectoryError:
        raise RecipeError(source, ["this is a folder; a recipe is a YAML file."]) from None
    except UnicodeDecodeError as error:
        message = f"byte {error.start} is not UTF-8 text; a recipe is a YAML file in UTF-8."
        raise RecipeError(source, [message]) from None
    node = _compose(text, source)
    document = Document(source, {})
    if node is None:
        raise RecipeError(source, ["the file is empty; `hawqkit recipes` lists examples."])
    if not isinstance(node, yaml.MappingNode):
        message = (
            f"line {_line(node)}: not a mapping; a recipe has keys like `model: {{source: ...}}`."
        )
        raise RecipeError(source, [message])
    document.data = _Builder(document).build(node)
    return document


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)  # type: ignore[no-untyped-call]
        return node
    except yaml.YAMLError as error:
        raise RecipeError(source, [_yaml_message(error)]) from None
    except RecursionError:
        raise RecipeError(source, ["not a recipe: lists or mappings nest too deeply."]) from None


def _yaml_message(error: yaml.YAMLError) -> str:
    """Say in one line where the text stops being YAML."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = " ".join(filter(None, [error.problem, error.context]))
        return f"{place}not YAML: {what}."
    if isinstance(error, yaml.reader.ReaderError):
        character = error.character  # a number, or bytes
        shown = chr(character) if isinstance(character, int) else character
        return f"not YAML: the character {shown!r} at position {error.position} is not allowed."
    return f"not YAML: {' '.join(str(error).split())}"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Builder:
    """Turns nodes into plain data, notes their lines, and collects keys that stand twice."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.scalars = _Loader("")
        self.left = MOST_NODES

    def build(self, root: yaml.Node) -> Any:
        try:
            return self.visit(root, ())
        except RecursionError:
            message = "an alias contains itself, or lists nest too deeply; write it out flat."
            raise RecipeError(self.document.source, [message]) from None
        finally:
            self.scalars.dispose()  # type: ignore[no-untyped-call]

    def visit(self, node: yaml.Node, path: Path) -> Any:
        self.left -= 1
        if self.left < 0:
            message = f"line {_line(node)}: aliases nest to more than {MOST_NODES} entries."
            raise RecipeError(self.document.source, [message])
        if path:  # a problem of the whole file has no line
            self.document.origins.setdefault(path, f"line {_line(node)}")
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.visit(child, (*path, i)) for i, child in enumerate(node.value)]
        return self.scalar(node, path)

    def scalar(self, node: yaml.Node, path: Path) -> Any:
        try:
            return self.scalars.construct_object(node, deep=True)  # type: ignore[no-untyped-call]
        except (yaml.YAMLError, ValueError) as error:
            why = getattr(error, "problem", None) or str(error)
            self.complain(path, f"this value cannot be read: {why}.")
            return None

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.complain(path, f"the key on line {_line(key_node)} must be a plain word.")
                continue
            key = str(key_node.value)
            inner = (*path, key)
            if key in result:
                self.complain(
                    inner,
                    f"this key stands again on line {_line(key_node)}; the two contradict "
                    "each other, keep one.",
                )
                continue
            self.document.origins[inner] = f"line {_line(key_node)}"
            result[key] = self.visit(value_node, inner)
        return result

    def complain(self, path: Path, message: str) -> None:
        self.document.problems.append(locate(self.document, path, message))


def apply_overrides(document: Document, overrides: Sequence[str], *, option: str = "--set") -> None:
    """Change a document by `a.b=c`, where c is YAML; problems are added to the document's.

    `option` is what the user typed before it, for messages.

    >>> document = Document("r.yaml", {"budget": {"average_bits": 4.0}})
    >>> apply_overrides(document, ["budget.average_bits=4.5", "formats=[int4-g64]"])
    >>> document.data
    {'budget': {'average_bits': 4.5}, 'formats': ['int4-g64']}
    """
    seen: dict[Path, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        path = parse_path(name.strip())
        if not equals or path is None:
            document.problems.append(
                f"{option} {override}: expected PATH=VALUE, as in {option} {EXAMPLE[option]}."
            )
            continue
        if seen.setdefault(path, text) != text:
            document.problems.append(
                f"{option} {name}: set twice, to {seen[path]} and to {text}, which contradict each "
                "other; keep one."
            )
            continue
        value = _override_value(document, override, text, option)
        if value is not _BAD:
            _put(document, path, value, option)


_BAD = object()


def parse_path(text: str) -> Path | None:
    """Read `a.b[2].c` as ("a", "b", 2, "c"); None if it is no path."""
    steps: list[str | int] = []
    position = 0
    while position < len(text):
        if steps and text[position] == ".":
            position += 1
        match = _STEP.match(text, position)
        if match is None or (not steps and match["index"]):
            return None
        steps.append(int(match["index"]) if match["index"] else match["key"])
        position = match.end()
    return tuple(steps) or None


def _override_value(document: Document, override: str, text: str, option: str) -> Any:
    try:
        node = _compose(text, override)
    except RecipeError as error:
        document.problems.append(f"{option} {override}: {error.problems[0]}")
        return _BAD
    inner = Document(f"{option} {override}", {})
    value = None if node is None else _Builder(inner).build(node)
    document.problems += [f"{option} {override}: {problem}" for problem in inner.problems]
    return value


def _put(document: Document, path: Path, value: Any, option: str) -> None:
    """Set the value at `path`; mappings on the way are made, lists are not."""
    here: Any = document.data
    for depth, step in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(step, int):
            if not isinstance(here, list) or step >= len(here):
                what = f"has {len(here)} entries" if isinstance(here, list) else "is not a list"
                parent = show_path(path[:depth])
                document.problems.append(f"{option} {show_path(path)}: {parent} {what}.")
                return
        elif not isinstance(here, dict):
            parent = show_path(path[:depth])
            document.problems.append(f"{option} {show_path(path)}: {parent} is not a mapping.")
            return
        if last:
            here[step] = value
        elif isinstance(step, str) and here.get(step) is None:
            here[step] = {}
            document.origins[path[: depth + 1]] = option
        here = here[step]
    for known in [p for p in document.origins if p[: len(path)] == path]:
        del document.origins[known]
    document.origins[path] = option
