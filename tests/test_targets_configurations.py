"""What holds for every target that writes a configuration and a script, and no weights."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from configuration_cases import allocation, model

from hawqkit.errors import InputError, Unsupported
from hawqkit.formats import parse_format
from hawqkit.targets import TARGETS, Target, configuration, find_target, matching
from hawqkit.targets.configuration import MARK, NOTE, SCRIPT
from hawqkit.targets.matching import verify

SCRIPTS = Path(configuration.__file__).parent / "scripts"
SCRIPTED = [name for name in TARGETS if (SCRIPTS / f"{name.replace('-', '_')}.py").is_file()]
# llama-quantize knows tensors by names of its own: its layers cannot be called as these tests call
# them, see test_targets_llama_quantize.py.
CONFIGURATIONS = [name for name in SCRIPTED if name != "llama-quantize"]
HOSTILE = (
    "a.*b", "a.xxb",  # the first, unquoted, matches the second
    "model.layers.1", "model.layers.11",  # a prefix
    "x[0]", "x0", "q?", "qq",  # globs
    "w^$|(?:", "back\\slash\\d", "tab\tnew\nline", "quote'\"`", "{brace}%s", "#hash: - yaml",
    "ünïcode.層.🦅", "a/../../b", "..", "/etc/passwd", "re:x", "+:y", "-:z", "null", "1.5", " in ",
)  # fmt: skip


def formats_of(target: Target) -> list[str]:
    """Return formats of weights that fit the layers of these tests, at most three."""
    names = [n for n in target.capabilities().formats() if n != "none"]
    fitting = [n for n in names if parse_format(n).fits(128)]
    return fitting[:: max(1, len(fitting) // 3)][: 3 if target.capabilities().mixed else 1]


def mix_of(target: Target, names: tuple[str, ...]) -> dict[str, str]:
    choices = [*formats_of(target), "none"]
    return {name: choices[i % len(choices)] for i, name in enumerate(names)}


def test_the_table_holds_targets_with_a_script() -> None:
    assert {"llm-compressor", "auto-round", "gptqmodel", "modelopt", "neural-compressor"} <= set(
        CONFIGURATIONS
    )
    assert {p.stem for p in SCRIPTS.glob("*.py")} - {"__init__"} == {
        name.replace("-", "_") for name in SCRIPTED
    }


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_any_name_is_quoted_or_refused_and_nothing_lies_outside_of_the_folder(
    name: str, tmp_path: Path
) -> None:
    target = find_target(name)
    written = 0
    for hostile in (HOSTILE, *((one, "plain.proj") for one in HOSTILE)):
        layers, facts = model(hostile)
        mix = mix_of(target, hostile)
        folder = tmp_path / "inner" / "out"
        before = {p.name: p.read_bytes() for p in folder.glob("*")}
        try:
            files = target.write_from_facts(allocation(mix), folder, layers, facts)
        except Unsupported:
            assert {p.name: p.read_bytes() for p in folder.glob("*")} == before
            continue
        written += 1
        assert {p.parent for p in files} == {folder}
        assert sorted(files) == sorted(folder.iterdir())
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        assert {n: entry["format"] for n, entry in mark["layers"].items()} == mix
        for path in files:
            read(path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ["inner", "out"]
    assert written > len(HOSTILE) // 2


def read(path: Path) -> None:
    """Parse a file by its ending; raises if it is broken."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        json.loads(text)
    elif path.suffix in (".yaml", ".yml"):
        yaml.safe_load(text)
    elif path.suffix == ".py":
        ast.parse(text)
    else:
        assert path.suffix in (".md", ".txt"), path


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_unknown_layers_and_formats_are_refused_all_at_once(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    layers, facts = model(("a.up", "b.up"))
    mix = {"a.up": "int99-g7", "c.up": "none", "b.up": "none", "..": "nothing"}
    with pytest.raises(Unsupported, match=r"(?s)3 problems") as caught:
        target.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    for word in ("'a.up'", "int99-g7", "'c.up'", "'..'"):
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_the_target_cannot_hold_is_refused_with_what_would_fit(name: str) -> None:
    target = find_target(name)
    can = target.capabilities()
    layers, facts = model(("a.up",))
    for format_name in ("q4_k", "int2-g32-asym", "nf4-g64", "int4-g64", "int4-channel-a4"):
        found = target.problems({"a.up": format_name}, layers, facts)
        held = can.hold(parse_format(format_name)) and parse_format(format_name).fits(128)
        assert bool(found) == (not held), format_name
        if found and parse_format(format_name).fits(128):
            assert "'a.up'" in found[0]
            assert f"fit: {can_fit(target)}" in found[0] or "these fit: " in found[0]
    other = [replace(layers[0], kind=kind) for kind in ("embedding", "convolution")]
    chosen = formats_of(target)[0]
    for layer in other:
        found = target.problems({"a.up": chosen}, [layer], facts)
        assert bool(found) == (layer.kind not in can.kinds)
    assert target.problems({"a.up": chosen}, layers, replace(facts, config={}))


def can_fit(target: Target) -> str:
    return formats_of(target)[0]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_layers_that_the_runtime_of_the_allocation_fuses_must_share(
    name: str, tmp_path: Path
) -> None:
    target = find_target(name)
    layers, facts = model(("m.0.gate_proj", "m.0.up_proj"))
    chosen = formats_of(target)[0]
    mixed = {"m.0.gate_proj": chosen, "m.0.up_proj": "none"}
    with pytest.raises(Unsupported, match=r"one matrix in runtime 'vllm'"):
        target.write_from_facts(allocation(mixed, "vllm"), tmp_path / "out", layers, facts)
    assert list(tmp_path.iterdir()) == []
    same = dict.fromkeys(mixed, chosen)
    assert target.write_from_facts(allocation(same, "vllm"), tmp_path / "out", layers, facts)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_an_interrupted_export_leaves_nothing_or_the_earlier_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = find_target(name)
    layers, facts = model(("a.up", "a.down"))
    mix = mix_of(target, ("a.up", "a.down"))
    plain = Path.write_text
    for count in range(4):
        left = [count]

        def failing(path: Path, *args: object, left: list[int] = left, **options: object) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return plain(path, *args, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", failing)
            with pytest.raises(KeyboardInterrupt):
                target.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
        assert list(tmp_path.iterdir()) == []
    target.write_from_facts(allocation(mix), tmp_path / "out", layers, facts)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert len(before) >= 4
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            target.write_from_facts(allocation({}), tmp_path / "out", layers, facts)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_only_an_own_export_is_replaced(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    layers, facts = model(("a.up",))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not replaced"):
        target.write_from_facts(allocation({}), tmp_path / "out", layers, facts)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_script_needs_no_hawqkit_and_says_how_it_is_used(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    layers, facts = model(("a.up",))
    target.write_from_facts(allocation({}), tmp_path / "out", layers, facts)
    text = (tmp_path / "out" / SCRIPT).read_text(encoding="utf-8")
    imported = [
        n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    assert not [m for m in imported if (m or "").startswith("hawqkit")]
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "out" / SCRIPT), "--help"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert "usage: apply.py" in done.stdout


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_note_says_for_which_rounding_the_prediction_holds(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    layers, facts = model(("a.up",))
    target.write_from_facts(allocation({}), tmp_path / "out", layers, facts)
    note = (tmp_path / "out" / NOTE).read_text(encoding="utf-8")
    assert "`nearest`" in note
    assert "python apply.py" in note
    for sized in (target.size, target.size_table):
        with pytest.raises(Unsupported, match="no size"):
            sized({}, layers, facts)  # type: ignore[operator]


NAIVE = {
    "first_prefix": (matching.first_prefix, "model.layers.1", "model.layers.11"),
    "first_search": (matching.first_search, "layers.1", "model.layers.1"),
    "last_glob": (matching.last_glob, "x[0]", "x0"),
}


@pytest.mark.parametrize("rule", NAIVE)
def test_verify_refuses_the_naive_pattern(rule: str) -> None:
    decide, naive, other = NAIVE[rule]
    wanted = {naive: {"bits": 4}}
    with pytest.raises(Unsupported, match="would get"):
        verify("test", [(naive, {"bits": 4})], decide, [naive, other], wanted)
    quoted = (
        matching.quoted_glob(naive) if rule == "last_glob"
        else matching.quoted_regex(naive)
    )  # fmt: skip
    verify("test", [(quoted, {"bits": 4})], decide, [naive, other], wanted)


def test_verify_refuses_a_module_that_is_not_named_and_one_that_should_not_be() -> None:
    verify("test", [("a", 4)], matching.exact, ["a", "b"], {"a": 4})
    with pytest.raises(Unsupported, match="'b'"):
        verify("test", [("a", 4)], matching.exact, ["a", "b"], {"a": 4, "b": 4})
    with pytest.raises(Unsupported, match="'a'"):
        verify("test", [("a", 4)], matching.exact, ["a", "b"], {})


def test_file_names_are_plain(tmp_path: Path) -> None:
    for name in ("../x", "a/b", "", ".hidden"):
        with pytest.raises(Exception, match="not plain"):
            configuration.write_configuration(tmp_path / "o", {name: ""}, lambda _: True)
    assert list(tmp_path.iterdir()) == []
