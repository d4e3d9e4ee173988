"""The steps of tuning: loss, gradient through the rounding, optimizer, checkpoint.

The loss of a step is the sum over the predictions of its whole batch, divided once by their number:
neither micro-batches nor processes change it, but for rounding. Gradients are summed over processes
by hand and not by DistributedDataParallel, which averages over processes, whatever the number of
predictions in each, and stops where a branch of the network is not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit import distributed
from hawqkit.errors import NumericalError
from hawqkit.journal import Journal
from hawqkit.models.batch import Data, predictions
from hawqkit.tuning.batch_norms import re_estimate
from hawqkit.tuning.checkpoints import Curve, new_curve, restore, save
from hawqkit.tuning.losses import counted_logits, summed_loss
from hawqkit.tuning.order import Order
from hawqkit.tuning.settings import TuneSettings, rate, step_count
from hawqkit.tuning.student import Student

Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

# Of a forward pass, unless `micro_batch` says otherwise.
_TOKENS, _EXAMPLES = 4096, 64


@dataclass(slots=True)
class Trainer:
    """One run over the data.

    Attributes:
        student: what is trained.
        teacher: the original, None where it does not teach.
        data: examples; those that are withheld do not train.
        settings: how to train.
        device: that both networks lie on.
        journal: where checkpoints go, None for none.
        track: shows progress over steps.
    """

    student: Student
    teacher: nn.Module | None
    data: Data
    settings: TuneSettings
    device: torch.device
    journal: Journal | None
    track: Track | None = None

    def run(self) -> Curve:
        """Make all steps that are left, and return loss, learning rate and gradient norm of each.

        Raises:
            NumericalError: the loss or the gradient is not finite; says at which step, and which
                checkpoint stands.
            DataError: a label lies outside the classes.
        """
        rows = torch.nonzero(~self.data.withheld)[:, 0].tolist()
        order = Order(rows, batch=self.settings.batch, seed=self.settings.seed)
        if self.settings.learns_inputs and self.settings.start == "lsq":
            self.student.begin_as_lsq(self.data, self._parts(order(0)))
        trained = self.student.trained()
        optimizer = make_optimizer(trained, self.settings)
        curve, steps = new_curve(), step_count(self.settings, len(rows))
        module = self.student.module
        done = 0
        if self.journal is not None:
            done = restore(self.journal, trained, module, optimizer, curve)
        if done == 0:
            self._settle(order)
        left: Iterable[int] = range(done, steps)
        for step in self.track(left, "tune", steps - done) if self.track else left:
            self._step(step, steps, order(step), trained, optimizer, curve)
            last = step + 1 == steps
            if last or order.ends_epoch(step):
                self._settle(order)
            kept = last or (step + 1) % self.settings.checkpoint_every == 0
            if self.journal is not None and kept:
                save(self.journal, step + 1, trained, module, optimizer, curve)
        return curve

    def _step(
        self,
        step: int,
        steps: int,
        rows: Sequence[int],
        trained: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        curve: Curve,
    ) -> None:
        learning_rate = rate(self.settings, step, steps)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.zero_grad(set_to_none=True)
        loss = self._loss(rows)
        self.student.pull()
        parameters = list(trained.values())
        distributed.sum_gradients(parameters)
        norm = _gradient_norm(parameters)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NumericalError(self._not_finite(step, loss, norm, learning_rate))
        if self.settings.clip is not None and norm > self.settings.clip:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.settings.clip / norm)
        optimizer.step()
        self.student.hold()
        for name, value in zip(curve, (loss, learning_rate, norm), strict=True):
            curve[name].append(value)

    def _loss(self, rows: Sequence[int]) -> float:
        """Return the mean loss of a batch over all processes; gradients gather in the student."""
        batches = [self.data.micro_batch(part) for part in self._parts(rows)]
        count = sum(int(batch.predicts.sum()) for batch in batches)
        self.student.round()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for batch in distributed.processes().mine(batches):
            logits, labels = counted_logits(
                predictions(self.student.module, batch, self.device), batch
            )
            loss = summed_loss(logits, labels, self._taught(batch), self.settings.distillation)
            torch.autograd.backward(loss / count)
            total += loss.detach()
        return float(distributed.reduce_sum(total)) / count

    @torch.no_grad()
    def _taught(self, batch: Any) -> Tensor | None:
        if self.teacher is None:
            return None
        return counted_logits(predictions(self.teacher, batch, self.device), batch)[0]

    def _parts(self, rows: Sequence[int]) -> list[Sequence[int]]:
        """Cut a batch into micro-batches; never into fewer than there are processes."""
        share = -(-len(rows) // distributed.processes().count)
        size = self.settings.micro_batch
        if size is None:
            size = min(_EXAMPLES, max(1, _TOKENS // max(self.data.facts.length, 1)))
        size = min(size, share)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _settle(self, order: Order) -> None:
        """Measure the statistics of batch norms again, if the settings say so."""
        if self.settings.batch_norm == "re-estimated":
            self.student.round()
            re_estimate(self.student.module, self.data, order.rows, self.device)

    def _not_finite(self, step: int, loss: float, norm: float, learning_rate: float) -> str:
        kept = self.journal.numbers() if self.journal is not None else []
        where = (
            f"The checkpoint after step {kept[-1]} stands in {self.journal.folder}."
            if self.journal is not None and kept
            else "There is no checkpoint yet."
        )
        return (
            f"tune: at step {step + 1} the loss is {loss:g} and the norm of the gradient {norm:g}, "
            f"with a learning rate of {learning_rate:g}; training has diverged. Lower "
            "tune.learning_rate, set tune.clip (1.0, say), or give it more warmup, and tune into a "
            f"folder without checkpoints. {where}"
        )


def make_optimizer(
    trained: dict[str, nn.Parameter], settings: TuneSettings
) -> torch.optim.Optimizer:
    """Return the optimizer; weight decay falls on matrices and kernels alone.

    Biases, norms and scales are not decayed: they do not grow with the width of a layer, and a
    decayed scale would shrink its grid whatever the loss says.
    """
    matrices = [p for n, p in trained.items() if n.startswith("parameter/") and p.ndim > 1]
    chosen = {id(p) for p in matrices}
    others = [p for p in trained.values() if id(p) not in chosen]
    groups = [
        {"params": some, "weight_decay": decay}
        for some, decay in ((matrices, settings.weight_decay), (others, 0.0))
        if some
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.learning_rate)


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    norms = [p.grad.norm(dtype=torch.float64) for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
