"""Load what ModelOpt saved, and report it: `modelopt.py MODEL OUTPUT RESULT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from probing import report


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    import modelopt.torch.opt as mto
    from transformers import AutoModelForCausalLM

    mto.enable_huggingface_checkpointing()
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
    settings: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is not None and quantizer.is_enabled:
            bits = quantizer.num_bits
            settings[name] = {
                "bits": bits if isinstance(bits, int) else 1 + sum(bits),
                "group_size": (quantizer.block_sizes or {}).get(-1),
            }
    report(model, settings, Path(sys.argv[3]))


if __name__ == "__main__":
    main()
