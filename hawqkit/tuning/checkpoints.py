"""Checkpoints of a tuning run: everything that changes, in one file that appears at once.

A checkpoint holds the parameters, buffers and learned steps, the optimizer's state, and the curve
so far, under the number of steps that led there. The learning rate and the order of examples are
functions of the step and of settings that guard the folder: there is no other state, and none of a
random generator.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from hawqkit import distributed
from hawqkit.journal import Journal
from hawqkit.store import Arrays

KEPT = 2  # the newest ones: should the disk damage one, the one before it still stands
CURVE = ("loss", "learning_rate", "gradient_norm", "cross_entropy", "accuracy")
_MORE = "more/"
Curve = dict[str, list[float]]


def new_curve() -> Curve:
    """Return an empty curve."""
    return {name: [] for name in CURVE}


def save(
    journal: Journal,
    step: int,
    trained: Mapping[str, nn.Parameter],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    curve: Curve,
    more: Arrays | None = None,
) -> None:
    """Write a checkpoint in the main process, and drop all but the newest ones.

    Args:
        journal: the folder, guarded by what the run depends on.
        step: steps that were made.
        trained: name -> what the optimizer changes.
        module: its buffers are kept too.
        optimizer: its state.
        curve: of all steps so far.
        more: arrays that `restore` returns.
    """
    if distributed.processes().is_main:
        arrays = {name: _array(p) for name, p in trained.items()}
        arrays |= {f"buffer/{n}": _array(b) for n, b in _buffers(module).items()}
        for name, parameter in trained.items():
            state = optimizer.state.get(parameter, {})
            known = {kind: value for kind, value in state.items() if value is not None}
            arrays |= {f"optimizer/{kind}/{name}": _array(v) for kind, v in known.items()}
        arrays |= {f"curve/{name}": np.array(curve[name], dtype=np.float64) for name in CURVE}
        arrays |= {f"{_MORE}{name}": array for name, array in (more or {}).items()}
        journal.write(step, arrays)
        for old in journal.numbers()[:-KEPT]:
            journal.drop(old)
    distributed.wait()


@torch.no_grad()
def restore(
    journal: Journal,
    trained: Mapping[str, nn.Parameter],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    curve: Curve,
) -> tuple[int, Arrays]:
    """Go back to the newest sound checkpoint, in every process.

    Args:
        journal: the folder.
        trained: name -> what the optimizer changes; is written to.
        module: its buffers are written to.
        optimizer: gets its state back.
        curve: is filled.

    Returns:
        its steps, 0 if there is none, and the further arrays that it was given.
    """
    found: tuple[int, Arrays] | None = None
    if distributed.processes().is_main:
        found = _newest(journal)
    step = distributed.gather(0 if found is None else found[0])[0]
    if step == 0:
        return 0, {}
    arrays = journal.read(step) if found is None else found[1]
    assert arrays is not None
    for name, parameter in trained.items():
        parameter.copy_(_tensor(arrays[name], parameter))
    for name, buffer in _buffers(module).items():
        buffer.copy_(_tensor(arrays[f"buffer/{name}"], buffer))
    for key, array in arrays.items():
        if key.startswith("optimizer/"):
            _, kind, name = key.split("/", 2)
            parameter = trained[name]
            # AdamW counts its steps in a number of its own, on the CPU.
            counter = torch.zeros(()) if kind == "step" else parameter
            optimizer.state[parameter][kind] = _tensor(array, counter).to(counter.device)
    for name in CURVE:
        curve[name][:] = arrays[f"curve/{name}"].tolist()
    return int(step), {
        key.removeprefix(_MORE): array for key, array in arrays.items() if key.startswith(_MORE)
    }


def _newest(journal: Journal) -> tuple[int, Arrays] | None:
    for step in reversed(journal.numbers()):
        arrays = journal.read(step)
        # One of before the whole curve was kept does not count: training begins anew.
        if arrays is not None and all(f"curve/{name}" in arrays for name in CURVE):
            return step, arrays
    return None


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that a state holds; others are made by the network itself."""
    held = module.state_dict()
    return {name: b for name, b in module.named_buffers() if name in held}


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    """Return an array in the shape of a tensor: files hold a number as an array of one."""
    return torch.from_numpy(array.copy()).reshape(like.shape)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().numpy()
    return array
