"""What a spectrum will take, from one product with the whole matrix and one with a layer's."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hawqkit.curvature.layers import choose_layers
from hawqkit.curvature.objective import Objective, cross_entropy
from hawqkit.curvature.operator import SymmetricOperator
from hawqkit.estimators.ranks import DENSE_UP_TO
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.records import WHOLE_NETWORK
from hawqkit.spectrum.blocks import BlockSettings
from hawqkit.spectrum.measuring import SpectrumSettings, operators_of, resolve_layers

FLOOR_PRODUCTS = 10  # of `noise_floor`
# Gauss-Newton traces that choose the layers: about so many probes, each less than a product.
TRACE_PRODUCTS = 32


def expected_products(size: int, settings: BlockSettings) -> int:
    """Return about how many products a block of n dimensions takes.

    Above 2,048 dimensions: the noise floor; pairs, once through the basis of `4 k + 40` vectors and
    half of it again to look for copies; and the draws. Hard spectra take more.

    >>> expected_products(64, BlockSettings()), expected_products(10**6, BlockSettings(10, 60, 10))
    (74, 730)
    """
    if size <= DENSE_UP_TO:
        return FLOOR_PRODUCTS + size
    pairs = 3 * (4 * settings.top + 40) // 2 if settings.top else 0
    return FLOOR_PRODUCTS + pairs + settings.draws * settings.steps


def rehearse_spectrum(
    model: nn.Module | LoadedModel,
    batches: Iterable[Any] | Data,
    settings: SpectrumSettings,
    *,
    objective: Objective | None = None,
) -> float:
    """Return about how many seconds `measure_spectrum` will take on this process.

    Makes two products with the first layer that may be measured and two with the whole matrix, as
    far as they are asked for, and takes the second of each: the first also pays for fresh memory.

    Args:
        model: a network in eval mode.
        batches: as for `measure_spectrum`.
        settings: likewise.
        objective: likewise.

    Raises:
        InputError: as for `measure_spectrum`.
    """
    candidates, count = resolve_layers(model, settings.layers)
    found = operators_of(model, batches, settings, objective or cross_entropy(), candidates[:1])
    seconds = {name: _second_product(operator) for name, operator in found.items()}
    total, whole = 0.0, found.get(WHOLE_NETWORK)
    if whole is not None:
        total += seconds[WHOLE_NETWORK] * expected_products(whole.size, settings.each)
    if candidates:
        module = model.module if isinstance(model, LoadedModel) else model
        numel = {name: p.numel() for name, p in module.named_parameters()}
        groups = choose_layers(model, candidates)
        products = [
            expected_products(sum(numel[name] for name in group), settings.each)
            for group in groups.values()
        ]
        share = 1.0 if count is None else count / len(candidates)
        total += seconds[candidates[0]] * sum(products) * share
        if count is not None:
            total += TRACE_PRODUCTS * max(seconds.values())
    return total


def _second_product(operator: SymmetricOperator) -> float:
    v = torch.ones(operator.size, dtype=operator.dtype, device=operator.device)
    operator.matvec(v)
    begin = time.perf_counter()
    operator.matvec(v)
    return time.perf_counter() - begin
