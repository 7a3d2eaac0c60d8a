"""Predicted against measured, and what engine="auto" costs beside the better engine.

SmolLM2-135M in fp32, SGD with momentum 0.9 and clip 10, whole adaptations with snapshot and
restore, over prompt lengths, steps, deltas and scopes on both sides of the crossover. Speeds are
those of ``ttt-fast doctor --calibrate`` where it was run, else the defaults. About three minutes on
two cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import nn

from bench.conftest import interleave
from ttt_fast import TTTConfig, TTTTrainer, calibration
from ttt_fast.demo import load_demo_model
from ttt_fast.engines import policy

# T, K, D, scope.
GRID: list[tuple[int, int, int, str]] = [
    (20, 10, 1, "all"),
    (20, 4, 4, "all"),
    (20, 10, 1, "attention"),
    (20, 4, 4, "ffn"),
    (64, 4, 1, "all"),
    (64, 10, 1, "ffn"),
    (128, 4, 1, "attention"),
    (256, 1, 1, "all"),
    (256, 4, 1, "all"),
]
ENGINES = ("dense", "factored")
ROUNDS = 2


@dataclass(frozen=True)
class Row:
    """One case: milliseconds of one step of one delta by engine, and what auto chose."""

    case: tuple[int, int, int, str]
    choice: policy.Choice
    measured_ms: dict[str, float]

    @property
    def auto_slowdown(self) -> float:
        """Time of the chosen engine over that of the faster one."""
        return self.measured_ms[self.choice.engine] / min(self.measured_ms.values())


def bench_policy(benchmark: Any) -> None:
    model, _ = load_demo_model()
    speeds = calibration.machine(torch.float32)
    grid = GRID[:1] if benchmark.disabled else GRID
    rows = [measure(model, speeds, case, 1 if benchmark.disabled else ROUNDS) for case in grid]
    benchmark.extra_info = {
        "speeds": speeds.source,
        "rows": [
            {
                "case": row.case,
                "chosen": row.choice.engine,
                "predicted_ms": row.choice.predicted_ms,
                "measured_ms": row.measured_ms,
                "auto_slowdown": row.auto_slowdown,
            }
            for row in rows
        ],
    }
    benchmark(lambda: None)
    print_rows(rows, speeds.source)


def measure(
    model: nn.Module, speeds: policy.Machine, case: tuple[int, int, int, str], rounds: int
) -> Row:
    """Run both engines in turn; each on the same prompts."""
    T, K, D, scope = case
    ids = torch.randint(1000, 40000, (D, T), generator=torch.Generator().manual_seed(0))

    def run(engine: str) -> Callable[[], None]:
        trainer = TTTTrainer(model, TTTConfig(lr=1e-4, steps=K, scope=scope, engine=engine))
        return lambda: trainer.adapt(ids, deltas="independent").restore()

    seconds = interleave({engine: (run(engine), 0) for engine in ENGINES}, rounds)
    trainer = TTTTrainer(model, TTTConfig(lr=1e-4, steps=K, scope=scope))
    work = policy.workload(
        model, trainer.selections, trainer.config, D, T, available_bytes=policy.free_bytes()
    )
    measured_ms = {engine: 1e3 * median(s) / (K * D) for engine, s in seconds.items()}
    return Row(case, policy.choose(work, speeds), measured_ms)


def print_rows(rows: list[Row], source: str) -> None:
    """Milliseconds of one step of one delta."""
    print(f"\nengine policy, SmolLM2-135M, float32, {torch.get_num_threads()} threads; {source}")
    print(f"{'':36}{'dense':>18}{'factored':>18}")
    names = "".join(f"{name:>9}" for name in ("pred.", "meas.") * 2)
    print(f"{'T':>5}{'K':>5}{'D':>5}   {'scope':18}{names}   auto      slower by")
    errors = []
    for row in rows:
        T, K, D, scope = row.case
        line = f"{T:5}{K:5}{D:5}   {scope:18}"
        for engine in ENGINES:
            predicted, measured = row.choice.predicted_ms[engine], row.measured_ms[engine]
            errors.append(max(predicted / measured, measured / predicted))
            line += f"{predicted:9.0f}{measured:9.0f}"
        print(f"{line}   {row.choice.engine:9}{row.auto_slowdown - 1:10.0%}")
    worst = max(row.auto_slowdown for row in rows)
    print(
        f"auto: at most {worst - 1:.0%} slower than the better engine; predictions are off by a"
        f" factor of {geometric_mean(errors):.2f} (geometric mean), {max(errors):.2f} at most"
    )
