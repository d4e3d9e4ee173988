"""Load what NNCF made in OpenVINO, and report it: `openvino.py MODEL OUTPUT RESULT`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX, SUFFIX = "__module.", "/aten::linear/MatMul"
F32 = {"INFERENCE_PRECISION_HINT": "f32"}


def codes(product: Any) -> Any:
    """Return the constant with the stored codes that a product reads."""
    waiting, found = [product.input_value(1).get_node()], []
    while waiting:
        node = waiting.pop()
        waiting += [node.input_value(i).get_node() for i in range(node.get_input_size())]
        if node.get_type_name() == "Constant":
            found.append(node)
    return max(found, key=lambda node: int(np.prod(node.get_output_shape(0))))


def main() -> None:
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    import openvino
    from openvino.opset13 import result as result_of

    core = openvino.Core()
    model = core.read_model(Path(sys.argv[2]) / "openvino_model.xml")
    tokens = np.arange(8, 72)[None] % 96
    inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    tensors = {"logits": core.compile_model(model, "CPU", F32)(inputs)[0][0]}
    settings: dict[str, dict[str, Any]] = {}
    for node in model.get_ops():
        name = node.get_friendly_name()
        if not (name.startswith(PREFIX) and name.endswith(SUFFIX)):
            continue
        name = name[len(PREFIX) : -len(SUFFIX)]
        constant = codes(node)
        kind = constant.get_output_element_type(0)
        if kind.is_real():
            continue
        shape = list(constant.get_output_shape(0))
        columns = node.input_value(1).get_shape()[-1]
        settings[name] = {
            "type": kind.get_type_name(),
            "group_size": None if shape[-1] == columns else shape[-1],
        }
        weight = openvino.Model([result_of(node.input_value(1))], [])
        tensors[f"weight.{name}"] = core.compile_model(weight, "CPU", F32)([])[0]
    place = Path(sys.argv[3])
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "tensors.safetensors")
    (place / "layers.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    main()
