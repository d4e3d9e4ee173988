"""Quantize a model with HQQ by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. No data
is needed. Tested with hqq 0.2.8.post1 and transformers 5.23.
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
    """Put quantized layers in the place of those of the mix, compare them with it, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    chosen = json.loads((HERE / "hqq.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    if unknown := sorted(set(chosen) - set(linear)):
        sys.exit(f"the mix is of another model: it has no linear layers {unknown[:5]}.")
    for name, settings in chosen.items():
        layer = HQQLinear(
            linear[name],
            BaseQuantizeConfig(**settings, axis=1),  # groups along a row
            compute_dtype=model.dtype,
            device=args.device,
        )
        model.set_submodule(name, layer)
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        AutoHQQHFModel.save_quantized(model, str(Path(place) / "model"))
        AutoTokenizer.from_pretrained(args.model).save_pretrained(Path(place) / "model")
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer is not in the width and groups of the mix, or another one is quantized."""
    wrong = []
    for name, module in model.named_modules():
        entry = mix.get(name, {"bits": None, "format": "none"})
        meta = getattr(module, "meta", None)
        got, wanted = None, None
        if meta is not None:
            got = (meta["nbits"], meta["group_size"])
            if entry["bits"] is not None:  # for the whole row HQQ notes the number of its columns
                wanted = (entry["bits"], entry["group_size"] or meta["shape"][1])
        if got != wanted or (entry["bits"] is None) != (meta is None):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("HQQ changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
