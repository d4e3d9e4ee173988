from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.models.loading import load_model
from hawqkit.models.model import wrap_model

IMAGES, TEXTS = "image-classification", "text-classification"


@pytest.mark.parametrize("kind", pico.IMAGE_MODELS)
def test_an_image_classifier_loads_bit_for_bit_with_its_processor(
    tmp_path: Path, kind: str
) -> None:
    original = pico.image_classifier(kind)
    pico.save_image_classifier(tmp_path, original)
    model = load_model(tmp_path, task=IMAGES)
    assert model.task == IMAGES
    assert model.tokenizer is None
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], tensor), name
    assert not model.module.training
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Equal weights at other addresses may be multiplied by other kernels, in another order.
    got, wanted = (m(pixel_values=x).logits.detach() for m in (model.module, original))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    names = {layer.name for layer in model.layers}
    assert {n for n in names if n.startswith("classifier")}  # the head is a layer like others
    kinds = {layer.kind for layer in model.layers}
    assert "convolution" in kinds
    assert "linear" in kinds


def test_the_processor_is_the_one_without_torchvision(tmp_path: Path) -> None:
    pico.save_image_classifier(tmp_path)
    model = load_model(tmp_path, task=IMAGES)
    assert type(model.processor).__name__ == "ViTImageProcessorPil"
    image = Image.fromarray(np.full((20, 30, 3), 255, dtype=np.uint8))
    pixels = model.processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    torch.testing.assert_close(pixels, torch.ones(1, 3, 32, 32))  # (255 / 255 - 0.5) / 0.5
    code = (
        "import sys; from hawqkit.models.loading import load_model; "
        f"m = load_model({str(tmp_path)!r}, task='image-classification'); "
        "import numpy as np; m.processor(images=np.zeros((9, 9, 3), np.uint8)); "
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_processor_is_saved_beside_the_tokenizer_and_counted(tmp_path: Path) -> None:
    pico.save_image_classifier(tmp_path / "model")
    model = load_model(tmp_path / "model", task=IMAGES)
    written = model.save_side_files(tmp_path / "copy")
    assert written == model.facts.side_files
    assert "preprocessor_config.json" in written
    assert (tmp_path / "copy" / "preprocessor_config.json").stat().st_size == written[
        "preprocessor_config.json"
    ]


def test_a_model_without_a_processor_loads(tmp_path: Path) -> None:
    pico.image_classifier().save_pretrained(tmp_path)
    assert load_model(tmp_path, task=IMAGES).processor is None


def test_a_text_classifier_loads_with_its_tokenizer(tmp_path: Path) -> None:
    pico.save_text_classifier(tmp_path)
    model = load_model(tmp_path, task=TEXTS)
    assert (model.task, model.processor) == (TEXTS, None)
    assert model.tokenizer("ab")["input_ids"] == pico.tokenizer()("ab")["input_ids"]
    assert {"classifier", "bert.pooler.dense"} <= {layer.name for layer in model.layers}


def test_a_classifier_in_a_package_folder_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pico.save_image_classifier(tmp_path / "hk_images" / "small")
    (tmp_path / "hk_images" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    model = load_model("package:hk_images/small", task=IMAGES)
    assert model.facts.hash == wrap_model(pico.image_classifier(), name="x").facts.hash


@pytest.mark.parametrize(
    ("make", "task", "message"),
    [
        (pico.image_classifier, TEXTS, r"ResNetForImage.* is not a text classifier; set the task"),
        (pico.image_classifier, "causal-lm", r"not a causal language model; set the task to image"),
        (pico.text_classifier, IMAGES, r"not an image classifier; set the task to text-class"),
        (pico.llama, IMAGES, r"LlamaForCausalLM is not an image classifier; .* to causal-lm"),
        (pico.bert, TEXTS, r"BertForMaskedLM is not a text classifier; supported are causal"),
    ],
)
def test_a_model_of_another_task_is_refused_with_the_one_that_fits(
    tmp_path: Path, make, task: str, message: str
) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=message):
        load_model(tmp_path, task=task)


def test_an_unknown_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'image-clasification'.*Did you mean 'image-class"):
        load_model(tmp_path, task="image-clasification")


def test_a_gguf_file_cannot_classify(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(Unsupported, match=r"GGUF files hold language models.*task is image"):
        load_model(tmp_path / "a.gguf", task=IMAGES)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_what_chooses_no_single_class_is_refused(tmp_path: Path, problem: str) -> None:
    pico.save_text_classifier(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": problem}))
    with pytest.raises(Unsupported, match=f"problem_type is {problem}"):
        load_model(tmp_path, task=TEXTS)


def test_one_output_is_a_regression(tmp_path: Path) -> None:
    pico.save_text_classifier(tmp_path, pico.text_classifier(classes=1))
    with pytest.raises(Unsupported, match="1 output, a regression"):
        load_model(tmp_path, task=TEXTS)


def change(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    pico.save_image_classifier(tmp_path)
    change(tmp_path, lambda w: w.pop("classifier.1.weight"))
    with pytest.raises(InputError, match=r"lacks 1 tensors.*classifier\.1\.weight"):
        load_model(tmp_path, task=IMAGES)


def test_statistics_that_are_nan_are_named(tmp_path: Path) -> None:
    name = "resnet.embedder.embedder.normalization.running_var"
    pico.save_image_classifier(tmp_path)
    change(tmp_path, lambda w: w[name].__setitem__(0, float("nan")))
    with pytest.raises(NumericalError, match=name):
        load_model(tmp_path, task=IMAGES)


def test_batch_norm_that_was_never_run_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = pico.image_classifier()
    norm = model.resnet.embedder.embedder.normalization
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    pico.save_image_classifier(tmp_path, model)
    with caplog.at_level(logging.WARNING, logger="hawqkit"):
        load_model(tmp_path, task=IMAGES)
    (record,) = caplog.records
    assert "batch norm that was never run" in record.getMessage()
    assert "resnet.embedder.embedder.normalization" in record.getMessage()


def test_a_damaged_processor_is_named(tmp_path: Path) -> None:
    pico.save_image_classifier(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="its image processor cannot be read"):
        load_model(tmp_path, task=IMAGES)
