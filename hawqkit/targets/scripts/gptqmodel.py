"""Quantize a model with GPTQModel by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT --data texts.jsonl [--samples 128]

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for; texts
stand in the data file as {"text": ...}, one a line. Tested with gptqmodel 7.6.0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Quantize, compare every layer's settings with the mix, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="texts.jsonl")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="of a text that are read")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    dynamic = json.loads((HERE / "dynamic.json").read_text(encoding="utf-8"))
    chosen = {name: entry for name, entry in mix.items() if entry["bits"] is not None}
    config = QuantizeConfig(
        bits=4,
        group_size=32,
        sym=all(entry["symmetric"] for entry in chosen.values()),
        dynamic=dynamic,
        lm_head="lm_head" in chosen,
        device=args.device,
        offload_to_disk=False,
        # its reordering of columns is not defined where one scale serves the whole row
        act_group_aware=all(entry["group_size"] for entry in chosen.values()),
    )
    model = GPTQModel.load(str(args.model), config)
    linear = {n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    if unknown := sorted(set(chosen) - linear):
        sys.exit(f"the mix is of another model: it has no linear layers {unknown[:5]}.")
    lines = args.data.read_text(encoding="utf-8").splitlines()[: args.samples]
    texts = [json.loads(line)["text"] for line in lines]
    tokens = [model.tokenizer(t, truncation=True, max_length=args.tokens) for t in texts]
    model.quantize([{k: t[k] for k in ("input_ids", "attention_mask")} for t in tokens])
    check(model.model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        model.save(str(Path(place) / "model"))
        (Path(place) / "model").rename(args.output)


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer was not packed in the settings of the mix."""
    modules = dict(model.named_modules())
    wrong = []
    for name, entry in mix.items():
        module = modules.get(name)
        packed = module is not None and hasattr(module, "qweight")
        if entry["bits"] is None:
            wrong += [f"{name}: it was quantized, not kept"] if packed else []
            continue
        if module is None or not packed:
            wrong.append(f"{name}: it was kept in place of {entry['format']}")
            continue
        # a scale for the whole row is -1, or the number of columns once the layer is packed
        group = entry["group_size"] or module.in_features
        got = (module.bits, module.in_features if module.group_size == -1 else module.group_size)
        if got != (entry["bits"], group):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("GPTQModel changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
