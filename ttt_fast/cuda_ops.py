"""The ops of ``csrc/cuda/``: functions with the names and arguments of ``reference.py``.

Each turns its lists into the tables of :mod:`ttt_fast.kernels.pointer_table`, allocates scratch and
launches on the current stream; nothing here waits for the device. :mod:`ttt_fast.ops` has checked
the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttt_fast.kernels.pointer_table import (
    PointerTable,
    device_integers,
    has_long_runs,
    pointer_tables,
    with_long_runs,
)
from ttt_fast.reference import UNDO_CHUNK
from ttt_fast.rounding import compute_dtype

OPS = (
    "sgd_", "adamw_", "grad_norm", "gram_norm", "gram_norms", "copy_", "undo_restore_",
)  # fmt: skip

# Where csrc/ops_cuda.cpp registers; the tests put the namespace of the emulated kernels here.
NAMESPACE = "ttt_fast_cuda"

# Elements of a block. Many blocks keep the last ones from being waited for, each costs some 60
# bytes of table.
CHUNK = 16384
# Undo slots that are restored at a time, with 4 bytes of scratch for each.
RESTORE_SLOTS = 1 << 26

# enum Dtype of csrc/tensor_view.h.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, None: 4}
# kLists and kGramTile of csrc/cuda/launchers.h.
_LISTS = 6
_GRAM_TILE = 32


def _kernels() -> Any:
    return getattr(torch.ops, NAMESPACE)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _columns(table: PointerTable) -> list[Tensor]:
    return [table.pointers, table.numel, table.index, table.tensor]


def _log(
    undo: Sequence[Tensor], offsets: Sequence[int], params: Sequence[Tensor], n_states: int
) -> list[Tensor]:
    """What the kernels need of a log: its tensors, offset and size of each parameter, scratch."""
    sizes = [param.numel() for param in params]
    table = device_integers([*offsets, *sizes], undo[3].device).view(2, -1)
    return [*undo, *table, undo[3].new_empty(n_states)]


def _update(
    op: str,
    lists: Sequence[Sequence[Tensor]],
    states: Mapping[str, Sequence[Tensor]],
    scalars: Sequence[Tensor | None],
    landed: Tensor | None,
    undo: Sequence[Tensor],
    undo_offsets: Sequence[int],
    *,
    rounding: str,
    **options: Any,
) -> None:
    """Launch an update for each group of tensors; lists and states are as in ``UpdateList``."""
    names = {0: "params", 2: "deltas", **dict(enumerate(states, 4))}
    written = {position: f"{op}: {name}" for position, name in names.items()}
    lists, copies = with_long_runs([*lists, *states.values()], written)
    lists += [()] * (_LISTS - len(lists))
    for table in pointer_tables(lists, CHUNK, written):
        device = table.pointers.device
        log, sums = [], []
        if undo and table.dtypes[0].itemsize == 2:
            log = _log(undo, undo_offsets, lists[0], table.n_chunks)
        if landed is not None:
            total = landed if landed.device == device else torch.zeros_like(landed, device=device)
            sums = [total, total.new_empty(2 * table.n_chunks)]
        getattr(_kernels(), op)(
            _columns(table), [_CODES[dtype] for dtype in table.dtypes], table.aligned,
            *(scalar if scalar is None else scalar.to(device) for scalar in scalars), sums, log,
            stochastic=rounding == "stochastic", stream=_stream(device), **options,
        )  # fmt: skip
        if sums and sums[0] is not landed:
            landed += sums[0].to(landed.device)
    for tensor, copy in copies:
        tensor.copy_(copy)


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    deltas: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    landed: Tensor | None = None,
    undo: Sequence[Tensor] = (),
    undo_offsets: Sequence[int] = (),
    **options: Any,
) -> None:
    """See :func:`ttt_fast.ops.sgd_`; ``options`` are all of ``reference.sgd_``'s."""
    states = {"momentum_buffers": momentum_buffers if options["momentum"] else ()}
    _update(
        "sgd_", [params, grads, deltas, bases], states, [grad_norm, grad_scale, found_inf],
        landed, undo, undo_offsets, **options,
    )  # fmt: skip


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    deltas: Sequence[Tensor] = (),
    bases: Sequence[Tensor] = (),
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    landed: Tensor | None = None,
    undo: Sequence[Tensor] = (),
    undo_offsets: Sequence[int] = (),
    **options: Any,
) -> None:
    """See :func:`ttt_fast.ops.adamw_`; ``options`` are all of ``reference.adamw_``'s."""
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _update(
        "adamw_", [params, grads, deltas, bases], states, [grad_norm, grad_scale, found_inf],
        landed, undo, undo_offsets, **options,
    )  # fmt: skip


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """See :func:`ttt_fast.ops.grad_norm`; the gradients are on one device."""
    double = any(grad.dtype == torch.float64 for grad in grads)
    dtype = torch.float64 if double else torch.float32
    if not grads:
        return torch.zeros((), dtype=dtype)
    device = grads[0].device
    lists, _ = with_long_runs([grads], {})
    tables = pointer_tables(lists, CHUNK)
    sums = torch.empty(sum(table.n_chunks for table in tables), dtype=torch.float64, device=device)
    norm = torch.empty((), dtype=dtype, device=device)
    stream = _stream(device)
    parts = sums.split([table.n_chunks for table in tables])
    for table, part in zip(tables, parts, strict=True):
        _kernels().sum_of_squares_(
            _columns(table), _CODES[table.dtypes[0]], table.aligned, part, stream=stream
        )
    _kernels().norm_of_sums_(norm, sums, stream=stream)
    return norm


