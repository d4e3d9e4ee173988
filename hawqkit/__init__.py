"""Measure what each layer of a model loses in fewer bits, and decide who gets how many.

The public names are resolved on first use: `import hawqkit` imports neither torch nor numpy, and
the parts that need no torch never import it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hawqkit.curvature.activation_traces import activation_traces
    from hawqkit.curvature.fisher import empirical_fisher, fisher
    from hawqkit.curvature.gauss_newton import gauss_newton
    from hawqkit.curvature.hessian import hessian
    from hawqkit.curvature.layer_traces import layer_traces
    from hawqkit.curvature.objective import Objective, cross_entropy, squared_error
    from hawqkit.errors import HawqkitError, InputError
    from hawqkit.estimators.densities import density
    from hawqkit.estimators.eigenpairs import top_eigenpairs
    from hawqkit.estimators.ranks import rank
    from hawqkit.estimators.traces import trace
    from hawqkit.models.batches import load_batches
    from hawqkit.models.examples import Examples, make_examples
    from hawqkit.models.folding import fold_batch_norms, with_folded_batch_norms
    from hawqkit.models.labelled import load_examples
    from hawqkit.models.loading import load_model
    from hawqkit.models.model import wrap_model
    from hawqkit.models.operations import count_operations, with_operations
    from hawqkit.pipeline.surface import allocate, export, predict_linearized, validate
    from hawqkit.pipeline.timing import write_latencies
    from hawqkit.quantize.activations import ActivationSettings, calibrate_activations
    from hawqkit.records import (
        ActivationRanges,
        Allocation,
        Density,
        Estimate,
        Frontier,
        Landscape,
        LatencyTable,
        Layer,
        Linearized,
        Provenance,
        Sensitivities,
        Spectrum,
        Tuning,
        Validation,
    )
    from hawqkit.report.html import write_report
    from hawqkit.report.landscape_figures import draw_landscape
    from hawqkit.sensitivity.probing import probe
    from hawqkit.spectrum.class_structure import class_decomposition
    from hawqkit.spectrum.deep_linear import deep_linear_ranks, measure_deep_linear_ranks
    from hawqkit.spectrum.gradient_share import gradient_share, gradient_shares
    from hawqkit.spectrum.landscape import loss_landscape
    from hawqkit.spectrum.measuring import SpectrumSettings, measure_spectrum
    from hawqkit.spectrum.outliers import outliers
    from hawqkit.spectrum.per_layer import (
        layer_densities,
        layer_frobenius_norms,
        layer_ranks,
        layer_top_eigenpairs,
    )
    from hawqkit.targets.gguf import measure_gguf
    from hawqkit.targets.onnx import measure_graph
    from hawqkit.targets.onnx_latency import measure_latency
    from hawqkit.tuning.outcome import Tuned
    from hawqkit.tuning.saved import load_tuned
    from hawqkit.tuning.settings import Distillation, TuneSettings
    from hawqkit.tuning.tuning import tune
    from hawqkit.validation.losses import measure_loss

__version__ = "0.1.0"

# Public name -> module that defines it. A name must not be that of a room: after the first import
# of the room, `hawqkit.<name>` would be the module.
_HOMES = {
    "ActivationRanges": "hawqkit.records",
    "ActivationSettings": "hawqkit.quantize.activations",
    "Allocation": "hawqkit.records",
    "Density": "hawqkit.records",
    "Distillation": "hawqkit.tuning.settings",
    "Estimate": "hawqkit.records",
    "Examples": "hawqkit.models.examples",
    "Frontier": "hawqkit.records",
    "HawqkitError": "hawqkit.errors",
    "InputError": "hawqkit.errors",
    "Landscape": "hawqkit.records",
    "LatencyTable": "hawqkit.records",
    "Layer": "hawqkit.records",
    "LossMeasurement": "hawqkit.records",
    "Linearized": "hawqkit.records",
    "Objective": "hawqkit.curvature.objective",
    "Provenance": "hawqkit.records",
    "Sensitivities": "hawqkit.records",
    "Spectrum": "hawqkit.records",
    "SpectrumSettings": "hawqkit.spectrum.measuring",
    "TuneSettings": "hawqkit.tuning.settings",
    "Tuned": "hawqkit.tuning.outcome",
    "Tuning": "hawqkit.records",
    "Validation": "hawqkit.records",
    "activation_traces": "hawqkit.curvature.activation_traces",
    "allocate": "hawqkit.pipeline.surface",
    "calibrate_activations": "hawqkit.quantize.activations",
    "class_decomposition": "hawqkit.spectrum.class_structure",
    "count_operations": "hawqkit.models.operations",
    "cross_entropy": "hawqkit.curvature.objective",
    "deep_linear_ranks": "hawqkit.spectrum.deep_linear",
    "density": "hawqkit.estimators.densities",
    "draw_landscape": "hawqkit.report.landscape_figures",
    "empirical_fisher": "hawqkit.curvature.fisher",
    "export": "hawqkit.pipeline.surface",
    "fisher": "hawqkit.curvature.fisher",
    "fold_batch_norms": "hawqkit.models.folding",
    "gauss_newton": "hawqkit.curvature.gauss_newton",
    "gradient_share": "hawqkit.spectrum.gradient_share",
    "gradient_shares": "hawqkit.spectrum.gradient_share",
    "hessian": "hawqkit.curvature.hessian",
    "layer_densities": "hawqkit.spectrum.per_layer",
    "layer_frobenius_norms": "hawqkit.spectrum.per_layer",
    "layer_ranks": "hawqkit.spectrum.per_layer",
    "layer_top_eigenpairs": "hawqkit.spectrum.per_layer",
    "layer_traces": "hawqkit.curvature.layer_traces",
    "load_batches": "hawqkit.models.batches",
    "load_examples": "hawqkit.models.labelled",
    "load_model": "hawqkit.models.loading",
    "load_tuned": "hawqkit.tuning.saved",
    "loss_landscape": "hawqkit.spectrum.landscape",
    "make_examples": "hawqkit.models.examples",
    "measure_deep_linear_ranks": "hawqkit.spectrum.deep_linear",
    "measure_gguf": "hawqkit.targets.gguf",
    "measure_graph": "hawqkit.targets.onnx",
    "measure_latency": "hawqkit.targets.onnx_latency",
    "measure_loss": "hawqkit.validation.losses",
    "measure_spectrum": "hawqkit.spectrum.measuring",
    "outliers": "hawqkit.spectrum.outliers",
    "predict_linearized": "hawqkit.pipeline.surface",
    "probe": "hawqkit.sensitivity.probing",
    "rank": "hawqkit.estimators.ranks",
    "squared_error": "hawqkit.curvature.objective",
    "top_eigenpairs": "hawqkit.estimators.eigenpairs",
    "trace": "hawqkit.estimators.traces",
    "tune": "hawqkit.tuning.tuning",
    "validate": "hawqkit.pipeline.surface",
    "with_folded_batch_norms": "hawqkit.models.folding",
    "with_operations": "hawqkit.models.operations",
    "wrap_model": "hawqkit.models.model",
    "write_latencies": "hawqkit.pipeline.timing",
    "write_report": "hawqkit.report.html",
}

# A literal, because type checkers and linters read it; a test keeps it equal to the table.
__all__ = [
    "ActivationRanges",
    "ActivationSettings",
    "Allocation",
    "Density",
    "Distillation",
    "Estimate",
    "Examples",
    "Frontier",
    "HawqkitError",
    "InputError",
    "Landscape",
    "LatencyTable",
    "Layer",
    "Linearized",
    "LossMeasurement",
    "Objective",
    "Provenance",
    "Sensitivities",
    "Spectrum",
    "SpectrumSettings",
    "TuneSettings",
    "Tuned",
    "Tuning",
    "Validation",
    "__version__",
    "activation_traces",
    "allocate",
    "calibrate_activations",
    "class_decomposition",
    "count_operations",
    "cross_entropy",
    "deep_linear_ranks",
    "density",
    "draw_landscape",
    "empirical_fisher",
    "export",
    "fisher",
    "fold_batch_norms",
    "gauss_newton",
    "gradient_share",
    "gradient_shares",
    "hessian",
    "layer_densities",
    "layer_frobenius_norms",
    "layer_ranks",
    "layer_top_eigenpairs",
    "layer_traces",
    "load_batches",
    "load_examples",
    "load_model",
    "load_tuned",
    "loss_landscape",
    "make_examples",
    "measure_deep_linear_ranks",
    "measure_gguf",
    "measure_graph",
    "measure_latency",
    "measure_loss",
    "measure_spectrum",
    "outliers",
    "predict_linearized",
    "probe",
    "rank",
    "squared_error",
    "top_eigenpairs",
    "trace",
    "tune",
    "validate",
    "with_folded_batch_norms",
    "with_operations",
    "wrap_model",
    "write_latencies",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines a public name, on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hawqkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, resolved or not."""
    return sorted({*globals(), *_HOMES})
