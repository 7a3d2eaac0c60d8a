"""Wall time and peak memory of the phases of an adaptation, and their names on a GPU's timeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int | None:
    """A memory field of /proc/self/status in bytes, None where the system has no such file."""
    try:
        text = _STATUS.read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def _reset_peak_resident() -> bool:
    """Start a new peak of the resident set; False where the kernel does not offer it."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def annotate(name: str, device: torch.device) -> AbstractContextManager[None]:
    """Show the body as a range of that name on Nsight's timeline; nothing where there is no GPU."""
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


class Phases:
    """Accumulate milliseconds and peak bytes of named phases, ``with phases("forward"): ...``.

    On the CPU time is wall time and memory is the peak of the resident set (Linux only); on CUDA
    time is between two events on the current stream, read without a synchronisation until asked
    for, and memory is the allocator's. There a phase is a range of Nsight's timeline, too.

    Args:
        device: where the work runs.

    Attributes:
        peak_bytes: phase -> highest bytes above those at construction; None where it cannot be
            measured.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.peak_bytes: dict[str, int | None] = {}
        self._ms: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._base_bytes = self._current_bytes()

    @property
    def ms(self) -> dict[str, float]:
        """Phase -> milliseconds so far. Synchronises on CUDA."""
        for name, start, end in self._events:
            end.synchronize()
            self._ms[name] = self._ms.get(name, 0.0) + start.elapsed_time(end)
        self._events.clear()
        return dict(self._ms)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure the body as (one more part of) phase ``name``, also when it raises."""
        with annotate(name, self.device), self._measured(name):
            yield

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                # Nothing runs, and an event that goes into a graph has no time.
                yield
                return
            torch.cuda.reset_peak_memory_stats(self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            try:
                yield
            finally:
                end.record()
                self._events.append((name, start, end))
                self._note_peak(name, torch.cuda.max_memory_allocated(self.device))
            return
        measurable = _reset_peak_resident()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._ms[name] = self._ms.get(name, 0.0) + 1e3 * (time.perf_counter() - began)
            self._note_peak(name, _status_bytes("VmHWM") if measurable else None)

    def _current_bytes(self) -> int | None:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status_bytes("VmRSS")

    def _note_peak(self, name: str, peak: int | None) -> None:
        if peak is None or self._base_bytes is None:
            self.peak_bytes[name] = None
            return
        above = max(0, peak - self._base_bytes)
        self.peak_bytes[name] = max(above, self.peak_bytes.get(name) or 0)
