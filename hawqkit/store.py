"""The run folder: atomic writes, records as JSON, arrays as safetensors, and the probe's journal.

Nothing here is ever half written: a file is written beside its place, flushed to the disk, and
renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hawqkit.errors import InputError, StateMismatch
from hawqkit.records import SCHEMA, Density, Samples

Record = TypeVar("Record")
Arrays = dict[str, NDArray[Any]]


def write_bytes_atomic(path: str | Path, data: bytes) -> Path:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Raises:
        OSError: no space, no permission; the temporary file is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        share(temporary)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def write_text_atomic(path: str | Path, text: str) -> Path:
    """Write UTF-8 text atomically; see `write_bytes_atomic`."""
    return write_bytes_atomic(path, text.encode())


def write_record(path: str | Path, record: Any) -> Path:
    """Write a record as JSON: keys in the order of its fields, a row of numbers on one line."""
    return write_text_atomic(path, to_json(to_plain(record)) + "\n")


def to_plain(record: Any) -> dict[str, Any]:
    """Return a record as a JSON-able mapping, without what has a file of its own."""
    apart = {f.name: None for f in dataclasses.fields(record) if not f.metadata.get("json", True)}
    plain = dataclasses.asdict(dataclasses.replace(record, **apart))
    return {name: value for name, value in plain.items() if name not in apart}


def read_record(path: str | Path, kind: type[Record]) -> Record:
    """Read a record that `write_record` wrote.

    Raises:
        InputError: there is no such file.
        StateMismatch: it is not JSON, its schema is newer, or a field has a wrong name, type or
            shape.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; the stage that writes it has not run yet.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StateMismatch(f"{path}: not valid JSON ({error}); run its stage again.") from error
    found = content.get("schema") if isinstance(content, dict) else None
    if isinstance(found, int) and found > SCHEMA:
        raise StateMismatch(
            f"{path}: has schema {found}, but this hawqkit reads schemas up to {SCHEMA}; "
            "use the hawqkit that wrote it, or a newer one."
        )
    if found != SCHEMA:
        raise StateMismatch(f"{path}: no hawqkit record (schema {found!r}); run its stage again.")
    try:
        found_record: Record = _adapter(cast(Any, kind)).validate_python(content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise StateMismatch(
            f"{path}: not a valid {kind.__name__}: {'; '.join(lines[:3])}{more}; "
            "restore the file or run its stage again."
        ) from error
    return found_record


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def to_json(value: Any, indent: str = "") -> str:
    """Return JSON in which a list of plain values stands on one line."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        rows = (f"{inner}{json.dumps(str(k))}: {to_json(v, inner)}" for k, v in value.items())
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        return "[\n" + ",\n".join(inner + to_json(v, inner) for v in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Return a SHA-256 over a JSON-able mapping; the order of keys does not matter."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_arrays(path: str | Path, arrays: Arrays, metadata: Mapping[str, str]) -> Path:
    """Write arrays as safetensors with a checksum of their bytes."""
    ordered = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    return write_bytes_atomic(
        path,
        save(
            ordered, metadata={"hawqkit": _sorted_json({**metadata, "sha256": _checksum(ordered)})}
        ),
    )


def read_arrays(path: str | Path) -> tuple[Arrays, dict[str, str]]:
    """Read arrays and metadata that `write_arrays` wrote.

    Raises:
        StateMismatch: the file is truncated, or its bytes do not have the checksum it states.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = dict(json.loads((file.metadata() or {}).get("hawqkit", "{}")))
            arrays = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (SafetensorError, ValueError, OSError) as error:
        raise StateMismatch(f"{path}: cannot be read ({error}); run its stage again.") from error
    if metadata.get("sha256") != _checksum(arrays):
        raise StateMismatch(f"{path}: its bytes do not match their checksum; run its stage again.")
    return arrays, metadata


def write_samples(path: str | Path, samples: Samples, fingerprint_: str) -> Path:
    """Write the probe's per-sequence samples beside `sensitivities.json`."""
    fields = {f.name: getattr(samples, f.name) for f in dataclasses.fields(samples)}
    fields = {name: array for name, array in fields.items() if array is not None}
    return write_arrays(path, fields, {"fingerprint": fingerprint_})


def read_samples(path: str | Path, fingerprint_: str) -> Samples:
    """Read the samples that belong to the sensitivities with this fingerprint.

    Raises:
        StateMismatch: they are of another run, incomplete or damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; run `hawqkit probe` again.")
    arrays, metadata = read_arrays(path)
    if metadata.get("fingerprint") != fingerprint_:
        raise StateMismatch(f"{path}: these samples are of another run than sensitivities.json.")
    names = {f.name for f in dataclasses.fields(Samples)}
    of_inputs = {name for name in names if name.startswith("input_")}
    if set(arrays) not in (names, names - of_inputs):
        raise StateMismatch(f"{path}: has arrays {sorted(arrays)}, expected {sorted(names)}.")
    return Samples(**arrays)


def write_densities(path: str | Path, densities: Mapping[str, Density], fingerprint_: str) -> Path:
    """Write the tridiagonals of a spectrum, `NAME/alphas` and so on, beside `spectrum.json`."""
    arrays = {
        f"{name}/{part}": array
        for name, density in densities.items()
        for part, array in density.to_arrays().items()
    }
    return write_arrays(path, arrays, {"fingerprint": fingerprint_})


def read_densities(path: str | Path, fingerprint_: str) -> dict[str, Density]:
    """Read the tridiagonals that belong to the spectrum with this fingerprint.

    Raises:
        InputError: there is no such file.
        StateMismatch: they are of another run, incomplete or damaged.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; run `hawqkit spectrum` again.")
    arrays, metadata = read_arrays(path)
    if metadata.get("fingerprint") != fingerprint_:
        raise StateMismatch(f"{path}: these tridiagonals are of another run than spectrum.json.")
    parts: dict[str, Arrays] = {}
    for key, array in arrays.items():
        name, _, part = key.rpartition("/")
        parts.setdefault(name, {})[part] = array
    try:
        return {name: Density.from_arrays(found) for name, found in parts.items()}
    except KeyError as error:
        raise StateMismatch(f"{path}: lacks the array {error}; run its stage again.") from error


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _sorted_json(metadata: Mapping[str, str]) -> str:
    """Return metadata as one entry: the library writes several in an order of its own."""
    return json.dumps(metadata, sort_keys=True)


def share(path: str | Path) -> None:
    """Give a file or folder the mode that `open` or `mkdir` would: what the umask leaves.

    Temporary files and files of safetensors belong to the owner alone, whatever the umask says.
    """
    mask = os.umask(0)
    os.umask(mask)
    Path(path).chmod((0o777 if Path(path).is_dir() else 0o666) & ~mask)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can do so."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
