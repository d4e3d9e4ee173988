"""Floating-point formats: a code is an entry of a small table, times the scale of its group.

    nf4-<group>  fp4-<group>          bitsandbytes' tables of 16 values, a float32 scale a group
    fp8-<element>-<channel|tensor>    elements e4m3 (largest 448) and e5m2 (57344), 16-bit scales
    mxfp4                             e2m1, groups of 32 with a power of two (OCP MX v1.0)
    mxfp6-<element>  mxfp8-<element>  e2m3 and e3m2, e4m3 and e5m2, the same scales
    nvfp4                             e2m1, groups of 16 with an e4m3 scale, times one float32

Sources: Dettmers et al. 2023 (QLoRA, nf4) and bitsandbytes' tables; Open Compute Project,
Microscaling Formats (MX) Specification v1.0; NVIDIA's description of NVFP4.
"""

from __future__ import annotations

from hawqkit.formats.format import FLOAT, Format

TABLE_GROUPS = (64, 128)


def _table(element: str, group: int) -> Format:
    return Format(f"{element}-g{group}", 4, group, family=FLOAT, element=element, scale_bits=32)


def _fp8(element: str, where: str) -> Format:
    return Format(
        f"fp8-{element}-{where}", 8, family=FLOAT, element=element, per_tensor=where == "tensor"
    )


def _mx(name: str, bits: int, element: str) -> Format:
    return Format(name, bits, 32, family=FLOAT, element=element, scale_bits=8)


FLOATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(_table(e, g) for e in ("nf4", "fp4") for g in TABLE_GROUPS),
        _mx("mxfp4", 4, "e2m1"),
        Format("nvfp4", 4, 16, family=FLOAT, element="e2m1", scale_bits=8, tensor_bits=32),
        _mx("mxfp6-e2m3", 6, "e2m3"),
        _mx("mxfp6-e3m2", 6, "e3m2"),
        _mx("mxfp8-e4m3", 8, "e4m3"),
        _mx("mxfp8-e5m2", 8, "e5m2"),
        *(_fp8(e, w) for e in ("e4m3", "e5m2") for w in ("channel", "tensor")),
    )
}
