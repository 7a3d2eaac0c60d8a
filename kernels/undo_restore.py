"""Write back what an undo log holds, bit for bit.

An element may have been logged at several steps; the entry nearest to the beginning of the log has
its original bits. Programs run in no order, so that entry is looked for first: a scan of the log
takes, for each element of a window of the weights, the smallest position of its entries (an integer
atomic: the same in every order); then each run of the weights takes its page, if it was kept whole,
and the values of the entries that were found. Windows follow each other, so that the positions need
128 MiB at most. How much is logged is read on the device; the host waits for nothing.

Bytes: 4 for each entry of the log, in every window; 4 for each element of a run with entries
(positions), 4 more if its run was kept whole, 8 more if it changed. Bound: memory bandwidth, of
scattered accesses where little has changed.
Reference: undo_restore_ in ttt_fast/reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ttt_fast.kernels.machine_code import Case
from ttt_fast.kernels.pointer_table import ALIGNMENT, device_integers
from ttt_fast.reference import UNDO_CHUNK

# Runs of UNDO_CHUNK elements in a window.
WINDOW_RUNS = 512
BLOCK = 4096
NUM_WARPS = 8
# Programs that scan the log together, at most.
SCAN_PROGRAMS = 1024
# Position of an element that has no entry; a log holds fewer than 2³² / 3.
_NOWHERE: tl.constexpr = tl.constexpr(2**31 - 1)


# ---------------------------------------------------------------------------- kernels


@triton.jit
def _note(index, k, mask, first, elements, oldest, MASKED: tl.constexpr):
    """Keep the smallest of the positions ``k`` for the elements that they name."""
    if MASKED:
        element = tl.load(index + k, mask=mask, other=0)
    else:
        element = tl.load(index + k)
    # Unsigned 32-bit numbers kept in int32.
    place = element.to(tl.uint32, bitcast=True).to(tl.int64) - first
    inside = mask & (place >= 0) & (place < elements)
    tl.atomic_min(oldest + place, k.to(tl.int32), mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["first", "elements"])
def undo_oldest_kernel(
    index,  # (capacity,) int32, element of each entry
    cursor,  # (1,) int64, entries in use
    oldest,  # (elements,) int32, position of the oldest entry of each element of the window
    first,
    elements,
    BLOCK: tl.constexpr,
):
    """A share of the log."""
    used = tl.load(cursor)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, used, step):
        k = start + tl.arange(0, BLOCK)
        if start + BLOCK <= used:
            _note(index, k, k >= 0, first, elements, oldest, False)
        else:
            _note(index, k, k < used, first, elements, oldest, True)


@triton.jit(do_not_specialize=["n_runs", "first_run"])
def undo_restore_kernel(
    runs,  # (2, n_runs) int64: address of each run, 0 where it is not to be restored; elements
    n_runs,
    first_run,
    value,  # (capacity,) int16, old bits of each entry
    counts,  # (n_runs,) int32, entries of each run
    paged,  # (n_runs,) uint8, whether it was kept whole
    pages,  # (n_runs * RUN,) int16
    oldest,  # (window,) int32
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One run of the window."""
    window_run = tl.program_id(0).to(tl.int64)
    run = first_run + window_run
    whole = tl.load(paged + run) != 0
    if whole | (tl.load(counts + run) != 0):
        address = tl.load(runs + run)
        elements = tl.load(runs + n_runs + run)
        param = address.to(tl.pointer_type(tl.int16))
        if ALIGNED:
            param = tl.multiple_of(param, 16)
        lanes = tl.arange(0, BLOCK)
        for start in range(0, RUN, BLOCK):
            i = start + lanes
            k = tl.load(oldest + window_run * RUN + i)
            found = k != _NOWHERE
            # As the next window expects it. The mask ties the store to the load: without it Triton
            # gives them different layouts, and a thread empties what another has yet to read.
            empty = tl.full((BLOCK,), _NOWHERE, tl.int32)
            tl.store(oldest + window_run * RUN + i, empty, mask=found)
            bits = tl.load(value + k, mask=found, other=0)
            if address != 0:
                if whole:
                    bits = tl.where(found, bits, tl.load(pages + run * RUN + i))
                    if start + BLOCK <= elements:
                        tl.store(param + i, bits)
                    else:
                        tl.store(param + i, bits, mask=i < elements)
                else:
                    tl.store(param + i, bits, mask=found)


