"""Runs on two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run_alone(*arguments: str, folder: Path | None = None) -> str:
    """Run Python with these arguments, which must end well, and return what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        # A script finds what the tests share; two processes do not look for two accelerators.
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": str(Path(__file__).parent),
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_on_two(*arguments: str, folder: Path | None = None) -> str:
    """Run a script or `-m MODULE` on two processes, and return what they printed."""
    return run_alone(*TORCHRUN, *arguments, folder=folder)
