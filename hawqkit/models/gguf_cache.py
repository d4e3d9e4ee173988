"""GGUF files, converted once to a safetensors folder: 17 s of parsing become 0.1 s of loading.

The cache is keyed by the file's SHA-256, so a changed file is converted anew, and by the version of
the conversion. A folder appears there by one rename, complete or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hawqkit.errors import HawqkitError, InputError, Unsupported
from hawqkit.store import share

CONVERSION = "v1"
MAGIC = b"GGUF"

_LOG = logging.getLogger(__name__)


def default_cache() -> Path:
    """Return `$HAWQKIT_CACHE`, else `~/.cache/hawqkit/models`."""
    chosen = os.environ.get("HAWQKIT_CACHE", "")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hawqkit" / "models"


def converted_gguf(path: Path, source: str, cache: Path | None = None) -> Path:
    """Return the safetensors folder of a GGUF file, converting it if it is not in the cache.

    A conversion is announced in the log, at level INFO, before it begins.

    Args:
        path: the file.
        source: as the user named it, for messages.
        cache: folder of conversions; None is `default_cache()`.

    Raises:
        InputError: the file is no GGUF, or truncated or damaged.
        Unsupported: the `gguf` package is missing, or transformers cannot read this architecture.
        HawqkitError: the cache folder cannot be written.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{source}: not a GGUF file, it does not begin with {MAGIC.decode()}.")
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    root = cache if cache is not None else default_cache()
    target = root / f"gguf-{digest}-{CONVERSION}"
    if target.is_dir():
        return target
    _check_readable(path, source)
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=root))
    except OSError as error:
        raise HawqkitError(
            f"{root}: the cache of converted models cannot be written ({error}); set HAWQKIT_CACHE "
            "to a folder that can."
        ) from None
    _LOG.info("converting %s (once; later loads take 0.1 s)", source)
    try:
        _convert(path, source, scratch)
        for made in (scratch, *scratch.iterdir()):
            share(made)
        scratch.rename(target)
    except OSError as error:
        # Another process may have put the same conversion there first.
        if not target.is_dir():
            raise HawqkitError(f"{root}: writing the converted model failed ({error}).") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _check_readable(path: Path, source: str) -> None:
    """Parse the header, and refuse a file that ends before its last tensor."""
    if importlib.util.find_spec("gguf") is None:
        raise Unsupported(
            f"{source}: reading GGUF files needs the gguf package; install it with "
            "`pip install 'hawqkit[gguf]'`."
        )
    from gguf import GGUFReader

    size = path.stat().st_size
    try:
        tensors = GGUFReader(path).tensors
        end = max((int(t.data_offset) + int(t.n_bytes) for t in tensors), default=0)
    # numpy and the reader raise any of these on a file that ends too early.
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeError) as error:
        raise InputError(
            f"{source}: the GGUF file is truncated or damaged ({size:,} bytes; {error}); "
            "get it again."
        ) from None
    if end > size:
        raise InputError(
            f"{source}: the GGUF file is truncated: it has {size:,} bytes, its tensors need "
            f"{end:,}; get it again."
        )
    if not tensors:
        raise InputError(f"{source}: the GGUF file holds no tensors (a vocabulary alone?).")


def _convert(path: Path, source: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hawqkit.models.quiet import quiet_transformers

    where: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    with quiet_transformers(), _no_bar():
        try:
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (OSError, MemoryError):
            raise
        # An unknown architecture is a ValueError, a bad vocabulary a bare Exception of tokenizers.
        except Exception as error:
            raise Unsupported(
                f"{source}: transformers cannot read this GGUF file ({error}); convert it to a "
                "safetensors folder with the tools of its family, and name that."
            ) from None
        drop_quantization_marks(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Leave out the bar of transformers that its switch for bars does not reach."""
    from transformers import modeling_gguf_pytorch_utils as reader

    names: Any = vars(reader)
    bar = names.get("tqdm")
    names["tqdm"] = lambda tensors, **_: tensors
    try:
        yield
    finally:
        names["tqdm"] = bar


def drop_quantization_marks(model: Any) -> None:
    """Make transformers see plain weights: it marks what comes from GGUF as quantized."""
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        if mark in vars(model):
            delattr(model, mark)
    if "quantization_config" in vars(model.config):
        del model.config.quantization_config
