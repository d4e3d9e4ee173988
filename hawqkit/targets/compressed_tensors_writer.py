"""Write the tensors of a compressed-tensors checkpoint; `compressed_tensors` says which."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hawqkit.errors import NumericalError, Unsupported
from hawqkit.formats import Format
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.floats import round_floats
from hawqkit.quantize.of_layer import quantize_layer
from hawqkit.quantize.rounding import scale_dtype_for
from hawqkit.records import Allocation, Layer
from hawqkit.targets import compressed_tensors as layout
from hawqkit.targets.compressed_tensors_layouts import FP8, INT8, PACKED, layout_of
from hawqkit.targets.folders import published

WORD_BITS = 32


def write_checkpoint(allocation: Allocation, folder: Path, model: LoadedModel) -> list[Path]:
    """Write weights, configuration, tokenizer and README, and return the files.

    Weights are rounded from the model in memory, with the allocation's rounding; the codes and
    scales are those that `quantize.apply.applied` decodes.

    Raises:
        InputError: the folder holds something else; nothing is changed.
    """
    mix, layers, facts = allocation.layers, model.layers, model.facts
    with published(folder, layout.is_export) as place:
        tensors = checkpoint(allocation, model)
        save_file(tensors, place / layout.WEIGHTS, metadata=layout.METADATA)
        (place / layout.CONFIG).write_bytes(layout.config_text(mix, layers, facts).encode())
        # safetensors gives its file to the owner alone, whatever the umask says.
        (place / layout.WEIGHTS).chmod((place / layout.CONFIG).stat().st_mode & 0o777)
        (place / layout.README).write_bytes(layout.readme(mix, layers, facts).encode())
        model.save_side_files(place)
        names = sorted(p.relative_to(place) for p in place.rglob("*") if p.is_file())
    return [folder / name for name in names]


@torch.no_grad()
def checkpoint(allocation: Allocation, model: LoadedModel) -> dict[str, Tensor]:
    """Return every tensor of the checkpoint by its name on disk, on the CPU, in its stored dtype.

    Raises:
        Unsupported: the model has no tensor of a name that its facts list.
    """
    quantized = layout.quantized_layers(allocation.layers, model.layers)
    replaced = {f"{layer.name}.weight" for layer, _ in quantized}
    state = _state_on_disk(model)
    tensors = {}
    for facts in model.facts.tensors:
        if facts.name in replaced:
            continue
        if facts.name not in state:
            raise Unsupported(
                f"the model has no tensor {facts.name!r} that its checkpoint lists: it was changed "
                "after it was loaded. Load it again."
            )
        tensors[facts.name] = _own(state[facts.name].to(getattr(torch, facts.dtype)))
    for layer, format_ in quantized:
        tensors |= _packed_layer(layer, format_, allocation.rounding, model)
    return tensors


def _packed_layer(
    layer: Layer, format: Format, rounding: str, model: LoadedModel
) -> dict[str, Tensor]:
    layout = layout_of(format)
    if layout in (PACKED, INT8):
        return _integers(layer, format, rounding, model, whole=layout == INT8)
    dtype = scale_dtype_for(layer.dtype)
    weight = model.weight(layer.name)
    made = round_floats(weight, format, rounding=rounding, scale_dtype=dtype)
    scales = made.stored_scales.cpu()
    if layout == FP8:
        return {
            f"{layer.name}.weight": made.codes.cpu().view(torch.float8_e4m3fn),
            f"{layer.name}.weight_scale": scales.reshape(-1) if format.per_tensor else scales,
        }
    codes = made.codes.cpu()
    glob = made.tensor_scale
    return {
        f"{layer.name}.weight_packed": codes[:, 0::2] | (codes[:, 1::2] << 4),
        f"{layer.name}.weight_scale": scales,
        **({} if glob is None else {f"{layer.name}.weight_global_scale": glob.cpu().reshape(1)}),
    }


def _integers(
    layer: Layer, format: Format, rounding: str, model: LoadedModel, *, whole: bool
) -> dict[str, Tensor]:
    """Return codes packed into words or, where they are bytes anyhow, `whole`."""
    assert format.bits is not None
    dtype = scale_dtype_for(layer.dtype)
    weights = format.weights
    quantized = quantize_layer(model, layer.name, weights, rounding=rounding, scale_dtype=dtype)
    if not bool(torch.isfinite(quantized.scales).all()):
        raise NumericalError(
            f"layer {layer.name!r}: its weights are too large for scales in {dtype}; load the "
            "model in bfloat16 or float32."
        )
    scale = {f"{layer.name}.weight_scale": _own(quantized.scales)}
    if whole:
        return {f"{layer.name}.weight": _own(quantized.codes), **scale}
    return {
        f"{layer.name}.weight_packed": pack(quantized.codes.cpu(), format.bits),
        **scale,
        f"{layer.name}.weight_shape": torch.tensor([layer.rows, layer.columns]),
    }


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes as a dense stream of bits in 32-bit words, row by row, low bits first.

    Code i of a row, as the unsigned number code + 2^(bits-1), takes the bits from i*bits to
    (i+1)*bits - 1 of the row's stream; a code may lie in two words. The last word is
    filled up with zeros.

    Args:
        codes: (rows, columns) int8, each in -2^(bits-1) .. 2^(bits-1) - 1.
        bits: 1 to 8.

    Returns:
        (rows, ceil(columns bits / 32)) int32.

    >>> pack(torch.tensor([[-4, -3, -2, 3]], dtype=torch.int8), 3)
    tensor([[3720]], dtype=torch.int32)
    """
    rows, columns = codes.shape
    words = -(-columns * bits // WORD_BITS)
    runs = -(-columns // WORD_BITS)  # 32 codes fill exactly `bits` words
    packed = torch.zeros(rows, runs, bits, dtype=torch.int64)
    for place in range(min(WORD_BITS, columns)):
        # (rows, runs that have a code at this place)
        part = codes[:, place::WORD_BITS].to(torch.int64) + (1 << (bits - 1))
        word, shift = divmod(place * bits, WORD_BITS)
        packed[:, : part.shape[1], word] |= (part << shift) & 0xFFFFFFFF
        if shift + bits > WORD_BITS:
            packed[:, : part.shape[1], word + 1] |= part >> (WORD_BITS - shift)
    unsigned = packed.view(rows, runs * bits)[:, :words]
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32)


def _state_on_disk(model: LoadedModel) -> dict[str, Tensor]:
    """Return the weights under the names that transformers gives them in a checkpoint."""
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion

    state = {n: t for n, t in model.module.state_dict().items() if isinstance(t, Tensor)}
    if not isinstance(model.module, PreTrainedModel):
        return state
    reverted: dict[str, Tensor] = revert_weight_conversion(model.module, state)
    return reverted


def _own(tensor: Tensor) -> Tensor:
    """Return the values on the CPU, contiguous, and in storage that no other tensor looks into."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
