"""What llama.cpp itself makes of a GGUF file; run in the environment of `.ci/consumer llama.cpp`.

    llama_cpp.py tensors FILE                       {tensor: type}, by the library's own reader
    llama_cpp.py logits FILE TOKENS.npy OUT.npy     tokens (sequences, length) -> float32 logits
    llama_cpp.py tokens FILE TEXTS.json             [[identifier, ...], ...]
    llama_cpp.py quantize IN OUT BASE [TYPES.txt [IMPORTANCE.npz]]   as llama-quantize does
    llama_cpp.py rows TYPE IN.npy OUT.npy [IMPORTANCE.npy]           ggml's own encoder

Structures are passed whole. Their layout is that of release v0.5.0; default values are checked.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(sys.prefix) / "npm" / "package" / "bins" / "linux-x64"
F32 = 0
FILE_TYPES = {
    "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "IQ4_XS": 30,
}  # fmt: skip


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def opaque(size: int) -> Any:
    """Return a structure of that many bytes, with a name to read and write numbers in it."""
    return type("Opaque", (ctypes.Structure,), {"_fields_": [("raw", ctypes.c_ubyte * size)]})


ModelParameters, ContextParameters = opaque(80), opaque(160)
# byte -> value that a default has there; a release that moves a field is noticed
MODEL_DEFAULTS = {16: -1, 20: 1}
CONTEXT_DEFAULTS = {0: 512, 4: 2048, 8: 512, 28: 4, 32: 4, 40: -1, 52: -1, 104: 1, 108: 1}
QUANTIZE_DEFAULTS = {0: 0, 4: 7, 8: 43, 12: 43}


class TypeOverride(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("type", ctypes.c_int)]


class Importance(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("data", ctypes.POINTER(ctypes.c_float)),
        ("size", ctypes.c_size_t),
    ]


class QuantizeParameters(ctypes.Structure):
    _fields_ = [
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("flags", ctypes.c_uint8 * 8),
        ("imatrix", ctypes.POINTER(Importance)),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.POINTER(TypeOverride)),
        ("prune_layers", ctypes.c_void_p),
        ("more", ctypes.c_uint8 * 8),
    ]


class InitParameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def read(structure: Any, place: int) -> int:
    return int(struct.unpack_from("<i", bytes(structure), place)[0])


def checked(structure: Any, defaults: dict[int, int]) -> Any:
    for place, value in defaults.items():
        if read(structure, place) != value:
            raise SystemExit(f"llama.cpp's structures have changed: byte {place} of {structure}")
    return structure


def write(structure: Any, place: int, value: int) -> None:
    struct.pack_into("<i", structure.raw, place, value)


class Library:
    """libllama and libggml of the npm package."""

    def __init__(self) -> None:
        def load(pattern: str) -> Any:
            return ctypes.CDLL(str(next(iter(FOLDER.glob(pattern)))), ctypes.RTLD_GLOBAL)

        self.base = load("libggml-base.so")
        ggml = load("libggml.v*.so")
        self.llama = load("libllama.v*.so")
        self.log: list[str] = []
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self._log = kind(lambda _, text, __: self.log.append(text.decode("utf-8", "replace")))
        self.llama.llama_log_set(self._log, None)
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(FOLDER).encode())
        self.llama.llama_backend_init()
        self.base.ggml_type_name.restype = ctypes.c_char_p

    def types(self) -> dict[str, int]:
        names = (self.base.ggml_type_name(i) for i in range(43))
        return {n.decode().lower(): i for i, n in enumerate(names) if n}

    def open(self, path: str) -> Any:
        default = self.llama.llama_model_default_params
        default.restype = ModelParameters
        load = self.llama.llama_model_load_from_file
        load.argtypes, load.restype = [ctypes.c_char_p, ModelParameters], ctypes.c_void_p
        model = load(path.encode(), checked(default(), MODEL_DEFAULTS))
        if not model:
            raise SystemExit("llama.cpp cannot load it:\n" + "".join(self.log[-12:]))
        return model

    def vocabulary(self, model: Any) -> Any:
        get = self.llama.llama_model_get_vocab
        get.argtypes, get.restype = [ctypes.c_void_p], ctypes.c_void_p
        return get(model)

    def context(self, model: Any, length: int) -> Any:
        default = self.llama.llama_context_default_params
        default.restype = ContextParameters
        parameters = checked(default(), CONTEXT_DEFAULTS)
        for place, value in {
            0: length, 4: length, 8: length,  # tokens of context and batches
            28: 1, 32: 1,  # threads
            52: 0,  # no flash attention
            104: F32, 108: F32,  # keys and values as they are computed
        }.items():  # fmt: skip
            write(parameters, place, value)
        init = self.llama.llama_init_from_model
        init.argtypes, init.restype = [ctypes.c_void_p, ContextParameters], ctypes.c_void_p
        return init(model, parameters)


def tensors(library: Library, path: str) -> dict[str, str]:
    base = library.base
    base.gguf_init_from_file.restype = ctypes.c_void_p
    base.gguf_init_from_file.argtypes = [ctypes.c_char_p, InitParameters]
    base.gguf_get_n_tensors.restype = ctypes.c_int64
    base.gguf_get_n_tensors.argtypes = [ctypes.c_void_p]
    base.gguf_get_tensor_name.restype = ctypes.c_char_p
    base.gguf_get_tensor_name.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    base.gguf_get_tensor_type.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    file = base.gguf_init_from_file(path.encode(), InitParameters(True, None))
    if not file:
        raise SystemExit("llama.cpp cannot read it")
    return {
        base.gguf_get_tensor_name(file, i).decode(): base.ggml_type_name(
            base.gguf_get_tensor_type(file, i)
        ).decode().lower()
        for i in range(base.gguf_get_n_tensors(file))
    }  # fmt: skip


def logits(library: Library, path: str, tokens: Any) -> Any:
    """Return (sequences, length, vocabulary) float32, each sequence in a context of its own."""
    llama = library.llama
    model = library.open(path)
    llama.llama_vocab_n_tokens.argtypes = [ctypes.c_void_p]
    rows = llama.llama_vocab_n_tokens(library.vocabulary(model))
    llama.llama_batch_init.restype = Batch
    llama.llama_decode.argtypes = [ctypes.c_void_p, Batch]
    llama.llama_get_logits.argtypes = [ctypes.c_void_p]
    llama.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    llama.llama_free.argtypes = [ctypes.c_void_p]
    found = []
    for sequence in tokens:
        context = library.context(model, len(sequence))
        batch = llama.llama_batch_init(len(sequence), 0, 1)
        batch.n_tokens = len(sequence)
        for place, token in enumerate(sequence):
            batch.token[place], batch.pos[place] = int(token), place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if llama.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed:\n" + "".join(library.log[-12:]))
        flat = np.ctypeslib.as_array(llama.llama_get_logits(context), (len(sequence) * rows,))
        found.append(flat.reshape(len(sequence), rows).copy())
        llama.llama_free(context)
    return np.stack(found)


def tokens(library: Library, path: str, texts: list[str]) -> list[list[int]]:
    llama = library.llama
    vocabulary = library.vocabulary(library.open(path))
    llama.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32),
        ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    found = []
    for text in texts:
        raw = text.encode()
        space = (ctypes.c_int32 * (2 * len(raw) + 8))()
        count = llama.llama_tokenize(vocabulary, raw, len(raw), space, len(space), True, True)
        found.append(list(space[:count]))
    return found


def parse_types(text: str, known: dict[str, int]) -> list[tuple[str, int]]:
    """Read a file of `--tensor-type-file` as tools/quantize/quantize.cpp does."""
    found = []
    for word in text.split():
        name, _, kind = word.partition("=")
        if not name or kind.lower() not in known:
            raise SystemExit(f"malformed tensor type {word!r}")
        found.append((name.lower(), known[kind.lower()]))
    return found


def quantize(library: Library, source: str, target: str, base: str, *more: str) -> dict[str, Any]:
    llama = library.llama
    llama.llama_model_quantize_default_params.restype = QuantizeParameters
    parameters = checked(llama.llama_model_quantize_default_params(), QUANTIZE_DEFAULTS)
    parameters.nthread = 1
    parameters.ftype = FILE_TYPES[base]
    parameters.flags[0] = 1  # allow_requantize
    if more:
        pairs = parse_types(Path(more[0]).read_text("utf-8"), library.types())
        overrides = (TypeOverride * (len(pairs) + 1))()
        for place, (pattern, kind) in enumerate(pairs):
            overrides[place] = TypeOverride(pattern.encode(), kind)
        overrides[len(pairs)] = TypeOverride(None, 43)
        parameters.tt_overrides = overrides
    if len(more) > 1:
        stored = dict(np.load(more[1]))
        entries = (Importance * (len(stored) + 1))()
        for place, (name, values) in enumerate(stored.items()):
            data = np.ascontiguousarray(values, np.float32)
            stored[name] = data
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            entries[place] = Importance(name.encode(), pointer, data.size)
        parameters.imatrix = entries
    llama.llama_model_quantize.argtypes = [
        ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(QuantizeParameters),
    ]  # fmt: skip
    code = llama.llama_model_quantize(source.encode(), target.encode(), parameters)
    if code != 0:
        raise SystemExit(f"llama_model_quantize gave {code}:\n" + "".join(library.log[-12:]))
    fallbacks = [line for line in library.log if re.search("falling back", line)]
    return {"bytes": Path(target).stat().st_size, "fallbacks": fallbacks}


def rows(library: Library, kind: str, source: str, target: str, *more: str) -> dict[str, Any]:
    values = np.ascontiguousarray(np.load(source), np.float32)
    number = library.types()[kind]
    base = library.base
    base.ggml_row_size.restype = ctypes.c_size_t
    base.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    width = base.ggml_row_size(number, values.shape[1])
    packed = np.empty((len(values), width), np.uint8)
    importance = None
    if more:
        weights = np.ascontiguousarray(np.load(more[0]), np.float32)
        importance = weights.ctypes.data_as(ctypes.c_void_p)
    base.ggml_quantize_chunk.restype = ctypes.c_size_t
    base.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    written = base.ggml_quantize_chunk(
        number, values.ctypes.data, packed.ctypes.data, 0, *values.shape, importance
    )
    np.save(target, packed)
    return {"bytes": written}


def main() -> None:
    command, *words = sys.argv[1:]
    library = Library()
    result: Any
    if command == "tensors":
        result = tensors(library, words[0])
    elif command == "logits":
        found = logits(library, words[0], np.load(words[1]))
        np.save(words[2], found)
        result = {"shape": found.shape}
    elif command == "tokens":
        result = tokens(library, words[0], json.loads(Path(words[1]).read_text("utf-8")))
    elif command == "quantize":
        result = quantize(library, *words)
    else:
        result = rows(library, *words)
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main()
