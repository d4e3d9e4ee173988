"""Documents become token sequences: windows of long ones, short ones joined, or padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hawqkit.errors import DataError
from hawqkit.models.quiet import quiet_transformers


@dataclass(frozen=True, slots=True)
class Tokens:
    """A document or sequence: token ids, and which of them may count as predictions."""

    ids: list[int]
    counted: list[bool]
    document: int


class Encoder:
    """Turns documents into tokens, each one only when it is needed.

    Attributes:
        prefix: ids that the tokenizer puts before a text (the beginning-of-sequence token).
        separator: end-of-sequence ids that stand between packed documents.
    """

    def __init__(self, tokenizer: Any, source: str, *, answers_only: bool, vocabulary: int | None):
        self._tokenizer = tokenizer
        self._source = source
        self._answers_only = answers_only
        self._vocabulary = vocabulary
        self.prefix = _prefix(tokenizer)
        eos = tokenizer.eos_token_id
        self.separator = [] if eos is None else [int(eos)]

    def encode(self, item: Any, document: int) -> Tokens:
        """Return the tokens of a text, without prefix, or of a chat as its template writes it."""
        with quiet_transformers():
            if isinstance(item, str):
                if self._answers_only:
                    raise DataError(
                        f"{self._source}: answers_only needs chats, but this is plain text; name a "
                        "column of messages, or leave answers_only out."
                    )
                ids = list(self._tokenizer(item, add_special_tokens=False)["input_ids"])
                counted = [True] * len(ids)
            else:
                ids, counted = self._encode_chat(item, document)
        if self._vocabulary is not None and ids and max(ids) >= self._vocabulary:
            raise DataError(
                f"{self._source}: the tokenizer makes token {max(ids)}, but the model knows "
                f"{self._vocabulary}; model and tokenizer do not belong together."
            )
        return Tokens(ids, counted, document)

    def _encode_chat(
        self, messages: list[dict[str, Any]], document: int
    ) -> tuple[list[int], list[bool]]:
        template = getattr(self._tokenizer, "chat_template", None)
        if not template:
            raise DataError(
                f"{self._source}: the rows are chats, but the model's tokenizer has no chat "
                "template; use a column of plain text, or a model that was tuned for chats."
            )
        try:
            if not self._answers_only:
                ids = self._template(messages)
                return ids, [True] * len(ids)
            if _marks_answers(template):
                encoded = self._tokenizer.apply_chat_template(
                    messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
                )
                return list(encoded["input_ids"]), [bool(m) for m in encoded["assistant_masks"]]
            return self._mark_answers(messages, document)
        except DataError:
            raise
        # Templates are programs of the model's author and raise whatever they like.
        except Exception as error:
            raise DataError(
                f"{self._source}, document {document}: the chat template refuses it ({error})."
            ) from None

    def _template(self, messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
        encoded = self._tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )
        return list(encoded["input_ids"])

    def _mark_answers(
        self, messages: list[dict[str, Any]], document: int
    ) -> tuple[list[int], list[bool]]:
        """Find answers by what each adds to the chat before it."""
        ids = self._template(messages)
        counted = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._template(messages[:turn], prompt=True) if turn else []
            through = self._template(messages[: turn + 1])
            if ids[: len(through)] != through or through[: len(before)] != before:
                raise DataError(
                    f"{self._source}, document {document}: the chat template rewrites earlier "
                    "turns, so its answers cannot be told apart; use a template with "
                    "{% generation %} marks, or leave answers_only out."
                )
            counted[len(before) : len(through)] = [True] * (len(through) - len(before))
        return ids, counted


def _marks_answers(template: Any) -> bool:
    text = template if isinstance(template, str) else " ".join(map(str, dict(template).values()))
    return "{% generation" in text or "{%- generation" in text


def _prefix(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text."""
    with quiet_transformers():
        bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


@dataclass(slots=True)
class Supply:
    """Documents in a shuffled order; `tokens` counts what was read of them so far."""

    order: list[int]
    encode: Callable[[int], Tokens]
    tokens: int = 0


def cut_packed(
    supply: Supply, encoder: Encoder, length: int, generator: torch.Generator, chats: bool
) -> Iterator[Tokens]:
    """Yield sequences of exactly `length` tokens, over as many documents as there are.

    The first round takes one window of every long document and joins short ones; each later round
    takes one more window of every long document, until none is left. Windows never overlap.
    """
    prefix = [] if chats else encoder.prefix
    room = length - len(prefix)
    waiting: list[list[Tokens]] = []
    parts: list[Tokens] = []
    for index in supply.order:
        whole = supply.encode(index)
        supply.tokens += len(whole.ids)
        if len(whole.ids) >= room:
            windows = _windows(whole, room, generator)
            yield _with_prefix(windows[0], prefix)
            waiting.append(windows[1:])
        elif whole.ids:
            parts.append(whole)
            if sum(len(p.ids) + len(encoder.separator) for p in parts) >= room:
                yield _with_prefix(_join(parts, encoder.separator, room, chats), prefix)
                parts = []
    while waiting := [windows for windows in waiting if windows]:
        for windows in waiting:
            yield _with_prefix(windows.pop(0), prefix)


def cut_padded(supply: Supply, encoder: Encoder, length: int, chats: bool) -> Iterator[Tokens]:
    """Yield one sequence a document: its first `length` tokens; at least two are needed."""
    prefix = [] if chats else encoder.prefix
    for index in supply.order:
        whole = supply.encode(index)
        supply.tokens += len(whole.ids)
        room = length - len(prefix)
        cut = Tokens(whole.ids[:room], whole.counted[:room], whole.document)
        if len(prefix) + len(cut.ids) >= 2:
            yield _with_prefix(cut, prefix)


def _windows(whole: Tokens, room: int, generator: torch.Generator) -> list[Tokens]:
    """Return all windows of a random grid over a document, in random order."""
    count, slack = divmod(len(whole.ids), room)
    offset = int(torch.randint(slack + 1, (1,), generator=generator))
    order = torch.randperm(count, generator=generator).tolist()
    starts = [offset + i * room for i in order]
    return [
        Tokens(whole.ids[s : s + room], whole.counted[s : s + room], whole.document) for s in starts
    ]


def _join(parts: list[Tokens], separator: list[int], room: int, chats: bool) -> Tokens:
    """Join short documents; what does not fit is dropped, so that sequences share no document."""
    ids: list[int] = []
    counted: list[bool] = []
    shares: dict[int, int] = {}
    for part in parts:
        shares[part.document] = min(len(part.ids), room - len(ids))
        ids += part.ids + separator
        # The end of a chat is no answer; the end of a text is a prediction like any other.
        counted += part.counted + [not chats] * len(separator)
    largest = max(shares, key=lambda document: shares[document])
    return Tokens(ids[:room], counted[:room], largest)


def _with_prefix(tokens: Tokens, prefix: list[int]) -> Tokens:
    return Tokens(prefix + tokens.ids, [False] * len(prefix) + tokens.counted, tokens.document)
