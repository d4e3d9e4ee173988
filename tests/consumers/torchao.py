"""Load what torchao saved, and report it: `torchao.py MODEL OUTPUT RESULT`.

`torchao.py floats WEIGHT.safetensors RESULT.safetensors` encodes and decodes a weight in the
formats of OCP MX by torchao's own functions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from probing import report


def floats(source: Path, result: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    elements: dict[str, Any] = {
        "mxfp4": torch.float4_e2m1fn_x2,
        "mxfp6-e2m3": "fp6_e2m3",
        "mxfp6-e3m2": "fp6_e3m2",
        "mxfp8-e4m3": torch.float8_e4m3fn,
        "mxfp8-e5m2": torch.float8_e5m2,
    }
    weight = load_file(source)["weight"]
    found = {}
    for name, element in elements.items():
        scales, codes = to_mx(weight, element, 32, ScaleCalculationMode.FLOOR)
        found[name] = to_dtype(codes, scales, element, 32, torch.float32).contiguous()
    save_file(found, result)


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    if sys.argv[1] == "floats":
        floats(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], device_map="cpu")
    settings: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "qdata"):
            dtype = getattr(weight, "target_dtype", weight.qdata.dtype)
            columns = weight.shape[-1]
            group = weight.block_size[-1]
            settings[name] = {
                "dtype": str(dtype),
                "group_size": None if group == columns else group,
            }
    report(model, settings, Path(sys.argv[3]))


if __name__ == "__main__":
    main()
