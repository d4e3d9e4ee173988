"""How compressed-tensors stores a layer in each format: tensors, and the scheme in config.json.

Of a layer n with shape (rows, columns) and g columns to a scale:

    integers, inputs as they are: `pack-quantized`
        n.weight_packed  int32 (rows, ceil(columns b / 32))   codes + 2^(b-1), dense, low bits first
        n.weight_scale   (rows, columns / g)                  bfloat16 or float16, signed
        n.weight_shape   int64 (2,)
    int8-channel-a8: `int-quantized`, inputs rounded token by token
        n.weight         int8 (rows, columns)
        n.weight_scale   (rows, 1)                            bfloat16 or float16, signed
    fp8-e4m3: `float-quantized`, inputs as they are
        n.weight         float8_e4m3fn (rows, columns)
        n.weight_scale   16 bits, (rows, 1), or (1,) for `tensor`
    mxfp4, nvfp4: `mxfp4-pack-quantized`, `nvfp4-pack-quantized`
        n.weight_packed  uint8 (rows, columns / 2)            two codes a byte, low bits first
        n.weight_scale   uint8 exponents, or float8_e4m3fn (rows, columns / g)
        n.weight_global_scale  float32 (1,), nvfp4 alone

This module needs no torch.
"""

from __future__ import annotations

from typing import Any

from hawqkit.formats import FLOAT, INTEGER, Format
from hawqkit.records import Layer, Tensor

