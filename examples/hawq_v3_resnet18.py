"""HAWQ-V3's nine published allocations of ResNet-18 beside ours, from its published figures alone.

    python examples/hawq_v3_resnet18.py [FOLDER]

FOLDER keeps the nine tables and allocations, so that each can be solved on the command line as
well. The figures are those of Zhen-Dong/HAWQ (MIT), ILP.ipynb and bit_config.py; Yao et al.,
"HAWQ-V3: Dyadic Neural Network Quantization", arXiv 2011.10680. No model and no torch are needed.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from hawqkit.pipeline import allocate_csv
from hawqkit.records import TableAllocation

FIGURES = Path(__file__).with_suffix(".json")
BITS = (4, 8)
COLUMNS = {"modelsize": "bytes", "bops": "bops", "latency": "latency_ms"}
SHARES = ("0.75", "0.5", "0.25")


@dataclass(frozen=True)
class Comparison:
    """One published allocation and ours, both measured by the same table."""

    name: str
    column: str
    limit: float
    published: float
    published_taken: float
    same: bool
    ours: TableAllocation

    @property
    def verdict(self) -> str:
        """Say how ours compares with the published one."""
        if self.same:
            return "identical"
        if self.published_taken > self.limit:
            return "published is over"
        gain = self.published - self.ours.objective
        return "better" if gain > 0 else "equal" if gain == 0 else "WORSE"


def costs(figures: dict, column: str) -> list[tuple[Fraction, Fraction]]:
    """Return what each layer takes at 4 and at 8 bit, exactly as the file's note counts it."""
    if column == "bytes":  # parameters are in units of 2^20
        entries = [Fraction(str(x)) * 2**20 for x in figures["parameters_millions"]]
        return [(x * 4 / 8, x * 8 / 8) for x in entries]
    if column == "bops":  # of 32 x 32 bits, the 64th and the 16th part
        operations = [Fraction(str(x)) * 10**6 for x in figures["bops_millions"]]
        return [(x / 64, x / 16) for x in operations]
    pairs = zip(figures["latency_ms_int4"], figures["latency_ms_int8"], strict=True)
    return [(Fraction(str(four)), Fraction(str(eight))) for four, eight in pairs]


def scores(figures: dict) -> list[tuple[float, float]]:
    """Return average trace times weight error at 4 and at 8 bit."""
    rows = zip(
        figures["average_trace"],
        figures["weight_error_4bit"],
        figures["weight_error_8bit"],
        strict=True,
    )
    return [(trace * four, trace * eight) for trace, four, eight in rows]


def write_table(figures: dict, column: str, file: Path) -> None:
    """Write the table that `hawqkit allocate` reads; tied layers are a group."""
    group = {i: f"pair {pair[0]}-{pair[1]}" for pair in figures["tied_pairs"] for i in pair}
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text)
        writer.writerow(["layer", "format", "score", column, "group"])
        for index, layer in enumerate(figures["layers"]):
            cells = zip(BITS, scores(figures)[index], costs(figures, column)[index], strict=True)
            for bits, score, cost in cells:
                row = [layer, f"int{bits}", repr(score), repr(float(cost)), group.get(index, "")]
                writer.writerow(row)


def compare(figures: dict, budget: str, share: str, folder: Path) -> Comparison:
    """Solve one table at its published limit, and measure the published bits by the same table."""
    column = COLUMNS[budget]
    name = f"{budget}_{share}"
    pairs = costs(figures, column)
    least, most = (sum(pair[k] for pair in pairs) for k in (0, 1))
    limit = float(least + Fraction(share) * (most - least))
    write_table(figures, column, folder / f"{name}.csv")
    ours = allocate_csv(folder / f"{name}.csv", {column: limit}, folder / f"{name}.json")
    columns = [BITS.index(bits) for bits in figures["published_bits"][name]]
    published = {
        layer: f"int{BITS[k]}" for layer, k in zip(figures["layers"], columns, strict=True)
    }
    return Comparison(
        name,
        column,
        limit,
        sum(row[k] for row, k in zip(scores(figures), columns, strict=True)),
        float(sum(pair[k] for pair, k in zip(pairs, columns, strict=True))),
        ours.layers == published,
        ours,
    )


def main(folder: str | None = None) -> list[Comparison]:
    """Print all nine, published beside ours; returns what was compared."""
    figures = json.loads(FIGURES.read_text())
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            return _print_all(figures, Path(place))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return _print_all(figures, Path(folder))


def _print_all(figures: dict, folder: Path) -> list[Comparison]:
    head = f"{'budget':<15}{'limit':>14}{'published':>12}{'takes':>9}{'ours':>12}{'takes':>9}"
    print(f"{head}  {'':<17} gap")
    found = []
    for budget in COLUMNS:
        for share in SHARES:
            one = compare(figures, budget, share, folder)
            taken = one.ours.taken[one.column].taken
            print(
                f"{one.name:<15}{one.limit:>14,.9g}{one.published:>12.7f}"
                f"{one.published_taken / one.limit:>9.2%}{one.ours.objective:>12.7f}"
                f"{taken / one.limit:>9.2%}  {one.verdict:<17} "
                f"{one.ours.certificate.relative_gap:.0e}"
            )
            found.append(one)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
