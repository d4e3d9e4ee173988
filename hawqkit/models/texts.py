"""Where text comes from: the built-in corpus, a local file, or a Hugging Face data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqkit.errors import DataError, HawqkitError, did_you_mean
from hawqkit.models.corpora import SPLITS, builtin_texts
from hawqkit.models.sources import first_line, hub_endpoint, reachable, transport_error

FILES = (".txt", ".jsonl", ".parquet")
# What the two roles mean for a data set that has no splits of these names.
_ROLES = {"calibration": ("train",), "held-out": ("test", "validation", "val")}


@dataclass(frozen=True, slots=True)
class Documents:
    """Documents in their source's order; reading one may touch the disk.

    Attributes:
        name: source and split, for records.
        items: strings, or lists of chat messages.
    """

    name: str
    items: Sequence[Any]

    def __len__(self) -> int:
        return len(self.items)


def load_documents(
    source: str,
    *,
    split: str = "calibration",
    config: str | None = None,
    column: str | None = None,
) -> Documents:
    """Return the documents of a source.

    A `.txt` file is one document; `.jsonl` and `.parquet` hold one a row. A file has no splits:
    both roles, `calibration` and `held-out`, mean all of it.

    Args:
        source: `builtin`, a `.txt`, `.jsonl` or `.parquet` file, or the id of a data set.
        split: of `builtin` `calibration` or `held-out`; of a data set any that it has
            (`calibration` stands for train, `held-out` for test or else validation).
        config: configuration of a data set.
        column: column of text or of chat messages; `text`, else `messages`, if None.

    Raises:
        DataError: there is no such source, split or column, or it holds nothing.
        HawqkitError: the hub cannot be reached.
    """
    if not isinstance(source, str) or not source:
        raise DataError(f"data source: got {source!r}; give builtin, a file, or a data set's id.")
    path = Path(source).expanduser()
    local = source == "builtin" or path.suffix.lower() in FILES or path.exists()
    if local and config is not None:
        raise DataError(f"{source}: config {config!r} is for data sets of the hub; leave it out.")
    if source == "builtin":
        if column is not None:
            raise DataError(f"builtin: it has no column {column!r}; leave `column` out.")
        _check_split(source, split)
        documents = Documents(f"builtin:{split}", builtin_texts(split))
    elif local:
        _check_split(source, split)
        documents = Documents(source, _read_file(path, source, column))
    else:
        documents = _from_hub(source, split, config, column)
    if len(documents) == 0:
        raise DataError(f"{documents.name}: it holds no documents; give a source with text in it.")
    return documents


def _check_split(source: str, split: str) -> None:
    if split not in SPLITS:
        raise DataError(
            f"{source}: there is no split {split!r}; there are {' and '.join(SPLITS)}."
            + did_you_mean(split, SPLITS)
        )


def _read_file(path: Path, source: str, column: str | None) -> Sequence[Any]:
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{source}: there is no such file." + did_you_mean(path.name, near))
    if not path.is_file() or path.suffix.lower() not in FILES:
        raise DataError(
            f"{source}: this is {'a folder' if path.is_dir() else 'no text file'}; give a file "
            f"that ends in {', '.join(FILES)}, or a data set's id."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{source}: the file is empty.")
    try:
        if path.suffix.lower() == ".parquet":
            return _read_parquet(path, source, column)
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source}: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8."
        ) from None
    except OSError as error:
        raise DataError(f"{source}: the file cannot be read ({error.strerror}).") from None
    if path.suffix.lower() == ".jsonl":
        return _read_jsonl(text, source, column)
    if column is not None:
        raise DataError(f"{source}: a .txt file has no column {column!r}; leave `column` out.")
    if not text.strip():
        raise DataError(f"{source}: the file holds nothing but white space.")
    return [text]


def _read_jsonl(text: str, source: str, column: str | None) -> Sequence[Any]:
    rows = read_rows(text, source)
    chosen = _choose_column(source, list(dict.fromkeys(k for row in rows for k in row)), column)
    return checked_items(source, chosen, [row.get(chosen) for row in rows])


def read_rows(text: str, source: str) -> list[dict[str, Any]]:
    """Return the objects of JSON Lines, of which there is at least one.

    Raises:
        DataError: a line is no JSON object; the message says which one.
    """
    rows = []
    # Not splitlines(): JSON strings may hold separators such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}, line {number}: not JSON ({error}).") from None
        if not isinstance(row, dict):
            raise DataError(
                f"{source}, line {number}: got {type(row).__name__}, not an object such as "
                '{"text": "..."}.'
            )
        rows.append(row)
    if not rows:
        raise DataError(f"{source}: the file holds no rows.")
    return rows


def _read_parquet(path: Path, source: str, column: str | None) -> Sequence[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            chosen = _choose_column(source, list(file.schema_arrow.names), column)
            items = file.read(columns=[chosen]).column(chosen).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source}: not a readable Parquet file ({first_line(error)}).") from None
    return checked_items(source, chosen, items)


def _choose_column(source: str, columns: Sequence[str], column: str | None) -> str:
    if column is None:
        column = next((c for c in ("text", "messages") if c in columns), None)
        wanted = "neither a column 'text' nor one 'messages'"
    else:
        wanted = f"no column {column!r}"
    if column is None or column not in columns:
        raise DataError(
            f"{source}: there is {wanted}; the columns are {', '.join(map(repr, columns))}. Name "
            "one with `column`." + did_you_mean(column or "text", columns)
        )
    return column


def checked_items(source: str, column: str, items: Sequence[Any]) -> list[Any]:
    """Return the rows that hold something; a row must be a string or a list of messages.

    Raises:
        DataError: a row is neither; the message says which one.
    """
    kept = [item for item in items if item is not None and item != "" and item != []]
    for number, item in enumerate(items, start=1):
        if item is None or isinstance(item, str):
            continue
        messages = isinstance(item, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in item
        )
        if not messages:
            raise DataError(
                f"{source}, row {number}: column {column!r} holds {type(item).__name__}; it must "
                "hold text, or a list of messages with `role` and `content`."
            )
    if len({isinstance(item, str) for item in kept}) > 1:
        raise DataError(f"{source}: column {column!r} mixes text and lists of messages.")
    return kept


def _from_hub(source: str, split: str, config: str | None, column: str | None) -> Documents:
    data, name = hub_data_set(source, split, config)
    column = _choose_column(source, data.column_names, column)
    return Documents(name, checked_items(source, column, data[column][:]))


def hub_data_set(source: str, split: str, config: str | None) -> tuple[Any, str]:
    """Return one split of a data set of the hub, and its name with configuration and split.

    Args:
        source: the data set's id.
        split: any that it has; `calibration` stands for train, `held-out` for test or validation.
        config: its configuration, None for the only one.

    Raises:
        DataError: there is no such data set, configuration or split.
        HawqkitError: the hub cannot be reached.
    """
    import datasets
    from huggingface_hub import constants

    endpoint = hub_endpoint()
    offline = constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE
    # Without this question the client would try for half a minute.
    if not offline and not reachable(endpoint):
        raise HawqkitError(
            f"{source} is no file here, and {endpoint} cannot be reached to look for a data set of "
            "that name: connect to a network, set HF_HUB_OFFLINE=1 if it is in the local cache, or "
            f"use builtin or a file ({', '.join(FILES)})."
        )
    try:
        known = datasets.get_dataset_split_names(source, config)
        chosen = choose_split(source, split, known)
        data = datasets.load_dataset(source, config, split=chosen)
    except FileNotFoundError as error:
        if _never_answered(error):
            raise HawqkitError(
                f"{source}: no file here, and {endpoint} gave no answer that says whether there is "
                "such a data set; look at the network and its proxy, or use builtin or a file "
                f"({', '.join(FILES)})."
            ) from None
        raise DataError(
            f"{source}: no file here and no data set on the hub ({first_line(error)})."
        ) from None
    except ValueError as error:
        raise DataError(f"{source}: {first_line(error)}") from None
    except (OSError, transport_error()) as error:
        raise HawqkitError(
            f"{source}: the data set failed to load ({first_line(error)})."
        ) from None
    return data, ":".join(filter(None, [source, config, chosen]))


def _never_answered(error: BaseException) -> bool:
    """Whether "not found" only means that the hub was not heard.

    The hub marks what it does not have, and `datasets` then says DatasetNotFoundError. An answer
    without the mark, such as a proxy's own 404, ends as a plain FileNotFoundError, raised while
    huggingface_hub's LocalEntryNotFoundError ("not on this disk either") was being handled.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DatasetsError):
        if isinstance(cause, LocalEntryNotFoundError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def choose_split(source: str, split: str, known: Sequence[str]) -> str:
    """Return the split that is meant: one that there is, or the one that plays this role.

    Raises:
        DataError: there is none; the message names those that there are.

    >>> choose_split("d", "held-out", ["train", "validation"])
    'validation'
    """
    base = split.partition("[")[0]  # datasets reads train[:1%]
    if base in known:
        return split
    role = next((s for s in _ROLES.get(split, ()) if s in known), None)
    if role is None:
        raise DataError(
            f"{source}: there is no split {split!r}; there are {', '.join(known)}."
            + did_you_mean(base, known)
        )
    return role
