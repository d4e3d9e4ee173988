"""What holds for every test: one thread, no network, and a cache that is not the user's."""

from __future__ import annotations

import os

# Before torch is imported: OpenMP reads these once. Several test processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from collections.abc import Generator
from pathlib import Path
from typing import Any

import consumer_matrix
import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

KEEPS_THE_USERS_CACHE = ("real", "targets")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def guarded_cache(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, shared_cache: Path
) -> None:
    """Point HAWQKIT_CACHE at a temporary folder, except for tests on the real model."""
    if not any(request.node.get_closest_marker(name) for name in KEEPS_THE_USERS_CACHE):
        monkeypatch.setenv("HAWQKIT_CACHE", str(shared_cache))


@pytest.fixture
def cache(guarded_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty folder that HAWQKIT_CACHE points at."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("HAWQKIT_CACHE", str(folder))
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Carry what a test of a consumer held in its report, where it survives other processes."""
    report = yield
    if item.get_closest_marker("targets") and (report.when == "call" or report.skipped):
        report.user_properties = [*report.user_properties, *consumer_matrix.taken(item)]
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the matrix of consumers, if tests of them ran."""
    outcomes = ("passed", "failed", "skipped", "error")
    reports = [r for name in outcomes for r in terminalreporter.stats.get(name, ())]
    lines = consumer_matrix.matrix(r for r in reports if hasattr(r, "user_properties"))
    if lines:
        terminalreporter.section("what was seen of each target")
        terminalreporter.write("\n".join(lines) + "\n")
