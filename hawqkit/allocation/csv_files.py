"""CSV files that people write: every problem of a file at once, each with its line."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from hawqkit.errors import TableError, did_you_mean

MOST = 1e100  # larger numbers are mistakes, and their sums would overflow


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the line that it ends on, and the text of each column."""

    line: int
    cells: dict[str, str]


@dataclass(slots=True)
class CsvFile:
    """What a file holds, and what is wrong with it; problems are collected and raised together.

    Attributes:
        source: the file, as it was named.
        sha256: of its bytes.
        columns: the header.
        rows: those that have as many cells as the header.
        problems: (line, message).
    """

    source: str
    sha256: str
    columns: tuple[str, ...]
    rows: list[Row]
    problems: list[tuple[int, str]] = field(default_factory=list)
    _empty: dict[str, list[int]] = field(default_factory=dict)

    def complain(self, line: int, message: str) -> None:
        """Remember a problem."""
        self.problems.append((line, message))

    def require(self, columns: Sequence[str]) -> None:
        """Complain of every column that the header lacks."""
        for name in columns:
            if name not in self.columns:
                self.complain(
                    1,
                    f"line 1: there is no column {name!r}; the header has "
                    f"{', '.join(self.columns)}." + did_you_mean(name, self.columns),
                )

    def text(self, row: Row, column: str) -> str:
        """Return the text of a cell, which must not be empty."""
        text = row.cells.get(column, "")
        if not text and column in self.columns:
            self._empty.setdefault(column, []).append(row.line)
        return text

    def number(self, row: Row, column: str) -> Fraction | None:
        """Return the exact number that a cell writes, at least 0; None if it does not."""
        text = self.text(row, column)
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            self.complain(
                row.line,
                f"line {row.line}: {column} is {text!r}, which is no number; write it like 0.0123 "
                "or 1.2e-4.",
            )
            return None
        if math.isnan(value) or not 0 <= value <= MOST:
            why = "a number of at least 0 is needed" if math.isfinite(value) else "not finite"
            if value > MOST and math.isfinite(value):
                why = f"numbers up to {MOST:g} can be summed"
            self.complain(row.line, f"line {row.line}: {column} is {text}: {why}.")
            return None
        return Fraction(repr(value))

    def refuse(self) -> None:
        """Raise everything that was found, in the order of the file.

        Raises:
            TableError: there are problems; cells that are empty are listed column by column.
        """
        for column, lines in self._empty.items():
            where = f"line{'s' if len(lines) > 1 else ''} {_ranges(lines)}"
            self.complain(lines[0], f"{where}: {column} is empty; fill it in.")
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: problem[0])
            raise TableError(self.source, [message for _, message in ordered])


def read_csv(path: str | Path) -> CsvFile:
    """Read a CSV file: UTF-8, commas, the first line names the columns; blank lines are skipped.

    Raises:
        TableError: there is no such file, it is not UTF-8 text, or it has no header or no rows.
    """
    source = str(path)
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise TableError(source, ["there is no such file."]) from None
    except IsADirectoryError:
        raise TableError(source, ["this is a folder; a table is a CSV file."]) from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"byte {error.start} is not UTF-8 text; a table is a CSV file in UTF-8."
        raise TableError(source, [message]) from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines: list[tuple[int, list[str]]] = []
    broken = None
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                lines.append((reader.line_num, stripped))
    except csv.Error as error:
        broken = (reader.line_num, f"line {reader.line_num}: not CSV from here on: {error}.")
    if not lines:
        raise TableError(source, [broken[1] if broken else "the file is empty."])
    file = _with_header(source, hashlib.sha256(data).hexdigest(), lines)
    if broken:
        file.complain(*broken)
    elif not file.rows and not file.problems:
        file.complain(1, "there are no rows below the header.")
    return file


def _with_header(source: str, digest: str, lines: list[tuple[int, list[str]]]) -> CsvFile:
    (first, header), *rest = lines
    file = CsvFile(source, digest, tuple(header), [])
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        file.complain(first, f"line {first}: the column {twice[0]!r} stands twice; keep one.")
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            file.complain(first, f"line {first}: {name} part the cells; use commas.")
    for line, cells in rest:
        if len(cells) == len(header):
            file.rows.append(Row(line, dict(zip(header, cells, strict=True))))
        else:
            file.complain(
                line, f"line {line}: has {len(cells)} cells, and the header has {len(header)}."
            )
    return file


def _ranges(lines: Sequence[int]) -> str:
    """Write line numbers shortly.

    >>> _ranges([2, 5, 6, 7, 9])
    '2, 5-7, 9'
    """
    parts = []
    for _, run in itertools.groupby(enumerate(lines), key=lambda pair: pair[1] - pair[0]):
        numbers = [line for _, line in run]
        parts.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return ", ".join(parts)
