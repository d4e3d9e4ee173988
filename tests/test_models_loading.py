from __future__ import annotations

import importlib.util
import json
import socket
import sys
import time
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file

from hawqkit.errors import HawqkitError, InputError, NumericalError, Unsupported
from hawqkit.models import sources
from hawqkit.models.loading import load_model
from hawqkit.models.model import wrap_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return pico.save(tmp_path / "pico", pico.llama(tied=True))


def edit_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_folder_loads_bit_for_bit_with_its_tokenizer(folder):
    model = load_model(str(folder), exclude=["lm_head"])
    original = pico.llama(tied=True)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor), name
    assert model.facts.hash == wrap_model(original, name="x").facts.hash
    assert model.facts.source == str(folder)
    assert len(model.layers) == 14
    assert model.tokenizer("ab")["input_ids"] == pico.tokenizer()("ab")["input_ids"]
    assert load_model(folder).facts.hash == model.facts.hash


def test_folder_without_a_tokenizer_loads(tmp_path):
    pico.llama().save_pretrained(tmp_path)
    assert load_model(tmp_path).tokenizer is None


def test_auto_dtype_is_float32_on_cpu_and_layers_keep_the_stored_dtype(tmp_path):
    pico.save(tmp_path, pico.llama(dtype=torch.bfloat16))
    model = load_model(tmp_path, device="cpu")
    assert model.module.dtype == torch.float32
    assert model.facts.dtype == model.layers[0].dtype == "bfloat16"
    assert {t.dtype for t in model.facts.tensors} == {"bfloat16"}
    assert model.facts.config["dtype"] == "bfloat16"
    explicit = load_model(tmp_path, dtype="bfloat16", device="cpu")
    assert explicit.module.dtype == torch.bfloat16
    # The hash is over what is stored, so the dtype of the computation does not change it.
    assert explicit.facts.hash == model.facts.hash


def test_narrower_dtype_counts_as_stored(folder):
    model = load_model(folder, dtype="float16")
    assert model.facts.dtype == model.layers[0].dtype == "float16"


def test_float64_checkpoint_stays_float64(tmp_path):
    pico.save(tmp_path, pico.llama(dtype=torch.float64))
    assert load_model(tmp_path, device="cpu").module.dtype == torch.float64


def test_sharded_checkpoint_loads_and_a_missing_shard_is_named(tmp_path):
    pico.llama().save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert load_model(tmp_path).facts.hash == wrap_model(pico.llama(), name="x").facts.hash
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        load_model(tmp_path)


@pytest.mark.parametrize("options", [{"dtype": "flaot32"}, {"device": "abacus"}])
def test_unknown_options_are_refused(folder, options):
    (name,) = options
    with pytest.raises(InputError, match=f"model.{name}"):
        load_model(folder, **options)


def test_revision_of_a_folder_is_refused(folder):
    with pytest.raises(InputError, match="no revisions"):
        load_model(folder, revision="main")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickle_checkpoint_is_refused_unread_with_the_reason(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"not even a pickle")
    with pytest.raises(InputError, match=r"pickle.*execute any code.*save_pretrained"):
        load_model(folder)
    with pytest.raises(InputError, match=r"pickle, which can execute"):
        load_model(folder / name)


def test_folder_without_weights_or_config_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*.safetensors weights"):
        load_model(folder)
    (folder / "config.json").unlink()
    (folder / "a.gguf").touch()
    with pytest.raises(InputError, match=r"no config.json.*a\.gguf"):
        load_model(folder)


@pytest.mark.parametrize(
    "source", ["./nowhere", "/no/such/folder", "a/b/c", "nowhere.gguf", "../x"]
)
def test_paths_that_do_not_exist_are_not_taken_for_hub_ids(source):
    with pytest.raises(InputError, match="no such file or folder"):
        load_model(source)


def test_missing_folder_says_what_is_near(folder):
    with pytest.raises(InputError, match="Did you mean 'pico'"):
        load_model(str(folder.parent / "picco"))


