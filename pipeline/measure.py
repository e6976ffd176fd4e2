"""Wall time and peak memory of a stage."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType

import psutil

INTERVAL = 0.05  # seconds between samples of the resident memory


class Meter:
    """Context manager: `seconds`, `peak_memory_bytes` of this process and its children, and the same on CUDA."""

    def __enter__(self) -> Meter:
        self.peak_memory_bytes = 0
        self.peak_cuda_bytes: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = time.monotonic()
        self._cuda = _cuda()
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._start
        self._cuda = _cuda()
        if self._cuda is not None:
            self.peak_cuda_bytes = int(self._cuda.max_memory_allocated())

    def _watch(self) -> None:
        me = psutil.Process()
        while True:
            self.peak_memory_bytes = max(self.peak_memory_bytes, _resident(me))
            if self._done.wait(INTERVAL):
                return


def _resident(process: psutil.Process) -> int:
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue  # it ended between listing and reading
    return total


def _cuda():
    torch = sys.modules.get("torch")  # never import it just to measure
    return torch.cuda if torch is not None and torch.cuda.is_available() else None
