"""The dual probe: one forward and one backward pass measure every layer in every format at once.

With labels y ~ p sampled from the model itself, the gradient g_l of a sequence's summed
cross-entropy has `E |g_l|^2 = n tr(G_l)` and `E (g_l . dW)^2 = n dW' G_l dW`, where G_l is the
layer's block of the Gauss-Newton matrix of the mean loss (the Fisher matrix) and n counts the
predictions. Sequences are independent, so `E (g . g')^2 = n n' |G_l|_F^2` for two of them. No
weight requires a gradient. Random signs through a root of the outputs' curvature have the same
moments, and so serve any loss; see `output_signs` and `objective_signs`.

Letters: B sequences of a micro-batch, T positions, L layers, F formats, k sampled positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from hawqkit.curvature.data import to_device
from hawqkit.curvature.objective import Objective
from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.formats import NONE, activation_bits_of, with_activations
from hawqkit.models.batch import Batch, predictions
from hawqkit.models.checkpointing import checkpointed
from hawqkit.quantize.errors_of import LayerErrors
from hawqkit.quantize.input_rounding import InputQuantizer, input_quantizer
from hawqkit.records import ActivationRanges, Integers, Layer
from hawqkit.sensitivity.columns import Columns, plan_columns
from hawqkit.sensitivity.input_terms import Call, InputSums
from hawqkit.sensitivity.labels import sampled_residuals, uniforms
from hawqkit.sensitivity.objective_signs import losses_by_example, objective_residuals
from hawqkit.sensitivity.output_signs import sign_residuals
from hawqkit.sensitivity.positions import PositionSampler
from hawqkit.sensitivity.reduction import LayerSums, Scratch, reduce_layer
from hawqkit.sensitivity.taps import Taps
from hawqkit.store import Arrays

PAIRED = 16


class DualProbe:
    """Measures micro-batches of one model; a context manager that takes its hooks out again.

    Args:
        module: a model in evaluation mode that returns logits, see `models.batch.predictions`.
        layers: what to measure.
        weights: layer name -> (rows, columns) view of its weight.
        errors: layer name -> errors of its formats' weights.
        formats: the columns of the results; one whose weights a layer lacks is NaN there.
        activations: ranges of the layers' inputs; needed where a format rounds them.
        positions: sampled positions a sequence for the token score; 0 leaves the score out.
        seed: of labels and positions.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        paired: neighbors of a batch whose gradients are multiplied with each other, for |G|_F.
        signs: send back random signs through a root of the outputs' curvature, not drawn labels.
        objective: another loss than the cross-entropy of drawn labels, always with signs.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[Layer],
        weights: Mapping[str, Tensor],
        errors: Mapping[str, LayerErrors],
        *,
        formats: Sequence[str],
        activations: ActivationRanges | None = None,
        positions: int = 16,
        seed: int = 0,
        checkpointing: bool = False,
        paired: int = PAIRED,
        signs: bool = False,
        objective: Objective | None = None,
    ) -> None:
        self._paired, self._signs, self._objective = paired, signs, objective
        self._module, self._layers, self._formats = module, tuple(layers), tuple(formats)
        self._weights, self._errors = weights, errors
        self._positions, self._seed = positions, seed
        self._checkpointing = checkpointing
        self._columns = {n: plan_columns(self._formats, e.formats) for n, e in errors.items()}
        self._quantizers = input_quantizers(module, self._layers, self._formats, activations)
        self._sums: dict[str, LayerSums] = {}
        self._sampler: PositionSampler | None = None
        self._severed: set[str] = set()  # layers that the logits were found not to depend on
        self._scratch = Scratch()

    def __enter__(self) -> DualProbe:
        """Put the taps in."""
        self._taps = Taps(self._module, self._layers, self._receive, self._quantizers)
        self._mode: AbstractContextManager[None] = (
            checkpointed(self._module) if self._checkpointing else nullcontext()
        )
        self._mode.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the taps out."""
        self._taps.remove()
        self._mode.__exit__(kind, error, trace)

    def measure(self, batch: Batch) -> Arrays:
        """Run one forward and one backward pass and return raw sums by sequence.

        Returns:
            arrays named as in `records.Samples`, for the B sequences of this batch; `pairs` holds
            rows of the batch. `labels` (B, T) are the sampled labels, -1 where nothing is counted,
            and wherever no labels are drawn.

        Raises:
            InputError: the objective is no sum over examples, or has another shape than it must.
            NumericalError: logits or gradients are not finite.
            Unsupported: something reads a layer's weight without calling it, or its output cannot
                be told apart by example.
        """
        if self._module.training and not self._checkpointing:
            raise Unsupported(
                "the model is in training mode, where dropout changes the loss from pass to pass; "
                "call model.eval() first."
            )
        device = next(self._module.parameters()).device
        self._sampler = self._make_sampler(batch, device)
        self._sums.clear()
        with torch.enable_grad(), self._taps.forward_pass(len(batch.index), batch.attention):
            outputs = self._run(batch, device)
        self._refuse_uncalled(batch, device)
        if self._objective is not None:
            residual, counts = self._sent_back(self._objective, outputs, batch)
            labels = torch.full((len(counts), 1), -1)
        else:
            residual, labels = self._residual(outputs, batch)
            counts = batch.predicts.sum(1).numpy().astype(np.int64)
        torch.autograd.backward([outputs], [residual])
        return self._collect(batch, labels, counts)

    def _run(self, batch: Batch, device: torch.device) -> Tensor:
        """Return the outputs that the loss is a function of."""
        if self._objective is None:
            return predictions(self._module, batch, device)
        z = self._objective.outputs(self._module, to_device(batch, device))
        if not isinstance(z, Tensor) or z.ndim == 0 or len(z) != len(batch.index):
            came = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise InputError(
                f"{self._objective.name}: outputs returned {came} for a batch of "
                f"{len(batch.index)} examples; it must return a tensor whose first axis is the "
                "examples."
            )
        return z

    def _sent_back(self, objective: Objective, z: Tensor, batch: Batch) -> tuple[Tensor, Integers]:
        """Return what an objective sends back, and the predictions that each example counts."""
        placed = to_device(batch, z.device)
        counts = losses_by_example(objective, z, placed, whole=True)[1]
        indices = batch.index.tolist()
        return objective_residuals(objective, z, placed, indices, self._seed), counts

    def _residual(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what is sent back from the outputs, and the drawn labels, -1 where none were."""
        indices = batch.index.tolist()
        if self._signs:
            none = torch.full(logits.shape[:2], -1)
            return sign_residuals(logits, batch.predicts, indices, self._seed), none
        draws = uniforms(indices, logits.shape[1], self._seed)
        return sampled_residuals(logits, batch.predicts, draws)

    def _receive(self, layer: Layer, calls: list[Call]) -> None:
        self._sums[layer.name] = reduce_layer(
            calls,
            self._weights[layer.name],
            self._errors[layer.name],
            self._columns[layer.name],
            self._sampler,
            self._scratch,
            self._paired,
        )

    def _make_sampler(self, batch: Batch, device: torch.device) -> PositionSampler | None:
        if self._positions < 1:
            return None
        return PositionSampler(
            batch.index.tolist(), batch.attention, self._positions, self._seed, device
        )

    def _refuse_uncalled(self, batch: Batch, device: torch.device) -> None:
        """Refuse layers whose weight counts but whose module is not called.

        A branch that nothing uses has no sensitivity, and that is its measured value. A weight that
        is read without its module being called would look the same to the taps, so the logits are
        differentiated by it, once.

        Raises:
            Unsupported: names such layers.
        """
        unused = [name for name in self._taps.unused() if name not in self._severed]
        if not unused:
            return
        parameters = [self._module.get_submodule(name).get_parameter("weight") for name in unused]
        before = [p.requires_grad for p in parameters]
        try:
            for p in parameters:
                p.requires_grad_(True)
            with torch.enable_grad(), self._taps.asleep():
                total = self._run(batch, device).sum()
                found: Sequence[Tensor | None] = [None] * len(parameters)
                if total.requires_grad:
                    found = torch.autograd.grad(total, parameters, allow_unused=True)
        finally:
            for p, flag in zip(parameters, before, strict=True):
                p.requires_grad_(flag)
        read = [name for name, g in zip(unused, found, strict=True) if g is not None]
        if read:
            raise Unsupported(
                f"{len(read)} layers took no part in the forward pass although the logits depend "
                f"on their weights, the first is {read[0]}: something reads the weight without "
                "calling the module. Exclude them."
            )
        self._severed.update(unused)

    def _collect(self, batch: Batch, labels: Tensor, counts: Integers) -> Arrays:
        size, count = len(batch.index), len(self._layers)
        first, second = _pairs(size, self._paired)
        shape = (size, count, len(self._formats))
        out: Arrays = {
            "index": batch.index.numpy().astype(np.int64),
            "count": counts,
            "squared_gradient": np.empty(shape[:2]),
            "token_norm": np.empty(shape[:2]),
            "directional": np.full(shape, np.nan),
            "token": np.full(shape, np.nan),
            "token_summed": np.full(shape, np.nan),
            "pairs": np.stack([first, second], 1).astype(np.int64),
            "gram": np.empty((len(first), count)),
            "labels": labels.cpu().numpy(),
        }
        if self._quantizers:
            for name in ("input_squares", "input_count"):
                out[name] = np.zeros(shape[:2])
            for name in ("input_error", "input_linear"):
                out[name] = np.zeros(shape)
        for i, layer in enumerate(self._layers):
            columns = sorted(f for c in self._columns[layer.name] for f in c.formats)
            sums = self._sums.get(layer.name)
            if sums is None:
                sums = self._nothing(size, len(columns))
            gram = sums.gram.double().cpu().numpy()  # (blocks, p, p)
            if not np.isfinite(gram).all():
                raise NumericalError(
                    f"the gradient of layer {layer.name} holds NaN or infinity; check the "
                    "checkpoint, and use dtype float32 or bfloat16 if float16 overflows."
                )
            out["squared_gradient"][:, i] = np.diagonal(gram, axis1=1, axis2=2).ravel()[:size]
            p = gram.shape[1]
            out["gram"][:, i] = gram[first // p, first % p, second % p]
            out["token_norm"][:, i] = sums.token_norm.double().cpu().numpy()
            for name in ("directional", "token", "token_summed"):
                out[name][:, i, columns] = getattr(sums, name).double().cpu().numpy()
                if NONE.name in self._formats:
                    out[name][:, i, self._formats.index(NONE.name)] = 0.0
            if sums.inputs is not None:
                _collect_inputs(out, i, sums.inputs, self._columns[layer.name])
        self._sums.clear()
        return out

    def _nothing(self, size: int, formats: int) -> LayerSums:
        """Return the sums of a layer that the logits do not depend on."""
        zeros = torch.zeros(size, formats)
        return LayerSums(torch.zeros(1, size, size), zeros, torch.zeros(size), zeros, zeros)


def input_quantizers(
    module: nn.Module,
    layers: Sequence[Layer],
    formats: Sequence[str],
    ranges: ActivationRanges | None,
) -> dict[str, dict[str, list[InputQuantizer]]]:
    """Return layer -> module that holds its weight -> what rounds its inputs, width by width.

    Empty where no format rounds inputs; a layer that only looks up is not in it.

    Raises:
        InputError: a range is missing.
    """
    bits = activation_bits_of(formats)
    if bits and ranges is None:
        raise InputError(
            f"the formats {', '.join(with_activations(formats))} round the inputs of layers, and "
            "no ranges of them came; calibrate_activations finds them."
        )
    found: dict[str, dict[str, list[InputQuantizer]]] = {}
    if ranges is None or not bits:
        return found
    for layer in layers:
        for name in (layer.name, *layer.tied):
            child = module.get_submodule(name)
            if not isinstance(child, nn.Embedding):
                made = [input_quantizer(ranges, layer.name, child, b) for b in bits]
                found.setdefault(layer.name, {})[name] = made
    return found


def _collect_inputs(out: Arrays, row: int, sums: InputSums, columns: Sequence[Columns]) -> None:
    """Write the sums over a layer's inputs into the columns of their width."""
    out["input_squares"][:, row] = sums.squares.double().cpu().numpy()
    out["input_count"][:, row] = sums.count.double().cpu().numpy()
    for group in columns:
        if group.width is not None:
            for name in ("error", "linear"):
                values = getattr(sums, name)[:, group.width].double().cpu().numpy()
                out[f"input_{name}"][:, row, list(group.formats)] = values[:, None]


def _pairs(size: int, paired: int) -> tuple[Integers, Integers]:
    """Return the rows of all pairs within blocks of `paired` neighbors."""
    first, second = np.triu_indices(size, 1)
    same = first // paired == second // paired
    return first[same], second[same]
