"""Latency tables: which row holds, what is missing, and every problem with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from random_problems import falling_scores

from hawqkit.allocation import allocate_table, read_latencies, shape_key
from hawqkit.errors import InputError, TableError
from hawqkit.records import Layer

FORMATS = ("int2-channel", "int4-channel", "int8-channel")
CONVS = (
    Layer("conv1", "convolution", 8, 27, "float32", macs=27 * 8 * 1024),
    Layer("conv2", "convolution", 16, 72, "float32", macs=72 * 16 * 256),
    Layer("skip", "convolution", 16, 8, "float32", macs=8 * 16 * 256),
    Layer("fc", "linear", 10, 16, "bfloat16", macs=160),
)
SCORES = falling_scores(CONVS, FORMATS, np.random.default_rng(0))


def write(folder: Path, text: str) -> Path:
    file = folder / "latency.csv"
    file.write_text(text)
    return file


def test_a_latency_row_of_the_layer_wins_over_its_shape_and_fixed_time_is_added(
    tmp_path: Path,
) -> None:
    shape = "convolution:16x72@294912"
    assert shape_key(CONVS[1]) == shape
    assert shape_key(Layer("a", "linear", 3, 4, "float32")) == "linear:3x4"
    rows = [
        f"{x.name},,{f},0.{c}" for x in CONVS if x.name != "conv2" for c, f in enumerate(FORMATS, 1)
    ]
    rows += [f",{shape},{f},0.5" for f in FORMATS] + ["conv2,anything,int8-channel,0.000000000123"]
    rows += ["(fixed),,,1.25", "stranger,,int4-channel,7"]
    table = read_latencies(write(tmp_path, "layer,shape,format,milliseconds\n" + "\n".join(rows)))
    costs = table.costs(CONVS, FORMATS)
    assert costs.costs[1].tolist() == [500_000_000, 500_000_000, 1]  # picoseconds, rounded up
    assert costs.costs[0].tolist() == [100_000_000, 200_000_000, 300_000_000]
    found = allocate_table(
        CONVS, FORMATS, SCORES, budgets={"latency_ms": 1.25 + 0.5 + 0.7}, costs=[costs]
    )
    assert found.totals.latency_ms is not None
    assert 1.25 < found.totals.latency_ms <= 2.45


def test_all_rows_that_a_latency_table_lacks_are_listed(tmp_path: Path) -> None:
    file = write(
        tmp_path, "layer,format,milliseconds\nconv1,int2-channel,1\nconv3,int8-channel,1\n"
    )
    with pytest.raises(InputError) as caught:
        read_latencies(file).costs(CONVS, FORMATS)
    message = str(caught.value)
    assert "11 rows missing" in message
    assert "conv1 (shape convolution:8x27@221184) in int4-channel, int8-channel;" in message
    assert "fc (shape linear:10x16@160) in int2-channel, int4-channel, int8-channel." in message
    assert "not measured here: conv3" in message
    # A format that does not fit a layer needs no row.
    whole = "conv1,int2-channel,1\nconv1,int4-channel,1\nconv1,int8-channel,1\n"
    table = read_latencies(write(tmp_path, "layer,format,milliseconds\n" + whole))
    assert table.costs(CONVS[:1], ("int4-channel", "int4-g32")).costs.tolist() == [[10**9, 0]]


def test_every_problem_of_a_latency_table_is_told_with_its_line(tmp_path: Path) -> None:
    text = (
        "layer,shape,format,milliseconds\n"
        "a,,int4-channel,1\n"
        "a,,int4-channel,2\n"
        ",,int4-channel,2\n"
        "b,,,2\n"
        "b,,int8-channel,-1\n"
        "b,,int2-channel,fast\n"
        "c,,int2-channel,1e9\n"
    )
    with pytest.raises(TableError) as caught:
        read_latencies(write(tmp_path, text))
    assert [p.split(":")[0] for p in caught.value.problems] == [f"line {n}" for n in range(3, 9)]
    with pytest.raises(TableError, match=r"(?s)no column 'milliseconds'.*'layer' or 'shape'"):
        read_latencies(write(tmp_path, "format,ms\nint4-channel,1\n"))
