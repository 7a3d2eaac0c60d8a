r"""Where the time of a step goes, before and after, with the floor of its arithmetic beside it.

Three questions, each with both sides in one run, interleaved, whose losses are compared:

  frozen   forward, loss and the gradient of the input embeddings, where nothing adapts: eager torch
           beside the package's pieces and head; and the head with the loss alone
  step     a factored adaptation of 16 prompts as long as a question beside the naive loop on one
           of them: milliseconds of a prompt and step, in all and by part (bench/parts.py)
  layers   the last four decoder layers beside all of them

A quick run has what is below its cap, the rest is listed as not run. The times of a whole are
without a profiler; those of parts are from one more run under torch's, which takes a little longer.
In full, and this file alone:

    export TTT_FAST_BENCH=full
    python -m pytest bench/bench_parts.py -s --benchmark-enable -o python_files='bench_*.py' \
        -o python_functions='bench_*' --benchmark-json=benchmark-bench_parts.json
    python -m bench.report benchmark-bench_parts.json    # docs/benchmarks.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from bench import bench_latency, parts
from bench.bench_latency import Phases, Side, load, take_turns
from bench.cases import OPTIONS, Cap, Case, meta_model, over_cap, workload_of
from bench.conftest import gemm_sides, interleave, note
from bench.shapes import AMOUNT, MODELS, SMALL
from ttt_fast import Batch, TTTTrainer
from ttt_fast.batch import complete_batch
from ttt_fast.engines.cost import Layer
from ttt_fast.engines.head import OutputHead
from ttt_fast.engines.head_kinds import FrozenHead
from ttt_fast.engines.pieces import pieces_of, standing_in
from ttt_fast.naive import naive_adapt

FROZEN = [Case(T, 1, D, dtype=d) for d in ("float32", "bfloat16") for T, D in (
    (20, 1), (64, 1), (256, 1), (20, 16),
)]  # fmt: skip
# Memo-Trap's questions have 12 to 39 tokens, 18 in the median.
STEPS = [
    Case(20, 10, 16, "attention"),
    Case(20, 10, 16, "ffn"),
    Case(20, 10, 16, "all"),
    Case(20, 10, 16, "ffn", "bfloat16"),
]
ALL_LAYERS, LAST_LAYERS = ":", "-4:"
LAYERS = [Case(20, 20, 1), Case(20, 20, 16)]
if SMALL:
    FROZEN = [replace(FROZEN[n], T=8, D=2) for n in (0, 4)]
    STEPS = [replace(case, T=8, K=3, D=2) for case in STEPS[1:]]
    LAYERS, LAST_LAYERS = [Case(8, 2, 1), Case(4096)], "-1:"
ROUNDS = {"quick": 2, "full": 7, "small": 1}[AMOUNT]
LONG_ROUNDS = {"quick": 1, "full": 2, "small": 1}[AMOUNT]
CAPS = {"quick": Cap(2e12, 6 << 30), "full": Cap(1e13, 14 << 30), "small": Cap(1e9, 1 << 30)}
CAP = CAPS[AMOUNT]
PRODUCTS = 1 if SMALL else 5  # of the GEMM that are timed together


def skipped(benchmark: Any, case: Case) -> bool:
    """Say that a case is not run, if it is over the cap."""
    reason = over_cap(case, CAP)
    if reason:
        note(benchmark, {"parts": "not run", "what": str(case), "not_run": reason})
        print(f"\n{case}: not run, {reason} are over the cap of {CAP}")
    return bool(reason)


def in_milliseconds(seconds: list[float], units: int = 1) -> dict[str, float]:
    """Median, least and most, of each of so many units."""
    ms = [1e3 * value / units for value in seconds]
    return {"median": median(ms), "min": min(ms), "max": max(ms)}


def gemm_rate(seconds: list[float], dtype: torch.dtype) -> float:
    """Gflop/s of the GEMM that took turns with the sides."""
    (gemm,) = gemm_sides(dtype).values()
    return 1e-9 * PRODUCTS * gemm.operations / median(seconds)


def products(dtype: torch.dtype) -> Callable[[], None]:
    """The GEMM, a few times."""
    (gemm,) = gemm_sides(dtype).values()

    def run() -> None:
        for _ in range(PRODUCTS):
            gemm.run()

    return run


# ---------------------------------------------------------------------------- nothing adapts

Forward = Callable[[Tensor], Any]


@pytest.mark.parametrize("case", FROZEN, ids=lambda case: f"{case.dtype}-{case.D}x{case.T}")
def bench_frozen(benchmark: Any, case: Case) -> None:
    model = load(case.model, case.torch_dtype).requires_grad_(False)
    embeddings = model.get_input_embeddings()(case.prompts())
    layers = workload_of(model, case).layers
    measure(
        benchmark, f"forward and input gradients, {numbers(case)}", case, model,
        lambda x: model(inputs_embeds=x, use_cache=False), embeddings, layers,
    )  # fmt: skip


@pytest.mark.parametrize("case", FROZEN, ids=lambda case: f"{case.dtype}-{case.D}x{case.T}")
def bench_head(benchmark: Any, case: Case) -> None:
    shape, dtype = MODELS[case.model], case.torch_dtype
    generator = torch.Generator().manual_seed(0)
    model = HeadAlone(shape.hidden, shape.vocab).to(dtype).requires_grad_(False)
    nn.init.normal_(model.lm_head.weight, std=0.05, generator=generator)
    hidden = torch.randn(case.D, case.T, shape.hidden, generator=generator).to(dtype)
    layers = [
        layer for layer in workload_of(meta_model(case.model, dtype), case).layers if layer.head
    ]
    what = f"head and loss alone, {numbers(case)}"
    measure(benchmark, what, case, model, model, hidden, layers)


def numbers(case: Case) -> str:
    """Tokens and dtype of a case."""
    return f"{f'{case.D} x ' if case.D > 1 else ''}{case.T} tokens, {case.dtype}"


class HeadAlone(nn.Module):
    """A model that is nothing but a head."""

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.lm_head = nn.Linear(hidden, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """Its head."""
        return self.lm_head

    def forward(self, hidden: Tensor) -> Any:
        """Its logits, as transformers' models give them."""
        return SimpleNamespace(logits=self.lm_head(hidden))


