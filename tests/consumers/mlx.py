"""Load what mlx-lm saved, and report it: `mlx.py MODEL OUTPUT RESULT`; without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    import mlx.core as mx
    from mlx_lm import load

    model, _ = load(sys.argv[2])
    tokens = np.arange(8, 72)[None] % 96
    tensors = {"logits": np.array(model(mx.array(tokens))[0].astype(mx.float32))}
    settings = {}
    for name, module in model.named_modules():
        if not hasattr(module, "scales"):
            continue
        settings[name] = {
            "mode": module.mode,
            "bits": module.bits,
            "group_size": module.group_size,
        }
        decoded = mx.dequantize(
            module.weight,
            module.scales,
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
        )
        tensors[f"weight.{name}"] = np.array(decoded.astype(mx.float32))
    result = Path(sys.argv[3])
    result.mkdir(parents=True, exist_ok=True)
    save_file(tensors, result / "tensors.safetensors")
    (result / "layers.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    main()
