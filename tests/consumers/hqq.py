"""Load what HQQ saved, and report it: `hqq.py MODEL OUTPUT RESULT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from probing import report


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    import torch
    from hqq.core.quantize import HQQLinear
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoHQQHFModel.from_quantized(sys.argv[2], compute_dtype=torch.float32, device="cpu")
    settings: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, HQQLinear):
            columns = module.meta["shape"][1]
            group = module.meta["group_size"]
            settings[name] = {
                "bits": module.meta["nbits"],
                "group_size": None if group == columns else group,
            }
    report(model, settings, Path(sys.argv[3]))


if __name__ == "__main__":
    main()