def gram_norm(x: Tensor, dy: Tensor) -> Tensor:
    """See :func:`ttt_fast.ops.gram_norm`."""
    x, dy = (t if t.stride(2) == 1 else t.contiguous() for t in (x, dy))
    batch, tokens, _ = x.shape
    norms = x.new_empty(batch, dtype=compute_dtype(x.dtype))
    tiles = -(-tokens // _GRAM_TILE)
    partial = x.new_empty(batch * tiles * (tiles + 1) // 2, dtype=torch.float64)
    if batch:
        _kernels().gram_norm_(norms, partial, x, dy, stream=_stream(x.device))
    return norms


def gram_norms(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    """See :func:`ttt_fast.ops.gram_norms`; two launches a pair, all in one is Triton's."""
    return torch.stack([gram_norm(x, dy) for x, dy in zip(xs, dys, strict=True)])


def copy_(dsts: Sequence[Tensor], srcs: Sequence[Tensor]) -> None:
    """See :func:`ttt_fast.ops.copy_`; both lists are on one device, pair by pair."""
    long: tuple[list[Tensor], list[Tensor]] = ([], [])
    for dst, src in zip(dsts, srcs, strict=True):
        if has_long_runs(dst) and has_long_runs(src):
            long[0].append(dst)
            long[1].append(src)
        else:
            dst.copy_(src)
    for table in pointer_tables(long, CHUNK, {0: "dsts"}):
        _kernels().copy_(
            _columns(table), table.dtypes[0].itemsize, table.aligned,
            stream=_stream(table.pointers.device),
        )  # fmt: skip


def undo_restore_(
    params: Sequence[Tensor], undo: Sequence[Tensor], undo_offsets: Sequence[int]
) -> None:
    """See :func:`ttt_fast.ops.undo_restore_`."""
    written = {0: "undo_restore_: params"}
    lists, copies = with_long_runs([params], written)
    tables = [t for t in pointer_tables(lists, CHUNK, written) if t.dtypes[0].itemsize == 2]
    log = _log(undo, undo_offsets, params, 0)
    slots = UNDO_CHUNK * len(undo[3])
    for first in range(0, slots, RESTORE_SLOTS):
        oldest = undo[0].new_full((min(RESTORE_SLOTS, slots - first),), -1)
        for table in tables:
            _kernels().undo_restore_(
                _columns(table), log, oldest, first, stream=_stream(oldest.device)
            )
    for tensor, copy in copies:
        tensor.copy_(copy)
