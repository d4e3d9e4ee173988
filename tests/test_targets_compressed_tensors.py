from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CompressedTensorsConfig,
    PreTrainedModel,
)

from hawqkit.errors import InputError, Unsupported
from hawqkit.formats import parse_format
from hawqkit.models.loading import load_model
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.quantize.apply import applied
from hawqkit.records import Allocation, Certificate, Totals
from hawqkit.targets import Target, compressed_tensors
from hawqkit.targets.compressed_tensors_writer import pack

compressed = pytest.importorskip("compressed_tensors")  # what reads the folder; an extra

PARTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def allocation(mix: Mapping[str, str], rounding: str = "searched") -> Allocation:
    certificate = Certificate("test", "optimal", 0.0, 0.0, 0.0, len(mix), len(mix))
    return Allocation(
        layers=dict(mix),
        budgets={"average_bits": 4.0},
        totals=Totals(4.0, 4.25, {"compressed-tensors": 1}),
        runtime="transformers",
        score="trace",
        risk=0.0,
        objective=0.0,
        certificate=certificate,
        rounding=rounding,
    )


def mixed() -> dict[str, str]:
    """Every width and every kind of group in one model; one layer by name `none`, one not named."""
    first = ["int2-g32", "int3-g64", "int4-g32", "int5-channel", "int6-g64", "int8-channel"]
    second = ["int8-g64", "int2-channel", "int6-g32", "int3-channel", "int4-g64", "int5-g32"]
    mix = {f"model.layers.0.{p}": f for p, f in zip(PARTS, [*first, "int4-g128"], strict=True)}
    mix |= {f"model.layers.1.{p}": f for p, f in zip(PARTS, second, strict=False)}
    return mix | {"model.layers.1.self_attn.v_proj": "none", "lm_head": "int3-g32"}


def wrapped(module: PreTrainedModel, **options: Any) -> LoadedModel:
    return wrap_model(module, name="pico", tokenizer=pico.tokenizer(), **options)


def total_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def logits_of(module: Any) -> torch.Tensor:
    tokens = pico.sequences(3, 20).tokens
    with torch.no_grad():
        return module(input_ids=tokens).logits.float()


def reloaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options)


