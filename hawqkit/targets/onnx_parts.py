"""What stands for a quantized layer in an ONNX graph: initializers, nodes, and their bytes.

A layer n of format f is stored as

    n.weight_codes         int4, int8 or uint8, in the shape that its consumer reads
    n.weight_scale         float32: (outputs,), or one for each group of inputs
    n.weight_zero_point    of the type of the codes, where a format has zero points or codes are
                           uint8
    n.weight_dequantize    DequantizeLinear(codes, scale, zero point) -> n.weight

so that the node that reads n.weight stays as it was. Where the groups of a format run over the
entries of a kernel, codes have the shape (rows, columns), and a Reshape follows.

Codes are uint8, shifted by 128, where the input is quantized too: ONNX Runtime's kernels for uint8
times int8 add two products in 16 bits on processors without VNNI, and saturate; those for uint8
times uint8 do not.

A quantized input t is QuantizeLinear(t) and DequantizeLinear, once for all layers that read it with
the same range: `t_quantized`, `t_dequantized`, `t_scale`, `t_zero_point`.

Here are the `onnx` package and numpy, and no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawqkit.errors import HawqkitError
from hawqkit.formats import Format

EXTRA = "hawqkit[onnx]"
UNSIGNED_SHIFT = 128
# One field of a message: its number and type take a byte, for all numbers below 16.
_TAG = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a layer's weight stands in the graph; plain values, so that facts can hold them.

    Attributes:
        name: of the weight.
        use: `columns` (inputs, outputs), read by MatMul or Gemm; `rows` (outputs, inputs), read by
            Gather or a Transpose; `conv`; or `transposed`, a transposed convolution.
        dims: shape of the weight in the graph.
        groups: of a transposed convolution, else 1.
        inputs: the tensors that its readers multiply with it, each once; empty for a look-up.
        growth: bytes by which these readers grow when they read the tensors' quantized forms.
    """

    name: str
    use: str
    dims: tuple[int, ...]
    groups: int = 1
    inputs: tuple[str, ...] = ()
    growth: int = 0

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Place:
        """Read what `dataclasses.asdict` gave, through JSON or not."""
        values: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()
        }
        return cls(**values)

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) as hawqkit sees the weight."""
        entries = int(np.prod(self.dims, dtype=np.int64))
        if self.use == "columns":
            return self.dims[1], self.dims[0]
        rows = self.dims[1] * self.groups if self.use == "transposed" else self.dims[0]
        return rows, entries // rows


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized weight in numpy: codes (rows, columns), scales and zero points (rows, groups)."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.int8] | None


def onnx_package() -> Any:
    """Return the `onnx` package.

    Raises:
        HawqkitError: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise HawqkitError(
            f"target 'onnx' needs the package onnx, which is missing: pip install '{EXTRA}'."
        ) from error
    return onnx


def weight_name(layer: str) -> str:
    """Return the name of a layer's weight.

    >>> weight_name("conv1"), weight_name("")
    ('conv1.weight', 'weight')
    """
    return f"{layer}.weight" if layer else "weight"


def has_activations(place: Place, format: Format) -> bool:
    """Whether a layer's input is quantized too; a look-up has none."""
    return format.activation_bits is not None and bool(place.inputs)


def parts(place: Place, format: Format, codes: Codes | None) -> tuple[list[Any], list[Any]]:
    """Return the initializers and nodes that make the weight of a layer from its codes.

    Args:
        place: where it stands.
        format: an integer format of 4 or 8 bits.
        codes: the weight; None gives the same messages with no data, to count bytes.
    """
    onnx = onnx_package()
    groups = format.groups_per_row(place.matrix[1])
    grouped = format.group_size is not None
    by_rows = place.use in ("rows", "transposed") or (grouped and place.use == "conv")
    shape = place.matrix if by_rows else place.dims
    axis, scales = _layout(place, by_rows, grouped, groups)
    kind = _type(place, format)
    numbers = None if codes is None else _arranged(place, kind, codes, shape, scales)
    name = place.name
    initializers = [
        _tensor(f"{name}_codes", kind, shape, None if numbers is None else numbers[0]),
        _tensor(f"{name}_scale", "FLOAT", scales, None if numbers is None else numbers[1]),
    ]
    inputs = [f"{name}_codes", f"{name}_scale"]
    if not format.symmetric or kind == "UINT8":
        inputs.append(f"{name}_zero_point")
        initializers.append(
            _tensor(inputs[-1], kind, scales, None if numbers is None else numbers[2])
        )
    chain = _reshapes(place) if by_rows and place.use in ("conv", "transposed") else []
    made = f"{name}_rows" if chain else name
    attributes = {"axis": axis, **({"block_size": format.group_size} if grouped else {})}
    node = onnx.helper.make_node(
        "DequantizeLinear", inputs, [made], f"{name}_dequantize", **attributes
    )
    nodes = [node]
    for index, (kind_of_step, argument) in enumerate(chain):
        last = index == len(chain) - 1
        given, made = made, name if last else f"{name}_step_{index}"
        if kind_of_step == "Reshape":
            label = f"{name}_shape_{index}"
            dims = np.array(argument, dtype=np.int64)
            initializers.append(_tensor(label, "INT64", dims.shape, dims))
            nodes.append(onnx.helper.make_node("Reshape", [given, label], [made]))
        else:
            nodes.append(onnx.helper.make_node("Transpose", [given], [made], perm=argument))
    return initializers, nodes


