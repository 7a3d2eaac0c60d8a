"""The output head and the loss in one piece: the logits of a few tokens at a time, none kept.

Where the objective is our own negative log-likelihood and a model gives its head's logits as they
are, nobody needs them. While such a model runs, the ``forward`` of its head computes, a chunk of
tokens after the other,

    z = h Wᵀ + b,    loss = −log softmax(z)[target],    dz = s ∘ (softmax(z) − onehot),    dh = dz W

with s the weight of each token in the loss of its delta, and returns a tensor without memory. Only
dh is kept for the backward pass; of a head that trains, the factored engine records dz as it is
made, and the dense one keeps it. Tokens without a label have no logits at all.

That a model does nothing else with its logits is not believed but seen: the tensor that the head
returned has to come out of the model, the same object, unchanged. It is on the device "meta", so
whatever else is computed from it has no numbers. When a model turns out to be another kind, at its
first forward, that forward runs once more with logits, as do all later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules import module as torch_module

from ttt_fast import ops
from ttt_fast.batch import IGNORE_INDEX, Batch
from ttt_fast.engines.gradients import LinearSlots
from ttt_fast.engines.products import linear
from ttt_fast.engines.takeover import LinearSite
from ttt_fast.objective import next_tokens, reduce_rows, row_losses, token_scale
from ttt_fast.op_checks import DTYPES
from ttt_fast.reference import compute_dtype

# Bytes of the logits of one chunk. More tokens at once read the weights less often, and 16 MiB are
# 85 tokens of SmolLM2's in float32, where a product takes longer than the reading.
CPU_LOGIT_BYTES = 16 << 20
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
        if targets.device.type == "cpu":
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

    def chunks(self, token_bytes: int) -> Iterator[slice]:
        """Slices of 0 … M'."""
        n, count = self.targets.shape
        size = tokens_at_once(n * count, token_bytes, self.targets.device.type)
        step = max(1, size // n)
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))


