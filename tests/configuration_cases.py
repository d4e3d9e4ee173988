"""Allocations and facts of models for the targets that write configurations; no torch."""

from __future__ import annotations

from hawqkit.records import Allocation, Certificate, Layer, ModelFacts, Tensor, Totals


def allocation(mix: dict[str, str], runtime: str = "transformers") -> Allocation:
    proof = Certificate("test", "optimal", 0.0, 0.0, 0.0, 2, 4)
    return Allocation(
        mix, {"average_bits": 4.0}, Totals(4.0, 4.25), runtime, "trace", 0.0, 0.5, proof,
        rounding="nearest",
    )  # fmt: skip


def model(names: tuple[str, ...]) -> tuple[list[Layer], ModelFacts]:
    layers = [Layer(n, "linear", 128, 128, "bfloat16") for n in names]
    tensors = [Tensor(f"{n}.weight", "bfloat16", (128, 128)) for n in (*names, "norm_like")]
    facts = ModelFacts(
        "model\n`name`", "hash", "LlamaForCausalLM", 128 * 128 * len(names), "bfloat16",
        tensors=tuple(tensors), config={"model_type": "llama"},
    )  # fmt: skip
    return layers, facts