def activation_parts(
    tensor: str, scale: float, zero_point: int, suffix: str = ""
) -> tuple[list[Any], list[Any]]:
    """Return the initializers and nodes that quantize a tensor to uint8 and back.

    q = clamp(round(t / scale) + zero point, 0, 255),  t' = (q - zero point) scale
    """
    onnx = onnx_package()
    label = f"{tensor}{suffix}"
    quantized, dequantized = f"{label}_quantized", dequantized_name(tensor, suffix)
    ranges = [f"{label}_scale", f"{label}_zero_point"]
    initializers = [
        _tensor(ranges[0], "FLOAT", (), np.array(scale, dtype=np.float32)),
        _tensor(ranges[1], "UINT8", (), np.array(zero_point, dtype=np.uint8)),
    ]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", [tensor, *ranges], [quantized], quantized),
        onnx.helper.make_node("DequantizeLinear", [quantized, *ranges], [dequantized], dequantized),
    ]
    return initializers, nodes


def dequantized_name(tensor: str, suffix: str = "") -> str:
    """Return the name of a tensor after it was quantized and dequantized."""
    return f"{tensor}{suffix}_dequantized"


def float_tensor(name: str, dims: Sequence[int], values: NDArray[np.float32] | None = None) -> Any:
    """Return a float32 initializer; with no values it holds no data."""
    return _tensor(name, "FLOAT", dims, values)


def field_bytes(content: int) -> int:
    """Return the bytes of a message of `content` bytes inside another message.

    >>> field_bytes(127), field_bytes(128)
    (129, 131)
    """
    return _TAG + _varint_bytes(content) + content


def initializer_bytes(kind: str, dims: Sequence[int], name: str) -> int:
    """Return the bytes of an initializer inside its graph, its data included."""
    return field_bytes(filled_bytes(_tensor(name, kind, dims, None)))


def filled_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, whether it holds its data already or not."""
    size = int(tensor.ByteSize())
    if tensor.HasField("raw_data"):
        return size
    entries = int(np.prod(tensor.dims, dtype=np.int64))
    bits = {"FLOAT": 32, "INT64": 64, "INT8": 8, "UINT8": 8, "INT4": 4}
    kind = onnx_package().TensorProto.DataType.Name(tensor.data_type)
    return size + field_bytes(-(-entries * bits[kind] // 8))


def _varint_bytes(number: int) -> int:
    return max(1, -(-int(number).bit_length() // 7))


def _type(place: Place, format: Format) -> str:
    if format.bits == 4:
        return "INT4"
    return "UINT8" if has_activations(place, format) else "INT8"


def _layout(place: Place, by_rows: bool, grouped: bool, groups: int) -> tuple[int, tuple[int, ...]]:
    """Return the axis of the scales and their shape."""
    rows = place.matrix[0]
    columns_first = place.use == "columns" and not by_rows
    if not grouped:
        return (1 if columns_first else 0), (rows,)
    return (0, (groups, rows)) if columns_first else (1, (rows, groups))


def _arranged(
    place: Place, kind: str, codes: Codes, shape: Sequence[int], scales: Sequence[int]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return codes, scales and zero points in the graph's shapes and types."""
    zeros = np.zeros(codes.scales.shape, dtype=np.int8) if codes.zeros is None else codes.zeros
    turned = place.use == "columns"
    some: list[NDArray[Any]] = [codes.codes, codes.scales, zeros]
    some = [np.ascontiguousarray(x.T) if turned else x for x in some]
    values, steps, offsets = (
        some[0].reshape(shape),
        some[1].reshape(scales),
        some[2].reshape(scales),
    )
    if kind == "UINT8":
        values, offsets = (
            (x.astype(np.int16) + UNSIGNED_SHIFT).astype(np.uint8) for x in (values, offsets)
        )
    return values, steps.astype(np.float32), offsets


def _reshapes(place: Place) -> list[tuple[str, list[int]]]:
    """Return the steps from (rows, columns) to the weight's own shape."""
    if place.use == "conv":
        return [("Reshape", list(place.dims))]
    inputs, outputs, *kernel = place.dims
    g = place.groups
    swapped = [0, 2, 1, *range(3, 3 + len(kernel))]
    return [
        ("Reshape", [g, outputs, inputs // g, *kernel]),
        ("Transpose", swapped),
        ("Reshape", list(place.dims)),
    ]


def _tensor(name: str, kind: str, dims: Sequence[int], values: NDArray[Any] | None) -> Any:
    """Return an initializer with its data as raw bytes, the first entry in the low bits."""
    onnx = onnx_package()
    tensor = onnx.TensorProto(
        name=name, data_type=onnx.TensorProto.DataType.Value(kind), dims=[int(d) for d in dims]
    )
    if values is not None:
        if kind == "INT4":
            flat = values.reshape(-1).astype(np.int8).view(np.uint8) & 0xF
            flat = np.append(flat, np.zeros(flat.size % 2, dtype=np.uint8))
            values = flat[0::2] | (flat[1::2] << 4)
        tensor.raw_data = np.ascontiguousarray(values).tobytes()
    return tensor
