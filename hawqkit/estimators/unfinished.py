"""The state of Lanczos draws under way, in a file, so that a killed draw goes on where it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hawqkit.errors import StateMismatch
from hawqkit.estimators.lanczos import Lanczos
from hawqkit.store import read_arrays, write_arrays

NAME = "unfinished.safetensors"


def write_unfinished(folder: Path, fingerprint: str, group: list[int], run: Lanczos) -> None:
    """Keep the two vectors and the coefficients of draws under way."""
    arrays = {
        "current": run.current.cpu().numpy(),
        "previous": run.previous.cpu().numpy(),
        "alphas": run.alphas,
        "betas": run.betas,
        "running": run.running,
    }
    write_arrays(folder / NAME, arrays, _of(fingerprint, group))


def read_unfinished(folder: Path, fingerprint: str, group: list[int], run: Lanczos) -> bool:
    """Put the state that a folder holds into a run of the same draws; say whether there was one.

    A state that is damaged, or of other draws, is left alone: the draws begin anew.
    """
    try:
        arrays, metadata = read_arrays(folder / NAME)
    except StateMismatch:
        return False
    if {k: metadata.get(k) for k in ("fingerprint", "draws")} != _of(fingerprint, group):
        return False
    like = run.current
    run.current = torch.from_numpy(arrays["current"]).to(like.device, like.dtype)
    run.previous = torch.from_numpy(arrays["previous"]).to(like.device, like.dtype)
    run.alphas = np.asarray(arrays["alphas"], dtype=np.float64)
    run.betas = np.asarray(arrays["betas"], dtype=np.float64)
    run.running = np.asarray(arrays["running"], dtype=bool)
    return True


def remove_unfinished(folder: Path) -> None:
    """Forget the state: its draws are written down."""
    (folder / NAME).unlink(missing_ok=True)


def _of(fingerprint: str, group: list[int]) -> dict[str, str]:
    return {"fingerprint": fingerprint, "draws": ",".join(map(str, group))}
