"""Mixes in the `config.json` of quantized checkpoints, by each consumer's own rule.

    compressed-tensors   exact names before `re:` patterns before class names; `ignore` wins
    gptq                 `dynamic`: re.match, the first pattern wins, `-:` keeps; else the defaults
    auto-round           `extra_config`: exact names, then patterns; else the defaults
    awq                  one format; `modules_to_not_convert` and the head stay
    bitsandbytes         one format; `llm_int8_skip_modules` stay, or the head without such a list
    mlx                  `quantization`: exact names, false keeps; else the defaults, where the
                         checkpoint has scales for the module

Names in the lists of awq and bitsandbytes are patterns from the start of a name to a boundary, or
the name's end. Sources: compressed-tensors 0.20.0 (`match_targets`), AutoRound 0.16.1
(`inference.convert_model`), GPTQModel 7.6.0 (`dynamic_get`), transformers 5.23
(`should_convert_module`), mlx-lm 0.32.2 (`load_model`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hawqkit.records import Layer
from hawqkit.targets.foreign.contract import Collected, ForeignMix, described, integer_format

HEAD = "lm_head"
CLASSES = {"linear": "Linear", "conv1d": "Conv1D", "embedding": "Embedding"}
MLX_FLOATS = {"mxfp4": "mxfp4", "nvfp4": "nvfp4", "mxfp8": "mxfp8-e4m3"}
Config = Mapping[str, Any]


def read_compressed_tensors(config: Config, layers: Sequence[Layer]) -> ForeignMix:
    """Read `config_groups` and `ignore`."""
    groups = list((config.get("config_groups") or {}).values())
    targets = {t: group for group in reversed(groups) for t in group.get("targets") or ()}
    ignored = list(config.get("ignore") or ())
    found = Collected()
    for layer in layers:
        names = (layer.name, *layer.tied)
        if any(_matched(n, layer, [t]) for n in names for t in ignored):
            found.keep(layer)
            continue
        target = _matched(layer.name, layer, sorted(targets, key=lambda t: ("re:" in t, t)))
        if target is None:
            found.keep(layer)
        else:
            found.give(layer, *_scheme(targets[target], layer))
    return found.mix("compressed-tensors")


def _matched(name: str, layer: Layer, targets: Sequence[str]) -> str | None:
    """Return the first target that matches a module, names before classes."""
    for target in targets:
        pattern = target.removeprefix("re:")
        if target == name or (target.startswith("re:") and re.match(pattern, name)):
            return target
    return next((t for t in targets if t == CLASSES.get(layer.kind)), None)


def _scheme(group: Config, layer: Layer) -> tuple[str | None, str]:
    """Return the name of a group's format, or None, and what it is."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    strategy, size = weights.get("strategy"), weights.get("group_size")
    text = described({k: weights.get(k) for k in ("num_bits", "type", "strategy", "group_size")})
    if inputs:
        text += f", inputs of {inputs.get('num_bits')} bits ({inputs.get('type', 'int')})"
    if kind == "float":
        return (None if inputs else _float_scheme(bits, strategy, size)), text
    if strategy not in ("group", "channel") or (inputs and inputs.get("type", "int") != "int"):
        return None, text
    name = integer_format(
        bits,
        size if strategy == "group" else None,
        symmetric=bool(weights.get("symmetric", True)),
        columns=layer.columns,
        acts=inputs.get("num_bits") if inputs else None,
    )
    return name, text


def _float_scheme(bits: Any, strategy: Any, size: Any) -> str | None:
    if bits == 8 and strategy in ("channel", "tensor"):
        return f"fp8-e4m3-{strategy}"
    if bits == 8 and size == 32:
        return "mxfp8-e4m3"
    return (
        {("tensor_group", 16): "nvfp4", ("group", 32): "mxfp4"}.get((strategy, size))
        if (bits == 4)
        else None
    )


def read_gptq(config: Config, layers: Sequence[Layer]) -> ForeignMix:
    """Read `bits`, `group_size`, `sym` and the patterns of `dynamic`."""
    dynamic = config.get("dynamic") or {}
    found = Collected()
    for layer in layers:
        own: Config | None = {}
        for pattern, settings in dynamic.items():
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), layer.name):
                own = None if pattern.startswith("-:") else settings
                break
        if own is None or _stays(layer, config):
            found.keep(layer)
        else:
            found.give(layer, *_integers({**config, **own}, layer))
    return found.mix("gptq", _order_notes(config))


def _order_notes(config: Config) -> list[str]:
    if not config.get("desc_act"):
        return []
    return ["desc_act: columns were rounded in another order; the format is the same"]


def _stays(layer: Layer, config: Config) -> bool:
    """Whether a quantizer of linear layers leaves a layer alone unless it is told otherwise."""
    return layer.kind != "linear" or (layer.name == HEAD and not config.get(HEAD))


