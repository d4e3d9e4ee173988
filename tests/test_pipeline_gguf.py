"""A language model from the recipe to a GGUF file of a size that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import command_line
import gguf_cases as cases
import pytest
from gguf_cases import TYPES, types_in

import hawqkit as hk
from hawqkit.pipeline.folder import RunFolder

SIZE = 900_000
RECIPE = f"""\
model: {{source: model}}
calibration: {{source: text.jsonl, sequences: 6, length: 32, withheld: 2}}
held_out: {{source: held.jsonl, sequences: 4, length: 32}}
formats: [{", ".join(TYPES)}]
runtime: llama.cpp
budget: {{size: {SIZE // 1000}kB}}
export: [gguf, llama-quantize]
validate: {{baselines: [uniform]}}
stability: {{draws: 2}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("gguf")
    model = cases.llama()
    model.module.save_pretrained(home / "model")
    model.tokenizer.save_pretrained(home / "model")
    words = cases.TEXT.split()
    for name, step in (("text.jsonl", 5), ("held.jsonl", 7)):
        with (home / name).open("w", encoding="utf-8") as file:
            for document in range(8):
                mixed = [words[(i * step + i // 7 + document) % len(words)] for i in range(60)]
                file.write(json.dumps({"text": " ".join(mixed)}) + "\n")
    (home / "pico.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        command_line.succeed("run", "pico.yaml", "-o", "one")
    return home


def test_the_run_kept_the_bytes_and_counted_them_exactly(home: Path) -> None:
    allocation = RunFolder(home / "one").read_allocation()
    folder = home / "one" / "exports" / "gguf"
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert allocation.totals.size == {"gguf": total}
    assert 0.9 * SIZE < total <= SIZE
    assert len(set(allocation.layers.values())) > 1
    told = json.loads((folder / "quantization.json").read_text())
    assert told["layers"] == allocation.layers
    table = RunFolder(home / "one").read_sensitivities()
    assert "gguf" in json.loads((home / "one" / "sensitivities.json").read_text())["model"]
    assert table.model.gguf["architecture"] == "llama"


def test_both_exports_give_every_tensor_the_same_type(home: Path) -> None:
    exports = home / "one" / "exports"
    found = types_in(exports / "gguf" / "model.gguf")
    lines = (exports / "llama-quantize" / "tensor-types.txt").read_text().split()
    listed = dict(line[1:].replace("\\", "").split("$=") for line in lines)
    assert listed == {name: found[name] for name in listed}
    assert {kind for name, kind in found.items() if name not in listed} == {"f32"}


def test_a_saved_run_is_exported_again_to_the_same_bytes(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    command_line.succeed("export", "one", "--target", "gguf", "-o", "again")
    first, second = home / "one" / "exports" / "gguf", home / "again"
    assert (second / "model.gguf").read_bytes() == (first / "model.gguf").read_bytes()
    told = [json.loads((f / "quantization.json").read_text())["layers"] for f in (first, second)]
    assert told[0] == told[1]


def test_the_same_from_python(home: Path, tmp_path: Path) -> None:
    model = hk.measure_gguf(hk.load_model(str(home / "model")))
    batches = hk.load_batches(str(home / "text.jsonl"), model, sequences=4, length=32)
    sensitivities = hk.probe(model, batches, formats=["q2_k", "q4_k", "q6_k"])
    allocation = hk.allocate(
        sensitivities, size=800_000, size_target="gguf", runtime="llama.cpp", draws=2
    )
    hk.export(allocation, "gguf", tmp_path / "out", model=model)
    total = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert total <= 800_000
    assert set(types_in(tmp_path / "out" / "model.gguf").values()) <= {
        "f32", "q2_k", "q4_k", "q6_k",
    }  # fmt: skip
