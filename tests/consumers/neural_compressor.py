"""Load what neural-compressor saved: `neural_compressor.py MODEL OUTPUT RESULT`."""

from __future__ import annotations

import sys
from pathlib import Path

from probing import packed_settings, report


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    import torch
    from neural_compressor.torch.quantization import load
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model = load(sys.argv[2], model)
    report(model, packed_settings(model), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
