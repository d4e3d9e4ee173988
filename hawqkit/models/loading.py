"""Loading a language model or a classifier from wherever it lies."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hawqkit.errors import InputError, Unsupported, did_you_mean
from hawqkit.models.folding import never_run
from hawqkit.models.gguf_cache import converted_gguf
from hawqkit.models.layers import dtype_name
from hawqkit.models.model import LoadedModel, assemble, majority_dtype, narrower
from hawqkit.models.quiet import quiet_transformers
from hawqkit.models.sources import checked_folder, find_source
from hawqkit.models.tasks import (
    CAUSAL_LM,
    IMAGES,
    auto_class,
    check_task,
    known_task,
    load_processor,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")
_SAFETENSORS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_LOG = logging.getLogger(__name__)


def load_model(
    source: str | Path,
    *,
    task: str = CAUSAL_LM,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    exclude_if_there: Sequence[str] = (),
    cache: str | Path | None = None,
) -> LoadedModel:
    """Load a language model or a classifier, ready to be measured.

    Args:
        source: a hub id, a safetensors folder, a `.gguf` file (converted once, then cached), or
            `package:NAME/FILE`, a file or folder inside an installed package, which is never
            imported.
        task: `causal-lm`, `image-classification` or `text-classification`: which of transformers'
            auto classes loads it. An image classifier's processor is the one without torchvision.
        revision: branch, tag or commit of a hub id.
        dtype: `float32`, `bfloat16`, `float16`, `float64`, or `auto`: float32 on a CPU, where
            matrix products in half precision are slow, and the stored dtype on accelerators. What
            counts as stored is the checkpoint's dtype, or this one where it is narrower.
        device: `auto` (an accelerator if there is one), `cpu`, `cuda`, ...
        trust_remote_code: run Python code that comes with the checkpoint.
        include: globs on module paths, see `find_layers`.
        exclude: globs on module paths; each must match a module.
        exclude_if_there: globs on module paths that may match nothing.
        cache: folder of converted GGUF files; None is `gguf_cache.default_cache()`.

    Raises:
        InputError: the source, its files or an option are wrong.
        Unsupported: the model is of another task, or quantized already; a GGUF file is asked to
            classify.
        NumericalError: a weight holds NaN or infinity.
        HawqkitError: the hub cannot be reached.
    """
    name, task = str(source), known_task(task)
    target = _device(device)
    if dtype not in ("auto", *DTYPES):
        raise InputError(
            f"model.dtype: got {dtype!r}; allowed are auto, {', '.join(DTYPES)}."
            + did_you_mean(dtype, ("auto", *DTYPES))
        )
    path = find_source(name, revision=revision, trust_remote_code=trust_remote_code)
    if path.suffix == ".gguf" and path.is_file():
        if task != CAUSAL_LM:
            raise Unsupported(
                f"{name}: GGUF files hold language models, and the task is {task}; give a folder "
                "or a hub id."
            )
        path = converted_gguf(path, name, Path(cache).expanduser() if cache is not None else None)
        checked_folder(path, name)
    stored = _stored_dtypes(path, name)
    most = majority_dtype(stored)
    if dtype == "auto":
        dtype = "float32" if target.type == "cpu" and most != "float64" else most
    module = _load_folder(path, name, dtype, trust_remote_code, task).to(target)
    _warn_of_fresh_norms(module, name)
    return assemble(
        module,
        source=name,
        tokenizer=_load_tokenizer(path, name, trust_remote_code) if task != IMAGES else None,
        processor=load_processor(path, name, trust_remote_code) if task == IMAGES else None,
        task=task,
        include=include,
        exclude=exclude,
        exclude_if_there=exclude_if_there,
        stored=_counted_dtypes(module, stored, most),
    )


def _counted_dtypes(
    module: nn.Module, stored: Mapping[str, tuple[str, int]], most: str
) -> dict[str, str]:
    """Return name -> dtype that a tensor counts as; what no file lists is stored as `most` are."""
    return {
        key: narrower(stored.get(key, (most, 0))[0], dtype_name(tensor.dtype))
        for key, tensor in module.state_dict().items()
        if tensor.is_floating_point()
    }


def _device(device: str) -> torch.device:
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"model.device: {device!r} cannot be used on this machine ({reason}); use auto or cpu."
        ) from None
    return chosen


def _stored_dtypes(folder: Path, source: str) -> dict[str, tuple[str, int]]:
    """Return name -> (dtype, entries) from the headers of all safetensors files."""
    found: dict[str, tuple[str, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    view = file.get_slice(name)
                    numel = 1
                    for extent in view.get_shape():
                        numel *= extent
                    kind = view.get_dtype()
                    found[name] = (_SAFETENSORS.get(kind, kind.lower()), numel)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{source}: {path.name} is truncated or damaged ({error}); get it again."
            ) from None
    packed = {kind for kind, _ in found.values() if kind.startswith("f8")}
    if packed:
        raise Unsupported(
            f"{source}: weights are stored as {', '.join(sorted(packed))}, so the model is "
            "quantized already; start from the original checkpoint."
        )
    return found


def _warn_of_fresh_norms(module: nn.Module, source: str) -> None:
    if fresh := never_run(module):
        more = f" and {len(fresh) - 4} more" if len(fresh) > 4 else ""
        _LOG.warning(
            "%s: batch norm that was never run (its statistics are the initial ones): %s%s; the "
            "model is measured as it is, check that its checkpoint is complete.",
            source,
            ", ".join(fresh[:4]),
            more,
        )


def _load_folder(
    folder: Path, source: str, dtype: str, trust_remote_code: bool, task: str
) -> nn.Module:
    from transformers import AutoConfig

    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            check_task(config, source, trust_remote_code, task)
            loaded: Any = auto_class(task).from_pretrained(
                folder,
                config=config,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            model, info = loaded
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise InputError(f"{source}: transformers cannot load it: {_short(error)}") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"{source}: the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, "
            f"such as {', '.join(missing[:4])}; they would be random. Get a complete checkpoint."
        )
    result: nn.Module = model
    return result


def _load_tokenizer(folder: Path, source: str, trust_remote_code: bool) -> Any:
    """Return the tokenizer, None if the folder has no file of one."""
    from transformers import AutoTokenizer

    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        # tokenizers raises a bare Exception on a damaged tokenizer.json.
        except Exception as error:
            raise InputError(f"{source}: its tokenizer cannot be read: {_short(error)}") from None


def _short(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"a JSON file of it is damaged ({error})"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:400] + " ..."
