"""How consumers decide which settings a module gets, and the proof that each gets its own.

A rule takes (pattern or name, settings) pairs in the written order and a name, and returns the
settings that the consumer would apply; None is "not named".
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hawqkit.errors import Unsupported
from hawqkit.targets.contract import capped

Entries = Sequence[tuple[str, Any]]
Rule = Callable[[Entries, str], Any]


def exact(entries: Entries, name: str) -> Any:
    """Decide by the entry of exactly that name."""
    return dict(entries).get(name)


def first_prefix(entries: Entries, name: str) -> Any:
    """Decide by the first entry whose regular expression matches a prefix (`re.match`)."""
    return next((value for text, value in entries if re.match(text, name)), None)


def first_search(entries: Entries, name: str) -> Any:
    """Decide by the first entry whose regular expression is found anywhere (`re.search`)."""
    return next((value for text, value in entries if re.search(text, name)), None)


def last_glob(entries: Entries, name: str) -> Any:
    """Decide by the last entry whose glob matches the whole name (`fnmatch`)."""
    matching = [value for text, value in entries if fnmatch.fnmatchcase(name, text)]
    return matching[-1] if matching else None


def quoted_glob(name: str) -> str:
    """Return the glob that matches one name alone.

    >>> quoted_glob("a[0].w*")
    'a[[]0].w[*]'
    """
    return re.sub(r"([*?\[])", r"[\1]", name)


def quoted_regex(name: str) -> str:
    r"""Return the regular expression that matches one name alone, whether searched or matched.

    `$` matches before a newline at the end too, but it is what every engine understands; two names
    that differ in that alone do not get through `verify`.

    >>> print(quoted_regex("model.layers.1"))
    ^model\.layers\.1$
    """
    return f"^{re.escape(name)}$"


def verify(
    target: str, entries: Entries, rule: Rule, names: Iterable[str], wanted: Mapping[str, Any]
) -> None:
    """Decide every module by the consumer's rule, and refuse unless each gets what is wanted.

    Args:
        target: name of the target, for the message.
        entries: (pattern or name, settings) as parsed back from the written text, in its order.
        rule: how the consumer decides for a name: `exact`, `first_prefix`, ...; None: not named.
        names: all modules of the model that own a matrix, see `module_names`.
        wanted: module name -> settings; a module that it does not hold must not be named.

    Raises:
        Unsupported: a module gets other settings, or a wanted one is no module.
    """
    everything = dict.fromkeys([*names, *wanted])
    found = []
    for name in everything:
        got = rule(entries, name)
        if got != wanted.get(name):
            found.append(f"module {name!r}: it would get {got!r} in place of {wanted.get(name)!r}")
    if found:
        head = (
            f"target {target!r}: the consumer would read its configuration otherwise, and nothing "
            "was written; rename the modules, or export 'bits'."
        )
        raise Unsupported("\n".join([head, *capped(found)]))
