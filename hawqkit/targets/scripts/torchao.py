"""Quantize a model with torchao by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. No data
is needed: weights alone are rounded. Tested with torchao 0.18.0 and transformers 5.23.
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

    from torchao.core.config import config_from_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    config = config_from_dict(json.loads((HERE / "torchao.json").read_text(encoding="utf-8")))
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype="auto",
        device_map=args.device,
        # With None, transformers would leave out the head.
        quantization_config=TorchAoConfig(config, modules_to_not_convert=[]),
    )
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        model.save_pretrained(Path(place) / "model")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(Path(place) / "model")
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if the weight of a layer is not of the type of the mix, or another one was changed."""
    wrong = []
    modules = {n: m for n, m in model.named_modules() if getattr(m, "weight", None) is not None}
    for name in {**mix, **modules}:
        if name not in modules:
            sys.exit(f"the mix is of another model: it has no layer {name}.")
        entry = mix.get(name, {"bits": None, "format": "none"})
        weight = modules[name].weight
        got = None
        if hasattr(weight, "qdata"):
            dtype = getattr(weight, "target_dtype", weight.qdata.dtype)  # torch.int3, or of float8
            group = weight.block_size[-1]
            got = (str(dtype), None if group == weight.shape[-1] else group)
        if got != expected(entry, weight):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("torchao changed the mix, nothing was saved:\n" + "\n".join(wrong))


def expected(entry: dict[str, Any], weight: Any) -> tuple[str, int | None] | None:
    """Return dtype and group size of a layer's codes, None where it stays."""
    if entry["bits"] is None:
        return None
    floats = {"fp8-e4m3-channel": "float8_e4m3fn", "fp8-e5m2-channel": "float8_e5m2"}
    group = entry["group_size"]
    dtype = floats.get(entry["format"], f"int{entry['bits']}")
    return f"torch.{dtype}", None if group == weight.shape[-1] else group


if __name__ == "__main__":
    main()
