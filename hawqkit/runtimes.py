"""Runtime profiles as data: which formats a consumer computes with, and which layers it fuses.

A profile is one entry of `RUNTIMES`. `fused` lists sets of module names that the runtime loads as
one matrix; members of a set share a format when they have the same parent module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hawqkit.errors import InputError, did_you_mean
from hawqkit.formats import GGUFS, INTEGER, NONE, format_names, parse_format
from hawqkit.formats.format import integer_name

_VLLM = (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"gate_proj", "up_proj"}))
_SYMMETRIC = ("g32", "g64", "g128", "channel")


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a consumer needs from an allocation.

    Attributes:
        name: the name in a recipe.
        fused: sets of sibling module names that are stored as one matrix.
        about: one sentence for tables.
        formats: patterns of the formats that it has kernels for, `*` stands for anything; `none` is
            run everywhere.
    """

    name: str
    fused: tuple[frozenset[str], ...]
    about: str
    formats: tuple[str, ...] = ("*",)

    def runs(self, format_name: str) -> bool:
        """Whether there is a kernel for a format.

        >>> find_runtime("vllm").runs("w8a8"), find_runtime("vllm").runs("int3-g64")
        (True, False)
        """
        form = parse_format(format_name)
        name = integer_name(form) if form.family == INTEGER and form.quantizes else form.name
        return name == NONE.name or any(fnmatchcase(name, p) for p in self.formats)

    def runnable(self, format_names: Sequence[str]) -> tuple[str, ...]:
        """Return those formats that there are kernels for, in their order."""
        return tuple(n for n in format_names if self.runs(n))


RUNTIMES: dict[str, Runtime] = {
    r.name: r
    for r in (
        Runtime("transformers", (), "every layer by itself, every format"),
        Runtime(
            "onnxruntime",
            (),
            "every layer by itself; integers of 4 and 8 bits",
            tuple(f"int{b}-*{tail}" for b in (4, 8) for tail in ("", "-a8")),
        ),
        Runtime(
            "vllm",
            _VLLM,
            "q/k/v share a format, gate/up share a format; symmetric integers of 4 and 8 bits, and "
            "w8a8",
            (*(f"int{b}-{g}" for b in (4, 8) for g in _SYMMETRIC), "int8-channel-a8"),
        ),
        Runtime(
            "vllm-cpu",
            _VLLM,
            "as vllm, without a GPU: symmetric integers of 4 bits, and w8a8",
            (*(f"int4-{g}" for g in _SYMMETRIC), "int8-channel-a8"),
        ),
        Runtime("llama.cpp", (), "every layer by itself; the types of GGUF files", tuple(GGUFS)),
        Runtime(
            "mlx",
            (),
            "every layer by itself; integers with a zero point, mxfp4, mxfp8-e4m3, nvfp4",
            (*(f"int?-{g}-asym" for g in ("g32", "g64", "g128")), "mxfp4", "mxfp8-e4m3", "nvfp4"),
        ),
        Runtime(
            "openvino",
            (),
            "every layer by itself; integers of 2, 3, 4 and 8 bits",
            tuple(f"int{b}-*" for b in (2, 3, 4, 8)),
        ),
    )
}


def find_runtime(name: str) -> Runtime:
    """Return the profile called `name`.

    Raises:
        InputError: there is none of that name.
    """
    if name not in RUNTIMES:
        raise InputError(
            f"unknown runtime {name!r}: known are {', '.join(sorted(RUNTIMES))}."
            + did_you_mean(name, sorted(RUNTIMES))
        )
    return RUNTIMES[name]


def group_key(layer: str, runtime: str) -> str:
    """Return the key that layers which must share a format in `runtime` have in common.

    >>> group_key("model.layers.3.self_attn.k_proj", "vllm")
    'model.layers.3.self_attn.k_proj+q_proj+v_proj'
    >>> group_key("model.layers.3.self_attn.k_proj", "transformers")
    'model.layers.3.self_attn.k_proj'
    """
    parent, _, leaf = layer.rpartition(".")
    for fused in find_runtime(runtime).fused:
        if leaf in fused:
            return ".".join(filter(None, [parent, "+".join(sorted(fused))]))
    return layer


def refuse_formats(runtime: str, formats: Sequence[str]) -> str | None:
    """Return what is wrong where a runtime computes with none of the formats, else None.

    >>> refuse_formats("vllm-cpu", ["int3-g64"]).partition("; ")[0]
    'runtime vllm-cpu has no kernel for int3-g64'
    """
    profile = find_runtime(runtime)
    if any(parse_format(n).quantizes and profile.runs(n) for n in formats):
        return None
    if all(not parse_format(n).quantizes for n in formats):
        return None
    known = [n for n in format_names() if n != NONE.name and profile.runs(n)]
    shown = ", ".join(known)
    asked = ", ".join(n for n in formats if n != NONE.name)
    return f"runtime {runtime} has no kernel for {asked}; it runs: {shown} and 'none'."
