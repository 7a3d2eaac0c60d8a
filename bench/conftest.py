"""Interleaved measurement: baseline and ours take turns, so that a noisy minute hits both.

    pytest bench -o python_files='bench_*.py' --benchmark-enable --benchmark-json=result.json

Every side of a comparison becomes one entry of pytest-benchmark's table and JSON, with bytes moved,
GB/s and the share of the copy bandwidth of the same rounds in its ``extra_info``.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch

from bench.shapes import AMOUNT, SMALL
from ttt_fast import ops
from ttt_fast.engines import policy

COPY_BYTES = 1 << (16 if SMALL else 28)
GEMM_ROWS = 64 if SMALL else 1024
ROUNDS = {"quick": 5, "full": 15, "small": 1}[AMOUNT]


class Side(NamedTuple):
    """What is compared.

    Attributes:
        run: the function to time.
        moved: bytes that it has to read and write, 0 where that says little.
        operations: multiplications and additions, 0 where that says little.
    """

    run: Callable[[], Any]
    moved: int = 0
    operations: float = 0


# Name -> a Side, or as much of one as is known.
Sides = dict[str, tuple[Any, ...]]


def _copy_sides() -> dict[str, Side]:
    """The machine's copy bandwidth: one large tensor, plain stores and streaming stores."""
    src = torch.ones(COPY_BYTES // 4)
    dst = torch.zeros_like(src)
    return {
        "copy (torch)": Side(lambda: dst.copy_(src), 2 * COPY_BYTES),
        "copy (streaming)": Side(lambda: ops.copy_([dst], [src]), 2 * COPY_BYTES),
    }


def gemm_sides(dtype: torch.dtype) -> dict[str, Side]:
    """The machine's GEMM rate: a product of square matrices."""
    a, b = torch.ones(2, GEMM_ROWS, GEMM_ROWS, dtype=dtype)
    return {"gemm (torch)": Side(lambda: a @ b, 0, 2 * GEMM_ROWS**3)}


def compiled(
    run: Callable[[], Any], moved: int = 0, operations: float = 0, backend: str = "inductor"
) -> Sides:
    """Return a side of ``torch.compile`` in a full run; compiling an update takes minutes."""
    if AMOUNT != "full":
        return {}
    torch.compiler.reset()
    return {"torch compile": (torch.compile(run, backend=backend), moved, operations)}


def not_run(benchmark: Any, what: str, needed_bytes: int) -> bool:
    """Say that ``what`` is not run, if it needs more memory than there is."""
    free = policy.free_bytes()
    if free is None or needed_bytes <= 0.8 * free:
        return False
    reason = f"{needed_bytes / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB there are"
    note(benchmark, {"what": what, "not_run": reason})
    print(f"\n{what}: not run, it needs {reason}")
    return True


def interleave(
    sides: Sides, rounds: int, warm_up: Iterable[Callable[[], Any]] | None = None
) -> dict[str, list[float]]:
    """Run all sides in turn, ``rounds`` times after a warm-up; seconds of each.

    Args:
        sides: what is compared.
        rounds: how often.
        warm_up: what runs before the first round; default each side once.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in [run for run, *_ in sides.values()] if warm_up is None else warm_up:
        run()
    with no_collection():
        for _ in range(rounds):
            for name, (run, *_) in sides.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return seconds


@contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def imported_objects_stay() -> None:
    """Collecting what was imported takes a quarter of a second, before every comparison."""
    gc.collect()
    gc.freeze()


def note(benchmark: Any, info: dict[str, Any]) -> None:
    """Leave ``info`` in the JSON; the time beside it is of nothing."""
    benchmark.extra_info = info
    benchmark.pedantic(lambda: None)


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return ``compare(group, sides, baseline=..., dtype=...)``; it measures and records.

    With ``operations`` in a side, the GEMM rate in ``dtype`` is measured in the same rounds.
    """

    def run(group: str, sides: Sides, baseline: str, dtype: torch.dtype = torch.float32) -> None:
        named = {name: Side(*side) for name, side in sides.items()}
        if benchmark.disabled:
            for side in named.values():
                side.run()
            benchmark.pedantic(lambda: None)
            return
        copies = _copy_sides()
        products = gemm_sides(dtype) if any(side.operations for side in named.values()) else {}
        everything = copies | products | named
        seconds = interleave(everything, ROUNDS)
        typical = {name: median(values) for name, values in seconds.items()}
        copy_rate = max(side.moved / typical[name] for name, side in copies.items())
        gemm_rate = max((s.operations / typical[name] for name, s in products.items()), default=0.0)
        for name, side in everything.items():
            benchmark.group = group
            benchmark.name = benchmark.fullname = f"{request.node.name}: {name}"
            benchmark.extra_info = {
                "side": name,
                "speedup": typical[baseline] / typical[name],
                "baseline": baseline,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
                **rates(side, typical[name], copy_rate, gemm_rate),
            }
            # The public interface times one function; this records what was timed elsewhere.
            benchmark._mode = "interleaved"
            stats = benchmark._make_stats(1)
            for value in seconds[name]:
                stats.update(value)
        print(f"\n{group}   (copy bandwidth {copy_rate / 1e9:.1f} GB/s", end="")
        print(f", GEMM {gemm_rate / 1e9:.0f} Gflop/s" if gemm_rate else "", end="")
        print(f", {torch.get_num_threads()} threads)")
        _print_rows(seconds, everything, (copy_rate, gemm_rate), baseline)

    return run


def rates(side: Side, seconds: float, copy_rate: float, gemm_rate: float) -> dict[str, float]:
    """Bytes and operations a second, and their shares of what the machine does at best."""
    found: dict[str, float] = {}
    if side.moved:
        rate = side.moved / seconds
        found |= {"moved_bytes": side.moved, "gb_per_s": rate / 1e9}
        found["share_of_copy_bandwidth"] = rate / copy_rate
    if side.operations:
        rate = side.operations / seconds
        found |= {"operations": side.operations, "gflop_per_s": rate / 1e9}
        found["share_of_gemm_rate"] = rate / gemm_rate
    return found


def _print_rows(
    seconds: dict[str, list[float]],
    sides: dict[str, Side],
    best: tuple[float, float],
    baseline: str,
) -> None:
    """Print median, spread, speed-up, and bandwidth and rate of each side."""
    columns = ("median ms", "min ms", "max ms", "speed-up", "GB/s", "of copy", "of GEMM")
    print(" " * 34 + "".join(f"{column:>10}" for column in columns))
    for name, values in seconds.items():
        typical = median(values)
        line = f"{name:34}"
        line += "".join(f"{1e3 * value:10.3g}" for value in (typical, min(values), max(values)))
        line += f"{median(seconds[baseline]) / typical:9.2f}x"
        found = rates(sides[name], typical, *best)
        for key, form in (
            ("gb_per_s", "10.1f"), ("share_of_copy_bandwidth", "10.0%"),
            ("share_of_gemm_rate", "10.0%"),
        ):  # fmt: skip
            line += format(found[key], form) if key in found else " " * 10
        print(line)
