"""A pico GPT-2 and the scores of its true Hessian, for the tests of both."""

from __future__ import annotations

from pathlib import Path

import pico
import torch

import hawqkit as hk
from hawqkit.models.batches import Sequences
from hawqkit.models.model import LoadedModel
from hawqkit.records import Curvature
from hawqkit.sensitivity.curvature_probe import CurvatureProbe, CurvatureSettings
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES

LENGTH = 7  # tokens that sequences are cut to
EXHAUSTING = CurvatureSettings(
    sequences=3, length=LENGTH, shards=2, max_probes=10_000, max_products=10_000
)
LAYERS = ("transformer.wte", "transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc")


def small_gpt2() -> LoadedModel:
    """Return a float64 GPT-2 whose embedding is tied to its head."""
    module = pico.gpt2(dtype=torch.float64, layers=1, hidden=8)
    return hk.wrap_model(module, name="pico", include=LAYERS)


def text() -> Sequences:
    """Return five sequences of unequal lengths, the last two withheld."""
    return pico.sequences(5, 9, ragged=True, withheld=2, seed=4)


def measured(settings: CurvatureSettings, folder: Path | None = None) -> Curvature:
    model = small_gpt2()
    probe = CurvatureProbe(model, text(), model.layers, CURVATURE_SCORES, settings, folder)
    for piece in probe.pieces:
        probe.measure(piece)
    return probe.finish()
