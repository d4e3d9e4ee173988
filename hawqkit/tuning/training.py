"""The steps of tuning: loss, gradient through the rounding, optimizer, checkpoint.

The loss of a step is the sum over the predictions of its whole batch, divided once by their number:
neither micro-batches nor processes change it, but for rounding. Gradients are summed over processes
by hand and not by DistributedDataParallel, which averages over processes, whatever the number of
predictions in each, and stops where a branch of the network is not used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

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
from hawqkit.tuning.watching import Watch, watched_steps

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
        watch: measures the loss on held-out data along the way, None for no such data.
    """

    student: Student
    teacher: nn.Module | None
    data: Data
    settings: TuneSettings
    device: torch.device
    journal: Journal | None
    track: Track | None = None
    watch: Watch | None = None

    def run(self) -> Curve:
        """Make all steps that are left, and return the curve over all of them.

        Raises:
            NumericalError: the loss or the gradient is not finite; says at which step, and which
                checkpoint stands.
            DataError: a label lies outside the classes.
        """
        order, trained, optimizer = self._begin()
        curve, steps = new_curve(), step_count(self.settings, len(order.rows))
        module = self.student.module
        done = 0
        if self.journal is not None:
            done, kept = restore(self.journal, trained, module, optimizer, curve)
            if self.watch is not None:
                self.watch.restore(kept)
        if done == 0:
            self._settle(order)
            self._watch(0, steps)
        left: Iterable[int] = range(done, steps)
        for step in self.track(left, "tune", steps - done) if self.track else left:
            self._step(step, steps, order(step), trained, optimizer, curve)
            last = step + 1 == steps
            if last or order.ends_epoch(step):
                self._settle(order)
            self._watch(step + 1, steps)
            due = last or (step + 1) % self.settings.checkpoint_every == 0
            if self.journal is not None and due:
                more = self.watch.to_arrays() if self.watch is not None else None
                save(self.journal, step + 1, trained, module, optimizer, curve, more)
        return curve

    def rehearse(self) -> tuple[float, float, float]:
        """Return the seconds of batch norms, of a step, and of held-out data, each once.

        Two steps are made, and the second is timed: the first also pays for fresh memory and the
        state of the optimizer. The student is changed, nothing is written.
        """
        order, trained, optimizer = self._begin()
        steps, curve = step_count(self.settings, len(order.rows)), new_curve()
        clock = [time.perf_counter()]
        self._settle(order)
        clock.append(time.perf_counter())
        self._step(0, steps, order(0), trained, optimizer, curve)
        clock.append(time.perf_counter())
        self._step(0, steps, order(1), trained, optimizer, curve)
        clock.append(time.perf_counter())
        self._watch(steps, steps)
        clock.append(time.perf_counter())
        settle, _, step, watch = (b - a for a, b in pairwise(clock))
        return settle, step, watch

    def _begin(self) -> tuple[Order, dict[str, nn.Parameter], torch.optim.Optimizer]:
        """Return the order of examples, what is trained, and what trains it."""
        rows = torch.nonzero(~self.data.withheld)[:, 0].tolist()
        order = Order(rows, batch=self.settings.batch, seed=self.settings.seed)
        if self.settings.learns_inputs and self.settings.start == "lsq":
            self.student.begin_as_lsq(self.data, self._parts(order(0)))
        trained = self.student.trained()
        return order, trained, make_optimizer(trained, self.settings)

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
        loss, entropy, accuracy = self._loss(rows)
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
        values = (loss, learning_rate, norm, entropy, accuracy)
        for name, value in zip(curve, values, strict=True):
            curve[name].append(value)

    def _loss(self, rows: Sequence[int]) -> tuple[float, float, float]:
        """Return mean loss, cross-entropy and accuracy of a batch over all processes.

        Gradients gather in the student.
        """
        batches = [self.data.micro_batch(part) for part in self._parts(rows)]
        count = sum(int(batch.predicts.sum()) for batch in batches)
        self.student.round()
        total = torch.zeros(3, dtype=torch.float64, device=self.device)
        for batch in distributed.processes().mine(batches):
            logits, labels = counted_logits(
                predictions(self.student.module, batch, self.device), batch
            )
            loss = summed_loss(logits, labels, self._taught(batch), self.settings.distillation)
            torch.autograd.backward(loss / count)
            total += torch.stack([loss.detach().double(), *_judged(logits, labels)])
        loss, entropy, right = (distributed.reduce_sum(total) / count).tolist()
        # Without distillation both are one number, whatever the order of its sum.
        return loss, entropy if self.teacher is not None else loss, right

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

    def _watch(self, done: int, steps: int) -> None:
        """Measure held-out data after so many steps, if it is time to."""
        if self.watch is not None and done in watched_steps(steps):
            self.student.round()
            self.watch.measure(self.student.module, self.device, done)

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


@torch.no_grad()
def _judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy with labels, and how many predictions are right."""
    entropy = cross_entropy(logits, labels, reduction="sum").double()
    return entropy, (logits.argmax(-1) == labels).sum().double()


def _gradient_norm(parameters: Sequence[nn.Parameter]) -> float:
    norms = [p.grad.norm(dtype=torch.float64) for p in parameters if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0
