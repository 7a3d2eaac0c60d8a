"""What the update kernels share: scaling a gradient, writing a step, undo log, update_landed.

Nothing here moves a byte that the update does not move anyway, but for

    update_landed   16 bytes a chunk, and what a second, tiny launch reads of that
    undo log        6 bytes an element that changed, 1 byte a chunk, and 2 bytes an element of a run
                    of 65536 in the step in which it changes too much to be logged

Sums are made in a fixed order, whatever order programs run in. Only what the undo log holds depends
on it (order of the entries, and how many of a run came before its page), not what it restores.

Reference: _gradient_factor, _apply_step, _record_landed and undo_record_ in ttt_fast/reference.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.blocks import (
    SUMS_BLOCK,
    SUMS_WARPS,
    TRITON_DTYPES,
    chunk_pointer,
    divide,
    read,
    scalar,
    write,
)
from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.pointer_table import device_integers, pointer_tables, with_long_runs
from ttt_fast.kernels.rounding import random_bits, random_key, round_stochastic, seed_key
from ttt_fast.reference import UNDO_CHUNK
from ttt_fast.rounding import compute_dtype

# Elements of a program, a straight line of accesses of 128 bits. 8 elements a thread keep SGD with
# momentum at 32 to 39 registers; 16 took 64, and halved the threads that can be resident.
BLOCK = 4096
NUM_WARPS = 16
# Chunks whose state in the undo log a program of the small launch reads.
PAGES_BLOCK = 64

# Lists of a table, before the kernel's own states.
_PARAMS: tl.constexpr = tl.constexpr(0)
GRADS: tl.constexpr = tl.constexpr(1)
_DELTAS: tl.constexpr = tl.constexpr(2)
_BASES: tl.constexpr = tl.constexpr(3)
STATES: tl.constexpr = tl.constexpr(4)

# State of a chunk in this step's undo log.
_SKIPPED: tl.constexpr = tl.constexpr(0)  # not tracked, or its run was kept whole before
_LOGGED: tl.constexpr = tl.constexpr(1)
_PAGED: tl.constexpr = tl.constexpr(2)
_UNDO_CHUNK: tl.constexpr = tl.constexpr(UNDO_CHUNK)


# ---------------------------------------------------------------------------- the gradient


@triton.jit
def live_numel(numel, found_inf):
    """Elements to work on: none where ``found_inf`` is set."""
    if found_inf is not None:
        numel = tl.where(tl.load(found_inf) != 0, 0, numel)
    return numel


@triton.jit
def _at_least_float32(x):
    if x.dtype == tl.float64:
        return x
    else:
        return x.to(tl.float32)


@triton.jit
def scale_gradient(
    g, grad_norm, max_grad_norm, grad_scale, CLIP: tl.constexpr, MAXIMIZE: tl.constexpr
):
    """Return g · min(1, max_grad_norm / (grad_norm + 1e-6)) / grad_scale, negated to maximise.

    The factor is computed in the types that torch's promotion gives in the reference.
    """
    if CLIP:
        norm = _at_least_float32(tl.load(grad_norm))
        # torch divides a number by a tensor as reciprocal times number.
        factor = divide(tl.full((), 1.0, norm.dtype), norm + 1e-6)
        factor *= scalar(max_grad_norm, norm.dtype)
        factor = tl.where(factor > 1.0, 1.0, factor)  # NaN stays NaN
        if grad_scale is not None:
            scale = _at_least_float32(tl.load(grad_scale))
            if scale.dtype == tl.float64:
                factor = factor.to(tl.float64)
            factor = divide(factor, scale.to(factor.dtype))
        g *= factor.to(g.dtype)
    elif grad_scale is not None:
        scale = _at_least_float32(tl.load(grad_scale))
        g *= divide(tl.full((), 1.0, scale.dtype), scale).to(g.dtype)
    if MAXIMIZE:
        g = -g
    return g


# ---------------------------------------------------------------------------- the weight


@triton.jit
def read_weight(
    pointers, n_chunks, chunk, lanes, mask, PARAM: tl.constexpr, COMPUTE: tl.constexpr,
    DELTA: tl.constexpr, COMPARE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return the stored weight, base, delta, and the weight that decay sees: base + delta, if any.

    With a delta the stored weight is only read for ``COMPARE``. What is not read is not used.
    """
    if DELTA:
        base = read(
            chunk_pointer(pointers, n_chunks, chunk, _BASES, PARAM, ALIGNED) + lanes, mask, MASKED
        )
        delta = read(
            chunk_pointer(pointers, n_chunks, chunk, _DELTAS, COMPUTE, ALIGNED) + lanes,
            mask,
            MASKED,
        )
        weight = base.to(COMPUTE) + delta
    if COMPARE or not DELTA:
        before = read(
            chunk_pointer(pointers, n_chunks, chunk, _PARAMS, PARAM, ALIGNED) + lanes, mask, MASKED
        )
    else:
        before = base
    if not DELTA:
        weight = before.to(COMPUTE)
        base, delta = before, weight
    return before, base, delta, weight


