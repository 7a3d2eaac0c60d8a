"""The benchmarks for a GPU: every op by backend and whole adaptations, beside stock torch.

    python -m bench.gpu_bench --output result.json

``make gpu-check`` runs this after the tests. A side is timed between two events on the stream, all
sides of a comparison taking turns; what is written down is median, least and most of the rounds.
Whole adaptations are timed on the host's clock with the device waited for, restore included.
``--device cpu --small`` rehearses it where there is no GPU; such times mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import MODELS
from ttt_fast import TTTConfig, TTTTrainer, ops
from ttt_fast.backend import available_backends, backends_on
from ttt_fast.naive import naive_adapt

Run = Callable[[], Any]
# What is compared: name -> (function to time, bytes that it has to move, 0 where that says little).
Sides = dict[str, tuple[Run, int]]
OPTIONS: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 0.01}


class Suite:
    """All comparisons on one device.

    Args:
        device: where.
        small: tiny shapes and one round, to rehearse.
    """

    def __init__(self, device: torch.device, small: bool = False) -> None:
        self.device, self.small = device, small
        self.rounds = 1 if small else 30
        self.entries: list[dict[str, Any]] = []
        self.failures: list[dict[str, str]] = []
        self.copy_rate: float | None = None

    def run(self) -> dict[str, Any]:
        """Every comparison; one that raises is noted and the others go on."""
        parts = [
            self.copies, self.updates, self.gram_norms, self.gram_norms_of_layers,
            self.delta_linears, self.rank_updates, self.rank_steps, self.losses, self.adaptations,
        ]  # fmt: skip
        for part in parts:
            for group, make in part():
                print(f"  {group}", flush=True)
                try:
                    self._compare(group, make())
                except Exception as error:
                    self.failures.append({"group": group, "error": f"{error!r}"[:2000]})
                    print(f"    FAILED: {error!r}"[:500], flush=True)
                gc.collect()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        return {"benchmarks": self.entries, "failures": self.failures}

    # ------------------------------------------------------------------ measuring

    def _compare(self, group: str, sides: Sides) -> None:
        """Take turns; the first side is the baseline."""
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        peaks = {}
        for name, (run, _) in sides.items():
            peaks[name] = self._peak(run)
        for _ in range(self.rounds):
            for name, (run, _) in sides.items():
                seconds[name].append(self._time(run))
        baseline = next(iter(sides))
        for name, (_, moved) in sides.items():
            typical = median(seconds[name])
            rate = moved / typical if moved else None
            if group.startswith("copy") and rate:
                self.copy_rate = max(self.copy_rate or 0.0, rate)
            entry = {
                "group": group,
                "side": name,
                "baseline": baseline,
                "median_ms": 1e3 * typical,
                "min_ms": 1e3 * min(seconds[name]),
                "max_ms": 1e3 * max(seconds[name]),
                "rounds": self.rounds,
                "speedup": median(seconds[baseline]) / typical,
                "peak_mib": peaks[name],
                "gb_per_s": rate and rate / 1e9,
                "share_of_copy_bandwidth": rate and self.copy_rate and rate / self.copy_rate,
            }
            self.entries.append(entry)
            print(f"    {name:28}{entry['median_ms']:12.3f} ms{entry['speedup']:8.2f}x", flush=True)

    def _time(self, run: Run) -> float:
        if self.device.type != "cuda":
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _peak(self, run: Run) -> float | None:
        """Twice, to warm up; MiB above what was there, at the most, in the second."""
        run()
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def _backends(self, op: str) -> list[str]:
        status, here = available_backends(), backends_on(self.device.type)
        return [n for n in ops.SCHEMAS[op].backends if n in here and status[n] == "ok"]

    def _dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16]

    def _parameters(self, model: str, dtype: torch.dtype, scale: float = 0.02) -> list[Tensor]:
        shapes = MODELS[model].parameter_shapes()[: 12 if self.small else None]
        return [self._random(*shape, dtype=dtype, scale=scale) for shape in shapes]

    def _random(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        if self.small:
            shape = tuple(min(n, 48) for n in shape)
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        values = torch.randn(shape, generator=generator, device=self.device) * scale
        return values.to(dtype)

    # ------------------------------------------------------------------ comparisons

    def copies(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """The device's copy bandwidth, and copies of the parameters of models."""

        def one() -> Sides:
            src = self._random(1 << 14, 1 << 14, dtype=torch.float32)
            dst = torch.empty_like(src)
            sides: Sides = {"torch": (lambda: dst.copy_(src), 2 * src.nbytes)}
            for name in self._backends("copy_"):
                sides[f"ours, {name}"] = (
                    lambda name=name: ops.copy_([dst], [src], backend=name),
                    2 * src.nbytes,
                )
            return sides

        def many() -> Sides:
            srcs = self._parameters("Qwen2.5-0.5B", torch.bfloat16)
            dsts = [torch.empty_like(src) for src in srcs]
            moved = 2 * sum(src.nbytes for src in srcs)
            sides: Sides = {"torch foreach": (lambda: torch._foreach_copy_(dsts, srcs), moved)}
            for name in self._backends("copy_"):
                sides[f"ours, {name}"] = (
                    lambda name=name: ops.copy_(dsts, srcs, backend=name),
                    moved,
                )
            return sides

        yield "copy, one tensor of 1 GiB", one
        yield "copy, all parameters of Qwen2.5-0.5B, bfloat16", many

    def updates(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """Clip and update: stock optimizers in their three ways, and ours by backend."""
        for model in ("SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B"):
            for dtype in self._dtypes():
                for kind in ("SGD", "AdamW"):
                    yield (
                        f"clip + {kind}, {model}, {_name(dtype)}",
                        lambda model=model, dtype=dtype, kind=kind: self._update(
                            model, dtype, kind
                        ),
                    )

    def _update(self, model: str, dtype: torch.dtype, kind: str) -> Sides:
        params = [torch.nn.Parameter(p) for p in self._parameters(model, dtype)]
        grads = self._parameters(model, dtype, scale=1e-3)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        options = OPTIONS if kind == "SGD" else {"lr": 1e-5, "weight_decay": 0.01}

        def stock(**how: bool) -> Run:
            optimizer = getattr(torch.optim, kind)(params, **options, **how)

            def step() -> None:
                torch.nn.utils.clip_grad_norm_(params, 10.0)
                optimizer.step()

            return step

        states = [[torch.zeros_like(p) for p in params] for _ in range(1 + (kind == "AdamW"))]
        data = [p.detach() for p in params]

        def ours(backend: str) -> Run:
            def step() -> None:
                norm = ops.grad_norm(grads, backend=backend)
                clip = {"grad_norm": norm, "max_grad_norm": 10.0, "backend": backend}
                if kind == "SGD":
                    ops.sgd_(data, grads, *states, **options, **clip)
                else:
                    ops.adamw_(data, grads, *states, step_index=7, **options, **clip)

            return step

        # Norm: read g. Update: read g, w and the states; write w and the states.
        moved = (1 + 3 + 2 * len(states)) * sum(p.nbytes for p in params)
        sides: Sides = {
            "torch foreach": (stock(foreach=True), 0),
            "torch fused": (stock(fused=True), 0),
        }
        op = "sgd_" if kind == "SGD" else "adamw_"
        for name in self._backends(op):
            sides[f"ours, {name}"] = (ours(name), moved)
        return sides

    def gram_norms(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """‖dyᵀ x‖² of a projection, beside the gradient itself."""
        for T, B in ((20, 1), (64, 16), (256, 1)):
            for dtype in self._dtypes():

                def make(T: int = T, B: int = B, dtype: torch.dtype = dtype) -> Sides:
                    x = self._random(B, T, 2048, dtype=dtype)
                    dy = self._random(B, T, 8192, dtype=dtype, scale=0.1)
                    sides: Sides = {
                        "gradient, then its norm": (
                            lambda: (dy.mT @ x).float().square().sum((1, 2)),
                            0,
                        )
                    }
                    for name in self._backends("gram_norm"):
                        sides[f"ours, {name}"] = (
                            lambda name=name: ops.gram_norm(x, dy, backend=name),
                            x.nbytes + dy.nbytes,
                        )
                    return sides

                yield f"gram_norm, 2048 x 8192, B = {B}, T = {T}, {_name(dtype)}", make

    def gram_norms_of_layers(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """‖dyᵀ x‖² of all layers of a step: each by itself, and together."""
        n_layers = 3 if self.small else 168
        for T, B in ((20, 1), (20, 16), (256, 1)):

            def make(T: int = T, B: int = B) -> Sides:
                xs, dys = (
                    [self._random(B, T, 1536, dtype=torch.bfloat16) for _ in range(n_layers)]
                    for _ in range(2)
                )
                moved = sum(t.nbytes for t in (*xs, *dys))
                sides: Sides = {
                    "ours, one by one": (
                        lambda: [ops.gram_norm(x, dy) for x, dy in zip(xs, dys, strict=True)],
                        moved,
                    )
                }
                for name in self._backends("gram_norms"):
                    sides[f"ours, together, {name}"] = (
                        lambda name=name: ops.gram_norms(xs, dys, backend=name),
                        moved,
                    )
                return sides

            yield f"gram_norms, {n_layers} of 1536 x 1536, B = {B}, T = {T}, bfloat16", make

    def delta_linears(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """A factored layer, beside the plain one and the formula."""
        for B, T, R in ((1, 20, 200), (16, 20, 200), (1, 256, 1024)):
            for dtype in self._dtypes():

                def make(B: int = B, T: int = T, R: int = R, dtype: torch.dtype = dtype) -> Sides:
                    x = self._random(B, T, 2048, dtype=dtype)
                    weight = self._random(8192, 2048, dtype=dtype, scale=0.02)
                    a = self._random(B, R, 2048, dtype=dtype)
                    d = self._random(B, R, 8192, dtype=dtype, scale=0.1)
                    beta = self._random(B, R, dtype=torch.float32, scale=0.1)

                    def formula() -> Tensor:
                        scores = (x @ a.mT) * beta[:, None].to(dtype)
                        return F.linear(x, weight) - scores @ d

                    moved = weight.nbytes + a.nbytes + d.nbytes
                    sides: Sides = {
                        "formula in torch": (formula, moved),
                        "no delta": (lambda: F.linear(x, weight), weight.nbytes),
                    }
                    for name in self._backends("delta_linear"):
                        sides[f"ours, {name}"] = (
                            lambda name=name: ops.delta_linear(x, weight, a, d, beta, backend=name),
                            moved,
                        )
                    return sides

                yield f"delta_linear, 2048 x 8192, B = {B}, T = {T}, R = {R}, {_name(dtype)}", make

    def rank_updates(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """W += dyᵀ diag(β) x."""
        for R in (64, 1024):
            for dtype in self._dtypes():

                def make(R: int = R, dtype: torch.dtype = dtype) -> Sides:
                    weight = self._random(8192, 2048, dtype=dtype)
                    x = self._random(R, 2048, dtype=dtype)
                    dy = self._random(R, 8192, dtype=dtype, scale=0.1)
                    beta = self._random(R, dtype=torch.float32, scale=1e-6)
                    moved = 2 * weight.nbytes + x.nbytes + dy.nbytes
                    scaled = x * beta[:, None].to(dtype)
                    sides: Sides = {"torch addmm_": (lambda: weight.addmm_(dy.t(), scaled), moved)}
                    for name in self._backends("rank_update_"):
                        sides[f"ours, {name}"] = (
                            lambda name=name: ops.rank_update_(weight, x, dy, beta, backend=name),
                            moved,
                        )
                    return sides

                yield f"rank_update_, 8192 x 2048, R = {R}, {_name(dtype)}", make

    def rank_steps(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """An SGD step with momentum on a weight whose gradient is dyᵀ x."""
        for R in (64, 1024):
            for dtype in self._dtypes():

                def make(R: int = R, dtype: torch.dtype = dtype) -> Sides:
                    weight = self._random(8192, 2048, dtype=dtype)
                    buffer = torch.zeros_like(weight)
                    x = self._random(R, 2048, dtype=dtype)
                    dy = self._random(R, 8192, dtype=dtype, scale=0.1)
                    norm = torch.ones((), device=weight.device)
                    options = {
                        "lr": 1e-6, "momentum": 0.9, "grad_norm": norm, "max_grad_norm": 10.0,
                    }  # fmt: skip
                    moved = 4 * weight.nbytes + x.nbytes + dy.nbytes

                    def formed() -> None:
                        grad = torch.mm(dy.t(), x)
                        ops.sgd_([weight], [grad], [buffer], **options)

                    sides: Sides = {"ours, gradient formed": (formed, moved + 2 * weight.nbytes)}
                    for name in self._backends("rank_sgd_"):
                        sides[f"ours, {name}"] = (
                            lambda name=name: ops.rank_sgd_(
                                [weight], [x], [dy], [buffer], backend=name, **options
                            ),
                            moved,
                        )
                    return sides

                yield f"rank_sgd_, 8192 x 2048, R = {R}, {_name(dtype)}", make

    def losses(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """Loss of tokens and its gradient."""
        for M, V in ((64, 49152), (256, 151936)):
            for dtype in self._dtypes():

                def make(M: int = M, V: int = V, dtype: torch.dtype = dtype) -> Sides:
                    logits = self._random(M, V, dtype=dtype)
                    targets = torch.arange(len(logits), device=self.device)
                    leaf = logits.clone().requires_grad_()

                    def stock() -> None:
                        F.cross_entropy(leaf.float(), targets, reduction="sum").backward()
                        leaf.grad = None

                    sides: Sides = {"torch cross_entropy": (stock, 2 * logits.nbytes)}
                    for name in self._backends("nll_"):
                        # Gradients take the place of the logits: other values, the same work.
                        sides[f"ours, {name}"] = (
                            lambda name=name: ops.nll_(logits, targets, backend=name),
                            2 * logits.nbytes,
                        )
                    return sides

                yield f"nll_, M = {M}, V = {V}, {_name(dtype)}", make

    def adaptations(self) -> Iterator[tuple[str, Callable[[], Sides]]]:
        """SmolLM2-135M, K steps and restore, beside the loop that a researcher writes."""
        for D, T, K in ((1, 20, 10), (1, 256, 10), (16, 20, 10)):
            for dtype in self._dtypes():
                yield (
                    f"adapt SmolLM2-135M, D = {D}, T = {T}, K = {K}, {_name(dtype)}",
                    lambda D=D, T=T, K=K, dtype=dtype: self._adaptation(D, T, K, dtype),
                )

    def _adaptation(self, D: int, T: int, K: int, dtype: torch.dtype) -> Sides:
        model = self._model(dtype).to(self.device)
        if self.small:
            D, T, K = min(D, 2), 5, 2
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 100, (D, T), generator=generator).to(self.device)
        options = {"steps": K, "lr": 1e-4, "momentum": 0.9, "max_grad_norm": 10.0}
        losses: dict[str, Tensor] = {}

        def naive(**how: bool) -> Run:
            def run() -> None:
                for row in ids:
                    result = naive_adapt(model, row[None], optimizer_kwargs=how, **options)
                    result.restore()
                    losses.setdefault("naive", result.losses.float().cpu())

            return run

        def ours(engine: str, graph: bool) -> Run:
            config = TTTConfig(engine=engine, cuda_graph=graph, **options)
            trainer = TTTTrainer(model, config)

            def run() -> None:
                with trainer.adapt(ids, deltas="independent") as adapted:
                    losses[engine] = adapted.losses[0].float().cpu()

            return run

        sides: Sides = {
            "naive loop": (naive(), 0),
            "naive loop, fused SGD": (naive(fused=True), 0),
            "ours, dense": (ours("dense", False), 0),
            "ours, factored": (ours("factored", False), 0),
        }
        if self.device.type == "cuda":
            sides["ours, dense, graph"] = ours("dense", True), 0
            sides["ours, factored, graph"] = ours("factored", True), 0
        for name, (run, _) in sides.items():
            # A graph is recorded for the second prompt, and replayed from the third on.
            for _ in range(2 if name.endswith("graph") else 1):
                run()
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        for engine in ("dense", "factored"):
            torch.testing.assert_close(losses[engine], losses["naive"], atol=tolerance, rtol=0)
        return sides

    def _model(self, dtype: torch.dtype) -> torch.nn.Module:
        if self.small:
            from tests.families import tiny_model

            return tiny_model("llama_tied", dtype)
        from ttt_fast.demo import load_demo_model

        return load_demo_model(dtype)[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    """Run the suite and write its JSON."""
    parser = argparse.ArgumentParser(description="Benchmarks for a GPU.")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    result = Suite(torch.device(args.device), args.small).run()
    args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
