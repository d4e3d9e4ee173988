"""Which weights of a model can be quantized, and why each of the others is left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from hawqkit.errors import InputError, did_you_mean
from hawqkit.models.orientation import rows_and_columns, weight_kind
from hawqkit.records import Layer, Skipped

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)(?:\.|$)")
_POSITIONS = re.compile(r"(^|[._])(wpe|pos|positions?|positional)([._]|$)|pos_emb")
_WILDCARD = re.compile(r"[*?\[]")
_CONVOLUTION_KINDS = ("convolution", "transposed-convolution")
_KINDS = ("linear", "conv1d", "embedding", *_CONVOLUTION_KINDS)
_NOT_YET = "not supported for causal language models yet"


@dataclass(frozen=True, slots=True)
class _Use:
    """One place where a module holds a parameter."""

    name: str
    leaf: str
    module: nn.Module
    kind: str


def find_layers(
    module: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    exclude_if_there: Sequence[str] = (),
    stored: Mapping[str, str] | None = None,
    convolutions: bool = True,
) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Return the weights to quantize, in the model's order, and every other weight with its reason.

    Layers are the weights of `nn.Linear`, `nn.Embedding`, transformers' transposed `Conv1D`, and of
    convolutions in one to three dimensions, transposed ones too.
    A pattern is a glob on module paths, and what holds for a module holds for all inside it, so
    `model.layers.0` stands for the whole block. A weight with several uses is one layer: it is
    chosen if one of its uses is included and none is excluded. Position embeddings are left alone
    unless a pattern without wildcards names them.

    Args:
        module: the model.
        include: patterns of which one must match.
        exclude: patterns of which none may match.
        exclude_if_there: the same, and they may match no module at all.
        stored: parameter name -> stored dtype, where it is not the dtype in memory.
        convolutions: whether the weights of convolutions are layers; in language models they are
            not.

    Raises:
        InputError: no layer is left, or a pattern of the first two matches no module at all.

    >>> layers, _ = find_layers(nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU()))
    >>> (layers[0].name, layers[0].rows, layers[0].columns)
    ('0', 8, 4)
    """
    uses = _uses_of_parameters(module)
    _check_patterns(module, include, exclude)
    exclude = (*exclude, *exclude_if_there)
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    vectors: list[nn.Parameter] = []
    for parameter, places in uses:
        if parameter.ndim < 2:
            vectors.append(parameter)
            continue
        first = next((u for u in places if u.kind in _KINDS), places[0])
        reason = _reason(parameter, first, places, include, exclude)
        if reason is None and not convolutions and first.kind in _CONVOLUTION_KINDS:
            reason = f"{type(first.module).__name__}: {_NOT_YET}"
        if reason is not None:
            name = first.name if first.leaf == "weight" else _join(first.name, first.leaf)
            skipped.append(Skipped(name, first.kind, tuple(parameter.shape), reason))
            continue
        layers.append(_layer(parameter, first, places, stored or {}))
    if vectors:
        skipped.append(_summary(vectors))
    if not layers:
        raise InputError(_nothing_matched(uses, include, exclude))
    return tuple(layers), tuple(skipped)


def _layer(
    parameter: nn.Parameter, first: _Use, places: Sequence[_Use], stored: Mapping[str, str]
) -> Layer:
    rows, columns = rows_and_columns(first.module, tuple(parameter.shape))
    names = sorted({_join(u.name, u.leaf) for u in places} & set(stored))
    return Layer(
        name=first.name,
        kind=first.kind,
        rows=rows,
        columns=columns,
        dtype=stored[names[0]] if names else dtype_name(parameter.dtype),
        block=block_of(first.name),
        tied=tuple(u.name for u in places if u is not first),
        calls=len(places),
    )


def block_of(name: str) -> int | None:
    """Return the index of the transformer block that a module path lies in.

    >>> block_of("model.layers.3.mlp.up_proj"), block_of("lm_head")
    (3, None)
    """
    match = _BLOCK.search(name)
    return int(match[1]) if match else None


