"""Whole adaptations of SmolLM2-135M, snapshot and restore included: T = 64, K = 10, all parameters.

SGD with momentum 0.9, weight decay 0.01, clip 10. The naive loop is ``bench/naive.py``; "best
stock" is the same loop with ``torch.optim.SGD(fused=True)`` (foreach in bfloat16, where fused does
nothing on the CPU). Peak memory is measured in a process of its own for each case.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from bench import peak_memory
from bench.conftest import interleave
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.demo import load_demo_model
from ttt_fast.naive import naive_adapt

T, K = 64, 10
OPTIONS: dict[str, Any] = {
    "steps": K, "lr": 1e-4, "momentum": 0.9, "weight_decay": 0.01, "max_grad_norm": 10.0,
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16]


def prompt() -> torch.Tensor:
    """The same T token ids everywhere, (1, T)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 40000, (1, T), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def bench_adapt(compare: Callable[..., float | None], dtype: torch.dtype) -> None:
    model, _ = load_demo_model(dtype)
    ids = prompt()
    trainer = TTTTrainer(model, TTTConfig(**OPTIONS))
    best = {"fused": True} if dtype == torch.float32 else {"foreach": True}
    losses: dict[str, torch.Tensor] = {}

    def naive(**optimizer_kwargs: bool) -> None:
        result = naive_adapt(model, ids, optimizer_kwargs=optimizer_kwargs, **OPTIONS)
        result.restore()
        losses["naive"] = result.losses

    def ours() -> None:
        with trainer.adapt(ids) as adapted:
            losses["ours"] = adapted.losses[0]

    sides = {"naive": (naive, 0), "best stock": (lambda: naive(**best), 0), "ours": (ours, 0)}
    name = str(dtype).removeprefix("torch.")
    copy_rate = compare(f"adapt, T = {T}, K = {K}, {name}", sides, baseline="naive", rounds=5)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(losses["ours"], losses["naive"], atol=tolerance, rtol=0)
    if copy_rate is not None:
        print_floor(model, copy_rate)


def print_floor(model: nn.Module, copy_rate: float) -> None:
    """Print what no step can beat: its products alone, and the update's bytes at a copy's rate."""
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Linear)]
    pairs = [(w.new_ones(T, w.shape[1]), w.new_ones(T, w.shape[0])) for w in weights]
    grads = [torch.empty_like(w) for w in weights]

    def products() -> None:
        # One weight after the other, as a step does: none is in the cache when its turn comes.
        for weight, (x, _) in zip(weights, pairs, strict=True):
            nn.functional.linear(x, weight)
        for weight, grad, (x, dy) in zip(weights, grads, pairs, strict=True):
            torch.mm(dy.t(), x, out=grad)
            torch.mm(dy, weight)

    seconds = interleave({"products": (products, 0)}, rounds=5)["products"]
    update_bytes = 6 * sum(p.nbytes for p in model.parameters())
    print(
        f"floor of a step: products {1e3 * median(seconds):.0f} ms + norm and update "
        f"{1e3 * update_bytes / copy_rate:.0f} ms at {copy_rate / 1e9:.1f} GB/s"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def bench_adapt_memory(benchmark: Any, dtype: torch.dtype) -> None:
    """Peak bytes above the model; nothing is timed."""
    name = str(dtype).removeprefix("torch.")
    cases = ["naive", "device", "host"] + (["undo"] if dtype == torch.bfloat16 else [])
    peaks = {}
    for case in cases[: 2 if benchmark.disabled else None]:
        command = [sys.executable, "-m", "bench.peak_memory", case, name]
        root = Path(peak_memory.__file__).parent.parent
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
        peaks[case] = json.loads(output.stdout)
    benchmark.extra_info = peaks
    benchmark(lambda: None)
    print(f"\npeak memory above the model, T = {T}, K = {K}, {name}")
    naive = peaks["naive"]
    for case, row in peaks.items():
        print(
            f"{case:10}{row['peak_bytes'] / 2**20:9.0f} MiB  "
            f" {row['peak_bytes'] / naive['peak_bytes']:.2f} of naive,"
            f" {row['peak_bytes'] / naive['stated_bytes']:.2f} of weights + gradients + momentum"
        )
