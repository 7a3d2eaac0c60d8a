"""Tables of addresses: how one launch works on a list of tensors.

A tensor is cut into runs of memory that are consecutive in every list (a contiguous tensor is one
run, a row slice of a fused projection one for each group of rows), and runs into chunks at the
multiples of ``chunk`` of the index within the tensor. One program, or one CUDA block, works on one
chunk: it reads where the chunk lies from column ``program`` of the table.

A table costs 16 bytes a chunk and 8 more for each list. It is built once and kept: of its two
parts, the cuts depend on shapes and strides alone, and new addresses (gradients that were
allocated afresh) are an upload of 8 bytes a tensor and list.

Only torch is imported here: the CUDA kernels take the same tables.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Widest access of a GPU; a table says whether every chunk may be accessed like that.
ALIGNMENT = 16
# Elements; a tensor whose runs are shorter is copied rather than cut.
SHORTEST_RUN = 32
# Tables and cuts that are kept. A step uses one to three of each.
_KEPT = 32


class PointerTable(NamedTuple):
    """Where the chunks of some tensors lie; tensors of equal dtypes and alignment share one table.

    Attributes:
        n_chunks: number of chunks, one program each.
        pointers: (L, n_chunks) int64, address of a chunk's first element in each of the L lists; 0
            in the row of a list that is empty.
        numel: (n_chunks,) int32, elements of a chunk, at most ``chunk``.
        index: (n_chunks,) int64, index of a chunk's first element within its tensor, row-major.
        tensor: (n_chunks,) int32, position of the tensor in the caller's lists.
        dtypes: dtype of the tensors of each list, None for an empty list.
        aligned: every address is a multiple of 16.
    """

    n_chunks: int
    pointers: Tensor
    numel: Tensor
    index: Tensor
    tensor: Tensor
    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool


class _Memory(NamedTuple):
    """What a table needs to know of a tensor; hashable."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Cuts(NamedTuple):
    """A table without addresses: ``offsets`` are in bytes from the start of each tensor."""

    device: torch.device
    offsets: Tensor
    numel: Tensor
    index: Tensor
    tensor: Tensor
    dtypes: tuple[torch.dtype | None, ...]
    aligned: bool


_TABLES: OrderedDict[Hashable, Any] = OrderedDict()
_CUTS: OrderedDict[Hashable, Any] = OrderedDict()
_INTEGERS: OrderedDict[Hashable, Any] = OrderedDict()
# What a captured CUDA graph reads when it is replayed must not be freed before the graph is: where
# nobody says whose it is (captured_for), never.
_CAPTURED: list[Any] = []


