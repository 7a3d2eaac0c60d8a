"""Predicted against measured as prompts, steps, batches and models grow, in both engines.

SGD with momentum 0.9 and clip 10 in fp32, whole adaptations with snapshot and restore. Speeds are
those of ``ttt-fast doctor --calibrate`` where it was run, else the defaults. Quick: nine cases on
both sides of the crossover, a minute and a half on two cores. Full: axes and a plane, from which
``bench/plots.py`` draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from statistics import geometric_mean, median
from typing import Any

import torch
from torch import nn

from bench import cases
from bench.cases import CAP, Case, fitting, over_cap
from bench.conftest import interleave, note
from bench.shapes import AMOUNT, SMALL, load_model
from ttt_fast import TTTTrainer, calibration
from ttt_fast.engines import policy

QUICK = [
    Case(20, 10, 1),
    Case(20, 4, 4),
    Case(20, 10, 1, "attention"),
    Case(20, 4, 4, "ffn"),
    Case(64, 4, 1),
    Case(64, 10, 1, "ffn"),
    Case(128, 4, 1, "attention"),
    Case(256, 1, 1),
    Case(256, 4, 1),
]
# What the curves go through; one thing grows at a time.
MIDDLE = Case(32, 5, 1)
GROWTH: dict[str, tuple[Any, ...]] = {
    "T": (8, 16, 32, 64, 128, 256, 512),
    "K": (1, 2, 5, 10, 20, 40),
    "D": (1, 2, 4, 8, 16, 32),
    "model": ("SmolLM2-135M", "SmolLM2-360M", "Qwen2.5-0.5B"),
}
PLANE = [Case(T, K, 1) for T in (16, 32, 64, 128, 256, 512) for K in (1, 2, 4, 8, 16)]
ENGINES = ("dense", "factored")
ROUNDS = {"quick": 1, "full": 3, "small": 1}[AMOUNT]


@dataclass(frozen=True)
class Row:
    """One case: milliseconds of one step of one delta by engine, and what auto chose.

    An engine over the cap of memory is not measured.
    """

    case: Case
    choice: policy.Choice
    measured_ms: dict[str, float]

    @property
    def auto_slowdown(self) -> float | None:
        """Time of the chosen engine over that of the faster one; None where one alone was run."""
        if len(self.measured_ms) < len(ENGINES):
            return None
        return self.measured_ms[self.choice.engine] / min(self.measured_ms.values())


def grid() -> list[Case]:
    """What is measured, each case once, in an order that loads each model once."""
    if SMALL:
        changes = (
            {},
            {"T": 8},
            {"K": 2},
            {"D": 2},
            {"model": "Qwen2.5-0.5B"},
            {"T": 4096, "K": 99},
        )
        return [replace(MIDDLE, **change) for change in changes]
    if AMOUNT == "quick":
        return QUICK
    growth = [replace(MIDDLE, **{axis: v}) for axis, values in GROWTH.items() for v in values]
    found = dict.fromkeys([*QUICK, *growth, *PLANE])
    return sorted(found, key=lambda case: case.model)


@lru_cache(maxsize=1)
def load(model: str) -> nn.Module:
    return load_model(model, torch.float32)


def bench_policy(benchmark: Any) -> None:
    speeds = calibration.machine(torch.float32)
    not_run = {str(case): over_cap(case) for case in grid() if over_cap(case)}
    rows = [measure(load(case.model), speeds, case) for case in grid() if str(case) not in not_run]
    info = {
        "policy": asdict(speeds),
        "not_run": not_run,
        "rows": [
            {
                "case": asdict(row.case),
                "chosen": row.choice.engine,
                "predicted_ms": row.choice.predicted_ms,
                "measured_ms": row.measured_ms,
                "auto_slowdown": row.auto_slowdown,
            }
            for row in rows
        ],
    }
    note(benchmark, info)
    print_rows(rows, speeds.source)
    for name, reason in not_run.items():
        print(f"{name}: not run, {reason} are over the cap of {CAP}")


def measure(model: nn.Module, speeds: policy.Machine, case: Case) -> Row:
    """Run both engines in turn, after a step of each; each on the same prompts."""
    ids = case.prompts()

    def run(trainer: TTTTrainer, **options: Any) -> Callable[[], None]:
        return lambda: trainer.adapt(ids, deltas="independent", **options).restore()

    work = replace(cases.workload_of(model, case), available_bytes=policy.free_bytes())
    choice = policy.choose(work, speeds)
    trainers = {engine: TTTTrainer(model, case.config(engine)) for engine in fitting(choice)}
    sides = {engine: (run(trainer),) for engine, trainer in trainers.items()}
    first_steps = [run(trainer, stop=lambda report: True) for trainer in trainers.values()]
    seconds = interleave(sides, ROUNDS, first_steps)
    measured_ms = {engine: 1e3 * median(s) / (case.K * case.D) for engine, s in seconds.items()}
    return Row(case, choice, measured_ms)


def print_rows(rows: list[Row], source: str) -> None:
    """Milliseconds of one step of one delta."""
    print(f"\nengine policy, float32, {torch.get_num_threads()} threads; {source}")
    print(f"{'':49}{'dense':>18}{'factored':>18}")
    names = "".join(f"{name:>9}" for name in ("pred.", "meas.") * 2)
    print(f"{'T':>5}{'K':>5}{'D':>5}   {'scope':15}{'model':16}{names}   auto      slower by")
    errors = []
    for row in rows:
        case = row.case
        line = f"{case.T:5}{case.K:5}{case.D:5}   {case.scope:15}{case.model:16}"
        for engine in ENGINES:
            predicted, measured = row.choice.predicted_ms[engine], row.measured_ms.get(engine)
            line += f"{predicted:9.0f}" + (" " * 9 if measured is None else f"{measured:9.0f}")
            if measured is not None:
                errors.append(max(predicted / measured, measured / predicted))
        slower = row.auto_slowdown
        print(f"{line}   {row.choice.engine:9}" + ("" if slower is None else f"{slower - 1:10.0%}"))
    worst = max(row.auto_slowdown or 1.0 for row in rows)
    far = sum(error > 1.2 for error in errors)
    print(
        f"auto: at most {worst - 1:.0%} slower than the better engine; predictions are off by a"
        f" factor of {geometric_mean(errors):.2f} (geometric mean), {max(errors):.2f} at most;"
        f" {far} of {len(errors)} by more than 20 %"
    )