def measure(
    benchmark: Any, what: str, case: Case, model: nn.Module, forward: Forward, x: Tensor,
    layers: Sequence[Layer],
) -> None:  # fmt: skip
    """Measure both sides of a forward with loss and the gradient of its input."""
    ids = case.prompts()
    leaves = {name: x.detach().clone().requires_grad_() for name in ("eager torch", "ttt_fast")}
    runs = {
        "eager torch": eager(forward, leaves["eager torch"], ids),
        "ttt_fast": with_pieces(model, forward, leaves["ttt_fast"], ids),
    }
    losses = [run() for run in runs.values()]
    require_same(losses, [leaf.grad for leaf in leaves.values()], case.dtype)
    sides = {name: (run,) for name, run in runs.items()}
    seconds = interleave(sides | {"gemm": (products(case.torch_dtype),)}, ROUNDS)
    rate = gemm_rate(seconds.pop("gemm"), case.torch_dtype)
    work = parts.frozen_workload(layers, case.T)
    counts = {name: case.D * count for name, count in parts.operations(work).items()}
    info = {
        "parts": "frozen",
        "what": what,
        "sides": {name: in_milliseconds(values) for name, values in seconds.items()},
        "floor_ms": parts.at_rate(counts, rate),
        "gemm_gflop_per_s": rate,
    }
    note(benchmark, info)
    before, after = (side["median"] for side in info["sides"].values())
    floor = sum(info["floor_ms"].values())
    print(f"\n{what:60}{before:9.2f} -> {after:9.2f} ms{before / after:7.2f}x", end="")
    print(f"   floor {floor:8.2f} ms, {after / floor:.2f} times it; GEMM {rate:.0f} Gflop/s")


def eager(forward: Forward, x: Tensor, ids: Tensor) -> Callable[[], Tensor]:
    """Logits and cross entropy in float32, the sum of the prompts' means."""

    def run() -> Tensor:
        x.grad = None
        logits = forward(x).logits[:, :-1].float()
        loss = len(ids) * F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        return loss.detach()

    return run


