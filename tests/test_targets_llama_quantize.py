from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import gguf_cases as cases
import numpy as np
import pico
import pytest
from gguf_cases import TYPES, allocation, every_type, types_in

from hawqkit.errors import InputError, Unsupported
from hawqkit.models.model import wrap_model
from hawqkit.records import Allocation, Layer, ModelFacts, Tensor
from hawqkit.targets import Target, gguf_writer
from hawqkit.targets import llama_quantize as target
from hawqkit.targets.configuration import MARK, NOTE, SCRIPT
from hawqkit.targets.contract import Target as Contract
from hawqkit.targets.matching import first_search, verify

FILES = [target.FILE, SCRIPT, MARK, NOTE]


def named(blocks: int) -> tuple[list[Layer], ModelFacts]:
    """Return a Llama of many blocks, as facts alone."""
    names = ["model.embed_tokens"]
    for block in range(blocks):
        names += [f"model.layers.{block}.mlp.{part}_proj" for part in ("up", "gate", "down")]
    layers = [
        Layer(n, "embedding" if "embed" in n else "linear", 256, 256, "bfloat16") for n in names
    ]
    tensors = [Tensor(f"{n}.weight", "bfloat16", (256, 256)) for n in names]
    tensors.append(Tensor("model.norm.weight", "bfloat16", (256,)))
    config = {"model_type": "llama", "num_hidden_layers": blocks}
    facts = ModelFacts("m", "hash", "LlamaForCausalLM", 0, "bfloat16", tuple(tensors), config)
    return layers, facts


def tool_s_type(text: str, tensor: str) -> str | None:
    """Decide as tools/quantize/quantize.cpp and llama-quant.cpp do, written down independently."""
    for word in text.split():
        name, _, kind = word.partition("=")
        if re.search(name.lower(), tensor):
            return kind
    return None


def test_every_matrix_of_a_model_gets_exactly_its_type_by_the_tool_s_rule(tmp_path: Path) -> None:
    layers, facts = named(23)  # 1 is a prefix of 11, and 2 of 22
    choices = [*TYPES, "none"]
    mix = {layer.name: choices[i % len(choices)] for i, layer in enumerate(layers)}
    files = target.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    assert [path.name for path in files] == FILES
    text = files[0].read_text()
    for layer in layers:
        block = re.search(r"layers\.(\d+)\.mlp\.(\w+)_proj", layer.name)
        tensor = f"blk.{block[1]}.ffn_{block[2]}.weight" if block else "token_embd.weight"
        wanted = mix[layer.name] if mix[layer.name] != "none" else "bf16"
        assert tool_s_type(text, tensor) == wanted, layer.name
    assert tool_s_type(text, "output_norm.weight") is None
    assert text == text.lower()
    assert not [line for line in text.splitlines() if line.startswith("#") or " " in line]


def test_the_naive_pattern_is_what_verify_refuses() -> None:
    wanted = {"blk.1.ffn_up.weight": "q4_k", "blk.11.ffn_up.weight": "q6_k"}
    naive = [(f"{name}", kind) for name, kind in wanted.items()]
    unanchored = [(name.removesuffix("ffn_up.weight"), kind) for name, kind in naive]
    with pytest.raises(Unsupported, match=r"blk\.11\."):
        verify("test", [("blk.1", "q4_k"), unanchored[1]], first_search, wanted, wanted)
    text = target.types_text(wanted)
    verify("test", target.entries(text), first_search, wanted, wanted)


def test_layers_that_a_mix_does_not_name_are_listed_as_they_are_stored(tmp_path: Path) -> None:
    layers, facts = named(2)
    files = target.write_from_facts(allocation({}), tmp_path / "out", layers, facts)
    kinds = {kind for _, kind in target.entries(files[0].read_text())}
    assert kinds == {"bf16"}
    assert len(target.entries(files[0].read_text())) == len(layers)


def test_tied_embeddings_and_conv1d_have_one_tensor() -> None:
    tied = cases.qwen2()
    mix = {"model.embed_tokens": "q6_k"}
    types = target.tensor_types(mix, tied.layers, tied.facts)
    assert types["token_embd.weight"] == "q6_k"
    assert "output.weight" not in types
    gpt2 = wrap_model(pico.gpt2(), name="gpt2")
    first = "transformer.h.0.attn.c_attn"
    assert target.problems({first: "q4_0"}, gpt2.layers, gpt2.facts) == []
    assert target.tensor_types({first: "q4_0"}, gpt2.layers, gpt2.facts)[
        "blk.0.attn_qkv.weight"
    ] == "q4_0"  # fmt: skip