PACKED, INT8, FP8 = "pack-quantized", "int-quantized", "float-quantized"
FP4 = {"mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
FLOATS = ("fp8-e4m3-channel", "fp8-e4m3-tensor", *FP4)
MIXED = "mixed-precision"
W8A8 = "int8-channel-a8"
DECODES_TO = "bfloat16"  # what compressed-tensors 0.20.0 makes of 4-bit floats, whatever is asked


def layout_of(format: Format) -> str | None:
    """Return the name of the layout that holds a format, None where there is none.

    >>> from hawqkit.formats import parse_format
    >>> [layout_of(parse_format(n)) for n in ("int3-g64", "w8a8", "w4a8", "nvfp4", "q4_k")]
    ['pack-quantized', 'int-quantized', None, 'nvfp4-pack-quantized', None]
    """
    if format.family == INTEGER and format.quantizes and format.symmetric:
        if format.activation_bits is None:
            return PACKED
        whole = (format.bits, format.group_size, format.activation_bits) == (8, None, 8)
        return INT8 if whole else None
    if format.family == FLOAT:
        return FP4.get(format.name, FP8 if format.name in FLOATS else None)
    return None


def packed(layer: Layer, format: Format) -> list[Tensor]:
    """Return the tensors that stand for a layer's weight.

    >>> from hawqkit.formats import parse_format
    >>> layer = Layer("up", "linear", rows=8, columns=96, dtype="float32")
    >>> [(t.name, t.shape) for t in packed(layer, parse_format("int3-g32"))]
    [('up.weight_packed', (8, 9)), ('up.weight_scale', (8, 3)), ('up.weight_shape', (2,))]
    >>> [(t.name, t.dtype, t.shape) for t in packed(layer, parse_format("fp8-e4m3-tensor"))]
    [('up.weight', 'float8_e4m3fn', (8, 96)), ('up.weight_scale', 'bfloat16', (1,))]
    """
    assert format.bits is not None
    name, rows, columns = layer.name, layer.rows, layer.columns
    groups = format.groups_per_row(columns)
    half = "float16" if layer.dtype == "float16" else "bfloat16"
    layout = layout_of(format)
    if layout == PACKED:
        words = -(-columns * format.bits // 32)
        return [
            Tensor(f"{name}.weight_packed", "int32", (rows, words)),
            Tensor(f"{name}.weight_scale", half, (rows, groups)),
            Tensor(f"{name}.weight_shape", "int64", (2,)),
        ]
    if layout == INT8:
        return [
            Tensor(f"{name}.weight", "int8", (rows, columns)),
            Tensor(f"{name}.weight_scale", half, (rows, 1)),
        ]
    if layout == FP8:
        scales = (1,) if format.per_tensor else (rows, 1)
        return [
            Tensor(f"{name}.weight", "float8_e4m3fn", (rows, columns)),
            Tensor(f"{name}.weight_scale", half, scales),
        ]
    small = format.name == "nvfp4"
    stored = "float8_e4m3fn" if small else "uint8"
    return [
        Tensor(f"{name}.weight_packed", "uint8", (rows, columns // 2)),
        Tensor(f"{name}.weight_scale", stored, (rows, groups)),
        *([Tensor(f"{name}.weight_global_scale", "float32", (1,))] if small else []),
    ]


def scheme(format: Format) -> dict[str, Any]:
    """Return the entry of `config_groups` for a format, without its targets."""
    layout = layout_of(format)
    weights: dict[str, Any] = {
        "num_bits": format.bits,
        "type": "int" if format.family == INTEGER else "float",
        "symmetric": True,
        "strategy": _strategy(format),
        "group_size": format.group_size,
        "dynamic": False,
    }
    if layout in FP4.values():
        small = format.name == "nvfp4"
        weights["scale_dtype"] = "torch.float8_e4m3fn" if small else "torch.uint8"
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return {
        "weights": weights,
        "input_activations": inputs if layout == INT8 else None,
        "output_activations": None,
        "format": layout,
    }


def _strategy(format: Format) -> str:
    if format.per_tensor:
        return "tensor"
    if format.group_size is None:
        return "channel"
    return "tensor_group" if format.name == "nvfp4" else "group"


def format_problem(format: Format, dtype: str) -> str | None:
    """Return why no layout holds a format, or none that loads, with what would fit.

    Args:
        format: of a layer's weight and inputs.
        dtype: that the model is stored in.
    """
    if format.family == INTEGER and not format.symmetric:
        plain = format.weights.name.removesuffix("-asym")
        return (
            "packed zero points do not load (their shapes disagree in compressed-tensors 0.20.0 "
            f"with transformers 5.23); use the symmetric {plain!r}."
        )
    layout = layout_of(format)
    if layout is None and format.activation_bits is not None:
        return (
            f"of formats that round inputs this target writes {W8A8!r} alone (inputs of 8 bits, "
            f"weights of 8 bits by channel); use that or {format.weights.name!r}, or export 'bits'."
        )
    if layout is None:
        return (
            "this target has no layout for it; use a symmetric integer format such as int4-g64, "
            "fp8-e4m3-channel, nvfp4 or mxfp4, or export 'bits'."
        )
    if layout in FP4.values() and dtype != DECODES_TO:
        return (
            f"compressed-tensors 0.20.0 decodes it to {DECODES_TO}, and the model is stored in "
            f"{dtype}, where its forward pass then fails; use int4-g32, or convert the model to "
            f"{DECODES_TO} first."
        )
    return None


def kernel_problem(format: Format, rows: int, columns: int, runtime: str) -> str | None:
    """Return why a runtime has no kernel for a weight of this shape, None where it has.

    Args:
        format: that the runtime has a kernel for.
        rows: of the matrix that the runtime multiplies with, fused layers together.
        columns: of it.
        runtime: its profile's name.

    >>> from hawqkit.formats import parse_format
    >>> kernel_problem(parse_format("int4-channel"), 48, 64, "vllm-cpu").partition(";")[0]
    "vLLM's 4-bit kernel for CPUs takes rows and columns in multiples of 32, not 48 x 64"
    """
    if runtime != "vllm-cpu" or layout_of(format) != PACKED or not (rows % 32 or columns % 32):
        return None
    return (
        f"vLLM's 4-bit kernel for CPUs takes rows and columns in multiples of 32, not {rows} x "
        f"{columns}; use {W8A8!r} or keep it ('none')."
    )