def _loss_and_gradient_(z: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Losses (n, m) of logits z (n, m, V), which become s ∘ (softmax(z) − onehot)."""
    n, m, V = z.shape
    flat = z.view(-1, V)
    losses = ops.nll_(flat, targets.reshape(-1), ignore_index=IGNORE_INDEX).view(n, m)
    factors = scale.reshape(-1)
    if z.device.type == "cpu" and z.dtype != scale.dtype:
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

    def logits(self, x: Tensor) -> Tensor:
        """Logits of rows x (n, m, D), as the module gives them."""
        return F.linear(x, self.module.weight, self.module.bias)

    def forward(
        self, x: Tensor, bias: Tensor | None, asked: Asked, needs_dx: bool
    ) -> tuple[Tensor, Saved]:
        """Losses (n, M') of the tokens asked for in x (N, T, D), and what the backward needs."""
        weight, rows = self.module.weight.detach(), asked.rows(x)
        losses = asked.scale.new_empty(asked.scale.shape)
        dx = torch.empty_like(rows) if needs_dx else None
        for part in asked.chunks(len(weight) * x.itemsize):
            z = _with_bias_(linear(rows[:, part], weight), self.module.bias)
            losses[:, part] = _loss_and_gradient_(z, asked.targets[:, part], asked.scale[:, part])
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

    def logits(self, x: Tensor) -> Tensor:
        """Logits of rows x (n, m, D) of the deltas."""
        site = self._site
        return site.product(x.contiguous(), site.effective_bias(), site.desk.layout)

    def forward(
        self, x: Tensor, bias: Tensor | None, asked: Asked, needs_dx: bool
    ) -> tuple[Tensor, Saved]:
        """Losses (n, M'), and dh; to the factors, a chunk is a use of the weight."""
        site, layout = self._site, self._site.desk.layout
        rows, losses = asked.rows(x), asked.scale.new_empty(asked.scale.shape)
        dx = torch.empty_like(rows) if needs_dx else None
        dbias = None if bias is None else torch.zeros_like(bias)
        for part in asked.chunks(len(self.module.weight) * x.itemsize):
            some = rows[:, part].contiguous()
            start, place = site.record(some, some, layout, None)
            z = site.product(some, bias, layout, place)
            losses[:, part] = _loss_and_gradient_(z, asked.targets[:, part], asked.scale[:, part])
            gradient, _ = site.record_gradient(z, start, layout, None, needs_dx)
            if needs_dx:
                dx[:, part] = gradient
            if dbias is not None:
                dbias += z.sum(1, dtype=dbias.dtype)
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
        losses = _loss_and_gradient_(z, asked.targets, asked.scale)
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


class _HeadLoss(torch.autograd.Function):
    """Loss of each delta; its gradient, that of the sum of them all, is made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: _Call
    ) -> Tensor:
        ctx.head, ctx.asked, ctx.needs_dx = call.head, call.asked, ctx.needs_input_grad[0]
        losses, saved = call.head.forward(x, bias, call.asked, ctx.needs_dx)
        ctx.save_for_backward(*saved)
        return call.reduced(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        assert dlosses.device.type != "cpu" or bool((dlosses == 1).all()), "of the sum, only"
        dx, dbias = ctx.head.backward(ctx.asked, ctx.saved_tensors, ctx.needs_dx)
        return dx, None, dbias, None


# ---------------------------------------------------------------------------- one forward


class _Call:
    """A forward of the model in which its head is to compute the losses.

    Attributes:
        losses: (n_deltas,); None as long as the head was not called.
        placeholder: what the head returned.
        count: how often it was called.
    """

    def __init__(self, head: FrozenHead, rows: Batch, n_deltas: int, reduction: str) -> None:
        self.head = head
        self._rows, self._n_deltas, self._reduction = rows, n_deltas, reduction
        self._targets = next_tokens(rows.labels)
        self.losses: Tensor | None = None
        self.placeholder: Tensor | None = None
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        """Compute the losses from what the head is given; return a tensor without memory."""
        self.count += 1
        weight = self.head.module.weight
        fits = x.dim() == 3 and x.shape[:2] == self._targets.shape
        if self.count > 1 or not fits or (x.dtype, x.device) != (weight.dtype, weight.device):
            own = self.head.stand_in(torch.is_grad_enabled())
            return nn.Linear.forward(self.head.module, x) if own is None else own(x)
        dtype = compute_dtype(x.dtype)
        scale = token_scale(self._targets, self._rows, self._reduction, self._n_deltas, dtype)
        self.asked = Asked(self._targets, scale, self.head.groups())
        if torch.is_grad_enabled():
            self.losses = _HeadLoss.apply(x, *self.head.leaves(), self)
        else:
            self.losses = self.reduced(self._token_losses(x))
        with torch.inference_mode(False):  # whose tensors would not count changes
            shape = *x.shape[:2], len(weight)
            self.placeholder = torch.empty(shape, dtype=x.dtype, device="meta")
        return self.placeholder

    def reduced(self, token_losses: Tensor) -> Tensor:
        """Loss of each delta (n_deltas,) from those of the tokens that were asked for."""
        by_token = self.asked.spread(token_losses)
        by_row = row_losses(by_token, self._targets, self._rows, self._reduction)
        return reduce_rows(by_row, self._rows.row_weights, self._n_deltas)

    def _token_losses(self, x: Tensor) -> Tensor:
        """Losses (n, M'), without a gradient."""
        rows, losses = self.asked.rows(x), self.asked.scale.new_empty(self.asked.scale.shape)
        for part in self.asked.chunks(len(self.head.module.weight) * x.itemsize):
            z = self.head.logits(rows[:, part])
            z = z.to(losses.dtype).flatten(0, 1)
            targets = self.asked.targets[:, part]
            found = F.cross_entropy(
                z, targets.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none"
            )
            losses[:, part] = found.view(targets.shape)
        return losses

    def is_answered_by(self, outputs: Any) -> bool:
        """Whether the model gave what its head returned, as it was."""
        whole = self.placeholder
        same = getattr(outputs, "logits", None) is whole
        return same and whole._version == 0 and self.count == 1


class OutputHead:
    """The head of a model, and whether its logits are needed.

    Args:
        model: the model.
        head: how its head trains; None where there is none that is known.

    Attributes:
        plain: whether the model gives the head's logits as they are; None before its first forward.
    """

    def __init__(self, model: nn.Module, head: FrozenHead | None) -> None:
        self._head, self.plain = head, None
        self._around = [] if head is None else _around(model, head.module)

    def run(
        self,
        forward: Callable[[], Any],
        rows: Batch,
        n_deltas: int,
        reduction: str | None,
        mark: Callable[[], Callable[[], None]],
    ) -> tuple[Any, Tensor | None]:
        """Run a model forward; without logits where that is possible.

        Args:
            forward: runs the model on the rows.
            rows: a complete batch.
            n_deltas: number of deltas that the rows belong to.
            reduction: of the negative log-likelihood, None for any other objective.
            mark: notes what has been recorded, and returns what takes back the rest.

        Returns:
            What the model returned, and the loss of each delta; None for the losses where the
            outputs have logits.

        Raises:
            RuntimeError: the model gave its head's logits at its first forward, but does not now.
        """
        if reduction is None or not self._is_free(torch.is_grad_enabled()):
            return forward(), None
        call = _Call(self._head, rows, n_deltas, reduction)
        undo = mark() if self.plain is None else None
        outputs = None
        with self._called(call):
            try:
                outputs = forward()
            except Exception:
                # Maybe because there was a tensor without numbers: with logits, we shall know.
                if self.plain is not None or call.placeholder is None:
                    raise
        if call.placeholder is None and outputs is not None:
            return outputs, None
        if call.is_answered_by(outputs):
            self.plain = True
            return outputs, call.losses
        if self.plain is not None:
            raise RuntimeError(
                "adapt: the model changed its head's logits, or called the head twice, which it did"
                " not do before, so that the loss would be another. Pass an objective of your own,"
                " which sees the logits, or make a new TTTTrainer for each kind of batch."
            )
        undo()
        outputs = forward()
        self.plain = False
        return outputs, None

    def _is_free(self, recording: bool) -> bool:
        """Whether the head can be replaced without anybody noticing."""
        if self._head is None or self.plain is False or torch_module._has_any_global_hook():
            return False
        module = self._head.module
        if torch.is_autocast_enabled(module.weight.device.type):
            return False
        if recording and not self._head.trains:
            if any(param.requires_grad for param in module.parameters()):
                return False
        found = vars(module).get("forward")
        return found == self._head.stand_in(recording) and not (
            module._forward_pre_hooks
            or _is_watched(module)
            or any("forward" in vars(each) or _is_watched(each) for each in self._around)
        )

    @contextmanager
    def _called(self, call: _Call) -> Iterator[None]:
        own = vars(self._head.module)
        found = own.get("forward")
        try:
            self._head.module.forward = call.forward
            yield
        finally:
            own.pop("forward", None)
            if found is not None:
                self._head.module.forward = found


def output_head(model: nn.Module) -> nn.Linear | None:
    """The module that gives a model's logits, where it is a plain linear one."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return None
    plain = type(head).forward is nn.Linear.forward and set(head._parameters) == {"weight", "bias"}
    if not plain or not isinstance(head.weight, nn.Parameter) or head.weight.dtype not in DTYPES:
        return None
    return head


# What configurations have where logits are scaled, shifted or capped behind the head.
_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


def expects_no_logits(model: nn.Module) -> bool:
    """Whether the head will compute the losses, as far as can be told before a forward.

    For predictions of memory; what happens, the first forward decides.
    """
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    changed = any(getattr(config, name, None) is not None for name in _CHANGES)
    return not changed and output_head(model) is not None


def _around(model: nn.Module, head: nn.Module) -> list[nn.Module]:
    """The modules that the head is inside of."""
    (name,) = [name for name, module in model.named_modules() if module is head]
    parts = name.split(".")[:-1]
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]


def _is_watched(module: nn.Module) -> bool:
    """Whether someone is called with what the module gives, or it is compiled."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return bool(
        compiled
        or hasattr(module, "_orig_mod")
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
