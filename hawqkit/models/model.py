"""A model in memory with what is known of it: its layers, its facts, its weights by name."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.errors import InputError, NumericalError, did_you_mean
from hawqkit.models.fixed_scales import FixedScales
from hawqkit.models.layers import dtype_name, find_layers
from hawqkit.models.orientation import as_rows, from_rows
from hawqkit.records import DTYPE_BITS, Layer, ModelFacts, Skipped
from hawqkit.records import Tensor as TensorFacts


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model ready to be measured: evaluation mode, and no parameter wants a gradient.

    Attributes:
        module: the network.
        tokenizer: its tokenizer, None if it has none.
        facts: what is known of it without loading it again.
        layers: the weights to quantize, in the model's order.
        skipped: every other weight, with the reason.
        task: `causal-lm`, `image-classification`, `text-classification`, or `module` for a network
            of which no more is known than that it returns logits.
        processor: the image processor of a model that has one, else None.
        scales: layer name -> scales that its weight lies on already, which rounding to their format
            takes instead of its own; empty unless the model was tuned.
    """

    module: nn.Module
    tokenizer: Any
    facts: ModelFacts
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    task: str = "causal-lm"
    processor: Any = None
    scales: Mapping[str, FixedScales] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that the model lies on."""
        return next(self.module.parameters()).device

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter that a layer owns, in the model's own orientation.

        Raises:
            InputError: there is no such layer.
        """
        try:
            parameter = self.module.get_submodule(name).get_parameter("weight")
        except AttributeError:
            known = [layer.name for layer in self.layers]
            raise InputError(
                f"the model has no layer {name!r}; its layers are named like {known[0]!r}."
                + did_you_mean(name, known)
            ) from None
        return parameter

    def weight(self, name: str) -> Tensor:
        """Return a layer's weight as (outputs, inputs), see `models.orientation`.

        A view of the parameter but for transposed convolutions; `from_rows` is the way back.

        Raises:
            InputError: there is no such layer.
        """
        return as_rows(self.parameter(name).detach(), self.module.get_submodule(name))

    def from_rows(self, name: str, values: Tensor) -> Tensor:
        """Return (rows, columns) of a layer in the shape that its parameter has.

        Raises:
            InputError: there is no such layer.
        """
        self.parameter(name)
        return from_rows(values, self.module.get_submodule(name))

    def save_side_files(self, folder: str | Path) -> dict[str, int]:
        """Write everything of a checkpoint but weights and configuration, and return name -> bytes.

        These are the files of the tokenizer or image processor and `generation_config.json`, as
        transformers writes them.
        """
        return save_side_files(self.module, self.tokenizer, Path(folder), self.processor)


TASKS = ("causal-lm", "image-classification", "text-classification", "module")


