"""What tuning will take, from its first steps in a copy of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hawqkit.errors import DataError
from hawqkit.formats import INTEGER, Format, parse_format
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.records import ActivationRanges, Layer
from hawqkit.tuning.order import Order
from hawqkit.tuning.settings import TuneSettings, step_count
from hawqkit.tuning.student import Student
from hawqkit.tuning.training import Trainer
from hawqkit.tuning.watching import Watch, batch_of, watched_rows, watched_steps

MIXES = 3  # that are measured in the end: the original, the mix before tuning and after it


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """About what tuning takes.

    Attributes:
        steps: of the optimizer.
        step_seconds: one of them.
        settle_seconds: batch norms measured again, once; 0 where they are frozen.
        settles: how often that is done.
        watch_seconds: held-out data measured along the way, once.
        watches: how often that is done.
        compare_seconds: what held-out data take in the end.
        formats: that layers were rounded to, one each.
    """

    steps: int
    step_seconds: float
    settle_seconds: float
    settles: int
    watch_seconds: float
    watches: int
    compare_seconds: float
    formats: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """All of it together."""
        return (
            self.steps * self.step_seconds
            + self.settles * self.settle_seconds
            + self.watches * self.watch_seconds
            + self.compare_seconds
        )


def placeholder(formats: Sequence[str], columns: int) -> str:
    """Return the format that stands for that of a layer as long as no mix is chosen.

    It fits, is one of integers, and rounds inputs, which takes longer, as far as there is such a
    one; among equals it has most bits.

    >>> placeholder(["none", "int8-g64", "w4a8", "nf4-g64"], 64)
    'w4a8'
    """
    parsed = [form for form in map(parse_format, formats) if form.fits(columns)]

    def preference(form: Format) -> tuple[bool, bool, bool, int]:
        inputs = form.activation_bits is not None
        return form.quantizes, form.family == INTEGER, inputs, form.bits or 0

    return max(parsed, key=preference).name


def rehearse_tuning(
    model: LoadedModel,
    layers: Sequence[Layer],
    formats: Sequence[str],
    data: Data,
    settings: TuneSettings,
    *,
    rounding: str,
    activations: ActivationRanges | None = None,
    held_out: Mapping[str, Data] | None = None,
) -> Rehearsal:
    """Make two steps in a copy of the network, its layers in a placeholder, and time the second.

    The model is not changed and nothing is written. With several processes all must come here.

    Args:
        model: the original.
        layers: those that are rounded; some format fits each.
        formats: of the recipe.
        data: examples that train.
        settings: how to tune.
        rounding: of scales that are not learned.
        activations: ranges of the layers' inputs, where a format rounds them.
        held_out: name -> data that are measured along the way and in the end.

    Raises:
        DataError: all examples are withheld.
        InputError, NumericalError: as in `tune`.
    """
    rows = [row for row, withheld in enumerate(data.withheld.tolist()) if not withheld]
    if not rows:
        raise DataError(f"tune: all {len(data)} examples of {data.facts.source} are withheld.")
    mix = {layer.name: placeholder(formats, layer.columns) for layer in layers}
    student = Student(model, mix, settings, rounding=rounding, activations=activations)
    watch = Watch(held_out, batch_of(held_out)) if held_out else None
    teacher = model.module if settings.distillation is not None else None
    trainer = Trainer(student, teacher, data, settings, model.device, None, watch=watch)
    settle, step, watched = trainer.rehearse()
    steps, order = step_count(settings, len(rows)), Order(rows, batch=settings.batch, seed=0)
    ends = sum(order.ends_epoch(number) or number + 1 == steps for number in range(steps))
    texts = (held_out or {}).values()
    share = sum(map(len, texts)) / max(sum(len(watched_rows(text)) for text in texts), 1)
    return Rehearsal(
        steps=steps,
        step_seconds=step,
        settle_seconds=settle,
        settles=1 + ends,
        watch_seconds=watched,
        watches=len(watched_steps(steps)),
        compare_seconds=MIXES * share * watched,
        formats=tuple(dict.fromkeys(mix.values())),
    )
