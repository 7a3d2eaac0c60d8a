"""Short prompts, one and 16 at once, on SmolLM2-135M: milliseconds of a step of one prompt.

Whole adaptations with restore: SGD with momentum 0.9, clip 10, all parameters in fp32 unless a row
says otherwise. "naive" is ``bench/naive.py``; "best stock" is the same loop with
``torch.optim.SGD(fused=True)``. The loop has one prompt at a time, so beside 16 prompts it runs two
of them, one in each round, and both sides are divided by the prompt-steps that they took.

Losses are compared before a time is recorded. Between four and five minutes on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peak_memory
from bench.conftest import Sides, interleave
from ttt_fast import TTTConfig, TTTTrainer, ops, select_parameters
from ttt_fast.demo import PROMPTS, load_demo_model
from ttt_fast.naive import naive_adapt

OPTIONS: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "max_grad_norm": 10.0}


@dataclass(frozen=True)
class Case:
    """One row, or one for each engine.

    Attributes:
        T: tokens of a prompt.
        K: steps.
        D: prompts adapted at once.
        scope: what adapts.
        dtype: of the weights.
        engines: which are measured.
        auto: say which of them engine="auto" takes.
        stock: measure the best stock torch, too.
        rounds: measured ones, after one to warm up.
    """

    T: int
    K: int
    D: int = 1
    scope: str = "all"
    dtype: torch.dtype = torch.float32
    engines: tuple[str, ...] = ("factored",)
    auto: bool = False
    stock: bool = False
    rounds: int = 2

    def __str__(self) -> str:
        who = "one prompt" if self.D == 1 else f"{self.D} prompts at once"
        dtype = str(self.dtype).removeprefix("torch.")
        only = "" if self.scope == "all" else f", {self.scope} only"
        return f"{who}, T = {self.T}, K = {self.K}, {dtype}{only}"


CASES = [
    Case(20, 10, stock=True, rounds=3),
    Case(20, 10, D=16),
    Case(20, 10, D=16, scope="attention"),
    Case(20, 10, D=16, scope="ffn"),
    Case(64, 10, engines=("dense", "factored")),
    Case(256, 4, engines=("dense", "factored"), auto=True),
    Case(20, 10, D=16, dtype=torch.bfloat16),
]


@cache
def load(dtype: torch.dtype) -> tuple[Any, Tensor]:
    """Return the model, and the ids of the built-in prompts one after the other."""
    model, tokenizer = load_demo_model(dtype)
    return model, torch.cat([torch.tensor(tokenizer(text).input_ids) for text in PROMPTS])


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_adapt_factored(benchmark: Any, case: Case) -> None:
    if benchmark.disabled:
        case = replace(case, K=2, D=min(case.D, 3), rounds=1)
    model, text = load(case.dtype)
    ids = text[: case.D * case.T].view(case.D, case.T)
    params = [selection.param for selection in select_parameters(model, case.scope)]
    losses: dict[str, dict[int, Tensor]] = {}

    def naive(name: str, **optimizer_kwargs: bool) -> Callable[[], None]:
        turns = count()
        found = losses.setdefault(name, {})

        def run() -> None:
            turn = next(turns)
            n = turn % min(2, case.D)
            # The first call is to warm up, and its memory does not depend on the steps.
            options = {**OPTIONS, "steps": case.K if turn else 1, "params": params}
            result = naive_adapt(
                model, ids[n : n + 1], optimizer_kwargs=optimizer_kwargs, **options
            )
            result.restore()
            if turn:
                found[n] = result.losses

        return run

    def ours(engine: str) -> Callable[[], None]:
        config = TTTConfig(steps=case.K, scope=case.scope, engine=engine, **OPTIONS)
        trainer = TTTTrainer(model, config)

        def run() -> None:
            with trainer.adapt(ids, deltas="independent") as adapted:
                losses[engine] = dict(enumerate(adapted.losses))

        return run

    sides: Sides = {"naive": (naive("naive"), 0)}
    if case.stock:
        sides["best stock"] = (naive("best stock", fused=True), 0)
    sides |= {engine: (ours(engine), 0) for engine in case.engines}
    seconds = interleave(sides, case.rounds)
    require_same_losses(losses, case)
    prompt_steps = {name: case.K * (case.D if name in case.engines else 1) for name in sides}
    record(benchmark, str(case), seconds, prompt_steps)
    if case.auto:
        config = TTTConfig(steps=case.K, scope=case.scope, **OPTIONS)
        choice = TTTTrainer(model, config).plan(case.D, case.T)
        benchmark.extra_info["auto"] = choice.engine
        print(f'engine="auto" takes {choice.reason}')
    benchmark(lambda: None)


def require_same_losses(losses: dict[str, dict[int, Tensor]], case: Case) -> None:
    """Every side has to have done the same work."""
    for name, found in losses.items():
        for n, expected in losses["naive"].items():
            # A bfloat16 loop rounds most of its updates away, so only the first loss is the same.
            compared = slice(None) if case.dtype == torch.float32 else slice(1)
            tolerance = 1e-3 if case.dtype == torch.float32 else 5e-2
            if n in found:
                actual = found[n][compared].float()
                torch.testing.assert_close(
                    actual, expected[compared].float(), atol=tolerance, rtol=0,
                    msg=lambda text, name=name: f"{case}, {name}: {text}",
                )  # fmt: skip


def record(
    benchmark: Any,
    what: str,
    seconds: dict[str, list[float]],
    units: dict[str, int],
    unit: str = "prompt-step",
) -> None:
    """Print milliseconds of each side's units of work, and leave them in ``extra_info``.

    Args:
        benchmark: the fixture.
        what: is measured.
        seconds: side -> of each round; "naive" is what the others are compared with.
        units: side -> units of work in a round.
        unit: their name.
    """
    rows = {}
    for name, values in seconds.items():
        ms = [1e3 * value / units[name] for value in values]
        rows[name] = {"median_ms": median(ms), "min_ms": min(ms), "max_ms": max(ms)}
    for row in rows.values():
        row["ratio"] = rows["naive"]["median_ms"] / row["median_ms"]
    benchmark.extra_info = {"what": what, "unit": unit, "baseline": "naive", "sides": rows}
    print(f"\n{what}, {torch.get_num_threads()} threads: ms a {unit}")
    for name, row in rows.items():
        spread = f"[{row['min_ms']:.1f}, {row['max_ms']:.1f}]"
        print(f"{name:12}{row['median_ms']:10.1f}  {spread:18}{row['ratio']:6.2f}x")


def bench_restore(benchmark: Any) -> None:
    """What it takes to have the weights back, and that nothing was written to them."""
    model, text = load(torch.float32)
    ids = text[:20]
    trainer = TTTTrainer(model, TTTConfig(steps=1, engine="factored", **OPTIONS))
    params = list(model.parameters())
    ms: dict[str, list[float]] = {"naive": [], "ours": []}
    written: dict[str, int] = {}

    def naive() -> None:
        result = naive_adapt(model, ids[None], steps=1, **OPTIONS)
        versions = [param._version for param in params]
        result.restore()
        ms["naive"].append(result.phases.ms["restore"])
        written["naive"] = bytes_written(params, versions)

    def ours() -> None:
        # Of the whole adaptation: what no step has written, no restore has to write.
        versions, before = [param._version for param in params], ops.checksum(params)
        adapted = trainer.adapt(ids)
        during = ops.checksum(params)
        adapted.restore()
        ms["ours"].append(adapted.timings["restore"])
        written["ours"] = bytes_written(params, versions)
        assert before == during == ops.checksum(params), "the factored engine has written weights"

    interleave({"naive": (naive, 0), "ours": (ours, 0)}, rounds=3)
    seconds = {name: [1e-3 * value for value in values[1:]] for name, values in ms.items()}
    record(benchmark, "weights back, float32", seconds, dict.fromkeys(seconds, 1), unit="restore")
    benchmark.extra_info["bytes_written"] = written
    print(f"bytes written to weights: naive {written['naive']}, ours {written['ours']}")
    benchmark(lambda: None)


def bytes_written(params: list[torch.nn.Parameter], versions: list[int]) -> int:
    """Bytes of the parameters that were written since their versions were these."""
    return sum(p.nbytes for p, v in zip(params, versions, strict=True) if p._version != v)


def bench_factored_memory(benchmark: Any) -> None:
    """Peak bytes above the model beside the loop's and the formula's; nothing is timed."""
    T, K = (8, 1) if benchmark.disabled else (64, 5)
    root = Path(peak_memory.__file__).parent.parent
    peaks = {}
    for case in ("naive", "factored"):
        command = [sys.executable, "-m", "bench.peak_memory", case, "float32", str(T), str(K)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
        peaks[case] = json.loads(output.stdout)
    benchmark.extra_info = {"what": f"one prompt, T = {T}, K = {K}, float32", "peaks": peaks}
    benchmark(lambda: None)
    naive, factored = peaks["naive"], peaks["factored"]
    print(f"\npeak memory above the model, one prompt, T = {T}, K = {K}, float32")
    for name, row in peaks.items():
        print(
            f"{name:10}{row['peak_bytes'] / 2**20:9.0f} MiB, stated"
            f" {row['stated_bytes'] / 2**20:.0f} MiB ({row['stated']})"
        )
    print(
        f"factored: {factored['peak_bytes'] / naive['peak_bytes']:.2f} of naive,"
        f" {factored['peak_bytes'] / naive['stated_bytes']:.2f} of weights + gradients + momentum,"
        f" {factored['peak_bytes'] / factored['stated_bytes']:.2f} of the formula"
    )
