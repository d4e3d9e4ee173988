"""Bad calibration and held-out text, from the command line to the exit code."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pico
import pyarrow
import pyarrow.parquet
import pytest
from command_line import RECIPE, refuse, sets


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("texts")
    (home / "r.yaml").write_text(RECIPE)
    pico.save(home / "model")
    (home / "empty.txt").write_text("")
    (home / "white.txt").write_text(" \n\t\n")
    (home / "binary.txt").write_bytes(b"\xff\xfe\x00\x81" * 40)
    (home / "short.txt").write_text("a few words")
    (home / "rows.jsonl").write_text('{"body": "some words"}\n' * 20)
    (home / "cut.jsonl").write_text('{"text": "some words"}\n{"text": "so')
    (home / "numbers.jsonl").write_text('{"text": 3}\n' * 20)
    (home / "empty.jsonl").write_text("\n\n")
    (home / "fake.parquet").write_bytes(b"PAR1 and then nothing")
    table = pyarrow.table({"body": ["some words"] * 20})
    pyarrow.parquet.write_table(table, home / "rows.parquet")
    return home


@pytest.fixture
def here(texts: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(texts)
    return texts


TEXTS = {
    "missing file": (["source=none.txt"], "none.txt: there is no such file"),
    "empty file": (["source=empty.txt"], "empty.txt: the file is empty"),
    "white space": (["source=white.txt"], "nothing but white space"),
    "not UTF-8": (["source=binary.txt"], "is not UTF-8"),
    "no rows": (["source=empty.jsonl"], "the file holds no rows"),
    "not JSON": (["source=cut.jsonl"], "cut.jsonl, line 2: not JSON"),
    "no text in it": (["source=numbers.jsonl"], "holds int"),
    "not Parquet": (["source=fake.parquet"], "not a readable Parquet file"),
    "missing column": (["source=rows.jsonl"], "the columns are 'body'"),
    "column of another name": (["source=rows.parquet", "column=bodi"], "Did you mean 'body'?"),
    "too short": (["source=short.txt"], "too little text"),
    "a folder": (["source=model"], "this is a folder"),
}


@pytest.mark.parametrize("section", ["calibration", "held_out", "other_texts.more"])
@pytest.mark.parametrize("what", TEXTS)
def test_bad_text_is_refused_and_nothing_is_written(here: Path, section: str, what: str) -> None:
    assignments, words = TEXTS[what]
    overrides = [f"{section}.{assignment}" for assignment in assignments]
    if section == "calibration":
        overrides.append("calibration.withheld=0")
    refuse(here, "run", "r.yaml", *sets(*overrides), words=words)


def test_too_little_text_says_how_much_there_is(here: Path) -> None:
    overrides = sets("calibration.source=short.txt", "calibration.withheld=0")
    message = refuse(here, "run", "r.yaml", *overrides, words="4 sequences of 32 tokens")
    assert "1 documents with 11 tokens" in message  # the pico tokenizer's tokens are characters
    message = refuse(here, "run", "r.yaml", *sets("held_out.sequences=50000"), words="too little")
    assert re.search(r"there are \d+: 58 documents with [\d,]+ tokens", message)


def test_several_bad_texts_are_told_at_once(here: Path) -> None:
    overrides = sets(
        "calibration.source=none.txt", "held_out.source=empty.txt", "formats=[int4-g128]"
    )
    message = refuse(here, "run", "r.yaml", *overrides, words="3 problems")
    assert "none.txt" in message
    assert "empty.txt" in message
    assert "64 columns" in message


def test_one_file_under_two_spellings_is_one_text(here: Path) -> None:
    (here / "both.txt").write_text("some words of one text. " * 60)
    overrides = sets(
        "calibration.source=both.txt", "calibration.withheld=0", "held_out.source=./both.txt"
    )
    refuse(here, "run", "r.yaml", *overrides, words="is the text of calibration too")


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch, home: Path, headers: dict[str, str]) -> Iterator[None]:
    """Let every request of the hub's clients be answered with 404 and these headers."""
    import datasets
    from huggingface_hub import constants

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("key", ["model.source", "calibration.source"])
@pytest.mark.parametrize(
    ("headers", "code"),
    [({"X-Error-Code": "RepoNotFound"}, 2), ({}, 1)],
    ids=["the hub has no such thing", "a proxy answers in its place"],
)
def test_not_found_is_the_users_mistake_only_where_the_hub_itself_says_so(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    headers: dict[str, str],
    code: int,
) -> None:
    with hub(monkeypatch, tmp_path, headers):
        refuse(here, "run", "r.yaml", *sets(f"{key}=owner/name"), words="owner/name: ", code=code)


def test_a_connection_cut_short_ends_with_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    from hawqkit.models import texts as room

    def cut(*_: object) -> None:
        # What httpx raises when a server hangs up: of its own family, and no OSError.
        raise HfHubHTTPError.__bases__[0]("Server disconnected")

    monkeypatch.setattr(room, "reachable", lambda endpoint: True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", cut)
    overrides = sets("calibration.source=owner/name")
    refuse(here, "run", "r.yaml", *overrides, words="Server disconnected", code=1)
