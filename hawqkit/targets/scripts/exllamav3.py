"""Quantize a model with exllamav3 by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT [--work FOLDER]

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. It needs
a CUDA device. Calibration text comes with exllamav3. Written for exllamav3 1.6.5, and not run by
those who wrote it.
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
    """Quantize by the recipe, compare the bits of every tensor with the mix, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--work", type=Path, default=None, help="for the state of the run")
    parser.add_argument("--devices", default="0", help="CUDA devices, such as 0,1")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != "cuda":
        sys.exit("exllamav3 needs a CUDA device, and torch sees none: run this where there is one.")
    from exllamav3.conversion import convert_model

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        result = Path(place) / "model"
        options = ["--in_dir", str(args.model), "--out_dir", str(result)]
        options += ["--work_dir", str(args.work or Path(place) / "work")]
        options += ["--recipe", str(HERE / "recipe.yaml"), "--devices", args.devices]
        job, state, ready, error = convert_model.prepare(convert_model.parser.parse_args(options))
        if not ready:
            sys.exit(f"exllamav3 refuses: {error}")
        convert_model.main(job, state)
        text = (result / "quantization_config.json").read_text(encoding="utf-8")
        check(json.loads(text)["tensor_storage"], mix)
        result.rename(args.output)


def check(storage: dict[str, Any], mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a tensor is not stored in the bits of the mix."""
    wrong = []
    for name, entry in mix.items():
        got = storage.get(name, {}).get("bits_per_weight")
        if got != entry["bits"]:
            wrong.append(f"{name}: {got} bits in place of {entry['format']}")
    if wrong:
        sys.exit("exllamav3 changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
