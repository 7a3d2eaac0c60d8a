"""Weight gradients that are never whole in memory.

A linear layer's gradient is aᵀ b, and on a short prompt the two factors are far smaller than it.
Kept as factors it costs no buffer; its norm comes from Gram matrices (:func:`ops.gram_norms`), and
the update forms it a block of rows at a time, in the cache.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ttt_fast import ops
from ttt_fast.backend import available_backends
from ttt_fast.dispatch import choose
from ttt_fast.reference import UNDO_CHUNK
from ttt_fast.rounding import compute_dtype

# The norm of a gradient that is there reads it; before that it was written (which reads the lines
# first), afterwards the update reads it: 16 bytes in float32 that factors do not move.
SAVED_BYTES = 16
# Operations of gram_norm that may be spent to save one of these bytes. On one busy core of an EPYC
# (Zen 4), SmolLM2 in float32: backward and update take as long either way at M = 20, and 7 to 14 %
# longer with products at M = 64, where they would only save memory. 1.0 ends in between, at M = 57
# for 576 x 1536.
FLOPS_PER_BYTE = 1.0
# Bytes of one block of a gradient. On a CPU it stays in the cache together with the weights and the
# momentum; smaller ones cost more in calls (60 µs each) than they save. Other devices have launches
# to save rather than a cache to stay in.
CPU_BLOCK_BYTES = 4 << 20
DEVICE_BLOCK_BYTES = 256 << 20


class Products:
    """A gradient  G = Σ aᵀ b + Σ (rows of a lookup, added at their ids),  of shape (n, m).

    Args:
        n: rows of the weight as a matrix, of those that are selected.
        m: its columns.
    """

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._lookups: list[tuple[Tensor, Tensor]] = []

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return (self._pairs or self._lookups)[0][1].dtype

    def __bool__(self) -> bool:
        return bool(self._pairs or self._lookups)

    def add_pair(self, a: Tensor, b: Tensor) -> None:
        """Add aᵀ b for a (M, n) and b (M, m), which are kept as they are."""
        # Detached, or the graph of the whole forward would be kept with them.
        self._pairs.append((a.detach(), b.detach()))

    def add_lookup(self, ids: Tensor, rows: Tensor) -> None:
        """Add each of rows (M, m) to the row of G that ids (M,) names."""
        self._lookups.append((ids, rows.detach()))

    def clear(self) -> None:
        """Let go of all factors."""
        self._pairs, self._lookups = [], []

    def pays(self, pair_rows: int = 0, lookup_rows: int = 0) -> bool:
        """Whether the norm costs less than it saves, with so many rows more.

        M tokens cost 2 M² (n + m) operations and save 16 n·m bytes: short prompts, wide layers.
        """
        used = pair_rows + sum(len(b) for _, b in self._pairs)
        found = lookup_rows + sum(len(rows) for _, rows in self._lookups)
        flops = 2 * (used * used * (self.n + self.m) + found * (found + used) * self.m)
        return flops <= FLOPS_PER_BYTE * SAVED_BYTES * self.n * self.m

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """The a (M, n) and b (M, m) of G = aᵀ b; None where a lookup is part of it."""
        return None if self._lookups else _concatenated(self._pairs)

    def uses(self) -> Uses:
        """What :func:`ghost_norms` takes, of one delta. Several uses count as more tokens."""
        pairs, lookup = [], None
        if self._pairs:
            a, b = _concatenated(self._pairs)
            pairs = [(b[None], a[None])]
        if self._lookups:
            ids, rows = _concatenated(self._lookups)
            lookup = ids[None], rows[None]
        return Uses(pairs, lookup)

    def write_rows(self, start: int, out: Tensor) -> Tensor:
        """Write rows ``start`` and the following of G into out (rows, m), in its dtype."""
        stop = start + len(out)
        if not self._pairs:
            out.zero_()
        for k, (a, b) in enumerate(self._pairs):
            factor = a[:, start:stop].t()
            if k == 0:
                torch.mm(factor, b, out=out)
            else:
                out.addmm_(factor, b)
        for ids, rows in self._lookups:
            # Zeros for what lies outside: the size of a selection is known only on the device.
            outside = (ids < start) | (ids >= stop)
            places = (ids - start).clamp_(0, len(out) - 1)
            out.index_add_(0, places, rows.masked_fill(outside[:, None], 0))
        return out


Gradient = Tensor | Products


class Uses(NamedTuple):
    """What the gradients of one weight for n deltas are made of.

    Attributes:
        pairs: X (b, M, in) and dY (b, M, out) of the linear use: one pair for all deltas, or alike
            ones for some each, in order; none if there is none.
        lookup: ids (n, L) and dE (n, L, in) of the use as an embedding; None if there is none.
    """

    pairs: list[tuple[Tensor, Tensor]]
    lookup: tuple[Tensor, Tensor] | None = None


def ghost_norms(uses: Sequence[Uses], backend: str = "auto") -> list[Tensor]:
    """‖dYᵀ X + (rows dE, added at their ids)‖² of each weight, without forming the gradients.

        Σ (dY dYᵀ)∘(X Xᵀ) + Σ (dE dEᵀ)∘[i_s = i_t] + 2 Σ_{s,t} dY[s, i_t]·⟨X_s, dE_t⟩

    The last where a weight is used both ways (a tied embedding and head). Of all weights together,
    so that their Grams are one launch for each number of tokens that there is.

    Args:
        uses: of each weight.
        backend: of :func:`ops.gram_norms`.

    Returns:
        For each weight (n,) float64, never negative; NaN stays NaN.
    """
    alike: dict[Hashable, list[tuple[int, Tensor, Tensor]]] = {}
    for i, use in enumerate(uses):
        for x, dy in use.pairs:
            alike.setdefault((x.shape[:2], x.dtype, x.device), []).append((i, x, dy))
    parts: list[list[Tensor]] = [[] for _ in uses]
    for members in alike.values():
        weights, xs, dys = zip(*members, strict=True)
        norms = ops.gram_norms(xs, dys, backend=backend).double()
        for i, norm in zip(weights, norms, strict=True):
            parts[i].append(norm)
    totals = [_joined(part) if part else None for part in parts]
    return [
        total if use.lookup is None else _with_lookup(total, use)
        for total, use in zip(totals, uses, strict=True)
    ]


def _with_lookup(total: Tensor | None, use: Uses) -> Tensor:
    """Add the terms of the use as an embedding to those of the linear one."""
    ids, e = use.lookup
    e = e.to(compute_dtype(e.dtype))
    same = ids[:, :, None] == ids[:, None, :]
    squares = (torch.bmm(e, e.mT) * same).sum((1, 2), dtype=torch.float64)
    if total is None:
        total = squares
    else:
        x, dy = (_joined(each) for each in zip(*use.pairs, strict=True))
        at_ids = dy.gather(2, ids[:, None, :].expand(-1, dy.shape[1], -1))
        cross = torch.bmm(x.to(e.dtype), e.mT) * at_ids
        total = total + squares + 2 * cross.sum((1, 2), dtype=torch.float64)
    # Rounding may leave nothing of a sum that cancels.
    return total.clamp_min(0)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _concatenated(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(pairs) == 1:
        return pairs[0]
    first, second = zip(*pairs, strict=True)
    return torch.cat(first), torch.cat(second)


def global_norm(gradients: Iterable[Gradient], backend: str = "auto") -> Tensor:
    """Norm of all gradients together, 0-dim as :func:`ops.grad_norm` gives it."""
    gradients = list(gradients)
    products = [g for g in gradients if isinstance(g, Products)]
    norm = ops.grad_norm([g for g in gradients if isinstance(g, Tensor)], backend=backend)
    if not products:
        return norm
    uses = [product.uses() for product in products]
    squares = [s[0] for s in ghost_norms(uses, ops.backend_for("gram_norms", backend))]
    device = squares[0].device
    total = torch.stack([s.to(device) for s in (norm.double().square(), *squares)]).sum().sqrt()
    double = norm.dtype == torch.float64 or any(p.dtype == torch.float64 for p in products)
    return total.to(torch.float64 if double else torch.float32)


def takes_factors(device_type: str, backend: str) -> bool:
    """Whether ``rank_sgd_`` has a kernel there; plain torch would form gradients whole for it."""
    wanted = ops.backend_for("rank_sgd_", backend, device_type)
    return choose("rank_sgd_", device_type, wanted) != "torch"


# ---------------------------------------------------------------------------- blocks of rows


@dataclass(frozen=True)
class Block:
    """A weight, or the entries from ``start`` to ``stop`` of its first dimension.

    Attributes:
        index: which weight.
        start: first entry.
        stop: end; None for the whole weight.
        offset: elements in front of the block.
    """

    index: int
    start: int = 0
    stop: int | None = None
    offset: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        """The block of a tensor of the weight's shape, a view."""
        return tensor if self.stop is None else _by_entry(tensor)[self.start : self.stop]


