from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hawqkit.errors import RecipeError
from hawqkit.recipe.document import (
    Document,
    apply_overrides,
    parse_path,
    read_document,
    show_path,
    write_yaml,
)


def read(folder: Path, text: str) -> Document:
    file = folder / "r.yaml"
    file.write_text(text)
    return read_document(file)


def refused(folder: Path, data: bytes) -> str:
    file = folder / "r.yaml"
    file.write_bytes(data)
    with pytest.raises(RecipeError) as caught:
        read_document(file)
    (problem,) = caught.value.problems
    return problem


def test_every_key_and_entry_knows_its_line(tmp_path: Path) -> None:
    document = read(tmp_path, "model:\n  source: x\nformats:\n- int4-g64\n- none\n")
    assert document.data == {"model": {"source": "x"}, "formats": ["int4-g64", "none"]}
    assert document.origin(("model", "source")) == "line 2"
    assert document.origin(("formats", 1)) == "line 5"
    assert document.origin(("model", "no such key")) == "line 1"


def test_what_is_not_yaml_is_refused_with_line_and_column(tmp_path: Path) -> None:
    assert refused(tmp_path, b"model: {source: x\nformats: [a]\n").startswith("line 2, column 8: ")
    assert refused(tmp_path, b"a: 1\n\tb: 2\n").startswith("line 2, column 1: not YAML")
    assert "!!python" not in refused(tmp_path, b"a: 1\n--- \nb: 2\n")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"- a\n- b\n", "not a mapping"),
        (b"just text", "not a mapping"),
        (b"model: \xff\xfe", "UTF-8"),
        (b"model: \x00", "not YAML"),
        (b"[" * 5000, "nest"),
        (b"a: &a [*a]\n", "itself"),
    ],
)
def test_what_is_no_recipe_is_refused_with_the_reason(
    tmp_path: Path, data: bytes, words: str
) -> None:
    assert words in refused(tmp_path, data)


def test_aliases_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "10000 entries" in refused(tmp_path, "\n".join(lines).encode())


def test_an_alias_repeats_what_it_names(tmp_path: Path) -> None:
    document = read(tmp_path, "a: &x {length: 3}\nb: *x\n")
    assert document.data["b"] == {"length": 3}


def test_missing_file_and_folder_are_told_apart(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "folder")):
        with pytest.raises(RecipeError, match=words):
            read_document(path)


def test_a_key_that_stands_twice_is_a_problem_and_the_first_value_stays(tmp_path: Path) -> None:
    document = read(tmp_path, "budget:\n  average_bits: 4\n  average_bits: 5\n")
    assert document.data == {"budget": {"average_bits": 4}}
    (problem,) = document.problems
    assert problem.startswith("budget.average_bits (line 2): ")
    assert "line 3" in problem


def test_python_objects_are_not_made(tmp_path: Path) -> None:
    document = read(tmp_path, "a: !!python/object/apply:os.getcwd []\nb: !thing x\n")
    assert document.data["b"] is None
    assert len(document.problems) == 1
    assert document.data["a"] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E3", 1000.0), ("-2.5e+1", -25.0), (".5e1", 5.0), ("1.5", 1.5), ("7", 7)],
)
def test_numbers_are_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert read(tmp_path, f"a: {text}").data["a"] == value
    assert yaml.safe_load("a: 1e-3") == {"a": "1e-3"}  # why it needs a resolver of its own


@pytest.mark.parametrize("text", ["1e3b", "e3", "1e", "a1e3", "1e-3-g64"])
def test_what_only_begins_like_a_number_is_text(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"a: {text}").data["a"] == text


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "Zs"))),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)  # the first example waits for the file system
@given(st.dictionaries(st.from_regex(r"[a-z_]+", fullmatch=True), PLAIN, min_size=1))
def test_what_is_written_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]
) -> None:
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(write_yaml(data), encoding="utf-8")
    document = read_document(file)
    assert document.data == data
    assert document.problems == []


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    data = {"revision": "1e3", "other": "12", "third": "true", "fourth": "null"}
    assert read(tmp_path, write_yaml(data)).data == data


@given(
    st.lists(
        st.from_regex(r"[A-Za-z0-9_-]+", fullmatch=True) | st.integers(0, 99), min_size=1
    ).filter(lambda p: isinstance(p[0], str))
)
def test_a_shown_path_is_read_back(path: list[str | int]) -> None:
    assert parse_path(show_path(tuple(path))) == tuple(path)


@pytest.mark.parametrize("text", ["", ".", "a..b", "[0]", "a[", "a[x]", "a.", "a]"])
def test_what_is_no_path_is_none(text: str) -> None:
    assert parse_path(text) is None


def test_overrides_change_add_and_clear() -> None:
    document = Document(
        "r", {"budget": {"size": 3}, "formats": ["a", "b"]}, {("formats",): "line 4"}
    )
    apply_overrides(
        document,
        [
            "budget.size=",
            "budget.average_bits=4.5",
            "formats[1]=c",
            "held_out.split='12'",
            "x={y: 1}",
        ],
    )
    assert document.problems == []
    assert document.data == {
        "budget": {"size": None, "average_bits": 4.5},
        "formats": ["a", "c"],
        "held_out": {"split": "12"},
        "x": {"y": 1},
    }
    assert document.origin(("formats", 1)) == "--set"
    assert document.origin(("formats", 0)) == "line 4"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget"], "PATH=VALUE"),
        (["=3"], "PATH=VALUE"),
        (["a.b=[1"], "not YAML"),
        (["a.b={c: 1, c: 2}"], "stands again"),
        (["formats[7]=x"], "formats has 1 entries"),
        (["budget[0]=x"], "budget is not a list"),
        (["formats.x=1"], "formats is not a mapping"),
        (["budget.size=1", "budget.size=2"], "contradict"),
    ],
)
def test_an_override_that_cannot_be_applied_is_a_problem(overrides: list[str], words: str) -> None:
    document = Document("r", {"budget": {}, "formats": ["int4-g64"]})
    apply_overrides(document, overrides)
    (problem,) = document.problems
    assert words in problem
    assert problem.startswith("--set ")


def test_the_same_override_twice_is_fine() -> None:
    document = Document("r", {})
    apply_overrides(document, ["a=1", "a=1"])
    assert (document.data, document.problems) == ({"a": 1}, [])
