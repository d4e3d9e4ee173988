"""Eigenpairs as safetensors: one tensor for each eigenvector and block, under the block's name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hawqkit.errors import InputError, StateMismatch
from hawqkit.estimators.eigenpairs import Eigenpairs
from hawqkit.store import share


def save_eigenpairs(
    path: str | Path,
    pairs: Eigenpairs,
    blocks: Mapping[str, slice] | None = None,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    fingerprint: str = "",
) -> Path:
    """Write eigenpairs: `eigenvalues`, `residuals`, `converged`, and `0/NAME`, `1/NAME`, ... .

    `i/NAME` is the part of eigenvector i that belongs to the parameter NAME. The file is written
    beside its place and renamed; nothing is copied in memory.

    Args:
        path: of the file.
        pairs: what to write.
        blocks: name -> rows of the vectors; None takes the pairs' own.
        shapes: name -> shape of the parameter; those without stay flat.
        fingerprint: of what they were measured with.

    Raises:
        InputError: the blocks do not cover the vectors, or a shape does not fit its block.
    """
    path = Path(path)
    blocks, shapes = dict(pairs.blocks if blocks is None else blocks), dict(shapes or {})
    _check_blocks(blocks, shapes, len(pairs.vectors))
    tensors = {
        "eigenvalues": torch.from_numpy(np.ascontiguousarray(pairs.values)),
        "residuals": torch.from_numpy(np.ascontiguousarray(pairs.residuals)),
        "converged": torch.from_numpy(np.ascontiguousarray(pairs.converged)),
    }
    for i in range(pairs.vectors.shape[1]):
        for name, place in blocks.items():
            part = pairs.vectors[place, i].contiguous()
            tensors[f"{i}/{name}"] = part.reshape(shapes.get(name, part.shape))
    facts = {
        "blocks": {name: [place.start, place.stop] for name, place in blocks.items()},
        "fingerprint": fingerprint,
        "largest": pairs.largest,
        "note": pairs.note,
        "products": pairs.products,
        "tolerance": pairs.tolerance,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"hawqkit": json.dumps(facts, sort_keys=True)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        share(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_eigenpairs(path: str | Path) -> tuple[Eigenpairs, str]:
    """Read what `save_eigenpairs` wrote: the pairs and the fingerprint.

    Raises:
        InputError: there is no such file.
        StateMismatch: it is damaged, or not a file of eigenpairs.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; save_eigenpairs writes it.")
    try:
        with safe_open(str(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["hawqkit"])
            values = file.get_tensor("eigenvalues").numpy()
            residuals = file.get_tensor("residuals").numpy()
            converged = file.get_tensor("converged").numpy()
            blocks = {name: slice(*ends) for name, ends in facts["blocks"].items()}
            size = max(place.stop for place in blocks.values())
            dtype = file.get_tensor(f"0/{next(iter(blocks))}").dtype
            rows = torch.empty(len(values), size, dtype=dtype)
            for i in range(len(values)):
                for name, place in blocks.items():
                    rows[i, place] = file.get_tensor(f"{i}/{name}").flatten()
            return Eigenpairs(
                values,
                residuals,
                rows.T,
                converged,
                int(facts["products"]),
                float(facts["tolerance"]),
                str(facts["largest"]),
                blocks,
                str(facts["note"]),
            ), str(facts["fingerprint"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise StateMismatch(
            f"{path}: cannot be read as eigenpairs ({error}); measure them again."
        ) from error


def _check_blocks(
    blocks: Mapping[str, slice], shapes: Mapping[str, tuple[int, ...]], size: int
) -> None:
    end = 0
    for name, place in blocks.items():
        if place.start != end:
            raise InputError(
                f"blocks: {name!r} starts at {place.start}, the one before it ends at {end}; "
                "they must follow each other."
            )
        end = place.stop
        numel = place.stop - place.start
        if name in shapes and int(np.prod(shapes[name])) != numel:
            raise InputError(
                f"shapes: {name!r} has {numel} entries, which {shapes[name]} does not hold."
            )
    if end != size:
        raise InputError(f"blocks: they end at {end}, the vectors have {size} entries.")
