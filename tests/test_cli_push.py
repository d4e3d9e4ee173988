"""Pushing an export: into a folder, and to an endpoint that answers as a hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pico
import pytest
import yaml
from command_line import RECIPE, invoke, succeed
from huggingface_hub import HfApi, constants

from hawqkit.report.model_card import published_recipe


class Hub(BaseHTTPRequestHandler):
    """Repositories in memory: creation, the question how to upload, and commits."""

    server: Any

    def do_POST(self) -> None:
        """Answer one request."""
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        self.server.asked.append((self.path, self.headers.get("authorization")))
        if self.server.refuses:
            self._answer({"error": "no"}, self.server.refuses)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self._answer({"url": f"http://{self.headers['Host']}/me/tiny"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self._answer({"files": files})
        elif "/commit/" in self.path:
            self.server.commits.append([json.loads(line) for line in body.splitlines()])
            url = f"http://{self.headers['Host']}/me/tiny/commit/1"
            self._answer({"commitUrl": url, "commitOid": "1", "success": True})

    def do_GET(self) -> None:
        """Know nothing."""
        self._answer({}, 404)

    def _chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        return whole

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.made, server.commits, server.refuses = [], [], [], 0
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(
        "huggingface_hub.HfApi", lambda: HfApi(endpoint=endpoint, token="hf_secret")
    )
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    pico.save(folder / "model")
    text = RECIPE.replace("source: model", f"source: {folder / 'model'}")
    (folder / "small.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HAWQKIT_CACHE", str(folder / "cache"))
        succeed("run", "small.yaml", "-o", "run")
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


TARGET = ("export", "run", "--target", "compressed-tensors")


def test_the_folder_holds_the_export_with_a_model_card_and_no_path_of_this_machine(
    here: Path,
) -> None:
    output = succeed(*TARGET, "--stage", "staged").output
    assert "laid out in staged" in output
    staged = {p.relative_to(here / "staged").as_posix() for p in (here / "staged").rglob("*")}
    export = here / "run/exports/compressed-tensors"
    assert {p.name for p in export.iterdir()} <= staged
    assert {"hawqkit/recipe.yaml", "hawqkit/allocation.json"} <= staged
    weights = "model.safetensors"
    assert (here / "staged" / weights).read_bytes() == (export / weights).read_bytes()
    card = (here / "staged/README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "transformers"
    assert {"hawqkit", "compressed-tensors"} <= set(head["tags"])
    assert "base_model" not in head  # a folder is no model of the hub
    assert "AutoModelForCausalLM.from_pretrained" in card
    assert "| uniform |" in card
    assert "KL on held-out" in card
    for path in (here / "staged").rglob("*"):
        if path.suffix in (".md", ".yaml", ".json"):
            assert str(here) not in path.read_text(), path.name
    succeed(*TARGET, "--stage", "staged")  # again: replaced


def test_everything_goes_into_one_commit_of_a_private_repository(here: Path, hub: Any) -> None:
    output = succeed(*TARGET, "--push", "me/tiny", "--stage", "other").output
    assert "pushed to http" in output
    (made,) = hub.made
    assert made["name"] == "tiny"
    assert made.get("private", made.get("visibility")) in (True, "private")
    (commit,) = hub.commits
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"])
        for line in commit
        if line["key"] == "file"
    }
    laid_out = {
        p.relative_to(here / "other").as_posix(): p.read_bytes()
        for p in (here / "other").rglob("*")
        if p.is_file()
    }
    assert files == laid_out
    assert all(token == "Bearer hf_secret" for _, token in hub.asked)


def test_a_hub_that_refuses_or_is_not_there_ends_with_what_to_do(
    here: Path, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.refuses = 403
    done = invoke(*TARGET, "--push", "me/tiny")
    assert done.exit_code == 2
    assert "refuses the token (403)" in done.output
    hub.refuses = 500
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    done = invoke(*TARGET, "--push", "me/tiny")
    assert done.exit_code == 1
    assert "the hub answered 500" in done.output
    assert hub.commits == []
    monkeypatch.setattr(
        "huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="x")
    )
    done = invoke(*TARGET, "--push", "me/tiny")
    assert done.exit_code == 1
    assert "cannot be reached, and nothing was committed" in done.output
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in invoke(*TARGET, "--push", "me/tiny").output
    for wrong in ("tiny", "a/b/c", "../x", "me/"):
        done = invoke(*TARGET, "--push", wrong)
        assert done.exit_code == 2
        assert "write USER/NAME" in done.output
    assert invoke(*TARGET, "--public").exit_code == 2


def test_a_published_recipe_has_no_folders() -> None:
    shown = yaml.safe_load(published_recipe("a: {b: [/x/y/z, ~/q, plain/name]}\nc: 3\n"))
    assert shown == {"a": {"b": ["z", "q", "plain/name"]}, "c": 3}
