"""The only place that knows Accelerate: how many processes there are, and how their results meet.

The model is not wrapped in DistributedDataParallel. Measuring needs no gradient of a weight: each
process takes its own micro-batches, and only scalars are gathered. Tuning sums gradients itself,
for reasons that `tuning.training` gives.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among its peers."""

    index: int
    count: int
    device: str

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and draws progress."""
        return self.index == 0

    def mine(self, items: Iterable[Item]) -> Iterator[Item]:
        """Return this process's share: every count-th item, beginning with its own index."""
        return (item for i, item in enumerate(items) if i % self.count == self.index)


def launched() -> bool:
    """Whether a launcher (torchrun, accelerate launch) started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes() -> Processes:
    """Return this process among its peers; joins the process group on the first call.

    On CPU a launcher needs `ACCELERATE_USE_CPU=true`; without one there is a single process and
    Accelerate is not even imported.
    """
    if not launched():
        return Processes(0, 1, default_device())
    from accelerate import PartialState

    # PartialState does not read ACCELERATE_USE_CPU itself, and without `cpu` it stays one process.
    state = PartialState(cpu=_on_cpu())
    return Processes(state.process_index, state.num_processes, str(state.device))


def _on_cpu() -> bool:
    asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on")
    return asked or not torch.accelerator.is_available()


def default_device() -> str:
    """Return the accelerator's device if there is one, else `cpu`."""
    if torch.accelerator.is_available():
        return str(torch.accelerator.current_accelerator())
    return "cpu"


def gather(item: Any) -> list[Any]:
    """Return every process's item, in the order of processes, to all of them.

    Items are plain Python and numpy objects of our own processes.
    """
    if not launched():
        return [item]
    from accelerate.utils import gather_object

    return list(gather_object([item]))


def reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of every process's tensor, to all of them; the tensor itself if there is one.

    All must call it, with the same shape and dtype.
    """
    if not launched():
        return tensor
    # Memory is summed as it lies, and one process may hold a transposed view, another may not.
    total = torch.clone(tensor.detach(), memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace every parameter's gradient by the sum over processes, in place.

    A parameter that has no gradient in one process counts as zero there; one that has none anywhere
    keeps none, so that an optimizer passes over it. All must call it, with the same parameters.
    """
    if not launched() or not parameters:
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters])
    everywhere = reduce_sum(there.to(parameters[0].device)).tolist()
    used = [p for p, count in zip(parameters, everywhere, strict=True) if count]
    for kind in dict.fromkeys(p.dtype for p in used):
        some = [p for p in used if p.dtype == kind]
        flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in some]
        total = reduce_sum(torch.cat(flat))
        for parameter, part in zip(
            some, torch.split(total, [p.numel() for p in some]), strict=True
        ):
            parameter.grad = part.view_as(parameter)


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Return the main process's tensor, to all of them.

    All must call it, with the same shape and dtype; what the others give is overwritten.
    """
    if launched():
        torch.distributed.broadcast(tensor, src=0)
    return tensor


def wait() -> None:
    """Wait until every process is here."""
    if launched():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def finish() -> None:
    """Leave the process group in order; a group alive at exit can abort the process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