def test_every_problem_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    layers, facts = named(2)
    odd = Layer("model.layers.0.extra", "linear", 256, 256, "bfloat16")
    mix = {
        "model.layers.0.mlp.up_proj": "int4-g64",
        "model.layers.0.extra": "q4_k",
        "..": "q4_k",
        "model.layers.1.mlp.up_proj": "q9",
    }
    with pytest.raises(Unsupported, match="4 problems") as caught:
        target.write_from_facts(allocation(mix), tmp_path / "out", [*layers, odd], facts)
    for word in ("'int4-g64'", "these fit: iq4_xs", "knows no tensor of that name", "'..'", "q9"):
        assert word in str(caught.value)
    strange = replace(facts, config={"model_type": "unheard-of"})
    assert "no models of type 'unheard-of'" in target.problems({}, layers, strange)[0]
    narrow = [replace(layers[1], columns=96)]
    found = target.problems({layers[1].name: "q4_k"}, narrow, facts)
    assert "256 does not divide; these fit: iq4_nl, q4_0" in found[0]
    assert list(tmp_path.iterdir()) == []


def test_an_export_appears_at_once_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, facts = named(1)
    mix = {"model.layers.0.mlp.up_proj": "q4_k"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not replaced"):
        target.write_from_facts(allocation(mix), tmp_path / "mine", layers, facts)
    target.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            target.write_from_facts(allocation({}), tmp_path / "out", layers, facts)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    note = before[NOTE].decode()
    assert "the prediction holds for what it makes" in note
    assert "--imatrix" in note


FAKE = """\
#!{python}
import shutil, sys
sys.path[:0] = {path!r}
from pathlib import Path
types, source, output, mixture = sys.argv[-4:]
import gguf, libgguf, numpy as np
wanted = dict(w[1:].replace("\\\\", "").split("$=") for w in Path(types).read_text().split())
if {broken!r}:
    wanted["token_embd.weight"] = "q8_0"
reader = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(output, "llama")
writer.add_string("mixture", mixture)
for t in reader.tensors:
    kind = gguf.GGMLQuantizationType[wanted.get(t.name, t.tensor_type.name).upper()]
    data = t.data if kind == t.tensor_type else libgguf.quantize_rows(t.data, kind)
    writer.add_tensor(t.name, data, raw_dtype=kind)
writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.write_tensors_to_file()
writer.close()
"""


def run(folder: Path, tool: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(folder / SCRIPT), *map(str, words)],
        capture_output=True, text=True, check=False, env={"LLAMA_QUANTIZE": tool, "PATH": "/bin"},
    )  # fmt: skip


def test_the_script_runs_the_tool_and_keeps_what_has_every_type(tmp_path: Path) -> None:
    model = cases.llama(tokenizer=None)
    mix = {name: kind for name, kind in every_type(model).items() if name != "lm_head"}
    folder = tmp_path / "out"
    target.write(allocation(mix), folder, model)
    source = tmp_path / "float.gguf"
    gguf_writer.write_file(source, model, {}, rounding="nearest", version="0")
    for broken in (False, True):
        tool = tmp_path / f"tool-{broken}"
        tool.write_text(FAKE.format(python=sys.executable, path=sys.path, broken=broken))
        tool.chmod(0o755)
        made = tmp_path / f"made-{broken}.gguf"
        done = run(folder, str(tool), source, made)
        if broken:
            assert "token_embd.weight: q8_0 in place of" in done.stderr
            assert not made.exists()
        else:
            assert done.returncode == 0, done.stderr
            placed = target.tensor_types(mix, model.layers, model.facts)
            assert {n: t for n, t in types_in(made).items() if n in placed} == placed
            expected = tmp_path / "own.gguf"
            gguf_writer.write_file(expected, model, mix, rounding="nearest", version="0")
            ours = {t.name: t.data for t in gguf.GGUFReader(expected).tensors}
            for tensor in gguf.GGUFReader(made).tensors:
                assert np.array_equal(tensor.data, ours[tensor.name]), tensor.name
    assert "exists: name a new file" in run(folder, "x", source, source).stderr
    assert "there is no nothing-here" in run(folder, "nothing-here", source, "new.gguf").stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "float.gguf", "made-False.gguf", "out", "own.gguf", "tool-False", "tool-True",
    ]  # fmt: skip


def test_the_module_fulfills_the_contract() -> None:
    module: Contract = target
    assert isinstance(allocation({}), Allocation)
    assert (module.NAME, module.SIZED) == ("llama-quantize", False)
    for sized in (module.size, module.size_table):
        with pytest.raises(Unsupported, match="no size"):
            sized({}, [], ModelFacts("m", "", "M", 0, "float32"))  # type: ignore[operator]
    mark = json.dumps(module.capabilities().formats())
    assert "q4_k" in mark
    assert Target is Contract
