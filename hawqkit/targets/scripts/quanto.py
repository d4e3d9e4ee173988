"""Quantize a model with optimum-quanto by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. No data
is needed: weights alone are rounded. Tested with optimum-quanto 0.2.7 and transformers 5.23.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FLOATS = {"fp8-e4m3-channel": "qfloat8_e4m3fn", "fp8-e5m2-channel": "qfloat8_e5m2"}


def main() -> None:
    """Quantize in one pass for each type, compare every layer with the mix, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    import torch
    from optimum.quanto import QuantizedModelForCausalLM, freeze, qtypes, quantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    passes = json.loads((HERE / "quanto.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {name for name, entry in mix.items() if entry["bits"] is not None}
    if unknown := sorted(chosen - linear):
        sys.exit(f"the mix is of another model: it has no linear layers {unknown[:5]}.")
    for one in passes:
        quantize(model, weights=qtypes[one["weights"]], include=one["include"])
    freeze(model)
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        QuantizedModelForCausalLM(model).save_pretrained(Path(place) / "model")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(Path(place) / "model")
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer is not of the type and groups of the mix, or another one is quantized."""
    wrong = []
    for name, module in model.named_modules():
        entry = mix.get(name, {"bits": None, "format": "none"})
        got, wanted = None, None
        if getattr(module, "weight_qtype", None) is not None:
            columns = module.in_features
            got = (module.weight_qtype.name, module.weight_group_size or columns)
            wanted_type = FLOATS.get(entry["format"], f"qint{entry['bits']}")
            wanted = (wanted_type, entry["group_size"] or columns)
        if got != wanted or (entry["bits"] is None) != (got is None):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("quanto changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
