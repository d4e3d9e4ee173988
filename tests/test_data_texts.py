from __future__ import annotations

import json

import pico
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hawqkit.errors import DataError, HawqkitError
from hawqkit.models import texts
from hawqkit.models.batches import load_batches
from hawqkit.models.model import wrap_model
from hawqkit.models.texts import load_documents

CHAT = [
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cde"},
    {"role": "user", "content": "f"},
    {"role": "assistant", "content": "gh"},
]


def model(**options):
    return wrap_model(pico.llama(), name="pico", tokenizer=pico.tokenizer(**options))


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\n\ntwo é".encode())
    documents = load_documents(str(path))
    assert list(documents.items) == ["one\n\ntwo é"]
    assert documents.name == str(path)


def test_rows_keep_their_order_and_empty_ones_are_left_out(tmp_path):
    path = jsonl(
        tmp_path / "a.jsonl",
        [{"text": "one\u2028x"}, {"text": ""}, {"text": None}, {"text": "two"}],
    )
    assert list(load_documents(path).items) == ["one\u2028x", "two"]


def test_parquet_and_named_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["one", "two"], "n": [1, 2], "messages": [CHAT, CHAT]}), path)
    assert list(load_documents(str(path), column="body").items) == ["one", "two"]
    assert load_documents(str(path)).items[0] == CHAT
    with pytest.raises(DataError, match=r"row 1: column 'n' holds int"):
        load_documents(str(path), column="n")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_missing_column_lists_the_columns_there_are(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        jsonl(path, [{"txet": "a", "id": 1}])
    else:
        pq.write_table(pa.table({"txet": ["a"], "id": [1]}), path)
    with pytest.raises(DataError, match=r"neither.*'txet', 'id'.*Did you mean 'txet'"):
        load_documents(str(path))
    with pytest.raises(DataError, match=r"no column 'body'; the columns are 'txet', 'id'"):
        load_documents(str(path), column="body")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_missing_and_empty_files_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="there is no such file"):
        load_documents(str(tmp_path / name))
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="the file is empty"):
        load_documents(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n ", "nothing but white space"),
        ("a.txt", b"abc\xff", "byte 3 is not UTF-8"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: got list"),
        ("a.jsonl", b'{"text": ""}\n', "holds no documents"),
        ("a.jsonl", b'{"text": 3}\n', "row 1: column 'text' holds int"),
        ("a.jsonl", b'{"text": [3]}\n', "list of messages with `role`"),
        ("a.jsonl", b'{"text": "a"}\n{"text": [{"role": "user", "content": "x"}]}\n', "mixes"),
        ("a.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("a.csv", b"text\nx\n", "no text file"),
    ],
)
def test_bad_content_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_documents(str(tmp_path / name))


def test_folder_and_needless_options_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abc")
    with pytest.raises(DataError, match="a folder"):
        load_documents(str(tmp_path))
    with pytest.raises(DataError, match="no column 'x'"):
        load_documents(str(path), column="x")
    with pytest.raises(DataError, match="config 'x'"):
        load_documents(str(path), config="x")
    with pytest.raises(DataError, match="no column 'x'"):
        load_documents("builtin", column="x")
    with pytest.raises(DataError, match=r"no split 'heldout'.*Did you mean 'held-out'"):
        load_documents("builtin", split="heldout")
    with pytest.raises(DataError, match="no split 'test'"):
        load_documents(str(path), split="test")


def test_data_set_without_a_network_is_answered_at_once(monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(texts, "reachable", lambda endpoint: False)
    with pytest.raises(HawqkitError, match="cannot be reached") as caught:
        load_documents("owner/data")
    assert caught.value.exit_code == 1


def test_data_set_that_is_not_in_the_cache_fails_offline_in_one_sentence():
    with pytest.raises(HawqkitError, match="owner/data") as caught:
        load_documents("owner/data")
    assert "\n" not in str(caught.value)


def hub(monkeypatch, splits, columns):
    """Let `datasets` answer from memory, and record what it was asked."""
    import datasets

    asked = []

    def load(source, config, split):
        asked.append((source, config, split))
        return datasets.Dataset.from_dict(columns)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda source, config: splits)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_data_set_is_asked_by_id_config_split_and_column(monkeypatch):
    asked = hub(monkeypatch, ["train", "dev"], {"body": ["one", "two"]})
    documents = load_documents("owner/data", split="dev[:10%]", config="en", column="body")
    assert asked == [("owner/data", "en", "dev[:10%]")]
    assert documents.name == "owner/data:en:dev[:10%]"
    assert list(documents.items) == ["one", "two"]


def test_roles_stand_for_a_data_sets_usual_splits_and_the_record_says_which(monkeypatch):
    hub(monkeypatch, ["train", "validation"], {"text": ["one"]})
    assert load_documents("owner/data").name == "owner/data:train"
    assert load_documents("owner/data", split="held-out").name == "owner/data:validation"
    with pytest.raises(DataError, match=r"no split 'tarin'.*train, validation.*'train'"):
        load_documents("owner/data", split="tarin")
    hub(monkeypatch, ["train"], {"text": ["one"]})
    with pytest.raises(DataError, match="no split 'held-out'"):
        load_documents("owner/data", split="held-out")


def chats(tmp_path, rows=None):
    return jsonl(tmp_path / "chat.jsonl", [{"messages": row} for row in (rows or [CHAT])])


def counted_text(found, tokenizer, row=0):
    return tokenizer.decode(found.tokens[row][found.counted[row]])


def test_chats_go_through_the_template(tmp_path):
    owner = model()
    found = load_batches(chats(tmp_path), owner, sequences=1, length=64, packing="padded")
    text = owner.tokenizer.decode(found.tokens[0][found.attention[0]])
    assert text == "[u]ab[/u][a]cde[/a][u]f[/u][a]gh[/a]"
    assert found.facts.counted == found.facts.tokens - 1


@pytest.mark.parametrize("template", [pico.CHAT_TEMPLATE, pico.PLAIN_CHAT_TEMPLATE])
def test_answers_alone_are_counted_with_and_without_marks_in_the_template(tmp_path, template):
    owner = model(chat_template=template)
    found = load_batches(
        chats(tmp_path), owner, sequences=1, length=64, packing="padded", answers_only=True
    )
    assert counted_text(found, owner.tokenizer) == "cde[/a]gh[/a]"


def test_packed_chats_keep_their_masks_and_separators_are_not_counted(tmp_path):
    owner = model()
    path = chats(tmp_path, [CHAT] * 4)
    found = load_batches(path, owner, sequences=1, length=34, answers_only=True)
    assert counted_text(found, owner.tokenizer) == "cde[/a]gh[/a]" * 2
    assert (found.tokens == owner.tokenizer.eos_token_id).sum() == 2


def test_sequences_without_any_answer_are_left_out(tmp_path):
    path = chats(tmp_path, [[{"role": "user", "content": "only a question"}], CHAT])
    options = {"length": 64, "packing": "padded", "answers_only": True}
    found = load_batches(path, model(), sequences=1, **options)
    assert found.document.tolist() == [1]
    with pytest.raises(DataError, match="there are 1"):
        load_batches(path, model(), sequences=2, **options)


def test_answers_of_plain_text_and_chats_without_a_template_are_refused(tmp_path):
    with pytest.raises(DataError, match="answers_only needs chats"):
        load_batches("builtin", model(), sequences=1, length=16, answers_only=True)
    with pytest.raises(DataError, match="no chat template"):
        load_batches(chats(tmp_path), model(chat_template=None), sequences=1, length=16)


def test_template_that_refuses_or_rewrites_a_chat_is_named(tmp_path):
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"document 0.*roles must alternate"):
        load_batches(chats(tmp_path), model(chat_template=refusing), sequences=1, length=16)
    rewriting = "{{ messages|length }}" + pico.PLAIN_CHAT_TEMPLATE
    with pytest.raises(DataError, match="rewrites earlier turns"):
        load_batches(
            chats(tmp_path),
            model(chat_template=rewriting),
            sequences=1,
            length=64,
            packing="padded",
            answers_only=True,
        )
