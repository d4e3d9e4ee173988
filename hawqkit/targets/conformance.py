"""What every target has to do, as checks that the tests of any package can call; no pytest needed.

    @pytest.mark.parametrize("check", checks_of(my_target), ids=lambda check: check.__name__)
    def test_conformance(check, tmp_path):
        check(my_target, tmp_path)

A check raises AssertionError with what was expected. Those of a target without sizes export into
the empty folder that they are given. A target that writes weights needs a model of its author's
for that: `check_sizes` compares its bytes with what it predicted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from hawqkit.errors import HawqkitError, InputError, Unsupported
from hawqkit.formats import parse_format
from hawqkit.records import Allocation, Certificate, Layer, ModelFacts, Tensor, Totals
from hawqkit.targets.contract import Target
from hawqkit.targets.plugins import contract_problems

if TYPE_CHECKING:
    from hawqkit.models.model import LoadedModel

Check = Callable[[Target, Path], None]

WIDTH = 256  # rows and columns of the layers: every group and block divides them
PLAIN = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
HOSTILE = (
    "a.*b", "a.xxb",  # the first, unquoted, matches the second
    "model.layers.1", "model.layers.11",  # a prefix
    "x[0]", "x0", "q?", "qq",  # globs
    "w^$|(?:", "back\\slash\\d", "tab\tnew\nline", "quote'\"`", "{brace}%s", "#hash: - yaml",
    "ünïcode.層.🦅", "a/../../b", "..", "/etc/passwd", "re:x", "+:y", "-:z", "null", "1.5", " in ",
)  # fmt: skip


def checks_of(target: Target) -> tuple[Check, ...]:
    """Return the checks that a target of its kind has to pass."""
    every = (
        has_the_names_of_the_contract, refuses_what_is_no_layer_or_format_at_once,
        refuses_what_it_does_not_claim,
    )  # fmt: skip
    if target.SIZED:
        return (*every, writes_no_weights_without_a_model)
    return (
        *every, has_no_size, quotes_or_refuses_any_name_of_a_layer, replaces_its_own_export_alone,
        leaves_nothing_or_the_earlier_export_when_it_is_interrupted,
    )  # fmt: skip


def example_model(names: tuple[str, ...] = PLAIN) -> tuple[list[Layer], ModelFacts]:
    """Return linear layers (256, 256) of a Llama without biases, and its facts."""
    layers = [Layer(name, "linear", WIDTH, WIDTH, "bfloat16") for name in names]
    tensors = tuple(Tensor(f"{n}.weight", "bfloat16", (WIDTH, WIDTH)) for n in names)
    facts = ModelFacts(
        "model\n`name`", "hash", "LlamaForCausalLM", WIDTH * WIDTH * len(names), "bfloat16",
        tensors=tensors, config={"model_type": "llama", "num_hidden_layers": 1},
    )  # fmt: skip
    return layers, facts


def example_allocation(mix: Mapping[str, str], runtime: str = "transformers") -> Allocation:
    """Return an allocation of a mix, made for a runtime."""
    proof = Certificate("conformance", "optimal", 0.0, 0.0, 0.0, 2, 4)
    return Allocation(
        dict(mix), {"average_bits": 4.0}, Totals(4.0, 4.25), runtime, "trace", 0.0, 0.5, proof,
        rounding="nearest",
    )  # fmt: skip


def example_mix(target: Target, names: tuple[str, ...] = PLAIN) -> dict[str, str]:
    """Return a mix of formats that a target claims, in turn with `none`."""
    can = target.capabilities()
    layers, facts = example_model()
    formats = [
        name
        for name in can.formats()
        if name != "none" and not target.problems({layers[0].name: name}, layers, facts)
    ]
    few = formats[:: max(1, len(formats) // 3)][: 3 if can.mixed else 1]
    choices = [*few, "none"]
    return {name: choices[i % len(choices)] for i, name in enumerate(names)}


def has_the_names_of_the_contract(target: Target, folder: Path) -> None:
    """Hold the module to `contract.Target`."""
    _expect(not contract_problems(target), f"the contract: {contract_problems(target)}")
    found = [name for name in target.capabilities().formats() if name != "none"]
    _expect(bool(found), "at least one format beside 'none' in capabilities()")


def refuses_what_is_no_layer_or_format_at_once(target: Target, folder: Path) -> None:
    """Ask for two unknown layers and an unknown format: all three are named."""
    layers, facts = example_model()
    wrong = {PLAIN[0]: "int99-g7", "no.such.layer": "none", "..": "nothing"}
    found = "\n".join(target.problems(wrong, layers, facts))
    for word in (PLAIN[0], "int99-g7", "no.such.layer", "'..'"):
        _expect(word in found, f"{word} among the problems, which are {found!r}")
    with _refusal(Unsupported):
        target.write_from_facts(example_allocation(wrong), folder / "out", layers, facts)
    _expect(not list(folder.iterdir()), "nothing written for a mix that is refused")


def refuses_what_it_does_not_claim(target: Target, folder: Path) -> None:
    """Compare `problems` with `capabilities`, format by format and kind by kind.

    What is claimed may be refused for a layer's sake, but not every format of it.
    """
    can = target.capabilities()
    layers, facts = example_model()
    name = layers[0].name
    asked = ("int2-g32-asym", "int3-g128", "int4-g64", "int8-channel", "nf4-g64", "mxfp4", "q4_k",
             "fp8-e4m3-tensor", "int4-channel-a4", *can.formats())  # fmt: skip
    for format_name in asked:
        found = target.problems({name: format_name}, layers, facts)
        held = can.hold(parse_format(format_name))
        _expect(bool(found) or held, f"a problem with {format_name}, which is not claimed")
        _expect(all(name in problem for problem in found), f"the layer in each of {found}")
    claimed = [name for name in can.formats() if name != "none"]
    taken = [f for f in claimed if not target.problems({name: f}, layers, facts)]
    _expect(bool(taken), "a claimed format that a plain linear layer can have")
    for kind in ("embedding", "convolution", "transposed-convolution", "conv1d"):
        if kind not in can.kinds:
            other = [replace(layers[0], kind=kind), *layers[1:]]
            _expect(bool(target.problems({name: taken[0]}, other, facts)), f"kind {kind} refused")


def writes_no_weights_without_a_model(target: Target, folder: Path) -> None:
    """Ask a target that writes weights for an export from records alone."""
    layers, facts = example_model()
    with _refusal(Unsupported):
        target.write_from_facts(example_allocation({}), folder / "out", layers, facts)
    _expect(not list(folder.iterdir()), "nothing written without a model")


def has_no_size(target: Target, folder: Path) -> None:
    """Ask a target that writes no weights for bytes."""
    layers, facts = example_model()
    with _refusal(Unsupported):
        target.size({}, layers, facts)
    with _refusal(Unsupported):
        target.size_table(layers, ["int4-g64"], facts)


def quotes_or_refuses_any_name_of_a_layer(target: Target, folder: Path) -> None:
    """Export layers with names that mean something to a pattern, a path or a file format."""
    place = folder / "inner" / "out"
    for names in (HOSTILE, *((one, "plain.proj") for one in HOSTILE)):
        layers, facts = example_model(names)
        before = _contents(place)
        mix = example_mix(target, names)
        try:
            files = target.write_from_facts(example_allocation(mix), place, layers, facts)
        except Unsupported:
            _expect(_contents(place) == before, f"nothing changed where {names} are refused")
            continue
        _expect(sorted(files) == sorted(place.iterdir()), f"exactly the returned files for {names}")
    outside = [p for p in folder.rglob("*") if p.is_dir() and p not in (place, place.parent)]
    _expect(not outside, f"no folder but the export, and there are {outside}")
    _expect(not place.exists() or len(_contents(folder)) == len(_contents(place)), "no other file")


def replaces_its_own_export_alone(target: Target, folder: Path) -> None:
    """Export onto an earlier export, and onto a folder of somebody else's."""
    layers, facts = example_model()
    mix = example_mix(target)
    for _ in range(2):
        target.write_from_facts(example_allocation(mix), folder / "out", layers, facts)
    other = folder / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work", encoding="utf-8")
    with _refusal(InputError):
        target.write_from_facts(example_allocation(mix), other, layers, facts)
    _expect([p.name for p in other.iterdir()] == ["thesis.tex"], "a folder of another kept")


