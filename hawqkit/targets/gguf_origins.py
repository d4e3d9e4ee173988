"""Where a written GGUF file takes from what the mix does not change: another file, or the model.

An origin knows the tensors, the key-values, and the data of tensors that are kept. From a file,
key-values and data are copied byte by byte; where the model in memory has other values than the
file (it was tuned), those are encoded to the type that the file has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hawqkit.errors import InputError, Unsupported
from hawqkit.formats import GGUF, format_names, parse_format
from hawqkit.models.model import LoadedModel, own_state
from hawqkit.models.sources import find_source
from hawqkit.quantize.gguf_blocks import encode_blocks
from hawqkit.records import ModelFacts
from hawqkit.targets.gguf_layout import PLAIN_OF, PLAIN_TYPES, Place, plain_bytes
from hawqkit.targets.gguf_metadata import ROPE_FREQUENCIES, add_model, rope_factors
from hawqkit.targets.gguf_names import (
    FAMILIES,
    interleave,
    layer_tensors,
    require_gguf,
    rotated_heads,
    tensor_names,
)
from hawqkit.targets.gguf_vocabulary import Vocabulary, vocabulary_of

Bytes = npt.NDArray[np.uint8]
EMBEDDING = "token_embd.weight"
VERSION_KEY = "hawqkit.version"
# Written anew, since they depend on the mix, or by the writer itself.
_OWN_KEYS = (
    "general.architecture", "general.file_type", "general.quantization_version", VERSION_KEY
)  # fmt: skip
_COUNTS = "GGUF."  # of keys that the reader makes up: version and counts


class Origin(Protocol):
    """What a file is made from."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it."""

    @property
    def alignment(self) -> int:
        """What the offset of a tensor is a multiple of."""

    @property
    def places(self) -> tuple[Place, ...]:
        """The tensors, in the order of the file."""

    def add_metadata(self, writer: Any) -> None:
        """Put all key-values but those of the mix into a gguf-py `GGUFWriter`."""

    def kept(self, place: Place) -> Bytes:
        """Return the data of a tensor as it is kept, (rows, bytes of a row)."""


def origin_of(model: LoadedModel) -> Origin:
    """Return what a model's file is made from: the GGUF file that it was loaded from, or itself.

    Raises:
        Unsupported: the tokenizer cannot be converted, a tensor has no name in a GGUF file, the
            file is one part of several, or the package `gguf` is missing.
        InputError: the file that it was loaded from is gone.
    """
    require_gguf("writing a GGUF file")
    if from_file(model.facts):
        return _FromFile.open(model)
    return _FromModel.of(model)


def from_file(facts: ModelFacts) -> bool:
    """Whether a model was loaded from a GGUF file."""
    return facts.source.endswith(".gguf")


def ordered(rows: npt.NDArray[Any], name: str, facts: ModelFacts) -> npt.NDArray[Any]:
    """Return the rows of a tensor in the order of the file."""
    heads = rotated_heads(name, facts)
    return rows if heads is None else interleave(rows, heads)


def raw(tensor: Tensor, type_name: str) -> Bytes:
    """Return a tensor's bytes in one of `PLAIN_TYPES`, row by row; vectors have rows of one."""
    dtype = getattr(torch, PLAIN_TYPES[type_name][0])
    plain = tensor.detach().to("cpu", dtype).contiguous()
    rows = plain.unsqueeze(-1) if plain.ndim == 1 else plain
    return rows.view(torch.uint8).numpy()


@dataclass(frozen=True, slots=True, eq=False)
class _FromModel:
    """A model of transformers: names, order of rows and key-values are made."""

    architecture: str
    places: tuple[Place, ...]
    facts: ModelFacts
    state: Mapping[str, Tensor]  # by name in the file
    vocabulary: Vocabulary
    alignment: int = 32

    @classmethod
    def of(cls, model: LoadedModel) -> _FromModel:
        facts = model.facts
        family = FAMILIES[str(facts.config["model_type"])]
        names = tensor_names(facts)
        nameless = [t.name for t in facts.tensors if t.name not in names]
        if nameless:
            raise Unsupported(
                f"model {facts.source!r}: {len(nameless)} tensors have no name in a GGUF file, "
                f"such as {', '.join(nameless[:4])}; llama.cpp would leave them out."
            )
        layers = {tensor: layer for layer, tensor in layer_tensors(model.layers, names).items()}
        state = own_state(model.module)
        places = []
        for tensor in facts.tensors:
            name = names[tensor.name]
            kind = "f32" if _always_float(name, tensor.shape) else PLAIN_OF[tensor.dtype]
            places.append(
                Place(
                    name, tensor.shape, kind, plain_bytes(kind, tensor.shape), layers.get(name, "")
                )
            )
        found = {names[n]: t for n, t in state.items() if n in names}
        factors = rope_factors(facts)
        if factors is not None:
            found[ROPE_FREQUENCIES] = torch.from_numpy(factors)
            places.append(Place(ROPE_FREQUENCIES, factors.shape, "f32", factors.nbytes))
        rows = next(p.shape[0] for p in places if p.name == EMBEDDING)
        vocabulary = vocabulary_of(model.tokenizer, rows, facts.config)
        return cls(family.architecture, tuple(places), facts, found, vocabulary)

    def add_metadata(self, writer: Any) -> None:
        add_model(writer, self.facts, next(p.shape[0] for p in self.places if p.name == EMBEDDING))
        self.vocabulary.add_to(writer)

    def kept(self, place: Place) -> Bytes:
        rows = raw(self.state[place.name], place.type)
        return ordered(rows, place.name, self.facts)


