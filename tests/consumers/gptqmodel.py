"""Load what GPTQModel saved, and report it: `gptqmodel.py MODEL OUTPUT RESULT`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from probing import packed_settings, report


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(sys.argv[2], device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    report(model.model, packed_settings(model.model), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
