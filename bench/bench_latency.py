"""Whole adaptations beside the loop: time of a prompt, a step, a first token, a restore; memory.

The cases are those of ``bench/cases.py``. "naive" is ``bench/naive.py``; "best stock" the same loop
with ``torch.optim.SGD(fused=True)`` (foreach in bfloat16, where fused does nothing on the CPU).
The loops have one prompt at a time: in each round they run one of the first two, and all sides are
divided by the prompts that they adapted. A quick run has the engine that auto takes, one round off
the corners, and at the corners best stock of short prompts and memory in float32; a full one has
both engines where they are within the cap of memory.
Losses are compared before a time is recorded. Peaks of memory are of a process of their own for
each side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cases import CAP, CORNERS, OPTIONS, Case, cases, fitting, over_cap
from bench.conftest import no_collection, note
from bench.peak_memory import in_fresh_process
from bench.shapes import AMOUNT, load_model
from ttt_fast import TTTTrainer, calibration
from ttt_fast.naive import naive_adapt

ROUNDS = {"quick": 2, "full": 5, "small": 1}[AMOUNT]
# Of a document's step an optimizer takes a hundredth, whichever it is.
SHORT_CORNERS = tuple(case for case in CORNERS if case.T < 1024)
# What is measured of each round, in seconds; "written" in bytes.
Phases = dict[str, float]
Side = Callable[[int | None], Phases]


@lru_cache(maxsize=1)
def load(model: str, dtype: torch.dtype) -> nn.Module:
    return load_model(model, dtype)


@pytest.mark.parametrize("case", cases(), ids=str)
def bench_latency(benchmark: Any, case: Case) -> None:
    reason = over_cap(case)
    if reason:
        note(benchmark, {"latency": asdict(case), "what": str(case), "not_run": reason})
        print(f"\n{case}: not run, {reason} are over the cap of {CAP}")
        return
    model = load(case.model, case.torch_dtype)
    trainer = TTTTrainer(model, case.config())
    choice = trainer.plan(case.D, case.T)
    engines = fitting(choice) if AMOUNT == "full" else [choice.engine]
    losses: dict[str, dict[int, Tensor]] = {}
    sides = {"naive": loop(model, case, losses.setdefault("naive", {}))}
    if AMOUNT != "quick" or case in SHORT_CORNERS:
        best = {"fused": True} if case.dtype == "float32" else {"foreach": True}
        sides["best stock"] = loop(model, case, losses.setdefault("best stock", {}), **best)
    sides |= {name: ours(model, case, name, losses.setdefault(name, {})) for name in engines}
    rounds = take_turns(sides, 1 if AMOUNT == "quick" and case not in CORNERS else ROUNDS)
    require_same_losses(losses, case)
    prompts = {name: case.D if name in engines else 1 for name in sides}
    info = {
        "latency": asdict(case),
        "what": str(case),
        "auto": choice.engine,
        "predicted_bytes": choice.predicted_bytes,
        "predicted_ms": choice.predicted_ms,
        "speeds": calibration.machine(case.torch_dtype).source,
        "sides": {name: summary(rounds[name], case, prompts[name]) for name in sides},
    }
    if AMOUNT != "quick" or (case in CORNERS and case.dtype == "float32"):
        info["peaks"] = {side: in_fresh_process(side, case) for side in ("naive", *engines)}
    note(benchmark, info)
    print_case(info)


# ---------------------------------------------------------------------------- sides


def loop(model: nn.Module, case: Case, losses: dict[int, Tensor], **optimizer_kwargs: bool) -> Side:
    """The naive loop on one of the first two prompts."""
    ids, turns = case.prompts(), count()
    params = [selection.param for selection in TTTTrainer(model, case.config()).selections]

    def run(steps: int | None) -> Phases:
        n = next(turns) % min(2, case.D)
        options = {"params": params, "optimizer_kwargs": optimizer_kwargs, **OPTIONS}
        start = perf_counter()
        result = naive_adapt(model, ids[n : n + 1], steps=steps or case.K, **options)
        adapted = perf_counter()
        model.generate(ids[n : n + 1], max_new_tokens=1, do_sample=False)
        generated = perf_counter()
        written = bytes_written(model, result.restore)
        end = perf_counter()
        if steps is None:
            losses[n] = result.losses
        return phases(start, adapted, generated, end, written)

    return run


def ours(model: nn.Module, case: Case, engine: str, losses: dict[int, Tensor]) -> Side:
    """One of our engines on all prompts, with a trainer that lives from round to round."""
    ids, kept = case.prompts(), []

    def run(steps: int | None) -> Phases:
        if steps is None and not kept:
            kept.append(TTTTrainer(model, case.config(engine)))
        # What warms up goes again: its buffers would be beside those of the rounds.
        trainer = TTTTrainer(model, case.config(engine, steps)) if steps else kept[0]
        start = perf_counter()
        result = trainer.adapt(ids, deltas="independent")
        adapted = perf_counter()
        result.generate(max_new_tokens=1, do_sample=False)
        generated = perf_counter()
        written = bytes_written(model, result.restore)
        end = perf_counter()
        if steps is None:
            losses.update(enumerate(result.losses))
        return phases(start, adapted, generated, end, written)

    return run


def phases(start: float, adapted: float, generated: float, end: float, written: int) -> Phases:
    """Seconds of each phase, and the bytes that the last one wrote."""
    return {
        "adapt": adapted - start,
        "first_token": generated - adapted,
        "restore": end - generated,
        "whole": adapted - start + end - generated,
        "written": written,
    }


def bytes_written(model: nn.Module, restore: Callable[[], None]) -> int:
    """Restore, and count the bytes of the weights whose version moved."""
    params = list(model.parameters())
    before = [param._version for param in params]
    restore()
    return sum(p.nbytes for p, v in zip(params, before, strict=True) if p._version != v)


def take_turns(sides: dict[str, Side], rounds: int) -> dict[str, list[Phases]]:
    """Run all sides in turn after one step of each to warm up."""
    for run in sides.values():
        run(1)
    found: dict[str, list[Phases]] = {name: [] for name in sides}
    with no_collection():
        for _ in range(rounds):
            for name, run in sides.items():
                found[name].append(run(None))
    return found


# ---------------------------------------------------------------------------- results


def require_same_losses(losses: dict[str, dict[int, Tensor]], case: Case) -> None:
    """Every side has to have done the same work."""
    for name, found in losses.items():
        for n in found.keys() & losses["naive"].keys():
            # A bfloat16 loop rounds most of its updates away, so only the first loss is the same.
            # Rounding grows with the steps; what another update would do shows in the first ten.
            steps = slice(10) if case.dtype == "float32" else slice(1)
            tolerance = 1e-3 if case.dtype == "float32" else 5e-2
            torch.testing.assert_close(
                found[n][steps].float(), losses["naive"][n][steps].float(), atol=tolerance, rtol=0,
                msg=lambda text, name=name: f"{case}, {name}: {text}",
            )  # fmt: skip


def summary(rounds: list[Phases], case: Case, prompts: int) -> dict[str, Any]:
    """Median, least and most milliseconds: a prompt's, a prompt-step's, and of the others."""
    units = {
        "prompt_ms": ("whole", prompts),
        "step_ms": ("adapt", prompts * case.K),
        "first_token_ms": ("first_token", prompts),
        "restore_ms": ("restore", 1),
    }
    row: dict[str, Any] = {"prompts": prompts, "written_bytes": int(rounds[0]["written"])}
    for unit, (phase, number) in units.items():
        ms = [1e3 * found[phase] / number for found in rounds]
        row[unit] = {"median": median(ms), "min": min(ms), "max": max(ms)}
    return row


def print_case(info: dict[str, Any]) -> None:
    """Print a line for each side."""
    print(f"\n{info['what']}; auto takes {info['auto']}; {torch.get_num_threads()} threads")
    columns = ("ms a prompt", "ms a step", "predicted", "first token", "restore", "peak MiB")
    print(" " * 12 + "".join(f"{column:>13}" for column in columns) + "  ratio")
    naive = info["sides"]["naive"]["prompt_ms"]["median"]
    for name, row in info["sides"].items():
        line = f"{name:12}{row['prompt_ms']['median']:13.1f}{row['step_ms']['median']:13.2f}"
        predicted = info["predicted_ms"].get(name)
        line += f"{predicted:13.2f}" if predicted else " " * 13
        line += f"{row['first_token_ms']['median']:13.1f}{row['restore_ms']['median']:13.2f}"
        peak = info.get("peaks", {}).get(name)
        line += f"{peak['peak_bytes'] / 2**20:13.0f}" if peak else " " * 13
        print(f"{line}{naive / row['prompt_ms']['median']:6.2f}x")
