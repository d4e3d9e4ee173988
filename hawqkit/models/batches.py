"""Token sequences with their masks, and how they are cut into micro-batches.

Letters in shapes: S sequences, T tokens of the longest one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hawqkit.errors import DataError, InputError, did_you_mean
from hawqkit.models.batch import Batch, Data
from hawqkit.models.model import LoadedModel
from hawqkit.models.packing import Encoder, Supply, Tokens, cut_packed, cut_padded
from hawqkit.models.texts import Documents, load_documents
from hawqkit.records import DataFacts


@dataclass(frozen=True, slots=True, eq=False)
class Sequences(Data):
    """Calibration or held-out text as tokens; sequences that only predict come last.

    Attributes:
        tokens: (S, T) int64, padded on the right.
        attention: (S, T) bool, True for real tokens.
        counted: (S, T) bool, True where the prediction OF that token, made one position earlier,
            enters the mean; column 0 is False.
        document: (S,) int64, the document that a sequence is from (most of it, if several).
        withheld: (S,) bool, True where the sequence is kept from choosing.
        facts: where it came from and how much there is.
    """

    tokens: Tensor
    attention: Tensor
    counted: Tensor
    document: Tensor
    withheld: Tensor
    facts: DataFacts

    def __len__(self) -> int:
        """Return the number of sequences."""
        return int(self.tokens.shape[0])

    def micro_batch(self, index: Sequence[int]) -> MicroBatch:
        """Return some sequences, cut to the longest of them."""
        rows = torch.tensor(list(index), dtype=torch.int64)
        attention = self.attention[rows]
        length = int(attention.sum(1).max())
        return MicroBatch(
            index=rows,
            tokens=self.tokens[rows, :length],
            attention=attention[:, :length],
            counted=self.counted[rows, :length],
        )


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch(Batch):
    """Some sequences of a `Sequences`; b of them, t tokens long.

    Attributes:
        index: (b,) global indices of the sequences.
        tokens: (b, t) int64.
        attention: (b, t) bool.
        counted: (b, t) bool, see `Sequences`.
    """

    index: Tensor
    tokens: Tensor
    attention: Tensor
    counted: Tensor

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the keyword arguments of a language model's forward."""
        return {
            "input_ids": self.tokens.to(device),
            "attention_mask": self.attention.to(device),
            "use_cache": False,
        }

    @property
    def predicts(self) -> Tensor:
        """(b, t); the prediction of token t is made at position t - 1."""
        made_at = torch.zeros_like(self.counted)
        made_at[:, :-1] = self.counted[:, 1:]
        return made_at

    @property
    def targets(self) -> Tensor:
        """(b, t), the next token; 0 at the last position, which predicts nothing."""
        following = torch.zeros_like(self.tokens)
        following[:, :-1] = self.tokens[:, 1:]
        return following


def load_batches(
    source: str,
    model: LoadedModel,
    *,
    split: str = "calibration",
    sequences: int = 64,
    length: int = 256,
    seed: int = 0,
    withheld: int = 0,
    config: str | None = None,
    column: str | None = None,
    packing: str = "packed",
    answers_only: bool = False,
) -> Sequences:
    """Read text, and return it as token sequences for a model.

    `packed` gives sequences of exactly `length` tokens: windows inside one document, spread over as
    many documents as there are; documents shorter than that are joined with end-of-sequence tokens
    between them. `padded` gives the start of one document a sequence. Where the tokenizer begins a
    text with a token of its own, every sequence begins with it.

    Every real token but a sequence's first is a counted prediction; of chats with `answers_only`
    only the tokens of answers, and sequences without any are left out.

    Args:
        source: `builtin`, a `.txt`, `.jsonl` or `.parquet` file, or the id of a data set.
        model: the model; its tokenizer is used.
        split: see `texts.load_documents`.
        sequences: how many may be used for choosing.
        length: tokens of a sequence, at most.
        seed: of the order of documents and the choice of windows.
        withheld: how many more to give that only predict; they share no document with the others.
        config: configuration of a data set.
        column: column of text or of chat messages.
        packing: `packed` or `padded`.
        answers_only: count predictions of answers alone; chats only.

    Raises:
        InputError: an option is out of range.
        DataError: text is missing, unreadable, or too short; the message says how much there is.
    """
    _check_options(model, sequences, length, withheld, packing)
    documents = load_documents(source, split=split, config=config, column=column)
    encoder = Encoder(
        model.tokenizer,
        documents.name,
        answers_only=answers_only,
        vocabulary=model.facts.config.get("vocab_size"),
    )
    chosen = _choose(documents, encoder, sequences, withheld, length, seed, packing)
    return _stack(chosen, withheld, documents.name, seed)


