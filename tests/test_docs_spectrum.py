"""The example in docs/spectrum.md is run, so that it stays true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "spectrum.md"


def test_the_example_of_the_page_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(example, found)
    size = found["H"].size
    assert found["record"].whole.size == size == 8 * 16 + 16 + 16 * 3 + 3
    assert [block.name for block in found["record"].blocks] == list(found["layers"]) == ["0", "2"]
    assert found["ranks"].counts[1].count >= found["ranks"].counts[0].count > 0
