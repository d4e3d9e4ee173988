from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from safetensors.torch import save_file

from hawqkit.errors import InputError, Unsupported
from hawqkit.models.model import LoadedModel, wrap_model
from hawqkit.pipeline.surface import export
from hawqkit.records import (
    Allocation,
    Certificate,
    DataFacts,
    Score,
    Sensitivities,
    Tensor,
    Totals,
)
from hawqkit.targets import TARGETS, Target, bits, find_target
from hawqkit.targets.folders import published
from hawqkit.targets.safetensors_bytes import file_bytes

MIX = {"model.layers.0.mlp.up_proj": "int4-g64-asym", "model.embed_tokens": "int8-g64"}


def allocation(mix: dict[str, str]) -> Allocation:
    certificate = Certificate("test", "optimal", 0.0, 0.0, 0.0, 2, 4)
    return Allocation(mix, {"average_bits": 4.0}, Totals(4.0, 4.25, {"compressed-tensors": 9}),
                      "vllm", "trace", 0.0, 0.5, certificate, rounding="nearest")  # fmt: skip


def table_of(model: LoadedModel) -> Sensitivities:
    """Return a table of zeros for the layers of a model."""
    count = len(model.layers)
    zeros = (0.0,) * count
    table = tuple((0.0,) for _ in range(count))
    return Sensitivities(
        model=model.facts,
        data=DataFacts("text", "hash", 1, 8, 8, 7, 1, 0),
        layers=model.layers,
        skipped=(),
        formats=("int4-g64",),
        weight_error=table,
        trace=zeros,
        trace_stderr=zeros,
        participation_ratio=zeros,
        network_participation_ratio=None,
        scores={"trace": Score("trace", table, table)},
        auto="trace",
        rounding="nearest",
        fingerprint="of zeros",
    )


def test_bits_json_holds_what_its_documentation_lists(tmp_path: Path) -> None:
    model = wrap_model(pico.llama(tied=True), name="pico")
    written = bits.write(allocation(MIX), tmp_path / "out", model)
    assert written == [tmp_path / "out" / "bits.json"]
    assert json.loads(written[0].read_text()) == {
        "kind": "hawqkit-bits",
        "schema": 1,
        "model": {"source": "pico", "hash": model.facts.hash},
        "rounding": "nearest",
        "runtime": "vllm",
        "budgets": {"average_bits": 4.0},
        "totals": {
            "average_bits": 4.0,
            "bits_per_weight": 4.25,
            "size": {"compressed-tensors": 9},
        },
        "layers": MIX,
    }


def test_bits_refuses_unknown_layers_and_misfits_and_writes_nothing(tmp_path: Path) -> None:
    model = wrap_model(pico.llama(), name="pico")
    mix = {"model.layers.0.mlp.up_proj": "int4-g128", "nothing": "none"}
    with pytest.raises(Unsupported, match=r"(?s)2 problems.*64 columns.*no such layer"):
        bits.write(allocation(mix), tmp_path / "out", model)
    assert list(tmp_path.iterdir()) == []


def test_bits_replaces_its_own_folder_alone(tmp_path: Path) -> None:
    model = wrap_model(pico.llama(), name="pico")
    bits.write(allocation({}), tmp_path / "out", model)
    bits.write(allocation(MIX), tmp_path / "out", model)
    assert json.loads((tmp_path / "out" / "bits.json").read_text())["layers"] == MIX
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "bits.json").write_text('{"kind": "thesis"}')
    with pytest.raises(InputError, match="is not replaced"):
        bits.write(allocation(MIX), tmp_path / "mine", model)
    assert (tmp_path / "mine" / "bits.json").read_text() == '{"kind": "thesis"}'
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        bits.write(allocation(MIX), tmp_path / "file", model)


