"""Quantize a model with AutoRound by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT [--iters N --data texts.jsonl]

MODEL is a folder as `save_pretrained` writes it, of the model that the mix was chosen for. The
default of 0 iterations rounds to the nearest codes and needs no data; N = 200 learns the rounding
from texts, one {"text": ...} a line, of at least --tokens each. Tested with auto-round 0.16.1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KEPT = {"bits": 16, "act_bits": 16, "data_type": "float"}


def main() -> None:
    """Quantize, save, and compare every layer's settings with the mix."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--iters", type=int, default=0)
    parser.add_argument("--data", default=None, help="texts.jsonl, for --iters above 0")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument(
        "--tokens", type=int, default=2048, help="of a text; shorter ones are left out"
    )
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")
    if args.iters and args.data is None:
        sys.exit("--iters above 0 learns from texts: give --data texts.jsonl.")

    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    layer_config = json.loads((HERE / "layer_config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    chosen = {name: entry for name, entry in mix.items() if entry["bits"] is not None}
    if unknown := sorted(set(chosen) - linear):
        sys.exit(f"the mix is of another model: it has no linear layers {unknown[:5]}.")
    # AutoRound would search for a name that is no linear layer as a regular expression.
    layer_config = {name: entry for name, entry in layer_config.items() if name in linear}
    for name in linear - set(chosen):
        if re.search(r"\.\d+\.", name):
            layer_config[name] = dict(KEPT)
    # With a symmetric scheme, asymmetric layers get a layout that is not loaded again.
    symmetric = all(entry["symmetric"] for entry in chosen.values())
    scheme = {"bits": 4, "group_size": 32, "sym": symmetric, "data_type": "int", "act_bits": 16}
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        layer_config=layer_config,
        iters=args.iters,
        dataset=args.data,
        nsamples=args.samples,
        seqlen=args.tokens,
        disable_opt_rtn=True,  # rounds to the nearest codes when iters is 0
        disable_model_free=True,  # the other path packs 2, 4 and 8 bits alone
        device_map=args.device,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        rounder.quantize_and_save(place, format="auto_round")
        (config,) = [*Path(place).glob("config.json"), *Path(place).glob("*/config.json")]
        check(json.loads(config.read_text(encoding="utf-8"))["quantization_config"], mix)
        config.parent.rename(args.output)


def check(written: dict[str, Any], mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer's settings in config.json are not those of the mix."""
    wrong = []
    for name, entry in mix.items():
        settings = {**written, **written["extra_config"].get(name, {})}
        if entry["bits"] is None:
            kept = settings["bits"] >= 16 or not re.search(r"\.\d+\.", name)
            wrong += [] if kept else [f"{name}: {settings['bits']} bits, not kept"]
            continue
        got = (settings["bits"], settings["group_size"], settings["sym"])
        if got != (entry["bits"], entry["group_size"] or -1, entry["symmetric"]):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("AutoRound changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
