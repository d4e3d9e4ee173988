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
from hawqkit.models.batches import MicroBatch
from hawqkit.models.checkpointing import checkpointed
from hawqkit.quantize.errors_of import LayerErrors
from hawqkit.records import Layer
from hawqkit.sensitivity.labels import sampled_residuals, uniforms
from hawqkit.sensitivity.reduction import LayerSums, Scratch, reduce_layer
from hawqkit.sensitivity.taps import Taps
from hawqkit.sensitivity.uses import Positions, Use
from hawqkit.store import Arrays

POSITION_STREAM = 0x5EED  # keeps the draws of positions apart from those of labels


class DualProbe:
    """Measures micro-batches of one model; a context manager that takes its hooks out again.

    Args:
        module: a causal language model in eval mode: (tokens, attention_mask) -> `.logits`.
        layers: what to measure.
        weights: layer name -> (rows, columns) view of its weight.
        errors: layer name -> its formats' errors.
        formats: the columns of the results; a format that a layer lacks is NaN there.
        positions: sampled positions a sequence for the token score; 0 leaves the score out.
        seed: of labels and positions.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
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
    ) -> None:
        self._module, self._layers, self._formats = module, tuple(layers), tuple(formats)
        self._weights, self._errors = weights, errors
        self._positions, self._seed = positions, seed
        self._checkpointing = checkpointing
        self._sums: dict[str, LayerSums] = {}
        self._chosen: Positions | None = None
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

    def measure(self, batch: MicroBatch) -> Arrays:
        """Run one forward and one backward pass and return raw sums by sequence.

        Returns:
            arrays named as in `records.Samples`, for the B sequences of this batch; `pairs` holds
            rows of the batch. `labels` (B, T) are the sampled labels, -1 where nothing is counted.

        Raises:
            NumericalError: logits or gradients are not finite.
            Unsupported: a layer took no part in the pass, or cannot be told apart by sequence.
        """
        if self._module.training and not self._checkpointing:
            raise Unsupported(
                "the model is in training mode, where dropout changes the loss from pass to pass; "
                "call model.eval() first."
            )
        device = next(self._module.parameters()).device
        tokens, attention = batch.tokens.to(device), batch.attention.to(device)
        self._chosen = self._choose_positions(batch, device)
        self._sums.clear()
        # The prediction of token t is made at position t - 1.
        made_at = torch.zeros_like(batch.counted)
        made_at[:, :-1] = batch.counted[:, 1:]
        with torch.enable_grad(), self._taps.forward_pass():
            logits = self._module(
                input_ids=tokens, attention_mask=attention, use_cache=False
            ).logits
        self._refuse_unused()
        residual, labels = sampled_residuals(
            logits, made_at, uniforms(batch.index.tolist(), tokens.shape[1], self._seed)
        )
        torch.autograd.backward([logits], [residual])
        self._refuse_incomplete()
        return self._collect(batch, labels)

    def _receive(self, layer: Layer, uses: list[Use]) -> None:
        self._sums[layer.name] = reduce_layer(
            uses,
            self._weights[layer.name],
            self._errors[layer.name],
            self._chosen,
            self._scratch,
        )

    def _choose_positions(self, batch: MicroBatch, device: torch.device) -> Positions | None:
        """Take the first position, where attention sinks sit, always, and others at random.

        The first token's input is often a hundred times the others'; leaving it to chance would
        make one sequence in T/k decide the score. Weights keep every sum unbiased: 1 for the first
        position, (length - 1) / (k - 1) for the others.
        """
        if self._positions < 1:
            return None
        length = batch.tokens.shape[1]
        k = min(self._positions, length)
        keys = uniforms(batch.index.tolist(), length, self._seed ^ POSITION_STREAM)
        keys = keys.masked_fill(~batch.attention, 2.0)
        keys[:, 0] = -1.0
        index = keys.argsort(dim=1, stable=True)[:, :k]  # (B, k)
        lengths = batch.attention.sum(1, keepdim=True)  # (B, 1)
        taken = lengths.clamp(max=k)
        weight = ((lengths - 1) / (taken - 1).clamp(min=1)).expand(-1, k).clone()
        weight[:, 0] = 1.0
        weight = weight * (torch.arange(k) < taken)
        return Positions(index.to(device), weight.to(device))

    def _refuse_unused(self) -> None:
        unused = self._taps.unused()
        if unused:
            raise Unsupported(
                f"{len(unused)} layers took no part in the forward pass, the first is {unused[0]}; "
                "exclude them, or check that their modules are called and not only their weights."
            )

    def _refuse_incomplete(self) -> None:
        missing = [x.name for x in self._layers if x.name not in self._sums]
        if missing:
            raise Unsupported(
                f"{len(missing)} layers were used but got no gradient, the first is {missing[0]}; "
                "the loss does not depend on them. Exclude them."
            )

    def _collect(self, batch: MicroBatch, labels: Tensor) -> Arrays:
        size, count = len(batch.index), len(self._layers)
        first, second = np.triu_indices(size, 1)
        shape = (size, count, len(self._formats))
        out: Arrays = {
            "index": batch.index.numpy().astype(np.int64),
            "count": batch.counted[:, 1:].sum(1).numpy().astype(np.int64),
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
            sums = self._sums[layer.name]
            gram = sums.gram.double().cpu().numpy()
            if not np.isfinite(gram).all():
                raise NumericalError(
                    f"the gradient of layer {layer.name} holds NaN or infinity; check the "
                    "checkpoint, and use dtype float32 or bfloat16 if float16 overflows."
                )
            out["squared_gradient"][:, i] = np.diagonal(gram)
            out["gram"][:, i] = gram[first, second]
            out["token_norm"][:, i] = sums.token_norm.double().cpu().numpy()
            columns = [self._formats.index(f.name) for f in self._errors[layer.name].formats]
            for name in ("directional", "token", "token_summed"):
                out[name][:, i, columns] = getattr(sums, name).double().cpu().numpy()
                if NONE.name in self._formats:
                    out[name][:, i, self._formats.index(NONE.name)] = 0.0
        self._sums.clear()
        return out
