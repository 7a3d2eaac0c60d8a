"""Interleaved measurement: baseline and ours take turns, so that a noisy minute hits both.

    pytest bench -o python_files='bench_*.py' --benchmark-enable --benchmark-json=result.json

Every side of a comparison becomes one entry of pytest-benchmark's table and JSON, with bytes moved,
GB/s and the share of the copy bandwidth of the same rounds in its ``extra_info``.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch

from ttt_fast import ops

COPY_BYTES = 1 << 28


# What is compared: name -> (function to time, bytes that it reads and writes, 0 where unknown).
Sides = dict[str, tuple[Callable[[], Any], int]]


def _copy_sides() -> Sides:
    """The machine's copy bandwidth: one large tensor, plain stores and streaming stores."""
    src = torch.ones(COPY_BYTES // 4)
    dst = torch.zeros_like(src)
    return {
        "copy (torch)": (lambda: dst.copy_(src), 2 * COPY_BYTES),
        "copy (streaming)": (lambda: ops.copy_([dst], [src]), 2 * COPY_BYTES),
    }


def interleave(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Run all sides in turn, ``rounds`` times after one warm-up; seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run, _ in sides.values():
        run()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, (run, _) in sides.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., float | None]:
    """Return ``compare(group, sides, baseline=..., rounds=...)``; it measures and records.

    It returns the copy bandwidth in bytes a second, None where benchmarks are disabled.
    """

    def run(group: str, sides: Sides, baseline: str, rounds: int = 15) -> float | None:
        if benchmark.disabled:
            for function, _ in sides.values():
                function()
            benchmark(lambda: None)
            return None
        copies = _copy_sides()
        everything = copies | sides
        seconds = interleave(everything, rounds)
        copy_rate = max(moved / median(seconds[name]) for name, (_, moved) in copies.items())
        for name, (_, moved) in everything.items():
            typical = median(seconds[name])
            benchmark.group = group
            benchmark.name = benchmark.fullname = f"{request.node.name}: {name}"
            benchmark.extra_info = {
                "side": name,
                "speedup": median(seconds[baseline]) / typical,
                "baseline": baseline,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
            }
            if moved:
                benchmark.extra_info |= {
                    "moved_bytes": moved,
                    "gb_per_s": moved / typical / 1e9,
                    "share_of_copy_bandwidth": moved / typical / copy_rate,
                }
            # The public interface times one function; this records what was timed elsewhere.
            benchmark._mode = "interleaved"
            stats = benchmark._make_stats(1)
            for value in seconds[name]:
                stats.update(value)
        _print_table(group, seconds, everything, copy_rate, baseline)
        return copy_rate

    return run


def _print_table(
    group: str,
    seconds: dict[str, list[float]],
    sides: Sides,
    copy_rate: float,
    baseline: str,
) -> None:
    """Print median, spread, speed-up and bandwidth of each side."""
    threads = torch.get_num_threads()
    print(f"\n{group}   (copy bandwidth {copy_rate / 1e9:.1f} GB/s, {threads} threads)")
    columns = ("median ms", "min ms", "max ms", "speed-up", "GB/s", "of copy")
    print(" " * 34 + "".join(f"{column:>10}" for column in columns))
    for name, values in seconds.items():
        typical = median(values)
        line = f"{name:34}{typical * 1e3:10.1f}{min(values) * 1e3:10.1f}{max(values) * 1e3:10.1f}"
        line += f"{median(seconds[baseline]) / typical:9.2f}x"
        moved = sides[name][1]
        if moved:
            line += f"{moved / typical / 1e9:10.1f}{moved / typical / copy_rate:10.0%}"
        print(line)