def _always_float(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp computes with a tensor in float32 alone: norms and biases."""
    return len(shape) < 2 or name.endswith("_norm.weight")


@dataclass(frozen=True, slots=True, eq=False)
class _FromFile:
    """The GGUF file that the model was loaded from."""

    architecture: str
    alignment: int
    places: tuple[Place, ...]
    facts: ModelFacts
    reader: Any
    state: Mapping[str, Tensor]  # by name in the file

    @classmethod
    def open(cls, model: LoadedModel) -> _FromFile:
        gguf = require_gguf("reading a GGUF file")
        facts = model.facts
        path = find_source(facts.source)
        reader = gguf.GGUFReader(path)
        _refuse_parts(reader, path)
        names = tensor_names(facts)
        layers = {tensor: layer for layer, tensor in layer_tensors(model.layers, names).items()}
        places = [
            Place(
                t.name,
                tuple(int(n) for n in reversed(t.shape)),
                t.tensor_type.name.lower(),
                int(t.n_bytes),
                layers.get(t.name, ""),
            )
            for t in reader.tensors
        ]
        there = {place.name for place in places}
        missing = [layer for tensor, layer in layers.items() if tensor not in there]
        if missing:
            raise InputError(
                f"{facts.source}: the file has no tensors of {len(missing)} layers of the model, "
                f"such as {missing[0]!r}; it is not the file that the model was loaded from."
            )
        state = {names[n]: t for n, t in own_state(model.module).items() if n in names}
        architecture = str(reader.get_field("general.architecture").contents())
        return cls(architecture, int(reader.alignment), tuple(places), facts, reader, state)

    def add_metadata(self, writer: Any) -> None:
        for field in self.reader.fields.values():
            if field.name.startswith(_COUNTS) or field.name in _OWN_KEYS or not field.types:
                continue
            value = _value_of(field)
            if field.name == "general.alignment":
                writer.add_custom_alignment(value)
            elif not isinstance(value, list) or value:  # gguf-py writes no empty lists
                inner = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(field.name, value, field.types[0], sub_type=inner)

    def kept(self, place: Place) -> Bytes:
        tensor = next(t for t in self.reader.tensors if t.name == place.name)
        data = np.ascontiguousarray(tensor.data).view(np.uint8)
        if place.name not in self.state or self._same(tensor, place):
            return data
        rows = self.state[place.name]
        if place.type in PLAIN_TYPES:
            return ordered(raw(rows, place.type), place.name, self.facts)
        if place.type not in format_names(GGUF) or rows.ndim != 2:
            raise Unsupported(
                f"tensor {place.name!r}: the model has other values than its file, and hawqkit "
                f"does not encode type {place.type!r}; choose a GGUF type for its layer."
            )
        packed = encode_blocks(rows, parse_format(place.type)).packed.cpu().numpy()
        return ordered(packed, place.name, self.facts)

    def _same(self, tensor: Any, place: Place) -> bool:
        """Whether the model still has the values that the file decodes to."""
        gguf = require_gguf("reading a GGUF file")
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = self.state[place.name].detach().cpu()
        theirs = torch.from_numpy(np.array(decoded)).view(ours.shape).to(ours.dtype)
        ours_in_order = ordered(ours.float().numpy(), place.name, self.facts)
        return bool(np.array_equal(ours_in_order, theirs.float().numpy()))


def _refuse_parts(reader: Any, path: Path) -> None:
    count = reader.get_field("split.count")
    if count is not None and int(count.contents()) > 1:
        raise Unsupported(
            f"{path.name}: it is one of {count.contents()} parts; join them with llama.cpp's "
            "`llama-gguf-split --merge`."
        )


def _value_of(field: Any) -> Any:
    """Return a key's value as the writer takes it; strings as the bytes that the file holds."""
    gguf = require_gguf("reading a GGUF file")
    string = gguf.GGUFValueType.STRING
    if field.types[0] == string:
        return field.parts[field.data[0]].tobytes()
    if field.types[-1] == string:
        return [field.parts[index].tobytes() for index in field.data]
    return field.contents()
