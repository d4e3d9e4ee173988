"""Load what quanto saved, and report it: `quanto.py MODEL OUTPUT RESULT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from probing import report


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    from optimum.quanto import QuantizedModelForCausalLM

    model = QuantizedModelForCausalLM.from_pretrained(sys.argv[2])._wrapped
    settings: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if getattr(module, "weight_qtype", None) is not None:
            settings[name] = {
                "type": module.weight_qtype.name,
                "group_size": module.weight_group_size,
            }
    report(model, settings, Path(sys.argv[3]))


if __name__ == "__main__":
    main()
