"""Which layers share a format: those that a runtime fuses, and those that the user ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hawqkit.errors import InputError, did_you_mean
from hawqkit.runtimes import group_key


def merge_layers(
    names: Sequence[str], runtime: str, keys: Mapping[str, str] | None = None
) -> tuple[list[list[int]], list[str]]:
    """Return groups of layer indices in the order of their first members, and each group's name.

    Two layers are in one group if the runtime fuses them or if they have the same non-empty key;
    groups that overlap become one.

    >>> merge_layers(["conv1", "conv2", "skip"], "transformers", {"conv1": "a", "skip": "a"})
    ([[0, 2], [1]], ['a', 'conv2'])

    Args:
        names: layers.
        runtime: profile of fused layers.
        keys: layer name -> key that it shares with others; empty keys tie nothing.

    Raises:
        InputError: a key is given for a layer that is not there, or the runtime is unknown.
    """
    keys = keys or {}
    strangers = [name for name in keys if name not in set(names)]
    if strangers:
        raise InputError(
            f"a group is given for {strangers[0]!r}, which is none of the {len(names)} layers "
            f"({len(strangers)} such)." + did_you_mean(strangers[0], list(names))
        )
    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(f"fused {group_key(name, runtime)}", []).append(index)
        if keys.get(name):
            members.setdefault(f"tied {keys[name]}", []).append(index)
    root = list(range(len(names)))
    for together in members.values():
        _join(root, together)
    groups: dict[int, list[int]] = {}
    for index in range(len(names)):
        groups.setdefault(_find(root, index), []).append(index)
    found = list(groups.values())
    return found, [_name([names[i] for i in g], runtime, keys) for g in found]


def _find(root: list[int], index: int) -> int:
    while root[index] != index:
        index = root[index]
    return index


def _join(root: list[int], together: Sequence[int]) -> None:
    """Give all members the root of the earliest one."""
    roots = {_find(root, index) for index in together}
    for other in roots:
        root[other] = min(roots)


def _name(members: Sequence[str], runtime: str, keys: Mapping[str, str]) -> str:
    """Return a layer's name, or what the members of a group have in common."""
    if len(members) == 1:
        return members[0]
    tied = list(dict.fromkeys(keys[name] for name in members if keys.get(name)))
    return "+".join(tied) if tied else group_key(members[0], runtime)
