"""Bad models, layers and budgets, from the command line to the exit code."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import gguf
import numpy as np
import pico
import pytest
import torch
from command_line import RECIPE, contents, invoke, refuse, sets, succeed

from hawqkit.models import sources


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe and models, most of them broken in one way."""
    home = tmp_path_factory.mktemp("models")
    (home / "r.yaml").write_text(RECIPE)
    pico.save(home / "model")
    pico.save(home / "narrow", pico.llama(intermediate=96))
    broken = pico.llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    pico.save(home / "nan", broken)
    pico.save(home / "cut")
    weights = home / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    pico.save(home / "pickle")
    (home / "pickle" / "model.safetensors").rename(home / "pickle" / "pytorch_model.bin")
    pico.save(home / "encoder", pico.bert())
    write_gguf(home / "whole.gguf")
    whole = (home / "whole.gguf").read_bytes()
    for name, size in {"early": 40, "middle": len(whole) // 2, "late": len(whole) - 1}.items():
        (home / f"{name}.gguf").write_bytes(whole[:size])
    (home / "fake.gguf").write_bytes(b"PK\x03\x04" * 100)
    return home


def write_gguf(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return models


MODELS = {
    "./none": "./none: there is no such file or folder",
    "none/of/these": "there is no such file or folder",
    "none.gguf": "there is no such file or folder",
    "nan": "NaN or infinity in model.layers.1.mlp.up_proj.weight",
    "cut": "model.safetensors is truncated or damaged",
    "pickle": "loading a pickle can execute any code",
    "encoder": "not a causal language model",
    "early.gguf": "the GGUF file is truncated",
    "middle.gguf": "the GGUF file is truncated",
    "late.gguf": "the GGUF file is truncated",
    "fake.gguf": "not a GGUF file",
    "r.yaml": "a single file that is not GGUF",
    "package:no_such_package/m.gguf": "there is no installed package 'no_such_package'",
    "package:hawqkit/m.gguf": "holds no 'm.gguf'",
}


@pytest.mark.parametrize("verb", ["run", "check", "probe"])
@pytest.mark.parametrize("source", MODELS)
def test_a_bad_model_is_refused_and_nothing_is_written(
    here: Path, cache: Path, source: str, verb: str
) -> None:
    refuse(here, verb, "r.yaml", *sets(f"model.source={source}"), words=MODELS[source])
    assert not list(cache.iterdir())


ASKED = {
    "no such layer": (["layers.include=[model.layer.*]"], "matches no module of the model"),
    "pattern for nothing": (["layers.exclude=[lm_haed]"], "Did you mean 'lm_head'?"),
    "no layer left": (["layers.include=[lm_head]"], "no layer matched"),
    "no weight": (["layers.include=[model.norm]"], "leave none of 16 weights"),
    "size too small": (
        ["budget.average_bits=null", "budget.size=10kB"],
        "these 14 layers take at least",
    ),
    "two limits that exclude each other": (
        ["budget.average_bits=8", "budget.size=1kB"],
        "size = 1,000 bytes cannot be met",
    ),
    "runtime that the target cannot serve": (
        ["formats=[int4-g32-asym]", "export=[compressed-tensors]"],
        "target compressed-tensors cannot hold",
    ),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_a_model_cannot_give_is_refused_and_nothing_is_written(here: Path, what: str) -> None:
    overrides, words = ASKED[what]
    refuse(here, "run", "r.yaml", *sets(*overrides), words=words)


def test_groups_that_do_not_divide_are_named_with_layer_columns_and_what_fits(here: Path) -> None:
    message = refuse(
        here,
        "run",
        "r.yaml",
        *sets("model.source=narrow", "formats=[int4-g64, int8-g64]"),
        words="2 layers do not take all formats",
    )
    (line,) = [line for line in message.splitlines() if line.startswith("  - ")]
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: 96 columns" in line
    assert "do not divide into groups of int4-g64, int8-g64" in line
    fitting = line.partition("formats that fit: ")[2].rstrip(".").split(", ")
    assert {"int4-g32", "int8-channel", "none"} <= set(fitting)
    assert not any("g64" in name or "g128" in name for name in fitting)
    assert "layers.misfits to skip" in message


def test_layers_of_the_same_width_share_one_line(here: Path) -> None:
    overrides = sets("model.source=narrow", "formats=[int4-g128]")
    message = refuse(here, "run", "r.yaml", *overrides, words="14 layers do not take all formats")
    lines = [line for line in message.splitlines() if line.startswith("  - ")]
    assert [line.partition(" columns")[0].rpartition(" ")[2] for line in lines] == ["64", "96"]
    assert "(and 10 more layers)" in lines[0]


def test_misfits_are_skipped_where_the_recipe_says_so(models: Path, here: Path) -> None:
    overrides = sets(
        "model.source=narrow", "formats=[int4-g64, int8-g64]", "layers.misfits=skip",
        "budget.average_bits=5",
    )  # fmt: skip
    succeed("run", "r.yaml", "-o", "skipping", *overrides)
    run = here / "skipping"
    table = json.loads((run / "sensitivities.json").read_text())
    names = {f"model.layers.{block}.mlp.down_proj" for block in (0, 1)}
    reason = "96 columns do not divide into groups of int4-g64, int8-g64"
    assert {s["name"] for s in table["skipped"] if s["reason"] == reason} == names
    assert not names & {layer["name"] for layer in table["layers"]}
    mix = json.loads((run / "allocation.json").read_text())["layers"]
    assert len(mix) == 12
    assert not names & set(mix)
    exported = json.loads((run / "exports/bits/bits.json").read_text())["layers"]
    assert exported == mix
    page = (run / "report.html").read_text()
    assert all(name in page for name in names)
    assert reason in page


def test_misfits_take_the_formats_that_fit_where_the_recipe_says_so(
    models: Path, here: Path
) -> None:
    overrides = sets(
        "model.source=narrow", "formats=[int2-g64, int3-g32, mxfp4, int8-g64]",
        "layers.misfits=partial", "budget.average_bits=5", "stability.draws=8",
        "validate.baselines=[uniform, ends, weight-error]",
    )  # fmt: skip
    succeed("run", "r.yaml", "-o", "partial", *overrides)
    run = here / "partial"
    table = json.loads((run / "sensitivities.json").read_text())
    narrow = {f"model.layers.{block}.mlp.down_proj" for block in (0, 1)}
    assert narrow <= {layer["name"] for layer in table["layers"]}
    for layer, errors in zip(table["layers"], table["weight_error"], strict=True):
        empty = [errors[0] is None, errors[3] is None]
        assert empty == [layer["name"] in narrow] * 2
        assert errors[1] is not None
        assert errors[2] is not None
    mix = json.loads((run / "allocation.json").read_text())["layers"]
    assert len(mix) == 14
    assert {mix[name] for name in narrow} <= {"int3-g32", "mxfp4"}
    assert any("g64" in mix[name] for name in set(mix) - narrow)
    measured = json.loads((run / "validation.json").read_text())["mixes"]
    assert all(np.isfinite(m["measured"][text]["kl"]) for m in measured for text in m["measured"])


def test_nothing_left_after_skipping_is_refused(here: Path) -> None:
    refuse(
        here,
        "run",
        "r.yaml",
        *sets("formats=[int4-g128]", "layers.include=[model.layers.0.self_attn]",
              "layers.misfits=skip"),
        words="no layer is left that takes all formats",
    )  # fmt: skip


def test_a_hub_id_without_a_network_ends_with_one_within_seconds(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        for key in ("model.source", "calibration.source"):
            start = time.monotonic()
            refuse(
                here,
                "run",
                "r.yaml",
                *sets(f"{key}=owner/name"),
                words="cannot be reached",
                code=1,
            )
            assert time.monotonic() - start < 5


def test_offline_mode_is_named_and_ends_with_one(here: Path) -> None:
    overrides = sets("model.source=owner/name")
    refuse(here, "run", "r.yaml", *overrides, words="HF_HUB_OFFLINE forbids", code=1)


def test_the_default_exclude_is_no_problem_where_the_model_has_no_such_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(  # a decoder, whose head is called cls.predictions.decoder
        vocab_size=pico.VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        is_decoder=True,
    )
    model = BertLMHeadModel(config)
    pico.fill(model)
    pico.save(tmp_path / "model", model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE.replace(", model.embed_tokens", ""))
    refuse(tmp_path, "run", "r.yaml", words="'lm_head' matches no module")
    (tmp_path / "r.yaml").write_text(
        "\n".join(line for line in RECIPE.splitlines() if not line.startswith("layers"))
    )
    succeed("run", "r.yaml", "-o", "run")
    # What the run has accepted, its saved recipe must not refuse.
    succeed("validate", "run")


def test_a_pattern_for_a_weight_that_is_skipped_anyway_is_no_error(here: Path) -> None:
    overrides = sets("layers.exclude=[lm_head, model.embed_tokens, model.norm]")
    assert invoke("check", "r.yaml", *overrides).exit_code == 0


def test_a_run_is_read_from_any_working_directory(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = here / "text.txt"
    text.write_text("What was measured here can be measured again there. " * 20)
    again = "{source: ./text.txt, length: 16, sequences: 2}"
    overrides = sets("held_out.source=text.txt", f"other_texts={{again: {again}}}")
    succeed("run", "r.yaml", "-o", "moved", *overrides)
    before = contents(here / "moved")
    monkeypatch.chdir(tmp_path)
    succeed("validate", str(here / "moved"))
    succeed("export", str(here / "moved"), "--target", "bits", "-o", "out")
    after = contents(here / "moved")
    assert {name for name in after if before.get(name) != after[name]} <= {"validation.json"}
    measured = [json.loads(c["validation.json"])["mixes"] for c in (before, after)]
    assert measured[0] == measured[1]


def test_the_connection_test_takes_seconds_at_most() -> None:
    assert sources.CONNECT_SECONDS < 5
