"""The matrix at the end of `make targets`: what each consumer was really seen to do.

A test says what it has just held, in one call of `checked` after the assertion. The hooks of
conftest.py carry it in the test's report, so that it counts only if the whole test passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hawqkit.targets import TARGETS, find_target

STEPS = ("written", "loaded", "widths", "logits", "size")
TITLES = ("written", "loaded", "widths checked", "logits compared", "size as predicted")
PROPERTY = "consumer"
_said: list[tuple[str, str]] = []


def checked(target: str, *steps: str) -> None:
    """Record that the test that runs now has held something of a target.

    Without steps, only that the test is one of that target, as before a skip.
    """
    unknown = [step for step in steps if step not in STEPS]
    assert not unknown, f"{unknown}: the columns of the matrix are {STEPS}"
    _said.extend((PROPERTY, f"{target} {step}".strip()) for step in steps or ("",))


def taken(item: Any) -> list[tuple[str, str]]:
    """Return and forget what was said; a test that was skipped before it said anything is of all
    targets in its module's `TARGETS_HERE`, or of the one that its file is named after.
    """
    found = list(dict.fromkeys(_said))
    _said.clear()
    if found:
        return found
    name = Path(str(item.path)).stem.removeprefix("test_consumer_").replace("_", "-")
    return [(PROPERTY, target) for target in getattr(item.module, "TARGETS_HERE", (name,))]


def matrix(reports: Iterable[Any]) -> list[str]:
    """Return the lines of the matrix, and below it each skip and failure with its reason.

    Args:
        reports: pytest's reports of tests, of which those without what `taken` found are left out.
    """
    cells: dict[str, dict[str, str]] = {}
    notes: dict[str, None] = {}
    for report in reports:
        said = [value for key, value in report.user_properties if key == PROPERTY]
        for target, _, step in (value.partition(" ") for value in said):
            row = cells.setdefault(target, {})
            row.setdefault("outcome", report.outcome)
            if report.outcome == "passed":
                if step:
                    row.setdefault(step, "yes")
                continue
            row["outcome"] = report.outcome if row["outcome"] != "failed" else "failed"
            if step and report.outcome == "failed":
                row[step] = "in a failed test"
            notes[f"{target}: {report.outcome} {report.nodeid}: {_reason(report)}"] = None
    lines = [_line("target", TITLES)]
    lines += [_line(t, [_cell(t, cells[t], step) for step in STEPS]) for t in sorted(cells)]
    untested = [name for name in TARGETS if name not in cells]
    if cells and untested:
        lines.append(f"no test of this run: {', '.join(untested)}")
    return [*lines, *notes] if cells else []


def _cell(target: str, row: dict[str, str], step: str) -> str:
    if step in row:
        return row[step]
    if step == "size" and target in TARGETS and not find_target(target).SIZED:
        return "no weights"
    return "no" if row["outcome"] == "passed" else row["outcome"]


def _line(first: str, cells: Iterable[str]) -> str:
    return f"{first:<18} " + " ".join(f"{cell:<17}" for cell in cells).rstrip()


def _reason(report: Any) -> str:
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).partition("\n")[0]
