"""The frozen linear layers of SmolLM2-135M's 30 blocks, forward and input gradient, beside torch's.

As an engine calls them: one call for queries, keys and values, one for gate and up.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import Sides
from bench.shapes import MODELS
from ttt_fast import ops

MODEL = MODELS["SmolLM2-135M"]


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.float32), (20, torch.float32), (256, torch.float32), (1, torch.bfloat16),
     (20, torch.bfloat16)],
    ids=str,
)  # fmt: skip
def bench_linears(compare: Callable[..., None], tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    calls: list[tuple[Tensor, list[Tensor], list[Tensor]]] = []
    matrices = [shape for shape in MODEL.parameter_shapes() if len(shape) == 2]
    layers = matrices[1 : 1 + 7 * MODEL.layers]  # queries, keys, values, output, gate, up, down
    for block in range(0, len(layers), 7):
        for shapes in (layers[block : block + 3], layers[block + 3 : block + 4],
                       layers[block + 4 : block + 6], layers[block + 6 : block + 7]):  # fmt: skip
            weights = [random(*shape) * 0.02 for shape in shapes]
            x, dys = random(tokens, shapes[0][1]), [random(tokens, out) for out, _ in shapes]
            calls.append((x, dys, weights))

    def stock() -> list[Tensor]:
        found = []
        for x, dys, weights in calls:
            found += [F.linear(x, weight) for weight in weights]
            found.append(sum(dy @ weight for dy, weight in zip(dys, weights, strict=True)))
        return found

    def ours() -> list[Tensor]:
        found = []
        for x, dys, weights in calls:
            found += ops.linears(x, weights, backend="cpp")
            found.append(ops.linears_backward(dys, weights, backend="cpp"))
        return found

    for actual, expected in zip(ours(), stock(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=5e-2)
    elements = sum(weight.numel() for _, _, weights in calls for weight in weights)
    moved, operations = 2 * elements * dtype.itemsize, 4 * tokens * elements
    sides: Sides = {"torch": (stock, moved, operations), "ours": (ours, moved, operations)}
    compare(f"linears, {tokens} tokens, {dtype}", sides, baseline="torch")