def _integers(settings: Config, layer: Layer) -> tuple[str | None, str]:
    bits, size = settings.get("bits"), settings.get("group_size")
    symmetric = bool(settings.get("sym", True))
    kind = settings.get("data_type", "int")
    text = described({"bits": bits, "group_size": size, "sym": symmetric, "data_type": kind})
    if kind != "int":
        return {"nv_fp": "nvfp4", "mx_fp": "mxfp4"}.get(str(kind)) if bits == 4 else None, text
    return integer_format(bits, size, symmetric=symmetric, columns=layer.columns), text


def read_auto_round(config: Config, layers: Sequence[Layer]) -> ForeignMix:
    """Read the defaults and `extra_config`; 16 bits or more keep a layer."""
    extra = config.get("extra_config") or {}
    found = Collected()
    for layer in layers:
        own = extra.get(layer.name)
        if own is None:
            own = next((s for p, s in extra.items() if _is_pattern(p, layer.name)), None)
        settings = {**config, **(own or {})}
        wide = isinstance(settings.get("bits"), int) and settings["bits"] >= 16
        if wide or (own is None and _stays(layer, config)):
            found.keep(layer)
        else:
            found.give(layer, *_integers(settings, layer))
    return found.mix("auto-round")


def _is_pattern(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def read_awq(config: Config, layers: Sequence[Layer]) -> ForeignMix:
    """Read the one format, and which modules stay."""
    kept = config.get("modules_to_not_convert") or ()
    found = Collected()
    for layer in layers:
        if _stays(layer, config) or skipped(layer.name, kept):
            found.keep(layer)
            continue
        bits = config.get("bits", config.get("w_bit"))
        size = config.get("group_size", config.get("q_group_size"))
        zero = bool(config.get("zero_point", True))
        name = integer_format(bits, size, symmetric=not zero, columns=layer.columns)
        found.give(layer, name, described({"bits": bits, "group_size": size, "zero_point": zero}))
    return found.mix("awq", ["AWQ scales columns before it rounds; the format is the same"])


def read_bitsandbytes(config: Config, layers: Sequence[Layer]) -> ForeignMix:
    """Read which of the two widths it is, and which modules stay."""
    listed = config.get("llm_int8_skip_modules")
    kept = [HEAD] if listed is None else listed
    name = f"{config.get('bnb_4bit_quant_type', 'fp4')}-g64"
    wide = not config.get("load_in_4bit", config.get("_load_in_4bit"))
    found = Collected()
    for layer in layers:
        if layer.kind != "linear" or skipped(layer.name, kept):
            found.keep(layer)
        elif wide:
            found.give(layer, "int8-channel", "LLM.int8()")
        else:
            found.give(layer, name, name)
    notes = ["LLM.int8() keeps outliers of inputs in 16 bits; the weights are int8-channel"]
    nested = ["scales are quantized too (double quantization); hawqkit keeps them in float32"]
    if wide:
        return found.mix("bitsandbytes", notes)
    return found.mix("bitsandbytes", nested if config.get("bnb_4bit_use_double_quant") else ())


def skipped(name: str, patterns: Sequence[str]) -> bool:
    """Whether transformers leaves a module alone.

    >>> skipped("model.layers.11.mlp", ["layers.1"]), skipped("model.layers.1.up", ["up"])
    (False, True)
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(rf"(?:{p}){boundary}", name) or name.endswith(p) for p in patterns)


def read_mlx(
    config: Config, layers: Sequence[Layer], stored: frozenset[str] = frozenset()
) -> ForeignMix:
    """Read the defaults and those of single modules; embeddings are quantized too.

    Args:
        config: the part `quantization`.
        layers: of the model.
        stored: names of the checkpoint's tensors: a module without `scales` stays. Empty where
            only the configuration is there.
    """
    found = Collected()
    for layer in layers:
        own = config.get(layer.name)
        if own is None:
            own = next((config[n] for n in layer.tied if n in config), None)
        bare = stored and own is None and f"{layer.name}.scales" not in stored
        if own is False or bare or layer.kind not in ("linear", "embedding"):
            found.keep(layer)
            continue
        base = {key: config.get(key) for key in ("bits", "group_size", "mode")}
        settings = {**base, **(own if isinstance(own, Mapping) else {})}
        mode = settings.get("mode") or "affine"
        bits, size = settings.get("bits"), settings.get("group_size")
        name = MLX_FLOATS.get(mode)
        if mode == "affine":
            name = integer_format(bits, size, symmetric=False, columns=layer.columns)
        found.give(layer, name, described({"bits": bits, "group_size": size, "mode": mode}))
    if stored:
        return found.mix("mlx")
    alone = "of the configuration alone: modules that it does not name are taken as quantized"
    return found.mix("mlx", [alone])