def dtype_name(dtype: object) -> str:
    """Return torch's dtype as hawqkit's records write it.

    >>> import torch
    >>> dtype_name(torch.bfloat16)
    'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a module path or one of the modules that hold it.

    >>> matches("model.layers.0.mlp.up_proj", "model.layers.0"), matches("lm_head", "model.*")
    (True, False)
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def _uses_of_parameters(module: nn.Module) -> list[tuple[nn.Parameter, list[_Use]]]:
    """Return every parameter once, with all modules that hold it, in the model's order."""
    uses: dict[int, tuple[nn.Parameter, list[_Use]]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        for leaf, parameter in child.named_parameters(recurse=False, remove_duplicate=False):
            kind = _kind(child, leaf)
            uses.setdefault(id(parameter), (parameter, []))[1].append(_Use(name, leaf, child, kind))
    return list(uses.values())


def _kind(module: nn.Module, leaf: str) -> str:
    usable = leaf == "weight" and type(module) is not NonDynamicallyQuantizableLinear
    kind = weight_kind(module) if usable else None
    return kind or type(module).__name__


def _reason(
    parameter: nn.Parameter,
    first: _Use,
    places: Sequence[_Use],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str | None:
    """Return why a weight is left alone, None if it is a layer."""
    for use in places:
        pattern = next((p for p in exclude if matches(use.name, p)), None)
        if pattern is not None:
            if use is first:
                return f"excluded by pattern {pattern!r}"
            return f"tied to {use.name}, which is excluded by pattern {pattern!r}"
    if (problem := _unsupported(parameter, first, places)) is not None:
        return problem
    if not any(matches(u.name, p) for u in places for p in include):
        return f"no include pattern matches it ({', '.join(map(repr, include))})"
    named = any(u.name == p for u in places for p in include if not _WILDCARD.search(p))
    if first.kind == "embedding" and not named and _is_position(first, places):
        return (
            "position embedding, small and added to every token: name it in `include` to choose it"
        )
    return None


def _unsupported(parameter: nn.Parameter, first: _Use, places: Sequence[_Use]) -> str | None:
    if parameter.ndim == 3 and "expert" in _join(first.name, first.leaf).lower():
        return f"stack of {parameter.shape[0]} experts: {_NOT_YET}"
    if type(first.module) is NonDynamicallyQuantizableLinear:
        return "nn.MultiheadAttention reads this weight without calling its module"
    if first.kind not in _KINDS:
        return (
            f"weight of a {first.kind}: only Linear, Conv1D, Embedding and "
            "convolution weights are quantized"
        )
    if not parameter.is_floating_point():
        return f"stored as {dtype_name(parameter.dtype)}, which is quantized already"
    kinds = {u.kind for u in places}
    if kinds & {"conv1d", *_CONVOLUTION_KINDS} and len(kinds) > 1:
        return "tied to a weight of another orientation"
    return None


def _is_position(first: _Use, places: Sequence[_Use]) -> bool:
    if len(places) > 1:
        return False
    return _POSITIONS.search(first.name.rpartition(".")[2].lower()) is not None


def _summary(vectors: Sequence[nn.Parameter]) -> Skipped:
    total = sum(v.numel() for v in vectors)
    reason = f"{len(vectors)} norms, biases and other vectors: kept, they hold {total:,} entries"
    return Skipped(f"({len(vectors)} vectors)", "vector", (total,), reason)


def _check_patterns(module: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for what, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise InputError(
                    f"layers.{what}: {pattern!r} matches no module of the model; patterns are "
                    f"globs on module paths such as {_examples(names)}."
                    + did_you_mean(pattern, names)
                )


def _nothing_matched(
    uses: Sequence[tuple[nn.Parameter, Sequence[_Use]]],
    include: Sequence[str],
    exclude: Sequence[str],
) -> str:
    names = [u.name for _, places in uses for u in places if u.kind in _KINDS]
    if not names:
        return "no layer matched: the model has no Linear, Conv1D, Embedding or convolution weight."
    return (
        f"no layer matched: include {list(include)} and exclude {list(exclude)} leave none of "
        f"{len(names)} weights; their names are {_examples(names)}. Widen `include` or shorten "
        "`exclude`."
    )


def _examples(names: Sequence[str], count: int = 4) -> str:
    names = [name for name in names if name] or ["(the model itself)"]
    chosen = sorted({names[i * (len(names) - 1) // max(1, count - 1)] for i in range(count)})
    return ", ".join(map(repr, chosen))


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf
