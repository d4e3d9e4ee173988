"""What a checkpoint may predict, and what is loaded beside its weights for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.models.quiet import quiet_transformers

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True)
class _Task:
    """How transformers calls a task.

    Attributes:
        auto: its class that loads any model of the task.
        mapping: its table of the classes of that task.
        article: what such a model is, with its article.
        plural: the same, of several.
    """

    auto: str
    mapping: str
    article: str
    plural: str


CAUSAL_LM = "causal-lm"
IMAGES = "image-classification"
TEXTS = "text-classification"
_TASKS = {
    CAUSAL_LM: _Task(
        "AutoModelForCausalLM",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
        "a causal language model",
        "causal language models",
    ),
    IMAGES: _Task(
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "an image classifier",
        "image classifiers",
    ),
    TEXTS: _Task(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "a text classifier",
        "text classifiers",
    ),
}
CLASSIFIERS = (IMAGES, TEXTS)
LOADED_TASKS = tuple(_TASKS)


def known_task(task: str) -> str:
    """Return a task that checkpoints are loaded for.

    Raises:
        InputError: there is no such task.
    """
    if task not in _TASKS:
        raise InputError(
            f"model.task: got {task!r}; allowed are {', '.join(_TASKS)}."
            + did_you_mean(task, LOADED_TASKS)
        )
    return task


def auto_class(task: str) -> Any:
    """Return transformers' class that loads any model of a task."""
    import transformers

    return getattr(transformers, _TASKS[task].auto)


def check_task(
    config: Any, source: str, trust_remote_code: bool = False, task: str = CAUSAL_LM
) -> None:
    """Refuse a checkpoint of another task, and one that is quantized.

    Raises:
        Unsupported: another head, an encoder-decoder, a classifier that predicts no single class,
            or a quantized checkpoint.
    """
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "an unnamed method")
        raise Unsupported(
            f"{source}: the checkpoint is quantized already ({method}); start from the original."
        )
    architectures = list(getattr(config, "architectures", None) or ())
    here = _TASKS[task]
    own_code = trust_remote_code and here.auto in (getattr(config, "auto_map", None) or {})
    known = _mapping(here.mapping)
    fits = own_code or any(name in _classes(known) for name in architectures)
    if not fits and (architectures or config.model_type not in known):
        what = ", ".join(architectures) or f"model type {config.model_type!r}"
        kind = f"not {here.article}"
        if task == CAUSAL_LM and config.is_encoder_decoder:
            kind = "an encoder-decoder"
        raise Unsupported(f"{source}: {what} is {kind}; {_instead(architectures, task)}")
    if task in CLASSIFIERS:
        _check_classes(config, source)


def _instead(architectures: list[str], task: str) -> str:
    """Return the task that would fit, or what is supported."""
    for other, what in _TASKS.items():
        if any(name in _classes(_mapping(what.mapping)) for name in architectures):
            return f"set the task to {other}."
    supported = ", ".join(f"{what.plural} ({name})" for name, what in _TASKS.items())
    return f"supported are {supported}, and the task here is {task}."


def _check_classes(config: Any, source: str) -> None:
    problem = getattr(config, "problem_type", None)
    if problem in ("regression", "multi_label_classification"):
        raise Unsupported(
            f"{source}: its problem_type is {problem}; classifiers that choose one of several "
            "classes are supported."
        )
    if config.num_labels < 2:
        raise Unsupported(
            f"{source}: it has {config.num_labels} output, a regression; classifiers that choose "
            "one of several classes are supported."
        )


def _mapping(name: str) -> Mapping[str, Any]:
    from transformers.models.auto import modeling_auto

    mapping: Mapping[str, Any] = getattr(modeling_auto, name)
    return mapping


def _classes(mapping: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for value in mapping.values():
        found.update((value,) if isinstance(value, str) else value)
    return found


def load_processor(folder: Path, source: str, trust_remote_code: bool) -> Any:
    """Return the image processor that works on PIL images and arrays, None if there is none.

    transformers' other one needs torchvision, and resizes a little differently.

    Raises:
        InputError: its file is damaged, or the processor cannot be made.
    """
    import transformers

    if not any((folder / name).exists() for name in _PROCESSOR_FILES):
        return None
    processors: Any = transformers.AutoImageProcessor  # its functions carry no types
    with quiet_transformers():
        try:
            # `use_fast` says the same to the first releases of transformers 5.
            return processors.from_pretrained(
                folder,
                backend="pil",
                use_fast=False,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            text = " ".join(str(error).split())[:400]
            raise InputError(f"{source}: its image processor cannot be read: {text}") from None
