"""Lists of tensors on which the update ops are tested, and ways to compare what they became."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttt_fast import ops
from ttt_fast.backend import available_backends, backends_on
from ttt_fast.rounding import compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SLICE_SHAPES = [(96, 48), (128, 96), (200, 48), (64, 64), (96, 192)]
ODD_SIZES = ((0,), (1,), (7,), (4097,), (65537,), (131075,), (), (3, 5, 7))
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def backend_params(device_type: str = "cpu") -> list[Any]:
    """The backends for a device as pytest parameters; one that is not available is skipped.

    test_backend.py fails when the extension is not there, so that this skip hides nothing.
    """
    import pytest

    return [
        pytest.param(
            name, marks=pytest.mark.skipif(status != "ok", reason=f"backend {name}: {status}")
        )
        for name, status in available_backends().items()
        if name in backends_on(device_type)
    ]


def bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor, flat, as integers; every NaN as the same one."""
    tensor = tensor.detach().contiguous().flatten()
    tensor = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    return tensor.view(_BITS[tensor.element_size()])


def assert_same_bits(actual: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Compare lists bit for bit and name the first element that differs."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape, f"{what}[{i}]"
        wrong = (bits(a) != bits(e)).nonzero()
        if len(wrong):
            k = int(wrong[0])
            raise AssertionError(
                f"{what}[{i}] {a.dtype} {tuple(a.shape)}: {len(wrong)} elements differ, "
                f"first at {k}: {a.contiguous().flatten()[k].item()!r} instead of "
                f"{e.contiguous().flatten()[k].item()!r}"
            )


def for_each_number_of_threads(run: Callable[[], Any], numbers: Sequence[int] = (1, 2, 5)) -> list:
    """What ``run`` returns with each number of threads, which is afterwards as it was found."""
    found = torch.get_num_threads()
    try:
        results = []
        for n in numbers:
            torch.set_num_threads(n)
            results.append(run())
        return results
    finally:
        torch.set_num_threads(found)


@dataclass
class Case:
    """Parameters, gradients and the state that an update reads and writes."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    deltas: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)
    landed: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def clone(self) -> Case:
        """Copy everything; views stay views with the same strides."""

        def copies(tensors: list[Tensor]) -> list[Tensor]:
            return [_clone_view(t) for t in tensors]

        return Case(
            copies(self.params),
            copies(self.grads),
            [copies(state) for state in self.states],
            copies(self.deltas),
            copies(self.bases),
            self.landed.clone(),
        )

    def assert_same(self, expected: Case) -> None:
        """Compare everything bit for bit, the float64 sums of `landed` to a few ulp."""
        assert_same_bits(self.params, expected.params, "params")
        for k, (mine, theirs) in enumerate(zip(self.states, expected.states, strict=True)):
            assert_same_bits(mine, theirs, f"state {k}")
        assert_same_bits(self.deltas, expected.deltas, "deltas")
        assert_same_bits(self.grads, expected.grads, "grads")
        torch.testing.assert_close(self.landed, expected.landed, rtol=1e-12, atol=1e-30)


def _clone_view(tensor: Tensor) -> Tensor:
    """Clone the memory around a view, so that the copy has its strides and offset."""
    if tensor.numel() == 0:
        return tensor.clone()
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.clone().as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def make_case(
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    *,
    n_states: int = 0,
    wide_grads: bool = False,
    wide_states: bool = False,
    accumulate: bool = False,
    seed: int = 0,
) -> Case:
    """Random tensors of the given shapes; dtypes are cycled through."""
    generator = torch.Generator().manual_seed(seed)
    case = Case([], [], [[] for _ in range(n_states)])
    for i, shape in enumerate(shapes):
        dtype = dtypes[i % len(dtypes)]
        wide = compute_dtype(dtype)

        def random(scale: float, to: torch.dtype, shape: tuple[int, ...] = shape) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(to)

        case.params.append(random(0.5, dtype))
        case.grads.append(random(0.3, wide if wide_grads else dtype))
        for k, state in enumerate(case.states):
            # The second moment of AdamW must not be negative.
            value = random(0.1, wide if wide_states else dtype)
            state.append(value.square() if k == 1 else value)
        if accumulate:
            case.bases.append(case.params[-1].clone())
            case.deltas.append(random(0.01, wide))
    return case


def odd_case(n_states: int, wide: str, accumulate: bool) -> Case:
    """Every odd size, every dtype; ``wide`` says what is kept in the compute type, if anything."""
    return make_case(
        ODD_SIZES, DTYPES, n_states=n_states, wide_grads=wide == "grads",
        wide_states=wide == "states", accumulate=accumulate,
    )  # fmt: skip


def steps_of_grads(params: list[Tensor], steps: int = 20) -> list[list[Tensor]]:
    """Random gradients of some steps, in the dtypes of the parameters."""
    generator = torch.Generator().manual_seed(5)
    return [
        [(torch.randn(p.shape, generator=generator) * 0.3).to(p.dtype) for p in params]
        for _ in range(steps)
    ]


def row_slices(tensors: list[Tensor]) -> list[Tensor]:
    """Views as a row slice of a fused projection makes them, one kind after the other.

    The tensors must be (96, 48) or larger in both dimensions: rows 16..32 of each 32 (interleaved
    heads), columns 16..48 of the second dimension (Conv1D), rows 40..72 (a contiguous piece).
    """
    kinds = [
        lambda t: t.unflatten(0, (-1, 32)).narrow(1, 16, 16),
        lambda t: t.unflatten(1, (1, -1)).narrow(2, 16, 32),
        lambda t: t.narrow(0, 40, 32),
        lambda t: t.t(),
        lambda t: t[:, ::3],
    ]
    return [kinds[i % len(kinds)](t) for i, t in enumerate(tensors)]


def as_row_slices(case: Case) -> Case:
    """Restrict every list of a case to :func:`row_slices`."""
    return Case(
        row_slices(case.params),
        row_slices(case.grads),
        [row_slices(state) for state in case.states],
        row_slices(case.deltas),
        row_slices(case.bases),
    )


def sgd_step(case: Case, backend: str, measure: bool = True, **options: Any) -> None:
    """Apply ops.sgd_ to a case."""
    buffers = case.states[0] if case.states else []
    ops.sgd_(
        case.params, case.grads, buffers, deltas=case.deltas, bases=case.bases,
        landed=case.landed if measure else None, backend=backend, **options,
    )  # fmt: skip


def adamw_step(case: Case, backend: str, measure: bool = True, **options: Any) -> None:
    """Apply ops.adamw_ to a case."""
    ops.adamw_(
        case.params, case.grads, *case.states, deltas=case.deltas, bases=case.bases,
        landed=case.landed if measure else None, backend=backend, **options,
    )  # fmt: skip