# ---------------------------------------------------------------------------- launch


def undo_restore_launch(
    params: Sequence[Tensor], undo: Sequence[Tensor], undo_offsets: Sequence[int]
) -> None:
    """See :func:`ttt_fast.ops.undo_restore_`.

    Weights that are not contiguous are copied, and copied back.
    """
    index, value, cursor, counts, paged, pages = undo
    tracked = [
        (param, param.contiguous(), offset)
        for param, offset in zip(params, undo_offsets, strict=True)
        if offset >= 0 and param.numel() > 0
    ]
    if not tracked:
        return
    addresses, elements = _runs([(flat, offset) for _, flat, offset in tracked], counts.numel())
    runs = device_integers([*addresses, *elements], index.device)
    aligned = all(address % ALIGNMENT == 0 for address in addresses)
    window = min(WINDOW_RUNS, counts.numel())
    oldest = torch.full(
        (window * UNDO_CHUNK,), _NOWHERE.value, dtype=torch.int32, device=index.device
    )
    for first in range(0, counts.numel(), window):
        n = min(window, counts.numel() - first)
        if not any(addresses[first : first + n]):
            continue
        programs = min(SCAN_PROGRAMS, max(1, triton.cdiv(index.numel(), BLOCK)))
        undo_oldest_kernel[(programs,)](
            index, cursor, oldest, first * UNDO_CHUNK, n * UNDO_CHUNK, BLOCK=BLOCK,
            num_warps=NUM_WARPS, num_stages=1, enable_fp_fusion=False,
        )  # fmt: skip
        undo_restore_kernel[(n,)](
            runs, counts.numel(), first, value, counts, paged, pages, oldest, RUN=UNDO_CHUNK,
            BLOCK=BLOCK, ALIGNED=aligned, num_warps=NUM_WARPS, num_stages=1,
            enable_fp_fusion=False,
        )  # fmt: skip
    for param, flat, _ in tracked:
        if flat is not param:
            param.copy_(flat)


def _runs(tensors: Sequence[tuple[Tensor, int]], n_runs: int) -> tuple[list[int], list[int]]:
    """Address and elements of each run of the log; 0 where none of the tensors has it."""
    addresses, elements = [0] * n_runs, [0] * n_runs
    for tensor, offset in tensors:
        for begin in range(0, tensor.numel(), UNDO_CHUNK):
            run = (offset + begin) // UNDO_CHUNK
            addresses[run] = tensor.data_ptr() + begin * tensor.itemsize
            elements[run] = min(UNDO_CHUNK, tensor.numel() - begin)
    return addresses, elements


# ---------------------------------------------------------------------------- machine code

CASES = [
    Case(
        "scan of the log", undo_oldest_kernel,
        {"index": "*i32", "cursor": "*i64", "oldest": "*i32", "first": "i32", "elements": "i32"},
        {"BLOCK": BLOCK}, NUM_WARPS, divisible=("index", "cursor", "oldest"),
    ),
    Case(
        "16 bits", undo_restore_kernel,
        {
            "runs": "*i64", "n_runs": "i32", "first_run": "i32", "value": "*i16",
            "counts": "*i32", "paged": "*u8", "pages": "*i16", "oldest": "*i32",
        },
        {"RUN": UNDO_CHUNK, "BLOCK": BLOCK, "ALIGNED": True}, NUM_WARPS,
        divisible=("runs", "value", "counts", "paged", "pages", "oldest"),
        # Position and page read, weight written; what only changed elements need is scattered.
        bytes_per_element=8, block=BLOCK,
    ),
]  # fmt: skip
