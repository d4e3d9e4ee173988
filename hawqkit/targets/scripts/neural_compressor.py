"""Quantize a model with neural-compressor by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. No data
is needed: weights alone are rounded. Tested with neural-compressor 3.10.
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

    import torch
    from neural_compressor.torch.quantization import RTNConfig, convert, prepare
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    patterns = json.loads((HERE / "rtn_config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {name for name, entry in mix.items() if entry["bits"] is not None}
    if unknown := sorted(chosen - linear):
        sys.exit(f"the mix is of another model: it has no linear layers {unknown[:5]}.")
    # Without quant_lm_head a last entry would turn every head off again.
    config = RTNConfig(dtype="fp32", use_layer_wise=False, quant_lm_head=True)
    for pattern, settings in patterns.items():
        config.set_local(pattern, RTNConfig(use_layer_wise=False, **settings))
    model = convert(prepare(model, config))
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        model.save(str(Path(place) / "model"))
        AutoTokenizer.from_pretrained(args.model).save_pretrained(Path(place) / "model")
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer was not packed in the settings of the mix."""
    modules = dict(model.named_modules())
    wrong = []
    for name, entry in mix.items():
        module = modules.get(name)
        packed = hasattr(module, "qweight")
        if module is None or not packed or entry["bits"] is None:
            if packed != (entry["bits"] is not None):
                wrong.append(f"{name}: {'quantized' if packed else 'kept'}, not {entry['format']}")
            continue
        group = entry["group_size"] or module.in_features
        got = (module.bits, module.in_features if module.group_size == -1 else module.group_size)
        if got != (entry["bits"], group):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("neural-compressor changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
