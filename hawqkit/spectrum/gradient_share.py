"""The share of the gradient that lies in the top eigenspace, for one state and over checkpoints.

Letters: n parameters, k eigenvectors, g the gradient, P_k the projector on the k eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hawqkit.curvature.data import Batches
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.layers import check_kind
from hawqkit.curvature.objective import Objective
from hawqkit.curvature.of_model import refuse_unknown
from hawqkit.curvature.parameters import choose_parameters
from hawqkit.errors import DataError, InputError, NumericalError, StateMismatch, did_you_mean
from hawqkit.estimators.eigenpairs import top_eigenpairs
from hawqkit.estimators.vectors import inner, norms
from hawqkit.models.model import LoadedModel
from hawqkit.spectrum.gradient import mean_gradient

State = Mapping[str, Tensor] | str | Path


@dataclass(frozen=True, slots=True)
class GradientShare:
    """How much of the gradient the top eigenspace holds.

    Attributes:
        share: |P_k g|^2 / |g|^2; NaN where the gradient is zero.
        shares: the part of each eigenvector, in the order of `values`.
        k: eigenvectors.
        size: n.
        null: k / n, the share of a direction that is uniform on the sphere.
        null_stderr: standard deviation of that share, which is Beta(k/2, (n-k)/2).
        gradient_norm: |g|.
        values: eigenvalues.
        residuals: an eigenvalue lies within that of each.
        converged: whether all of them have.
        products: that were spent.
        state: which checkpoint; empty for the model as it is.
        note: what a reader must know.
    """

    share: float
    shares: tuple[float, ...]
    k: int
    size: int
    null: float
    null_stderr: float
    gradient_norm: float
    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: bool
    products: int
    state: str = ""
    note: str = ""

    @property
    def times_null(self) -> float:
        """How many times the share of a random direction it is."""
        return self.share / self.null


def gradient_share(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    k: int = 10,
    *,
    parameters: Iterable[str | nn.Parameter] | None = None,
    kind: str = "hessian",
    largest: str = "algebraic",
    tolerance: float = 1e-6,
    seed: int = 0,
) -> GradientShare:
    """Return the share of the gradient in the space of the top k eigenvectors.

    `|P_k g|^2 / |g|^2`, with g the gradient of the mean loss over the same batches and parameters
    as the matrix. A random direction has k/n. Gur-Ari et al. 2018 find that after a short while of
    training most of the gradient lies in the space of about as many eigenvectors as classes;
    Ghorbani et al. 2019 find that batch normalization lowers that share.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        k: eigenvectors.
        parameters: as for `hessian`.
        kind: of the matrix, `hessian` or `gauss-newton`.
        largest: which end, as for `top_eigenpairs`; `algebraic` are the largest with their sign.
        tolerance: relative residual of the pairs. An error of the space of the size of residual
            over gap changes the share by as much.
        seed: of the starting vectors.

    Raises:
        InputError: as for `hessian`, or k is more than n.
        NumericalError: the gradient holds NaN or infinity.

    >>> from hawqkit.curvature.objective import squared_error
    >>> net = nn.Linear(3, 1, bias=False).double().eval()
    >>> _ = nn.init.ones_(net.weight)
    >>> x = torch.diag(torch.tensor([3.0, 1.0, 1.0])).double()
    >>> found = gradient_share(net, squared_error(), [(x, torch.zeros(3, 1).double())], k=1)
    >>> round(found.share, 4), round(found.null, 4)  # g = (9, 1, 1) / 3
    (0.9759, 0.3333)
    """
    chosen = choose_parameters(model, parameters)
    make = hessian if check_kind(kind) == "hessian" else gauss_newton
    # A list, since an iterable of names or parameters may be walked through once only.
    operator = make(model, objective, batches, parameters=list(chosen.names))
    g = mean_gradient(refuse_unknown(model), objective, Batches(batches), chosen)
    norm = float(norms(g[None])[0])
    if not math.isfinite(norm):
        raise NumericalError(
            f"the gradient of the mean loss has norm {norm}; check the batches and the weights, "
            "or run the model in float32."
        )
    pairs = top_eigenpairs(operator, k, largest=largest, tolerance=tolerance, seed=seed)
    along = inner(pairs.vectors.T, g[None].to(pairs.vectors.dtype))[:, 0]  # (k,)
    shares = (along / norm) ** 2 if norm > 0 else torch.full_like(along, math.nan)
    notes = [pairs.note] if pairs.note else []
    if norm == 0:
        notes.append("the gradient is zero, so no share of it is defined")
    n = operator.size
    return GradientShare(
        share=float(shares.sum()),
        shares=tuple(shares.tolist()),
        k=k,
        size=n,
        null=k / n,
        null_stderr=math.sqrt(2 * k * (n - k) / (n**2 * (n + 2))),
        gradient_norm=norm,
        values=tuple(pairs.values.tolist()),
        residuals=tuple(pairs.residuals.tolist()),
        converged=bool(pairs.converged.all()),
        products=pairs.products,
        note="; ".join(notes),
    )


def gradient_shares(
    model: nn.Module | LoadedModel,
    objective: Objective,
    batches: Iterable[Any],
    checkpoints: Iterable[State] | Mapping[str, State],
    k: int = 10,
    *,
    parameters: Iterable[str | nn.Parameter] | None = None,
    **options: Any,
) -> list[GradientShare]:
    """Return `gradient_share` of every checkpoint of a training run, in their order.

    Each is copied into the model, measured, and at the end, or after an error, the model's own
    weights and buffers are put back bit for bit. One checkpoint is held at a time if `checkpoints`
    makes them one by one.

    Args:
        model: a network in eval mode.
        objective: the loss.
        batches: as for `hessian`.
        checkpoints: state dictionaries or paths of safetensors files; or name -> one of these.
        k: as for `gradient_share`.
        parameters: as for `hessian`.
        options: `kind`, `largest`, `tolerance` and `seed` of `gradient_share`.

    Raises:
        DataError: there is no checkpoint, or a file cannot be read.
        InputError: as for `gradient_share`.
        StateMismatch: a checkpoint is of another model, or holds more digits than the model can.
    """
    module = refuse_unknown(model)
    names = list(choose_parameters(model, parameters).names)
    found = []
    with _own_state_kept(module):
        for name, state in _named(checkpoints):
            _load(module, state, name)
            share = gradient_share(model, objective, batches, k, parameters=names, **options)
            found.append(replace(share, state=name))
    if not found:
        raise DataError("checkpoints: there is none; give state dictionaries or their files.")
    return found


def _named(checkpoints: Iterable[State] | Mapping[str, State]) -> Iterator[tuple[str, State]]:
    if isinstance(checkpoints, (str, Path)) or (
        isinstance(checkpoints, Mapping)
        and any(isinstance(value, Tensor) for value in checkpoints.values())
    ):
        raise InputError(
            "checkpoints: got a single one; give a list of them, or a mapping name -> checkpoint."
        )
    if isinstance(checkpoints, Mapping):
        yield from checkpoints.items()
        return
    for number, state in enumerate(checkpoints):
        yield str(state) if isinstance(state, (str, Path)) else str(number), state


@contextmanager
def _own_state_kept(module: nn.Module) -> Iterator[None]:
    """Put weights and buffers back as they were, whatever happens inside."""
    kept = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)


def _load(module: nn.Module, state: State, name: str) -> None:
    """Copy a checkpoint into the model, all of it or nothing.

    Raises:
        DataError: the file cannot be read.
        StateMismatch: names, shapes or dtypes do not fit.
    """
    if isinstance(state, (str, Path)):
        try:
            state = load_file(state)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{state}: cannot be read as safetensors ({error}); give files that "
                "safetensors.torch.save_file or save_pretrained wrote."
            ) from error
    if not isinstance(state, Mapping):
        raise InputError(
            f"checkpoint {name!r}: got {type(state).__name__}; give a state dictionary or the path "
            "of a safetensors file."
        )
    own = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    for key, value in state.items():
        _refuse_unfit(name, key, value, own)
    # Files hold tensors that several names share once only.
    given = {own[key].data_ptr() for key in state}
    missing = [key for key, t in own.items() if key not in state and t.data_ptr() not in given]
    if missing:
        raise StateMismatch(
            f"checkpoint {name!r}: holds no {missing[0]!r}"
            + (f", nor {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; a whole state of this model is needed, buffers too."
        )
    with torch.no_grad():
        for key, value in state.items():
            own[key].copy_(value)


def _refuse_unfit(name: str, key: str, value: object, own: Mapping[str, Tensor]) -> None:
    if key not in own:
        raise StateMismatch(
            f"checkpoint {name!r}: holds {key!r}, which the model has not."
            + did_you_mean(key, list(own))
        )
    mine = own[key]
    if not isinstance(value, Tensor):
        raise StateMismatch(
            f"checkpoint {name!r}: {key!r} is {type(value).__name__} and no tensor."
        )
    if value.shape != mine.shape:
        raise StateMismatch(
            f"checkpoint {name!r}: {key!r} has shape {tuple(value.shape)}, the model's has "
            f"{tuple(mine.shape)}."
        )
    if torch.promote_types(value.dtype, mine.dtype) != mine.dtype:
        raise StateMismatch(
            f"checkpoint {name!r}: {key!r} is {value.dtype}, and the model's {mine.dtype} cannot "
            "hold it without rounding; convert the model, or the checkpoint."
        )