def test_the_folder_loads_in_plain_transformers_with_the_logits_of_the_dequantized_model(
    tmp_path: Path,
) -> None:
    model = wrapped(pico.llama())
    files = compressed_tensors.write(allocation(mixed()), tmp_path / "out", model)
    with applied(model, mixed(), rounding="searched"):
        expected = logits_of(model.module)
    found = logits_of(reloaded(tmp_path / "out"))
    assert float((found - expected).abs().max()) < 1e-5  # sums of the same float32 products
    assert float((logits_of(model.module) - expected).abs().max()) > 0.1  # the mix does something
    assert sorted(files) == sorted(p for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert len({path.stat().st_mode for path in files}) == 1  # whoever reads one may read all
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("hello")["input_ids"] == pico.tokenizer()("hello")["input_ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_transformers_decodes_equal_ours_bit_for_bit_in_each_stored_dtype(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    pico.save(tmp_path / "source", pico.llama(dtype=dtype))
    model = load_model(str(tmp_path / "source"), dtype=str(dtype).removeprefix("torch."))
    compressed_tensors.write(allocation(mixed(), "nearest"), tmp_path / "out", model)
    loaded = reloaded(tmp_path / "out")
    assert loaded.dtype is dtype
    logits_of(loaded)  # transformers decodes when a layer is called
    with applied(model, mixed(), rounding="nearest"):
        for name in mixed():
            assert torch.equal(loaded.get_submodule(name).weight, model.weight(name)), name


@pytest.mark.parametrize(
    "module",
    [
        pico.llama,
        lambda: pico.llama(tied=True, dtype=torch.bfloat16),
        lambda: pico.llama(dtype=torch.float16, layers=11, hidden=128, intermediate=256),
    ],
)
@pytest.mark.parametrize("which", ["nothing", "mixed", "one", "all", "none"])
def test_size_is_what_the_folder_holds_to_the_byte(tmp_path: Path, module: Any, which: str) -> None:
    model = wrapped(module())
    linear = [layer.name for layer in model.layers if layer.kind == "linear"]
    mix = {
        "nothing": {},
        "mixed": {n: f for n, f in mixed().items() if n in linear},
        "one": {linear[0]: "int5-channel"},
        "all": dict.fromkeys(linear, "int3-g64"),
        "none": dict.fromkeys(linear, "none"),
    }[which]
    compressed_tensors.write(allocation(mix), tmp_path / "out", model)
    assert total_bytes(tmp_path / "out") == compressed_tensors.size(mix, model.layers, model.facts)


def test_rows_whose_codes_do_not_fill_words_are_counted_and_loaded(tmp_path: Path) -> None:
    model = wrapped(pico.llama(hidden=72, intermediate=100))
    mix = {f"model.layers.{i}.{p}": "int3-channel" for i in range(2) for p in PARTS}
    mix["model.layers.1.mlp.down_proj"] = "int5-channel"
    compressed_tensors.write(allocation(mix), tmp_path / "out", model)
    assert total_bytes(tmp_path / "out") == compressed_tensors.size(mix, model.layers, model.facts)
    with applied(model, mix, rounding="searched"):
        expected = logits_of(model.module)
    assert float((logits_of(reloaded(tmp_path / "out")) - expected).abs().max()) < 1e-5


def test_the_table_predicts_the_size_within_what_headers_take() -> None:
    model = wrapped(pico.llama())
    formats = ["int2-g32", "int4-g64", "int8-channel", "int4-g128", "none"]
    costs, fixed = compressed_tensors.size_table(model.layers, formats, model.facts)
    linear = [i for i, layer in enumerate(model.layers) if layer.kind == "linear"]
    everything = fixed + int(costs[:, -1].sum())
    assert everything == compressed_tensors.size({}, model.layers, model.facts)
    for column, name in enumerate(formats[:3]):
        mix = {model.layers[i].name: name for i in linear}
        exact = compressed_tensors.size(mix, model.layers, model.facts)
        embedding = int(costs[[i for i in range(len(costs)) if i not in linear], -1].sum())
        near = fixed + embedding + int(costs[linear, column].sum())
        assert abs(near - exact) < 3000  # README's warning, the group's head, digits of offsets
    narrow = [i for i, layer in enumerate(model.layers) if layer.columns == 64]
    assert (costs[narrow, 3] == 0).all()  # a format that does not fit


def test_a_mixture_of_experts_loads_as_it_is_and_is_refused_once_a_layer_is_packed(
    tmp_path: Path,
) -> None:
    model = wrapped(pico.mixtral())
    compressed_tensors.write(allocation({}), tmp_path / "out", model)
    assert total_bytes(tmp_path / "out") == compressed_tensors.size({}, model.layers, model.facts)
    difference = logits_of(reloaded(tmp_path / "out")) - logits_of(model.module)
    assert float(difference.abs().max()) < 1e-5  # attention kernels may sum in another order
    mix = {
        "model.layers.0.self_attn.q_proj": "int4-g32",
        "model.layers.1.self_attn.o_proj": "none",
    }
    with pytest.raises(Unsupported, match=r"(?s)1 problem.*loses experts.*export 'bits'"):
        compressed_tensors.write(allocation(mix), tmp_path / "packed", model)
    assert not (tmp_path / "packed").exists()


def test_tensors_keep_the_dtype_of_the_checkpoint_though_the_model_is_loaded_wider(
    tmp_path: Path,
) -> None:
    pico.save(tmp_path / "source", pico.llama(dtype=torch.bfloat16))
    model = load_model(str(tmp_path / "source"), dtype="float32")
    mix = {"model.layers.0.mlp.up_proj": "int4-g64"}
    compressed_tensors.write(allocation(mix), tmp_path / "out", model)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        kept = {file.get_tensor(n).dtype for n in names if n.endswith("weight")}
        scale = file.get_tensor("model.layers.0.mlp.up_proj.weight_scale").dtype
    assert (kept, scale) == ({torch.bfloat16}, torch.bfloat16)
    assert total_bytes(tmp_path / "out") == compressed_tensors.size(mix, model.layers, model.facts)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 64, 100])
