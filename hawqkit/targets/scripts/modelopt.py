"""Quantize a model with NVIDIA ModelOpt by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. No data
is needed: weights alone are quantized. Tested with nvidia-modelopt 0.47.0.
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
    """Quantize, compare every quantizer with the mix, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    config = json.loads((HERE / "quant_cfg.json").read_text(encoding="utf-8"))
    for entry in config["quant_cfg"]:
        entry.update({"cfg": typed(entry["cfg"])} if "cfg" in entry else {})
    mto.enable_huggingface_checkpointing()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {name for name, entry in mix.items() if entry["bits"] is not None}
    if unknown := sorted(chosen - linear):
        sys.exit(f"the mix is of another model: it has no linear layers {unknown[:5]}.")
    model = mtq.quantize(model, config)
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        model.save_pretrained(Path(place) / "model")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(Path(place) / "model")
        (Path(place) / "model").rename(args.output)


def typed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the integer keys and the tuple that JSON does not have."""
    made = dict(settings)
    if isinstance(made["num_bits"], list):
        made["num_bits"] = tuple(made["num_bits"])
    if "block_sizes" in made:
        made["block_sizes"] = {int(k): v for k, v in made["block_sizes"].items()}
    return made


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a quantizer is not set as the mix says, or another one is on."""
    modules = dict(model.named_modules())
    wrong = []
    for name, entry in mix.items():
        quantizer = getattr(modules.get(name), "weight_quantizer", None)
        enabled = quantizer is not None and quantizer.is_enabled
        if quantizer is None or not enabled or entry["bits"] is None:
            if enabled != (entry["bits"] is not None):
                wrong.append(f"{name}: {'quantized' if enabled else 'kept'}, not {entry['format']}")
            continue
        bits = quantizer.num_bits
        width = bits if isinstance(bits, int) else 1 + sum(bits)
        group = (quantizer.block_sizes or {}).get(-1)
        if (width, group) != (entry["bits"], entry["group_size"]):
            wrong.append(f"{name}: {bits} bits, groups of {group} in place of {entry['format']}")
    for name, module in modules.items():
        if name.endswith(("input_quantizer", "output_quantizer")) and module.is_enabled:
            wrong.append(f"{name}: it is on")
    if wrong:
        sys.exit("ModelOpt changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
