"""How many bytes a safetensors file takes, without making it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from hawqkit.errors import Unsupported
from hawqkit.records import Tensor

# In the order in which the library lays tensors out: dtypes by falling rank, names within a dtype.
_CODES = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_RANKS = {name: rank for rank, name in enumerate(_CODES)}
_LENGTH_BYTES = 8  # the header's length stands before it, as a 64-bit integer
_ALIGNMENT = 8  # the header is padded with spaces, so that data starts on a multiple of 8


def file_bytes(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> int:
    """Return the bytes of the file that `safetensors.torch.save_file(tensors, metadata)` writes.

    `8 + (header rounded up to a multiple of 8) + sum of the tensors' bytes`; the header is JSON
    with each tensor's name, dtype, shape and offsets, so it depends on the order of the data.

    Args:
        tensors: in any order; names are unique.
        metadata: at most one entry: the library does not fix the order of several.

    Raises:
        Unsupported: a dtype is unknown.

    >>> file_bytes([Tensor("a", "float32", (2, 3))], {"format": "pt"})
    120
    """
    ordered = sorted(tensors, key=lambda t: (_rank(t), t.name.encode()))
    entries = [_quoted("__metadata__") + ":" + _compact(dict(metadata))] if metadata else []
    start = 0
    for tensor in ordered:
        end = start + tensor.nbytes
        entries.append(entry(tensor, start, end))
        start = end
    header = len(("{" + ",".join(entries) + "}").encode())
    return _LENGTH_BYTES + -(-header // _ALIGNMENT) * _ALIGNMENT + start


def entry(tensor: Tensor, start: int, end: int) -> str:
    """Return a tensor's part of the header; offsets in bytes."""
    facts = {
        "dtype": _CODES[tensor.dtype],
        "shape": list(tensor.shape),
        "data_offsets": [start, end],
    }
    return f"{_quoted(tensor.name)}:{_compact(facts)}"


def _rank(tensor: Tensor) -> int:
    if tensor.dtype not in _RANKS:
        raise Unsupported(
            f"tensor {tensor.name!r} has dtype {tensor.dtype!r}, which cannot be stored: "
            f"known are {', '.join(_CODES)}."
        )
    return _RANKS[tensor.dtype]


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