def leaves_nothing_or_the_earlier_export_when_it_is_interrupted(
    target: Target, folder: Path
) -> None:
    """Interrupt an export at each file that it opens for writing."""
    layers, facts = example_model()
    first, second = example_allocation(example_mix(target)), example_allocation({})
    place = folder / "out"
    for allocation in (first, second):
        before = _contents(folder)
        for count in range(100):
            try:
                with _interrupted_at(count):
                    target.write_from_facts(allocation, place, layers, facts)
            except KeyboardInterrupt:
                _expect(_contents(folder) == before, f"nothing changed by interruption {count}")
                continue
            _expect(count > 0, "files written by way of open(), so that it can be interrupted")
            break


def check_sizes(
    target: Target, mix: Mapping[str, str], model: LoadedModel, folder: Path
) -> list[Path]:
    """Hold the bytes of an export to `size`, and `size_table` to be near; return the files.

    Args:
        target: one that has sizes.
        mix: layer name -> format, of a model that it can hold.
        model: where its facts hold the layout, if the target measures one.
        folder: to export to.

    Raises:
        AssertionError: the files have other bytes than predicted.
    """
    formats = sorted({*mix.values(), "none"})
    costs, fixed = target.size_table(model.layers, formats, model.facts)
    files = target.write(example_allocation(mix), folder, model)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    size = target.size(mix, model.layers, model.facts)
    _expect(written == size, f"{size} bytes as predicted, and {written} are written")
    column = {name: i for i, name in enumerate(formats)}
    summed = fixed + sum(
        int(costs[row][column[mix.get(layer.name, "none")]])
        for row, layer in enumerate(model.layers)
    )
    # headers do not add up: some hundred bytes for each layer
    _expect(abs(summed - size) <= 512 * (len(model.layers) + 8), f"a table near {size}: {summed}")
    return files


def _expect(holds: bool, what: str) -> None:
    if not holds:  # an assert statement is left out under `python -O`
        raise AssertionError(f"expected {what}")


@contextmanager
def _refusal(*kinds: type[HawqkitError]) -> Iterator[None]:
    try:
        yield
    except kinds:
        return
    raise AssertionError(f"expected {' or '.join(kind.__name__ for kind in kinds)}")


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@contextmanager
def _interrupted_at(count: int) -> Iterator[None]:
    """Raise KeyboardInterrupt where a file is opened for writing, after `count` others were."""
    left = [count]
    plain = io.open

    def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if set(mode) & set("wxa+"):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        return plain(file, mode, *args, **options)

    with patch("io.open", opened), patch("builtins.open", opened):
        yield
