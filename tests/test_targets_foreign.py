"""Reading mixes that others made: each consumer's rule, and what our own targets write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pico
import pytest
from safetensors.numpy import save_file
from test_targets_compressed_tensors import allocation

from hawqkit.errors import InputError, Unsupported
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.targets import find_target
from hawqkit.targets.foreign import read_foreign

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return wrap_model(pico.llama(), name="pico", tokenizer=pico.tokenizer())


def read(
    model: LoadedModel, folder: Path, config: dict[str, Any], name: str = "config.json"
) -> Any:
    (folder / name).write_text(json.dumps(config))
    return read_foreign(folder, model.layers, model.facts)


def test_what_the_compressed_tensors_target_writes_is_read_again(
    model: LoadedModel, tmp_path: Path
) -> None:
    mix = dict.fromkeys((x.name for x in model.layers), "none")
    mix |= {UP: "int3-g32", DOWN: "fp8-e4m3-channel", Q: "int8-channel-a8", K: "int4-channel"}
    find_target("compressed-tensors").write(allocation(mix), tmp_path / "out", model)
    found = read_foreign(tmp_path / "out", model.layers, model.facts)
    assert (found.kind, found.layers) == ("compressed-tensors", mix)


def test_compressed_tensors_names_win_over_patterns_over_classes_and_ignore_over_all(
    model: LoadedModel, tmp_path: Path
) -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group",
                   "group_size": 32}  # fmt: skip
        return {"targets": list(targets), "weights": weights}

    config = {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "a": group(8, "Linear"),
                "b": group(4, r"re:.*up_proj$", "re:.*layers.1.*"),
                "c": group(3, UP),
            },
            "ignore": ["lm_head", "re:.*self_attn"],
        }
    }
    found = read(model, tmp_path, config).layers
    assert found[UP] == "int3-g32"
    assert found[DOWN] == "int4-g32"
    assert found["model.layers.0.mlp.down_proj"] == "int8-g32"
    assert found[Q] == found["lm_head"] == found["model.embed_tokens"] == "none"


def test_gptq_patterns_match_prefixes_and_the_first_wins(
    model: LoadedModel, tmp_path: Path
) -> None:
    config = {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True,
        "dynamic": {
            r"-:model\.layers\.0\.self_attn": {},
            r"+:.*up_proj": {"bits": 8},
            r"+:model\.layers\.0": {"bits": 2, "group_size": -1, "sym": True},
        },
    }  # fmt: skip
    found = read(model, tmp_path, config, "quantize_config.json")
    assert found.layers[Q] == "none"
    assert found.layers[UP] == "int8-g32-asym"
    assert found.layers["model.layers.0.mlp.down_proj"] == "int2-channel"
    assert found.layers[DOWN] == "int4-g32-asym"
    assert found.layers["lm_head"] == "none"
    assert "desc_act" in found.notes[0]


def test_auto_round_awq_bitsandbytes_and_mlx(model: LoadedModel, tmp_path: Path) -> None:
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True}
    extra = {UP: {"bits": 8, "group_size": 64}, DOWN: {"bits": 16}, "lm_head": {"bits": 8}}
    found = read(model, tmp_path, {"quantization_config": {**base, "extra_config": extra}}).layers
    assert (found[UP], found[DOWN], found[Q]) == ("int8-channel", "none", "int4-g32")  # 64 columns
    assert found["lm_head"] == "int8-g32"
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
              "modules_to_not_convert": ["down_proj"]}  # fmt: skip
    found = read(model, tmp_path, {"quantization_config": config}).layers
    assert (found[UP], found[DOWN], found["lm_head"]) == ("int4-g32-asym", "none", "none")
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
              "llm_int8_skip_modules": ["down_proj"]}  # fmt: skip
    found = read(model, tmp_path, {"quantization_config": config}).layers
    assert (found[UP], found[DOWN], found["lm_head"]) == ("nf4-g64", "none", "nf4-g64")
    del config["llm_int8_skip_modules"]  # without a list the head stays
    found = read(model, tmp_path, {"quantization_config": config}).layers
    assert (found[UP], found[DOWN], found["lm_head"]) == ("nf4-g64", "nf4-g64", "none")
    config = {"group_size": 32, "bits": 4, "mode": "affine", UP: {"bits": 8, "group_size": 64},
              DOWN: False, Q: {"mode": "mxfp4", "bits": 4, "group_size": 32}}  # fmt: skip
    found = read(model, tmp_path, {"quantization": config}).layers
    assert (found[UP], found[DOWN], found[Q]) == ("int8-channel-asym", "none", "mxfp4")
    assert found["model.embed_tokens"] == "int4-g32-asym"
    scaled = {f"{n}.scales": np.zeros(1) for n in (UP, Q)}
    save_file(scaled, tmp_path / "model.safetensors")  # a module without scales was left alone
    found = read(model, tmp_path, {"quantization": config}).layers
    assert (found[UP], found[Q], found[K]) == ("int8-channel-asym", "mxfp4", "none")
    assert found["model.embed_tokens"] == "none"


def test_a_gguf_file_is_read_by_the_names_of_its_tensors(
    model: LoadedModel, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for layer in model.layers:
        name = names.get_name(layer.name)
        values = np.zeros((layer.rows, layer.columns), np.float32)
        if layer.name == UP:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for path in (tmp_path, tmp_path / "a.gguf"):
        found = read_foreign(path, model.layers, model.facts)
        assert found.kind == "gguf"
        assert {n for n, f in found.layers.items() if f != "none"} == {UP}
        assert found.layers[UP] == "q8_0"
    other = wrap_model(pico.gpt2(), name="other")
    with pytest.raises(InputError, match="is of another model; "):
        read_foreign(tmp_path / "a.gguf", other.layers, other.facts)


def test_what_no_format_names_is_listed_and_nonsense_is_refused(
    model: LoadedModel, tmp_path: Path
) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 48, "sym": True}
    with pytest.raises(Unsupported, match="14 of 16 layers") as caught:
        read(model, tmp_path, {"quantization_config": config})
    assert "group_size 48" in str(caught.value)
    for config, words in (
        ({"quantization_config": {"quant_method": "quark"}}, "quant_method 'quark'"),
        ({"model_type": "llama"}, "quantizes nothing"),
    ):
        with pytest.raises(InputError, match=words):
            read(model, tmp_path, config)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_foreign(tmp_path, model.layers, model.facts)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds neither"):
        read_foreign(tmp_path / "empty", model.layers, model.facts)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(InputError, match="no GGUF file"):
        read_foreign(tmp_path / "bad.gguf", model.layers, model.facts)
    other = {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:.*": {}}}
    with pytest.raises(InputError, match="quantizes none"):
        read(model, tmp_path, other)
