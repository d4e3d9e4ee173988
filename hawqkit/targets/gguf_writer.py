"""Write a GGUF file, tensor by tensor; `gguf_layout` says how, `gguf_origins` from what."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hawqkit.errors import HawqkitError, NumericalError, Unsupported
from hawqkit.formats import Format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.gguf_blocks import encode_blocks
from hawqkit.targets.contract import capped
from hawqkit.targets.gguf_layout import Layout, Place
from hawqkit.targets.gguf_names import require_gguf
from hawqkit.targets.gguf_origins import VERSION_KEY, Bytes, Origin, ordered, origin_of


def layout_of(model: LoadedModel, version: str) -> Layout:
    """Return how a model's file is laid out, with the bytes of its head.

    Args:
        model: the model.
        version: of hawqkit, as the file says it.

    Raises:
        Unsupported, InputError: as `gguf_origins.origin_of`.
    """
    origin = origin_of(model)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "head.gguf"
        writer = _writer(origin, path, version, file_type=0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return Layout(origin.architecture, path.stat().st_size, origin.alignment, origin.places)


def write_file(
    path: Path, model: LoadedModel, mix: Mapping[str, str], *, rounding: str, version: str
) -> Layout:
    """Write the file of a mix, and read back that every tensor has its type.

    Args:
        path: a new file.
        model: the model.
        mix: layer name -> format name, checked before.
        rounding: `nearest` or `searched`.
        version: of hawqkit.

    Returns:
        The layout; its head is that of this very file.

    Raises:
        Unsupported, InputError: as `gguf_origins.origin_of`.
        NumericalError: a weight is not finite, or too large for its format.
    """
    gguf = require_gguf("writing a GGUF file")
    origin = origin_of(model)
    layout = Layout(origin.architecture, 0, origin.alignment, origin.places)
    writer = _writer(origin, path, version, layout.file_type(mix))
    for place, format_ in layout.chosen(mix):
        kind = gguf.GGMLQuantizationType[place.type_in(format_).upper()]
        shape = gguf.quant_shape_to_byte_shape(place.shape, kind)
        nbytes = place.bytes_in(format_)
        writer.add_tensor_info(place.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    head = writer.fout[0].tell()
    writer.write_ti_data_to_file()
    for place, format_ in layout.chosen(mix):
        writer.write_tensor_data(_data(origin, place, format_, rounding, model))
    writer.close()
    layout = Layout(origin.architecture, head, origin.alignment, origin.places)
    _verify(path, layout, mix)
    return layout


def _writer(origin: Origin, path: Path, version: str, file_type: int) -> Any:
    gguf = require_gguf("writing a GGUF file")
    writer = gguf.GGUFWriter(path, origin.architecture)
    origin.add_metadata(writer)
    writer.add_string(VERSION_KEY, version)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _data(origin: Origin, place: Place, format: Format, rounding: str, model: LoadedModel) -> Bytes:
    if not format.quantizes:
        return origin.kept(place)
    try:
        blocks = encode_blocks(model.weight(place.layer), format, rounding=rounding)
    except NumericalError as error:
        raise NumericalError(f"layer {place.layer!r}: {error}") from error
    packed: Bytes = blocks.packed.cpu().numpy()
    return ordered(packed, place.name, model.facts)


def _verify(path: Path, layout: Layout, mix: Mapping[str, str]) -> None:
    """Read the file as its consumers do, and refuse it unless every tensor has its type."""
    gguf = require_gguf("writing a GGUF file")
    reader = gguf.GGUFReader(path)
    types = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    wanted = {place.name: place.type_in(format_) for place, format_ in layout.chosen(mix)}
    wrong = [
        f"tensor {name!r} is {types.get(name)} in place of {wanted.get(name)}"
        for name in {**wanted, **types}
        if types.get(name) != wanted.get(name)
    ]
    if wrong:
        raise Unsupported("\n".join(["the GGUF file reads back otherwise:", *capped(wrong)]))
    size = path.stat().st_size
    if size != layout.file_bytes(mix):
        raise HawqkitError(
            f"the GGUF file has {size:,} bytes in place of {layout.file_bytes(mix):,}: this is an "
            "error in hawqkit."
        )