def with_pieces(model: nn.Module, forward: Forward, x: Tensor, ids: Tensor) -> Callable[[], Tensor]:
    """The same by what the engines put in the place of a frozen model's modules."""
    taken = list(pieces_of(model, "auto", lambda x: False))
    head = OutputHead(model, FrozenHead(model.get_output_embeddings()))
    n = len(ids)
    rows = Batch(ids, ids, torch.ones_like(ids), delta_index=torch.arange(n))

    def run() -> Tensor:
        x.grad = None
        with standing_in(taken), head.answering(rows, n, "mean") as call:
            _, losses = head.run(call, lambda: forward(x), lambda: lambda: None)
            losses.sum().backward()
        return losses.detach().sum()

    return run


def require_same(losses: list[Tensor], grads: list[Tensor], dtype: str) -> None:
    """Both sides have to have computed the same, as far as their dtype goes."""
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    expected, loss = losses
    torch.testing.assert_close(loss.float(), expected.float(), rtol=tolerance, atol=0)
    theirs, ours = (grad.float() for grad in grads)
    distance = float((ours - theirs).norm() / theirs.norm())
    if not distance <= 10 * tolerance:
        raise AssertionError(f"input gradients are {distance:.1e} of their norm apart")


# ---------------------------------------------------------------------------- steps by part


@pytest.mark.parametrize("case", STEPS, ids=str)
def bench_step(benchmark: Any, case: Case) -> None:
    if skipped(benchmark, case):
        return
    model = load(case.model, case.torch_dtype)
    trainer = TTTTrainer(model, case.config("factored"))
    losses: dict[str, dict[int, Tensor]] = {"naive": {}, "ttt_fast": {}}
    sides = {
        "naive": loop(model, case, losses["naive"]),
        "ttt_fast": factored(trainer, case, losses["ttt_fast"]),
    }
    seconds = take_turns(sides | {"gemm": timed(products(case.torch_dtype))}, LONG_ROUNDS)
    bench_latency.require_same_losses(losses, case)
    whole = {name: [phases["adapt"] for phases in found] for name, found in seconds.items()}
    rate = gemm_rate(whole.pop("gemm"), case.torch_dtype)
    info = {
        "parts": "step",
        "what": str(case),
        "sides": {
            name: in_milliseconds(values, units(case, name)) for name, values in whole.items()
        },
        "by_part": by_part(model, sides, case),
        "floor_ms": parts.at_rate(parts.operations(workload_of(model, case)), rate),
        "gemm_gflop_per_s": rate,
    }
    note(benchmark, info)
    print_step(info)


def units(case: Case, side: str) -> int:
    """Prompts times steps; the loop has one prompt."""
    return case.K * (1 if side == "naive" else case.D)


def timed(run: Callable[[], None]) -> Side:
    """A side for ``take_turns`` that warms up as it runs."""

    def side(steps: int | None) -> Phases:
        start = perf_counter()
        run()
        return {"adapt": perf_counter() - start}

    return side


def loop(model: nn.Module, case: Case, losses: dict[int, Tensor]) -> Side:
    """The naive loop on the first prompt, snapshot and restore included."""
    ids = case.prompts()[:1]
    params = [selection.param for selection in TTTTrainer(model, case.config()).selections]

    def run(steps: int | None) -> Phases:
        start = perf_counter()
        with record_function(parts.ADAPT):
            result = naive_adapt(model, ids, params=params, steps=steps or case.K, **OPTIONS)
            parts.ranged(parts.SNAPSHOT, result.restore)()
        seconds = perf_counter() - start
        losses[0] = result.losses
        return {"adapt": seconds}

    return run


def factored(trainer: TTTTrainer, case: Case, losses: dict[int, Tensor]) -> Side:
    """The factored engine on all prompts: what ``adapt`` does, step by step, and the restore."""
    ids = case.prompts()
    rows = complete_batch(Batch(ids, delta_index=torch.arange(case.D)), trainer.model, case.D)

    def run(steps: int | None) -> Phases:
        found = []
        start = perf_counter()
        with record_function(parts.ADAPT), trainer.begin(case.D, case.T) as session:
            engine, together = session.engine, session.parts(rows)
            update = parts.ranged(parts.UPDATE, engine.update)
            finish = parts.ranged(parts.UPDATE, engine.finish_step)
            with patch.multiple(engine, update=update, finish_step=finish):
                for _ in range(steps or case.K):
                    with record_function(parts.STEP):
                        found.append(session.step_parts(together).losses)
            losses.update(enumerate(torch.stack(found, 1)))
        seconds = perf_counter() - start
        return {"adapt": seconds}

    return run


