"""Which batch norm directly follows which layer, seen in a run on real inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from hawqkit.models.batch import FIRST
from hawqkit.models.orientation import CONVOLUTIONS, TRANSPOSED

# Exact types: a subclass may do more than normalize, such as an activation.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Asking a tensor for these reads none of its values.
_METADATA = (int, bool, str, torch.Size, torch.dtype, torch.device, torch.layout, type(None))

Inputs = Tensor | Mapping[str, Any]


class _Uses(TorchFunctionMode):
    """Counts the functions that read the values of watched tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}  # keeps them alive, so that no id is used again
        self.counts: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        self.watched[id(tensor)] = tensor
        self.counts.setdefault(id(tensor), 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = {id(t) for t in tensors_in((args, kwargs))} & self.watched.keys()
        result = func(*args, **kwargs)
        if not isinstance(result, _METADATA):
            for key in read:
                self.counts[key] += 1
        return result


@dataclass(slots=True)
class Sight:
    """What a run showed.

    Attributes:
        sources: norm -> for each call the layer whose untouched output it read, None for none.
        alone: layer -> for each call whether its output was read once and not returned.
        ranks: layer -> numbers of dimensions of its outputs.
        outputs: what the network returned.
    """

    sources: dict[str, list[str | None]] = field(default_factory=dict)
    alone: dict[str, list[bool]] = field(default_factory=dict)
    ranks: dict[str, set[int]] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


def watch(module: nn.Module, inputs: Inputs) -> Sight:
    """Run a network once, and return which layer's output each batch norm read."""
    sight, uses = Sight(), _Uses()
    calls: dict[int, tuple[str, int]] = {}  # output -> its layer, its version when it came out

    def came_out(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            uses.watch(output)
            calls[id(output)] = (name, output._version)
            sight.ranks.setdefault(name, set()).add(output.ndim)

        return hook

    def goes_in(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: Any, kwargs: Any) -> None:
            value = next(tensors_in((args, kwargs)), None)
            layer, version = calls.get(id(value), (None, 0))
            untouched = value is not None and value._version == version
            sight.sources.setdefault(name, []).append(layer if untouched else None)

        return hook

    with _hooks(module, came_out, goes_in), uses:
        sight.outputs = run(module, inputs)
    returned = {id(t) for t in sight.outputs}
    for key, (name, _) in calls.items():
        sight.alone.setdefault(name, []).append(uses.counts[key] == 1 and key not in returned)
    return sight


@contextmanager
def _hooks(
    module: nn.Module,
    came_out: Callable[[str], Callable[..., None]],
    goes_in: Callable[[str], Callable[..., None]],
) -> Iterator[None]:
    handles = []
    for name, child in module.named_modules():
        if isinstance(child, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            handles.append(child.register_forward_hook(came_out(name)))
        elif isinstance(child, _BatchNorm):
            handles.append(child.register_forward_pre_hook(goes_in(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def foldable(
    module: nn.Module, norms: Mapping[str, _BatchNorm], sight: Sight
) -> tuple[dict[str, str], dict[str, str]]:
    """Return norm -> layer of what may be folded, and norm -> reason of the others."""
    pairs: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, norm in norms.items():
        if (reason := _no_layer(name, norm, sight)) is None:
            layer = str(sight.sources[name][0])
            reason = _unfit(module, layer, sight)
        if reason is None:
            pairs[name] = layer
        else:
            left[name] = reason
    return pairs, left


def _no_layer(name: str, norm: _BatchNorm, sight: Sight) -> str | None:
    """Return why there is no one layer that a norm follows, None if there is."""
    if type(norm) not in _NORMS:
        return f"{type(norm).__name__} may do more than normalize"
    if norm.running_mean is None or norm.running_var is None:
        return "keeps no statistics: it follows each batch"
    if not bool(torch.isfinite((norm.running_var.cpu().double() + norm.eps).rsqrt()).all()):
        return "its variance and eps are zero in a channel"
    sources = set(sight.sources.get(name, ()))
    if not sources:
        return "never called on the example inputs"
    if None in sources:
        return "its input is not the plain output of a convolution or Linear"
    if len(sources) > 1:
        return f"follows several layers: {', '.join(sorted(map(str, sources)))}"
    alone = sight.alone[str(sources.pop())]
    if not all(alone) or len(alone) != len(sight.sources[name]):
        return f"the output of {sight.sources[name][0]} is read elsewhere too"
    return None


def _unfit(module: nn.Module, name: str, sight: Sight) -> str | None:
    """Return why a layer cannot take a norm in, None if it can."""
    layer = module.get_submodule(name)
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        return f"the weight of {name} is computed anew in each call"
    weight = layer.get_parameter("weight")
    owners = [m for m in module.modules() if any(p is weight for p in m._parameters.values())]
    if len(owners) > 1:
        return f"the weight of {name} is shared with other modules"
    if sight.ranks[name] != {weight.ndim}:  # the norm's channels are the second of (N, C, ...)
        return f"the output of {name} is laid out so that the norm's channels are not its own"
    return None


@torch.no_grad()
def run(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Run a network on a tensor, or on arguments by name, and return every tensor that it gives."""
    if not isinstance(inputs, Mapping):
        return list(tensors_in(module(inputs)))
    arguments = dict(inputs)
    first = [arguments.pop(FIRST)] if FIRST in arguments else []
    return list(tensors_in(module(*first, **arguments)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(map(tensors_in, value.values()))
    elif isinstance(value, list | tuple):
        yield from chain.from_iterable(map(tensors_in, value))
