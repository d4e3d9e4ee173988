"""Which parameters an operator is over, and how they lie in its flat vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.models.layers import dtype_name, matches
from hawqkit.models.model import LoadedModel

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Parameters:
    """Chosen parameters in the model's order, each once, also where several modules share it.

    Attributes:
        names: as `named_parameters` gives them; a shared one has the first of its names.
        tensors: the parameters themselves.
        notes: what was left out, and what a record should say.
    """

    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """How many numbers they have together."""
        return sum(t.numel() for t in self.tensors)

    @property
    def blocks(self) -> dict[str, slice]:
        """Name -> place in the flat vector."""
        places, start = {}, 0
        for name, tensor in zip(self.names, self.tensors, strict=True):
            places[name] = slice(start, start + tensor.numel())
            start += tensor.numel()
        return places

    @property
    def device(self) -> torch.device:
        """Where they live."""
        return self.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of flat vectors: that of the parameters, float32 where they are halves."""
        dtype = torch.float32 if self.tensors[0].dtype in HALF else self.tensors[0].dtype
        for tensor in self.tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    def split(self, V: Tensor) -> list[Tensor]:
        """Cut a vector (n,) into tensors of the parameters' shapes; (n, k) into (k, *shape)."""
        pieces = []
        for place, tensor in zip(self.blocks.values(), self.tensors, strict=True):
            piece = V[place].to(tensor.dtype)
            shape = tuple(tensor.shape)
            pieces.append(piece.view(shape) if V.ndim == 1 else piece.T.reshape(-1, *shape))
        return pieces

    def join(self, pieces: Sequence[Tensor | None], vectors: int) -> Tensor:
        """Put (k, *shape) tensors into (n, k), whose columns are contiguous; None is zeros."""
        rows = torch.empty(vectors, self.size, dtype=self.dtype, device=self.device)
        for place, piece in zip(self.blocks.values(), pieces, strict=True):
            if piece is None:
                rows[:, place] = 0
            else:
                rows[:, place] = piece.detach().reshape(vectors, -1)
        return rows.T

    def named(self, v: Tensor) -> dict[str, Tensor]:
        """Return a flat vector (n,) as name -> tensor of the parameter's shape, in v's dtype."""
        return {
            name: v[place].reshape(tensor.shape)
            for (name, place), tensor in zip(self.blocks.items(), self.tensors, strict=True)
        }

    def only(self, names: Iterable[str]) -> Parameters:
        """Return some of them; the notes are kept."""
        wanted = set(names)
        pairs = [(n, t) for n, t in zip(self.names, self.tensors, strict=True) if n in wanted]
        return Parameters(tuple(n for n, _ in pairs), tuple(t for _, t in pairs), self.notes)


def choose_parameters(
    model: nn.Module | LoadedModel, chosen: Iterable[str | nn.Parameter] | None = None
) -> Parameters:
    """Return the parameters that an operator is over.

    Args:
        model: the network.
        chosen: names, globs, paths of modules (`model.layers.0` stands for all parameters in it),
            or parameters themselves. None takes those that require a gradient; where none does, as
            in a model that was loaded to be measured, it takes all.

    Raises:
        InputError: the model has no parameters, or a pattern matches none.
        Unsupported: they lie on several devices, or are no floating-point numbers.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> choose_parameters(net, ["*.weight"]).names
    ('0.weight', '1.weight')
    """
    module = model.module if isinstance(model, LoadedModel) else model
    known = dict(module.named_parameters())
    if not known:
        raise InputError(
            f"{type(module).__name__} has no parameters, so its loss has no derivatives by them."
        )
    names, notes = _names(module, known, chosen)
    for name in names:
        if not known[name].is_floating_point():
            raise Unsupported(
                f"parameter {name!r} is stored as {dtype_name(known[name].dtype)}, which has no "
                "derivatives; load the model in a floating-point dtype, or leave it out."
            )
    tensors = tuple(known[name] for name in names)
    devices = {str(t.device) for t in tensors}
    if len(devices) > 1 or "meta" in devices:
        raise Unsupported(
            f"the chosen parameters lie on {', '.join(sorted(devices))}; an operator's vectors lie "
            "on one device that holds data. Load the model on one, or choose parameters of one."
        )
    halves = [n for n, t in zip(names, tensors, strict=True) if t.dtype in HALF]
    if halves:
        notes.append(
            f"{len(halves)} of {len(names)} parameters are {dtype_name(known[halves[0]].dtype)}: "
            "second derivatives in half precision carry errors of about a percent of the largest; "
            "eigenvalues below the measured noise floor are not to be trusted."
        )
    return Parameters(names, tensors, tuple(notes))


def _names(
    module: nn.Module,
    known: Mapping[str, nn.Parameter],
    chosen: Iterable[str | nn.Parameter] | None,
) -> tuple[tuple[str, ...], list[str]]:
    if chosen is not None:
        return _explicit(module, known, chosen), []
    wanted = tuple(n for n, p in known.items() if p.requires_grad)
    if not wanted:
        floating = tuple(n for n, p in known.items() if p.is_floating_point())
        return floating or tuple(known), []
    frozen = [n for n in known if n not in set(wanted)]
    if not frozen:
        return wanted, []
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    note = (
        f"{len(frozen)} frozen parameters are left out: {', '.join(frozen[:3])}{more}; name them "
        "in `parameters` to take them in."
    )
    return wanted, [note]


def _explicit(
    module: nn.Module,
    known: Mapping[str, nn.Parameter],
    chosen: Iterable[str | nn.Parameter],
) -> tuple[str, ...]:
    """Resolve names, globs, module paths and parameters; a shared one by any of its names."""
    if isinstance(chosen, (str, nn.Parameter)):
        chosen = [chosen]
    first = {id(p): n for n, p in known.items()}
    aliases = {n: first[id(p)] for n, p in module.named_parameters(remove_duplicate=False)}
    wanted: set[str] = set()
    for item in chosen:
        if isinstance(item, Tensor):
            if id(item) not in first:
                raise InputError(
                    f"a tensor of shape {tuple(item.shape)} in `parameters` is no parameter of "
                    f"{type(module).__name__}; give those of model.parameters(), or names."
                )
            wanted.add(first[id(item)])
            continue
        found = {aliases[n] for n in aliases if item in ("", n) or matches(n, item)}
        if not found:
            raise InputError(
                f"parameters: {item!r} matches none of {type(module).__name__}'s {len(known)} "
                f"parameters, named like {next(iter(known))!r}." + did_you_mean(item, list(aliases))
            )
        wanted |= found
    if not wanted:
        raise InputError("parameters: the list is empty; None takes all that require a gradient.")
    return tuple(n for n in known if n in wanted)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of several tensors together."""
    wide = torch.float64
    norms = [float(torch.linalg.vector_norm(t.detach(), dtype=wide)) for t in tensors]
    return math.hypot(*norms)
