"""Run folders of something else, and files in them that were damaged or edited by hand."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pico
import pytest
from command_line import SCREEN, contents, invoke, make_run, refuse, sets, succeed

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("folders")
    pico.save(home / "model")
    pico.save(home / "other", pico.llama(seed=1))
    make_run(home)
    return home


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder with a run in it, put back afterwards as it was."""
    monkeypatch.chdir(made)
    kept = contents(made / "run")
    yield made
    shutil.rmtree(made / "run")
    for name, data in kept.items():
        path = made / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


OTHERS = {
    "another model": ("model.source=other", "model: there"),
    "another text": ("calibration.seed=7", "data: there"),
    "other formats": ("formats=[int4-g32, int8-g32]", "formats: there"),
    "another seed": ("sensitivity.seed=7", "seed: there 0, now 7"),
    "other layers": ("layers.exclude=[lm_head]", "layers: there"),
    "another rounding": ("rounding=nearest", "rounding: there"),
    "another dtype": ("model.dtype=bfloat16", "dtype: there"),
}


@pytest.mark.parametrize("verb", ["run", "probe"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_folder_of_something_else_is_refused_with_what_differs(
    here: Path, what: str, verb: str
) -> None:
    override, words = OTHERS[what]
    refuse(here, verb, "r.yaml", "-o", "run", *sets(override), words=words)


@pytest.mark.parametrize(
    "verb", [["validate", "run"], ["export", "run", "--target", "compressed-tensors"]]
)
def test_a_model_that_has_changed_since_is_refused(here: Path, verb: list[str]) -> None:
    weights = here / "model" / "model.safetensors"
    before = weights.read_bytes()
    try:
        shutil.copy(here / "other" / "model.safetensors", weights)
        refuse(here, *verb, words="run the recipe again")
    finally:
        weights.write_bytes(before)


READERS = {
    "sensitivities.json": ["show", "report", "allocate", "export"],
    "allocation.json": ["show", "report", "validate", "export"],
    "frontier.json": ["report"],
    "validation.json": ["show", "report"],
    "provenance.json": ["show", "report", "run"],
}


def call(verb: str) -> list[str]:
    return {
        "export": ["export", "run", "--target", "bits"],
        "run": ["run", "r.yaml", "-o", "run"],
    }.get(verb, [verb, "run"])


@pytest.mark.parametrize(
    ("file", "verb"), [(file, verb) for file, verbs in READERS.items() for verb in verbs]
)
def test_a_newer_schema_is_refused(here: Path, file: str, verb: str) -> None:
    edit(here / "run" / file, lambda record: record.update(schema=99))
    words = f"{file}: has schema 99, but this hawqkit reads schemas up to 1"
    refuse(here, *call(verb), words=words)


def edit(path: Path, change: Edit) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


RAW = {
    "empty": "",
    "cut": '{"schema": 1, "layers": {"model',
    "not JSON": "schema = 1",
    "another value": "[1, 2]",
    "null": "null",
    "no schema": "{}",
    "nested without end": "[" * 100_000,
    "not UTF-8": "\udcff",
}


@pytest.mark.parametrize("what", RAW)
@pytest.mark.parametrize("file", READERS)
def test_a_file_that_is_no_record_is_refused_by_name(here: Path, file: str, what: str) -> None:
    (here / "run" / file).write_bytes(RAW[what].encode(errors="surrogateescape"))
    for verb in READERS[file]:
        refuse(here, *call(verb), words=f"{file}: ")


def first(record: dict[str, Any]) -> str:
    return next(iter(record["layers"]))


NONSENSE: dict[str, tuple[str, list[str], Edit]] = {
    "a layer without a format": (
        "allocation.json", ["show", "report", "export"], lambda r: r["layers"].pop(first(r))),
    "a layer that nobody has": (
        "allocation.json", ["show", "report", "export"], lambda r: r["layers"].update(x="none")),
    "a format that nobody has": (
        "allocation.json", ["show", "validate"], lambda r: r["layers"].update({first(r): "int9"})),
    "a format that was not measured": (
        "allocation.json", ["show", "export"],
        lambda r: r["layers"].update({first(r): "int2-g64"})),
    "a baseline of another model": (
        "allocation.json", ["report", "validate"], lambda r: r["baselines"][0].update(layers={})),
    "an allocation of other sensitivities": (
        "allocation.json", ["report", "validate"], lambda r: r.update(sensitivities="0" * 64)),
    "a budget that nobody knows": (
        "allocation.json", ["report", "validate"], lambda r: r.update(budgets={"bytes": -3})),
    "a text in place of a number": (
        "allocation.json", ["show"], lambda r: r["totals"].update(average_bits="few")),
    "a field of another name": (
        "allocation.json", ["show"], lambda r: r.update(budget=r.pop("budgets"))),
    "a table with a hole": (
        "sensitivities.json", ["show", "allocate"],
        lambda r: r["scores"]["trace"]["values"][2].pop()),
    "a table without its rows": (
        "sensitivities.json", ["report", "allocate"], lambda r: r.update(weight_error=[])),
    "a negative score": (
        "sensitivities.json", ["show", "allocate"],
        lambda r: r["scores"]["trace"]["stderr"][0].__setitem__(0, -1.0)),
    "a score that is no number": (
        "sensitivities.json", ["show", "allocate"],
        lambda r: r["scores"]["trace"]["values"][0].__setitem__(0, float("nan"))),
    "no scores": ("sensitivities.json", ["show", "allocate"], lambda r: r.update(scores={})),
    "a dtype that nobody has": (
        "sensitivities.json", ["report", "allocate"],
        lambda r: r["layers"][0].update(dtype="int99")),
    "a layer with no rows": (
        "sensitivities.json", ["report", "allocate"], lambda r: r["layers"][0].update(rows=-5)),
    "samples of another run": (
        "sensitivities.json", ["show", "allocate"], lambda r: r.update(fingerprint="0" * 64)),
    "nothing measured": ("validation.json", ["show", "report"], lambda r: r.update(mixes=[])),
    "a mix that was not measured": (
        "validation.json", ["show", "report"], lambda r: r["mixes"][1].update(measured={})),
}  # fmt: skip


@pytest.mark.parametrize("what", NONSENSE)
def test_a_record_edited_into_nonsense_is_refused(here: Path, what: str) -> None:
    file, verbs, change = NONSENSE[what]
    edit(here / "run" / file, change)
    for verb in verbs:
        refuse(here, *call(verb), words="run/")


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of a JSON value's parts; of a list the first two members."""
    inner = node.items() if isinstance(node, dict) else enumerate(node[:2])
    for key, value in inner:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("file", READERS)
def test_no_edit_of_a_record_ends_in_a_traceback(here: Path, file: str) -> None:
    generator = random.Random(5)
    values = [None, -1, 0, 1e300, True, "", "x", [], {}, [1], "int4-g32", 10**30]
    path = here / "run" / file
    whole = json.loads(path.read_text())
    verb = call("report" if file == "frontier.json" else "show")
    everywhere = sorted(places(whole), key=str)
    count = 5 if file == "frontier.json" else 30  # the report takes a second
    for place in generator.sample(everywhere, min(count, len(everywhere))):
        record = copy.deepcopy(whole)
        inner: Any = record
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = generator.choice(values)
        path.write_text(json.dumps(record))
        done = invoke(*verb)  # raises what is not put into words
        assert done.exit_code in (0, 2), (place, inner[place[-1]])
        assert len(done.stderr.splitlines()) <= SCREEN


def test_a_damaged_table_is_made_again_from_the_journal_by_the_same_command(here: Path) -> None:
    table = here / "run" / "sensitivities.json"
    before = table.read_bytes()
    table.write_bytes(before[: len(before) // 2])
    succeed("run", "r.yaml", "-o", "run")
    assert table.read_bytes() == before


@pytest.mark.parametrize("arguments", [["show"], ["report"], ["validate"], ["allocate"]])
def test_a_saved_recipe_that_was_damaged_is_refused(here: Path, arguments: list[str]) -> None:
    if arguments[0] in ("show", "report"):
        (here / "run" / "samples.safetensors").unlink()
        refuse(here, *arguments, "run", words="samples.safetensors: no such file")
        return
    (here / "run" / "recipe.yaml").write_text("model: {source: [")
    refuse(here, *arguments, "run", words="not YAML")