@triton.jit
def apply_step(
    pointers, n_chunks, place, step, before, base, delta, lanes, mask, landed_sums, undo,
    PARAM: tl.constexpr, COMPUTE: tl.constexpr, DELTA: tl.constexpr, LANDED: tl.constexpr,
    STOCHASTIC: tl.constexpr, UNDO: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write round(before + step), or round(base + delta) after delta += step; log and measure it.

    ``place`` is (chunk, its elements, its first index, tensor, seed key), ``undo`` what the undo
    log needs.
    """
    chunk, numel, first, tensor, seed_key = place
    if DELTA:
        delta += step
        delta_pointer = chunk_pointer(pointers, n_chunks, chunk, _DELTAS, COMPUTE, ALIGNED)
        write(delta_pointer + lanes, delta, mask, MASKED)
        target = base.to(COMPUTE) + delta
    else:
        target = before.to(COMPUTE) + step
    if STOCHASTIC:
        bits = random_bits(random_key(seed_key, tensor), first + lanes)
        after = round_stochastic(target, bits, PARAM)
    else:
        after = target.to(PARAM)
    if LANDED:
        wide = step.to(tl.float64)
        moved = (after.to(tl.float64) - before.to(tl.float64)) * wide
        square = wide * wide
        if MASKED:
            moved = tl.where(mask, moved, 0.0)
            square = tl.where(mask, square, 0.0)
        tl.store(landed_sums + 2 * chunk, tl.sum(moved))
        tl.store(landed_sums + 2 * chunk + 1, tl.sum(square))
    if UNDO:
        _record_undo(before, after, lanes, mask, place, undo, MASKED)
    param_pointer = chunk_pointer(pointers, n_chunks, chunk, _PARAMS, PARAM, ALIGNED)
    write(param_pointer + lanes, after, mask, MASKED)


# ---------------------------------------------------------------------------- undo log


@triton.jit
def _undo_place(first, tensor, offsets):
    """Position of a chunk in the log, -1 where untracked, and the limit of its run."""
    offset = tl.load(offsets + 2 * tensor)
    total = tl.load(offsets + 2 * tensor + 1)
    run = tl.minimum(total - first // _UNDO_CHUNK * _UNDO_CHUNK, _UNDO_CHUNK)
    return tl.where(offset < 0, -1, offset + first), run // 3


@triton.jit
def _record_undo(before, after, lanes, mask, place, undo, MASKED: tl.constexpr):
    """Log what changes in a chunk, or keep the chunk whole where its run has no room left.

    Several programs share a run of 65536 elements. Room is claimed from the run's count first; a
    program that gets none writes its chunk's old values to the page. What the other programs of
    such a run have logged stays valid; undo_pages_kernel completes the page afterwards.
    """
    chunk, numel, first, tensor, seed_key = place
    log_index, log_value, cursor, counts, paged, pages, offsets, states = undo
    old = before.to(tl.int16, bitcast=True)
    changed = old != after.to(tl.int16, bitcast=True)
    if MASKED:
        changed = changed & mask
    position, limit = _undo_place(first, tensor, offsets)
    state = tl.full((), _SKIPPED, tl.int8)
    if (position >= 0) & (numel > 0):
        run = position // _UNDO_CHUNK
        # Written after the update only, so that all programs of a run see the same.
        if tl.load(paged + run) == 0:
            one = changed.to(tl.int32)
            count = tl.sum(one)
            state = tl.full((), _LOGGED, tl.int8)
            if count > 0:
                if tl.atomic_add(counts + run, count, sem="relaxed") + count <= limit:
                    entry = tl.atomic_add(cursor, count.to(tl.int64), sem="relaxed")
                    entry += tl.cumsum(one, 0) - one
                    # Unsigned 32-bit numbers kept in int32.
                    tl.store(log_index + entry, (position + lanes).to(tl.int32), mask=changed)
                    tl.store(log_value + entry, old, mask=changed)
                else:
                    state = tl.full((), _PAGED, tl.int8)
                    write(pages + position + lanes, old, mask, MASKED)
    tl.store(states + chunk, state)


@triton.jit(do_not_specialize=["n_chunks"])
def undo_pages_kernel(
    pointers, numels, index, tensors, n_chunks, undo_counts, undo_paged, undo_pages, undo_offsets,
    undo_states, PAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Complete the pages of runs that ran out of room in this step, and mark them as kept whole.

    A chunk that was logged takes the values that it has now: those of its elements that changed
    have entries, which are restored after the pages.
    """
    begin = tl.program_id(0) * PAGES
    end = tl.minimum(begin + PAGES, n_chunks)
    chunks = tl.minimum(begin + tl.arange(0, PAGES), end - 1)
    states = tl.load(undo_states + chunks)
    position, limit = _undo_place(tl.load(index + chunks), tl.load(tensors + chunks), undo_offsets)
    runs = tl.maximum(position, 0) // _UNDO_CHUNK
    tracked = states != _SKIPPED
    full = tracked & (tl.load(undo_counts + runs, mask=tracked, other=0) > limit)
    tl.store(undo_paged + runs, tl.full((PAGES,), 1, tl.uint8), mask=full)
    if tl.sum(full.to(tl.int32)) > 0:
        lanes = tl.arange(0, BLOCK)
        for chunk in range(begin, end):
            if tl.load(undo_states + chunk) == _LOGGED:
                first, tensor = tl.load(index + chunk), tl.load(tensors + chunk)
                at, room = _undo_place(first, tensor, undo_offsets)
                if tl.load(undo_counts + at // _UNDO_CHUNK) > room:
                    mask = lanes < tl.load(numels + chunk)
                    pointer = tl.load(pointers + chunk).to(tl.pointer_type(tl.int16))
                    bits = tl.load(pointer + lanes, mask=mask)
                    tl.store(undo_pages + at + lanes, bits, mask=mask)


# ---------------------------------------------------------------------------- update_landed


@triton.jit(do_not_specialize=["n_chunks"], do_not_specialize_on_alignment=["landed"])
def landed_kernel(sums, n_chunks, landed, BLOCK: tl.constexpr):
    """Add the sums of all chunks to ``landed``, in a fixed order; one program."""
    lanes = tl.arange(0, BLOCK)
    moved = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n_chunks, BLOCK):
        mask = first + lanes < n_chunks
        moved += tl.load(sums + 2 * (first + lanes), mask=mask, other=0.0)
        square += tl.load(sums + 2 * (first + lanes) + 1, mask=mask, other=0.0)
    tl.store(landed, tl.load(landed) + tl.sum(moved))
    tl.store(landed + 1, tl.load(landed + 1) + tl.sum(square))


# ---------------------------------------------------------------------------- host side


def launch_update(
    kernel: Any,
    lists: Sequence[Sequence[Tensor]],
    written: Mapping[int, str],
    scalars: Mapping[str, Tensor | None],
    landed: Tensor | None,
    undo: Sequence[Tensor],
    undo_offsets: Sequence[int],
    *,
    rounding: str,
    seed: int,
    **arguments: Any,
) -> None:
    """Launch an update kernel for each group of tensors, then what completes log and sums.

    Args:
        kernel: sgd_kernel or adamw_kernel.
        lists: params, grads, deltas, bases, then the kernel's states.
        written: names of the lists that are written, by position.
        scalars: grad_norm, grad_scale and found_inf, on any device.
        landed: (2,) float64, added to; on any device.
        undo: tensors of an undo log.
        undo_offsets: position of each parameter in the log.
        rounding: "nearest" or "stochastic".
        seed: of the random bits.
        arguments: the kernel's other arguments.
    """
    lists, copies = with_long_runs(lists, written)
    tables = pointer_tables(lists, BLOCK)
    if not tables:
        return
    device = tables[0].pointers.device
    scalars = {name: None if x is None else x.to(device) for name, x in scalars.items()}
    n_chunks = sum(table.n_chunks for table in tables)
    sums = offsets = None
    if landed is not None:
        sums = torch.empty(n_chunks, 2, dtype=torch.float64, device=device)
    if undo:
        pairs = zip(undo_offsets, lists[0], strict=True)
        offsets = device_integers([x for o, p in pairs for x in (o, p.numel())], device)
    begin = 0
    for table in tables:
        own_sums = None if sums is None else sums[begin : begin + table.n_chunks]
        begin += table.n_chunks
        columns = (table.pointers, table.numel, table.index, table.tensor, table.n_chunks)
        logged = bool(undo) and table.dtypes[0].itemsize == 2
        states = torch.empty(table.n_chunks, dtype=torch.int8, device=device) if logged else None
        kernel[(table.n_chunks,)](
            *columns, **scalars, landed_sums=own_sums, seed_key=seed_key(seed),
            **_undo_arguments(undo if logged else [None] * 6, offsets if logged else None, states),
            **_constants(table.dtypes, table.aligned, rounding), **arguments,
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
        if logged:
            undo_pages_kernel[(triton.cdiv(table.n_chunks, PAGES_BLOCK),)](
                *columns, undo[3], undo[4], undo[5], offsets, states, PAGES=PAGES_BLOCK,
                BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
    for tensor, copy in copies:
        tensor.copy_(copy)
    if landed is not None:
        add_landed(sums, landed)


def add_landed(sums: Tensor, landed: Tensor) -> None:
    """Add the rows of sums (n, 2) to ``landed``, which may be on another device."""
    total = landed.to(sums.device)
    landed_kernel[(1,)](
        sums, len(sums), total, BLOCK=SUMS_BLOCK, num_warps=SUMS_WARPS, num_stages=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    if total is not landed:
        landed.copy_(total)


def _undo_arguments(
    undo: Sequence[Tensor | None], offsets: Tensor | None, states: Tensor | None
) -> dict[str, Tensor | None]:
    names = ("index", "value", "cursor", "counts", "paged", "pages", "offsets", "states")
    tensors = zip(names, (*undo, offsets, states), strict=True)
    return {f"undo_{name}": tensor for name, tensor in tensors}


def _constants(
    dtypes: Sequence[torch.dtype | None], aligned: bool, rounding: str
) -> dict[str, Any]:
    """Compile-time arguments that follow from a table: types, alignment, block."""
    param, grad, delta, _, *states = dtypes
    names = ("STATE", "STATE2")[: len(states)]
    return {
        "PARAM": TRITON_DTYPES[param], "GRAD": TRITON_DTYPES[grad],
        "COMPUTE": TRITON_DTYPES[compute_dtype(param)], "DELTA": delta is not None,
        "STOCHASTIC": rounding == "stochastic" and param.itemsize == 2, "ALIGNED": aligned,
        "BLOCK": BLOCK, **{n: TRITON_DTYPES.get(d) for n, d in zip(names, states, strict=True)},
    }  # fmt: skip


# ---------------------------------------------------------------------------- machine code

_TABLE = {"pointers": "*i64", "numels": "*i32", "index": "*i64", "tensors": "*i32"}
_UNDO = {
    "undo_index": "*i32", "undo_value": "*i16", "undo_cursor": "*i64", "undo_counts": "*i32",
    "undo_paged": "*u8", "undo_pages": "*i16", "undo_offsets": "*i64", "undo_states": "*i8",
}  # fmt: skip


def update_case(
    name: str,
    kernel: Any,
    bytes_per_element: float,
    dtypes: Sequence[torch.dtype | None],
    options: Mapping[str, Any],
    *,
    landed: bool = False,
    undo: bool = False,
    rounding: str = "nearest",
) -> Case:
    """A call of an update kernel by :func:`launch_update`, for the machine-code gate.

    Args:
        name: what the call does.
        kernel: sgd_kernel or adamw_kernel.
        bytes_per_element: memory that it must not exceed.
        dtypes: of the lists of the table.
        options: the kernel's own compile-time arguments.
        landed: with update_landed.
        undo: with an undo log.
        rounding: "nearest" or "stochastic".
    """
    pointers = _TABLE | ({"landed_sums": "*fp64"} if landed else {}) | (_UNDO if undo else {})
    loose = {"n_chunks": "i32", "seed_key": "i64", "grad_norm": "*fp32", "found_inf": "*fp32"}
    loose |= {n: "fp64" for n, kind in kernel.fn.__annotations__.items() if kind == "tl.float64"}
    absent = {"landed_sums", "grad_scale", *_UNDO} - set(pointers)
    return Case(
        name, kernel, pointers | loose,
        dict.fromkeys(absent) | _constants(dtypes, True, rounding) | dict(options), NUM_WARPS,
        divisible=tuple(pointers), bytes_per_element=bytes_per_element, block=BLOCK,
    )  # fmt: skip


CASES = [
    Case(
        "chunks of an undo log", undo_pages_kernel,
        _TABLE | {"n_chunks": "i32"} | {k: _UNDO[k] for k in list(_UNDO)[3:]},
        {"PAGES": PAGES_BLOCK, "BLOCK": BLOCK}, NUM_WARPS,
        divisible=(*_TABLE, *list(_UNDO)[3:]),
    ),
    Case(
        "sums of update_landed", landed_kernel,
        {"sums": "*fp64", "n_chunks": "i32", "landed": "*fp64"}, {"BLOCK": SUMS_BLOCK}, SUMS_WARPS,
        divisible=("sums",),
    ),
]  # fmt: skip
