"""What the stages hand to each other: frozen records of plain numbers, with no torch in them.

Letters in shapes: L layers, F formats, S sequences, P pairs of sequences of one micro-batch.
Every record is a pure function of its inputs; seconds, memory and dates stand in `Provenance`
alone. `store.py` writes and reads them. A cell that does not exist (a format that does not fit a
layer) is None in a record and NaN in an array.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawqkit.records.activations import ActivationRanges
from hawqkit.records.schema import SCHEMA

CROSS_ENTROPY = "cross-entropy"  # name of the loss whose increase is the KL divergence, in nats
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Numbers = tuple[float | None, ...]
Table = tuple[Numbers, ...]


def to_array(table: Table | Numbers) -> Floats:
    """Return a table as float64, None as NaN."""
    return np.array(table, dtype=np.float64)


def to_numbers(values: NDArray[Any]) -> Numbers:
    """Return a vector as plain floats; NaN and infinity (no estimate) become None."""
    return tuple(float(v) if np.isfinite(v) else None for v in values)


def to_table(values: NDArray[Any]) -> Table:
    """Return a matrix as rows of plain floats; NaN and infinity (no estimate) become None."""
    return tuple(to_numbers(row) for row in values)


@dataclass(frozen=True, slots=True)
class Layer:
    """One quantizable weight, as (rows, columns) = (outputs, inputs); scales run along the columns.

    Attributes:
        name: path of the module that owns the weight, `model.layers.0.mlp.up_proj`.
        kind: `linear`, `conv1d` (GPT-2's, stored transposed), `embedding`, `convolution` or
            `transposed-convolution`.
        rows: outputs, or the vocabulary of an embedding.
        columns: inputs, for a convolution those of one group times the kernel's entries, or the
            width of an embedding.
        dtype: stored dtype, `float32`, `bfloat16`, `float16`.
        block: index of the transformer block, None outside of the blocks.
        tied: other modules that use the same weight; it is counted once.
        calls: times the weight is used in one forward pass.
        macs: multiply-accumulates for one example, 0 where they were not counted.
    """

    name: str
    kind: str
    rows: int
    columns: int
    dtype: str
    block: int | None = None
    tied: tuple[str, ...] = ()
    calls: int = 1
    macs: int = 0

    @property
    def numel(self) -> int:
        """Number of entries."""
        return self.rows * self.columns

    @property
    def dtype_bits(self) -> int:
        """Bits of an entry as stored."""
        return DTYPE_BITS[self.dtype]


DTYPE_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "int64": 64, "int32": 32,
              "int16": 16, "int8": 8, "uint8": 8, "bool": 8, "float8_e4m3fn": 8}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Skipped:
    """A weight that is left alone, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a checkpoint: what a target needs to count its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model without loading it again.

    Attributes:
        source: as the user named it.
        hash: SHA-256 over names, shapes, dtypes and bytes of all weights.
        architecture: class name.
        parameters: number of parameters, tied ones once.
        dtype: stored dtype of most weights.
        tensors: what `save_pretrained` would store, tied tensors once, in its order.
        config: the model's configuration as a JSON object.
        side_files: bytes of every other file of a checkpoint (tokenizer, generation config).
        inputs: arguments of forward for one example, without the dimension of the examples; known
            once the model has met data (`models.signature`).
        graph: the bytes of its ONNX graph, part by part, known once it was traced (`targets.onnx`).
        gguf: its tensors in a GGUF file and the bytes of that file's head, known once it was laid
            out (`targets.gguf`).
    """

    source: str
    hash: str
    architecture: str
    parameters: int
    dtype: str
    tensors: tuple[Tensor, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    side_files: dict[str, int] = field(default_factory=dict)
    inputs: tuple[Tensor, ...] = ()
    graph: dict[str, Any] = field(default_factory=dict)
    gguf: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DataFacts:
    """Where sequences came from and how much there was.

    Attributes:
        source: as the user named it, with its split.
        hash: SHA-256 over tokens, masks and lengths.
        sequences: number of sequences.
        length: tokens of the longest sequence.
        tokens: tokens that are not padding.
        counted: predictions that enter the mean.
        documents: number of documents the sequences come from.
        seed: seed of the choice of windows.
        kind: `text`, `images`, `labelled text`, `arrays`: what one sequence is.
        classes: number of classes of labelled examples, 0 where every token is a class, and of
            examples with targets of another kind.
    """

    source: str
    hash: str
    sequences: int
    length: int
    tokens: int
    counted: int
    documents: int
    seed: int
    kind: str = "text"
    classes: int = 0

    @property
    def by_example(self) -> bool:
        """Whether a sequence is an example of its own, not a text that predicts at every token."""
        return self.classes > 0 or self.kind != "text"

    @property
    def many(self) -> str:
        """What messages call several of them: `sequences` of a text, `images`, `texts`, `examples`.

        >>> DataFacts("x", "", 2, 1, 2, 2, 2, 0, "images", 10).many
        'images'
        """
        if not self.classes and self.kind == "text":
            return "sequences"
        return {"images": "images", "labelled text": "texts"}.get(self.kind, "examples")


@dataclass(frozen=True, slots=True)
class Score:
    """Predicted mean KL divergence in nats for each layer and format, with its standard error.

    With another loss than the cross-entropy it is what the mean of that loss grows by, to second
    order in the change of the outputs.
    """

    name: str
    values: Table  # (L, F)
    stderr: Table  # (L, F)


@dataclass(frozen=True, slots=True)
class Samples:
    """What the probe measured, sequence by sequence: raw sums, divided by nothing.

    Sequence s back-propagates the plain SUM of cross-entropies against labels that the model itself
    sampled; g is a layer's gradient of that sum, d and a its output gradients and inputs.

    Attributes:
        index: (S,) global sequence index.
        count: (S,) counted predictions n_s.
        document: (S,) cluster of the sequence.
        withheld: (S,) 1 where the sequence is kept from choosing and only predicts.
        squared_gradient: (S, L) |g|^2.
        directional: (S, L, F) SIGNED g . dW_f; NaN where a format does not fit.
        token_norm: (S, L) sum over sampled positions of |d_t|^2 |a_t|^2, scaled to all positions.
        token: (S, L, F) sum over t, o of (d_to (dW_f a_t)_o)^2, scaled likewise.
        token_summed: (S, L, F) sum over t of (d_t . dW_f a_t)^2, scaled likewise.
        pairs: (P, 2) rows of two different sequences of one micro-batch.
        gram: (P, L) g_s . g_s' of those pairs.
        input_squares: (S, L) |g_a|^2, g_a the gradient at a layer's input through that layer alone;
            this and what follows is None where no format rounds inputs. Then `directional` is
            g~ . dW_f + sum over t of g_at . da_ft with g~ the gradient at rounded inputs, which is
            all that the layer's output changes by; and `token`, `token_summed` take the rounded
            inputs a_t + da_ft.
        input_count: (S, L) entries of the input.
        input_error: (S, L, F) |da_f|^2, 0 where inputs stay as they are.
        input_linear: (S, L, F) SIGNED sum over all t of g_at . da_ft.
    """

    index: Integers
    count: Integers
    document: Integers
    withheld: Integers
    squared_gradient: Floats
    directional: Floats
    token_norm: Floats
    token: Floats
    token_summed: Floats
    pairs: Integers
    gram: Floats
    input_squares: Floats | None = None
    input_count: Floats | None = None
    input_error: Floats | None = None
    input_linear: Floats | None = None


@dataclass(frozen=True, slots=True)
class Curvature:
    """What was measured of the Hessian H_l of each layer, shard by shard of the calibration text.

    H is that of the mean cross-entropy over a shard's predictions, in nats, with the labels of the
    text. D shards.

    Attributes:
        sequences: (D, ...) rows of the calibration text that make each shard.
        length: tokens that they were cut to.
        counts: (D,) counted predictions.
        relative_error: that was asked for: of a trace its standard error, of an eigenvalue its
            residual.
        traces: (D, L) tr(H_l), signs kept; empty if it was not measured.
        trace_stderr: (D, L) standard error of the probes, 0 where the trace was computed.
        eigenvalues: (D, L) the eigenvalue of largest magnitude, signs kept; or empty.
        residuals: (D, L) |H v - lambda v|: an eigenvalue lies within that of each.
        products: of a layer's block with a vector, over all layers and shards.
        fingerprint: hash over model, text, layers and settings.
    """

    sequences: tuple[tuple[int, ...], ...]
    length: int
    counts: tuple[int, ...]
    relative_error: float
    traces: Table = ()
    trace_stderr: Table = ()
    eigenvalues: Table = ()
    residuals: Table = ()
    products: int = 0
    fingerprint: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """How much each layer suffers in each format: `sensitivities.json`.

    Attributes:
        formats: names, in the order of the columns of every table.
        weight_error: (L, F) |dW_f|^2.
        trace: (L,) tr(G_l), with its standard error.
        participation_ratio: (L,) tr(G_l)^2 / |G_l|_F^2; None where the pairs do not allow one.
        network_participation_ratio: the same over all layers together.
        scores: name -> table in nats (see `sensitivity.scores`).
        auto: the score that `auto` stands for.
        rounding: `nearest` or `searched`.
        fingerprint: hash over model, data, formats, rounding and seed.
        withheld: sequences that were kept from choosing.
        curvature: what the scores of the true Hessian are made from; None if it was not measured.
        activations_fingerprint: of the ranges of the layers' inputs; empty where no format rounds
            inputs.
        loss: name of the loss whose increase the scores predict. For the cross-entropy that is the
            KL divergence in nats, and every other loss has its own unit instead.
        activations: those ranges; in memory only, since they have a file of their own.
        samples: the `Samples` behind the tables; in memory only, since they have a file of their
            own (typed loosely, because arrays have no JSON schema).
    """

    model: ModelFacts
    data: DataFacts
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    formats: tuple[str, ...]
    weight_error: Table
    trace: Numbers
    trace_stderr: Numbers
    participation_ratio: Numbers
    network_participation_ratio: float | None
    scores: dict[str, Score]
    auto: str
    rounding: str
    fingerprint: str
    withheld: int = 0
    warnings: tuple[str, ...] = ()
    curvature: Curvature | None = None
    activations_fingerprint: str = ""
    loss: str = CROSS_ENTROPY
    schema: int = SCHEMA
    activations: ActivationRanges | None = field(default=None, repr=False, metadata={"json": False})
    samples: Any = field(default=None, repr=False, compare=False, metadata={"json": False})

    def __post_init__(self) -> None:
        """Refuse layers that cannot be, and tables whose shape does not belong to them."""
        for layer in self.layers:
            if layer.dtype not in DTYPE_BITS or min(layer.rows, layer.columns) < 1:
                raise ValueError(
                    f"layer {layer.name} has {layer.rows} x {layer.columns} entries of dtype "
                    f"{layer.dtype!r}"
                )
        shape = (len(self.layers), len(self.formats))
        tables = {"weight_error": self.weight_error}
        for name, score in self.scores.items():
            tables |= {f"scores.{name}.values": score.values, f"scores.{name}.stderr": score.stderr}
        for name, table in tables.items():
            if len(table) != shape[0] or any(len(row) != shape[1] for row in table):
                raise ValueError(f"{name} is not a table of {shape[0]} layers x {shape[1]} formats")
            if any(v is not None and not v >= 0 for row in table for v in row):
                raise ValueError(f"{name} holds a negative number")
        for name in ("trace", "trace_stderr", "participation_ratio"):
            if len(getattr(self, name)) != shape[0]:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} numbers for {shape[0]} layers"
                )
        _refuse_curvature(self.curvature, shape[0])
        if self.auto not in self.scores:
            raise ValueError(f"auto is {self.auto!r}, which is not among the scores")


def _refuse_curvature(curvature: Curvature | None, layers: int) -> None:
    """Refuse tables that are not of D shards and L layers."""
    if curvature is None:
        return
    shards = len(curvature.counts)
    for name in ("traces", "trace_stderr", "eigenvalues", "residuals"):
        table: Table = getattr(curvature, name)
        if table and (len(table) != shards or any(len(row) != layers for row in table)):
            raise ValueError(
                f"curvature.{name} is not a table of {shards} shards x {layers} layers"
            )
        if any(v is None for row in table for v in row):
            raise ValueError(f"curvature.{name} holds an empty cell")
    if len(curvature.sequences) != shards or any(n < 1 for n in curvature.counts):
        raise ValueError("curvature: a shard holds no sequence or counts no prediction")