def wrap_model(
    module: nn.Module,
    *,
    name: str,
    tokenizer: Any = None,
    processor: Any = None,
    task: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> LoadedModel:
    """Make any network ready to be measured.

    The module itself is changed: it goes to evaluation mode, its parameters stop wanting gradients,
    and its key-value cache is off.

    Args:
        module: the network; it returns logits, from `input_ids` and `attention_mask` if text is to
            be measured, else from the arguments that `make_examples` names.
        name: what records call it.
        tokenizer: needed by `load_batches` only.
        processor: image processor, needed by `load_examples` only.
        task: one of `TASKS`; None takes it from the module's class, `module` if that says nothing.
            Convolutions are layers in all tasks but `causal-lm`.
        include: globs on module paths, see `find_layers`.
        exclude: globs on module paths.

    Raises:
        InputError: no layer is left, or an unknown task.
        NumericalError: a weight holds NaN or infinity.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    >>> wrap_model(net, name="net").facts.parameters
    63
    """
    return assemble(
        module,
        source=name,
        tokenizer=tokenizer,
        processor=processor,
        task=task,
        include=include,
        exclude=exclude,
    )


def task_of(module: nn.Module) -> str:
    """Return what a network predicts, as its class says; `module` if it says nothing."""
    name = type(module).__name__
    if "ForCausalLM" in name or "LMHead" in name:
        return "causal-lm"
    if "ForImageClassification" in name:
        return "image-classification"
    return "text-classification" if "ForSequenceClassification" in name else "module"


def assemble(
    module: nn.Module,
    *,
    source: str,
    tokenizer: Any = None,
    processor: Any = None,
    task: str | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    exclude_if_there: Sequence[str] = (),
    stored: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Check a module's weights, find its layers, and collect its facts.

    Args:
        module: the network.
        source: as the user named it.
        tokenizer: or None.
        processor: image processor, or None.
        task: one of `TASKS`, None to take it from the module's class.
        include: globs on module paths.
        exclude: globs on module paths.
        exclude_if_there: the same, and they may match nothing.
        stored: name in the state -> dtype of the checkpoint, where it is not the one in memory.

    Raises:
        InputError: no layer is left, or an unknown task.
        NumericalError: a weight holds NaN or infinity; the message names the tensors.
    """
    task = task_of(module) if task is None else task
    if task not in TASKS:
        raise InputError(
            f"task: got {task!r}; known are {', '.join(TASKS)}." + did_you_mean(task, TASKS)
        )
    module.eval()
    module.requires_grad_(False)
    stored = dict(stored or {})
    layers, skipped = find_layers(
        module,
        include,
        exclude,
        exclude_if_there=exclude_if_there,
        stored=stored,
        convolutions=task != "causal-lm",
    )
    state = own_state(module)
    _check_finite(source, state)
    # The configuration is read before the cache is switched off, so that exports keep its setting.
    facts = _facts(module, source, (tokenizer, processor), state, stored)
    config = getattr(module, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False
    return LoadedModel(module, tokenizer, facts, layers, skipped, task, processor)


def recounted(model: LoadedModel, stored: Mapping[str, str]) -> LoadedModel:
    """Return a model whose module has new tensors or fewer, with its facts read again.

    Args:
        model: what was known; the layers stay as they are.
        stored: dtype that a new tensor counts as, where it is not the one in memory.
    """
    known = {tensor.name: tensor.dtype for tensor in model.facts.tensors}
    state = own_state(model.module)
    beside = (model.tokenizer, model.processor)
    facts = _facts(model.module, model.facts.source, beside, state, {**known, **dict(stored)})
    vectors = [s for s in find_layers(model.module)[1] if s.kind == "vector"]
    kept = [s for s in model.skipped if s.kind != "vector"]
    return replace(model, facts=facts, skipped=(*kept, *vectors))


def with_values(
    model: LoadedModel, module: nn.Module, scales: Mapping[str, FixedScales] | None = None
) -> LoadedModel:
    """Return a model that is the same but for the values of its weights; their hash is new.

    Args:
        model: what was known.
        module: a network of the same structure, in evaluation mode, with other values.
        scales: what its weights lie on, by layer; none if None.
    """
    known = {tensor.name: tensor.dtype for tensor in model.facts.tensors}
    state = own_state(module)
    dtypes = {name: known.get(name, dtype_name(t.dtype)) for name, t in state.items()}
    facts = replace(model.facts, hash=_hash(state, dtypes))
    return replace(model, module=module, facts=facts, scales=dict(scales or {}))


def save_side_files(
    module: nn.Module, tokenizer: Any, folder: Path, processor: Any = None
) -> dict[str, int]:
    """Write tokenizer, processor and generation configuration, and return name -> bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        generation = getattr(module, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(scratch)
        for beside in (tokenizer, processor):
            if beside is not None:
                beside.save_pretrained(scratch)
        written = {}
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                name = path.relative_to(scratch).as_posix()
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                written[name] = path.stat().st_size
    return written


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint stores: tied tensors once, under the name that loading expects."""
    declared = set(getattr(module, "all_tied_weights_keys", None) or ())
    ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    state: dict[str, Tensor] = {
        name: tensor.detach()
        for name, tensor in module.state_dict().items()
        if name not in ignored and isinstance(tensor, Tensor)
    }
    places: dict[object, list[str]] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        places.setdefault(key if tensor.numel() else name, []).append(name)
    kept = {next((n for n in names if n not in declared), names[0]) for names in places.values()}
    return {name: tensor for name, tensor in state.items() if name in kept}


def _check_finite(source: str, state: Mapping[str, Tensor]) -> None:
    bad = [n for n, t in state.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise NumericalError(
            f"{source}: weights hold NaN or infinity in {', '.join(bad[:5])}{more}; nothing can be "
            "measured on them. Get the checkpoint again, or load it in a wider dtype if the values "
            "overflowed."
        )


def _facts(
    module: nn.Module,
    source: str,
    beside: tuple[Any, Any],
    state: Mapping[str, Tensor],
    stored: Mapping[str, str],
) -> ModelFacts:
    dtypes = {name: stored.get(name, dtype_name(t.dtype)) for name, t in state.items()}
    dtype = majority_dtype({n: (dtypes[n], t.numel()) for n, t in state.items()})
    with tempfile.TemporaryDirectory() as folder:
        side_files = save_side_files(module, beside[0], Path(folder), beside[1])
    return ModelFacts(
        source=source,
        hash=_hash(state, dtypes),
        architecture=type(module).__name__,
        parameters=sum(p.numel() for p in module.parameters()),
        dtype=dtype,
        tensors=_stored_tensors(module, state, dtypes),
        config=_config(module, dtype),
        side_files=side_files,
    )


def majority_dtype(dtypes: Mapping[str, tuple[str, int]]) -> str:
    """Return the floating dtype that most entries have; values are (dtype, entries).

    >>> majority_dtype({"a": ("bfloat16", 100), "b": ("float32", 3)})
    'bfloat16'
    """
    counts: dict[str, int] = {}
    for name, numel in dtypes.values():
        if "float" in name:
            counts[name] = counts.get(name, 0) + numel
    return max(counts, key=lambda name: (counts[name], name)) if counts else "float32"


def narrower(stored: str, loaded: str) -> str:
    """Return the dtype that a tensor counts as: the checkpoint's, or the loaded one if narrower.

    >>> narrower("bfloat16", "float32"), narrower("float32", "bfloat16")
    ('bfloat16', 'bfloat16')
    """
    return loaded if DTYPE_BITS[loaded] < DTYPE_BITS[stored] else stored


def _stored_tensors(
    module: nn.Module, state: Mapping[str, Tensor], dtypes: Mapping[str, str]
) -> tuple[TensorFacts, ...]:
    """Return what a checkpoint lists; transformers stores experts under other names and shapes."""
    meta = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, dtypes[name]), device="meta")
        for name, tensor in state.items()
    }
    library = sys.modules.get("transformers")
    if library is not None and isinstance(module, library.PreTrainedModel):
        from transformers.core_model_loading import revert_weight_conversion

        meta = revert_weight_conversion(module, meta)
    return tuple(TensorFacts(n, dtype_name(t.dtype), tuple(t.shape)) for n, t in meta.items())


def _config(module: nn.Module, dtype: str) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if config is None or not callable(getattr(config, "to_dict", None)):
        return {}
    plain = dict(config.to_dict())
    # The folder that a checkpoint was read from is no property of the model.
    plain.pop("_name_or_path", None)
    plain["architectures"] = [type(module).__name__]
    plain["dtype"] = dtype
    result: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return result


def _hash(state: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> str:
    """Return SHA-256 over names, stored dtypes, shapes and bytes, whatever the dtype in memory."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}\0{dtypes[name]}\0{tuple(tensor.shape)}\0".encode())
        for chunk in _chunks(tensor):
            if tensor.is_floating_point():
                chunk = chunk.to(getattr(torch, dtypes[name]))
            digest.update(chunk.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _chunks(tensor: Tensor, entries: int = 1 << 22) -> Iterator[Tensor]:
    """Yield contiguous pieces, so that a cast never copies a whole large tensor."""
    flat = tensor.contiguous().reshape(-1)
    for start in range(0, flat.numel(), entries):
        yield flat[start : start + entries]
