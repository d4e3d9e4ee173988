"""The probe's journal: one file a micro-batch, so that a killed run goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hawqkit.errors import HawqkitError, StateMismatch
from hawqkit.store import Arrays, fingerprint, read_arrays, to_json, write_arrays, write_text_atomic

# Names of files that are not whole yet: of `store.write_bytes_atomic`, and of eigenpairs.
_PARTIAL = re.compile(
    r"\.(?:batch-\d{5,}\.safetensors|facts\.json)\.[a-z0-9_]{8}|\.eigenpairs\.safetensors\.\d+"
)
_ADVICE = "Choose another run folder (--output), or remove this one to measure again."


class Journal:
    """Micro-batch results in a folder, guarded by the facts that they depend on.

    Args:
        folder: is made if it is missing.
        facts: everything the results depend on: model, data, formats, seeds, batch size.
        advice: what to do where the folder holds results of other facts.

    Raises:
        StateMismatch: the folder holds results of other facts; the message says which differ.
    """

    def __init__(
        self, folder: str | Path, facts: Mapping[str, Any], *, advice: str = _ADVICE
    ) -> None:
        self.folder = Path(folder)
        self.facts = dict(facts)
        self._advice = advice
        self.fingerprint = fingerprint(self.facts)
        self._check_facts()

    def _check_facts(self) -> None:
        path = self.folder / "facts.json"
        if not path.exists():
            stale = sorted(self.folder.glob("batch-*.safetensors"))
            if stale:
                raise StateMismatch(
                    f"{self.folder}: holds {len(stale)} results but no facts.json that says of "
                    "what; remove the folder or choose another run folder."
                )
            write_text_atomic(path, to_json(self.facts) + "\n")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise StateMismatch(
                f"{path}: not valid JSON ({error}); remove {self.folder} to measure again."
            ) from error
        if not isinstance(found, dict):
            raise StateMismatch(
                f"{path}: not a JSON object; remove {self.folder} to measure again."
            )
        mine = json.loads(to_json(self.facts))
        different = [k for k in sorted({*found, *mine}) if found.get(k) != mine.get(k)]
        if different:
            lines = [
                f"{k}: there {_short(found.get(k))}, now {_short(mine.get(k))}" for k in different
            ]
            raise StateMismatch(
                f"{self.folder}: was measured with something else; what differs:\n  - "
                + "\n  - ".join(lines)
                + f"\n{self._advice}"
            )

    def read(self, batch: int) -> Arrays | None:
        """Return the results of a micro-batch, None if there are none or they are damaged.

        A damaged file is removed: its micro-batch is measured again, to the same bits.
        """
        path = self._path(batch)
        if not path.exists():
            return None
        try:
            arrays, metadata = read_arrays(path)
        except StateMismatch:
            path.unlink(missing_ok=True)
            return None
        if metadata.get("fingerprint") != self.fingerprint or metadata.get("batch") != str(batch):
            path.unlink(missing_ok=True)
            return None
        return arrays

    def write(self, batch: int, arrays: Arrays) -> None:
        """Keep the results of a micro-batch."""
        metadata = {"fingerprint": self.fingerprint, "batch": str(batch)}
        write_arrays(self._path(batch), arrays, metadata)

    def numbers(self) -> list[int]:
        """Return which results there are, in rising order."""
        return sorted(int(p.stem[6:]) for p in self.folder.glob("batch-*.safetensors"))

    def drop(self, batch: int) -> None:
        """Remove the results of a micro-batch."""
        self._path(batch).unlink(missing_ok=True)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:05d}.safetensors"


def sweep(folder: str | Path) -> int:
    """Remove what killed processes left half written in journals, and return how many files.

    Those are files beside a journal's results, under the name that they have until they are whole.
    Another process may be about to rename one: call it only while
    the run folder is `locked`, and before this run writes.

    Args:
        folder: a journal, or a folder of journals; may be missing.
    """
    found = [p for p in Path(folder).rglob(".*") if _PARTIAL.fullmatch(p.name) and p.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:40] + "..." + text[-12:]


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold a run folder for this process, so that two runs cannot write into it at once.

    The lock is the system's (flock): it is gone with the process, however that ends.

    Raises:
        HawqkitError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise HawqkitError(
                f"{folder}: another hawqkit is at work in this run folder; wait for it, or choose "
                "another with --output."
            ) from error
        yield