def blocks_for_calls(
    views: Sequence[Tensor], indices: Sequence[int], logged: bool = False
) -> Iterator[list[Block]]:
    """Cut weights into blocks for calls of a fused update: many small ones, or part of a large one.

    Args:
        views: the weights.
        indices: which of them, on one device.
        logged: an undo log follows the update; its runs are not divided.

    Yields:
        blocks of one dtype, together as large as fits the cache.
    """
    blocks: list[Block] = []
    filled = 0
    for i in indices:
        view = _by_entry(views[i])
        limit = CPU_BLOCK_BYTES if view.device.type == "cpu" else DEVICE_BLOCK_BYTES
        numel = view[:1].numel()
        step = max(1, limit // max(1, numel * view.itemsize))
        if logged:
            run = UNDO_CHUNK // math.gcd(UNDO_CHUNK, numel)
            step = -(-step // run) * run
        for start in range(0, len(view), step):
            stop = min(start + step, len(view))
            size = (stop - start) * numel * view.itemsize
            if blocks and (filled + size > limit or views[blocks[0].index].dtype != view.dtype):
                yield blocks
                blocks, filled = [], 0
            blocks.append(Block(i, start, stop, start * numel))
            filled += size
    if blocks:
        yield blocks


def _by_entry(view: Tensor) -> Tensor:
    """Without the first dimension of a row slice's view where that is a single group of rows."""
    return view.squeeze(0) if view.dim() == 3 else view


class Scratch:
    """Memory for the blocks of one call, reused by all that follow."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def fill(
        self, blocks: Sequence[Block], params: Sequence[Tensor], gradients: Sequence[Gradient]
    ) -> list[Tensor]:
        """Form the blocks of gradients that are products.

        Args:
            blocks: of one call.
            params: the same blocks of the weights, for shapes, dtype and device.
            gradients: of all weights.
        """
        buffer = self._buffer(sum(param.numel() for param in params), params[0])
        filled, formed = 0, []
        for block, param in zip(blocks, params, strict=True):
            products = gradients[block.index]
            place = buffer[filled : filled + param.numel()]
            filled += param.numel()
            products.write_rows(block.offset // products.m, place.view(-1, products.m))
            formed.append(place.view(param.shape))
        return formed

    @property
    def memory(self) -> list[Tensor]:
        """The buffers there are."""
        return list(self._buffers.values())

    def _buffer(self, numel: int, like: Tensor) -> Tensor:
        """At least so many elements, flat."""
        key = like.device, like.dtype
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            buffer = self._buffers[key] = torch.empty(numel, dtype=key[1], device=key[0])
        return buffer


# ---------------------------------------------------------------------------- products with W


@functools.cache
def most_rows(dtype: torch.dtype, by_rows: bool = True, tiled: bool = True) -> int:
    """Rows of x up to which the product that reads W as it lies is the faster one on this CPU.

    Others copy W into another order first. Measured on SmolLM2's shapes, weights not in the cache:
    on an EPYC (Zen 4) torch's take 1.3 to 2 times as long at 20 to 64 rows and as long at 320; on a
    Xeon with AMX 1.2 to 1.7 times at 20 rows, as long at 64 for x Wᵀ and at 32 for x W. With that
    Xeon's tiles torch's take 0.9 to 1.8 times as long at 32 rows in float32, 1.1 to 1.8 at 64 to
    1024, and as long for x W at 4096; in bfloat16 ours takes 0.6 of oneDNN's time for x Wᵀ at 20
    rows, as long at 192, and for x W 0.6 to 0.8, as long at 48.

    Args:
        dtype: of x and W.
        by_rows: whether W is stored as x Wᵀ reads it; x W reads it across.
        tiled: whether tiles take W: its sides are multiples of :data:`TILE_SIDE`.

    Returns:
        0 where there is no such product.
    """
    known = torch.ops.ttt_fast_cpp if available_backends()["cpp"] == "ok" else None
    if known is None or dtype not in (torch.float32, torch.bfloat16):
        return 0
    tiled = tiled and known.has_tiles()
    if dtype == torch.bfloat16:
        return 0 if not tiled else 192 if by_rows else 48
    if tiled:
        return 4096  # more were not measured
    return 256 if not known.is_intel() else 64 if by_rows else 32


TILE_SIDE = 32  # kTileSide in csrc/cpu/tiles.h


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x Wᵀ; on a CPU by a product that reads W as it lies where that is the faster one.

    Args:
        x: (..., in).
        weight: (out, in), or a transposed view.
    """
    if weight.stride(1) == 1:
        return linears(x, [weight])[0]
    return linears_backward([x], [weight.t()])


def linears(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return x Wᵀ of several layers, each as :func:`linear`.

    Args:
        x: (..., in).
        weights: (out, in) each.
    """
    rows = _rows(x)
    if all(reads_as_it_lies(x, weight, rows) for weight in weights):
        return _as_it_lies("linears")(x.contiguous(), weights)
    # As a matrix: of a part of a batch torch would make a batch of products, with copies of W.
    matrix = x.reshape(rows, x.shape[-1])
    return [_shaped(F.linear(matrix, weight), x) for weight in weights]


def linears_backward(dys: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Return Σ dy W, the gradient at what several linear layers were given.

    Args:
        dys: (..., out) each; at least one.
        weights: (out, in) each.
    """
    rows = _rows(dys[0])
    if all(reads_as_it_lies(dy, w.t(), rows) for dy, w in zip(dys, weights, strict=True)):
        return _as_it_lies("linears_backward")([dy.contiguous() for dy in dys], weights)
    (first, *others) = [dy.reshape(rows, dy.shape[-1]) for dy in dys]
    total = F.linear(first, weights[0].t())
    for dy, weight in zip(others, weights[1:], strict=True):
        if dy.dtype == torch.float32:
            total.addmm_(dy, weight)
        else:
            total.add_(F.linear(dy, weight.t()))
    return _shaped(total, dys[0])


@functools.cache
def _as_it_lies(op: str) -> Callable[..., Any]:
    return ops.implementation(op, "cpu")


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()


def _shaped(y: Tensor, x: Tensor) -> Tensor:
    """Rows of y as x has them; to autograd no view, so that a model may write into what it gets."""
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))


def reads_as_it_lies(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether the product that reads W as it lies is the faster one of so many rows x with W."""
    if rows == 0 or not x.is_cpu:
        return False
    (across, along), (out, width) = weight.stride(), weight.shape
    tiled = out % TILE_SIDE == 0 == width % TILE_SIDE
    return 1 in (across, along) and rows <= most_rows(x.dtype, along == 1, tiled)
