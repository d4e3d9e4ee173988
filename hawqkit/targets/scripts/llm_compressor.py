"""Quantize a model with llm-compressor by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT [--data texts.jsonl]

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. Data is
needed where recipe.yaml names a modifier that calibrates, such as GPTQModifier: texts stand in it
as {"text": ...}, one a line. Tested with llmcompressor 0.14.0.1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Quantize, compare every layer with the mix, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, default=None, help="texts.jsonl")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {name for name, entry in mix.items() if entry["bits"] is not None}
    if unknown := sorted(chosen - linear):
        sys.exit(f"the mix is of another model: it has no linear layers {unknown[:5]}.")
    data: dict[str, Any] = {}
    if args.data is not None:
        from datasets import Dataset

        texts = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
        data = {"dataset": Dataset.from_list(texts), "num_calibration_samples": len(texts)}
    oneshot(model=model, tokenizer=tokenizer, recipe=str(HERE / "recipe.yaml"), **data)
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        model.save_pretrained(Path(place) / "model", save_compressed=True)
        tokenizer.save_pretrained(Path(place) / "model")
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer's scheme is not that of the mix."""
    modules = dict(model.named_modules())
    wrong = []
    for name, entry in mix.items():
        scheme = getattr(modules.get(name), "quantization_scheme", None)
        if scheme is None or entry["bits"] is None:
            if (scheme is None) != (entry["bits"] is None):
                wrong.append(f"{name}: {'kept' if scheme is None else 'quantized'}, not so the mix")
            continue
        got = (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric)
        if got != (entry["bits"], entry["group_size"], entry["symmetric"]):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("llm-compressor changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
