"""The tokenizer of a model as llama.cpp reads it: tokens, their kinds, and how text is split.

Two families are converted, and nothing is guessed: a tokenizer of which any part is not known to
llama.cpp is refused, with that part in the message.

    byte-level BPE     `gpt2` with merges; the way in which text is split before merging is one of
                       `SPLITS`, which llama.cpp knows by name
    BPE with bytes     `llama`, SentencePiece's: scores in place of merges, spaces as U+2581, and
                       a token `<0x..>` for every byte

Special tokens, merges and the chat template are read by gguf-py's `SpecialVocab`.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawqkit.errors import Unsupported
from hawqkit.targets.gguf_names import require_gguf

SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")

# Patterns of HF's `Split` -> name in llama.cpp.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = "ByteLevel"
SPLITS: dict[tuple[str, ...], str] = {
    ("ByteLevel with its own pattern",): "gpt-2",
    ("Digits one by one", "ByteLevel with its own pattern"): "smollm",
    (f"Split {_LLAMA3}", _BYTES): "llama-bpe",
    (f"Split {_QWEN2}", _BYTES): "qwen2",
    (f"Split {_TEKKEN}", _BYTES): "tekken",
}
# Where a token of the vocabulary is taken whole, before any merge, llama.cpp does so by this name.
_WHOLE_TOKENS_FIRST = ("llama-bpe", "tekken")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: `gpt2`, `llama`, or `none` where there is no tokenizer.
        split: how text is split, llama.cpp's `tokenizer.ggml.pre`.
        tokens: by identifier, as many as the embedding has rows.
        kinds: of each token: gguf-py's `TokenType`.
        scores: of each token; empty where merges decide.
        merges: "left right", the first first; empty where scores decide.
        ids: `bos`, `eos`, ... -> identifier.
        adds: `bos`, `eos` -> whether encoding a text adds it.
        space_prefix: whether a space is put before a text; None where the file does not say it.
        chat_template: Jinja, or None.
    """

    model: str
    split: str = ""
    tokens: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    ids: Mapping[str, int] | None = None
    adds: Mapping[str, bool] | None = None
    space_prefix: bool | None = None
    chat_template: str | None = None

    def add_to(self, writer: Any) -> None:
        """Put it into a gguf-py `GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        if self.model == "none":
            return
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(list(self.tokens))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        writer.add_token_types(list(self.kinds))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, token in (self.ids or {}).items():
            add = getattr(writer, f"add_{name}_token_id", None)
            if add is not None:
                add(token)
        for name, adds in (self.adds or {}).items():
            getattr(writer, f"add_add_{name}_token")(adds)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(tokenizer: Any, rows: int, config: Mapping[str, Any]) -> Vocabulary:
    """Return a tokenizer as llama.cpp reads it.

    Args:
        tokenizer: of transformers; None gives the vocabulary `none`: a model that takes numbers.
        rows: of the embedding; identifiers beyond the tokenizer's get names `[PAD..]`.
        config: the model's configuration, for identifiers that the tokenizer does not name.

    Raises:
        Unsupported: llama.cpp has no such tokenizer, or the package `gguf` is missing.
    """
    if tokenizer is None:
        return Vocabulary("none")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refusal(f"{type(tokenizer).__name__} has no tokenizer.json")
    spec: dict[str, Any] = json.loads(backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise _refusal(f"its model is {model.get('type')}, and byte pair encoding alone is known")
    if len(tokenizer) > rows:
        raise _refusal(f"it has {len(tokenizer)} tokens and the embedding {rows} rows")
    pieces = {
        "tokens": _texts(tokenizer, rows),
        "kinds": _kinds(tokenizer, spec, rows),
        "adds": _added(tokenizer),
        **_special(tokenizer, config, rows),
    }
    if model.get("byte_fallback"):
        scores = _scores(model, rows)
        prefix = _space_prefix(spec)
        pieces["merges"] = ()
        return Vocabulary("llama", "default", scores=scores, space_prefix=prefix, **pieces)
    return Vocabulary("gpt2", _split(spec), **pieces)


def _refusal(reason: str) -> Unsupported:
    return Unsupported(
        f"the tokenizer cannot be converted for llama.cpp: {reason}. Write the model without one "
        "(`wrap_model(model.module, name=..., tokenizer=None)`: the file then takes numbers of "
        "tokens), or convert it with llama.cpp's convert_hf_to_gguf.py and export 'llama-quantize'."
    )


def _texts(tokenizer: Any, rows: int) -> tuple[str, ...]:
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    return tuple(texts.get(number, f"[PAD{number}]") for number in range(rows))


def _kinds(tokenizer: Any, spec: Mapping[str, Any], rows: int) -> tuple[int, ...]:
    kind = require_gguf("writing a vocabulary").TokenType
    known = set(tokenizer.get_vocab().values())
    kinds = [int(kind.NORMAL if n in known else kind.UNUSED) for n in range(rows)]
    if spec["model"].get("byte_fallback"):
        for text, number in tokenizer.get_vocab().items():
            if _BYTE.fullmatch(text):
                kinds[number] = int(kind.BYTE)
        unknown = spec["model"].get("unk_token")
        if unknown is not None:
            kinds[tokenizer.get_vocab()[unknown]] = int(kind.UNKNOWN)
    for token in spec.get("added_tokens") or ():
        if kinds[token["id"]] != int(kind.UNKNOWN):
            special = kind.CONTROL if token["special"] else kind.USER_DEFINED
            kinds[token["id"]] = int(special)
    return tuple(kinds)


def _added(tokenizer: Any) -> dict[str, bool]:
    """Return which tokens encoding a text adds, as it really happens."""
    numbers = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    added = len(numbers) - len(plain)
    first = added > 0 and bos is not None and numbers[0] == bos
    last = added > first and eos is not None and numbers[-1] == eos
    if added != first + last:
        raise _refusal(f"encoding a text adds {added} tokens that are not just bos and eos")
    return {"bos": bool(first), "eos": bool(last)}


def _special(tokenizer: Any, config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Return special identifiers, merges and chat template, as gguf-py reads them from files."""
    gguf = require_gguf("writing a vocabulary")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        with _quiet():
            found = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    template = found.chat_template if isinstance(found.chat_template, str) else None
    return {
        "ids": dict(found.special_token_ids),
        "merges": tuple(found.merges),
        "chat_template": template,
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep gguf-py from warning of what it guesses about added tokens: `_added` asks instead."""
    logger = logging.getLogger("gguf.vocab")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _split(spec: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way in which text is split before merging."""
    normalizer = spec.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise _refusal(
            f"it normalizes text with {json.dumps(normalizer, ensure_ascii=False)[:200]}"
        )
    steps = tuple(_described(step) for step in _steps(spec.get("pre_tokenizer")))
    name = SPLITS.get(steps)
    if name is None:
        shown = " then ".join(steps) or "nothing"
        raise _refusal(f"text is split before merging by {shown}, for which llama.cpp has no name")
    if bool(spec["model"].get("ignore_merges")) != (name in _WHOLE_TOKENS_FIRST):
        raise _refusal(
            f"ignore_merges is {spec['model'].get('ignore_merges')!r}, and llama.cpp does the "
            f"opposite for text that is split as {name!r}"
        )
    return name


def _steps(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [step for part in spec["pretokenizers"] for step in _steps(part)]
    return [spec]


def _described(step: Mapping[str, Any]) -> str:
    """Return one step of splitting in words, so that equal words mean equal steps."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel with its own pattern" if step.get("use_regex", True) else _BYTES
    if kind == "Digits" and step.get("individual_digits"):
        return "Digits one by one"
    pattern = step.get("pattern", {}).get("Regex") if kind == "Split" else None
    if pattern is not None and step.get("behavior") == "Isolated" and not step.get("invert"):
        return f"Split {pattern}"
    return json.dumps(step, ensure_ascii=False, sort_keys=True)[:200]


def _scores(model: Mapping[str, Any], rows: int) -> tuple[float, ...]:
    """Return scores that merge in the order of the merges: minus the place of a token's first one.

    llama.cpp merges the pair whose token has the highest score, HF the pair that stands first.
    """
    vocabulary: Mapping[str, int] = model["vocab"]
    scores = [0.0] * rows
    place = 0
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        number = vocabulary.get(left + right)
        if number is not None and scores[number] == 0.0:
            place += 1
            scores[number] = -float(place)
    return tuple(scores)


def _space_prefix(spec: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text by a tokenizer of SentencePiece's kind."""
    found: list[bool] = []
    normalizer = spec.get("normalizer") or {}
    parts = normalizer.get("normalizers", [normalizer] if normalizer else [])
    for part in parts:
        kind = part.get("type")
        if kind == "Prepend" and part.get("prepend") == SPACE:
            found.append(True)
        elif kind != "Replace" or part.get("content") != SPACE:
            raise _refusal(f"it normalizes text with {json.dumps(part, ensure_ascii=False)[:200]}")
    for step in _steps(spec.get("pre_tokenizer")):
        if step.get("type") != "Metaspace" or step.get("replacement") != SPACE or step.get("split"):
            raise _refusal(f"text is split before merging by {_described(step)}")
        found.append(step.get("prepend_scheme") in ("first", "always"))
    return any(found)
