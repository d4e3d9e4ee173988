"""Rows with labels from a file, a folder or the hub, and which of their columns are meant."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqkit.errors import DataError, did_you_mean
from hawqkit.models.corpora import SPLITS
from hawqkit.models.sources import first_line
from hawqkit.models.texts import choose_split, hub_data_set, read_rows

TABLES = (".jsonl", ".csv", ".parquet")
IMAGE, CLASS, TEXT = "images", "classes", "text"
WHOLE, OTHER = "whole numbers", "something else"


@dataclass(frozen=True, slots=True)
class Column:
    """What a column holds.

    Attributes:
        kind: `IMAGE`, `CLASS` (whole numbers with names), `TEXT`, `WHOLE` or `OTHER`.
        names: of the classes.
    """

    kind: str
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of named columns; reading may touch the disk.

    Attributes:
        name: source and split, for records.
        columns: what there is.
        rows: number of rows.
        read: a column's values at some rows, at all rows for None.
    """

    name: str
    columns: dict[str, Column]
    rows: int
    read: Callable[[str, Sequence[int] | None], list[Any]]


def open_table(source: str, *, split: str, config: str | None) -> Table:
    """Return the rows of a source.

    Args:
        source: a `.jsonl`, `.csv` or `.parquet` file, a folder that `datasets` reads or has
            written, or a data set's id.
        split: of a file `calibration` or `held-out`, which both mean all of it; of a data set any
            that it has (`calibration` stands for train, `held-out` for test or else validation).
        config: configuration of a data set of the hub.

    Raises:
        DataError: there is no such source or split, it cannot be read, or it holds no rows.
        HawqkitError: the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        table = _of_data_set(*_from_folder(path, source, split, config))
    elif path.suffix.lower() in TABLES or path.exists():
        table = _of_file(path, source, split, config)
    else:
        table = _of_data_set(*hub_data_set(source, split, config))
    if table.rows == 0:
        raise DataError(f"{table.name}: it holds no rows.")
    return table


def find_column(
    table: Table, given: str | None, kinds: Sequence[str], usual: Sequence[str], alone: str
) -> str:
    """Return the column that is meant: as named, with a usual name, or the only one of a kind.

    Args:
        table: where to look.
        given: its name, if the user said one.
        kinds: kinds of columns that will do.
        usual: names that such a column mostly has.
        alone: the kind that is meant where a single column is of it.

    Raises:
        DataError: there is none, or several; the message lists the columns.
    """
    listed = ", ".join(f"{name!r} ({c.kind})" for name, c in table.columns.items())
    if given is not None:
        if given not in table.columns:
            raise DataError(
                f"{table.name}: there is no column {given!r}; there are {listed}."
                + did_you_mean(given, list(table.columns))
            )
        if table.columns[given].kind not in kinds:
            raise DataError(
                f"{table.name}: column {given!r} holds {table.columns[given].kind}, not "
                f"{' or '.join(kinds)}; the columns are {listed}."
            )
        return given
    for name in usual:
        if name in table.columns and table.columns[name].kind in kinds:
            return name
    found = [name for name, column in table.columns.items() if column.kind == alone]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{table.name}: no one column of {' or '.join(kinds)} stands out; there are {listed}. Name "
        "the columns of inputs and labels with `column` and `labels`."
    )


def check_role(source: str, split: str) -> None:
    """Refuse a split that a source without splits cannot have.

    Raises:
        DataError: it is neither `calibration` nor `held-out`.
    """
    if split not in SPLITS:
        raise DataError(
            f"{source}: it has no splits, so no {split!r} either; {' and '.join(SPLITS)} both mean "
            "all of it." + did_you_mean(split, SPLITS)
        )


def _of_file(path: Path, source: str, split: str, config: str | None) -> Table:
    if config is not None:
        raise DataError(f"{source}: config {config!r} is for data sets of the hub; leave it out.")
    check_role(source, split)
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{source}: there is no such file." + did_you_mean(path.name, near))
    if path.suffix.lower() not in TABLES:
        raise DataError(f"{source}: labelled rows come from {', '.join(TABLES)} files or folders.")
    if path.suffix.lower() == ".parquet":
        return _of_data_set(_read_parquet(path, source), source)
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{source}: the file cannot be read ({error.strerror}).") from None
    return _of_rows(
        _read_csv(text, source) if path.suffix.lower() == ".csv" else read_rows(text, source),
        source,
    )


def _read_csv(text: str, source: str) -> list[dict[str, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = list(reader.fieldnames or ())
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{source}: not a readable CSV file ({error}).") from None
    if not header or len(set(header)) < len(header):
        raise DataError(
            f"{source}: the first line must name each column once; it holds {header or 'nothing'}."
        )
    ragged = [n for n, row in enumerate(rows, start=1) if None in row or None in row.values()]
    if ragged:
        raise DataError(
            f"{source}: rows {_some(ragged)} do not have the {len(header)} fields that the first "
            "line names; put text with commas or line breaks in quotes."
        )
    return [dict(row) for row in rows]


def _of_rows(rows: list[dict[str, Any]], source: str) -> Table:
    names = list(dict.fromkeys(key for row in rows for key in row))
    values = {name: [row.get(name) for row in rows] for name in names}

    def read(name: str, index: Sequence[int] | None) -> list[Any]:
        return values[name] if index is None else [values[name][i] for i in index]

    kinds = {name: Column(_kind_of_values(column)) for name, column in values.items()}
    return Table(source, kinds, len(rows), read)


def _kind_of_values(values: Sequence[Any]) -> str:
    there = [value for value in values if value is not None]
    if there and all(isinstance(v, int) and not isinstance(v, bool) for v in there):
        return WHOLE
    return TEXT if there and all(isinstance(v, str) for v in there) else OTHER


def _read_parquet(path: Path, source: str) -> Any:
    import datasets
    import pyarrow
    import pyarrow.parquet

    try:
        # Not Dataset.from_parquet, which leaves a copy in the cache.
        return datasets.Dataset(pyarrow.parquet.read_table(path, memory_map=True))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{source}: not a readable Parquet file ({first_line(error)}).") from None


def _from_folder(path: Path, source: str, split: str, config: str | None) -> tuple[Any, str]:
    """Return one split of a folder that `datasets` has written or can read, and its name."""
    import datasets

    try:
        if (path / "dataset_dict.json").exists():
            whole = datasets.load_from_disk(str(path))
            chosen = choose_split(source, split, list(whole))
            return whole[chosen], f"{source}:{chosen}"
        if (path / "state.json").exists():
            check_role(source, split)
            return datasets.load_from_disk(str(path)), source
        chosen = choose_split(source, split, datasets.get_dataset_split_names(str(path), config))
        data = datasets.load_dataset(str(path), config, split=chosen)
    except DataError:
        raise
    # `datasets` raises errors of many libraries for files that it cannot read.
    except Exception as error:
        raise DataError(
            f"{source}: `datasets` cannot read this folder ({first_line(error)}). A folder holds "
            "images in one sub-folder for each class, or a data set with its splits."
        ) from None
    return data, f"{source}:{chosen}"


def _of_data_set(data: Any, name: str) -> Table:
    import datasets

    columns = {key: _column(feature) for key, feature in data.features.items()}
    pictures = [key for key, value in data.features.items() if isinstance(value, datasets.Image)]
    for key in pictures:  # as they are stored: decoding is for those that are chosen
        data = data.cast_column(key, datasets.Image(decode=False))
    views: dict[str, Any] = {}

    def read(column: str, index: Sequence[int] | None) -> list[Any]:
        view = views.setdefault(column, data.select_columns([column]))
        if index is None:
            values: list[Any] = view[column][:]
            return values
        return [view[i][column] for i in index]

    return Table(name, columns, len(data), read)


def _column(feature: Any) -> Column:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return Column(CLASS, tuple(feature.names))
    if isinstance(feature, datasets.Image):
        return Column(IMAGE)
    if isinstance(feature, dict):  # an image as it is stored, in a file that does not say so
        return Column(IMAGE if set(feature) == {"bytes", "path"} else OTHER)
    kind = str(getattr(feature, "dtype", ""))
    if kind == "binary":
        return Column(IMAGE)
    if kind in ("string", "large_string"):
        return Column(TEXT)
    return Column(WHOLE if kind.startswith(("int", "uint")) else OTHER)


def _some(numbers: Sequence[int], count: int = 5) -> str:
    more = f" and {len(numbers) - count} more" if len(numbers) > count else ""
    return ", ".join(map(str, numbers[:count])) + more
