"""How an output head computes losses of tokens, by how it trains: frozen, factored, or dense.

Each kind makes the logits of a chunk of tokens, has their place taken by their gradient, and keeps
what its backward needs of that; see :mod:`ttt_fast.engines.head`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttt_fast import ops, placement
from ttt_fast.batch import IGNORE_INDEX
from ttt_fast.engines.gradients import LinearSlots
from ttt_fast.engines.products import linear
from ttt_fast.engines.takeover import LinearSite

# Bytes of the logits of one chunk: of 128 tokens of SmolLM2's in float32. On a Xeon its head takes
# 9 % less time with 24 MiB than with 16 at 256 tokens, and no less with 32. From 32 on glibc asks
# the system for such memory each time.
CPU_LOGIT_BYTES = 24 << 20
DEVICE_LOGIT_BYTES = 256 << 20


def tokens_at_once(tokens: int, token_bytes: int, device_type: str = "cpu") -> int:
    """Tokens of a chunk, all chunks about as large.

    Args:
        tokens: of all.
        token_bytes: of the logits of one.
        device_type: of the head.
    """
    chunks = max(1, -(-tokens // most_tokens(token_bytes, device_type)))
    return -(-tokens // chunks)


def most_tokens(token_bytes: int, device_type: str = "cpu") -> int:
    """Tokens of the largest chunk, for so many bytes of the logits of one."""
    limit = CPU_LOGIT_BYTES if device_type == "cpu" else DEVICE_LOGIT_BYTES
    return max(1, limit // max(1, token_bytes))


# ---------------------------------------------------------------------------- what is asked


class Asked:
    """The tokens that a batch wants predicted, (n, M'): of n groups, equally many of each.

    On a CPU those with a label, elsewhere all: the host would have to wait for their number. A
    group that has fewer is filled up with tokens that count nothing.

    Args:
        targets: (N, T), the token after each, −100 where none counts.
        scale: (N, T), derivative of the deltas' losses, summed, by each token's.
        n: number of groups of rows.

    Attributes:
        targets: (n, M').
        scale: (n, M').
    """

    def __init__(self, targets: Tensor, scale: Tensor, n: int) -> None:
        self._shape = targets.shape
        by_group = targets.reshape(n, -1)
        labelled = by_group != IGNORE_INDEX
        self._index = self._ignored = None
        if not placement.look_waits(targets.device):
            counts = labelled.sum(1)
            most = int(counts.max())
            order = (~labelled).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
            first = torch.arange(n)[:, None] * by_group.shape[1]
            self._index = (order + first).flatten()
            if int(counts.min()) < most:
                self._ignored = ~labelled.gather(1, order)
        else:
            self._ignored = ~labelled
        self.targets, self.scale = (self._taken(each.reshape(-1, 1)) for each in (targets, scale))
        self.targets, self.scale = self.targets.view(n, -1), self.scale.view(n, -1)

    def rows(self, x: Tensor) -> Tensor:
        """The rows of x (N, T, D) that are asked for, (n, M', D); 0 where they do not count."""
        n, count = self.targets.shape
        rows = self._taken(x.reshape(-1, x.shape[-1])).view(n, count, -1)
        # Whatever padding holds, NaN included, is not to get in.
        return rows if self._ignored is None else rows.masked_fill(self._ignored[..., None], 0)

    def spread(self, rows: Tensor) -> Tensor:
        """Rows (n, M') or (n, M', D) at their places, (N, T) or (N, T, D), 0 elsewhere."""
        flat = rows.flatten(0, 1)
        if self._index is not None:
            whole = flat.new_zeros(self._shape.numel(), *flat.shape[1:])
            flat = whole.index_copy_(0, self._index, flat)
        return flat.view(*self._shape, *flat.shape[1:])

    def _taken(self, rows: Tensor) -> Tensor:
        return rows if self._index is None else rows.index_select(0, self._index)


def loss_and_gradient_(z: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Losses (n, m) of logits z (n, m, V), which become s ∘ (softmax(z) − onehot)."""
    n, m, V = z.shape
    flat = z.view(-1, V)
    losses = ops.nll_(flat, targets.reshape(-1), ignore_index=IGNORE_INDEX).view(n, m)
    factors = scale.reshape(-1)
    if z.dtype != scale.dtype and not placement.look_waits(z.device):
        # Row by row, or torch makes copies of all in the wider type first.
        for row, factor in zip(flat, factors.tolist(), strict=True):
            row.mul_(factor)
    else:
        flat.mul_(factors[:, None])
    return losses


# ---------------------------------------------------------------------------- how a head trains

Saved = tuple[Tensor | None, ...]


class FrozenHead:
    """A head that does not train: dh is all that is left of it.

    Args:
        module: the head.
    """

    trains = False

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def stand_in(self, recording: bool) -> Callable[..., Tensor] | None:
        """What the engine has put in the place of its forward, None for nothing."""
        return None

    def leaves(self) -> tuple[Tensor | None, Tensor | None]:
        """What the loss is differentiated by besides the input: weight and bias."""
        return None, None

    def groups(self) -> int:
        """Groups of rows that are told apart."""
        return 1

    def chunks(self, asked: Asked) -> Iterator[slice]:
        """Parts of the tokens asked for, of which the logits are there together."""
        count, token_bytes = asked.targets.shape[1], self.module.weight[:, 0].nbytes
        size = tokens_at_once(count, token_bytes, asked.targets.device.type)
        for start in range(0, count, size):
            yield slice(start, min(start + size, count))

    def logits(self, x: Tensor) -> Tensor:
        """Logits of rows x (n, m, D), as the module gives them."""
        # As a matrix, see products.linear, but by the product of the module itself.
        flat = F.linear(x.flatten(0, 1), self.module.weight, self.module.bias)
        return flat.view(*x.shape[:-1], len(self.module.weight))

    def forward(
        self, x: Tensor, bias: Tensor | None, asked: Asked, needs_dx: bool
    ) -> tuple[Tensor, Saved]:
        """Losses (n, M') of the tokens asked for in x (N, T, D), and what the backward needs."""
        weight, rows = self.module.weight.detach(), asked.rows(x)
        losses = asked.scale.new_empty(asked.scale.shape)
        dx = torch.empty_like(rows) if needs_dx else None
        for part in self.chunks(asked):
            z = _with_bias_(linear(rows[:, part], weight), self.module.bias)
            losses[:, part] = loss_and_gradient_(z, asked.targets[:, part], asked.scale[:, part])
            if needs_dx:
                dx[:, part] = linear(z, weight.t())
        return losses, (asked.spread(dx) if needs_dx else None,)

    def backward(
        self, asked: Asked, saved: Saved, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return dh (N, T, D) and the gradient of the bias."""
        return saved[0], None


class FactoredHead(FrozenHead):
    """A head whose weight trains as factors: dz goes to their rows as soon as it is there.

    All tokens go together, so that the factors of earlier steps are read once; they are as large,
    for each step, as the logits.

    Args:
        site: what stands in for the head.
    """

    trains = True

    def __init__(self, site: LinearSite) -> None:
        super().__init__(site.module)
        self._site = site

    def stand_in(self, recording: bool) -> Callable[..., Tensor] | None:
        """The site's."""
        return self._site.forward

    def leaves(self) -> tuple[Tensor | None, Tensor | None]:
        """In place of the weight something that always is; the bias of each delta."""
        return self._site.desk.anchor, self._site.effective_bias()

    def groups(self) -> int:
        """One for each delta."""
        return self._site.desk.layout.n

    def chunks(self, asked: Asked) -> Iterator[slice]:
        """All."""
        yield slice(0, asked.targets.shape[1])

    def logits(self, x: Tensor) -> Tensor:
        """Logits of rows x (n, m, D) of the deltas."""
        site = self._site
        return site.product(x, site.effective_bias(), site.desk.layout)

    def forward(
        self, x: Tensor, bias: Tensor | None, asked: Asked, needs_dx: bool
    ) -> tuple[Tensor, Saved]:
        """Losses (n, M'), dh and the gradient of the bias."""
        site, layout = self._site, self._site.desk.layout
        rows = asked.rows(x)
        start, place = site.record(rows, rows, layout, None)
        z = site.product(rows, bias, layout, place)
        losses = loss_and_gradient_(z, asked.targets, asked.scale)
        dx, dz = site.record_gradient(z, start, layout, None, needs_dx)
        dbias = None if bias is None else dz.sum(1, dtype=bias.dtype)
        return losses, (asked.spread(dx) if needs_dx else None, dbias)

    def backward(
        self, asked: Asked, saved: Saved, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return dh (N, T, D) and the gradient of the bias (n, V)."""
        return saved


class DenseHead(FrozenHead):
    """A head whose gradient goes to slots of the dense engine, and which keeps dz and h for it.

    Args:
        module: the head.
        slots: where the gradients go.
        taken: what the engine puts in the place of its forward in a step.
    """

    trains = True

    def __init__(self, module: nn.Linear, slots: LinearSlots, taken: Callable[..., Tensor]) -> None:
        super().__init__(module)
        self._slots, self._taken = slots, taken

    def stand_in(self, recording: bool) -> Callable[..., Tensor] | None:
        """What takes its gradients, in a step."""
        return self._taken if recording else None

    def leaves(self) -> tuple[Tensor | None, Tensor | None]:
        """The parameters, whose gradients go elsewhere."""
        return self.module.weight, self.module.bias

    def forward(
        self, x: Tensor, bias: Tensor | None, asked: Asked, needs_dx: bool
    ) -> tuple[Tensor, Saved]:
        """Losses (1, M'), of all tokens at once: dz, a factor of the gradient, is kept anyway."""
        rows = asked.rows(x)
        z = _with_bias_(linear(rows, self.module.weight.detach()), self.module.bias)
        losses = loss_and_gradient_(z, asked.targets, asked.scale)
        return losses, (z[0], rows[0] if self._slots.weight is not None else None)

    def backward(
        self, asked: Asked, saved: Saved, needs_dx: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Give the slots their gradients; return dh (N, T, D)."""
        dlogits, x = saved
        self._slots.add(x, dlogits)
        if not needs_dx:
            return None, None
        return asked.spread(linear(dlogits, self.module.weight.detach().t())[None]), None


def _with_bias_(z: Tensor, bias: Tensor | None) -> Tensor:
    return z if bias is None else z.add_(bias.detach())
