"""A folder that appears at once or not at all, and never replaces somebody else's files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hawqkit.errors import InputError


@contextmanager
def published(folder: Path, is_export: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; what is written there takes its place at the end.

    If something raises, `folder` is as it was. A kill between the two renames leaves the old folder
    under its hidden name, and the next export puts it back first.

    Args:
        folder: where the files shall lie.
        is_export: says of an existing folder whether an earlier export wrote it.

    Raises:
        InputError: `folder` is a file, or holds something that is no earlier export.
    """
    folder = Path(os.path.realpath(folder))  # a link stays, what it points at is replaced
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    replaced = folder.parent / f".{folder.name}.replaced"
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    refuse_foreign(folder, is_export)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _flush(partial)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        try:
            partial.rename(folder)
        except OSError:
            if replaced.exists():
                replaced.rename(folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def refuse_foreign(folder: Path, is_export: Callable[[Path], bool]) -> None:
    """Refuse to write where something else lies.

    Raises:
        InputError: `folder` is a file, or holds something that is no earlier export.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: name a folder for the export.")
    if any(folder.iterdir()) and not is_export(folder):
        raise InputError(
            f"{folder} holds files that no export of this target wrote, so it is not replaced: "
            "name another folder, or empty this one."
        )


def _flush(folder: Path) -> None:
    """Bring files to the disk before the rename makes them visible."""
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
