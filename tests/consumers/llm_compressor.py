"""Load what llm-compressor saved, and report it: `llm_compressor.py MODEL OUTPUT RESULT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from probing import report


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
    settings: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            settings[name] = {
                "bits": scheme.weights.num_bits,
                "group_size": scheme.weights.group_size,
                "inputs": scheme.input_activations and scheme.input_activations.num_bits,
            }
    report(model, settings, Path(sys.argv[3]))


if __name__ == "__main__":
    main()