def _choose(
    documents: Documents,
    encoder: Encoder,
    sequences: int,
    withheld: int,
    length: int,
    seed: int,
    packing: str,
) -> list[Tokens]:
    """Return the sequences that choose, then those that only predict."""
    chats = not isinstance(documents.items[0], str)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    chosen: list[Tokens] = []
    for count, part in zip(
        (sequences, withheld), _divide(order, sequences, withheld, documents.name), strict=True
    ):
        if count == 0:
            continue
        supply = Supply(part, lambda index: encoder.encode(documents.items[index], index))
        cuts = (
            cut_packed(supply, encoder, length, generator, chats)
            if packing == "packed"
            else cut_padded(supply, encoder, length, chats)
        )
        found = list(islice((c for c in cuts if any(c.counted[1:])), count))
        if len(found) < count:
            raise _too_little(documents.name, supply, len(found), count, length, withheld)
        chosen += found
    return chosen


def _check_options(
    model: LoadedModel, sequences: int, length: int, withheld: int, packing: str
) -> None:
    if packing not in ("packed", "padded"):
        raise InputError(
            f"packing: got {packing!r}; allowed are packed and padded."
            + did_you_mean(packing, ("packed", "padded"))
        )
    for name, value, least in (
        ("sequences", sequences, 1),
        ("length", length, 2),
        ("withheld", withheld, 0),
    ):
        if value < least:
            raise InputError(f"{name}: got {value}; it must be {least} or more.")
    config = model.facts.config
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if limit is not None and length > limit:
        raise InputError(
            f"length: got {length}, but {model.facts.source} has {limit} positions; ask for fewer."
        )
    if model.tokenizer is None:
        raise DataError(
            f"{model.facts.source} has no tokenizer, so text cannot become tokens; give one to "
            "wrap_model, or make the tokens yourself and use make_sequences."
        )


def _divide(
    order: list[int], sequences: int, withheld: int, source: str
) -> tuple[list[int], list[int]]:
    """Share documents between choosing and predicting, in proportion, evenly along the order."""
    if withheld == 0:
        return order, []
    count = len(order)
    if count < 2:
        raise DataError(
            f"{source}: it is one document, but withheld sequences need documents that no other "
            "sequence uses; give text with more documents (one a row of a .jsonl file), or set "
            "withheld to 0."
        )
    share = min(count - 1, max(1, round(count * withheld / (sequences + withheld))))
    kept = {(2 * i + 1) * count // (2 * share) for i in range(share)}
    return (
        [document for place, document in enumerate(order) if place not in kept],
        [document for place, document in enumerate(order) if place in kept],
    )


def _too_little(
    source: str, supply: Supply, found: int, count: int, length: int, withheld: int
) -> DataError:
    part = ", from the documents that fall to this part" if withheld else ""
    return DataError(
        f"{source}: too little text. Asked were {count} sequences of {length} tokens; there are "
        f"{found}{part}: {len(supply.order)} documents with {supply.tokens:,} tokens. Ask for "
        "fewer or shorter sequences, or give more text."
    )


def _stack(chosen: list[Tokens], withheld: int, source: str, seed: int) -> Sequences:
    longest = max(len(c.ids) for c in chosen)
    tokens = torch.zeros(len(chosen), longest, dtype=torch.int64)
    attention = torch.zeros(len(chosen), longest, dtype=torch.bool)
    counted = torch.zeros(len(chosen), longest, dtype=torch.bool)
    for row, cut in enumerate(chosen):
        size = len(cut.ids)
        tokens[row, :size] = torch.tensor(cut.ids)
        attention[row, :size] = True
        counted[row, :size] = torch.tensor(cut.counted)
    return make_sequences(
        tokens,
        attention,
        counted,
        document=torch.tensor([c.document for c in chosen]),
        withheld=torch.arange(len(chosen)) >= len(chosen) - withheld,
        source=source,
        seed=seed,
    )


def make_sequences(
    tokens: Tensor,
    attention: Tensor,
    counted: Tensor,
    *,
    document: Tensor | None = None,
    withheld: Tensor | None = None,
    source: str = "tensors",
    seed: int = 0,
) -> Sequences:
    """Wrap ready-made tensors, and compute their facts.

    Args:
        tokens: (S, T) int64, padded on the right.
        attention: (S, T) bool.
        counted: (S, T) bool; predictions of padding and of first tokens are dropped.
        document: (S,) int64; every sequence its own document if None.
        withheld: (S,) bool; none if None.
        source: what records call the data.
        seed: what records say about the choice of windows.
    """
    count = tokens.shape[0]
    document = torch.arange(count) if document is None else document
    withheld = torch.zeros(count, dtype=torch.bool) if withheld is None else withheld
    attention = attention.bool()
    counted = counted.bool() & attention
    counted[:, 0] = False  # nothing comes before a first token that could predict it
    facts = DataFacts(
        source=source,
        hash=_hash(tokens, attention, counted, document, withheld),
        sequences=count,
        length=int(attention.sum(1).max()) if count else 0,
        tokens=int(attention.sum()),
        counted=int(counted.sum()),
        documents=len(set(document.tolist())),
        seed=seed,
    )
    return Sequences(tokens.long(), attention, counted, document.long(), withheld.bool(), facts)


def _hash(tokens: Tensor, *masks: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    for tensor in (tokens, *masks):
        digest.update(tensor.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
