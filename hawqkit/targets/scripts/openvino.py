"""Compress a model with NNCF by the files beside this script, which hawqkit wrote.

python apply.py MODEL OUTPUT

MODEL is a folder of the model that the mix was chosen for: as `save_pretrained` writes it, then it
is converted as it is, without a cache of keys and values (this needs torch and transformers); or as
`optimum-cli export openvino --weight-format fp32` writes it, with openvino_model.xml. No data is
needed: weights alone are rounded. Tested with nncf 3.4.0 and openvino 2026.4.1.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
XML = "openvino_model.xml"
PREFIX, SUFFIX = "__module.", "/aten::linear/MatMul"


def main() -> None:
    """Compress in one pass for each mode, compare every layer with the mix, and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new folder.")

    import nncf
    import openvino

    mix = json.loads((HERE / "hawqkit.json").read_text(encoding="utf-8"))["layers"]
    passes = json.loads((HERE / "openvino.json").read_text(encoding="utf-8"))
    converted = (args.model / XML).exists()
    model = openvino.Core().read_model(args.model / XML) if converted else convert(args.model)
    products = linear_nodes(model)
    chosen = {name for name, entry in mix.items() if entry["bits"] is not None}
    if unknown := sorted(chosen - set(products)):
        sys.exit(f"the OpenVINO model has no linear layers {unknown[:5]}: is it another model?")
    weighted = {node.get_friendly_name() for node in model.get_ops() if is_weighted(node)}
    for one in passes:
        mode = nncf.CompressWeightsMode(one["mode"])
        kept = weighted - {products[name].get_friendly_name() for name in one["layers"]}
        options: dict[str, Any] = {}
        if not one["mode"].startswith("int8"):  # else NNCF refuses these
            options = {"group_size": one["group_size"], "all_layers": True, "ratio": 1.0}
        scope = nncf.IgnoredScope(names=sorted(kept), validate=False)
        model = nncf.compress_weights(model, mode=mode, ignored_scope=scope, **options)
    check(model, mix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        result = Path(place) / "model"
        result.mkdir()
        openvino.save_model(model, result / XML, compress_to_fp16=False)
        for file in args.model.iterdir():
            if file.is_file() and (file.suffix in (".json", ".txt", ".model", ".jinja")):
                shutil.copy(file, result)
        for name in ("tokenizer", "detokenizer"):
            for file in args.model.glob(f"openvino_{name}.*"):
                shutil.copy(file, result)
        result.rename(args.output)


def convert(folder: Path) -> Any:
    """Return the OpenVINO model of a transformers model."""
    import openvino
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    tokens = torch.ones((1, 8), dtype=torch.long)
    return openvino.convert_model(
        model, example_input={"input_ids": tokens, "attention_mask": tokens}
    )


def linear_nodes(model: Any) -> dict[str, Any]:
    """Return the name of a layer -> the product that OpenVINO made of it."""
    found = {}
    for node in model.get_ops():
        name = node.get_friendly_name()
        if name.startswith(PREFIX) and name.endswith(SUFFIX):
            found[name[len(PREFIX) : -len(SUFFIX)]] = node
    return found


def is_weighted(node: Any) -> bool:
    """Whether NNCF might compress a constant that a node reads."""
    return node.get_type_name() in ("MatMul", "Gather", "Convolution", "GroupConvolution")


def stored(product: Any) -> tuple[str, int] | None:
    """Return the type of a product's stored codes and the columns of a group; None for floats."""
    waiting, constants = [product.input_value(1).get_node()], []
    while waiting:
        node = waiting.pop()
        waiting += [node.input_value(i).get_node() for i in range(node.get_input_size())]
        if node.get_type_name() == "Constant":
            constants.append(node)
    codes = max(constants, key=lambda constant: math.prod(constant.get_output_shape(0)))
    kind = codes.get_output_element_type(0)
    return None if kind.is_real() else (kind.get_type_name(), codes.get_output_shape(0)[-1])


def check(model: Any, mix: dict[str, dict[str, Any]]) -> None:
    """Stop if a layer is not stored in the width and groups of the mix, or another one is."""
    wrong = []
    for name, node in linear_nodes(model).items():
        entry = mix.get(name, {"bits": None, "format": "none"})
        got = stored(node)
        columns = node.input_value(1).get_shape()[-1]
        wanted = None
        if entry["bits"] is not None:
            wanted = (entry["bits"], entry["group_size"] or columns)
        if wanted != (None if got is None else (int(got[0].lstrip("iu")), got[1])):
            wrong.append(f"{name}: {got} in place of {entry['format']}")
    if wrong:
        sys.exit("NNCF changed the mix, nothing was saved:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
