"""`hawqkit allocate TABLE.csv` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import refuse, succeed

HEAVY = {"torch", "transformers", "accelerate", "datasets"}
TABLE = """\
layer,format,score,bytes,bops,latency_ms,group
conv1,int4,0.31,1152,1806336,0.21094404,
conv1,int8,0.02,2304,7225344,0.36189111,
conv2,int4,0.07,1152,1806336,0.21092674,pair
conv2,int8,0.01,2304,7225344,0.36211718,pair
shortcut,int4,0.2,512,100352,0.02532183,pair
shortcut,int8,0.03,1024,401408,0.0334169,pair
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "table.csv").write_text(TABLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_documented_command_writes_layers_proof_budgets_and_frontier(here: Path) -> None:
    done = succeed(
        "allocate", "table.csv", "--budget", "bytes=4.5e3", "--budget", "latency_ms=0.65",
        "-o", "out/allocation.json",
    )  # fmt: skip
    record = json.loads((here / "out" / "allocation.json").read_text())
    assert record["layers"] == {"conv1": "int8", "conv2": "int4", "shortcut": "int4"}
    assert record["budgets"] == {"bytes": 4500.0, "latency_ms": 0.65}
    assert record["objective"] == pytest.approx(0.29)
    proof = record["certificate"]
    assert proof["bound"] <= record["objective"]
    assert proof["relative_gap"] <= 1e-9
    taken = record["taken"]
    assert taken["bytes"] == {"limit": 4500.0, "taken": 3968.0, "least": 2816.0, "most": 5632.0}
    assert taken["latency_ms"]["taken"] == pytest.approx(0.36189111 + 0.21092674 + 0.02532183)
    assert taken["bops"]["limit"] is None
    frontier = record["frontier"]
    assert frontier["budget"] == "bytes"
    assert [p["taken"] for p in frontier["points"]] == [2816.0, 3968.0, 5632.0]
    assert frontier["chosen"]["score"] == pytest.approx(0.29)
    assert record["groups"] == {"pair": ["conv2", "shortcut"]}
    for words in ("shortcut", "latency_ms", "88.2 %", "proven not below 0.29", "out/allocation"):
        assert words in done.output


def test_without_an_output_nothing_is_written(here: Path) -> None:
    done = succeed("allocate", "table.csv", "--budget", "latency=700us")
    assert "written nowhere" in done.output
    assert [p.name for p in here.iterdir()] == ["table.csv"]


def test_it_imports_no_torch(here: Path) -> None:
    program = (
        "import sys\nfrom hawqkit.cli import cli\n"
        "cli(['allocate', 'table.csv', '--budget', 'bytes=1e4', '-o', 'a.json'],"
        " standalone_mode=False)\n"
        f"assert not {HEAVY!r} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
    assert set(json.loads((here / "a.json").read_text())["layers"].values()) == {"int8"}


def test_refusals_say_what_to_do_and_write_nothing(here: Path) -> None:
    run = ("allocate", "table.csv", "-o", "a.json", "--budget")
    message = refuse(here, *run, "bytes=2815", words="at least 2,816 bytes")
    assert "at most 5,632 bytes" in message
    refuse(here, *run, "byts=1e4", words="Did you mean 'bytes'?")
    refuse(here, *run, "bytes=lots", words="whole bytes, or a number and one of")
    refuse(here, *run, "bytes=-1", words="above 0")
    refuse(here, *run, "bytes=nan", words="above 0")
    refuse(here, "allocate", "table.csv", words="at least one of the columns bytes, bops")
    both = refuse(
        here, *run, "bytes=3300", "--budget", "latency_ms=0.5", "--budget", "bops=2e6",
        words="bops = 2,000,000 BOPs cannot be met",
    )  # fmt: skip
    assert "Traceback" not in both


def test_budgets_that_exclude_each_other_are_both_named(here: Path) -> None:
    rows = ["layer,format,score,bytes,latency_ms", "a,x,1,10,2", "a,y,1,20,1", "b,x,1,10,2"]
    (here / "odd.csv").write_text("\n".join([*rows, "b,y,1,20,1"]) + "\n")
    message = refuse(
        here, "allocate", "odd.csv", "--budget", "bytes=20", "--budget", "latency_ms=2.5",
        words="bytes = 20 bytes and latency_ms = 2.5 ms contradict each other",
    )  # fmt: skip
    assert "the smallest latency_ms is 4 ms" in message
    assert "the smallest bytes is 40 bytes" in message


def test_a_broken_table_is_told_within_a_screen(here: Path) -> None:
    rows = "".join(f"l{i},int4,no,\n" for i in range(60))
    (here / "bad.csv").write_text("layer,format,score,bytes\n" + rows)
    message = refuse(
        here, "allocate", "bad.csv", "--budget", "bytes=9", words="bad.csv: 61 problems"
    )
    assert "lines 2-61: bytes is empty" in message
    assert "and 43 more" in message


@pytest.mark.parametrize(
    "option",
    [("--runtime", "vllm"), ("--score", "token"), ("--risk", "1"), ("--max-predicted-kl", "0.1"),
     ("--latency-table", "table.csv")],
)  # fmt: skip
def test_what_only_a_run_has_is_not_ignored(here: Path, option: tuple[str, str]) -> None:
    from command_line import invoke

    done = invoke("allocate", "table.csv", "--budget", "bytes=1e4", *option)
    assert done.exit_code == 2
    assert f"{option[0]}: only for a run folder" in done.stderr


def test_a_place_that_cannot_be_written_is_told(here: Path) -> None:
    refuse(
        here, "allocate", "table.csv", "--budget", "bytes=1e4", "-o", "table.csv/a.json",
        words="a file of this name is in the way", code=1,
    )  # fmt: skip


def test_an_old_result_stays_whole_until_the_new_one_is(here: Path) -> None:
    (here / "a.json").write_text("old")
    run = ("allocate", "table.csv", "-o", "a.json", "--budget")
    refuse(here, *run, "bytes=1", words="cannot be met")
    assert (here / "a.json").read_text() == "old"
    succeed(*run, "bytes=1e4")
    assert json.loads((here / "a.json").read_text())["layers"]["conv1"] == "int8"
    assert sorted(p.name for p in here.iterdir()) == ["a.json", "table.csv"]


def test_a_long_table_shows_both_ends(here: Path) -> None:
    rows = "".join(f"layer{i},int4,0.1,1\nlayer{i},int8,0.0,2\n" for i in range(100))
    (here / "long.csv").write_text("layer,format,score,bytes\n" + rows)
    done = succeed("allocate", "long.csv", "--budget", "bytes=150", "-o", "a.json")
    assert "60 more" in done.output
    assert "layers: 50 x int4, 50 x int8" in done.output
    assert len(json.loads((here / "a.json").read_text())["layers"]) == 100
