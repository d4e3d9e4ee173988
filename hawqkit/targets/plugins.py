"""Targets of other packages, announced as entry points of the group `hawqkit.targets`.

    [project.entry-points."hawqkit.targets"]
    my-target = "my_package.my_target"         # a module, or `module:object`, see `contract.Target`

Nothing of them is imported before one is asked for by name, and the installed packages are searched
only for names that are not built in. What is wrong with one is said where it is asked for, and is
no reason for anything else to fail.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any, cast

from hawqkit.errors import InputError
from hawqkit.targets.contract import Capabilities, Target

GROUP = "hawqkit.targets"
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # it names a folder of the run

_FUNCTIONS = (
    "capabilities", "problems", "size_table", "size", "write_from_facts", "write",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Announced:
    """A target that a package announces.

    Attributes:
        name: the name in a recipe.
        package: name and version of the package, for messages.
        entry: where it is.
    """

    name: str
    package: str
    entry: EntryPoint


@dataclass(frozen=True, slots=True)
class Plugins:
    """What the installed packages announce.

    Attributes:
        targets: name -> the one target of that name.
        clashes: name -> why it cannot be used: several packages announce it.
        ignored: a sentence about each announcement that is not used.
    """

    targets: dict[str, Announced]
    clashes: dict[str, str]
    ignored: tuple[str, ...]


def find_plugins(taken: Iterable[str] = ()) -> Plugins:
    """Return the targets that the packages on `sys.path` announce.

    Args:
        taken: names that are built in, and stay so.
    """
    return _search(tuple(sys.path), frozenset(taken))


@lru_cache(maxsize=1)
def _search(path: tuple[str, ...], taken: frozenset[str]) -> Plugins:
    # `path` is the key of the cache: a solver asks for the size of thousands of mixes
    found: dict[str, list[Announced]] = {}
    ignored: list[str] = []
    for item in _announced(path):
        if isinstance(item, str):
            ignored.append(item)
        elif item.name in taken:
            ignored.append(
                f"target {item.name!r} of package {item.package} is not used: hawqkit has a target "
                "of that name; its author has to choose another."
            )
        elif not re.fullmatch(PLAIN_NAME, item.name):
            ignored.append(
                f"target {item.name!r} of package {item.package} is not used: allowed in a name "
                "are letters, digits, '.', '_' and '-', a letter or digit first."
            )
        else:
            found.setdefault(item.name, []).append(item)
    clashes = {
        name: f"target {name!r} is announced more than once, by "
        f"{' and by '.join(x.package for x in items)}; uninstall all of them but one."
        for name, items in found.items()
        if len(items) > 1
    }
    single = {name: found[name][0] for name in sorted(found) if name not in clashes}
    return Plugins(single, clashes, (*ignored, *clashes.values()))


def _announced(path: tuple[str, ...]) -> Iterator[Announced | str]:
    """Yield what packages announce, or a sentence about a package that cannot be read."""
    seen = set()
    for package in distributions(path=list(path)):
        # Others' entry points are not parsed: a broken file of theirs is not our concern.
        if GROUP not in (package.read_text("entry_points.txt") or ""):
            continue
        label = _label(package)
        if label.partition(" ")[0] in seen:  # an older copy behind it on the path
            continue
        seen.add(label.partition(" ")[0])
        try:
            entries = [entry for entry in package.entry_points if entry.group == GROUP]
        except Exception as error:
            yield f"the entry points of package {label} cannot be read: {_said(error)}"
            continue
        yield from (Announced(entry.name, label, entry) for entry in entries)


def _label(package: Distribution) -> str:
    try:
        return f"{package.metadata['Name'] or 'without a name'} {package.version}"
    except Exception:  # a package without metadata has neither
        return "without a name"


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def load_plugin(announced: Announced) -> Target:
    """Import a target of another package.

    Raises:
        InputError: it cannot be imported, or it is no target: everything that it lacks.
    """
    whose = f"target {announced.name!r} of package {announced.package}"
    try:
        # SystemExit too: some packages end the process where a library of theirs is missing
        loaded = announced.entry.load()
    except (Exception, SystemExit) as error:
        raise InputError(
            f"{whose} cannot be imported from {announced.entry.value!r}: {_said(error)}; repair or "
            "uninstall the package."
        ) from error
    lacking = contract_problems(loaded)
    if not lacking and announced.name != loaded.NAME:
        lacking = [f"NAME is {loaded.NAME!r}, and the entry point is called {announced.name!r}"]
    if lacking:
        raise InputError(
            "\n".join([f"{whose} is no target as hawqkit.targets.contract describes one:",
                       *(f"  - {problem}" for problem in lacking)])
        )  # fmt: skip
    return cast(Target, loaded)


def contract_problems(target: Any) -> list[str]:
    """Return what a module or object lacks to be a `contract.Target`; each as a sentence."""
    found = []
    for name, kind in (("NAME", str), ("ABOUT", str), ("SIZED", bool)):
        if not isinstance(getattr(target, name, None), kind):
            found.append(
                f"{name} is {getattr(target, name, 'missing')!r}: a {kind.__name__} is due"
            )
    runtimes = getattr(target, "RUNTIMES", None)
    if not isinstance(runtimes, tuple) or not all(isinstance(one, str) for one in runtimes):
        found.append(f"RUNTIMES is {runtimes!r}: a tuple of str is due")
    missing = [name for name in _FUNCTIONS if not callable(getattr(target, name, None))]
    found += [f"there is no function {name!r}" for name in missing]
    if "capabilities" not in missing:
        found += _capability_problems(target)
    return found


def _capability_problems(target: Any) -> list[str]:
    try:
        held = target.capabilities()
    except Exception as error:
        return [f"capabilities() raises {_said(error)}"]
    if not isinstance(held, Capabilities):
        return [f"capabilities() returns a {type(held).__name__}: contract.Capabilities is due"]
    return []