def pointer_tables(
    lists: Sequence[Sequence[Tensor]], chunk: int, written: Mapping[int, str] | None = None
) -> list[PointerTable]:
    """Cut tensors into chunks and tabulate their addresses, for one launch a table.

    Tables hold addresses, not tensors: the caller keeps the tensors alive until the launch.

    Args:
        lists: L lists of n tensors, or empty. The i-th tensors of all lists have one shape and are
            on one device; their strides may differ.
        chunk: elements of a chunk at most.
        written: names of the lists that are written to, by position, for the error.

    Returns:
        A table for each combination of device, dtypes and alignment. Tensors without elements give
        no chunk.

    Raises:
        ValueError: a tensor to be written to is expanded: several of its elements share memory.
    """
    memories = tuple(
        tuple(_Memory(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)
        for tensors in lists
    )
    devices = tuple(tensor.device for tensor in next(filter(len, lists), ()))

    def build() -> tuple[list[PointerTable], list[Tensor]]:
        for position, name in (written or {}).items():
            for i, memory in enumerate(memories[position]):
                _refuse_expanded(f"{name}[{i}]", memory.shape, memory.strides)
        return _build_tables(memories, devices, chunk)

    tables, _ = _kept(_TABLES, (memories, devices, chunk), build)
    return tables


@contextmanager
def captured_for(owner: list[Any]) -> Iterator[None]:
    """Let what a CUDA graph reads that is captured in the body live as long as ``owner``."""
    global _CAPTURED
    outer, _CAPTURED = _CAPTURED, owner
    try:
        yield
    finally:
        _CAPTURED = outer


def with_long_runs(
    lists: Sequence[Sequence[Tensor]], written: Mapping[int, str]
) -> tuple[list[Sequence[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Put contiguous copies where memory is in pieces too short for a program each.

    A transposed or expanded tensor has runs of one element. Row slices have long ones.

    Args:
        lists: as for :func:`pointer_tables`.
        written: names of the lists that are written to, by position, for the error.

    Returns:
        The lists with copies in them, and the pairs (tensor, copy) that are to be copied back after
        the launch.

    Raises:
        ValueError: a tensor to be written to is expanded: several of its elements share memory.
    """
    long: list[Sequence[Tensor]] = []
    copies = []
    for position, tensors in enumerate(lists):
        short = [i for i, tensor in enumerate(tensors) if not has_long_runs(tensor)]
        if short:
            tensors = list(tensors)
        for i in short:
            tensor, tensors[i] = tensors[i], tensors[i].contiguous()
            if position in written:
                _refuse_expanded(f"{written[position]}[{i}]", tensor.shape, tensor.stride())
                copies.append((tensor, tensors[i]))
        long.append(tensors)
    return long, copies


def has_long_runs(tensor: Tensor) -> bool:
    """Whether enough elements lie side by side for chunks to be worth a program each."""
    return tensor.is_contiguous() or _runs(tensor.shape, tensor.stride())[0] >= SHORTEST_RUN


def device_integers(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers that kernels read, (n,) int64, uploaded once and kept like the tables."""

    def build() -> tuple[Tensor, Tensor]:
        host = _pinned(np.asarray(values, dtype=np.int64), device)
        return host.to(device, non_blocking=True), host

    return _kept(_INTEGERS, (tuple(values), device), build)[0]


def _kept(cache: OrderedDict[Hashable, Any], key: Hashable, build: Callable[[], Any]) -> Any:
    """Return the entry of ``key``, built if need be; the least recently used one goes.

    What is built while a CUDA graph is captured holds nothing before the graph is replayed, so that
    nobody else must find it.
    """
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    entry = cache.get(key)
    if entry is not None:
        cache.move_to_end(key)
    else:
        entry = build()
        if not capturing:
            cache[key] = entry
            if len(cache) > _KEPT:
                cache.popitem(last=False)
    if capturing:
        _CAPTURED.append(entry)
    return entry


def _build_tables(
    memories: tuple[tuple[_Memory, ...], ...],
    devices: tuple[torch.device, ...],
    chunk: int,
) -> tuple[list[PointerTable], list[Tensor]]:
    """Tables, and the host tensors that their upload reads."""
    addresses = np.zeros((len(memories), len(devices)), dtype=np.int64)
    for row, tensors in zip(addresses, memories, strict=True):
        if tensors:
            row[:] = [memory.address for memory in tensors]
    aligned = tuple((addresses % ALIGNMENT == 0).all(axis=0).tolist())
    layouts = tuple(tuple(memory[1:] for memory in tensors) for tensors in memories)

    def build() -> list[_Cuts]:
        return _cut(layouts, devices, aligned, chunk)

    groups = _kept(_CUTS, (layouts, devices, aligned, chunk), build)
    hosts: dict[torch.device, Tensor] = {}
    bases: dict[torch.device, Tensor] = {}
    tables = []
    for cuts in groups:
        if cuts.device not in bases:
            hosts[cuts.device] = _pinned(addresses, cuts.device)
            bases[cuts.device] = hosts[cuts.device].to(cuts.device, non_blocking=True)
        pointers = bases[cuts.device].index_select(1, cuts.tensor).add_(cuts.offsets)
        tables.append(
            PointerTable(
                cuts.numel.numel(), pointers, cuts.numel, cuts.index, cuts.tensor, cuts.dtypes,
                cuts.aligned,
            )
        )  # fmt: skip
    return tables, list(hosts.values())


def _cut(
    layouts: tuple[tuple[tuple[torch.dtype, tuple[int, ...], tuple[int, ...]], ...], ...],
    devices: tuple[torch.device, ...],
    aligned: tuple[bool, ...],
    chunk: int,
) -> list[_Cuts]:
    """Cut every tensor into chunks and put those that one launch can serve together."""
    groups: dict[Hashable, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]] = {}
    for i, device in enumerate(devices):
        members = [tensors[i] if tensors else None for tensors in layouts]
        runs = [None if m is None else _runs(m[1], m[2]) for m in members]
        shape = next(m[1] for m in members if m is not None)
        total = int(np.prod(shape, dtype=np.int64))
        if total == 0:
            continue
        lengths = {chunk, *(run[0] for run in runs if run is not None)}
        index = np.unique(np.concatenate([np.arange(0, total, length) for length in lengths]))
        numel = np.diff(index, append=total).astype(np.int32)
        offsets = np.zeros((len(layouts), len(index)), dtype=np.int64)
        for row, member, run in zip(offsets, members, runs, strict=True):
            if member is not None:
                row[:] = _offsets(index, *run) * member[0].itemsize
        dtypes = tuple(None if m is None else m[0] for m in members)
        wide = aligned[i] and not (offsets % ALIGNMENT).any()
        groups.setdefault((device, dtypes, wide), []).append((i, index, numel, offsets))

    def upload(parts: list[np.ndarray], device: torch.device) -> Tensor:
        return _pinned(np.concatenate(parts, axis=-1), device).to(device, non_blocking=True)

    return [
        _Cuts(
            device,
            upload([offsets for _, _, _, offsets in parts], device),
            upload([numel for _, _, numel, _ in parts], device),
            upload([index for _, index, _, _ in parts], device),
            upload([np.full(len(index), i, dtype=np.int32) for i, index, _, _ in parts], device),
            dtypes,
            wide,
        )
        for (device, dtypes, wide), parts in groups.items()
    ]


def _runs(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
    """Fold dimensions into a run of consecutive elements and outer ones, (size, stride) each.

    Outer dimensions are innermost first and count runs; a contiguous tensor has none.
    """
    length, outer = 1, []
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if not outer and stride == length:
            length *= size
        elif outer and stride == outer[-1][0] * outer[-1][1]:
            outer[-1] = (outer[-1][0] * size, outer[-1][1])
        else:
            outer.append((size, stride))
    return length, outer


def _offsets(index: np.ndarray, length: int, outer: list[tuple[int, int]]) -> np.ndarray:
    """Distance of elements from the first one, in elements of memory."""
    run, offsets = np.divmod(index, length)
    for size, stride in outer:
        offsets += run % size * stride
        run //= size
    return offsets


def _refuse_expanded(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    pairs = zip(shape, strides, strict=True)
    if 0 not in shape and any(size > 1 and stride == 0 for size, stride in pairs):
        raise ValueError(
            f"{name} is expanded (several elements share memory) and cannot be written; pass a"
            " clone of it."
        )


def _pinned(array: np.ndarray, device: torch.device) -> Tensor:
    """A host tensor from which a copy to ``device`` does not wait."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor
