"""Progress with the time that is left, on the terminal of the main process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from tqdm import tqdm


def is_main() -> bool:
    """Whether this is the one process that talks; known without joining the group."""
    return os.environ.get("RANK", "0") == "0"


def track(items: Iterable[Any], stage: str, total: int) -> Iterable[Any]:
    """Show a bar on stderr while items are taken; silent in all processes but one.

    Without a terminal it writes a line about every ten seconds, so that a log stays readable.
    """
    terminal = sys.stderr.isatty()
    bar: Iterable[Any] = tqdm(
        items,
        desc=f"{stage:>24}",
        total=total,
        disable=not is_main(),
        mininterval=0.2 if terminal else 10.0,
        bar_format="{desc} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} "
        "{elapsed} gone, {remaining} left",
        ascii=" #" if not terminal else None,
        leave=True,
    )
    return bar


def speaker() -> Console:
    """Return a console that writes to standard output in the main process only."""
    return Console(quiet=not is_main(), highlight=False, soft_wrap=True, emoji=False)


class _AboveBar(logging.Handler):
    """Writes lines above a bar that may be there, instead of behind it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line on stderr."""
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def notices() -> Iterator[None]:
    """Show on stderr, in the main process, what the rooms below log at level INFO."""
    logger = logging.getLogger("hawqkit")
    level, handler = logger.level, _AboveBar()
    if is_main():
        logger.addHandler(handler)
        logger.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
