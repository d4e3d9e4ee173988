"""One diagonal block measured: the top of its spectrum pair by pair, the rest by quadrature.

Letters: n dimensions, k pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hawqkit.curvature.operator import MatrixOperator, SymmetricOperator
from hawqkit.errors import InputError, StateMismatch
from hawqkit.estimators.densities import density
from hawqkit.estimators.effective_ranks import power_law_of, ranks_of, statistics_of
from hawqkit.estimators.eigenpair_files import read_eigenpairs, save_eigenpairs
from hawqkit.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from hawqkit.estimators.noise import noise_floor
from hawqkit.estimators.ranks import DENSE_UP_TO, PAIRS, TOLERANCE, dense_spectrum
from hawqkit.records import BlockSpectrum, Density, Eigenvalues
from hawqkit.store import Arrays, fingerprint

Shapes = Mapping[str, tuple[int, ...]]

# What the basis of Lanczos vectors may take. A constant and not a share of the free memory: the
# number of pairs, and with it the record, must not depend on the machine.
BASIS_BYTES = 8 << 30


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """How a block is measured.

    Attributes:
        top: eigenpairs of largest magnitude; fewer where a block has fewer dimensions.
        steps: Lanczos steps of a draw.
        draws: starting vectors of the quadrature.
        seed: of all random vectors.
    """

    top: int = 10
    steps: int = 60
    draws: int = 10
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredBlock:
    """A block as it was measured; thresholds and statistics are made from it afterwards.

    Attributes:
        density: known eigenvalues and raw tridiagonals.
        top: eigenvalues of largest magnitude, without their vectors.
        floor: noise floor of the products.
        products: that were spent.
        notes: of the products, and of what was asked for and could not be had.
    """

    density: Density
    top: Eigenvalues | None
    floor: float
    products: int
    notes: tuple[str, ...]


def measure_block(
    operator: SymmetricOperator,
    settings: BlockSettings,
    *,
    folder: Path | None = None,
    facts: Mapping[str, Any] | None = None,
    shapes: Shapes | None = None,
) -> MeasuredBlock:
    """Measure a spectrum: noise floor, top eigenpairs, and the density of what is left.

    Up to 2,048 dimensions the matrix is multiplied out and all eigenvalues are found densely.

    Args:
        operator: the block.
        settings: how.
        folder: keeps eigenvectors, finished draws and the one under way; a run that finds them goes
            on there, to the same bits.
        facts: what the operator depends on, compared with those of the folder.
        shapes: of the parameters, for the eigenvectors' file.

    Raises:
        StateMismatch: the folder is of something else.
        NumericalError: a product is not finite.
    """
    facts = dict(facts or {})
    before = operator.products
    floor = noise_floor(operator, seed=settings.seed)
    # Counted, and not read off the operator at the end: a resumed run reports what an unbroken one
    # does.
    spent = operator.products - before
    notes: list[str] = []
    if operator.size <= DENSE_UP_TO:
        pairs, spectrum = _dense(operator, settings)
        if folder is not None and pairs is not None:
            save_eigenpairs(folder / PAIRS, pairs, shapes=shapes, fingerprint=_print(facts))
    else:
        pairs = _pairs(operator, settings, folder, facts, shapes, notes)
        spectrum = density(
            operator,
            steps=settings.steps,
            draws=settings.draws,
            seed=settings.seed,
            deflated=pairs,
            folder=folder,
            facts=facts,
        )
    found = pairs.record() if pairs is not None else None
    spent += spectrum.products
    return MeasuredBlock(spectrum, found, floor, spent, (*operator.notes, *notes))


def summarize_block(
    name: str, block: int | None, measured: MeasuredBlock, eps: Sequence[float]
) -> BlockSpectrum:
    """Return what a measured block says about rank, at these thresholds.

    A threshold below the noise floor of the products is lifted to it, and the notes say so.

    Args:
        name: of the layer.
        block: of the transformer, None outside.
        measured: from `measure_block`.
        eps: thresholds of |lambda|.
    """
    spectrum = measured.density
    ranks = ranks_of(spectrum, eps, noise_floor=measured.floor)
    nodes, weights = spectrum.nodes_and_weights()
    seen = np.concatenate([spectrum.known, nodes[weights > 0]])
    notes = list(measured.notes)
    for asked, used in zip(ranks.asked, ranks.eps, strict=True):
        if used > asked:
            notes.append(
                f"eps {asked:.3g} was lifted to {used:.3g}, the measured noise floor of the "
                "products: smaller eigenvalues cannot be told from zero"
            )
    one_draw = spectrum.draws == 1
    if one_draw:
        notes.append("one draw gives no error bar for effective ranks: they are left out")
    return BlockSpectrum(
        name=name,
        block=block,
        size=spectrum.size,
        method=spectrum.method,
        top=measured.top,
        ranks=ranks,
        statistics=None if one_draw else statistics_of(spectrum),
        smallest=float(seen.min()),
        products=measured.products,
        notes=tuple(dict.fromkeys(notes)),
        power_law=power_law_of(spectrum),
    )


def pack_block(measured: MeasuredBlock) -> Arrays:
    """Return a measured block as arrays for a journal."""
    plain = {
        "top": None if measured.top is None else asdict(measured.top),
        "floor": measured.floor,
        "products": measured.products,
        "notes": list(measured.notes),
    }
    text = np.frombuffer(json.dumps(plain).encode(), dtype=np.uint8)
    return {**measured.density.to_arrays(), "block": text}


def unpack_block(arrays: Arrays) -> MeasuredBlock:
    """Return what `pack_block` took apart."""
    plain = json.loads(np.asarray(arrays["block"], dtype=np.uint8).tobytes())
    top = plain["top"]
    if top is not None:
        top |= {name: tuple(top[name]) for name in ("values", "residuals", "converged")}
    return MeasuredBlock(
        Density.from_arrays(arrays),
        None if top is None else Eigenvalues(**top),
        float(plain["floor"]),
        int(plain["products"]),
        tuple(plain["notes"]),
    )


def affordable_pairs(size: int, wanted: int, item_bytes: int) -> int:
    """Return how many eigenpairs the basis of Lanczos vectors has room for.

    A run for k pairs holds at least 2 k + 6 vectors: the basis, k that are given back, a product.

    >>> affordable_pairs(1000, 10, 4), affordable_pairs(135_000_000, 10, 4)
    (10, 4)
    """
    vectors = BASIS_BYTES // (size * item_bytes)
    return max(0, min(wanted, size, (vectors - 6) // 2))


def check_settings(settings: BlockSettings, eps: Sequence[float]) -> None:
    """Refuse what no measurement could give.

    Raises:
        InputError: a count or a threshold is out of its range.
    """
    least = {"top": 0, "steps": 1, "draws": 1, "seed": 0}
    for name, low in least.items():
        if getattr(settings, name) < low:
            raise InputError(f"{name}: must be {low} or more; got {getattr(settings, name)}.")
    if not eps or not all(np.isfinite(e) and e > 0 for e in eps):
        raise InputError(f"eps: thresholds must be positive numbers; got {list(eps)}.")


def _dense(
    operator: SymmetricOperator, settings: BlockSettings
) -> tuple[Eigenpairs | None, Density]:
    """Multiply the matrix out, and return its top pairs and all of its eigenvalues."""
    A = operator.dense().to("cpu", torch.float64)
    A = (A + A.T) / 2
    spectrum = dense_spectrum(MatrixOperator(A), seed=settings.seed)
    k = min(settings.top, operator.size)
    if k == 0:
        return None, spectrum
    values, vectors = np.linalg.eigh(A.numpy())
    chosen = np.argsort(-np.abs(values), kind="stable")[:k]
    values, V = values[chosen], torch.from_numpy(vectors[:, chosen].copy())
    residuals = torch.linalg.vector_norm(A @ V - V * torch.from_numpy(values), dim=0).numpy()
    return Eigenpairs(
        values=values,
        residuals=residuals,
        vectors=V,
        converged=np.ones(k, dtype=bool),
        products=operator.size,
        tolerance=TOLERANCE,
        largest="magnitude",
        blocks=dict(operator.blocks),
    ), spectrum


def _pairs(
    operator: SymmetricOperator,
    settings: BlockSettings,
    folder: Path | None,
    facts: Mapping[str, Any],
    shapes: Shapes | None,
    notes: list[str],
) -> Eigenpairs | None:
    """Return the pairs that a folder holds, or find and keep them."""
    item = torch.empty(0, dtype=torch.promote_types(operator.dtype, torch.float32)).element_size()
    k = affordable_pairs(operator.size, settings.top, item)
    if k < settings.top:
        notes.append(
            f"{k} of {settings.top} eigenpairs were measured: the vectors of more would take above "
            f"{BASIS_BYTES / 2**30:.0f} GiB"
        )
    if k == 0:
        return None
    path = folder / PAIRS if folder is not None else None
    if path is not None and path.exists():
        try:
            pairs, found = read_eigenpairs(path)
        except StateMismatch:
            path.unlink()  # damaged: they are found again, to the same bits
        else:
            if found == _print(facts):
                return pairs
            raise StateMismatch(
                f"{path}: holds eigenpairs of another operator or other settings. Choose another "
                "folder, or remove this one to measure again."
            )
    pairs = top_eigenpairs(
        operator, k, tolerance=TOLERANCE, seed=settings.seed, memory_bytes=BASIS_BYTES
    )
    if path is not None:
        save_eigenpairs(path, pairs, shapes=shapes, fingerprint=_print(facts))
    return pairs


def _print(facts: Mapping[str, Any]) -> str:
    return fingerprint({**facts, "eigenpairs": True})