@pytest.mark.parametrize("source", ["", "   "])
def test_empty_source_is_refused(source):
    with pytest.raises(InputError, match="hub id, a folder or a GGUF"):
        load_model(source)


def test_truncated_safetensors_is_an_input_error(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_model(folder)


def test_damaged_config_and_tokenizer_are_input_errors(folder):
    (folder / "tokenizer.json").write_text("{nonsense")
    with pytest.raises(InputError, match="tokenizer cannot be read"):
        load_model(folder)
    (folder / "config.json").write_text("{nonsense")
    with pytest.raises(InputError, match="cannot load it"):
        load_model(folder)


def test_checkpoint_that_lacks_tensors_is_refused_instead_of_made_random(folder):
    edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        load_model(folder)


def test_nan_in_a_checkpoint_is_named(folder):
    edit_weights(folder, lambda w: w["model.norm.weight"].__setitem__(0, float("nan")))
    with pytest.raises(NumericalError, match=r"model\.norm\.weight"):
        load_model(folder)


def test_encoder_is_refused_with_the_reason(tmp_path):
    pico.bert().save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=r"BertForMaskedLM is not a causal language model"):
        load_model(tmp_path)


def test_quantized_checkpoint_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=r"quantized already \(awq\)"):
        load_model(folder)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that raises when it is imported, with a checkpoint inside."""
    root = tmp_path / "site" / "hk_weights"
    pico.save(root / "llama")
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(root.parent))
    return "hk_weights"


def test_package_file_is_found_without_importing_the_package(package):
    model = load_model(f"package:{package}/llama")
    assert model.facts.hash == wrap_model(pico.llama(), name="x").facts.hash
    assert package not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:hk_weights/other.gguf", r"holds no 'other.gguf'.*llama/model\.safetensors"),
        ("package:hk_weights/../../x", "holds no"),
        ("package:hk_nothing/a.gguf", "no installed package 'hk_nothing'"),
        ("package:hk_weights", "write package:NAME/FILE"),
        ("package:a.b/c", "no installed package"),
    ],
)
def test_wrong_package_sources_say_what_is_there(package, source, message):
    with pytest.raises(InputError, match=message):
        load_model(source)
    assert package not in sys.modules


def online(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)


def test_hub_id_without_a_network_is_answered_within_seconds(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        online(monkeypatch, f"http://127.0.0.1:{closed.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(HawqkitError, match=r"owner/model.*cannot be reached") as caught:
            load_model("owner/model")
    assert time.monotonic() - start < 5
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)


def test_host_that_never_answers_is_given_up_within_seconds(monkeypatch):
    def hang(*args, **kwargs):
        time.sleep(4)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", hang)
    start = time.monotonic()
    assert not sources.reachable("http://192.0.2.1", seconds=0.2)
    assert time.monotonic() - start < 2


def test_listening_host_and_proxy_count_as_reachable(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        online(monkeypatch, address)
        assert sources.reachable(address)
        monkeypatch.setenv("http_proxy", address)
        assert sources.reachable("http://name.invalid")


def test_offline_switch_is_respected_and_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HawqkitError, match="HF_HUB_OFFLINE forbids") as caught:
        load_model("owner/model")
    assert caught.value.exit_code == 1


def test_hub_id_in_the_local_cache_needs_no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    commit = "0" * 40
    root = tmp_path / "models--owner--model"
    pico.save(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub._snapshot_download as download

    monkeypatch.setattr(download.constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_model("owner/model")
    assert model.facts.hash == wrap_model(pico.llama(), name="x").facts.hash
    (root / "snapshots" / commit / "model.safetensors").unlink()
    with pytest.raises(HawqkitError, match="not in the local hub cache"):
        load_model("owner/model")


def test_importing_the_room_imports_no_torch():
    import subprocess

    code = "import sys, hawqkit.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert importlib.util.find_spec("hawqkit.models") is not None