def test_the_python_surface_writes_bits_from_sensitivities_as_from_the_model(
    tmp_path: Path,
) -> None:
    model = wrap_model(pico.llama(), name="pico")
    table = table_of(model)
    export(allocation(MIX), "bits", tmp_path / "model", model=model)
    export(allocation(MIX), "bits", tmp_path / "table", sensitivities=table)
    written = (tmp_path / "table" / "bits.json").read_bytes()
    assert written == (tmp_path / "model" / "bits.json").read_bytes()
    with pytest.raises(InputError, match="give model=, or sensitivities="):
        export(allocation(MIX), "bits", tmp_path / "other")
    with pytest.raises(Unsupported, match="writes weights: give the model"):
        export(allocation(MIX), "compressed-tensors", tmp_path / "other", sensitivities=table)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "table"]


def test_bits_has_no_size() -> None:
    model = wrap_model(pico.llama(), name="pico")
    target: Target = bits
    assert not target.SIZED
    with pytest.raises(Unsupported, match="writes names of formats and no weights"):
        target.size(MIX, model.layers, model.facts)
    with pytest.raises(Unsupported, match="bits_per_weight"):
        target.size_table(model.layers, ["int4-g64"], model.facts)


def test_every_target_of_the_table_is_found_and_an_unknown_one_is_named() -> None:
    assert [find_target(name).NAME for name in TARGETS] == list(TARGETS)
    with pytest.raises(InputError, match="Did you mean 'compressed-tensors'"):
        find_target("compressed_tensor")


def test_targets_are_checked_and_sized_without_torch() -> None:
    code = (
        "import sys; from hawqkit.targets import TARGETS, find_target;"
        "from hawqkit.records import Layer, ModelFacts, Tensor;"
        "name = 'model.layers.0.mlp.up_proj';"
        "layers = [Layer(name, 'linear', 256, 256, 'float32')];"
        "tensors = (Tensor(name + '.weight', 'float32', (256, 256)),);"
        "facts = ModelFacts('m', '', 'A', 65536, 'float32', tensors,"
        "                   {'model_type': 'llama', 'num_hidden_layers': 1});"
        "every = [find_target(n) for n in TARGETS];"
        "mixes = [{name: t.capabilities().formats()[0]} for t in every];"
        "found = [t.problems(mix, layers, facts) for t, mix in zip(every, mixes)];"
        "assert not any(found), found;"
        "mix = {name: 'int4-g64'};"
        "assert find_target('compressed-tensors').size(mix, layers, facts) > 32768;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


def test_file_bytes_equals_what_the_library_writes(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
              torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
    random = np.random.default_rng(0)
    for trial in range(60):
        tensors = {}
        for index in range(trial):
            shape = tuple(int(n) for n in random.integers(0, 12, size=int(random.integers(0, 4))))
            name = random.choice(["layer", 'quote"', "back\\slash", "é", "tab\t", "Zz"]) + str(
                index
            )
            tensors[name] = torch.zeros(shape, dtype=dtypes[int(random.integers(len(dtypes)))])
        metadata = {"format": "pt"} if trial % 2 else {}
        save_file(tensors, tmp_path / "x", metadata=metadata or None)
        facts = [Tensor(n, str(t.dtype)[6:], tuple(t.shape)) for n, t in tensors.items()]
        assert file_bytes(facts, metadata) == (tmp_path / "x").stat().st_size


def test_a_dtype_without_a_code_is_refused() -> None:
    with pytest.raises(Unsupported, match="complex64"):
        file_bytes([Tensor("a", "complex64", (1,))], {})


def test_a_folder_that_a_kill_left_between_two_renames_comes_back(tmp_path: Path) -> None:
    hidden = tmp_path / ".out.replaced"
    hidden.mkdir()
    (hidden / "old").write_text("old")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("half")

    def fail() -> None:
        with published(tmp_path / "out", lambda _: True) as place:
            assert list(place.iterdir()) == []
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (tmp_path / "out" / "old").read_text() == "old"
    with published(tmp_path / "out", lambda _: True) as place:
        (place / "new").write_text("new")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