def by_part(model: nn.Module, sides: dict[str, Side], case: Case) -> dict[str, dict[str, Any]]:
    """Milliseconds of a prompt and step by part, from one run of each side under the profiler."""
    with parts.loop_named(model):
        roots = {"naive": parts.profile(lambda: sides["naive"](None))}
    roots["ttt_fast"] = parts.profile(lambda: sides["ttt_fast"](None))
    found = {}
    for name, root in roots.items():
        tokens, n = case.T if name == "naive" else 0, units(case, name)
        found[name] = {
            "ms": {part: ms / n for part, ms in parts.milliseconds(root, tokens).items()},
            "rest": {what: ms / n for what, ms in parts.largest(root, tokens=tokens).items()},
        }
    return found


def print_step(info: dict[str, Any]) -> None:
    """Print the parts of both sides, and the floor."""
    print(f"\n{info['what']}; ms of a prompt and step; {torch.get_num_threads()} threads;", end=" ")
    print(f"GEMM {info['gemm_gflop_per_s']:.0f} Gflop/s")
    before, after = (side["ms"] for side in info["by_part"].values())
    print(f"{'':34}{'loop':>10}{'ttt_fast':>10}{'floor':>10}")
    for part in parts.PARTS:
        floor = info["floor_ms"].get(part)
        line = f"{part:34}{before[part]:10.2f}{after[part]:10.2f}"
        print(line + (f"{floor:10.2f}" if floor is not None else ""))
    floor = sum(info["floor_ms"].values())
    print(f"{'all, under the profiler':34}{sum(before.values()):10.2f}{sum(after.values()):10.2f}")
    loop_ms, ours = (side["median"] for side in info["sides"].values())
    print(
        f"{'all':34}{loop_ms:10.2f}{ours:10.2f}{floor:10.2f}   {ours / floor:.2f} times the floor"
    )


# ---------------------------------------------------------------------------- the last layers


@pytest.mark.parametrize("case", LAYERS, ids=str)
def bench_layers(benchmark: Any, case: Case) -> None:
    chosen = {name: replace(case, layers=name) for name in (ALL_LAYERS, LAST_LAYERS)}
    if skipped(benchmark, chosen[ALL_LAYERS]):
        return
    model = load(case.model, case.torch_dtype)
    losses: dict[str, dict[int, Tensor]] = {name: {} for name in chosen}
    sides = {
        name: bench_latency.ours(model, each, "factored", losses[name])
        for name, each in chosen.items()
    }
    gemm = timed(products(case.torch_dtype))
    seconds = take_turns(sides | {"gemm": gemm}, LONG_ROUNDS)
    for name, each in chosen.items():
        require_first_losses(model, each, losses[name])
    whole = {name: [phases["adapt"] for phases in found] for name, found in seconds.items()}
    rate = gemm_rate(whole.pop("gemm"), case.torch_dtype)
    counts = {n: sum(parts.operations(workload_of(model, c)).values()) for n, c in chosen.items()}
    info = {
        "parts": "layers",
        "what": str(case),
        "sides": {n: in_milliseconds(values, case.K * case.D) for n, values in whole.items()},
        "floor_ms": parts.at_rate(counts, rate),
        "gemm_gflop_per_s": rate,
    }
    note(benchmark, info)
    whole_ms, last_ms = (side["median"] for side in info["sides"].values())
    print(f"\n{case}: layers {ALL_LAYERS} {whole_ms:.1f} ms a prompt and step,", end=" ")
    print(f"layers {LAST_LAYERS} {last_ms:.1f} ms: {last_ms / whole_ms:.2f} of it;", end=" ")
    print(f"by operations {counts[LAST_LAYERS] / counts[ALL_LAYERS]:.2f}")


def require_first_losses(model: nn.Module, case: Case, losses: dict[int, Tensor]) -> None:
    """Those of the naive loop on the first prompt, of two steps."""
    params = [selection.param for selection in TTTTrainer(model, case.config()).selections]
    result = naive_adapt(model, case.prompts()[:1], params=params, steps=2, **OPTIONS)
    result.restore()
    torch.testing.assert_close(losses[0][:2].float(), result.losses, atol=1e-3, rtol=0)
