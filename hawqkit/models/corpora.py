"""The public-domain text that hawqkit ships; `data/README.md` says where it is from."""

from __future__ import annotations

import gzip
import json
from importlib.resources import files

SPLITS = ("calibration", "held-out")


def builtin_texts(split: str) -> list[str]:
    """Return the documents of a split of the built-in corpus, in order of time.

    Args:
        split: `calibration` (174 documents) or `held-out` (58 documents).

    >>> len(builtin_texts("calibration")), len(builtin_texts("held-out"))
    (174, 58)
    """
    packed = files("hawqkit.models").joinpath("data/state_of_the_union.jsonl.gz").read_bytes()
    records = map(json.loads, gzip.decompress(packed).decode("utf-8").splitlines())
    return [record["text"] for record in records if record["split"] == split]