def test_packing_equals_that_of_compressed_tensors(bits: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-half, half, (5, columns), generator=generator).to(torch.int8)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert packed.shape == (5, -(-columns * bits // 32))


def test_each_target_of_the_configuration_matches_one_module_alone() -> None:
    model = wrapped(pico.llama(layers=12))
    mix = {"model.layers.1.mlp.up_proj": "int4-g64", "model.layers.11.mlp.up_proj": "int3-g64"}
    config = compressed_tensors.quantization_config(mix, model.layers, model.facts)
    assert config is not None
    names = [name for name, _ in model.module.named_modules()]
    for group in config["config_groups"].values():
        matched = [n for n in names if re.match(group["targets"][0].removeprefix("re:"), n)]
        assert len(matched) == 1
        bits = parse_format(mix[matched[0]]).bits
        assert group["weights"]["num_bits"] == bits
    linear = {n for n, m in model.module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linear - set(config["ignore"]) == set(mix)


def test_a_tied_head_is_ignored_and_stays_tied(tmp_path: Path) -> None:
    model = wrapped(pico.llama(tied=True))
    mix = {"model.layers.0.mlp.up_proj": "int4-g64"}
    compressed_tensors.write(allocation(mix), tmp_path / "out", model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "lm_head" in config["quantization_config"]["ignore"]
    loaded = reloaded(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_readme_tells_how_to_load_and_warns_of_dequantize() -> None:
    model = wrapped(pico.llama())
    text = compressed_tensors.readme(mixed(), model.layers, model.facts)
    for part in (
        "from_pretrained",
        "lm_eval --model hf --model_args pretrained=PATH/TO/THIS/FOLDER,dtype=float32",
        "| int3-g64 | 1 |",
        "A folder whose stored dtype is 16-bit decodes in 16 bits unless `dtype=torch.float32`",
        "is given to `from_pretrained`; this folder is stored in float32.",
        "`CompressedTensorsConfig(dequantize=True)` silently applies one group's scheme to every",
    ):
        assert part in " ".join(text.split("\n"))
    assert "dequantize" not in compressed_tensors.readme({}, model.layers, model.facts)


def test_a_16_bit_folder_decodes_in_16_bits_unless_float32_is_asked_for_as_the_readme_says(
    tmp_path: Path,
) -> None:
    pico.save(tmp_path / "source", pico.llama(dtype=torch.bfloat16))
    model = load_model(str(tmp_path / "source"), dtype="float32")
    compressed_tensors.write(allocation(mixed()), tmp_path / "out", model)
    assert "stored in bfloat16" in (tmp_path / "out" / "README.md").read_text()
    narrow, wide = (
        reloaded(tmp_path / "out", **options) for options in ({}, {"dtype": torch.float32})
    )
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for module in (narrow, wide):
        logits_of(module)  # transformers decodes when a layer is called
    most = 0.0
    with applied(model, mixed(), rounding="searched"):
        for name in mixed():
            exact = model.weight(name)
            assert torch.equal(wide.get_submodule(name).weight, exact), name
            once_more = narrow.get_submodule(name).weight.detach().float() / exact - 1
            most = max(most, float(once_more.nan_to_num().abs().max()))  # a code of 0 is exact
    assert 0.001 < most < 0.004


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_dequantize_applies_one_scheme_to_every_layer_as_the_readme_says(tmp_path: Path) -> None:
    model = wrapped(pico.llama())
    first, other = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    mix = {first: "int3-g32", other: "int4-g32"}
    compressed_tensors.write(allocation(mix), tmp_path / "out", model)
    option = CompressedTensorsConfig(dequantize=True)
    loaded = reloaded(tmp_path / "out", quantization_config=option)
    with applied(model, mix, rounding="searched"):
        right, wrong = (
            float((loaded.get_submodule(n).weight.detach() - model.weight(n)).abs().max())
            / float(model.weight(n).abs().max())
            for n in (first, other)
        )
    assert right < 0.01
    assert wrong > 0.5


def test_every_problem_is_told_at_once_with_its_layer_and_what_to_do(tmp_path: Path) -> None:
    model = wrapped(pico.llama(tied=True))
    mix = {
        "model.layers.0.mlp.up_proj": "int4-g64-asym",
        "model.layers.0.mlp.gate_proj": "int4-g128",
        "model.layers.0.mlp.up_prj": "int4-g64",
        "model.layers.0.self_attn.q_proj": "int7-g64",
        "model.embed_tokens": "int8-g64",
    }
    found = compressed_tensors.problems(mix, model.layers, model.facts)
    assert len(found) == 5
    asymmetric, misfit, unknown, grammar, embedding = found
    assert "zero points do not load" in asymmetric
    assert "use the symmetric 'int4-g64'" in asymmetric
    assert "64 columns" in misfit
    assert "int4-g64" in misfit
    assert "Did you mean 'model.layers.0.mlp.up_proj'" in unknown
    assert "int7-g64" in grammar
    assert "tied to lm_head" in embedding
    assert "layers.exclude: [model.embed_tokens]" in embedding
    with pytest.raises(Unsupported, match="5 problems"):
        compressed_tensors.write(allocation(mix), tmp_path / "out", model)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Unsupported, match="64 columns"):
        compressed_tensors.size(mix, model.layers, model.facts)


def test_a_conv1d_is_refused_since_it_would_be_passed_over() -> None:
    model = wrapped(pico.gpt2())
    names = [layer.name for layer in model.layers if layer.kind == "conv1d"]
    mix = dict.fromkeys(names, "int4-g64")
    found = compressed_tensors.problems(mix, model.layers, model.facts)
    assert len(found) == len(names)
    assert all("Conv1D" in line for line in found)
    kept = dict.fromkeys(names, "none")
    assert compressed_tensors.problems(kept, model.layers, model.facts) == []


def test_a_shared_linear_a_renamed_weight_and_a_bare_module_are_refused() -> None:
    model = wrapped(pico.llama())
    layer = next(x for x in model.layers if x.name == "lm_head")
    tied = [replace(layer, tied=("other",))]
    mix = {"lm_head": "int4-g64"}
    assert "shared with other" in compressed_tensors.problems(mix, tied, model.facts)[0]
    renamed = replace(model.facts, tensors=())
    assert "another name" in compressed_tensors.problems(mix, [layer], renamed)[0]
    net = wrap_model(
        torch.nn.Sequential(torch.nn.Embedding(7, 64), torch.nn.Linear(64, 7)), name="n"
    )
    assert (
        "no transformers configuration" in compressed_tensors.problems({}, net.layers, net.facts)[0]
    )


def test_an_earlier_export_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    model = wrapped(pico.llama())
    mix = {"model.layers.0.mlp.up_proj": "int4-g64"}
    folder = tmp_path / "out"
    compressed_tensors.write(allocation(mixed()), folder, model)
    compressed_tensors.write(allocation(mix), folder, model)
    assert total_bytes(folder) == compressed_tensors.size(mix, model.layers, model.facts)
    pico.save(tmp_path / "original")
    before = {p: p.read_bytes() for p in (tmp_path / "original").iterdir()}
    with pytest.raises(InputError, match="no export of this target wrote"):
        compressed_tensors.write(allocation(mix), tmp_path / "original", model)
    assert {p: p.read_bytes() for p in (tmp_path / "original").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original", "out"]


def test_a_failure_while_writing_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(pico.llama())
    compressed_tensors.write(allocation(mixed()), tmp_path / "out", model)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}

    def full(folder: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoadedModel, "save_side_files", lambda self, folder: full(folder))
    with pytest.raises(OSError, match="No space left"):
        compressed_tensors.write(allocation({}), tmp_path / "out", model)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_module_fulfills_the_contract() -> None:
    target: Target = compressed_tensors
    assert (target.NAME, target.SIZED) == ("compressed-tensors", True)
