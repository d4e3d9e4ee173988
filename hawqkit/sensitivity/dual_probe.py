"""The dual probe: one forward and one backward pass measure every layer in every format at once.

With labels y ~ p sampled from the model itself, the gradient g_l of a sequence's summed
cross-entropy has `E |g_l|^2 = n tr(G_l)` and `E (g_l . dW)^2 = n dW' G_l dW`, where G_l is the
layer's block of the Gauss-Newton matrix of the mean loss (the Fisher matrix) and n counts the
predictions. Sequences are independent, so `E (g . g')^2 = n n' |G_l|_F^2` for two of them. No
weight requires a gradient.

Letters: B sequences of a micro-batch, T positions, L layers, F formats, k sampled positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from hawqkit.errors import NumericalError, Unsupported
from hawqkit.formats import NONE
from hawqkit.models.batch import Batch, predictions
from hawqkit.models.checkpointing import checkpointed
from hawqkit.quantize.errors_of import LayerErrors
from hawqkit.records import Integers, Layer
from hawqkit.sensitivity.labels import sampled_residuals, uniforms
from hawqkit.sensitivity.positions import PositionSampler
from hawqkit.sensitivity.reduction import LayerSums, Scratch, reduce_layer
from hawqkit.sensitivity.taps import Taps
from hawqkit.sensitivity.uses import Use
from hawqkit.store import Arrays

PAIRED = 16


class DualProbe:
    """Measures micro-batches of one model; a context manager that takes its hooks out again.

    Args:
        module: a model in evaluation mode that returns logits, see `models.batch.predictions`.
        layers: what to measure.
        weights: layer name -> (rows, columns) view of its weight.
        errors: layer name -> its formats' errors.
        formats: the columns of the results; a format that a layer lacks is NaN there.
        positions: sampled positions a sequence for the token score; 0 leaves the score out.
        seed: of labels and positions.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        paired: neighbors of a batch whose gradients are multiplied with each other, for |G|_F.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[Layer],
        weights: Mapping[str, Tensor],
        errors: Mapping[str, LayerErrors],
        *,
        formats: Sequence[str],
        positions: int = 16,
        seed: int = 0,
        checkpointing: bool = False,
        paired: int = PAIRED,
    ) -> None:
        self._paired = paired
        self._module, self._layers, self._formats = module, tuple(layers), tuple(formats)
        self._weights, self._errors = weights, errors
        self._positions, self._seed = positions, seed
        self._checkpointing = checkpointing
        self._sums: dict[str, LayerSums] = {}
        self._sampler: PositionSampler | None = None
        self._severed: set[str] = set()  # layers that the logits were found not to depend on
        self._scratch = Scratch()

    def __enter__(self) -> DualProbe:
        """Put the taps in."""
        self._taps = Taps(self._module, self._layers, self._receive)
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
            rows of the batch. `labels` (B, T) are the sampled labels, -1 where nothing is counted.

        Raises:
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
        with torch.enable_grad(), self._taps.forward_pass(len(batch.index)):
            logits = predictions(self._module, batch, device)
        self._refuse_uncalled(batch, device)
        residual, labels = sampled_residuals(
            logits, batch.predicts, uniforms(batch.index.tolist(), logits.shape[1], self._seed)
        )
        torch.autograd.backward([logits], [residual])
        return self._collect(batch, labels)

    def _receive(self, layer: Layer, uses: list[Use]) -> None:
        self._sums[layer.name] = reduce_layer(
            uses,
            self._weights[layer.name],
            self._errors[layer.name],
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
                total = predictions(self._module, batch, device).sum()
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

    def _collect(self, batch: Batch, labels: Tensor) -> Arrays:
        size, count = len(batch.index), len(self._layers)
        first, second = _pairs(size, self._paired)
        shape = (size, count, len(self._formats))
        out: Arrays = {
            "index": batch.index.numpy().astype(np.int64),
            "count": batch.predicts.sum(1).numpy().astype(np.int64),
            "squared_gradient": np.empty(shape[:2]),
            "token_norm": np.empty(shape[:2]),
            "directional": np.full(shape, np.nan),
            "token": np.full(shape, np.nan),
            "token_summed": np.full(shape, np.nan),
            "pairs": np.stack([first, second], 1).astype(np.int64),
            "gram": np.empty((len(first), count)),
            "labels": labels.cpu().numpy(),
        }
        for i, layer in enumerate(self._layers):
            columns = [self._formats.index(f.name) for f in self._errors[layer.name].formats]
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
        self._sums.clear()
        return out

    def _nothing(self, size: int, formats: int) -> LayerSums:
        """Return the sums of a layer that the logits do not depend on."""
        zeros, none = torch.zeros(size, formats), torch.zeros(size)
        return LayerSums(none, torch.zeros(1, size, size), zeros, none, zeros, zeros)


def _pairs(size: int, paired: int) -> tuple[Integers, Integers]:
    """Return the rows of all pairs within blocks of `paired` neighbors."""
    first, second = np.triu_indices(size, 1)
    same = first // paired == second // paired
    return first[same], second[same]
