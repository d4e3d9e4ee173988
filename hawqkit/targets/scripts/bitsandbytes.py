"""Quantize a model with bitsandbytes by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. No data
is needed: weights alone are rounded. Tested with bitsandbytes 0.50.2 and transformers 5.23.
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
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
    )

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    make: Any = BitsAndBytesConfig
    settings = json.loads((HERE / "bitsandbytes.json").read_text(encoding="utf-8"))
    if settings.get("load_in_4bit"):
        # Without it 4-bit layers compute in float32, whatever the model does.
        dtype = getattr(AutoConfig.from_pretrained(args.model), "dtype", None)
        settings["bnb_4bit_compute_dtype"] = str(dtype or "float32").removeprefix("torch.")
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype="auto",
        device_map=args.device,
        quantization_config=make(**settings),
    )
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        model.save_pretrained(Path(place) / "model")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(Path(place) / "model")
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer was quantized otherwise than the mix says, or one that it does not name."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    wrong = []
    modules = dict(model.named_modules())
    if missing := sorted(set(mix) - set(modules)):
        sys.exit(f"the mix is of another model: it has no layers {missing[:5]}.")
    for name, module in modules.items():
        entry = mix.get(name, {"bits": None, "format": "none"})
        got = None
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            state = weight.quant_state
            got = f"{state.quant_type}-g{state.blocksize}"
        elif isinstance(module, Linear8bitLt):
            got = "int8-channel-a8"
        if got != (None if entry["bits"] is None else entry["format"]):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("bitsandbytes changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
