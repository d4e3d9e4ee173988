"""Quantize a model with MLX by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. No data
is needed. Tested with mlx-lm 0.32.2 on mlx 0.32.4.
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
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    from mlx_lm.utils import load, quantize_model, save

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    quantization = json.loads((HERE / "quantization.json").read_text(encoding="utf-8"))
    common = {key: quantization.pop(key) for key in ("group_size", "bits", "mode")}
    model, tokenizer, config = load(str(args.model), return_config=True, lazy=True)
    modules = dict(model.named_modules())
    chosen = {name for name, entry in mix.items() if entry["bits"] is not None}
    if unknown := sorted(chosen - set(modules)):
        sys.exit(
            f"mlx-lm's model has no layers {unknown[:5]}: the mix is of another model, or mlx-lm "
            "merges these layers or gives them other names."
        )
    model, config = quantize_model(
        model, config, **common, quant_predicate=lambda name, _: quantization.get(name, False)
    )
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        save(Path(place) / "model", args.model, model, tokenizer, config)
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer is not in the mode and groups of the mix, or another one is quantized."""
    modes = {"mxfp4": "mxfp4", "mxfp8-e4m3": "mxfp8", "nvfp4": "nvfp4"}
    wrong = []
    for name, module in model.named_modules():
        entry = mix.get(name, {"bits": None, "format": "none"})
        got, wanted = None, None
        if hasattr(module, "mode") and hasattr(module, "scales"):
            got = (module.mode, module.bits, module.group_size)
        if entry["bits"] is not None:
            mode = modes.get(entry["format"], "affine")
            wanted = (mode, entry["bits"], entry["group_size"])
        if got != wanted:
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("MLX changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
