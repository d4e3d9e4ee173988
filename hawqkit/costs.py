"""What a stage costs: seconds, and the peak of memory, sampled beside the work."""

from __future__ import annotations

import threading
import time
from types import TracebackType

import psutil
import torch

SAMPLE_SECONDS = 0.01


class Meter:
    """Measures a `with` block.

    On a CPU the peak is of the process's resident memory, sampled every 10 ms; on an accelerator it
    is the allocator's own peak on that device.

    Attributes:
        seconds: wall-clock time, also while the block still runs.
        peak_bytes: highest memory seen so far.
        start_bytes: memory at the beginning, so that the difference is what the block needed.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._on_accelerator = torch.device(device).type != "cpu"
        self._device = torch.device(device)
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._started = self._ended = 0.0
        self.start_bytes = self.peak_bytes = 0

    def __enter__(self) -> Meter:
        """Begin to measure."""
        self._started = time.perf_counter()
        if self._on_accelerator:
            torch.accelerator.reset_peak_memory_stats(self._device)
            self.start_bytes = int(torch.accelerator.memory_allocated(self._device))
            return self
        self.start_bytes = self.peak_bytes = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop measuring; nothing is swallowed."""
        if self._on_accelerator:
            torch.accelerator.synchronize(self._device)
            self.peak_bytes = int(torch.accelerator.max_memory_allocated(self._device))
        else:
            self._note()
        self._ended = time.perf_counter()
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def seconds(self) -> float:
        """Seconds since the block began, or that it took."""
        return (self._ended or time.perf_counter()) - self._started

    @property
    def extra_bytes(self) -> int:
        """Peak beyond what was there at the beginning."""
        return max(self.peak_bytes - self.start_bytes, 0)

    def _note(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._note()


def available_bytes(device: str) -> int:
    """Return the memory that is free for use on a device."""
    if torch.device(device).type == "cpu":
        return int(psutil.virtual_memory().available)
    free, _ = torch.accelerator.get_memory_info(torch.device(device))
    return int(free)
